"""StyleGAN2 generators to edit with, and their latents as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import generate
from ldm.picture_files import read_image
from ldm.util import SeededNoise, UserError


@dataclass
class Latent:
    """A point in W+ and what makes its picture.

    Attributes:
        ws: [1, num_ws, w_dim].
        tuned: tensors of the generator that pivotal tuning has changed, by name; empty for none.
        about: plain values about it, kept in the file.
    """

    ws: Tensor
    tuned: dict[str, Tensor]
    about: dict[str, Any]


def load_stylegan(run: str | Path, weights: str | None = None, device: str = "auto") -> tuple[Any, dict[str, Any]]:
    """The model of a run, checkpoint or NVIDIA .pkl, with its averaged weights in place, and what `load_run` says.

    Raises:
        UserError: no StyleGAN2; averaged weights asked for and not there.
    """
    model, info = generate.load_run(run)
    if not hasattr(getattr(model, "generator", None), "synthesis"):
        raise UserError(f"{run} is a {type(model).__name__}; dragging and inverting need a StyleGAN2")
    _, use = generate.weights_scope(model, weights)
    if use == "ema":
        model.model_ema.copy_to(model.generator)
    model.to(generate.pick_device(device))
    return model, {**info, "weights": use}


@torch.no_grad()
def from_seed(model: Any, seed: int, label: str | None = None, truncation: float = 0.7) -> Latent:
    """The latent of a seed, of a class where the model has them."""
    classes = None if label is None else [generate.class_index(model, label)]
    cond = model.condition([seed], classes=classes)
    ws = model.latents(cond, SeededNoise([seed]), truncation)
    return Latent(ws, {}, {"seed": seed, "class": label, "truncation": truncation})


def save_latent(latent: Latent, path: str | Path) -> None:
    """Writes a .safetensors file."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"ws": latent.ws, **{f"generator.{k}": v for k, v in latent.tuned.items()}}
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, {"ldm": json.dumps(latent.about)})
    part.replace(path)


def read_latent(path: str | Path, model: Any) -> Latent:
    """Reads a latent and puts what was tuned into the model's generator.

    Raises:
        UserError: no such file, or one of another generator.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as e:
        raise UserError(f"--latent {path} cannot be read ({e}): expected a file of scripts/invert.py or drag.py") from e
    g, ws = model.generator, tensors.pop("ws", None)
    if ws is None or ws.shape != (1, g.num_ws, g.w_dim):
        got = None if ws is None else list(ws.shape)
        raise UserError(
            f"--latent {path}: ws {got}, but the generator has [1, {g.num_ws}, {g.w_dim}]: another model's?"
        )
    tuned = {k.removeprefix("generator."): v for k, v in tensors.items()}
    own = g.state_dict()
    wrong = [k for k, v in tuned.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise UserError(f"--latent {path}: {wrong[0]} does not fit the generator: another model's?")
    g.load_state_dict(tuned, strict=False)
    return Latent(ws.to(model.device), tuned, json.loads(about.get("ldm", "{}")))


def square_picture(path: str | Path, size: int, channels: int, say: Callable[[str], None]) -> Tensor:
    """The middle square of a picture, [1, channels, size, size] in [-1, 1]; says what was cut."""
    x, _ = read_image(path, say)
    height, width = x.shape[:2]
    side = min(height, width)
    if height != width:
        say(f"{path} is {width}x{height}: its middle {side}x{side} is used; crop it yourself for another part")
    top, left = (height - side) // 2, (width - side) // 2
    page = Image.fromarray(x[top : top + side, left : left + side]).resize((size, size), Image.Resampling.LANCZOS)
    page = page.convert("L" if channels == 1 else "RGB")
    array = np.asarray(page, dtype=np.float32).reshape(size, size, channels) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)[None]
