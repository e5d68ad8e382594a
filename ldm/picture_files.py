"""Pictures and masks as files: reading any mode, sizes that a model can take, numbered names, grids."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ldm.generate import save_png
from ldm.util import UserError

Say = Callable[[str], None]  # one line for the user


# --- reading ----------------------------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """The picture, turned the way its EXIF entry says.

    Raises:
        UserError: missing, or no picture.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist: expected a picture") from e
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} cannot be read as a picture ({e})") from e


def eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit and float grey pictures with 8 bits, which Pillow would clip to white instead."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    x = np.asarray(picture, dtype=np.float64)
    if picture.mode.startswith("I"):
        top = 65535 if picture.mode != "I" or x.max() > 255 else 255
    else:
        top = 1 if x.max() <= 1 else 255
    return Image.fromarray((x.clip(0, top) * 255 / top).round().astype(np.uint8))


def read_image(path: str | Path, say: Say) -> tuple[np.ndarray, np.ndarray | None]:
    """(RGB uint8 [H, W, 3], alpha uint8 [H, W] or None); what is transparent is laid on white."""
    picture = eight_bit(open_image(path))
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB")), None
    picture = picture.convert("RGBA")
    alpha = np.asarray(picture)[..., 3]
    if alpha.min() == 255:
        return np.asarray(picture.convert("RGB")), None
    say(f"{path} has an alpha channel: transparent parts are laid on white")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")), alpha


