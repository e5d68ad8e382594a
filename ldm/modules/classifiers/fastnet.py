"""A small convolutional network for 32x32 images that learns in few epochs.

The plan follows "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, section 3): a first layer that whitens
patches and is never trained, three groups of wide 3x3 convolutions with early pooling, batch norm without a trained
scale, GELU, and logits of a small scale. Here the third convolution of a group is residual, as in the paper's largest
network (section 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import ImageNetwork, is_small, scaled
from ldm.modules.classifiers.packed import PackedConv2d

PATCH = 2  # side of the whitened patches
EPS = 5e-4  # added to the variance of each direction: noise is not blown up to unit variance
WIDTHS = (64, 256, 256)


class Whitening(nn.Module):
    """A convolution whose filters are the patches' principal axes, each scaled to unit variance, and their negatives.

    Section 3.2. [B, C, H, W] -> [B, 8 C, H - 1, W - 1]. Until `fit`, the filters are random.
    """

    done: Tensor

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        size = in_channels * PATCH**2
        self.weight = nn.Parameter(torch.randn(2 * size, in_channels, PATCH, PATCH) / size**0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2 * size))
        self.register_buffer("done", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes the axes from images [B, C, H, W]; a second call does nothing."""
        if bool(self.done):
            return
        patches = F.unfold(x.float(), PATCH).transpose(1, 2).flatten(0, 1)  # [n, C * PATCH^2]
        patches = patches - patches.mean(0)
        variance, axes = torch.linalg.eigh(patches.T.double() @ patches.double() / len(patches))
        filters = (axes / (variance + EPS).sqrt()).T.flip(0).to(self.weight)
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))
        self.done.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Norm(nn.BatchNorm2d):
    """Batch norm with a trained shift but no scale; its running statistics follow quickly."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)


class Group(nn.Module):
    """A convolution, a 2x2 max pool, then `depth - 1` residual convolutions at the new size.

    [B, in_channels, H, W] -> [B, channels, H / 2, W / 2].
    """

    def __init__(self, in_channels: int, channels: int, depth: int) -> None:
        super().__init__()
        self.conv = PackedConv2d(in_channels, channels)
        self.norm = Norm(channels)
        self.convs = nn.ModuleList(PackedConv2d(channels, channels) for _ in range(depth - 1))
        self.norms = nn.ModuleList(Norm(channels) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(F.max_pool2d(self.conv(x), 2)))
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = F.gelu(norm(conv(x)))
            x = x + out if number % 2 else out
        return x


class FastNet(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "small"; there is no other.
        depth: convolutions of a group; the third one is residual.
        scale: factor on the logits (section 3.1).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "small",
        depth: int = 2,
        scale: float = 1 / 9,
    ) -> None:
        super().__init__(num_classes, in_channels, min_size=24)
        if not is_small(stem):
            raise ValueError("got stem=imagenet, expected small: this network is for images of about 32x32")
        if depth < 1:
            raise ValueError(f"got depth={depth}, expected at least 1")
        self.scale = scale
        self.whiten = Whitening(in_channels)
        channels = [self.whiten.weight.shape[0], *(scaled(w, width) for w in WIDTHS)]
        self.groups = nn.Sequential(*(Group(a, b, depth) for a, b in zip(channels, channels[1:], strict=False)))
        self.fc = nn.Linear(channels[-1], num_classes, bias=False)

    def fit_to(self, x: Tensor) -> None:
        """Takes the whitening from images [B, in_channels, H, W], once."""
        self.whiten.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        x = self.groups(F.gelu(self.whiten(x)))
        return self.fc(x.amax((2, 3))) * self.scale


def fastnet(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "small",
    depth: int = 2,
) -> FastNet:
    """A network that learns CIFAR-10 in few epochs; parameters as in `FastNet`."""
    return FastNet(num_classes, in_channels, width, stem, depth)
