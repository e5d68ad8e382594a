"""Generators and discriminators of the first GANs: MLP, conditional, DCGAN, with projection and auxiliary classifiers.

Goodfellow et al. 2014 (MLP), Mirza & Osindero 2014 (conditional GAN), Radford et al. 2016 (DCGAN), Odena et al. 2017
(auxiliary classifier), Miyato et al. 2018 (spectral normalisation), Miyato & Koyama 2018 (projection).

All share one interface: generators have z_dim, c_dim, img_resolution and img_channels and map (z, c) to images in
[-1, 1]; discriminators map (images, c) to logits [B, 1]. A condition c is a class, as int64 [B] or one-hot [B, c_dim];
without classes (c_dim 0) it is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

CONDITIONINGS = ("concat", "projection", "auxiliary")
NORMS = ("batch", "instance", "layer", "spectral", "none")
SLOPE = 0.2


class ClassEmbedding(nn.Embedding):
    """Classes as int64 [B] or one-hot [B, c_dim] -> [B, embedding_dim].

    Raises:
        ValueError: no classes given, or of another shape.
    """

    def forward(self, c: Tensor | None) -> Tensor:
        if c is None or c.ndim not in (1, 2) or (c.ndim == 2 and c.shape[1] != self.num_embeddings):
            got = None if c is None else list(c.shape)
            raise ValueError(f"c: got {got}, expected classes [B] or one-hot [B, {self.num_embeddings}]")
        return super().forward(c) if c.ndim == 1 else c.to(self.weight.dtype) @ self.weight


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalisation with gain and bias per class (de Vries et al. 2017); [B, C, H, W], c -> [B, C, H, W]."""

    def __init__(self, channels: int, c_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = ClassEmbedding(c_dim, channels), ClassEmbedding(c_dim, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        return torch.addcmul(self.bias(c)[:, :, None, None], self.norm(x), self.gain(c)[:, :, None, None])


def _power_of_two_steps(img_resolution: int) -> int:
    """Doublings from 4x4 to the image."""
    if img_resolution < 8 or img_resolution & (img_resolution - 1):
        raise ValueError(f"img_resolution: got {img_resolution}, expected a power of two, at least 8")
    return img_resolution.bit_length() - 3


def _choice(name: str, got: str, options: Sequence[str]) -> str:
    if got not in options:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(options)}")
    return got


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for the gains of batch normalisation (DCGAN, section 4)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)


# --- multilayer perceptrons -------------------------------------------------------------------------------------------


class MLPGenerator(nn.Module):
    """Linear layers, the class concatenated to z as a learned vector.

    Args:
        hidden: sizes of the hidden layers; all but the first are batch-normalised.
        c_dim: number of classes; 0 for none.
        embed_dim: size of a class's vector; None for c_dim.
    """

    def __init__(
        self,
        z_dim: int = 100,
        img_resolution: int = 28,
        img_channels: int = 1,
        c_dim: int = 0,
        hidden: Sequence[int] = (128, 256, 512, 1024),
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = z_dim, c_dim, img_resolution, img_channels
        embed_dim = (embed_dim or c_dim) if c_dim else 0
        self.embed = ClassEmbedding(c_dim, embed_dim) if c_dim else None
        layers: list[nn.Module] = []
        sizes = [z_dim + embed_dim, *hidden]
        for i in range(len(hidden)):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            layers += [nn.BatchNorm1d(sizes[i + 1])] if i else []
            layers.append(nn.LeakyReLU(SLOPE))
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], img_channels * img_resolution**2), nn.Tanh())

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """[B, z_dim], c -> [B, img_channels, H, W] in [-1, 1]."""
        x = z if self.embed is None else torch.cat([z, self.embed(c)], 1)
        return self.net(x).view(-1, self.img_channels, self.img_resolution, self.img_resolution)