def fitted(picture: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """uint8 [H, W, 3], or bool [H, W], scaled into (height, width) and centred there; `fill` is around it."""
    height, width = size
    scale = min(height / picture.shape[0], width / picture.shape[1])
    inner = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    mask = picture.dtype == bool
    scaled = Image.fromarray(picture).resize(inner, Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS)
    canvas = Image.new(scaled.mode, (width, height), 0 if mask else (fill,) * 3)
    canvas.paste(scaled, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(canvas)


def read_mask(path: str | Path, size: tuple[int, int], say: Say) -> np.ndarray:
    """bool [H, W], true where the mask is white: what is to be painted anew.

    Args:
        size: (width, height) of the picture that it belongs to.

    Raises:
        UserError: another size than the picture's, or nothing to paint.
    """
    picture = eight_bit(open_image(path))
    if picture.size != size:
        raise UserError(
            f"mask {path} is {picture.size[0]}x{picture.size[1]} pixels, the picture {size[0]}x{size[1]}: "
            "they must have the same size"
        )
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA"))
    return threshold(np.asarray(picture.convert("L")), str(path), say)


def threshold(grey: np.ndarray, name: str, say: Say) -> np.ndarray:
    """uint8 [H, W] -> bool: 128 and above is white."""
    between = float(((grey > 8) & (grey < 247)).mean())
    if between > 0.001:
        say(f"mask {name}: {between:.0%} of it is grey; from 50 % brightness on it counts as white")
    mask = grey >= 128
    if not mask.any():
        raise UserError(f"mask {name} has no white pixel: white is painted anew, black is kept")
    return mask


# --- sizes ------------------------------------------------------------------------------------------------------------


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The smallest (height, width) above `size` that `multiple` divides."""
    return (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)


def padded(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, ...] mirrored at its right and lower edge to (height, width)."""
    more = [(0, size[0] - x.shape[0]), (0, size[1] - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, more, mode="symmetric")


# --- writing ----------------------------------------------------------------------------------------------------------


def grid(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """uint8 pictures [H, W, 3] side by side on black; sizes may differ."""
    height, width = max(p.shape[0] for p in pictures) + gap, max(p.shape[1] for p in pictures) + gap
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    page = np.zeros((rows * height + gap, columns * width + gap, 3), np.uint8)
    for i, p in enumerate(pictures):
        top, left = gap + i // columns * height, gap + i % columns * width
        page[top : top + p.shape[0], left : left + p.shape[1]] = p
    return page


class Numbered:
    """Files `<prefix><number>.png` of a folder, numbered from the highest number there on."""

    def __init__(self, folder: str | Path, prefix: str = "", digits: int = 5) -> None:
        self.folder, self.prefix, self.digits = Path(folder), prefix, digits
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.png")
        names = (pattern.fullmatch(p.name) for p in self.folder.glob("*.png"))
        self.next = max((int(m[1]) for m in names if m), default=-1) + 1

    def save(self, picture: np.ndarray, settings: dict[str, Any]) -> Path:
        """Writes uint8 [H, W, 3] and says where."""
        while (path := self.folder / f"{self.prefix}{self.next:0{self.digits}}.png").exists():
            self.next += 1  # by another process in the meantime
        self.next += 1
        save_png(Image.fromarray(picture), path, settings)
        return path


class Named:
    """Files `<stem>.png` of a folder, with a number behind the name where that is taken."""

    def __init__(self, folder: str | Path, stem: str) -> None:
        self.folder, self.stem = Path(folder), re.sub(r"[^\w.,()'+-]", "-", stem)[:150] or "picture"

    def save(self, picture: np.ndarray, settings: dict[str, Any]) -> Path:
        """Writes uint8 [H, W, 3] and says where."""
        path, number = self.folder / f"{self.stem}.png", 1
        while path.exists():
            number += 1
            path = self.folder / f"{self.stem}-{number}.png"
        save_png(Image.fromarray(picture), path, settings)
        return path


class Gallery:
    """What a script does with its pictures: check and mark them, write each, at the end all together.

    Args:
        samples, together: where to; None = not at all.
        columns: of the picture of all.
        check: pictures -> which of them are withheld. mark: changes a picture before it is written.
        say: takes a line for the user.
    """

    def __init__(
        self,
        samples: Numbered | Named | None,
        together: Numbered | Named | None,
        columns: int,
        *,
        check: Callable[[Sequence[np.ndarray]], list[bool]] | None = None,
        mark: Callable[[np.ndarray], np.ndarray] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.samples, self.together, self.columns = samples, together, columns
        self.check, self.mark, self.say = check, mark, say
        self.pictures: list[np.ndarray] = []
        self.count = self.withheld = 0

    def add(self, picture: np.ndarray, settings: dict[str, Any]) -> None:
        """One picture, uint8 [H, W, 3]."""
        if self.check is not None and self.check([picture])[0]:
            self.withheld += 1
            return
        picture = picture if self.mark is None else self.mark(picture)
        self.count += 1
        if self.samples is not None:
            self.samples.save(picture, settings)
        if self.together is not None:
            self.pictures.append(picture)

    def close(self, settings: dict[str, Any]) -> None:
        """Writes the picture of all, and says what is not there."""
        if self.withheld:
            plural = "s" * (self.withheld != 1)
            self.say(f"{self.withheld} image{plural} withheld (use --safety off)")
        if self.together is not None and self.pictures:
            path = self.together.save(grid(self.pictures, self.columns), settings)
            self.say(f"all together: {path}")


# --- moving pictures --------------------------------------------------------------------------------------------------


def write_movie(frames: Iterable[np.ndarray], path: str | Path, fps: int = 24, loop: bool = True) -> int:
    """Writes uint8 frames [H, W, 1 or 3] as .gif, .mp4 or .png (the last frame only); returns how many there were.

    Args:
        loop: a .gif starts again at its end.

    Raises:
        UserError: another ending, or an .mp4 without ffmpeg.
    """
    path = Path(path)
    check_movie(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [Image.fromarray(f[..., 0] if f.shape[2] == 1 else f) for f in frames]
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".gif":
        options = {"loop": 0} if loop else {}
        pages[0].save(part, save_all=True, append_images=pages[1:], duration=max(20, round(1000 / fps)), **options)
    elif path.suffix == ".png":
        pages[-1].save(part)
    else:
        _mp4(pages, part, fps)
    part.replace(path)
    return len(pages)


def check_movie(path: str | Path) -> None:
    """Raises UserError for a name that `write_movie` cannot write, before any work is done."""
    ending = Path(path).suffix
    if ending not in (".gif", ".mp4", ".png"):
        raise UserError(f"{path}: expected a name that ends in .gif, .mp4 or .png")
    if ending == ".mp4":
        _ffmpeg()


def _ffmpeg() -> str:
    found = shutil.which("ffmpeg")
    if found is None and importlib.util.find_spec("imageio_ffmpeg"):
        from imageio_ffmpeg import get_ffmpeg_exe

        found = get_ffmpeg_exe()
    if found is None:
        raise UserError(".mp4 needs ffmpeg: pip install imageio-ffmpeg (or name the file .gif)")
    return found


def _mp4(pages: Sequence[Image.Image], path: Path, fps: int) -> None:
    width, height = (n + n % 2 for n in pages[0].size)  # H.264 has no odd sizes
    argv = [_ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    argv += ["-r", str(fps), "-i", "-", "-pix_fmt", "yuv420p", str(path)]
    data = b"".join(page.crop((0, 0, width, height)).convert("RGB").tobytes() for page in pages)
    done = subprocess.run(argv, input=data, capture_output=True)
    if done.returncode:
        raise UserError(f"ffmpeg could not write {path.name}: {done.stderr.decode(errors='replace').strip()[:200]}")
