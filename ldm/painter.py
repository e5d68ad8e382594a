"""Pictures from seeds, prompts and pictures by a latent diffusion model, in any precision."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.official import DPMSolverSampler
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import ddim_timesteps
from ldm.generate import NonFinite
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.text2image import Batch
from ldm.util import SeededNoise, UserError, count_params, suggest

DPM_SOLVER = "dpm_solver"  # the official DPMSolverSampler, grid and all
SAMPLER_NAMES = (*SAMPLERS, DPM_SOLVER)
SMALL, TOGETHER = 30e6, 8  # a network of so few parameters takes so many pictures at a time on the CPU
Say = Callable[[str], None]  # one line for the user


@dataclass(frozen=True)
class Start:
    """A picture to start from.

    Attributes:
        picture: uint8 [H, W, 3], sizes that the model takes.
        repaint: bool [H, W], what is painted anew; None = everything.
        strength: how much noise goes over it: 1 = all.
    """

    picture: np.ndarray
    repaint: np.ndarray | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Knobs:
    """How to sample.

    Attributes:
        sampler: a row of SAMPLERS, or dpm_solver.
        grid: a row of GRIDS; None = the official one for ddim and plms where it has exactly so many steps.
        eta, scale: see `LatentDiffusion.sample`.
        clip_skip, long_prompt: see `TextEmbedder.encode`.
    """

    sampler: str = "ddim"
    steps: int = 50
    scale: float = 7.5
    eta: float | None = None
    grid: str | None = None
    clip_skip: int = 1
    long_prompt: bool = False


class Painter:
    """Pictures from seeds and prompts, in a precision, with one second try in full precision.

    Args:
        model: a latent diffusion model.
        knobs: how to sample.
        negative: the prompt that guidance leads away from.
        precision: a row of PRECISIONS; that of the weights.
        full: gives the model in full precision, from the file: weights may have overflowed too. None = as it is.
        say: takes a line for the user.
    """

    def __init__(
        self,
        model: Any,
        knobs: Knobs,
        negative: str | None = None,
        precision: str = "fp32",
        *,
        full: Callable[[], Any] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        if knobs.sampler not in SAMPLER_NAMES:
            known = ", ".join(SAMPLER_NAMES)
            raise UserError(
                f"--sampler {knobs.sampler}{suggest(knobs.sampler, SAMPLER_NAMES)}: expected one of {known}"
            )
        self.model, self.knobs, self.negative, self.precision, self.say = model, knobs, negative, precision, say
        self._full, self._texts = full, {}

    @property
    def multiple(self) -> int:
        """Heights and widths that the model takes are multiples of it."""
        return self.model.downsampling * 2 ** (getattr(self.model.model.diffusion_model, "levels", 1) - 1)

    @property
    def trained_size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the model was trained on, by its config."""
        size = self.model.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.model.downsampling, width * self.model.downsampling

    @property
    def device(self) -> torch.device:
        return self.model.betas.device

    @property
    def per_call(self) -> int | None:
        """Pictures in a network call on the CPU, always so many, since kernels round by the size of a batch and a seed
        is a picture to the last bit: one of a large network, for which more at once are not faster and take more
        memory. None on other devices: a batch is a call."""
        if self.device.type != "cpu":
            return None
        return TOGETHER if count_params(self.model.model) < SMALL else 1

    def calls(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches as network calls."""
        size = self.per_call
        if size is None:
            yield from batches
            return
        every = [one for batch in batches for one in batch]
        for i in range(0, len(every), size):
            yield every[i : i + size]

    def report_cuts(self, prompts: Sequence[str]) -> None:
        """Says which words of a prompt the text encoder does not know, or will not see."""
        self._report_unknown(prompts)
        words = getattr(self.model.cond_stage_model, "truncated_words", None)
        if words is None or self.knobs.long_prompt:
            return
        for prompt in dict.fromkeys([*prompts, self.negative or ""]):
            if cut := words(prompt):
                self.say(
                    f"the prompt is too long for the text encoder; cut: {' '.join(cut)} (--long-prompt keeps them)"
                )

    def _report_unknown(self, prompts: Sequence[str]) -> None:
        """For models with a vocabulary of whole words."""
        unknown = getattr(self.model.cond_stage_model, "unknown_words", lambda prompt: {})
        found = {w: like for p in dict.fromkeys([*prompts, self.negative or ""]) for w, like in unknown(p).items()}
        for word, like in found.items():
            hint = f" (similar words that it knows: {', '.join(like)})" if like else ""
            self.say(f'the model does not know the word "{word}"{hint}')

    def paint(
        self,
        batch: Batch,
        size: tuple[int, int],
        start: Start | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> np.ndarray:
        """uint8 pictures [n, H, W, 3].

        Args:
            batch: seed and prompt of each.
            size: (height, width), multiples of `multiple`.
            callback: called after each step with its number and the latents predicted, [n, C, h, w].

        Raises:
            NonFinite: NaN or infinity, in full precision too.
        """
        n = len(batch)
        batch = [*batch, *batch[-1:] * ((self.per_call or n) - n)]  # the last one again, where some are missing
        step = None if callback is None else lambda i, x0: callback(i, x0[:n])
        x = self._paint(batch, size, start, step)[:n]
        if not bool(x.isfinite().all()) and not self._full_precision:
            self.say(f"non-finite values in {self.precision}: once more in fp32, and the rest too")
            self._to_full_precision()
            x = self._paint(batch, size, start, step)[:n]
        if not bool(x.isfinite().all()):
            raise NonFinite(
                "the network gave non-finite values in fp32; no picture was written. Is the checkpoint damaged, or "
                "--scale very high?"
            )
        return to_bytes(x)

    def decode(self, z: Tensor) -> np.ndarray:
        """Latents [n, C, h, w] -> uint8 pictures [n, H, W, 3]; for previews, NaN is black."""
        with torch.inference_mode(), self._autocast():
            return to_bytes(self.model.decode_first_stage(z.float()).nan_to_num(-1.0))

    # --- precision ----------------------------------------------------------------------------------------------------

    @property
    def _full_precision(self) -> bool:
        half = self.precision in ("bf16", "fp16")
        return not (half or (self.precision == "autocast" and self.device.type == "cuda"))

    def _to_full_precision(self) -> None:
        self.precision = "fp32"
        self._texts.clear()
        if self._full is None:
            self.model.float()
            return
        self.model = None  # two of them may not fit
        self.model = self._full()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "autocast" and self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.float16)
        return contextlib.nullcontext()

    # --- conditions ---------------------------------------------------------------------------------------------------

    def _text_condition(self, batch: Batch, size: tuple[int, int]) -> dict[str, Any]:
        """The condition of the prompts; texts that come again are not encoded again. SDXL is told the size too."""
        prompts = [text for _, text in batch]
        key = (*prompts, size)
        if key not in self._texts:
            options = {"clip_skip": self.knobs.clip_skip, "long_prompt": self.knobs.long_prompt}
            options |= {"height": size[0], "width": size[1]}
            known = inspect.signature(self.model.condition).parameters
            options = {k: v for k, v in options.items() if k in known}
            seeds = [seed for seed, _ in batch]
            text = {"prompts": prompts if any(prompts) else None, "negative_prompt": self.negative}
            if len(self._texts) > 16:
                self._texts.clear()
            with quiet("ldm.modules.prompts"):  # `report_cuts` says it once
                self._texts[key] = self.model.condition(seeds, **text, **options)
        return dict(self._texts[key] or {})

    def _condition(self, batch: Batch, size: tuple[int, int], start: Start | None) -> dict[str, Any]:
        """With the maps that an inpainting network has beside its latents."""
        key, network = self.model.conditioning_key, self.model.model.diffusion_model
        cond = {} if key == "concat" else self._text_condition(batch, size)
        if key not in ("concat", "hybrid"):
            return cond
        if start is None or start.repaint is None:
            raise UserError("this is an inpainting model, which needs a picture and a mask: use scripts/inpaint.py")
        maps = self._hybrid_maps(start) if key == "hybrid" else self._concat_maps(start)
        inputs = self.model.channels + maps.shape[1]
        if network.in_channels != inputs:
            raise UserError(f"the network takes {network.in_channels} channels, latents, mask and picture are {inputs}")
        return {**cond, "c_concat": maps.expand(len(batch), -1, -1, -1)}

    def _hybrid_maps(self, start: Start) -> Tensor:
        """As the Stable Diffusion inpainting models were trained: mask 1 = repaint, which is grey in the picture."""
        picture, repaint = self._tensors(start)
        maps = []
        for key in self.model.concat_keys:
            if key == self.model.masked_image_key:
                maps.append(self._scaled(self.model.encode_first_stage(picture * (1 - repaint))))
            else:
                maps.append(F.interpolate(repaint, scale_factor=1 / self.model.downsampling))
        return torch.cat(maps, dim=1)

    def _concat_maps(self, start: Start) -> Tensor:
        """As the latent diffusion inpainting model was trained: mask in {-1, 1}, what is repainted is black in the
        picture, whose latents are not scaled."""
        picture, repaint = self._tensors(start)
        black = (picture + 1) * (1 - repaint) - 1
        z = self.model.get_learned_conditioning(black.to(self._first_stage_dtype)).float()
        return torch.cat([z, F.interpolate(2 * repaint - 1, size=z.shape[2:])], dim=1)

    @property
    def _first_stage_dtype(self) -> torch.dtype:
        return next(self.model.first_stage_model.parameters()).dtype

    # --- where to start -----------------------------------------------------------------------------------------------

    def _tensors(self, start: Start) -> tuple[Tensor, Tensor]:
        """Picture [1, 3, H, W] in [-1, 1], and [1, 1, H, W], 1 = repaint."""
        picture = torch.from_numpy(start.picture.copy()).permute(2, 0, 1)[None].to(self.device).float() / 127.5 - 1
        repaint = torch.ones(1, 1, *picture.shape[2:]) if start.repaint is None else torch.from_numpy(start.repaint)
        return picture, repaint.reshape(1, 1, *picture.shape[2:]).to(picture)

    def _scaled(self, encoding: Any) -> Tensor:
        """Latents of a first stage's answer: the mode of a posterior."""
        gaussian = isinstance(encoding, DiagonalGaussianDistribution)
        return self.model.get_first_stage_encoding(encoding.mode() if gaussian else encoding)

    def _start(self, batch: Batch, start: Start | None) -> dict[str, Any]:
        """The arguments mask, x0 and strength of `generate`."""
        if start is None:
            return {}
        masked = start.repaint is not None and self.model.conditioning_key not in ("concat", "hybrid")
        if start.strength == 1 and not masked and start.repaint is not None:
            return {}
        picture, repaint = self._tensors(start)
        encoding = self.model.encode_first_stage(picture)
        if isinstance(encoding, DiagonalGaussianDistribution):
            # numbers of their own for each seed: those of the seed itself are the noise that comes over the latents
            noise = SeededNoise([-1 - seed for seed, _ in batch])
            mean, std = encoding.mean.float(), encoding.std.float()
            encoding = mean + std * noise((len(batch), *mean.shape[1:]), device=self.device)
        x0 = self.model.get_first_stage_encoding(encoding).expand(len(batch), -1, -1, -1)
        out: dict[str, Any] = {"x0": x0, "strength": start.strength}
        if masked:  # a latent is kept where all of its pixels are
            out["mask"] = 1 - F.max_pool2d(repaint, self.model.downsampling)
        return out

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _paint(self, batch: Batch, size: tuple[int, int], start: Start | None, callback: Any) -> Tensor:
        """[n, 3, H, W], not clipped: a clipped infinity would pass as white."""
        seeds = [seed for seed, _ in batch]
        with torch.inference_mode(), self._autocast():
            cond, begin = self._condition(batch, size, start), self._start(batch, start)
            latent = self.model.latent_size(*size)
            if self.knobs.sampler == DPM_SOLVER:
                z = self._official_dpm_solver(cond, seeds, latent, begin, callback)
            else:
                grid = self._grid(begin.get("strength", 1.0))
                step = None if callback is None else lambda i, t, x, x0: callback(i, x0)
                z = self.model.generate(
                    cond, seeds, latent, self.knobs.steps, self.knobs.sampler, grid, self.knobs.eta,
                    self._scale(cond), begin.get("mask"), begin.get("x0"), begin.get("strength", 1.0), callback=step,
                )  # fmt: skip
            return self.model.decode_first_stage(z)

    def _scale(self, cond: dict[str, Any]) -> float:
        """No guidance for a model that knows no empty condition."""
        return self.knobs.scale if cond.get("uncond") is not None else 1.0

    def _grid(self, strength: float) -> str | None:
        """DDIM and PLMS ran on `uniform`, which has as many steps as it is asked for where these divide T."""
        steps, total = self.knobs.steps, self.model.num_timesteps
        if self.knobs.grid is not None or self.knobs.sampler not in ("ddim", "plms") or not 1 <= steps <= total:
            return self.knobs.grid
        if int(strength * steps) == 0:
            return None  # one that ends at the picture itself
        return "uniform" if len(ddim_timesteps("uniform", steps, total)) == steps else "leading"

    def _official_dpm_solver(
        self, cond: dict[str, Any], seeds: list[int], size: tuple[int, int], begin: dict[str, Any], callback: Any
    ) -> Tensor:
        if begin.get("strength", 1.0) != 1:
            raise UserError("--dpm_solver starts from noise: use --sampler dpmpp_2m to start from a picture")
        shape = (self.model.channels, *size)
        cond, uncond = self.model.split_condition(cond)
        scale = self.knobs.scale if uncond is not None else 1.0
        noise = SeededNoise(seeds)((len(seeds), *shape), device=self.device)
        z, _ = DPMSolverSampler(self.model).sample(
            self.knobs.steps, len(seeds), shape, cond, x_T=noise, mask=begin.get("mask"), x0=begin.get("x0"),
            img_callback=None if callback is None else lambda x0, i: callback(i, x0),
            unconditional_guidance_scale=scale, unconditional_conditioning=uncond,
        )  # fmt: skip
        return z


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """No warnings of this logger inside."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def to_bytes(x: Tensor) -> np.ndarray:
    """[B, 3, H, W], clipped to [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
