"""From the bytes of a picture file to a uint8 array of the wanted size and channel count."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.util import UserError

EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy"}
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "area": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# What decoders raise for a file that is no picture, or a broken one.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
SMALL_FILE = 32768  # bytes; below, opening costs more than decoding
ORIENTATION = 0x0112  # EXIF tag


def resample(name: str) -> Image.Resampling:
    """The PIL filter of that name."""
    if name not in FILTERS:
        raise UserError(f"interpolation must be one of {', '.join(FILTERS)}, got {name!r}")
    return FILTERS[name]


def open_image(data: bytes, channels: int, wanted: tuple[int, int] | None = None) -> Image.Image:
    """Any picture file -> PIL image of mode L or RGB, upright, transparency over white.

    Args:
        data: the file.
        channels: 1 -> L, 3 -> RGB.
        wanted: (height, width) that the picture will be scaled down to; a JPEG is then decoded at a reduced scale of
            at least twice that, which is much faster.

    Raises:
        one of UNREADABLE.
    """
    if bytes(data[:6]) == b"\x93NUMPY":
        return _from_numpy(np.load(io.BytesIO(data), allow_pickle=False), channels)
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as e:  # its message names a place in memory
        raise ValueError("no picture of a known format" if data else "the file is empty") from e
    if image.format == "JPEG":
        if wanted is not None:
            image.draft("L" if channels == 1 else None, (2 * max(wanted), 2 * max(wanted)))
        turned = "exif" in image.info
    else:
        turned = image.getexif().get(ORIENTATION, 1) != 1
    if turned:
        image = ImageOps.exif_transpose(image)
    return flatten(image, channels)


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL mode -> L or RGB: 16-bit and float to 8 bits, palettes resolved, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_8bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        if mode == "L" and image.mode not in ("RGB", "1"):
            image = image.convert("RGB")
        image = image.convert(mode)
    image.load()
    return image


def _deep_to_8bit(image: Image.Image) -> Image.Image:
    """Modes I;16 (65535 = white), I (the same unless all values fit 8 bits) and F (1.0 or 255 = white) -> L."""
    x = np.asarray(image).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the image holds NaN or infinity")
    top = 1.0 if image.mode == "F" and x.max(initial=0) <= 1 else 255.0
    if image.mode.startswith("I;16") or (image.mode == "I" and x.max(initial=0) > 255):
        top = 65535.0
    return Image.fromarray(np.clip(np.rint(x * (255.0 / top)), 0, 255).astype(np.uint8))


def _from_numpy(x: np.ndarray, channels: int) -> Image.Image:
    """A uint8 array [H, W], [H, W, C], [C, H, W] or with a leading 1 (taming's CelebA-HQ files)."""
    while x.ndim > 2 and x.shape[0] == 1:
        x = x[0]
    if x.ndim == 3 and x.shape[0] == 3 and x.shape[2] != 3:
        x = x.transpose(1, 2, 0)
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] not in (1, 3, 4)):
        raise ValueError(f"a .npy image must be uint8 [H, W], [H, W, C] or [C, H, W], got {x.dtype} {x.shape}")
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    return flatten(Image.fromarray(np.ascontiguousarray(x)), channels)


def decode_small_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """A plain small JPEG -> uint8 [H, W, C], at a third of PIL's cost; None for anything that needs PIL."""
    if len(data) > SMALL_FILE or bytes(data[:3]) != b"\xff\xd8\xff":
        return None
    data = bytearray(data)
    if b"Exif" in data or b"Adobe" in data:  # orientation, CMYK
        return None
    decode = _jpeg_decoder()
    if decode is None:
        return None
    try:
        return decode(torch.frombuffer(data, dtype=torch.uint8), channels).permute(1, 2, 0).numpy()
    except RuntimeError:
        return None  # PIL has the last word, and the better message


@functools.lru_cache(maxsize=1)
def _jpeg_decoder() -> Callable[[Tensor, int], Tensor] | None:
    """torchvision's libjpeg operator (input, channels) -> [C, H, W]; None in a torchvision built without it."""
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None


@dataclass(frozen=True)
class Fit:
    """How a picture becomes an array of one size.

    Attributes:
        size: (height, width) of the result; None keeps the picture's own.
        channels: 1 or 3.
        mode: `crop` (shorter side to the size, then cut) or `pad` (longer side to the size, then white bars).
        random: cut at a random place instead of the centre.
        interpolation: a name of FILTERS.
        resize_to: scale to this (height, width) first, and cut `size` out of that (taming's size + crop_size).
    """

    size: tuple[int, int] | None
    channels: int = 3
    mode: str = "crop"
    random: bool = False
    interpolation: str = "bicubic"
    resize_to: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        resample(self.interpolation)
        if self.mode not in ("crop", "pad"):
            raise UserError(f"fit must be crop or pad, got {self.mode!r}")
        if self.size and self.resize_to and (self.resize_to[0] < self.size[0] or self.resize_to[1] < self.size[1]):
            raise UserError(f"cannot crop {list(self.size)} out of images scaled to {list(self.resize_to)}")

    @property
    def fixed_shape(self) -> bool:
        """Whether every picture gives the same array each time, so that it can be kept ready-made."""
        return self.size is not None and not self.random

    def __call__(self, data: bytes, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Picture file -> uint8 [h, w, channels]; (y, x) in [0, 1) place the cut when it is random."""
        return self.cut(self.scaled(data), y, x)

    def decoded(self, data: bytes) -> Image.Image | np.ndarray:
        small = decode_small_jpeg(data, self.channels)
        return open_image(data, self.channels, self.resize_to or self.size) if small is None else small

    def scaled(self, data: bytes) -> np.ndarray:
        """The picture scaled but not yet cut where the cut is random; otherwise the final array."""
        image = self.decoded(data)
        target = self.resize_to or self.size
        h, w = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        if target is None or (h, w) == target:
            return as_array(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        if self.mode == "pad":
            image = ImageOps.pad(image, target[::-1], resample(self.interpolation), color=_white(image))
        elif self.random:
            scale = max(target[0] / h, target[1] / w)
            new = (max(target[1], round(w * scale)), max(target[0], round(h * scale)))
            image = image.resize(new, resample(self.interpolation), reducing_gap=3.0)
        else:
            image = resize_centre(image, target, self.interpolation)
        return as_array(image)

    def cut(self, array: np.ndarray, y: float = 0.5, x: float = 0.5) -> np.ndarray:
        """Cuts `size` out of a scaled array, at (y, x) if random, else in the centre."""
        if self.size is None or array.shape[:2] == self.size:
            return array
        if not self.random:
            y = x = 0.5
        room = array.shape[0] - self.size[0], array.shape[1] - self.size[1]
        top, left = (min(int(u * (r + 1)), r) if self.random else r // 2 for u, r in zip((y, x), room, strict=True))
        return array[top : top + self.size[0], left : left + self.size[1]]


def resize_centre(image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic") -> Image.Image:
    """Scales so that the picture covers (height, width) and cuts the centre, in one pass."""
    h, w = size
    scale = min(image.height / h, image.width / w)
    ch, cw = h * scale, w * scale
    top, left = (image.height - ch) / 2, (image.width - cw) / 2
    box = (left, top, left + cw, top + ch)
    return image.resize((w, h), resample(interpolation), box=box, reducing_gap=3.0)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] of a picture of mode L or RGB."""
    x = np.asarray(image)
    return x[..., None] if x.ndim == 2 else x


def _white(image: Image.Image) -> int | tuple[int, int, int]:
    return 255 if image.mode == "L" else (255, 255, 255)