class MLPDiscriminator(nn.Module):
    """Linear layers, the class concatenated to the pixels as a learned vector.

    Args:
        hidden: sizes of the hidden layers.
        c_dim, embed_dim: as in `MLPGenerator`.
        dropout: of hidden features.
        spectral: divide every weight by its largest singular value.
    """

    def __init__(
        self,
        img_resolution: int = 28,
        img_channels: int = 1,
        c_dim: int = 0,
        hidden: Sequence[int] = (512, 256),
        embed_dim: int | None = None,
        dropout: float = 0.0,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        embed_dim = (embed_dim or c_dim) if c_dim else 0
        self.embed = ClassEmbedding(c_dim, embed_dim) if c_dim else None
        sizes = [img_channels * img_resolution**2 + embed_dim, *hidden]
        layers: list[nn.Module] = []
        for i in range(len(hidden)):
            layers += [_linear(sizes[i], sizes[i + 1], spectral), nn.LeakyReLU(SLOPE)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.net = nn.Sequential(*layers, _linear(sizes[-1], 1, spectral))

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """[B, img_channels, H, W], c -> logits [B, 1]."""
        x = img.flatten(1)
        return self.net(x if self.embed is None else torch.cat([x, self.embed(c)], 1))


def _linear(into: int, out: int, spectral: bool) -> nn.Module:
    layer = nn.Linear(into, out)
    return spectral_norm(layer) if spectral else layer


# --- DCGAN ------------------------------------------------------------------------------------------------------------


class DCGANGenerator(nn.Module):
    """z -> 4x4 features -> transposed convolutions, each doubling the size and halving the channels -> tanh.

    Args:
        img_resolution: a power of two, at least 8.
        channels: before the last layer.
        max_channels: largest number of channels.
        c_dim: number of classes; 0 for none.
        conditioning: "concat" appends a learned vector to z, "batchnorm" learns gains and biases per class.
        embed_dim: size of that vector; None for c_dim.
    """

    def __init__(
        self,
        z_dim: int = 100,
        img_resolution: int = 32,
        img_channels: int = 3,
        channels: int = 64,
        max_channels: int = 512,
        c_dim: int = 0,
        conditioning: str = "concat",
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        steps = _power_of_two_steps(img_resolution)
        _choice("conditioning", conditioning, ("concat", "batchnorm"))
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = z_dim, c_dim, img_resolution, img_channels
        embed_dim = (embed_dim or c_dim) if c_dim and conditioning == "concat" else 0
        self.embed = ClassEmbedding(c_dim, embed_dim) if embed_dim else None
        sizes = [min(channels * 2 ** (steps - 1 - i), max_channels) for i in range(steps)]
        per_class = c_dim if c_dim and conditioning == "batchnorm" else 0
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.convs.append(nn.ConvTranspose2d(z_dim + embed_dim, sizes[0], 4, bias=False))
        for i in range(steps - 1):
            self.convs.append(nn.ConvTranspose2d(sizes[i], sizes[i + 1], 4, stride=2, padding=1, bias=False))
        for size in sizes:
            self.norms.append(ConditionalBatchNorm2d(size, per_class) if per_class else nn.BatchNorm2d(size))
        self.out = nn.ConvTranspose2d(sizes[-1], img_channels, 4, stride=2, padding=1)
        self.apply(init_weights)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """[B, z_dim], c -> [B, img_channels, H, W] in [-1, 1]."""
        x = z if self.embed is None else torch.cat([z, self.embed(c)], 1)
        x = x[:, :, None, None].contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            x = F.relu(norm(x, c) if isinstance(norm, ConditionalBatchNorm2d) else norm(x))
        return torch.tanh(self.out(x))


class DCGANDiscriminator(nn.Module):
    """Strided convolutions with leaky ReLUs down to 4x4, then a linear layer.

    Args:
        img_resolution: a power of two, at least 8.
        channels: after the first layer; they double as the size halves.
        max_channels: largest number of channels.
        c_dim: number of classes; 0 for none.
        conditioning: "concat" adds the class as a learned plane of the image, "projection" adds the inner product of
            features and a learned vector per class to the logit, "auxiliary" has `with_classes` classify as well.
        norm: "batch" as in the paper; "layer", "instance" or "none" for gradient penalties, which batch statistics
            would couple across images; "spectral" divides every weight by its largest singular value.
        dropout: of features.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        img_channels: int = 3,
        channels: int = 64,
        max_channels: int = 512,
        c_dim: int = 0,
        conditioning: str = "concat",
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        steps = _power_of_two_steps(img_resolution)
        _choice("norm", norm, NORMS)
        self.conditioning = _choice("conditioning", conditioning, CONDITIONINGS) if c_dim else None
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        planes = img_channels + (self.conditioning == "concat")
        sizes = [planes, *(min(channels * 2**i, max_channels) for i in range(steps))]
        layers: list[nn.Module] = []
        for i in range(steps):
            layers += self._layer(sizes[i], sizes[i + 1], "none" if i == 0 and norm != "spectral" else norm)
            layers += [nn.Dropout2d(dropout)] if dropout else []
        self.features = nn.Sequential(*layers)
        spectral = norm == "spectral"
        self.out = _linear(sizes[-1] * 16, 1, spectral)
        if self.conditioning == "concat":
            self.embed = ClassEmbedding(c_dim, img_resolution**2)
        elif self.conditioning == "projection":
            embed = ClassEmbedding(c_dim, sizes[-1])
            self.embed = spectral_norm(embed) if spectral else embed
        elif self.conditioning == "auxiliary":
            self.classes = _linear(sizes[-1] * 16, c_dim, spectral)
        self.features.apply(init_weights)

    @staticmethod
    def _layer(into: int, out: int, norm: str) -> list[nn.Module]:
        conv = nn.Conv2d(into, out, 4, stride=2, padding=1, bias=norm in ("none", "spectral"))
        norms = {
            "batch": lambda: nn.BatchNorm2d(out),
            "instance": lambda: nn.InstanceNorm2d(out, affine=True),
            "layer": lambda: nn.GroupNorm(1, out),
        }
        if norm == "spectral":
            conv = spectral_norm(conv)
        return [conv, *([norms[norm]()] if norm in norms else []), nn.LeakyReLU(SLOPE)]

    def _features(self, img: Tensor, c: Tensor | None) -> Tensor:
        if self.conditioning == "concat":
            img = torch.cat([img, self.embed(c).view(-1, 1, *img.shape[2:])], 1)
        return self.features(img.contiguous(memory_format=torch.channels_last))  # [B, C, 4, 4]

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """[B, img_channels, H, W], c -> logits [B, 1]."""
        h = self._features(img, c)
        logits = self.out(h.flatten(1))
        if self.conditioning == "projection":
            # equation 3 of the projection paper; the scale is that of the logit's own fan-in
            logits = logits + (self.embed(c) * h.sum((2, 3))).sum(1, keepdim=True) / math.sqrt(h.shape[1])
        return logits

    def with_classes(self, img: Tensor) -> tuple[Tensor, Tensor]:
        """[B, img_channels, H, W] -> logits [B, 1] and class logits [B, c_dim], of an auxiliary classifier.

        Raises:
            ValueError: a discriminator without one.
        """
        if self.conditioning != "auxiliary":
            raise ValueError(f"with_classes: got conditioning {self.conditioning!r}, expected 'auxiliary'")
        h = self._features(img, None).flatten(1)
        return self.out(h), self.classes(h)
