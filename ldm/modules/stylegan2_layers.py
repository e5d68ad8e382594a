"""Layers of StyleGAN2: equalised linear and convolutional layers, modulated layers, minibatch standard deviation.

Weights are drawn from a unit normal and scaled at run time (equalised learning rate: Karras et al. 2018, "Progressive
growing of GANs", section 4.1), so that Adam treats all layers alike. Names and shapes are those of official
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.stylegan2_ops import (
    activation_gain,
    bias_act,
    conv2d_resample,
    modulated_conv2d,
    setup_filter,
    takes_gain_early,
)

FILTER = (1, 3, 3, 1)
NOISE_MODES = ("random", "const", "none")
ARCHITECTURES = ("skip", "resnet", "orig")
LOW_PRECISION = {"float16": torch.float16, "bfloat16": torch.bfloat16}
Randn = Callable[[Tensor], Tensor]  # template -> noise of its shape, device and dtype


class FullyConnectedLayer(nn.Module):
    """act(x W^T + b), [B, in_features] -> [B, out_features].

    Args:
        bias: False for no bias.
        activation: name in `stylegan2_ops.ACTIVATIONS`.
        lr_multiplier: the layer learns as if the learning rate were multiplied by this.
        bias_init: initial value of the effective bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        activation_gain(activation)  # an unknown name fails here, not in the first step
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init) / lr_multiplier)) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)
        b = None if self.bias is None else self.bias.to(x.dtype)
        if self.activation == "linear" and b is not None:
            return torch.addmm(b.unsqueeze(0), x, w.t(), beta=self.bias_gain, alpha=self.weight_gain)
        b = b if b is None or self.bias_gain == 1 else b * self.bias_gain
        return bias_act(x @ w.t() * self.weight_gain, b, act=self.activation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


class Conv2dLayer(nn.Module):
    """Convolution with resampling, bias, activation and clamp: [B, in, H, W] -> [B, out, H * up / down, W * up / down].

    Args:
        kernel_size: odd; the size of the image is kept.
        resample_filter: taps of the low-pass filter that goes with up or down.
        conv_clamp: limit of the absolute value of the result; None for no limit.
        channels_last: kept for official configs; the memory format follows the input's.
        trainable: False holds weight and bias as buffers, which no optimiser and no `requires_grad_` can thaw.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = None,
        channels_last: bool = False,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.activation = in_channels, out_channels, activation
        self.up, self.down, self.conv_clamp, self.padding = up, down, conv_clamp, kernel_size // 2
        self.act_gain = activation_gain(activation)
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        tensors = {"weight": weight, "bias": torch.zeros(out_channels) if bias else None}
        for name, value in tensors.items():
            if trainable and value is not None:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """`gain` multiplies the result, and the clamp with it."""
        total = self.act_gain * gain
        early = total if takes_gain_early(self.activation) else 1.0
        w = (self.weight * (self.weight_gain * early)).to(x.dtype)
        b = None if self.bias is None else (self.bias * early).to(x.dtype)
        resample = dict(up=self.up, down=self.down, padding=self.padding, flip_weight=self.up == 1, bias=b)
        x = conv2d_resample(x, w, self.resample_filter, **resample)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, act=self.activation, gain=total / early, clamp=clamp, overwrite=True)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.activation}, up={self.up}, down={self.down}"


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, bias, activation (StyleGAN2, figure 2c).

    Args:
        w_dim: size of the intermediate latent.
        resolution: of the output.
        up: factor of upsampling before the convolution.
        use_noise: add noise per pixel, scaled by one learned number.
        conv_clamp: limit of the absolute value of the result; None for no limit.
        channels_last: kept for official configs; the memory format follows the input's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.resolution = in_channels, out_channels, resolution
        self.up, self.use_noise, self.activation, self.conv_clamp = up, use_noise, activation, conv_clamp
        self.padding, self.act_gain = kernel_size // 2, activation_gain(activation)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def _noise(self, x: Tensor, mode: str, randn: Randn | None) -> Tensor | None:
        if mode not in NOISE_MODES:
            raise ValueError(f"noise_mode: got {mode!r}, expected one of {', '.join(NOISE_MODES)}")
        if not self.use_noise or mode == "none":
            return None
        if mode == "const":
            return self.noise_const * self.noise_strength
        shape = [x.shape[0], 1, self.resolution, self.resolution]
        if randn is None:
            return torch.randn(shape, device=x.device) * self.noise_strength
        return randn(self.noise_const.new_empty(shape)) * self.noise_strength

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        noise_mode: str = "random",
        fused_modconv: bool = True,
        gain: float = 1.0,
        randn: Randn | None = None,
    ) -> Tensor:
        """[B, in, H, W], [B, w_dim] -> [B, out, H * up, W * up].

        Args:
            noise_mode: "random" draws noise anew, "const" uses the stored noise, "none" adds none.
            fused_modconv: see `modulated_conv2d`.
            gain: multiplies the result, and the clamp with it.
            randn: draws the noise of mode "random", one image's noise independent of its batch; None for torch.randn.

        Raises:
            ValueError: input of another size, unknown noise mode.
        """
        size = self.resolution // self.up
        if x.shape[1:] != (self.in_channels, size, size):
            raise ValueError(f"got {list(x.shape)}, expected [B, {self.in_channels}, {size}, {size}]")
        noise = self._noise(x, noise_mode, randn)
        total = self.act_gain * gain
        early = total if takes_gain_early(self.activation) else 1.0  # in the demodulation, noise and bias
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise if noise is None or early == 1 else noise * early,
            up=self.up,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused_modconv=fused_modconv,
            gain=early,
        )
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias * early, act=self.activation, gain=total / early, clamp=clamp)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, resolution={self.resolution}, up={self.up}"


class ToRGBLayer(nn.Module):
    """1x1 modulated convolution without demodulation: [B, in, H, W] -> [B, img_channels, H, W].

    Args: as those of `SynthesisLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 1,
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.conv_clamp, self.padding = conv_clamp, kernel_size // 2
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        styles = self.affine(w) * self.weight_gain
        options = dict(demodulate=False, padding=self.padding, fused_modconv=fused_modconv)
        return bias_act(modulated_conv2d(x, self.weight, styles, **options), self.bias, clamp=self.conv_clamp)


class MinibatchStdLayer(nn.Module):
    """Appends `num_channels` maps that hold the standard deviation within groups of images (Karras et al. 2018, 3).

    Args:
        group_size: images per group, None for the whole batch; a batch that it does not divide is split into the
            largest groups that do.
        num_channels: each holds the mean over its share of the features.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + num_channels, H, W]."""
        b, c, h, w = x.shape
        size = b if self.group_size is None else min(self.group_size, b)
        size = next(g for g in range(size, 0, -1) if b % g == 0)
        # images i, i + n, i + 2 n, ... are a group, n = number of groups
        y = x.reshape(size, b // size, self.num_channels, c // self.num_channels, h, w)
        y = (y - y.mean(0)).square().mean(0)  # [n, F, C / F, H, W]
        y = (y + 1e-8).sqrt().mean((2, 3, 4))  # [n, F]
        y = y.repeat(size, 1)[:, :, None, None].expand(b, self.num_channels, h, w)
        return torch.cat([x, y], 1)


class Block(nn.Module):
    """What the blocks of both networks share: one resolution, one architecture, one precision."""

    def __init__(self, resolution: int, architecture: str, use_fp16: bool, fp16_dtype: str) -> None:
        super().__init__()
        check_choice("architecture", architecture, ARCHITECTURES)
        check_choice("fp16_dtype", fp16_dtype, LOW_PRECISION)
        self.resolution, self.architecture = resolution, architecture
        self.use_fp16, self.low_precision = use_fp16, LOW_PRECISION[fp16_dtype]

    def dtype_on(self, device: torch.device, force_fp32: bool) -> torch.dtype:
        if not self.use_fp16 or force_fp32 or (self.low_precision == torch.float16 and device.type == "cpu"):
            return torch.float32
        return self.low_precision


def resolutions(img_resolution: int, lowest: int) -> list[int]:
    if img_resolution < lowest or img_resolution & (img_resolution - 1):
        raise ValueError(f"img_resolution: got {img_resolution}, expected a power of two, at least {lowest}")
    return [2**i for i in range(lowest.bit_length() - 1, img_resolution.bit_length())]


def channels_at(resolution: int, base: int, largest: int) -> int:
    return min(base // resolution, largest)


def in_low_precision(resolution: int, img_resolution: int, num_fp16_res: int) -> bool:
    return resolution >= max(img_resolution * 2 // 2**num_fp16_res, 8)


def check_choice(name: str, got: str, options: Sequence[str] | Mapping[str, Any]) -> None:
    if got not in options:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(options)}")
