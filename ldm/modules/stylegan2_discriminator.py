"""StyleGAN2's discriminator (Karras et al. 2020, figure 7; 2020 "Training GANs with limited data" for its conditions).

Constructor parameters and state-dict names are those of official checkpoints; precision and memory format are as in the
generator (stylegan2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.stylegan2_layers import (
    ARCHITECTURES,
    FILTER,
    Block,
    Conv2dLayer,
    FullyConnectedLayer,
    MinibatchStdLayer,
    channels_at,
    check_choice,
    in_low_precision,
    resolutions,
)
from ldm.modules.stylegan2_mapping import MappingNetwork
from ldm.modules.stylegan2_ops import downsample2d, setup_filter


class DiscriminatorBlock(Block):
    """One resolution of the discriminator: convolution, convolution with downsampling, shortcut.

    Args:
        in_channels: 0 for the first block, which reads the image.
        tmp_channels: after the image is read and after the first convolution.
        first_layer_idx: number of layers before this block.
        freeze_layers: layers below this number are not trained (FreezeD: Mo et al. 2020).
        conv_clamp, use_fp16, fp16_channels_last, fp16_dtype: as in `SynthesisBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        architecture: str = "resnet",
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
        fp16_dtype: str = "float16",
    ) -> None:
        super().__init__(resolution, architecture, use_fp16, fp16_dtype)
        self.in_channels = in_channels
        self.num_layers = 0
        self.register_buffer("resample_filter", setup_filter(resample_filter))

        def layer(*shape: int, **options: Any) -> Conv2dLayer:
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(*shape, resample_filter=resample_filter, trainable=trainable, **options)

        active = dict(activation=activation, conv_clamp=conv_clamp)
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = layer(img_channels, tmp_channels, 1, **active)
        self.conv0 = layer(tmp_channels, tmp_channels, 3, **active)
        self.conv1 = layer(tmp_channels, out_channels, 3, down=2, **active)
        if architecture == "resnet":
            self.skip = layer(tmp_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x: Tensor | None, img: Tensor | None, force_fp32: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features (None for the first block) and image -> those of half the resolution; image for "skip" only."""
        like = img if x is None else x
        dtype = self.dtype_on(like.device, force_fp32)
        if x is not None:
            x = x.to(dtype=dtype, memory_format=torch.channels_last)
        if self.in_channels == 0 or self.architecture == "skip":
            img = img.to(dtype=dtype, memory_format=torch.channels_last)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture != "resnet":
            return self.conv1(self.conv0(x)), img
        half = math.sqrt(0.5)
        y = self.skip(x, gain=half)
        return y + self.conv1(self.conv0(x), gain=half), img

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, architecture={self.architecture}"


class DiscriminatorEpilogue(nn.Module):
    """The lowest resolution -> one logit: minibatch standard deviation, convolution, two linear layers.

    Args:
        cmap_dim: size of the mapped condition, which the result is projected on (Miyato & Koyama 2018); 0 for none.
        mbstd_group_size, mbstd_num_channels: of `MinibatchStdLayer`; 0 channels for none.
    """

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        activation: str = "lrelu",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("architecture", architecture, ARCHITECTURES)
        self.cmap_dim, self.architecture = cmap_dim, architecture
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        channels = in_channels + mbstd_num_channels
        self.conv = Conv2dLayer(channels, in_channels, kernel_size=3, activation=activation, conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(in_channels * resolution**2, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(self, x: Tensor, img: Tensor | None, cmap: Tensor | None) -> Tensor:
        """[B, C, H, W], image for "skip", [B, cmap_dim] -> [B, 1]; float32 whatever came before."""
        x = x.to(dtype=torch.float32, memory_format=torch.channels_last)
        if self.architecture == "skip":
            x = x + self.fromrgb(img.to(torch.float32))
        x = self.conv(x if self.mbstd is None else self.mbstd(x))
        x = self.out(self.fc(x.flatten(1)))
        return x if self.cmap_dim == 0 else (x * cmap).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)


class Discriminator(nn.Module):
    """Image, c -> one logit per image.

    Args:
        c_dim: size of the condition; 0 for none.
        img_resolution: a power of two, at least 8.
        architecture: "resnet", "skip" or "orig".
        channel_base, channel_max, num_fp16_res: as in `SynthesisNetwork`.
        conv_clamp: limit of the absolute value of every activation; None for no limit.
        cmap_dim: size of the mapped condition; None for the channels at 4x4.
        block_kwargs, mapping_kwargs, epilogue_kwargs: further arguments of `DiscriminatorBlock`, `MappingNetwork` and
            `DiscriminatorEpilogue`.
    """

    def __init__(
        self,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        conv_clamp: float | None = 256,
        cmap_dim: int | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
        mapping_kwargs: Mapping[str, Any] | None = None,
        epilogue_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        self.block_resolutions = resolutions(img_resolution, lowest=8)[::-1]
        lowest = channels_at(4, channel_base, channel_max)
        cmap_dim = 0 if c_dim == 0 else (lowest if cmap_dim is None else cmap_dim)
        common = dict(img_channels=img_channels, architecture=architecture, conv_clamp=conv_clamp)
        channels = layers = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(
                channels,
                channels_at(res, channel_base, channel_max),
                channels_at(res // 2, channel_base, channel_max),
                resolution=res,
                first_layer_idx=layers,
                use_fp16=in_low_precision(res, img_resolution, num_fp16_res),
                **(block_kwargs or {}),
                **common,
            )
            channels, layers = block.conv1.out_channels, layers + block.num_layers
            setattr(self, f"b{res}", block)
        if c_dim > 0:
            options = {"w_avg_beta": None, **(mapping_kwargs or {})}
            self.mapping = MappingNetwork(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, **options)
        self.b4 = DiscriminatorEpilogue(lowest, cmap_dim=cmap_dim, resolution=4, **(epilogue_kwargs or {}), **common)

    def forward(self, img: Tensor, c: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        """[B, img_channels, H, W] in [-1, 1], [B, c_dim] -> logits [B, 1].

        Raises:
            ValueError: an image of another size.
        """
        want = (self.img_channels, self.img_resolution, self.img_resolution)
        if img.shape[1:] != want:
            raise ValueError(f"img: got {list(img.shape)}, expected [B, {want[0]}, {want[1]}, {want[2]}]")
        x = None
        for res in self.block_resolutions:
            x, img = getattr(self, f"b{res}")(x, img, force_fp32)
        return self.b4(x, img, self.mapping(None, c) if self.c_dim > 0 else None)

    def extra_repr(self) -> str:
        return f"c_dim={self.c_dim}, img_resolution={self.img_resolution}, img_channels={self.img_channels}"
