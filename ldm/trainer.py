"""The Lightning Trainer with this project's defaults under the config's `lightning` section."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf

from ldm import callbacks
from ldm.config import COMMAND_LINE, resolve
from ldm.loggers import MetricsCSV
from ldm.origin import Origin
from ldm.processor import multiplies_bfloat16
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, suggest

if TYPE_CHECKING:
    from ldm.training import Run

Config = dict[str, Any]
# callbacks of these names get these defaults, as in the official main.py
MAGIC = {
    "metrics_over_trainsteps_checkpoint": {
        "target": "lightning.pytorch.callbacks.ModelCheckpoint",
        "params": {
            "filename": "{epoch:06}-{step:09}",
            "save_top_k": -1,
            "every_n_train_steps": 10000,
            "save_weights_only": True,
        },
    },
    "evaluate": {"target": "ldm.evaluation.callback.Evaluate", "params": {}},
}
# a monitored metric with one of these in its name is better when it is higher
RISING = ("acc", "top1", "top5", "miou", "psnr", "ssim")
RISING += ("agreement", "precision", "recall", "density", "coverage", "diversity")


def build_trainer(run: Run, model: pl.LightningModule, data: pl.LightningDataModule, project: str) -> pl.Trainer:
    """The Trainer of a run: loggers, checkpoints and callbacks from the config over the defaults.

    Args:
        project: YAML text of the merged config without `lightning`, kept in the run directory and the checkpoints.
    """
    config = resolve(run.merged, run.merged.config.lightning, "lightning")
    params = trainer_params(run, config)
    config = {**config, "trainer": params}  # a run that goes on elsewhere keeps its precision
    for key in ("logger", "callbacks", "plugins"):
        if isinstance(params.get(key), (dict, list)):
            raise UserError(f"lightning.trainer.{key}: give lightning.{key} instead")
    plain = OmegaConf.to_yaml(OmegaConf.create({"lightning": config}))
    hyper_parameters = OmegaConf.to_container(OmegaConf.create(project).model.get("params") or OmegaConf.create())
    directory = callbacks.RunDirectory(run.logdir, run.now, project, plain, hyper_parameters=hyper_parameters)
    return make_trainer(
        {
            "default_root_dir": str(run.logdir),
            "use_distributed_sampler": False,  # the data module shards and remembers its place itself
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
            "max_epochs": 1000 if params.get("max_steps", -1) in (-1, None) else -1,
            **params,
            "logger": build_loggers(run, config.get("logger"), params),
            "callbacks": build_callbacks(run, config, model, data, directory),
            "plugins": [callbacks.AtomicCheckpointIO()],
        }
    )


def trainer_params(run: Run, config: Config) -> Config:
    """The config's `trainer`; on a processor that is slow at bfloat16, what a file asks of it is done in float32.

    A flag is obeyed, and a run that is resumed keeps its precision.
    """
    params = dict(config.get("trainer") or {})
    accelerator = params.get("accelerator") or "auto"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if params.get("precision") != "bf16-mixed" or not on_cpu or multiplies_bfloat16():
        return params
    slow = "this processor, without AVX-512, is some ten times as slow in bf16-mixed as in 32-true"
    where = run.merged.where("lightning.trainer.precision")
    if where == COMMAND_LINE or run.resume is not None:
        rank_zero_info(f"{slow}: --precision 32-true is faster here")
        return params
    rank_zero_info(f"precision 32-true instead of bf16-mixed ({where}): {slow}; --precision bf16-mixed asks for it")
    return {**params, "precision": "32-true"}


def make_trainer(params: Config) -> pl.Trainer:
    """A Trainer with these arguments.

    Raises:
        UserError: they do not go together, or ask for devices that are not there.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pl.Trainer(**_for_strategy(params))
        except (MisconfigurationException, TypeError, ValueError) as e:
            raise UserError(f"lightning.trainer: {' '.join(str(e).split())}") from e


def _for_strategy(params: Config) -> Config:
    strategy = params.get("strategy")
    if isinstance(strategy, dict):
        params["strategy"] = instantiate_from_config(strategy)
    return params


def build_loggers(run: Run, config: Config | None, params: Config) -> list[Any] | bool:
    """metrics.csv and TensorBoard always, wandb on request, and what the config names."""
    if params.get("logger") is False:
        return False
    loggers: list[Any] = [MetricsCSV(run.logdir)]
    target = (config or {}).get("target", "lightning.pytorch.loggers.TensorBoardLogger")
    given = dict((config or {}).get("params") or {})
    cls = get_obj_from_str(target)
    if issubclass(cls, pl.loggers.TensorBoardLogger):
        defaults: Config = {"save_dir": str(run.logdir), "name": "tensorboard", "version": ""}
    elif issubclass(cls, pl.loggers.WandbLogger):
        defaults = wandb_defaults(run)
    else:
        defaults = {"save_dir": str(run.logdir)}
    loggers.append(instantiate_from_config({"target": target, "params": {**defaults, **given}}))
    if run.args.wandb and not issubclass(cls, pl.loggers.WandbLogger):
        target = "lightning.pytorch.loggers.WandbLogger"
        loggers.append(instantiate_from_config({"target": target, "params": wandb_defaults(run)}))
    return loggers


