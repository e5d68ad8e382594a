"""The U-Net of latent diffusion, with the key names of official checkpoints, and its encoder half.

The trap in its arguments: `attention_resolutions` are downsampling factors (1, 2, 4, ...), not image sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import AttentionPool2d
from ldm.modules.layers import conv_nd, normalization, timestep_embedding, zero_module
from ldm.modules.unet_blocks import Blocks, label_embedding, time_mlp


class _TimeUNet(nn.Module):
    """What both U-Nets share: precision, memory format and the entry of inputs."""

    time_embed: nn.Sequential
    input_blocks: nn.ModuleList
    middle_block: nn.Module
    dims: int
    model_channels: int
    levels: int

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the trunk; inputs are brought to it and outputs back from it."""
        return next(self.input_blocks.parameters()).dtype

    def trunk(self) -> list[nn.Module]:
        """Everything between the time embedding and the output head."""
        return [self.input_blocks, self.middle_block]

    def to_channels_last(self) -> None:
        """The memory format of convolutions' weights; `.to(memory_format=...)` cannot do it under FakeTensorMode."""
        for p in self.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)

    def convert_to_fp16(self) -> None:
        """Runs the trunk in half precision; time embedding and output head stay as they are."""
        for module in self.trunk():
            module.half()

    def convert_to_fp32(self) -> None:
        """Undoes `convert_to_fp16`."""
        for module in self.trunk():
            module.float()

    def embed_time(self, timesteps: Tensor | None, batch: int) -> Tensor:
        """Timesteps [B] or [] -> [B, E] in the dtype of the time embedding."""
        if timesteps is None or timesteps.dim() > 1 or timesteps.numel() not in (1, batch):
            got = None if timesteps is None else list(timesteps.shape)
            raise ValueError(f"got timesteps of shape {got}, expected [{batch}]")
        t = timestep_embedding(timesteps.expand(batch), self.model_channels)
        return self.time_embed(t.to(self.time_embed[0].weight.dtype))

    def enter(self, x: Tensor) -> Tensor:
        """Checks the input and brings it to the trunk's precision and memory format."""
        in_channels = self.input_blocks[0][0].in_channels
        if x.dim() != self.dims + 2 or x.shape[1] != in_channels:
            raise ValueError(f"got x {list(x.shape)}, expected [B, {in_channels}] and {self.dims} spatial sizes")
        if any(n % 2 ** (self.levels - 1) for n in x.shape[-min(self.dims, 2) :]):
            raise ValueError(f"got x {list(x.shape)}, expected sizes that {2 ** (self.levels - 1)} divides")
        return x.to(self.dtype, memory_format=torch.channels_last if self.dims == 2 else torch.preserve_format)

    def leave(self, h: Tensor, head: nn.Module, x: Tensor) -> Tensor:
        """The output head on h, in the precision and memory format of the input x."""
        out = head(h.to(next(head.parameters()).dtype)).to(x.dtype)
        return out.contiguous() if x.is_contiguous() else out


