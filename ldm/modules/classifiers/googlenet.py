"""GoogLeNet ("Going Deeper with Convolutions", Szegedy et al. 2014), with batch norm; torchvision's key names.

As in torchvision's weights, the "5x5" branch is a 3x3 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import ConvBN, ImageNetwork, Outputs, Parallel, is_small, scaled

# name -> channels of: 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection (table 1 of the paper)
MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "maxpool3": (),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "maxpool4": (),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
AUX_AFTER = {"inception4a": "aux1", "inception4d": "aux2"}


def inception(at: int, one: int, three_in: int, three: int, five_in: int, five: int, pool: int) -> Parallel:
    """The module of figure 2b: [B, at, H, W] -> [B, one + three + five + pool, H, W]."""
    return Parallel(
        branch1=ConvBN(at, one, 1),
        branch2=nn.Sequential(ConvBN(at, three_in, 1), ConvBN(three_in, three, 3, padding=1)),
        branch3=nn.Sequential(ConvBN(at, five_in, 1), ConvBN(five_in, five, 3, padding=1)),
        branch4=nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvBN(at, pool, 1)),
    )


class AuxHead(nn.Module):
    """Logits from the middle of the network: [B, C, H, W] -> [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        channels, hidden = scaled(128, width), scaled(1024, width)
        self.conv = ConvBN(in_channels, channels, 1)
        self.fc1 = nn.Linear(channels * 16, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(self.fc1(x).relu_()))


class GoogLeNet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes], in training mode `Outputs(logits, (aux2, aux1))`.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "imagenet" (7x7 convolution of stride 2, max pool) or "small" (3x3 of stride 1, no pool).
        aux_logits: with the two auxiliary heads.
        dropout, dropout_aux: before the last layer of the network and of the heads.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        aux_logits: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=4 if small else 15)
        c1, c3 = scaled(64, width), scaled(192, width)
        self.conv1 = ConvBN(in_channels, c1, *((3, 1, 1) if small else (7, 2, 3)))
        self.maxpool1 = nn.Identity() if small else nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = ConvBN(c1, c1, 1)
        self.conv3 = ConvBN(c1, c3, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        at = c3
        for name, channels in MODULES.items():
            if not channels:
                self.add_module(name, nn.MaxPool2d(3 if name == "maxpool3" else 2, 2, ceil_mode=True))
                continue
            one, three_in, three, five_in, five, pool = (scaled(c, width) for c in channels)
            self.add_module(name, inception(at, one, three_in, three, five_in, five, pool))
            at = one + three + five + pool
            if aux_logits and name in AUX_AFTER:
                self.add_module(AUX_AFTER[name], AuxHead(at, num_classes, width, dropout_aux))
        self.aux_logits = aux_logits
        self.avgpool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout)
        self.fc = nn.Linear(at, num_classes)

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out the auxiliary heads of pretrained weights where this network has none."""
        return state if self.aux_logits else {k: v for k, v in state.items() if not k.startswith("aux")}

    def forward(self, x: Tensor) -> Tensor | Outputs:
        self.check(x.shape)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        aux: list[Tensor] = []
        for name in MODULES:
            x = getattr(self, name)(x)
            if self.training and self.aux_logits and name in AUX_AFTER:
                aux.insert(0, getattr(self, AUX_AFTER[name])(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return Outputs(logits, tuple(aux)) if aux else logits


def googlenet(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    aux_logits: bool = True,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
) -> GoogLeNet:
    """GoogLeNet; parameters as in the class."""
    return GoogLeNet(num_classes, in_channels, width, stem, aux_logits, dropout, dropout_aux)
