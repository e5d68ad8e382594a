"""ENet ("A Deep Neural Network Architecture for Real-Time Semantic Segmentation", Paszke et al. 2016).

`enet` labels every pixel; `enet_encoder` is its encoder with a linear layer on top, a classifier of whole images as the
authors pretrain it. Neither torchvision nor timm has it: the keys are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import ImageNetwork, init_kaiming, is_small, scaled

# bottlenecks of stages 2 and 3 after the downsampling (table 1): plain, dilated by n, or 5x1 and 1x5
STAGE = ("plain", 2, "asymmetric", 4, "plain", 8, "asymmetric", 16)


def conv_norm(conv: nn.Module, channels: int, prelu: bool) -> list[nn.Module]:
    """The convolution, batch norm, and PReLU (encoder) or ReLU (decoder)."""
    return [conv, nn.BatchNorm2d(channels), nn.PReLU(channels) if prelu else nn.ReLU(inplace=True)]


class Initial(nn.Module):
    """Figure 2a: a 3x3 convolution beside a max pool: [B, C, H, W] -> [B, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride, 1, bias=False)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.norm, self.act = nn.BatchNorm2d(out_channels), nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(torch.cat([self.conv(x), self.pool(x)], 1)))


class Bottleneck(nn.Module):
    """Figure 2b: 1x1 to a quarter of the channels, a convolution, 1x1 back, dropout of channels, sum with the input.

    Args:
        in_channels, channels: before and after; more of them afterwards means the resolution is halved.
        kind: "plain", "asymmetric", or the dilation.
        dropout: probability that a channel of the branch is dropped.
        prelu: PReLU (encoder) or ReLU (decoder).
    """

    def __init__(self, in_channels: int, channels: int, kind: str | int, dropout: float, prelu: bool = True) -> None:
        super().__init__()
        self.down = channels != in_channels
        inner = max(1, channels // 4)
        first = nn.Conv2d(in_channels, inner, 2 if self.down else 1, 2 if self.down else 1, bias=False)
        if kind == "asymmetric":
            middle = [nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False)]
            middle.append(nn.Conv2d(inner, inner, (1, 5), padding=(0, 2)))
        else:
            dilation = kind if isinstance(kind, int) else 1
            middle = [nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation)]
        self.branch = nn.Sequential(
            *conv_norm(first, inner, prelu),
            *conv_norm(nn.Sequential(*middle), inner, prelu),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Dropout2d(dropout),
        )
        self.act = nn.PReLU(channels) if prelu else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, in_channels, H, W] -> ([B, channels, h, w], positions of the maxima where the size was halved)."""
        branch, where = self.branch(self._even(x)), None
        if self.down:
            x, where = F.max_pool2d(self._even(x), 2, 2, return_indices=True)
            # zeros for the new channels
            x = F.pad(x, (0, 0, 0, 0, 0, branch.shape[1] - x.shape[1]))
        return self.act(branch + x), where

    def _even(self, x: Tensor) -> Tensor:
        """Repeats the last row or column where halving would lose it."""
        h, w = x.shape[2:]
        return F.pad(x, (0, w % 2, 0, h % 2), mode="replicate") if self.down and (h % 2 or w % 2) else x


class Upsample(nn.Module):
    """The decoder's bottleneck of twice the resolution: the skip goes to where the encoder's maxima were.

    [B, in_channels, H, W] -> [B, channels, 2 H, 2 W].
    """

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        self.skip = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.branch = nn.Sequential(
            *conv_norm(nn.Conv2d(in_channels, inner, 1, bias=False), inner, prelu=False),
            *conv_norm(nn.ConvTranspose2d(inner, inner, 2, 2, bias=False), inner, prelu=False),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Dropout2d(dropout),
        )

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        branch = self.branch(x)
        return F.relu(branch + F.max_unpool2d(self.skip(x), where, 2, 2, output_size=branch.shape[2:]))


class Encoder(nn.Module):
    """Stages 1 to 3: [B, in_channels, H, W] -> ([B, 8 c, h, w], [positions of stage 1, of stage 2]), c = 16 `width`."""

    def __init__(self, in_channels: int, width: float, small: bool) -> None:
        super().__init__()
        c = scaled(16, width)
        self.channels = (c, 4 * c, 8 * c)
        self.initial = Initial(in_channels, c, 1 if small else 2)
        self.stage1 = nn.ModuleList([Bottleneck(c, 4 * c, "plain", 0.01)])
        self.stage1.extend(Bottleneck(4 * c, 4 * c, "plain", 0.01) for _ in range(4))
        self.stage2 = nn.ModuleList([Bottleneck(4 * c, 8 * c, "plain", 0.1)])
        self.stage2.extend(Bottleneck(8 * c, 8 * c, kind, 0.1) for kind in STAGE)
        self.stage3 = nn.ModuleList(Bottleneck(8 * c, 8 * c, kind, 0.1) for kind in STAGE)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.initial(x)
        positions: list[Tensor] = []
        for block in (*self.stage1, *self.stage2, *self.stage3):
            x, where = block(x)
            if where is not None:
                positions.append(where)
        return x, positions


class ENet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits of every pixel [B, num_classes, H, W].

    Args:
        num_classes: outputs per pixel.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "imagenet" (stride 2) or "small" (stride 1).
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, stem: str = "imagenet"
    ) -> None:
        super().__init__(num_classes, in_channels, min_size=1)
        small = is_small(stem)
        self.encoder = Encoder(in_channels, width, small)
        c1, c4, c8 = self.encoder.channels
        self.up4, self.up5 = Upsample(c8, c4, 0.1), Upsample(c4, c1, 0.1)
        self.stage4 = nn.ModuleList(Bottleneck(c4, c4, "plain", 0.1, prelu=False) for _ in range(2))
        self.stage5 = nn.ModuleList([Bottleneck(c1, c1, "plain", 0.1, prelu=False)])
        self.last = nn.Conv2d(c1, num_classes, 3, 1, 1) if small else nn.ConvTranspose2d(c1, num_classes, 2, 2)
        init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        size = x.shape[2:]
        x, (first, second) = self.encoder(x)
        for up, where, stage in ((self.up4, second, self.stage4), (self.up5, first, self.stage5)):
            # odd sizes were padded by the encoder: the map is cut back to what the positions count in
            x = up(x[:, :, : where.shape[2], : where.shape[3]], where)
            for block in stage:
                x, _ = block(x)
        return self.last(x)[:, :, : size[0], : size[1]]


class ENetEncoder(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes]; parameters as in `ENet`."""

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, stem: str = "imagenet"
    ) -> None:
        super().__init__(num_classes, in_channels, min_size=1)
        self.encoder = Encoder(in_channels, width, is_small(stem))
        self.fc = nn.Linear(self.encoder.channels[2], num_classes)
        init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        return self.fc(self.encoder(x)[0].mean((2, 3)))


def enet(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, stem: str = "imagenet") -> ENet:
    """ENet, a label for every pixel; parameters as in `ENet`."""
    return ENet(num_classes, in_channels, width, stem)


def enet_encoder(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, stem: str = "imagenet"
) -> ENetEncoder:
    """ENet's encoder as a classifier of images; parameters as in `ENet`."""
    return ENetEncoder(num_classes, in_channels, width, stem)
