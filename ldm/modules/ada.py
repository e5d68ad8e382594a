"""Augmentation of what a discriminator sees: ADA's pipe with adaptive strength, and DiffAugment.

Karras et al. 2020, "Training generative adversarial networks with limited data" (ADA), section 3 and appendix B;
Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training" (DiffAugment). Everything can be
differentiated twice with respect to the images, so that gradients for the generator and R1 pass through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.ada_ops import reflect_pad, shift, warp
from ldm.modules.stylegan2_ops import setup_filter

# low-pass filters of Daubechies' least-asymmetric wavelets (symlets)
SYM2 = (-0.12940952255126037, 0.2241438680420134, 0.8365163037378079, 0.48296291314453416)
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_BLIT = dict(xflip=1, rotate90=1, xint=1)
_GEOM = dict(scale=1, rotate=1, aniso=1, xfrac=1)
_COLOR = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
# name -> arguments of AugmentPipe (ADA, appendix D.2); "bgc" is the default of the paper
PRESETS: dict[str, dict[str, float]] = {
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": dict(imgfilter=1),
    "noise": dict(noise=1),
    "cutout": dict(cutout=1),
    "bg": {**_BLIT, **_GEOM},
    "bgc": {**_BLIT, **_GEOM, **_COLOR},
    "bgcf": {**_BLIT, **_GEOM, **_COLOR, "imgfilter": 1},
    "bgcfn": {**_BLIT, **_GEOM, **_COLOR, "imgfilter": 1, "noise": 1},
    "bgcfnc": {**_BLIT, **_GEOM, **_COLOR, "imgfilter": 1, "noise": 1, "cutout": 1},
}
# expected power of natural images in the four bands of the image filter
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)


def band_filters() -> Tensor:
    """Four zero-phase filters [4, 43] that sum to the identity; they pass [0, pi/8], [pi/8, pi/4], [pi/4, pi/2] and
    [pi/2, pi] (ADA, appendix B.3).

    From P(z) = H(z) H(1/z) / 2 of the sym2 filter: P_lo + P_hi = 1, and a band is a product of P at z, z^2 and z^4.
    """
    lo = torch.tensor(SYM2, dtype=torch.float64)
    hi = lo.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    p_lo, p_hi = (_convolve(h, h.flip(0)) / 2 for h in (lo, hi))
    bands, below = [], torch.ones(1, dtype=torch.float64)
    for spread in (1, 2, 4):
        bands.append(_convolve(below, _spread(p_hi, spread)))
        below = _convolve(below, _spread(p_lo, spread))
    bands.append(below)
    size = below.numel()
    padded = [F.pad(b, [(size - b.numel()) // 2] * 2) for b in bands]
    return torch.stack(padded[::-1]).float()


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(F.pad(a, [b.numel() - 1] * 2)[None, None], b.flip(0)[None, None])[0, 0]


def _spread(f: Tensor, factor: int) -> Tensor:
    out = f.new_zeros((f.numel() - 1) * factor + 1)
    out[::factor] = f
    return out


class AugmentPipe(nn.Module):
    """Random transformations, each applied to an image with probability p times its own multiplier (0: never).

    Args:
        xflip, rotate90, xint: flips, quarter turns, translations by whole pixels; xint_max: of the size.
        scale, rotate, aniso, xfrac: scaling, rotation, stretching, translation by fractions of pixels.
        scale_std, aniso_std: of the base-2 logarithm; rotate_max: 1 for half a turn; xfrac_std: of the size.
        brightness, contrast, lumaflip, hue, saturation: of the colours.
        brightness_std; contrast_std, saturation_std: of the base-2 logarithm; hue_max: 1 for half a turn.
        imgfilter: amplifies frequency bands; imgfilter_bands: multiplier of each, from low to high; imgfilter_std.
        noise, noise_std: additive noise per pixel.
        cutout, cutout_size: a grey square; size 0.5 for half the image.
        p: overall probability; a buffer, usually steered by `AdaptiveAugment`.

    Raises:
        ValueError: a negative multiplier, or imgfilter_bands that are not four.
    """

    def __init__(
        self,
        xflip: float = 0,
        rotate90: float = 0,
        xint: float = 0,
        xint_max: float = 0.125,
        scale: float = 0,
        rotate: float = 0,
        aniso: float = 0,
        xfrac: float = 0,
        scale_std: float = 0.2,
        rotate_max: float = 1,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
        imgfilter: float = 0,
        imgfilter_bands: Sequence[float] = (1, 1, 1, 1),
        imgfilter_std: float = 1,
        noise: float = 0,
        cutout: float = 0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        if len(imgfilter_bands) != 4:
            raise ValueError(f"imgfilter_bands: got {len(imgfilter_bands)} numbers, expected 4")
        self.xflip, self.rotate90, self.xint, self.xint_max = xflip, rotate90, xint, xint_max
        self.scale, self.rotate, self.aniso, self.xfrac = scale, rotate, aniso, xfrac
        self.scale_std, self.rotate_max, self.aniso_std, self.xfrac_std = scale_std, rotate_max, aniso_std, xfrac_std
        self.brightness, self.contrast, self.lumaflip = brightness, contrast, lumaflip
        self.hue, self.saturation = hue, saturation
        self.brightness_std, self.contrast_std = brightness_std, contrast_std
        self.hue_max, self.saturation_std = hue_max, saturation_std
        self.imgfilter, self.imgfilter_bands, self.imgfilter_std = imgfilter, tuple(imgfilter_bands), imgfilter_std
        self.noise, self.noise_std, self.cutout, self.cutout_size = noise, noise_std, cutout, cutout_size
        for name in PRESETS["bgcfnc"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("Hz_geom", setup_filter(SYM6))
        self.register_buffer("Hz_fbank", band_filters())

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> the same shape, not clamped; C is 1 or 3 where colours change.

        Args:
            generator: on the images' device; None for the global one.

        Raises:
            ValueError: images that are not four-dimensional; colour changes of other than 1 or 3 channels.
        """
        if images.ndim != 4:
            raise ValueError(f"images: got {images.ndim} dimensions, expected [B, C, H, W]")
        if images.device.type == "cpu" and float(self.p) == 0:  # costs a wait on other devices
            return images
        draw = _Draw(images, self.p, generator)
        images = self._blit(images, draw)
        images = self._geometry(images, draw)
        images = self._colors(images, draw)
        images = self._filter(images, draw)
        return self._corrupt(images, draw)

    def _blit(self, images: Tensor, draw: _Draw) -> Tensor:
        """Transformations that only move pixels (appendix B.1)."""
        if self.xflip > 0:
            flip = draw.gate(draw.integers(2), self.xflip, 0)
            images = torch.where(flip.view(-1, 1, 1, 1) == 1, images.flip(3), images)
        if self.rotate90 > 0:
            if images.shape[2] != images.shape[3]:
                raise ValueError(f"rotate90: got {images.shape[2]}x{images.shape[3]} images, expected square ones")
            turns = draw.gate(draw.integers(4), self.rotate90, 0).view(-1, 1, 1, 1)
            half = torch.where(turns >= 2, images.flip((2, 3)), images)
            images = torch.where(turns % 2 == 1, half.rot90(1, (2, 3)), half)
        if self.xint > 0:
            size = torch.tensor(images.shape[:1:-1], device=images.device)
            share = (draw.uniform(2) * 2 - 1) * self.xint_max
            images = shift(images, draw.gate((share * size).round(), self.xint, 0).long(), reflect_borders=True)
        return images

    def _geometry(self, images: Tensor, draw: _Draw) -> Tensor:
        """One affine warp for all of them (appendix B.1); matrices take output pixels to input pixels."""
        if not any((self.scale, self.rotate, self.aniso, self.xfrac)):
            return images
        m = draw.eye(3)
        if self.scale > 0:
            s = draw.gate(torch.exp2(draw.normal(1) * self.scale_std), self.scale, 1)
            m = m @ draw.diagonal([1 / s[:, 0], 1 / s[:, 0], 1])
        # before and after stretching; the chance of either is p
        p_rotate = 1 - (1 - (self.rotate * draw.p).clamp(0, 1)).sqrt()
        if self.rotate > 0:
            m = m @ draw.rotation(self.rotate_max, p_rotate)
        if self.aniso > 0:
            s = draw.gate(torch.exp2(draw.normal(1) * self.aniso_std), self.aniso, 1)
            m = m @ draw.diagonal([1 / s[:, 0], s[:, 0], 1])
        if self.rotate > 0:
            m = m @ draw.rotation(self.rotate_max, p_rotate)
        if self.xfrac > 0:
            size = torch.tensor(images.shape[:1:-1], device=images.device)
            t = draw.gate(draw.normal(2) * self.xfrac_std * size, self.xfrac, 0)
            m = m @ draw.translation(-t)
        return warp(images, m, self.Hz_geom)

    def _colors(self, images: Tensor, draw: _Draw) -> Tensor:
        """One affine map of the colours for all of them (appendix B.2)."""
        if not any((self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)):
            return images
        b, channels, h, w = images.shape
        if channels not in (1, 3):
            raise ValueError(f"colour augmentation: got {channels} channels, expected 1 or 3")
        m = self._color_matrices(draw)  # [B, 4, 4]
        if channels == 1:  # a grey image stays grey: the mean of what its three equal channels would become
            m = m[:, :3].mean(1)
            return images * m[:, :3].sum(1).view(-1, 1, 1, 1) + m[:, 3].view(-1, 1, 1, 1)
        flat = torch.baddbmm(m[:, :3, 3:].to(images.dtype), m[:, :3, :3].to(images.dtype), images.reshape(b, 3, h * w))
        return flat.view(b, 3, h, w)

    def _color_matrices(self, draw: _Draw) -> Tensor:
        m = draw.eye(4)
        axis = draw.grey_axis()  # [4, 1], unit length
        along = axis @ axis.t()
        if self.brightness > 0:
            t = draw.gate(draw.normal(1) * self.brightness_std, self.brightness, 0)
            m = draw.translation(t.expand(-1, 3)) @ m
        if self.contrast > 0:
            s = draw.gate(torch.exp2(draw.normal(1) * self.contrast_std), self.contrast, 1)[:, 0]
            m = draw.diagonal([s, s, s, 1]) @ m
        if self.lumaflip > 0:
            flip = draw.gate(draw.integers(2), self.lumaflip, 0).view(-1, 1, 1)
            m = (torch.eye(4, device=m.device) - 2 * along * flip) @ m
        if self.hue > 0:
            angle = draw.gate((draw.uniform(1) * 2 - 1) * math.pi * self.hue_max, self.hue, 0)
            m = draw.rotation_about_grey(angle[:, 0]) @ m
        if self.saturation > 0:
            s = draw.gate(torch.exp2(draw.normal(1) * self.saturation_std), self.saturation, 1).view(-1, 1, 1)
            m = (along + (torch.eye(4, device=m.device) - along) * s) @ m
        return m

    def _filter(self, images: Tensor, draw: _Draw) -> Tensor:
        """Amplify or weaken frequency bands, total power expected to stay (appendix B.3)."""
        if self.imgfilter == 0:
            return images
        b, c, h, w = images.shape
        power = torch.tensor(BAND_POWER, device=images.device)
        gains = torch.ones(b, 4, device=images.device)
        for i, multiplier in enumerate(self.imgfilter_bands):
            t = torch.ones_like(gains)
            t[:, i] = draw.gate(torch.exp2(draw.normal(1) * self.imgfilter_std), self.imgfilter * multiplier, 1)[:, 0]
            gains = gains * t / (power * t.square()).sum(1, keepdim=True).sqrt()
        taps = (gains @ self.Hz_fbank.to(gains.dtype)).to(images.dtype).repeat_interleave(c, 0)  # [B C, 43]
        n = taps.shape[1] // 2
        x = reflect_pad(images, n).reshape(1, b * c, h + 2 * n, w + 2 * n)
        x = F.conv2d(x, taps[:, None, None, :], groups=b * c)
        return F.conv2d(x, taps[:, None, :, None], groups=b * c).view(b, c, h, w)

    def _corrupt(self, images: Tensor, draw: _Draw) -> Tensor:
        """Additive noise and cutout (appendix B.4)."""
        b, _, h, w = images.shape
        if self.noise > 0:
            sigma = draw.gate(draw.normal(1).abs() * self.noise_std, self.noise, 0).view(-1, 1, 1, 1)
            images = images + (draw.like(images) * sigma).to(images.dtype)
        if self.cutout > 0:
            size = draw.gate(torch.full((b, 1), float(self.cutout_size), device=images.device), self.cutout, 0)
            centre = draw.uniform(2)
            images = images * outside_of_box(centre, size.expand(-1, 2), h, w).to(images.dtype)
        return images


