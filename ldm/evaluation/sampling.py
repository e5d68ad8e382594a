"""Drawn pictures to measure: one PNG for each seed, on one device or shared out over several by a Trainer."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm import generate
from ldm.callbacks import peak_memory_mib
from ldm.diffusion.samplers import SAMPLERS
from ldm.evaluation.provenance import provenance
from ldm.evaluation.store import write_json
from ldm.models.diffusion.sampling import SeededSampling
from ldm.util import UserError

NAMED = 100  # classes or captions that a folder's name stands for: more pictures of the same kind go to the same folder


def balanced(shares: Sequence[float], n: int) -> np.ndarray:
    """Classes int64 [n] whose every beginning is as near to these shares as can be (0, 1, 2, ... if equal).

    Each picture gets the class that lacks most; a longer sequence begins with the shorter one.
    """
    p = np.asarray(shares, np.float64) / np.sum(shares)
    counts, chosen = np.zeros(len(p)), np.empty(n, np.int64)
    for i in range(n):
        chosen[i] = int(np.argmax(np.round(p * (i + 1) - counts, 9)))
        counts[chosen[i]] += 1
    return chosen


class Plan:
    """What is drawn: seeds, each with its class or caption, and where its picture goes.

    Args:
        model, info: from `generate.load_run`.
        seeds: of the pictures.
        knobs: of `model.sample`.
        weights: ema, raw or None (ema where there are).
        labels: class of each picture, or None; at least `NAMED`, however few are drawn.
        captions: text for each picture, or None; likewise.
        batch_size: pictures per call.
        root: the pictures go to a folder in it that is named by everything that decides them.
    """

    def __init__(
        self,
        model: Any,
        info: dict[str, Any],
        seeds: range,
        knobs: dict[str, Any],
        weights: str | None,
        labels: np.ndarray | None,
        captions: Sequence[str] | None,
        batch_size: int,
        root: str | Path,
    ) -> None:
        self.model, self.seeds, self.batch_size = model, seeds, batch_size
        self.knobs, self.options = generate.split_knobs(model, knobs)
        self.scope, self.weights = generate.weights_scope(model, weights)
        self.request = self._request(labels, captions)
        self.labels = None if labels is None else labels[: len(seeds)]
        first = {k: list(map(str, v[:NAMED])) for k, v in self.request.items()}
        own = [
            info["sha256"],
            self.weights,
            sorted(self.knobs.items()),
            sorted(self.options.items()),
            seeds.start,
            first,
        ]
        name = hashlib.sha256(json.dumps(own, default=str).encode()).hexdigest()[:8]
        self.folder = Path(root) / f"{Path(info['run']).name}-{name}"
        self.record = {"checkpoint": info["checkpoint"], "sha256": info["sha256"], "weights": self.weights}

    def _request(self, labels: np.ndarray | None, captions: Sequence[str] | None) -> dict[str, Sequence[Any]]:
        """The first of classes, captions, nothing that this model takes."""
        why = None
        for request in ({"classes": labels}, {"prompts": captions}, {}):
            if any(v is None for v in request.values()):
                continue
            try:
                one = {k: [v[0] if k == "prompts" else int(v[0])] for k, v in request.items()}
                self.model.condition([self.seeds.start], **one, **self.options)
                return dict(request)
            except UserError as e:
                why = e
        raise UserError(f"the model cannot be sampled from the data's classes or captions: {why}") from why

    @property
    def conditional(self) -> str:
        """What the pictures are asked for by: classes, prompts, or nothing."""
        return next(iter(self.request), "nothing")

    def name(self, seed: int) -> str:
        """The picture's file."""
        return f"{seed:08}.png"

    def names(self) -> list[str]:
        """All files, in the order of the seeds."""
        return [self.name(s) for s in self.seeds]

    def missing(self) -> list[list[int]]:
        """The batches with a picture that is not there yet; whole ones, so that it comes out as in an unbroken run."""
        there = {p.name for p in self.folder.glob("*.png")}
        all_batches = generate.batches(self.seeds, self.batch_size)
        return [b for b in all_batches if any(self.name(s) not in there for s in b)]

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """[len(seeds), C, H, W] in [-1, 1]."""
        at = [s - self.seeds.start for s in seeds]
        chosen = {k: [v[i] if k == "prompts" else int(v[i]) for i in at] for k, v in self.request.items()}
        cond = self.model.condition(seeds, **chosen, **self.options)
        return self.model.sample(cond, seeds=list(seeds), **self.knobs)


