"""Building blocks of the diffusion U-Net: embeddings, norms, resampling and the residual block.

Convolutions are meant to run channels-last: every operation here keeps the memory format of its input.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.matmul import Linear, linear


def neighbourhoods(x: Tensor, stride: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every 3x3 neighbourhood of x [B, C, H, W], padded by one, as a row [B, h, w, 9 C], and the weight as [C', 9 C].

    The order inside a row is the one in which the weight lies in memory, so that no weight is copied.
    """
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 3, stride).unfold(2, 3, stride)
    if not weight.is_contiguous():
        rows, weight = rows.permute(0, 1, 2, 4, 5, 3), weight.permute(0, 2, 3, 1)
    return rows.flatten(3), weight.flatten(1)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that takes the way through one matrix product where that is faster.

    With kernel size one that is always so on channels-last input. With kernel size three it is so on the CPU at low
    resolution, where the convolution kernels take longer to reorder their weight, at every call, than to use it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        geometry = (self.kernel_size, self.padding, self.dilation, self.groups, self.padding_mode)
        if geometry == ((1, 1), (0, 0), (1, 1), 1, "zeros") and self._rows_are_a_view(x):
            rows, weight = x.permute(0, 2, 3, 1), self.weight.flatten(1)
        elif geometry == ((3, 3), (1, 1), (1, 1), 1, "zeros") and self._few_positions(x):
            rows, weight = neighbourhoods(x, self.stride[0], self.weight)
        else:
            return super().forward(x)
        return linear(rows, weight, self.bias).permute(0, 3, 1, 2)

    def _rows_are_a_view(self, x: Tensor) -> bool:
        """Whether x [B, C, H, W] lies in memory as [B, H, W, C] and every position is used."""
        return x.dim() == 4 and self.stride == (1, 1) and x.is_contiguous(memory_format=torch.channels_last)

    def _few_positions(self, x: Tensor) -> bool:
        """Whether it costs less to copy the input nine times than to reorder the weight (measured: half as many)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return False
        positions = x.numel() // x.shape[-3] // self.stride[0] ** 2
        return x.dim() == 4 and self.stride[0] == self.stride[1] and 2 * positions <= self.out_channels


CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1, 2 or 3-dimensional convolution; the other arguments are those of `nn.Conv2d`."""
    if dims not in CONVOLUTIONS:
        raise ValueError(f"got dims={dims}, expected 1, 2 or 3")
    return CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1, 2 or 3-dimensional average pool; the other arguments are those of `nn.AvgPool2d`."""
    if dims not in AVERAGE_POOLS:
        raise ValueError(f"got dims={dims}, expected 1, 2 or 3")
    return AVERAGE_POOLS[dims](*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Sets every parameter to zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds: in place where no gradient needs its input."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def checkpoint(enabled: bool, dropout: float, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """`function(*args)`; with `enabled`, its activations are computed again in the backward pass instead of held."""
    if not (enabled and torch.is_grad_enabled()):
        return function(*args)
    # the random state costs a device sync to save: only dropout needs it
    return torch_checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout > 0)


class GroupNorm32(nn.GroupNorm):
    """Group norm whose statistics are float32 and whose output has the dtype of its input (eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        # the kernels accumulate half precision input in float32, weights only have to agree in dtype
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def normalization(channels: int, groups: int = 32) -> GroupNorm32:
    """The norm of residual and attention blocks: 32 groups; raises ValueError if they do not divide `channels`."""
    return GroupNorm32(groups, channels)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding [B, dim] in [-1, 1] of integer or fractional timesteps [B].

    Cosines first, then sines, of t * max_period^(-i / (dim // 2)); an odd `dim` ends with a zero column
    (after "Attention Is All You Need", section 3.5). `repeat_only` returns each timestep `dim` times instead.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    exponents = -math.log(max_period) / half * i
    # the last bit of exp differs between processors, and a time of 1000 makes it visible: there it is exact
    frequencies = exponents.double().exp().float() if i.device.type == "cpu" else exponents.exp()
    args = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, dim % 2))


class Timestep(nn.Module):
    """`timestep_embedding` to `dim` columns as a module."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, dim]."""
        return timestep_embedding(t, self.dim)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution if `use_conv`; dims=3 keeps the depth."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=padding) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', 2H, 2W]."""
        if x.shape[1] != self.channels:
            raise ValueError(f"got {x.shape[1]} channels, expected {self.channels}")
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution (`use_conv`) or an average; dims=3 keeps the depth."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=padding)
        elif out_channels in (None, channels):
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)
        else:
            raise ValueError(f"got out_channels={out_channels} without a convolution, expected {channels}")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / 2, W / 2]."""
        if x.shape[1] != self.channels:
            raise ValueError(f"got {x.shape[1]} channels, expected {self.channels}")
        return self.op(x)


class ResBlock(nn.Module):
    """Two norm-SiLU-convolution layers around an injected embedding, plus a skip connection.

    `use_scale_shift_norm`: the embedding scales and shifts the second norm instead of being added before it.
    `up` / `down`: resamples by two between the first SiLU and the first convolution, and the skip with it.
    `use_conv`: a 3x3 instead of a 1x1 convolution where the skip changes the number of channels.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out = out_channels or channels
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out
        self.dropout, self.use_checkpoint, self.use_scale_shift_norm = dropout, use_checkpoint, use_scale_shift_norm
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv_nd(dims, channels, out, 3, padding=1))
        self.resample = Upsample(channels, False, dims) if up else Downsample(channels, False, dims) if down else None
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, 2 * out if use_scale_shift_norm else out))
        self.out_layers = nn.Sequential(
            normalization(out), nn.SiLU(), nn.Dropout(p=dropout), zero_module(conv_nd(dims, out, out, 3, padding=1))
        )
        if out == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, C', H', W'] (any number of spatial axes)."""
        return checkpoint(self.use_checkpoint, self.dropout, self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = silu(self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb).to(h.dtype)
        e = e.reshape(*e.shape, *[1] * (h.dim() - 2))
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + e)
        return self.skip_connection(x) + conv(dropout(silu(h)))