def outside_of_box(centre: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """Mask [B, 1, H, W], 0 inside boxes given by centre and size (x, y), [B, 2], in shares of the image."""
    x, y = ((torch.arange(n, device=centre.device) + 0.5) / n for n in (width, height))
    in_x = (x - centre[:, :1]).abs() < size[:, :1] / 2  # [B, W]
    in_y = (y - centre[:, 1:]).abs() < size[:, 1:] / 2
    return 1 - (in_y[:, None, :, None] & in_x[:, None, None, :]).float()


class _Draw:
    """Random numbers and matrices per image, on the images' device."""

    def __init__(self, images: Tensor, p: Tensor, generator: torch.Generator | None) -> None:
        self.batch, self.device, self.p = images.shape[0], images.device, p.to(images.device)
        self.generator = generator

    def uniform(self, n: int) -> Tensor:
        return torch.rand(self.batch, n, device=self.device, generator=self.generator)

    def normal(self, n: int) -> Tensor:
        return torch.randn(self.batch, n, device=self.device, generator=self.generator)

    def like(self, images: Tensor) -> Tensor:
        return torch.randn(images.shape, device=self.device, generator=self.generator)

    def integers(self, below: int) -> Tensor:
        return torch.randint(below, (self.batch, 1), device=self.device, generator=self.generator)

    def gate(self, value: Tensor, multiplier: float | Tensor, neutral: float) -> Tensor:
        """`value` [B, n] for a share p * multiplier of the images, `neutral` for the others."""
        return torch.where(self.uniform(1) < self.p * multiplier, value, torch.full_like(value, neutral))

    def eye(self, n: int) -> Tensor:
        return torch.eye(n, device=self.device).expand(self.batch, n, n)

    def diagonal(self, entries: list[Tensor | float]) -> Tensor:
        ones = torch.ones(self.batch, device=self.device)
        return torch.diag_embed(torch.stack([e * ones for e in entries], 1))

    def translation(self, t: Tensor) -> Tensor:
        """[B, n] -> [B, n + 1, n + 1]."""
        n = t.shape[1]
        return torch.cat([self.eye(n + 1)[:, :, :n], F.pad(t, (0, 1), value=1.0)[:, :, None]], 2)

    def rotation(self, largest: float, probability: Tensor) -> Tensor:
        angle = (self.uniform(1) * 2 - 1) * math.pi * largest
        angle = torch.where(self.uniform(1) < probability, angle, torch.zeros_like(angle))[:, 0]
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
        return torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], 1).view(-1, 3, 3)

    def grey_axis(self) -> Tensor:
        return torch.tensor([1.0, 1.0, 1.0, 0.0], device=self.device)[:, None] / math.sqrt(3)

    def rotation_about_grey(self, angle: Tensor) -> Tensor:
        """Rodrigues' formula: I + sin K + (1 - cos) K^2 with K v = axis x v."""
        k = torch.zeros(4, 4, device=self.device)
        k[:3, :3] = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=self.device) / math.sqrt(3)
        angle = angle.view(-1, 1, 1)
        return torch.eye(4, device=self.device) + angle.sin() * k + (1 - angle.cos()) * (k @ k)