class UNetModel(_TimeUNet):
    """The U-Net of "High-Resolution Image Synthesis with Latent Diffusion Models" (and of SD 1, SD 2 and SDXL).

    Args:
        image_size: not used by the network, kept for official YAMLs.
        in_channels, out_channels: of `x` and of the output.
        model_channels: width of the first level; `channel_mult` gives the widths of all levels as multiples of it.
        num_res_blocks: residual blocks a level, one number or one for each level.
        attention_resolutions: downsampling factors (not sizes) at which attention follows each residual block.
        conv_resample: resample with learned convolutions; `resblock_updown`: with residual blocks.
        dims: number of spatial axes, 1, 2 or 3 (3 keeps the first of them at full size).
        num_classes: adds an embedding of `y`: an int for class numbers [B], "continuous" for values [B, 1],
            "timestep" for values [B], "sequential" for vectors [B, adm_in_channels].
        use_checkpoint: hold no activations inside blocks, compute them again in the backward pass.
        use_fp16: hold and run the trunk in half precision.
        num_heads, num_head_channels: number or width of attention heads, one is required; `num_heads_upsample`
            is the number in the decoder. Only AttentionBlock obeys it.
        use_new_attention_order: how AttentionBlock splits its channels.
        use_spatial_transformer: attention by SpatialTransformer instead of AttentionBlock; implied by `context_dim`.
        transformer_depth: transformer blocks in each, one number or one for each level.
        n_embed: predict logits of this many codebook entries instead of `out_channels`.
        legacy: the official rule for a SpatialTransformer whose channels `num_head_channels` does not divide.
        use_linear_in_transformer, adm_in_channels, disable_self_attentions, num_attention_blocks,
        disable_middle_self_attn, disable_middle_transformer: options of generative-models (SD 2, SDXL).
        spatial_transformer_attn_type: accepted and without effect, attention always uses the fastest kernel.

    Raises ValueError for arguments that do not fit together and for inputs of a wrong shape.
    """

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        disable_self_attentions: bool | Sequence[bool] | None = None,
        num_attention_blocks: int | Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
    ) -> None:
        super().__init__()
        given = {k: v for k, v in locals().items() if k in Blocks.__dataclass_fields__}
        given["use_spatial_transformer"] = use_spatial_transformer or context_dim is not None
        given["disable_self_attentions"] = disable_self_attentions or False
        blocks = Blocks(**given)
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims, self.levels = model_channels, dims, len(channel_mult)
        self.num_classes, self.adm_in_channels = num_classes, adm_in_channels
        self.predict_codebook_ids = n_embed is not None
        self.time_embed = time_mlp(model_channels, blocks.embed_dim)
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, adm_in_channels, blocks)
        self.input_blocks, widths = blocks.encoder(in_channels)
        self.middle_block = blocks.middle(widths[-1], not disable_middle_transformer, not disable_middle_self_attn)
        self.output_blocks = blocks.decoder(widths)
        ch = channel_mult[0] * model_channels
        last = conv_nd(dims, ch, out_channels, 3, padding=1)
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), zero_module(last))
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, ch, n_embed, 1))
        if use_fp16:
            self.convert_to_fp16()
        if dims == 2:
            self.to_channels_last()

    def trunk(self) -> list[nn.Module]:
        """Everything between the time embedding and the output head."""
        return [self.input_blocks, self.middle_block, self.output_blocks]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], timesteps [B] (or one for all), context [B, M, D], y as `num_classes` says.

        Returns [B, out_channels, H, W] in the dtype of x ([B, n_embed, H, W] where codebook entries are predicted).
        """
        h = self.enter(x)
        emb = self.embed_time(timesteps, len(x))
        if y is not None or self.num_classes is not None:
            emb = emb + self.embed_label(y, len(x))
        emb = emb.to(h.dtype)
        if isinstance(context, Tensor):
            context = context.to(h.dtype)
        hs = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            hs.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, hs.pop()], dim=1), emb, context)
        return self.leave(h, self.id_predictor if self.predict_codebook_ids else self.out, x)

    def embed_label(self, y: Tensor | None, batch: int) -> Tensor:
        """y -> [B, E]."""
        width = {"continuous": [1], "sequential": [self.adm_in_channels]}.get(self.num_classes, [])
        if y is None or self.num_classes is None or list(y.shape) != [batch, *width]:
            got = None if y is None else list(y.shape)
            expected = None if self.num_classes is None else [batch, *width]
            raise ValueError(f"got y of shape {got}, expected {expected} for num_classes={self.num_classes}")
        weight = next(self.label_emb.parameters())
        return self.label_emb(y if isinstance(self.num_classes, int) else y.to(weight.dtype))


class SpatialUNetModel(UNetModel):
    """`UNetModel` with the signature of generative-models: no image size, attention is always a SpatialTransformer."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        image_size: int | None = None,
        use_spatial_transformer: bool = True,
        legacy: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            use_spatial_transformer=use_spatial_transformer,
            legacy=legacy,
            **options,
        )


class EncoderUNetModel(_TimeUNet):
    """The encoder half of the U-Net with a pooled output, as classifiers of noisy images use it.

    `pool`: "adaptive" (mean over positions), "attention" (needs `num_head_channels` and `image_size`), "spatial" or
    "spatial_v2" (a two-layer network on the means of every block). The other arguments are those of `UNetModel`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__()
        blocks = Blocks(**{k: v for k, v in locals().items() if k in Blocks.__dataclass_fields__})
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims, self.levels, self.pool = model_channels, dims, len(channel_mult), pool
        self.time_embed = time_mlp(model_channels, blocks.embed_dim)
        self.input_blocks, widths = blocks.encoder(in_channels)
        self.middle_block = blocks.middle(widths[-1])
        size = image_size // 2 ** (self.levels - 1)
        self.out = pooled_head(pool, widths, out_channels, dims, size, num_head_channels)
        if use_fp16:
            self.convert_to_fp16()
        if dims == 2:
            self.to_channels_last()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x [B, C, H, W], timesteps [B] -> [B, out_channels] in the dtype of x."""
        h = self.enter(x)
        emb = self.embed_time(timesteps, len(x)).to(h.dtype)
        means = []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.float().flatten(2).mean(dim=2))
        return self.leave(torch.cat(means, dim=1) if means else h, self.out, x)


def pooled_head(pool: str, widths: list[int], out_channels: int, dims: int, size: int, head: int) -> nn.Module:
    """The output layers of `EncoderUNetModel`; `size` is that of the last feature map, `head` the width of a head."""
    ch = widths[-1]
    if pool == "adaptive":
        average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
        last = zero_module(conv_nd(dims, ch, out_channels, 1))
        return nn.Sequential(normalization(ch), nn.SiLU(), average, last, nn.Flatten())
    if pool == "attention":
        if head == -1:
            raise ValueError('got pool="attention" without num_head_channels, expected the width of a head')
        return nn.Sequential(normalization(ch), nn.SiLU(), AttentionPool2d(size, ch, head, out_channels))
    if pool not in ("spatial", "spatial_v2"):
        raise ValueError(f'got pool={pool!r}, expected "adaptive", "attention", "spatial" or "spatial_v2"')
    first, last = nn.Linear(sum(widths) + ch, 2048), nn.Linear(2048, out_channels)
    if pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, normalization(2048), nn.SiLU(), last)
