"""Small parts that several classifier families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.ema import LitEma

STEMS = ("imagenet", "small")


class Outputs(NamedTuple):
    """What a network with auxiliary heads returns in training mode.

    logits: [B, num_classes]; aux: logits of the auxiliary heads [B, num_classes], the deepest one first.
    """

    logits: Tensor
    aux: tuple[Tensor, ...]


def scaled(channels: int, width: float) -> int:
    """`channels * width` as a multiple of 8 (at least 8); unchanged at width 1."""
    if width <= 0:
        raise ValueError(f"got width={width}, expected a positive number")
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def is_small(stem: str) -> bool:
    """True for the stem that keeps the resolution of images of 32x32 and less."""
    if stem not in STEMS:
        raise ValueError(f"got stem={stem!r}, expected one of {', '.join(STEMS)}")
    return stem == "small"


class ImageNetwork(nn.Module):
    """Images [B, in_channels, H, W] -> logits [B, num_classes]; subclasses call `check` first.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        min_size: smallest height and width that leave something for the last layer to see.
        image_size: the only size taken (position embeddings); None: any.
    """

    def __init__(self, num_classes: int, in_channels: int, min_size: int = 1, image_size: int | None = None) -> None:
        super().__init__()
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"got num_classes={num_classes}, in_channels={in_channels}, expected at least 1")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.min_size, self.image_size = min_size, image_size

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError for a shape other than [B, in_channels, H, W] of a size that fits."""
        name, size = type(self).__name__, self.image_size
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(f"{name}: got images {list(shape)}, expected [B, {self.in_channels}, H, W]")
        if size is not None and tuple(shape[2:]) != (size, size):
            raise ValueError(f"{name}: got images of {shape[2]}x{shape[3]}, expected {size}x{size} (image_size)")
        if min(shape[2:]) < self.min_size:
            raise ValueError(
                f"{name}: got images of {shape[2]}x{shape[3]}, expected at least {self.min_size}x{self.min_size} "
                "(stem: small takes smaller ones)"
            )


def named(name: str, doc: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a network's constructor its public name."""
    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return build


def init_kaiming(module: nn.Module, linear: bool = False, mode: str = "fan_out") -> None:
    """He et al. 2015 for all convolutions, and for linear layers (fan in) where asked; biases zero.

    Args:
        mode: fan_out keeps the size of gradients, fan_in that of activations.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
        elif linear and isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU; arguments as for `nn.Conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


class Parallel(nn.Module):
    """Branches side by side, their outputs concatenated: [B, C, H, W] -> [B, sum of C, h, w]."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], 1)


class SqueezeExcite(nn.Module):
    """Channel attention from the mean over positions ("Squeeze-and-Excitation Networks", equations 2 to 4).

    Args:
        channels: of the input.
        hidden: channels of the bottleneck.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        scale = self.fc1(x.mean((2, 3), keepdim=True)).relu_()
        return x * self.fc2(scale).sigmoid()


class DropPath(nn.Module):
    """Leaves out a residual branch for a random part of the batch ("Deep Networks with Stochastic Depth").

    Args:
        rate: probability of leaving the branch out; those that stay are scaled so that the mean is kept.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"got drop_path={rate}, expected a value in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (keep / (1 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The linear rule of the paper: 0 at the first block, `rate` at the last one."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]


class BufferEma(LitEma):
    """`LitEma` that averages floating-point buffers too.

    Averaged weights with the running statistics of the raw ones do not fit: batch norm needs both from one average.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__(model, decay, use_num_upates)
        for name, b in model.named_buffers():
            if b.is_floating_point():
                self._hold(name, b)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        missing = [name for name in self.m_name2s_name if name not in held]
        if missing:
            raise ValueError(f"got a model without {len(missing)} averaged tensors ({missing[0]!r} ...)")
        return [held[n] for n in self.m_name2s_name], [getattr(self, k) for k in self.m_name2s_name.values()]