def wandb_defaults(run: Run) -> Config:
    defaults: Config = {
        "name": run.logdir.name,
        "id": run.logdir.name,
        "save_dir": str(run.logdir),
        "offline": run.args.debug,
    }
    if run.args.project:
        defaults["project"] = run.args.project
    return defaults


def build_callbacks(
    run: Run, config: Config, model: pl.LightningModule, data: pl.LightningDataModule, directory: callbacks.RunDirectory
) -> list[Callback]:
    """The default callbacks, changed and extended by `lightning.callbacks` (name -> {target, params})."""
    defaults: dict[str, Config] = {
        "image_logger": {
            "target": "ldm.callbacks.ImageLogger",
            "params": {"batch_frequency": 750, "max_images": 4, "clamp": True},
        },
        "learning_rate_logger": {
            "target": "lightning.pytorch.callbacks.LearningRateMonitor",
            "params": {"logging_interval": "step"},
        },
        "cuda_callback": {"target": "ldm.callbacks.Throughput", "params": {}},
    }
    given: dict[str, Config] = dict(config.get("callbacks") or {})
    for fixed in ("setup_callback", "checkpoint_callback"):
        given.pop(fixed, None)
    if run.resume is None:
        given.pop("ignore_keys_callback", None)
    built: list[Callback] = [
        callbacks.NaNGuard(),
        callbacks.StepSeed(run.args.seed),
        callbacks.Signals(directory),
        Origin(getattr(run.args, "argv", []), getattr(run.args, "base", [])),
        directory,
    ]
    for name in [*defaults, *(n for n in given if n not in defaults)]:
        base, over = defaults.get(name) or MAGIC.get(name) or {}, given.get(name) or {}
        params = {**(base.get("params") or {}), **(over.get("params") or {})}
        entry = {"target": over.get("target", base.get("target")), "params": params}
        if entry["target"] is None:
            raise UserError(f"lightning.callbacks.{name} has no target{suggest(name, [*defaults, *MAGIC])}")
        if name == "metrics_over_trainsteps_checkpoint":
            entry["params"].setdefault("dirpath", str(run.logdir / "checkpoints" / "trainstep_checkpoints"))
        if name == "learning_rate_logger" and (config.get("trainer") or {}).get("logger") is False:
            continue
        built.append(instantiate_from_config(entry))
    built.append(build_model_checkpoint(run, config, model, data, directory))
    if (config.get("trainer") or {}).get("enable_progress_bar") is not False:
        built.append(callbacks.StepProgress())
    return built


def build_model_checkpoint(
    run: Run, config: Config, model: pl.LightningModule, data: pl.LightningDataModule, directory: callbacks.RunDirectory
) -> Callback:
    """Keeps the best checkpoint by `model.monitor` (or the newest without one); `last.ckpt` is RunDirectory's."""
    entry = dict(config.get("modelcheckpoint") or {})
    params: Config = dict(entry.get("params") or {})
    target = entry.get("target", "lightning.pytorch.callbacks.ModelCheckpoint")
    monitor = params.pop("monitor", None) or getattr(model, "monitor", None)
    if monitor and monitor.startswith("val/") and not getattr(data, "has_validation", True):
        rank_zero_info(f"no validation set: {monitor} is never logged, so the newest checkpoint is kept, not the best")
        monitor = None
    params.pop("save_last", None)
    steps = params.get("every_n_train_steps")
    if steps:
        directory.every_n_steps = int(steps)
        if monitor:  # a validation metric is not there at every training step
            params.pop("every_n_train_steps")
    params.setdefault("dirpath", str(run.logdir / "checkpoints"))
    params.setdefault("filename", "{epoch:06}")
    params.setdefault("save_top_k", 1 if monitor else 0)
    if monitor:
        params.update(monitor=monitor)
        params.setdefault("mode", "max" if any(w in monitor for w in RISING) else "min")
    cls = get_obj_from_str(target)
    if not issubclass(cls, ModelCheckpoint):
        raise UserError(f"lightning.modelcheckpoint.target must be a ModelCheckpoint, got {target}")
    return (
        MonitoredCheckpoint(**params)
        if cls is ModelCheckpoint
        else instantiate_from_config({"target": target, "params": params})
    )


class MonitoredCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that says at the first validation when its metric is never logged."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor and not trainer.sanity_checking and self.monitor not in trainer.callback_metrics:
            logged = sorted(trainer.callback_metrics)
            path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(path)
            raise UserError(
                f"the monitored metric {self.monitor} was not logged{suggest(self.monitor, logged)}; "
                f"logged: {', '.join(logged)}. "
                f"Set model.params.monitor (or lightning.modelcheckpoint.params.monitor); the run is saved in {path}"
            )
        super().on_validation_end(trainer, pl_module)
