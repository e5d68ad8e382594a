"""The parts of the diffusion U-Net and the one factory that both U-Nets build them with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import AttentionBlock, SpatialTransformer
from ldm.modules.layers import Downsample, ResBlock, Timestep, Upsample, conv_nd
from ldm.modules.matmul import Linear


class TimestepEmbedSequential(nn.Sequential):
    """Hands the embedding to residual blocks, the context to transformers, and only x to the rest."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, E], context [B, M, D] -> [B, C', H', W']."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def per_level(value: Any, levels: int, name: str) -> list[Any]:
    """One value for all levels, or a list with one for each."""
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"got {name}={values}, expected one value or {levels} of them")
    return values


@dataclass(frozen=True)
class Blocks:
    """Builds the parts of one U-Net; the fields mean what `UNetModel`'s arguments of the same name mean."""

    model_channels: int
    num_res_blocks: int | Sequence[int]
    attention_resolutions: Sequence[int]
    channel_mult: Sequence[int]
    dropout: float = 0.0
    conv_resample: bool = True
    dims: int = 2
    use_checkpoint: bool = False
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int | Sequence[int] = 1
    context_dim: int | Sequence[int] | None = None
    legacy: bool = True
    use_linear_in_transformer: bool = False
    disable_self_attentions: bool | Sequence[bool] = False
    num_attention_blocks: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("got num_heads=-1 and num_head_channels=-1, expected one of them")

    @property
    def embed_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.model_channels

    def at(self, name: str, level: int) -> Any:
        """The value of an option at one level."""
        return per_level(getattr(self, name), len(self.channel_mult), name)[level]

    def res(self, channels: int, out: int | None = None, **resample: bool) -> ResBlock:
        """A residual block; `up=True` or `down=True` make it resample."""
        return ResBlock(
            channels,
            self.embed_dim,
            self.dropout,
            out_channels=out,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **resample,
        )

    def attention(self, channels: int, level: int, decoder: bool = False, self_attn: bool = True) -> nn.Module:
        """The attention layer of one level: over positions, and over the context if transformers are used."""
        spatial, dim_head, heads = self.use_spatial_transformer, self.num_head_channels, self.num_heads
        if dim_head != -1:
            heads = channels // dim_head
        if heads < 1 or heads > channels:
            raise ValueError(f"got {channels} channels, too few for num_heads={heads}, num_head_channels={dim_head}")
        if dim_head == -1 and not self.legacy or spatial and (dim_head == -1 or self.legacy):
            dim_head = channels // heads  # the old rule splits whatever there is into `heads` parts
        if spatial:
            return SpatialTransformer(
                channels,
                heads,
                dim_head,
                depth=self.at("transformer_depth", level),
                context_dim=self.context_dim,
                disable_self_attn=not self_attn,
                use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
            )
        if decoder and self.num_heads_upsample != -1:
            heads = self.num_heads_upsample
        return AttentionBlock(channels, heads, dim_head, self.use_checkpoint, self.use_new_attention_order)

    def stage(self, channels: int, level: int, index: int, decoder: bool = False) -> list[nn.Module]:
        """Residual block number `index` of a level and the attention that may follow it."""
        out = self.channel_mult[level] * self.model_channels
        layers: list[nn.Module] = [self.res(channels, out)]
        limit = self.at("num_attention_blocks", level)
        if 2**level in self.attention_resolutions and (limit is None or index < limit):
            layers.append(self.attention(out, level, decoder, not self.at("disable_self_attentions", level)))
        return layers

    def encoder(self, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
        """All input blocks and the number of channels after each."""
        widths = [self.model_channels]
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, in_channels, widths[0], 3, padding=1))]
        for level in range(len(self.channel_mult)):
            for index in range(self.at("num_res_blocks", level)):
                blocks.append(TimestepEmbedSequential(*self.stage(widths[-1], level, index)))
                widths.append(self.channel_mult[level] * self.model_channels)
            if level < len(self.channel_mult) - 1:
                ch = widths[-1]
                down = (
                    self.res(ch, down=True) if self.resblock_updown else Downsample(ch, self.conv_resample, self.dims)
                )
                blocks.append(TimestepEmbedSequential(down))
                widths.append(ch)
        return nn.ModuleList(blocks), widths

    def middle(self, channels: int, attention: bool = True, self_attn: bool = True) -> TimestepEmbedSequential:
        """The blocks at the lowest resolution."""
        level = len(self.channel_mult) - 1
        between = self.attention(channels, level, self_attn=self_attn) if attention else nn.Identity()
        return TimestepEmbedSequential(self.res(channels), between, self.res(channels))

    def decoder(self, widths: list[int]) -> nn.ModuleList:
        """All output blocks; each takes the output of the encoder block that it mirrors beside its input."""
        blocks, widths = [], list(widths)
        ch = widths[-1]
        for level in reversed(range(len(self.channel_mult))):
            count = self.at("num_res_blocks", level)
            for index in range(count + 1):
                layers = self.stage(ch + widths.pop(), level, index, decoder=True)
                ch = self.channel_mult[level] * self.model_channels
                if level and index == count:
                    up = self.res(ch, up=True) if self.resblock_updown else Upsample(ch, self.conv_resample, self.dims)
                    layers.append(up)
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks)


def time_mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Two linear layers with a SiLU between them."""
    return nn.Sequential(Linear(in_features, out_features), nn.SiLU(), Linear(out_features, out_features))


def label_embedding(num_classes: int | str, adm_in_channels: int | None, blocks: Blocks) -> nn.Module:
    """Embeds `y`: class numbers (an int), or by name a number ("continuous", "timestep") or a vector ("sequential")."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, blocks.embed_dim)
    if num_classes == "continuous":
        return Linear(1, blocks.embed_dim)
    if num_classes == "timestep":
        return nn.Sequential(Timestep(blocks.model_channels), time_mlp(blocks.model_channels, blocks.embed_dim))
    if num_classes == "sequential":
        if adm_in_channels is None:
            raise ValueError('got num_classes="sequential" without adm_in_channels, expected the width of y')
        return nn.Sequential(time_mlp(adm_in_channels, blocks.embed_dim))
    raise ValueError(f'got num_classes={num_classes!r}, expected an int, "continuous", "timestep" or "sequential"')
