"""VGG ("Very Deep Convolutional Networks for Large-Scale Image Recognition", Simonyan and Zisserman 2014).

`vgg11`, `vgg13`, `vgg16`, `vgg19` and the same with batch norm (`vgg16_bn`): torchvision's key names.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ldm.modules.classifiers.alexnet import conv_layers
from ldm.modules.classifiers.common import ImageNetwork, init_kaiming, is_small, named, scaled

# 3x3 convolutions per stage (columns A, B, D and E of table 1); each stage ends with a 2x2 max pool
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        norm: "none" or "bn".
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies the channels and the hidden layers.
        stem: "imagenet" (7x7 positions and 4096 hidden units before the logits) or "small" (one position and 512, and
            pools that keep a last odd row): the convolutions are the same, as they have no stride.
        dropout: after each hidden layer.
    """

    def __init__(
        self,
        depth: int,
        norm: str,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        dropout: float = 0.5,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=1 if small else 32)
        grid, hidden = (1, 512) if small else (7, 4096)
        hidden = scaled(hidden, width)
        layers: list[nn.Module] = []
        at = in_channels
        for repeats, channels in zip(DEPTHS[depth], CHANNELS, strict=True):
            for _ in range(repeats):
                layers += conv_layers(at, scaled(channels, width), (3, 1, 1), norm)
                at = scaled(channels, width)
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=small))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(at * grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        init_kaiming(self, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _vgg(depth: int, norm: str) -> Callable[..., VGG]:
    def build(
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        dropout: float = 0.5,
    ) -> VGG:
        return VGG(depth, norm, num_classes, in_channels, width, stem, dropout)

    name = f"vgg{depth}" + ("_bn" if norm == "bn" else "")
    return named(name, f"VGG with {depth} layers, norm {norm}; parameters as in `VGG`.", build)


vgg11, vgg11_bn = _vgg(11, "none"), _vgg(11, "bn")
vgg13, vgg13_bn = _vgg(13, "none"), _vgg(13, "bn")
vgg16, vgg16_bn = _vgg(16, "none"), _vgg(16, "bn")
vgg19, vgg19_bn = _vgg(19, "none"), _vgg(19, "bn")
