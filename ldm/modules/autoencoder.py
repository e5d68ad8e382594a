"""Convolutional encoder and decoder of AutoencoderKL and VQModel, and the U-Net that they come from (official keys).

Esser et al. 2021 (VQGAN), Rombach et al. 2022 (LDM); the blocks are those of Ho et al. 2020 (DDPM). Trap:
`attn_resolutions` are true resolutions here (16 means 16x16 feature maps), whereas `attention_resolutions` of
`UNetModel` are downsampling factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl

__all__ = [
    "AttnBlock",
    "Decoder",
    "DiagonalGaussianDistribution",
    "DiracDistribution",
    "Downsample",
    "Encoder",
    "LinAttnBlock",
    "Model",
    "ResnetBlock",
    "Upsample",
    "get_timestep_embedding",
    "make_attn",
    "normal_kl",
    "Normalize",
]


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """[B] -> [B, embedding_dim]: sines, then cosines, frequencies from 1 to 1/10000 (Vaswani et al. 2017).

    Raises:
        ValueError: `timesteps` is not one-dimensional.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected [B]")
    half = embedding_dim // 2
    # half - 1, not half: the last frequency is exactly 1/10000 (UNetModel's embedding divides by half)
    freqs = torch.exp(torch.arange(half, device=timesteps.device).float() * -(math.log(10000.0) / (half - 1)))
    angles = timesteps.float()[:, None] * freqs[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:  # noqa: N802  (official name)
    return nn.GroupNorm(num_groups=num_groups, num_channels=in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W], nearest neighbour, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2], strided convolution or average pooling."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # asymmetric, as the released weights expect
        return F.avg_pool2d(x, kernel_size=2, stride=2)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut.

    Args:
        in_channels: must be divisible by 32, as must out_channels.
        out_channels: None keeps `in_channels`.
        conv_shortcut: a 3x3 instead of a 1x1 convolution on the shortcut where the widths differ.
        dropout: before the second convolution.
        temb_channels: width of the time embedding that is added between the convolutions; 0 for none.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention over all pixels with one head as wide as the feature map, around a shortcut."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).transpose(1, 2)[:, None] for m in (self.q, self.k, self.v))  # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(B, C, H, W))


class LinAttnBlock(nn.Module):
    """Linear attention (Shen et al. 2021): keys are normalised over the pixels, so that the cost grows with HW.

    As in the official code there is neither a norm nor a shortcut around it.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(in_channels, 3 * in_channels, 1, bias=False)
        self.to_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # [B, C, HW]
        context = k.softmax(dim=-1) @ v.transpose(1, 2)  # [B, C, C]
        return self.to_out((context.transpose(1, 2) @ q).reshape(B, C, H, W))


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """The attention of that name: vanilla (SDXL's files say vanilla-xformers), linear or none.

    Raises:
        ValueError: another name.
    """
    makers = {"vanilla": AttnBlock, "vanilla-xformers": AttnBlock, "linear": LinAttnBlock, "none": nn.Identity}
    if attn_type not in makers:
        raise ValueError(f"attn_type: got {attn_type!r}, expected one of {', '.join(makers)}")
    return makers[attn_type](in_channels)


class _Blocks(nn.Module):
    """One resolution: residual blocks, each followed by attention or nothing; at its end a change of resolution."""

    def __init__(self, widths: Sequence[tuple[int, int]], attn: str | None, dropout: float, temb_ch: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=i, out_channels=o, temb_channels=temb_ch, dropout=dropout) for i, o in widths
        )
        self.attn = nn.ModuleList(make_attn(o, attn) for _, o in widths) if attn else nn.ModuleList()

    def step(self, index: int, h: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.block[index](h, temb)
        return self.attn[index](h) if len(self.attn) else h

    def forward(self, h: Tensor, temb: Tensor | None = None) -> Tensor:
        for i in range(len(self.block)):
            h = self.step(i, h, temb)
        return h


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, attn_type: str, dropout: float, temb_ch: int) -> None:
        super().__init__()
        params = {"in_channels": channels, "temb_channels": temb_ch, "dropout": dropout}
        self.block_1 = ResnetBlock(**params)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(**params)

    def forward(self, h: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


def _down_levels(
    ch: int,
    ch_mult: Sequence[int],
    num_res_blocks: int,
    attn_resolutions: Sequence[int],
    resolution: int,
    attn_type: str,
    dropout: float,
    resamp_with_conv: bool,
    temb_ch: int = 0,
) -> nn.ModuleList:
    levels, width = nn.ModuleList(), ch
    for i, mult in enumerate(ch_mult):
        out = ch * mult
        attn = attn_type if resolution // 2**i in attn_resolutions else None
        level = _Blocks([(width, out)] + [(out, out)] * (num_res_blocks - 1), attn, dropout, temb_ch)
        if i != len(ch_mult) - 1:
            level.downsample = Downsample(out, resamp_with_conv)
        levels.append(level)
        width = out
    return levels


class Encoder(nn.Module):
    """[B, in_channels, H, W] in [-1, 1] -> [B, 2 z_channels (z_channels if not double_z), H/f, W/f],
    f = 2^(len(ch_mult) - 1).

    Args:
        ch: width of the first level, divisible by 32.
        out_ch, tanh_out, give_pre_end: of the decoder; accepted because both are built from one `ddconfig`.
        ch_mult: width of each level as a multiple of `ch`; every level but the last ends in a downsampling.
        num_res_blocks: residual blocks per level.
        attn_resolutions: feature-map sizes that get attention, given inputs of size `resolution`.
        resamp_with_conv: downsample by a strided convolution; False by average pooling.
        resolution: image size that the levels' sizes are counted from; other sizes work too.
        z_channels: channels of the output; `double_z` doubles them (mean and log-variance).
        use_linear_attn: the same as attn_type linear.
        attn_type: vanilla | linear | none, for every attention of the net.
        patch_size: pixels of p x p squares become channels before the first convolution (space to depth, Shi et al.
            2016), and the levels count from there: f = p 2^(len(ch_mult) - 1).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int | None = None,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.ch, self.num_resolutions, self.patch_size = ch, len(ch_mult), patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, ch, 3, padding=1)
        size = resolution // patch_size
        self.down = _down_levels(
            ch, ch_mult, num_res_blocks, attn_resolutions, size, attn_type, dropout, resamp_with_conv
        )
        width = ch * ch_mult[-1]
        self.mid = _Middle(width, attn_type, dropout, 0)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for i, level in enumerate(self.down):
            h = level(h)
            if i != self.num_resolutions - 1:
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, h f, w f], f = 2^(len(ch_mult) - 1).

    Args: as for `Encoder` (`in_channels` and `double_z` belong to the encoder), and
        give_pre_end: return the features before the last norm and convolution.
        tanh_out: bound the output to [-1, 1].
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int | None = None,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        double_z: bool = True,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.num_resolutions, self.give_pre_end, self.tanh_out = len(ch_mult), give_pre_end, tanh_out
        self.patch_size, resolution = patch_size, resolution // patch_size
        width, size = ch * ch_mult[-1], resolution // 2 ** (len(ch_mult) - 1)
        self.z_shape = (1, z_channels, size, size)
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Middle(width, attn_type, dropout, 0)
        levels = []
        for i in reversed(range(len(ch_mult))):
            out = ch * ch_mult[i]
            attn = attn_type if resolution // 2**i in attn_resolutions else None
            level = _Blocks([(width, out)] + [(out, out)] * num_res_blocks, attn, dropout, 0)
            if i != 0:
                level.upsample = Upsample(out, resamp_with_conv)
            levels.insert(0, level)  # the official order: up.0 is the highest resolution
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch * patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for i in reversed(range(self.num_resolutions)):
            h = self.up[i](h)
            if i != 0:
                h = self.up[i].upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        h = F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
        return torch.tanh(h) if self.tanh_out else h


