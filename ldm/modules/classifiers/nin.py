"""Network in Network (Lin, Chen and Yan 2013): 1x1 convolutions after each convolution, and no fully connected layer.

`stem: small` is the paper's network for 32x32 images (0.97 M parameters), `stem: imagenet` the authors' network for
ImageNet in the Caffe model zoo (7.6 M). `norm: bn` is BN-NIN. Neither torchvision nor timm has it: the keys are ours.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.classifiers.alexnet import conv_layers
from ldm.modules.classifiers.common import ImageNetwork, init_kaiming, is_small, scaled

# (kernel, stride, padding) of the first convolution and the channels of it and the two 1x1 that follow, per block;
# None stands for num_classes
SMALL = (((5, 1, 2), (192, 160, 96)), ((5, 1, 2), (192, 192, 192)), ((3, 1, 1), (192, 192, None)))
IMAGENET = (
    ((11, 4, 0), (96, 96, 96)),
    ((5, 1, 2), (256, 256, 256)),
    ((3, 1, 1), (384, 384, 384)),
    ((3, 1, 1), (1024, 1024, None)),
)


class NIN(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes]: the mean over positions of the last 1x1 convolution.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies the channels.
        stem: "small" or "imagenet".
        norm: "none" or "bn".
        dropout: after each pooling of the small network, before the last block of the large one.
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
        super().__init__(num_classes, in_channels, min_size=7 if small else 67)
        blocks = SMALL if small else IMAGENET
        layers: list[nn.Module] = []
        at = in_channels
        for i, (conv, channels) in enumerate(blocks):
            for c in channels:
                out = num_classes if c is None else scaled(c, width)
                layers += conv_layers(at, out, conv, norm)
                at, conv = out, (1, 1, 0)
            last = i == len(blocks) - 1
            if not last:
                # the paper's small network pools by the mean after its second block
                layers.append(nn.AvgPool2d(3, 2) if small and i == 1 else nn.MaxPool2d(3, 2))
            if (small and not last) or i == len(blocks) - 2:
                layers.append(nn.Dropout(dropout))
        # no ReLU (and no norm) on the logits: where they are all cut at zero, nothing is learned
        del layers[-2 if norm == "bn" else -1 :]
        self.features = nn.Sequential(*layers)
        init_kaiming(self, mode="fan_in")  # by fan out the first layer alone would shrink them to an eighth

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        return self.features(x).mean((2, 3))


def nin(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    norm: str = "none",
    dropout: float = 0.5,
) -> NIN:
    """Network in Network; parameters as in the class."""
    return NIN(num_classes, in_channels, width, stem, norm, dropout)