class AdaptiveAugment(nn.Module):
    """`AugmentPipe` whose p follows how sure the discriminator is of real images (ADA, section 3.1).

    r = E sign(D(real)) is above `target` where the discriminator overfits: p grows; below it, p shrinks.

    Args:
        pipe: what to apply; its p starts at 0.
        target: of r.
        interval: steps between adjustments.
        kimg: thousands of images in which p can go from 0 to 1; 500 for new networks, 100 for those that go on.
    """

    def __init__(self, pipe: AugmentPipe, target: float = 0.6, interval: int = 4, kimg: float = 500) -> None:
        super().__init__()
        if interval < 1 or kimg <= 0:
            raise ValueError(f"got interval {interval} and kimg {kimg}, expected at least 1 and above 0")
        self.pipe, self.target, self.interval, self.kimg = pipe, target, interval, kimg
        self.pipe.p.zero_()
        self.register_buffer("signs", torch.zeros(2))  # sum and number since the last adjustment
        self.register_buffer("r", torch.zeros([]))  # for the log
        self.register_buffer("steps", torch.zeros([], dtype=torch.long))
        self._steps: int | None = None  # the same on the host, so that no step waits for the device

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `AugmentPipe.forward`."""
        return self.pipe(images, generator)

    @torch.no_grad()
    def observe(self, real_logits: Tensor) -> None:
        """To be called once per step with D(augmented real images), [B, ...]."""
        self._steps = (int(self.steps) if self._steps is None else self._steps) + 1
        self.steps.add_(1)
        self.signs += torch.stack([real_logits.sign().sum(), torch.full_like(self.r, real_logits.numel())])
        if self._steps % self.interval:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.signs)
        self.r.copy_(self.signs[0] / self.signs[1])
        step = torch.sign(self.r - self.target) * self.signs[1] / (self.kimg * 1000)
        self.pipe.p.copy_((self.pipe.p + step).clamp(0, 1))
        self.signs.zero_()


class DiffAugment(nn.Module):
    """Zhao et al. 2020: the same few strong augmentations of real and generated images, with gradients.

    Args:
        policy: any of color, translation and cutout, separated by commas.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, policy: str = "color,translation,cutout") -> None:
        super().__init__()
        known = {"color": self._color, "translation": self._translation, "cutout": self._cutout}
        names = [name.strip() for name in policy.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise ValueError(f"DiffAugment policy: got {name!r}, expected any of {', '.join(known)}")
        self.names, self._steps = names, [known[name] for name in names]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> the same shape."""
        draw = _Draw(images, torch.ones([]), generator)
        for step in self._steps:
            images = step(images, draw)
        return images

    @staticmethod
    def _color(x: Tensor, draw: _Draw) -> Tensor:
        brightness, saturation, contrast = draw.uniform(3).to(x.dtype)[:, :, None, None, None].unbind(1)
        x = x + (brightness - 0.5)
        x = torch.lerp(x.mean(1, keepdim=True), x, saturation * 2)
        return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)

    @staticmethod
    def _translation(x: Tensor, draw: _Draw) -> Tensor:
        size = torch.tensor(x.shape[:1:-1], device=x.device)
        largest = (size / 8 + 0.5).floor()
        t = (draw.uniform(2) * (2 * largest + 1)).floor() - largest
        return shift(x, t.long(), reflect_borders=False)

    @staticmethod
    def _cutout(x: Tensor, draw: _Draw) -> Tensor:
        half = torch.full((x.shape[0], 2), 0.5, device=x.device)
        return x * outside_of_box(draw.uniform(2), half, x.shape[2], x.shape[3]).to(x.dtype)