class Model(nn.Module):
    """The U-Net of DDPM (Ho et al. 2020, appendix B): the encoder and decoder above with skip connections and time.

    Args: as for `Encoder`, and
        use_timestep: add a time embedding in every residual block.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        use_timestep: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        temb_ch = 4 * ch
        self.ch, self.num_res_blocks, self.use_timestep = ch, num_res_blocks, use_timestep
        self.num_resolutions = len(ch_mult)
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = _down_levels(
            ch, ch_mult, num_res_blocks, attn_resolutions, resolution, attn_type, dropout, resamp_with_conv, temb_ch
        )
        width = ch * ch_mult[-1]
        self.mid = _Middle(width, attn_type, dropout, temb_ch)
        levels = []
        for i in reversed(range(len(ch_mult))):
            out, skip_below = ch * ch_mult[i], ch * ([1, *ch_mult][i])
            skips = [out] * num_res_blocks + [skip_below]
            widths = [(w + skip, out) for w, skip in zip([width] + [out] * num_res_blocks, skips, strict=True)]
            attn = attn_type if resolution // 2**i in attn_resolutions else None
            level = _Blocks(widths, attn, dropout, temb_ch)
            if i != 0:
                level.upsample = Upsample(out, resamp_with_conv)
            levels.insert(0, level)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] and t [B] -> [B, out_ch, H, W]; a context [B, C', H, W] is stacked under x.

        Raises:
            ValueError: the model uses time and got none.
        """
        if context is not None:
            x = torch.cat((x, context), dim=1)
        temb = None
        if self.use_timestep:
            if t is None:
                raise ValueError("Model: got t None, expected timesteps [B]")
            temb = get_timestep_embedding(t, self.ch).to(x.dtype)
            temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        skips = [self.conv_in(x)]
        for i, level in enumerate(self.down):
            for j in range(self.num_res_blocks):
                skips.append(level.step(j, skips[-1], temb))
            if i != self.num_resolutions - 1:
                skips.append(level.downsample(skips[-1]))
        h = self.mid(skips[-1], temb)
        for i in reversed(range(self.num_resolutions)):
            for j in range(self.num_res_blocks + 1):
                h = self.up[i].step(j, torch.cat([h, skips.pop()], dim=1), temb)
            if i != 0:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def get_last_layer(self) -> Tensor:
        return self.conv_out.weight
