"""Low-resolution inputs for super-resolution training: one resize, or the BSRGAN chain of random faults.

Zhang et al., "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution" (ICCV 2021), section 3:
blur, downsampling, noise and JPEG in random order. The camera-pipeline step of the paper is left out.
Images are arrays [H, W, C]; every random number comes from the generator that is passed in.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ldm.data.pixels import FILTERS, as_array

# --- plain resizing ---------------------------------------------------------------------------------------------------


def _linear(d: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(d), 0, None)


def _cubic(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    d = np.abs(d)
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


def _lanczos4(d: np.ndarray) -> np.ndarray:
    return np.where(np.abs(d) < 4, np.sinc(d) * np.sinc(d / 4), 0.0)


# kernel and number of taps; as in OpenCV the kernel is not widened when shrinking, so that they alias
_KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_linear, 2),
    "bicubic": (_cubic, 4),
    "lanczos": (_lanczos4, 8),
}


def _weights(n_in: int, n_out: int, name: str) -> np.ndarray:
    """The [n_out, n_in] matrix that resamples one axis."""
    w = np.zeros((n_out, n_in))
    if name == "area":
        edges = np.arange(n_out + 1) * (n_in / n_out)
        pixels = np.arange(n_in)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return np.clip(overlap, 0, None) * (n_out / n_in)
    if name == "nearest":
        w[np.arange(n_out), np.minimum((np.arange(n_out) * (n_in / n_out)).astype(int), n_in - 1)] = 1
        return w
    kernel, taps = _KERNELS[name]
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    at = np.floor(centre).astype(int)[:, None] + np.arange(taps) - (taps // 2 - 1)
    value = kernel(centre[:, None] - at)
    np.add.at(w, (np.arange(n_out)[:, None], np.clip(at, 0, n_in - 1)), value / value.sum(1, keepdims=True))
    return w


def resize_cv(image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Resizes [H, W, C] to [h, w, C] by OpenCV's rules: nearest, bilinear, bicubic, area or lanczos."""
    rows, columns = _weights(image.shape[0], size[0], name), _weights(image.shape[1], size[1], name)
    out = np.einsum("hH,HWC,wW->hwC", rows, image.astype(np.float64), columns, optimize=True)
    return _as_uint8(out) if image.dtype == np.uint8 else out.astype(image.dtype)


