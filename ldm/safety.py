"""The two extras of the official script, both off unless asked for: safety checker and invisible watermark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldm.util import UserError

CHECKER = "CompVis/stable-diffusion-safety-checker"
FOLDER = Path("models/safety-checker")
WATERMARK = b"StableDiffusionV1"  # 17 bytes, 136 bits
SMALLEST = 256  # pixels; the watermark needs so many in height and width

Checker = Callable[[Sequence[np.ndarray]], list[bool]]


def load_checker(folder: str | Path | None = None) -> Checker:
    """Pictures uint8 [H, W, 3] -> which of them the checker would withhold.

    Args:
        folder: the checker in diffusers' layout; None = models/safety-checker, else the hub's cache.

    Raises:
        UserError: the packages or the checker's files are missing.
    """
    try:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor
    except ImportError as e:
        raise UserError(
            f"--safety on needs diffusers and transformers: pip install diffusers transformers ({e})"
        ) from e
    source = str(folder or (FOLDER if FOLDER.is_dir() else CHECKER))
    try:
        network = StableDiffusionSafetyChecker.from_pretrained(source).eval()
        processor = CLIPImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise UserError(
            f"--safety on: no safety checker in {source}. Put the files of {CHECKER} into {FOLDER}, or use --safety off"
        ) from e

    def check(pictures: Sequence[np.ndarray]) -> list[bool]:
        inputs = processor(images=list(pictures), return_tensors="pt").pixel_values
        _, flags = network(clip_input=inputs, images=[p.copy() for p in pictures])
        return [bool(f) for f in flags]

    return check


def load_watermark() -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [H, W, 3] -> the same with the official watermark in it (dwtDct); too small pictures stay as they are.

    Raises:
        UserError: the package is missing.
    """
    try:
        from imwatermark import WatermarkEncoder
    except ImportError as e:
        raise UserError(f"--watermark on: pip install invisible-watermark ({e})") from e
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", WATERMARK)

    def mark(picture: np.ndarray) -> np.ndarray:
        if min(picture.shape[:2]) < SMALLEST:
            return picture
        return np.ascontiguousarray(encoder.encode(np.ascontiguousarray(picture[..., ::-1]), "dwtDct")[..., ::-1])

    return mark
