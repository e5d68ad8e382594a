"""Pictures from prompts by a transformer over tokens (DALL-E, CogView), for the loop that scripts/txt2img.py has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm import checkpoint, generate
from ldm.text2image import Batch
from ldm.util import UserError, get_obj_from_str, to_uint8


def draws_tokens(path: str) -> bool:
    """Whether the model of a run directory or checkpoint is one that this module paints with.

    Raises:
        UserError: no such run.
    """
    run, file = checkpoint.find_run(path)
    recipe = get_obj_from_str(generate.run_config(run, checkpoint.read(file))["model"]["target"])
    return hasattr(recipe, "draw_tokens")


class TokenPainter:
    """Pictures from seeds and prompts; the same calls as `ldm.painter.Painter`.

    Args:
        model: a `CaptionModel`, with the weights that are to be used.
        negative: the prompt that guidance leads away from.
        scale: of the guidance.
    """

    precision = "fp32"

    def __init__(self, model: Any, negative: str | None = None, scale: float = 1.0) -> None:
        self.model, self.negative, self.scale = model, negative, scale

    @property
    def steps(self) -> int:
        """Tokens of a picture."""
        return self.model.sampling_steps

    def calls(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches as network calls: one each, a token's cost hardly grows with it."""
        yield from batches

    def report_cuts(self, prompts: Sequence[str]) -> None:
        """`condition` says what is cut."""

    @torch.no_grad()
    def paint(self, batch: Batch, size: None, start: None, callback: Callable[[int, Tensor], None]) -> list[np.ndarray]:
        """(seed, prompt) pairs -> uint8 [H, W, C] each; callback(number of the token, tokens so far) after each one.

        Raises:
            UserError: what `condition` and `sample` raise; a prompt for a model of classes is one.
        """
        seeds, prompts = [s for s, _ in batch], [p for _, p in batch]
        cond = self.model.condition(seeds, prompts=prompts, negative_prompt=self.negative)
        knobs = {"scale": self.scale, "callback": lambda i, tokens: callback(i - 1, tokens)}
        return list(to_uint8(_rgb(self.model.sample(cond, seeds=seeds, **knobs))))

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Tokens [B, n] so far -> uint8 [B, H, W, 3]."""
        return to_uint8(_rgb(self.model.decode_tokens(tokens)))


def _rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)


def open_run(path: str, negative: str | None, scale: float | None, weights: str | None, device: torch.device) -> Any:
    """(painter, facts about the run for the PNG's text).

    Raises:
        UserError: no run, or no averaged weights where they were asked for.
    """
    model, info = generate.load_run(path)
    which = generate.weights_scope(model, weights)[1]
    if which == "ema":
        model.model_ema.copy_to(model.transformer)
    if not hasattr(model, "text_rows"):
        raise UserError(f"{path} is a {type(model).__name__}, which draws without prompts: use scripts/sample.py")
    painter = TokenPainter(model.to(device), negative, 1.0 if scale is None else scale)
    return painter, {"run": path, "weights": which, "digest": info["sha256"]}


def read_pictures(model: Any, files: Sequence[str | Path]) -> Tensor:
    """Picture files, scaled and cut to what the model was trained on: [B, C, H, W] in [-1, 1].

    Raises:
        UserError: a file cannot be read, or a model of another kind.
    """
    from ldm.data.pixels import Fit

    if not hasattr(model, "draw_tokens"):
        raise UserError(f"{type(model).__name__} works without tokens and cannot go on with a picture")
    channels, height, width = model.picture_shape
    fit, pictures = Fit((height, width), channels), []
    for file in files:
        try:
            pictures.append(torch.tensor(fit(Path(file).read_bytes())))
        except OSError as e:
            raise UserError(f"{file} cannot be read as a picture: {e.strerror or e}") from e
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