def resize_pil(image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Resizes uint8 [H, W, C] to [h, w, C] by PIL (antialiased): nearest, bilinear, bicubic, box, hamming, lanczos."""
    return as_array(_to_pil(image).resize(size[::-1], FILTERS[name]))


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _as_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


# --- the BSRGAN chain -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """Ranges of the random faults; `blur` and `noise` are largest values, `quality` is JPEG's."""

    blur: float  # share of the paper's kernel widths
    noise: float  # standard deviation, of 255
    quality: tuple[int, int]
    jpeg_twice: float  # probability of an earlier JPEG pass


FULL = Strength(blur=1.0, noise=25.0, quality=(30, 95), jpeg_twice=0.75)
LIGHT = Strength(blur=0.25, noise=2.0, quality=(80, 95), jpeg_twice=0.5)


def gaussian_kernel(size: int, variances: tuple[float, float], angle: float) -> np.ndarray:
    """A [size, size] Gaussian whose covariance has these eigenvalues, turned by `angle`; sums to 1."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s], [s, c]])
    precision = turn @ np.diag(1 / np.asarray(variances)) @ turn.T
    r = np.arange(size) - (size - 1) / 2
    grid = np.stack(np.meshgrid(r, r), -1)
    kernel = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", grid, precision, grid))
    return kernel / kernel.sum()


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[H, W, C] filtered by an odd kernel, borders mirrored."""
    pad = kernel.shape[0] // 2
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[:, None].float()
    x = torch.nn.functional.pad(x, (pad,) * 4, mode="reflect")
    y = torch.nn.functional.conv2d(x, torch.from_numpy(kernel).float()[None, None])
    return y[:, 0].numpy().transpose(1, 2, 0)


def _kernel_size(image: np.ndarray, rng: np.random.Generator) -> int:
    largest = 2 * min(image.shape[:2]) - 1  # a mirrored border cannot be wider than the image
    return int(min(2 * rng.integers(3, 11) + 1, largest))


def blur_isotropic(x: np.ndarray, rng: np.random.Generator, factor: int, strength: Strength) -> np.ndarray:
    """Width uniform in [0.1, 2.4] for x2, [0.1, 2.8] for x4."""
    width = rng.uniform(0.1, max(0.2, strength.blur * (2.4 if factor <= 2 else 2.8)))
    return convolve(x, gaussian_kernel(_kernel_size(x, rng), (width**2, width**2), 0.0))


def blur_anisotropic(x: np.ndarray, rng: np.random.Generator, factor: int, strength: Strength) -> np.ndarray:
    """Axes uniform in [0.5, 6] for x2, [0.5, 8] for x4; any direction."""
    a, b = rng.uniform(0.5, max(0.6, strength.blur * (6.0 if factor <= 2 else 8.0)), 2)
    return convolve(x, gaussian_kernel(_kernel_size(x, rng), (a, b), rng.uniform(0, np.pi)))


def add_noise(x: np.ndarray, rng: np.random.Generator, factor: int, strength: Strength) -> np.ndarray:
    """Gaussian noise: independent by channel (40 %), grey (40 %), or with a random channel covariance (20 %)."""
    level = rng.uniform(min(1.0, strength.noise), strength.noise)
    kind, channels = rng.random(), x.shape[2]
    if kind < 0.4:
        noise = rng.standard_normal(x.shape)
    elif kind < 0.8 or channels == 1:
        noise = np.repeat(rng.standard_normal((*x.shape[:2], 1)), channels, 2)
    else:
        basis, _ = np.linalg.qr(rng.standard_normal((channels, channels)))
        noise = rng.standard_normal(x.shape) @ (basis * np.sqrt(rng.random(channels)))
    return np.clip(x + level * noise, 0, 255)


def add_jpeg(x: np.ndarray, rng: np.random.Generator, factor: int, strength: Strength) -> np.ndarray:
    """Compression artefacts at a quality uniform in the given range."""
    low, high = strength.quality
    buffer = io.BytesIO()
    _to_pil(_as_uint8(x)).save(buffer, "JPEG", quality=int(rng.integers(low, high + 1)))
    return as_array(Image.open(buffer)).astype(np.float64)


def _downsample(x: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """nearest, bilinear, bicubic, or first to a random size on the way or beyond it; one of the four."""
    way = int(rng.integers(4))
    if way == 3:
        part = rng.uniform(0.5, max(0.5, x.shape[0] / size[0]))
        middle = (max(1, round(size[0] * part)), max(1, round(size[1] * part)))
        x = resize_cv(x, middle, "bilinear" if rng.random() < 0.5 else "bicubic")
        way = int(rng.integers(1, 3))
    return np.clip(resize_cv(x, size, ("nearest", "bilinear", "bicubic")[way]), 0, 255)


def _bsrgan(image: np.ndarray, sf: int, rng: np.random.Generator | None, strength: Strength) -> np.ndarray:
    rng = np.random.default_rng() if rng is None else rng
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"got {image.dtype} {image.shape}, expected a uint8 image [H, W, C]")
    size = (image.shape[0] // sf, image.shape[1] // sf)
    if min(size) < 1:
        raise ValueError(f"got an image of {image.shape[:2]}, too small to shrink by {sf}")
    x = image.astype(np.float64)
    if sf == 4 and rng.random() < 0.25:  # section 3.2: a quarter of the x4 images start with a clean x2
        x = resize_cv(x, (image.shape[0] // 2, image.shape[1] // 2), "bilinear" if rng.random() < 0.5 else "bicubic")
    steps = ["iso", "aniso", "down", "noise"] + ["jpeg"] * (rng.random() < strength.jpeg_twice)
    faults = {"iso": blur_isotropic, "aniso": blur_anisotropic, "noise": add_noise, "jpeg": add_jpeg}
    for step in rng.permutation(steps):
        x = _downsample(x, size, rng) if step == "down" else faults[step](x, rng, sf, strength)
    return _as_uint8(add_jpeg(x, rng, sf, strength))


def bsrgan(image: np.ndarray, sf: int = 4, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H // sf, W // sf, C], degraded as the paper says.

    Raises:
        ValueError: not a uint8 image, or smaller than `sf` pixels.
    """
    return _bsrgan(image, sf, rng, FULL)


def bsrgan_light(image: np.ndarray, sf: int = 4, rng: np.random.Generator | None = None) -> np.ndarray:
    """As `bsrgan` with weak blur, weak noise and mild JPEG: the inputs of the official x4 model."""
    return _bsrgan(image, sf, rng, LIGHT)


# --- by name ----------------------------------------------------------------------------------------------------------

CV = ("nearest", "bilinear", "bicubic", "area", "lanczos")
PIL = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
DEGRADATIONS = ("bsrgan", "bsrgan_light", *(f"cv_{n}" for n in CV), *(f"pil_{n}" for n in PIL))


def degrade(image: np.ndarray, name: str, factor: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H // factor, W // factor, C] by the named degradation.

    Raises:
        ValueError: unknown name.
    """
    if name not in DEGRADATIONS:
        raise ValueError(f"degradation must be one of {', '.join(DEGRADATIONS)}, got {name!r}")
    if name.startswith("bsrgan"):
        return (bsrgan if name == "bsrgan" else bsrgan_light)(image, factor, rng)
    size = (image.shape[0] // factor, image.shape[1] // factor)
    library, _, method = name.partition("_")
    return resize_cv(image, size, method) if library == "cv" else resize_pil(image, size, method)
