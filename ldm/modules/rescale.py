"""Networks that change the size of latents between first stages: official helpers around `Encoder` and `Decoder`.

The classes and their names follow CompVis/latent-diffusion (MIT licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.autoencoder import AttnBlock, Decoder, Downsample, Encoder, Normalize, ResnetBlock, Upsample
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class LatentRescaler(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, round(factor h), round(factor w)].

    Args:
        factor: scale of the sides.
        mid_channels: width inside, divisible by 32.
        depth: residual blocks before and after the interpolation.
    """

    def __init__(self, factor: float, in_channels: int, mid_channels: int, out_channels: int, depth: int = 2) -> None:
        super().__init__()
        self.factor = factor
        block = {"in_channels": mid_channels, "temb_channels": 0, "dropout": 0.0}
        self.conv_in = nn.Conv2d(in_channels, mid_channels, 3, padding=1)
        self.res_block1 = nn.ModuleList(ResnetBlock(**block) for _ in range(depth))
        self.attn = AttnBlock(mid_channels)
        self.res_block2 = nn.ModuleList(ResnetBlock(**block) for _ in range(depth))
        self.conv_out = nn.Conv2d(mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.res_block1:
            h = block(h)
        h = F.interpolate(h, size=[int(round(s * self.factor)) for s in h.shape[2:]])
        h = self.attn(h)
        for block in self.res_block2:
            h = block(h)
        return self.conv_out(h)


class MergedRescaleEncoder(nn.Module):
    """An `Encoder` followed by a `LatentRescaler`: [B, in_channels, H, W] -> [B, out_ch, f h, f w].

    Args: as for `Encoder` and `LatentRescaler`; `rescale_factor` is the latter's factor.
    """

    def __init__(
        self,
        in_channels: int,
        ch: int,
        resolution: int,
        out_ch: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.encoder = Encoder(
            in_channels=in_channels,
            num_res_blocks=num_res_blocks,
            ch=ch,
            ch_mult=ch_mult,
            z_channels=width,
            double_z=False,
            resolution=resolution,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
        )
        self.rescaler = LatentRescaler(rescale_factor, width, width, out_ch, depth=rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.rescaler(self.encoder(x))


class MergedRescaleDecoder(nn.Module):
    """A `LatentRescaler` followed by a `Decoder`: [B, z_channels, h, w] -> [B, out_ch, H, W].

    Args: as for `Decoder` and `LatentRescaler`; `rescale_factor` is the latter's factor.
    """

    def __init__(
        self,
        z_channels: int,
        out_ch: int,
        resolution: int,
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        rescale_factor: float = 1.0,
        rescale_module_depth: int = 1,
    ) -> None:
        super().__init__()
        width = z_channels * ch_mult[-1]
        self.decoder = Decoder(
            out_ch=out_ch,
            z_channels=width,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            num_res_blocks=num_res_blocks,
            ch_mult=ch_mult,
            resolution=resolution,
            ch=ch,
        )
        self.rescaler = LatentRescaler(rescale_factor, z_channels, width, width, depth=rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rescaler(x))


class Upsampler(nn.Module):
    """[B, in_channels, in_size, in_size] -> [B, out_channels, out_size, out_size], a rescaler and a decoder.

    Args:
        in_size, out_size: sides before and after; `out_size` must not be the smaller one.
        ch_mult: width of every level of the decoder as a multiple of `in_channels`.
    """

    def __init__(self, in_size: int, out_size: int, in_channels: int, out_channels: int, ch_mult: int = 2) -> None:
        super().__init__()
        if out_size < in_size:
            raise ValueError(f"out_size: got {out_size}, expected at least in_size ({in_size})")
        levels = int(math.log2(out_size // in_size)) + 1
        factor = 1.0 + out_size % in_size
        self.rescaler = LatentRescaler(factor, in_channels, 2 * in_channels, in_channels)
        self.decoder = Decoder(
            out_ch=out_channels,
            resolution=out_size,
            z_channels=in_channels,
            num_res_blocks=2,
            attn_resolutions=[],
            ch=in_channels,
            ch_mult=[ch_mult] * levels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.rescaler(x))


class Resize(nn.Module):
    """Interpolation by a factor given at each call.

    Args:
        in_channels, learned: of a learned resizing that was never released; only `learned: false` can be built.
        mode: of `torch.nn.functional.interpolate`.
    """

    def __init__(self, in_channels: int | None = None, learned: bool = False, mode: str = "bilinear") -> None:
        super().__init__()
        if learned:
            raise ValueError("Resize: got learned True, expected False (learned resizing was never released)")
        self.mode = mode

    def forward(self, x: Tensor, scale_factor: float = 1.0) -> Tensor:
        if scale_factor == 1.0:
            return x
        return F.interpolate(x, mode=self.mode, align_corners=False, scale_factor=scale_factor)


class SimpleDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, 2h, 2w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        c, block = in_channels, {"temb_channels": 0, "dropout": 0.0}
        self.model = nn.ModuleList(
            [
                nn.Conv2d(c, c, 1),
                ResnetBlock(in_channels=c, out_channels=2 * c, **block),
                ResnetBlock(in_channels=2 * c, out_channels=4 * c, **block),
                ResnetBlock(in_channels=4 * c, out_channels=2 * c, **block),
                nn.Conv2d(2 * c, c, 1),
                Upsample(c, with_conv=True),
            ]
        )
        self.norm_out = Normalize(c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class UpsampleDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h f, w f], f = 2^(len(ch_mult) - 1); no attention.

    Args: as for `Decoder`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        num_res_blocks: int,
        resolution: int,
        ch_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_resolutions = len(ch_mult)
        self.res_blocks, self.upsample_blocks = nn.ModuleList(), nn.ModuleList()
        width = in_channels
        for i, mult in enumerate(ch_mult):
            out = ch * mult
            level = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.append(ResnetBlock(in_channels=width, out_channels=out, temb_channels=0, dropout=dropout))
                width = out
            self.res_blocks.append(level)
            if i != self.num_resolutions - 1:
                self.upsample_blocks.append(Upsample(width, with_conv=True))
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for i, level in enumerate(self.res_blocks):
            for block in level:
                x = block(x)
            if i != self.num_resolutions - 1:
                x = self.upsample_blocks[i](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStagePostProcessor(nn.Module):
    """Features of a frozen first stage, downsampled: [B, C, H, W] -> [B, C', h, w] or, reshaped, [B, h w, C'].

    Args:
        ch_mult: one downsampling and residual block per entry; its width as a multiple of `n_channels`.
        in_channels: channels of the first stage's code.
        pretrained_model: the first stage, or `pretrained_config` `{target, params}` to build it.
        reshape: flatten to a sequence.
        n_channels: base width; None uses the first stage's `encoder.ch`.
    """

    def __init__(
        self,
        ch_mult: Sequence[int],
        in_channels: int,
        pretrained_model: nn.Module | None = None,
        reshape: bool = False,
        n_channels: int | None = None,
        dropout: float = 0.0,
        pretrained_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pretrained_model is None and pretrained_config is None:
            raise ValueError("FirstStagePostProcessor: got no first stage, expected pretrained_model or _config")
        if pretrained_model is None:
            pretrained_model = instantiate_from_config(pretrained_config)
        self.pretrained_model = pretrained_model.eval().requires_grad_(False)
        self.do_reshape = reshape
        width = pretrained_model.encoder.ch if n_channels is None else n_channels
        self.proj_norm = Normalize(in_channels, num_groups=in_channels // 2)
        self.proj = nn.Conv2d(in_channels, width, 3, padding=1)
        blocks, downs, current = [], [], width
        for mult in ch_mult:
            # with the default time projection, which nothing feeds: official checkpoints have its keys
            blocks.append(ResnetBlock(in_channels=current, out_channels=mult * width, dropout=dropout))
            current = mult * width
            downs.append(Downsample(current, with_conv=False))
        self.model, self.downsampler = nn.ModuleList(blocks), nn.ModuleList(downs)

    @torch.no_grad()
    def encode_with_pretrained(self, x: Tensor) -> Tensor:
        code = self.pretrained_model.encode(x)
        return code.mode() if isinstance(code, DiagonalGaussianDistribution) else code

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.proj(self.proj_norm(self.encode_with_pretrained(x))))
        for block, down in zip(self.model, self.downsampler, strict=True):
            z = down(block(z))
        return z.flatten(2).transpose(1, 2) if self.do_reshape else z
