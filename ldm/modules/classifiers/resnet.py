"""Residual networks ("Deep Residual Learning for Image Recognition", He et al. 2015).

- `resnet18` ... `resnet152`: torchvision's key names; the stride of a bottleneck is in its 3x3 convolution.
- `seresnet18` ... `seresnet152`: with squeeze-and-excitation; timm's key names.
- `resnet20` ... `resnet110`: the 6n+2 family of section 4.2 for 32x32 images, 16 to 64 channels, shortcuts without
  parameters (option A).
- `plain18`, `plain34`, `plain20` ... `plain110`: the same networks without shortcuts, as the paper compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import (
    DropPath,
    ImageNetwork,
    SqueezeExcite,
    drop_path_rates,
    init_kaiming,
    is_small,
    named,
    scaled,
)

SHORTCUTS = ("project", "pad", "none")  # options B and A of the paper, and the plain network


class PadShortcut(nn.Module):
    """Every `stride`-th pixel, with zeros for the new channels (option A: no parameters)."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + extra, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class Block(nn.Module):
    """relu(F(x) + shortcut(x)).

    Args:
        in_channels: of x.
        planes: channels of F's 3x3 convolutions.
        stride: of the block.
        shortcut: one of `SHORTCUTS`, used where F changes the shape; "none" leaves the sum out everywhere.
        se: squeeze-and-excitation at the end of F.
        drop_path: rate of stochastic depth.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int, shortcut: str, se: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        out = planes * self.expansion
        self.make_layers(in_channels, planes, stride)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(out, scaled(out, 1 / 16)) if se else nn.Identity()
        self.downsample: nn.Module | None = None
        if shortcut != "none" and (stride != 1 or in_channels != out):
            self.downsample = (
                PadShortcut(out - in_channels, stride)
                if shortcut == "pad"
                else nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )
        self.residual = shortcut != "none"
        self.drop_path = DropPath(drop_path) if self.residual else nn.Identity()

    def make_layers(self, in_channels: int, planes: int, stride: int) -> None:
        """The layers of F."""
        raise NotImplementedError(f"{type(self).__name__} has no layers")

    def branch(self, x: Tensor) -> Tensor:
        """F(x)."""
        raise NotImplementedError(f"{type(self).__name__} has no branch")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, planes * expansion, H / stride, W / stride]."""
        out = self.drop_path(self.se(self.branch(x)))
        if self.residual:
            out = out.add_(x if self.downsample is None else self.downsample(x))
        return self.relu(out)


class BasicBlock(Block):
    """Two 3x3 convolutions (figure 5, left)."""

    def make_layers(self, in_channels: int, planes: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, the last one to four times the channels (figure 5, right)."""

    expansion = 4

    def make_layers(self, in_channels: int, planes: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks per stage; every stage after the first halves the resolution.
        planes: channels of the stages before `width`.
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "imagenet" (7x7 convolution of stride 2, max pool) or "small" (3x3 of stride 1, no pool).
        shortcut: one of `SHORTCUTS`.
        se: squeeze-and-excitation in every block.
        zero_init_residual: every residual branch starts at zero (Goyal et al. 2017, section 5.1): for long trainings
            with large batches; a run of few steps starts much slower.
        drop_path: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        block: type[Block],
        layers: Sequence[int],
        planes: Sequence[int] = (64, 128, 256, 512),
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        shortcut: str = "project",
        se: bool = False,
        zero_init_residual: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"got shortcut={shortcut!r}, expected one of {', '.join(SHORTCUTS)}")
        channels = [scaled(p, width) for p in planes]
        small = is_small(stem)
        self.conv1 = nn.Conv2d(in_channels, channels[0], *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        rates = iter(drop_path_rates(drop_path, sum(layers)))
        at = channels[0]
        for i, (depth, c) in enumerate(zip(layers, channels, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(at, c, 2 if i and not j else 1, shortcut, se, next(rates)))
                at = c * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.depth = len(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(at, num_classes)
        init_kaiming(self)
        if zero_init_residual and shortcut != "none":
            for m in self.modules():
                if isinstance(m, Block):
                    nn.init.zeros_((m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight)

    def stages(self) -> Iterator[nn.Module]:
        """The stages in order."""
        return (getattr(self, f"layer{i + 1}") for i in range(self.depth))

    def features(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> the last feature map [B, C, h, w]."""
        self.check(x.shape)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


def _imagenet(
    name: str, block: type[Block], layers: Sequence[int], se: bool = False, shortcut: str = "project"
) -> Callable[..., ResNet]:
    def build(
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
        drop_path: float = 0.0,
    ) -> ResNet:
        return ResNet(
            block,
            layers,
            num_classes=num_classes,
            in_channels=in_channels,
            width=width,
            stem=stem,
            shortcut=shortcut,
            se=se,
            zero_init_residual=zero_init_residual,
            drop_path=drop_path,
        )

    return named(name, f"ResNet with {list(layers)} blocks; parameters as in `ResNet`.", build)


def _cifar(name: str, n: int, shortcut: str) -> Callable[..., ResNet]:
    def build(
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "small",
        zero_init_residual: bool = False,
        drop_path: float = 0.0,
    ) -> ResNet:
        return ResNet(
            BasicBlock,
            (n, n, n),
            (16, 32, 64),
            num_classes=num_classes,
            in_channels=in_channels,
            width=width,
            stem=stem,
            shortcut=shortcut,
            zero_init_residual=zero_init_residual,
            drop_path=drop_path,
        )

    return named(name, f"The 6n+2 network with n = {n} for 32x32 images; parameters as in `ResNet`.", build)


resnet18 = _imagenet("resnet18", BasicBlock, (2, 2, 2, 2))
resnet34 = _imagenet("resnet34", BasicBlock, (3, 4, 6, 3))
resnet50 = _imagenet("resnet50", Bottleneck, (3, 4, 6, 3))
resnet101 = _imagenet("resnet101", Bottleneck, (3, 4, 23, 3))
resnet152 = _imagenet("resnet152", Bottleneck, (3, 8, 36, 3))
seresnet18 = _imagenet("seresnet18", BasicBlock, (2, 2, 2, 2), se=True)
seresnet34 = _imagenet("seresnet34", BasicBlock, (3, 4, 6, 3), se=True)
seresnet50 = _imagenet("seresnet50", Bottleneck, (3, 4, 6, 3), se=True)
seresnet101 = _imagenet("seresnet101", Bottleneck, (3, 4, 23, 3), se=True)
seresnet152 = _imagenet("seresnet152", Bottleneck, (3, 8, 36, 3), se=True)
plain18 = _imagenet("plain18", BasicBlock, (2, 2, 2, 2), shortcut="none")
plain34 = _imagenet("plain34", BasicBlock, (3, 4, 6, 3), shortcut="none")
resnet20, plain20 = _cifar("resnet20", 3, "pad"), _cifar("plain20", 3, "none")
resnet32, plain32 = _cifar("resnet32", 5, "pad"), _cifar("plain32", 5, "none")
resnet44, plain44 = _cifar("resnet44", 7, "pad"), _cifar("plain44", 7, "none")
resnet56, plain56 = _cifar("resnet56", 9, "pad"), _cifar("plain56", 9, "none")
resnet110, plain110 = _cifar("resnet110", 18, "pad"), _cifar("plain110", 18, "none")
