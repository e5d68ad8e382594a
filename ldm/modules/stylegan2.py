"""StyleGAN2: synthesis network and generator; mapping network and discriminator have a file each.

Karras et al. 2019 ("A style-based generator architecture for GANs"), 2020 ("Analyzing and improving the image quality
of StyleGAN"; its figure 7 shows the architectures skip, resnet and orig) and 2020 ("Training GANs with limited data";
mixed precision is appendix D.1). Constructor parameters and state-dict names are those of official checkpoints.

Activations are channels-last throughout. Blocks in low precision run in float16 on GPUs and in float32 on the CPU,
which has no fast float16 convolution; `fp16_dtype: bfloat16` runs on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.stylegan2_discriminator import Discriminator as Discriminator
from ldm.modules.stylegan2_layers import (
    FILTER,
    Block,
    Conv2dLayer,
    Randn,
    SynthesisLayer,
    ToRGBLayer,
    channels_at,
    in_low_precision,
    resolutions,
)
from ldm.modules.stylegan2_mapping import MappingNetwork as MappingNetwork
from ldm.modules.stylegan2_mapping import mix_styles as mix_styles
from ldm.modules.stylegan2_mapping import style_mixing as style_mixing
from ldm.modules.stylegan2_ops import setup_filter, upsample2d

OUTPUTS = ("linear", "tanh")


class SynthesisBlock(Block):
    """One resolution of the synthesis network: upsampling convolution, convolution, and the image so far.

    Args:
        in_channels: 0 for the first block, which starts from a learned constant.
        is_last: "resnet" and "orig" make the image in the last block only.
        conv_clamp: limit of the absolute value of every activation; None for no limit.
        use_fp16: run in low precision.
        fp16_channels_last: kept for official configs; activations are always channels-last.
        fused_modconv_default: of `forward`'s fused_modconv; "inference_only" for not in training.
        fp16_dtype: "float16" or "bfloat16".
        **layer_kwargs: further arguments of `SynthesisLayer`.
    """

    forwards_kwargs_to = SynthesisLayer

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = 256,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        fused_modconv_default: bool | str = True,
        fp16_dtype: str = "float16",
        **layer_kwargs: Any,
    ) -> None:
        super().__init__(resolution, architecture, use_fp16, fp16_dtype)
        self.in_channels, self.is_last, self.fused_modconv_default = in_channels, is_last, fused_modconv_default
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        layer = dict(w_dim=w_dim, resolution=resolution, conv_clamp=conv_clamp, **layer_kwargs)
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, resample_filter=resample_filter, **layer)
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer)
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = int(is_last or architecture == "skip")
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp=conv_clamp)
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels, out_channels, kernel_size=1, bias=False, up=2, resample_filter=resample_filter
            )

    def _features(self, x: Tensor | None, ws: list[Tensor], dtype: torch.dtype, layer: dict[str, Any]) -> Tensor:
        if x is None:
            x = self.const.to(dtype).expand(ws[0].shape[0], -1, -1, -1).contiguous(memory_format=torch.channels_last)
            return self.conv1(x, ws[0], **layer)
        x = x.to(dtype=dtype, memory_format=torch.channels_last)
        if self.architecture != "resnet":
            return self.conv1(self.conv0(x, ws[0], **layer), ws[1], **layer)
        half = math.sqrt(0.5)  # the sum of two branches keeps the variance
        y = self.skip(x, gain=half)
        return y + self.conv1(self.conv0(x, ws[0], **layer), ws[1], gain=half, **layer)

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        force_fp32: bool = False,
        fused_modconv: bool | None = None,
        noise_mode: str = "random",
        randn: Randn | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Features and image of the block below (None for the first) -> those of this one, image in float32.

        Args:
            ws: [B, num_conv + num_torgb, w_dim].
            force_fp32: no low precision.
            fused_modconv, noise_mode, randn: see `SynthesisLayer.forward`; None for the default.

        Raises:
            ValueError: ws of another shape.
        """
        if ws.ndim != 3 or ws.shape[1] != self.num_conv + self.num_torgb:
            raise ValueError(f"ws: got {list(ws.shape)}, expected [B, {self.num_conv + self.num_torgb}, w_dim]")
        if fused_modconv is None:
            default = self.fused_modconv_default
            fused_modconv = not self.training if default == "inference_only" else bool(default)
        styles = list(ws.unbind(1))
        layer = dict(noise_mode=noise_mode, fused_modconv=fused_modconv, randn=randn)
        x = self._features(x, styles, self.dtype_on(ws.device, force_fp32), layer)
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.num_torgb:
            rgb = self.torgb(x, styles[-1], fused_modconv=fused_modconv).float()
            img = rgb if img is None else img + rgb
        return x, img

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, architecture={self.architecture}"


