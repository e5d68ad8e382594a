"""`main.py --dry-run`: everything is built, a few batches are trained, and the run's size and length are said."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from ldm.callbacks import peak_memory_mib
from ldm.trainer import _for_strategy
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.training import Run

STEPS = 3  # the first one also pays for memory allocation, so the last one is timed


class _Clock(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            import torch

            torch.cuda.synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._start)


def dry_run(run: Run) -> None:
    """Prints parameters, batch, memory, steps and ETA; writes nothing.

    Raises:
        UserError: whatever would stop the real run at its start.
    """
    from ldm import training
    from ldm.config import resolve

    pl.seed_everything(run.args.seed, workers=True, verbose=False)
    run.args.train = True
    data, _ = training.build_data(run)
    model, config = training.build_model(run, data)
    model.cache_latents = None  # a dry run writes nothing
    params = dict(resolve(run.merged, run.merged.config.lightning, "lightning").get("trainer") or {})
    full = pl.Trainer(
        **{**_for_strategy(dict(params)), "logger": False, "enable_checkpointing": False, "barebones": False}
    )
    training.set_learning_rate(run, model, config, full)
    clock = _Clock()
    params.update(max_steps=STEPS, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False)
    params.update(enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    trainer = pl.Trainer(**_for_strategy(params), callbacks=[clock])
    trainer.fit(model, data)
    if not clock.seconds:
        raise UserError("the training set gives no batch: fewer images than data.params.batch_size?")
    report(run, trainer, model, clock.seconds[-1], data)


def report(run: Run, trainer: pl.Trainer, model: pl.LightningModule, seconds: float, data: Any) -> None:
    """The lines that a user decides by."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model       {type(model).__name__}: {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained")
    batch = next(iter(data.train_dataloader()))
    for key, value in batch.items():
        shape = (
            f"{tuple(value.shape)} {value.dtype}"
            if hasattr(value, "shape")
            else f"{len(value)} x {type(value[0]).__name__}"
        )
        say(f"batch       {key}: {shape}")
    say(f"memory      {peak_memory_mib(model.device):.0f} MiB at the peak ({model.device})")
    settings = OmegaConf.to_container(run.merged.config.lightning.get("trainer") or {}, resolve=True)
    steps, epochs = settings.get("max_steps", -1), settings.get("max_epochs")
    if steps in (-1, None):
        steps = (epochs or 1000) * max(1, trainer.num_training_batches // trainer.accumulate_grad_batches)
    say(f"steps       {steps}; {seconds * 1e3:.0f} ms a step; about {duration(steps * seconds)} of training")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def duration(seconds: float) -> str:
    """1234 -> '20 min 34 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
