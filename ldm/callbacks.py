"""What happens around training: run directory, pictures, progress, speed, NaN guard, signals, random state."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from tqdm import tqdm

from ldm import checkpoint as ckpt
from ldm.util import UserError, image_grid, to_pil


class RunDirectory(Callback):
    """Writes `configs/<now>-project.yaml` and `-lightning.yaml` at the start and keeps the config in every checkpoint.

    Args:
        logdir: the run directory.
        now: time stamp that names the files.
        project: YAML text of the merged config without `lightning`.
        lightning: YAML text of the `lightning` section.
        every_n_steps: `checkpoints/last.ckpt` is written so often, after a validation when 30 s have passed since,
            and at the end.
        hyper_parameters: `model.params` as plain values, kept in every checkpoint under Lightning's name for them.
    """

    def __init__(
        self,
        logdir: Path,
        now: str,
        project: str,
        lightning: str,
        every_n_steps: int = 1000,
        hyper_parameters: dict[str, Any] | None = None,
    ) -> None:
        self.logdir, self.now, self.project, self.lightning = Path(logdir), now, project, lightning
        self.every_n_steps, self.saved_step, self.saved_time = every_n_steps, -1, time.monotonic()
        self.hyper_parameters = hyper_parameters or {}

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, text in (("project", self.project), ("lightning", self.lightning)):
            path = self.logdir / "configs" / f"{self.now}-{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.project + self.lightning
        checkpoint["hyper_parameters"] = self.hyper_parameters

    def save(self, trainer: pl.Trainer) -> Path:
        """Writes `checkpoints/last.ckpt` now."""
        path = self.logdir / "checkpoints" / "last.ckpt"
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(path)
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        return path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # every process has to come to the same decision, since all of them take part in saving
        if trainer.world_size == 1 and time.monotonic() - self.saved_time > 30 and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)


class StepSeed(Callback):
    """Makes the randomness of a step a function of (seed, step, rank): a resumed run draws what the straight one drew.

    Every validation draws the same noise, so that its losses can be compared.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        self._set(1 + step * trainer.world_size + trainer.global_rank)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(0)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(0)

    def _set(self, position: int) -> None:
        # 2654435761 (Knuth's multiplicative hash) keeps the streams of neighbouring seeds apart
        number = (self.seed * 2654435761 + position) % 2**63
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)


class ImageLogger(Callback):
    """Calls `log_images` and writes each result as a picture grid, to the disk and to every logger that takes pictures.

    Files: `images/{train,val}/<key>_gs-000000_e-000000_b-000000.png` (gs: global step, e: epoch, b: batch).

    Args:
        batch_frequency: every so many updates; also written once per run at its end.
        max_images: pictures of a grid at most.
        clamp: clip to [-1, 1] before writing.
        increase_log_steps: also at the updates 1, 2, 4, 8, ... below `batch_frequency`.
        rescale: kept for official YAMLs; pictures are always in [-1, 1].
        disabled: does nothing.
        log_on_batch_idx: counts batches of the epoch instead of updates.
        log_first_step: also before the first update.
        log_images_kwargs: passed to `log_images`.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.batch_freq, self.max_images, self.clamp = batch_frequency, max_images, clamp
        self.early = {2**n for n in range(int(math.log2(max(batch_frequency, 1))) + 1)} if increase_log_steps else set()
        self.disabled, self.log_on_batch_idx, self.log_first_step = (
            disabled or not max_images,
            log_on_batch_idx,
            log_first_step,
        )
        self.log_images_kwargs = log_images_kwargs or {}
        self._last = -1

    def due(self, step: int) -> bool:
        """True where pictures are to be written after update `step`."""
        return (step > 0 and step % self.batch_freq == 0) or step in self.early or (step == 0 and self.log_first_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch_idx if self.log_on_batch_idx else trainer.global_step
        last = trainer.global_step >= trainer.estimated_stepping_batches if trainer.max_steps > 0 else False
        if step != self._last and (self.due(step) or last):
            self._last = step
            self.write(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking and trainer.global_step > 0:
            self.write(trainer, pl_module, batch, batch_idx, "val")

    @rank_zero_only
    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        """Draws the pictures of one batch, with the random state left as it was found."""
        if self.disabled or not hasattr(pl_module, "log_images"):
            return
        was_training = pl_module.training
        pl_module.eval()
        devices = [pl_module.device.index] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), trainer.precision_plugin.forward_context():
            torch.manual_seed(0)  # the same noise each time, so that the pictures of a run can be compared
            images = pl_module.log_images(batch, self.max_images, **self.log_images_kwargs)
        pl_module.train(was_training)
        where = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        for key, x in images.items():
            self._save(trainer, split, key, x[: self.max_images] if x.shape[0] > 1 else x, where)

    def _save(self, trainer: pl.Trainer, split: str, key: str, x: Tensor, where: str) -> None:
        grid = image_grid(x.clamp(-1, 1) if self.clamp else x, nrow=4)
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(grid[None])[0].save(folder / f"{key}_{where}.png")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image(
                    f"{split}/{key}", (grid.clamp(-1, 1) + 1) / 2, global_step=trainer.global_step
                )
            elif hasattr(logger, "log_image"):
                logger.log_image(f"{split}/{key}", to_pil(grid[None]), step=trainer.global_step)


class Throughput(Callback):
    """Logs images per second and peak memory (MiB) once per epoch; checkpoints keep the seconds of training so far."""

    def __init__(self) -> None:
        self._start, self._images = time.perf_counter(), 0
        self._before = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Of training, validation and pictures included, over all resumptions."""
        return self._before + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = float(state_dict.get("seconds", 0.0))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before, self._began = self.seconds, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._images = time.perf_counter(), 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(next(iter(batch.values()))) if isinstance(batch, dict) else 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._start
        rate = trainer.world_size * self._images / max(seconds, 1e-9)
        pl_module.log_dict(
            {"images_per_second": rate, "memory_mib": peak_memory_mib(pl_module.device)}, rank_zero_only=True
        )


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of the device, or of the process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