class SynthesisNetwork(nn.Module):
    """ws -> image; one block per resolution, named b4, b8, ...

    Args:
        img_resolution: a power of two, at least 4.
        channel_base: channels times resolution.
        channel_max: largest number of channels.
        num_fp16_res: number of highest resolutions in low precision; never below 8x8.
        output: "linear" as in the paper, or "tanh" after the sum of all toRGB layers, as in DCGAN: drawings have large
            areas of pure white and black, which a linear layer only comes near to.
        **block_kwargs: further arguments of `SynthesisBlock`.

    Raises:
        ValueError: another output.
    """

    forwards_kwargs_to = SynthesisBlock

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        output: str = "linear",
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output: got {output!r}, expected one of {', '.join(OUTPUTS)}")
        self.w_dim, self.img_resolution, self.img_channels, self.output = w_dim, img_resolution, img_channels, output
        self.block_resolutions = resolutions(img_resolution, lowest=4)
        self.num_ws, channels = 0, 0
        for res in self.block_resolutions:
            block = SynthesisBlock(
                channels,
                channels_at(res, channel_base, channel_max),
                w_dim=w_dim,
                resolution=res,
                img_channels=img_channels,
                is_last=res == img_resolution,
                use_fp16=in_low_precision(res, img_resolution, num_fp16_res),
                **block_kwargs,
            )
            channels = block.conv1.out_channels
            self.num_ws += block.num_conv + (block.num_torgb if block.is_last else 0)
            setattr(self, f"b{res}", block)

    def steps(
        self,
        ws: Tensor,
        noise_mode: str = "random",
        fused_modconv: bool | None = None,
        force_fp32: bool = False,
        randn: Randn | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Runs block by block, yields (resolution, features [B, C, res, res], image so far or None).

        A caller that needs the features of one resolution stops there, and pays for nothing above it.
        """
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws: got {list(ws.shape)}, expected [B, {self.num_ws}, {self.w_dim}]")
        ws = ws.to(torch.float32)
        x = img = None
        start = 0
        for res in self.block_resolutions:
            block = getattr(self, f"b{res}")
            # the w of a toRGB layer is that of the next block's first convolution
            mine = ws[:, start : start + block.num_conv + block.num_torgb]
            x, img = block(x, img, mine, force_fp32, fused_modconv, noise_mode, randn)
            start += block.num_conv
            if block.is_last and self.output == "tanh":
                img = torch.tanh(img)
            yield res, x, img

    def forward(
        self,
        ws: Tensor,
        noise_mode: str = "random",
        fused_modconv: bool | None = None,
        force_fp32: bool = False,
        randn: Randn | None = None,
    ) -> Tensor:
        """[B, num_ws, w_dim] -> [B, img_channels, H, W], about in [-1, 1], not clamped.

        Args: see `SynthesisLayer.forward` and `SynthesisBlock.forward`.
        """
        img = None
        for _, _, step in self.steps(ws, noise_mode, fused_modconv, force_fp32, randn):
            img = step
        return img

    def extra_repr(self) -> str:
        return f"w_dim={self.w_dim}, num_ws={self.num_ws}, img_resolution={self.img_resolution}"


class Generator(nn.Module):
    """z, c -> image.

    Args:
        z_dim, c_dim, w_dim: sizes of latent, condition (0 for none) and intermediate latent.
        mapping_kwargs: further arguments of `MappingNetwork`.
        **synthesis_kwargs: further arguments of `SynthesisNetwork`.
    """

    forwards_kwargs_to = SynthesisNetwork

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] | None = None,
        **synthesis_kwargs: Any,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **(mapping_kwargs or {}))

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        noise_mode: str = "random",
        fused_modconv: bool | None = None,
        force_fp32: bool = False,
        randn: Randn | None = None,
    ) -> Tensor:
        """[B, z_dim], [B, c_dim] -> [B, img_channels, H, W]; see `MappingNetwork` and `SynthesisNetwork`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.synthesis(ws, noise_mode, fused_modconv, force_fp32, randn)
