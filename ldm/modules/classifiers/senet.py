"""SENet-154, winner of ILSVRC-2017 ("Squeeze-and-Excitation Networks", Hu et al., appendix); timm's key names.

SE-ResNets are in resnet.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from ldm.modules.classifiers.common import (
    DropPath,
    ImageNetwork,
    SqueezeExcite,
    drop_path_rates,
    init_kaiming,
    is_small,
    scaled,
)

LAYERS, PLANES, GROUPS, REDUCTION = (3, 8, 36, 3), (64, 128, 256, 512), 64, 16


class SEBottleneck(nn.Module):
    """A bottleneck with grouped 3x3 convolution and squeeze-and-excitation: [B, C, H, W] -> [B, 4 planes, h, w]."""

    def __init__(
        self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None, drop: float, groups: int
    ) -> None:
        super().__init__()
        inner, out = planes * 2, planes * 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, stride, 1, groups=math.gcd(groups, inner), bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv3 = nn.Conv2d(out, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = SqueezeExcite(out, out // REDUCTION)
        self.downsample = downsample
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.drop_path(self.se_module(self.bn3(self.conv3(out))))
        return self.relu(out.add_(x if self.downsample is None else self.downsample(x)))


class SENet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels, and the number of groups, so that a group keeps its channels (2, 4, 8, 16).
        stem: "imagenet" (stride 2, max pool) or "small" (stride 1, no pool).
        dropout: before the last layer.
        drop_path: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        dropout: float = 0.2,
        drop_path: float = 0.0,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=1 if small else 3)
        c, at = scaled(64, width), scaled(128, width)
        convs = [(in_channels, c, 1 if small else 2), (c, c, 1), (c, at, 1)]
        stem_layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (a, b, stride) in enumerate(convs, 1):
            stem_layers[f"conv{i}"] = nn.Conv2d(a, b, 3, stride, 1, bias=False)
            stem_layers[f"bn{i}"] = nn.BatchNorm2d(b)
            stem_layers[f"relu{i}"] = nn.ReLU(inplace=True)
        self.layer0 = nn.Sequential(stem_layers)
        self.pool0 = nn.Identity() if small else nn.MaxPool2d(3, 2, ceil_mode=True)
        groups = max(1, round(GROUPS * width))
        rates = iter(drop_path_rates(drop_path, sum(LAYERS)))
        for i, (depth, base) in enumerate(zip(LAYERS, PLANES, strict=True)):
            planes, stride, kernel = scaled(base, width), 2 if i else 1, 3 if i else 1
            down = nn.Sequential(
                nn.Conv2d(at, planes * 4, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(planes * 4)
            )
            blocks = []
            for j in range(depth):
                blocks.append(SEBottleneck(at, planes, 1 if j else stride, None if j else down, next(rates), groups))
                at = planes * 4
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(at, num_classes)
        init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        x = self.pool0(self.layer0(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.last_linear(self.dropout(x.mean((2, 3))))


def senet154(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    dropout: float = 0.2,
    drop_path: float = 0.0,
) -> SENet:
    """SENet-154; parameters as in `SENet`."""
    return SENet(num_classes, in_channels, width, stem, dropout, drop_path)
