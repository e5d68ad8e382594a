"""AlexNet ("ImageNet Classification with Deep CNNs", 2012) in the one-tower form of "One weird trick" (2014).

torchvision's key names. `norm: bn` is BN-AlexNet: a batch norm after every convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.classifiers.common import ImageNetwork, init_kaiming, is_small, scaled


def conv_layers(in_channels: int, out_channels: int, conv: tuple[int, int, int], norm: str) -> list[nn.Module]:
    """Convolution (kernel, stride, padding), batch norm where `norm` is "bn", ReLU."""
    if norm not in ("none", "bn"):
        raise ValueError(f"got norm={norm!r}, expected none or bn")
    middle = [nn.BatchNorm2d(out_channels)] if norm == "bn" else []
    return [nn.Conv2d(in_channels, out_channels, *conv), *middle, nn.ReLU(inplace=True)]


class AlexNet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies the channels and the hidden layers.
        stem: "imagenet" (11x11 convolution of stride 4) or "small" (3x3 of stride 1).
        norm: "none" or "bn".
        dropout: before each hidden layer.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        norm: str = "none",
        dropout: float = 0.5,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=15 if small else 63)
        c = [scaled(v, width) for v in (64, 192, 384, 256, 256)]
        hidden, grid = scaled(4096, width), 3 if small else 6
        first, five, three = (3, 1, 1) if small else (11, 4, 2), (5, 1, 2), (3, 1, 1)
        self.features = nn.Sequential(
            *conv_layers(in_channels, c[0], first, norm),
            nn.MaxPool2d(3, 2),
            *conv_layers(c[0], c[1], five, norm),
            nn.MaxPool2d(3, 2),
            *conv_layers(c[1], c[2], three, norm),
            *conv_layers(c[2], c[3], three, norm),
            *conv_layers(c[3], c[4], three, norm),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(c[4] * grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        init_kaiming(self, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    norm: str = "none",
    dropout: float = 0.5,
) -> AlexNet:
    """AlexNet; parameters as in the class."""
    return AlexNet(num_classes, in_channels, width, stem, norm, dropout)