# --- what decides and what made the pictures --------------------------------------------------------------------------


class _Asked(Exception):  # noqa: N818
    """Stops `sample` where it has settled what to do, before it does it."""


def settings(plan: Plan) -> dict[str, Any]:
    """The knobs of `sample` as they are used: given ones, defaults, and what a None stands for.

    A diffusion model's `sample` settles steps, sampler and scale by its own rules (an engine asks its config); it is
    asked for one picture and stopped at the door of `generate`, so that the rules are not written here once more.
    """
    model = plan.model
    defaults = {k: p.default for k, p in generate.knobs_of(model).items() if p.default is not p.empty}
    found = {**defaults, **plan.knobs}
    if isinstance(model, SeededSampling):
        found |= _settled(plan)
    return {k: v for k, v in found.items() if v is not None}


def _settled(plan: Plan) -> dict[str, Any]:
    model, seen = plan.model, {}

    def stop(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(type(model).generate).bind(model, *args, **kwargs)
        bound.apply_defaults()
        seen.update(bound.arguments)
        raise _Asked

    model.generate = stop
    try:
        plan.draw(plan.seeds[:1])
    except _Asked:
        pass
    finally:
        del model.generate  # the class's own again
    found = {k: seen[k] for k in ("steps", "sampler", "scale", "strength", "grid", "eta") if k in seen}
    if not found:
        return {}
    takes = {**_defaults(SAMPLERS[found["sampler"]].function), **model._knobs(found["sampler"], found["eta"])}
    levels = getattr(model, "discretization", None)  # an engine's own noise levels take the place of a grid
    default = model.path.default_grid if levels is None else type(levels).__name__
    # an infinite bound is no number of JSON
    numbers = {k: v if math.isfinite(v) else str(v) for k, v in takes.items() if type(v) in (int, float)}
    return {**found, **numbers, "eta": takes.get("eta"), "grid": found["grid"] or default}


def _defaults(function: Any) -> dict[str, Any]:
    return {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


# pictures of before there were records
UNKNOWN = {"commit": None, "device": None, "threads": None, "versions": None, "batch_size": None}


def drawn_by(folder: Path) -> list[dict[str, Any]]:
    """What drew into this folder: commit, versions, device, threads and batch size of each evaluation that differed."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("drawn-*.json"))] or [UNKNOWN]


def _sign(folder: Path, batch_size: int, device: Any) -> None:
    """Leaves a record of this process; it must be there before its first picture.

    A file of its own for each drawer, named by its content: processes that share the folder cannot lose each other's.
    Pictures are looked for before records: those of a process that runs at the same time have theirs.
    """
    pictures = any(folder.glob("*.png"))
    if pictures and not any(folder.glob("drawn-*.json")):
        write_json(folder / "drawn-unknown.json", UNKNOWN)
    own = {**provenance(device), "batch_size": batch_size}
    name = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    if not (folder / f"drawn-{name}.json").is_file():
        write_json(folder / f"drawn-{name}.json", own)


class Drawing(pl.LightningModule):
    """Draws the missing pictures of a plan; each process takes every world_size-th batch.

    Args:
        missing: the batches, listed before any process draws: each must share out the same list.
    """

    def __init__(self, plan: Plan, missing: list[list[int]]) -> None:
        super().__init__()
        self.plan, self.recipe, self.missing = plan, plan.model, missing
        self.seconds, self.calls, self.batches, self.drawn = 0.0, 0, 0, 0
        self._writer = ThreadPoolExecutor(1)  # files are written while the next batch is drawn
        self._written: list[Future] = []

    def predict_dataloader(self) -> DataLoader:
        # a process without a batch would not take part: it draws the first one too
        batches = self.missing[self.trainer.global_rank :: self.trainer.world_size] or self.missing[:1]
        self._bar = tqdm(total=len(batches), desc="drawing", unit="batch", disable=not self.trainer.is_global_zero)
        return DataLoader(batches, batch_size=None, collate_fn=None)

    def on_predict_start(self) -> None:
        _sign(self.plan.folder, self.plan.batch_size, self.device.type)  # now the Trainer has shared out the threads
        self._started = time.perf_counter()
        # of a generator that is called in two parts, the one that makes the picture
        networks = [getattr(m, "synthesis", m) for m in self.recipe.networks()]
        self._hooks = [m.register_forward_hook(self._count) for m in networks]
        self._counts = dict.fromkeys(map(id, networks), 0)

    def _count(self, module: Any, *_: Any) -> None:
        self._counts[id(module)] += 1

    def predict_step(self, seeds: list[int], batch_idx: int) -> None:
        seeds = [int(s) for s in seeds]
        before = dict(self._counts)
        with torch.random.fork_rng(devices=[]):
            x = self.plan.draw(seeds)
        # a transformer that draws token by token is not called as a whole
        tokens = getattr(self.recipe, "sampling_steps", 0)
        self.calls += max(tokens, *(n - before[k] for k, n in self._counts.items()), 0)
        self.drawn, self.batches = self.drawn + len(seeds), self.batches + 1
        pictures = generate.pictures(x, self.plan.record["checkpoint"])
        for future in self._written:
            future.result()  # a full disk is said now
        if self.trainer.is_global_zero:  # before the pictures: who is killed after the last one leaves its cost
            self.seconds = time.perf_counter() - self._started
            write_json(self.plan.folder / "cost.json", self.cost())
        self._written = [self._writer.submit(self._save, seeds, pictures)]
        self._bar.update()

    def cost(self) -> dict[str, Any]:
        """Of what this process has drawn so far, as a share of all processes."""
        return {
            "seconds_per_picture": self.seconds / self.drawn / self.trainer.world_size,
            "network_calls_per_picture": self.calls / self.batches,
            "peak_memory_gib": peak_memory_mib(self.recipe.device) / 1024,
            "devices": self.trainer.world_size,
        }

    def _save(self, seeds: list[int], pictures: list[Any]) -> None:
        for seed, picture in zip(seeds, pictures, strict=True):
            asked = {k: str(v[seed - self.plan.seeds.start]) for k, v in self.plan.request.items()}
            settings = {**self.plan.record, **asked, "seed": seed, "knobs": self.plan.knobs}
            generate.save_png(picture, self.plan.folder / self.plan.name(seed), settings)

    def on_predict_end(self) -> None:
        for future in self._written:
            future.result()
        self._writer.shutdown()
        self._bar.close()
        for hook in self._hooks:
            hook.remove()
        self.seconds = time.perf_counter() - self._started
        self.trainer.strategy.barrier()  # who measures must find the other processes' pictures, too


def draw(plan: Plan, trainer: dict[str, Any], device: str = "auto") -> bool:
    """Draws what is missing; false in the processes that have nothing more to do.

    Args:
        trainer: arguments of the Trainer (devices, strategy, ...).
        device: auto, cpu, cuda, mps, where `trainer` names no accelerator.

    The cost of what was drawn is in `<folder>/cost.json`: seconds and network calls a picture, peak memory; what drew
    it in `<folder>/drawn-*.json`.
    """
    missing = plan.missing()
    if not missing:
        return True
    options = {"accelerator": generate.pick_device(device).type, "devices": 1, **trainer}
    if options["accelerator"] == "cuda":
        options["accelerator"] = "gpu"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runner = pl.Trainer(
        **{**quiet, "enable_model_summary": False, "use_distributed_sampler": False, "barebones": False, **options}
    )
    module = Drawing(plan, missing)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with plan.scope:
        runner.predict(module, return_predictions=False)
    if runner.is_global_zero and module.drawn:
        write_json(plan.folder / "cost.json", module.cost())
    return runner.is_global_zero
