"""`main.py --dry-run`: everything is built, a few batches are trained, and the run's size and length are said."""

from __future__ import annotations

import copy
import sys
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import nn

from ldm.callbacks import peak_memory_mib
from ldm.trainer import make_trainer, trainer_params
from ldm.util import UserError, instantiate_from_config

if TYPE_CHECKING:
    from ldm.training import Run

STEPS = 3  # the first one also pays for memory allocation, so the last one is timed
OF_GPUS = ("fsdp", "deepspeed")  # strategies that a machine without GPUs refuses


class _Clock(Callback):
    """Seconds of each step, which several batches make where they are accumulated or a critic plays more often."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if trainer.global_step > len(self.seconds):
            self.seconds.append(time.perf_counter() - self._start)
            self._start = None


def dry_run(run: Run) -> None:
    """Prints parameters, batch, memory, steps and ETA; writes nothing. What cannot fit into memory is not tried.

    Raises:
        UserError: whatever would stop the real run at its start.
    """
    from ldm import training
    from ldm.config import resolve

    pl.seed_everything(run.args.seed, workers=True, verbose=False)
    run.args.train = True
    data, _ = training.build_data(run)
    params = trainer_params(run, resolve(run.merged, run.merged.config.lightning, "lightning"))
    network = without_memory(training.model_config(run, data))
    there = memory_available()
    if network is not None and there is not None and (needed := memory_needed(network)) > there:
        report_size(network)
        say(f"memory      {needed / 2**30:.1f} GiB for weights, averages, gradients and optimiser, and activations")
        say(f"steps       {params.get('max_steps') or str(params.get('max_epochs')) + ' epochs'}")
        say(f"not tried   {there / 2**30:.1f} GiB are free here; --precision bf16-true halves it, use_ema: false helps")
        return
    if str(params.get("strategy", "")).startswith(OF_GPUS) and not torch.cuda.is_available():
        say(f"strategy    {params.pop('strategy')} needs GPUs: tried here without")
    model, config = training.build_model(run, data)
    model.cache_latents = None  # a dry run writes nothing
    full = make_trainer({**params, "logger": False, "enable_checkpointing": False, "barebones": False})
    training.set_learning_rate(run, model, config, full)
    clock = _Clock()
    params.update(max_steps=STEPS, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False)
    params.update(enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    trainer = make_trainer({**params, "callbacks": [clock]})
    trainer.fit(model, data)
    if not clock.seconds:
        raise UserError("the training set gives no batch: fewer images than data.params.batch_size?")
    report(run, trainer, model, clock.seconds[-1], data)


def without_memory(config: dict[str, Any]) -> nn.Module | None:
    """The model on the meta device: its sizes without its numbers; None where a network needs numbers to be built."""
    from ldm.generate import without_weights
    from ldm.training import inline_first_stage

    config = copy.deepcopy(config)
    inline_first_stage(config)
    try:
        with torch.device("meta"):
            return instantiate_from_config(without_weights({k: config[k] for k in ("target", "params") if k in config}))
    except (RuntimeError, NotImplementedError):
        return None


def memory_needed(model: nn.Module) -> int:
    """Bytes of weights, averages, gradients and AdamW's two moments: no training takes less."""
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return held + sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def memory_available() -> int | None:
    """Bytes that are free on the GPU, where there is one, or on this machine; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None


def report_size(model: nn.Module) -> None:
    """The line with the number of parameters."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model       {type(model).__name__}: {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained")


def report(run: Run, trainer: pl.Trainer, model: pl.LightningModule, seconds: float, data: Any) -> None:
    """The lines that a user decides by."""
    report_size(model)
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