class NaNGuard(Callback):
    """Stops at a loss that is not finite, naming step and batch, before it can reach a checkpoint.

    The value is read one step late, so that the device is never waited for.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, int, int] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.check(pl_module)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._previous = (torch.isfinite(loss.detach()).all(), trainer.global_step, batch_idx)
            if loss.device.type == "cpu":
                self.check(pl_module)

    def check(self, pl_module: pl.LightningModule) -> None:
        """Raises UserError if the last loss seen was not finite.

        Where that is a sum, the model may know better whose loss it was: its `check_finite` goes first.
        """
        if self._previous is not None:
            finite, step, batch = self._previous
            self._previous = None
            if not bool(finite):
                getattr(pl_module, "check_finite", lambda: None)()
                raise UserError(
                    f"the loss is not finite at step {step}, batch {batch}; the last good checkpoint is kept. Lower "
                    "model.learning_rate, or set lightning.trainer.gradient_clip_val=1 or precision=32-true"
                )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check(pl_module)


class Signals(Callback):
    """Ctrl-C and SIGTERM save and stop after the running step, SIGUSR1 saves and goes on.

    A second Ctrl-C stops at once. Signals that the platform lacks are left out.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.stop_signal, self._save, self._old = run, None, False, {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over from Lightning, which would end the run without saving."""
        for name, handler in (("SIGINT", self._stop), ("SIGTERM", self._stop), ("SIGUSR1", self._request_save)):
            number = getattr(signal, name, None)
            if number is not None and number not in self._old:
                self._old[number] = signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number
        os.write(2, b"\nstopping after this step; the run is saved (Ctrl-C again: stop at once)\n")

    def _request_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._act(trainer)
        elif trainer.global_step % 10 == 0:  # agreeing costs a wait for the devices
            decide = trainer.strategy.reduce_boolean_decision
            self._save = decide(self._save, all=False)
            if decide(self.stop_signal is not None, all=False):
                self.stop_signal = self.stop_signal or signal.SIGTERM  # it may have reached another process only
            self._act(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1 and not trainer.sanity_checking:
            self._act(trainer)

    def _act(self, trainer: pl.Trainer) -> None:
        if self._save or self.stop_signal is not None:
            self._save = False
            path = self.run.save(trainer)
            rank_zero_info(f"saved {path} at step {trainer.global_step}")
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal, self.run.logdir)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class Stopped(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, number: int, run: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on: python main.py -t -r {quote(str(run))}")
        self.exit_code = 128 + number


class StepProgress(ProgressBar):
    """One bar over the whole run: steps, time left, the loss. On a file it writes a line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero:
            return
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            total=None if math.isinf(total) else int(total),
            initial=trainer.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.3 if sys.stderr.isatty() else 10.0,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self._bar
        if bar is None or trainer.global_step <= bar.n:
            return
        if time.time() - bar.last_print_t >= bar.mininterval:
            shown = {k: f"{float(v):.4g}" for k, v in trainer.progress_bar_metrics.items()}
            loss = trainer.callback_metrics.get("train/loss")
            if loss is not None:
                shown["loss"] = f"{float(loss):.4f}"
            bar.set_postfix(shown, refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None and not trainer.sanity_checking:
            self._bar.set_description("validating", refresh=sys.stderr.isatty())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_description("training", refresh=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # the message that follows gets a line of its own

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place and moves them there, so that a killed run leaves whole files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            ckpt.save_atomic(checkpoint, path)
        except OSError as e:
            raise DiskFull(
                f"could not write {path}: {e.strerror or e}. The files written before are whole; free some space"
            ) from e

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ckpt.read(path)


class DiskFull(Exception):
    """A checkpoint could not be written."""

    exit_code = 1
