"""From parsed arguments to a trained and tested model: config, run directory, objects, Trainer."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import pdb
import shutil
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero as rank_zero_module
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf

from ldm import checkpoint, legacy
from ldm.config import Merged, fill_auto, resolve
from ldm.util import ConfigError, UserError, instantiate_from_config, suggest, trust

RUN_VARIABLE = "LDM_RUN_DIRECTORY"  # tells the processes that Lightning starts for DDP where the first one writes


@dataclass
class Run:
    """Everything `train` needs.

    Attributes:
        merged: the config and where its values came from.
        logdir: the run directory.
        resume: checkpoint to go on with, or None.
    """

    merged: Merged
    logdir: Path
    resume: Path | None = None
    now: str = ""
    args: argparse.Namespace = field(default_factory=argparse.Namespace)


def start(args: argparse.Namespace, extra: list[str]) -> None:
    """Reads the config, then prints, tries or trains it."""
    trust(args.trust)
    quieten()
    run = prepare(args, extra)
    if args.print_config:
        sys.stdout.write(run.merged.to_yaml_with_sources() + "\n")
        return
    try:
        if args.dry_run:
            from ldm.dry_run import dry_run

            dry_run(run)
        else:
            train(run)
    except ConfigError as e:
        raise run.merged.explain(e) from e
    except UserError:
        raise
    except Exception:
        if args.debug and sys.stdin.isatty() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            traceback.print_exc()
            pdb.post_mortem()
        raise
    finally:
        if args.debug and run.resume is None and run.logdir.is_dir():
            target = run.logdir.parent / "debug_runs" / run.logdir.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(run.logdir, target)


_NOISE = ("GPU available", "TPU available", "HPU available", "💡", "`", "Restoring states", "Restored all")


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


def quieten() -> None:
    """Leaves out what Lightning says of hardware that is not there and of products, and warnings about itself."""
    warnings.filterwarnings("ignore", module="lightning")
    for name in (rank_zero_module.__name__, "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(_worth_saying)


# --- config -----------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, extra: list[str]) -> Run:
    """Merges files, dotlist and Trainer flags; finds or names the run directory (it is made later).

    Raises:
        UserError: unknown flag or key, missing file, `-n` with `-r`.
    """
    dotlist, flags = split_extra(extra)
    # -b takes all words up to the next flag: those that are no file but key=value belong to the dotlist
    dotlist = [b for b in args.base if "=" in b and not Path(b).exists()] + dotlist
    args.base = [b for b in args.base if b not in dotlist]
    resume_path = args.resume or flags.pop("resume_from_checkpoint", "")
    if args.name and args.resume:
        raise UserError(
            "-n and -r cannot go together: a resumed run keeps its name; to start from weights use --init-from"
        )
    merged, resume = Merged(), None
    if resume_path:
        logdir, resume = checkpoint.find_run(resume_path)
        for path in sorted((logdir / "configs").glob("*.yaml")):
            merged.add_file(path)
    for path in args.base:
        merged.add_file(path)
    merged.add_dotlist(dotlist)
    if args.allow_head:
        merged.add_dotlist(["model.params.allow_head=true"])
    for key, value in flags.items():
        merged.add_dotlist([f"lightning.trainer.{key}={value}"])
    merged.check()
    translate(merged)
    check_trainer_keys(merged)
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if not resume_path:
        logdir = name_run(args, now)
    return Run(merged, logdir, resume, now, args)


def split_extra(extra: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments that argparse does not know -> (dotlist items, Trainer flags)."""
    dotlist, flags, rest = [], {}, list(extra)
    while rest:
        item = rest.pop(0)
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            if "." in name:
                raise UserError(
                    f"{item}: config values are given without dashes: {name}={value or (rest[:1] or ['VALUE'])[0]}"
                )
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") and "=" not in rest[0] else "true"
            name = name.replace("-", "_")
            check_flag(name)
            flags[name] = value
        elif "=" in item and not item.startswith("-"):
            dotlist.append(item)
        else:
            raise UserError(
                f"unknown argument {item!r}: expected key.path=value or --flag value (python main.py --help)"
            )
    return dotlist, flags


def trainer_keys() -> set[str]:
    import inspect

    return set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}


def check_flag(name: str) -> None:
    from main import build_parser

    known = trainer_keys() | legacy.TRAINER_KEYS
    if name not in known:
        own = {o.lstrip("-") for a in build_parser()._actions for o in a.option_strings}
        raise UserError(
            f"unknown flag --{name}{suggest(name, known | own)}: neither main.py nor lightning.Trainer has it"
        )


def translate(merged: Merged) -> None:
    """Old trainer and logger names to today's, each change said once."""
    lightning = merged.config.setdefault("lightning", OmegaConf.create({}))
    trainer = lightning.setdefault("trainer", OmegaConf.create({}))
    before = {k: merged.where(f"lightning.trainer.{k}") for k in trainer}
    changes = legacy.translate_trainer(trainer)
    if lightning.get("strategy") is not None and "strategy" not in trainer:
        trainer["strategy"] = lightning.strategy
    if lightning.get("logger"):
        changes += legacy.translate_logger(lightning.logger)
    for key in trainer:
        merged.source.setdefault(f"lightning.trainer.{key}", next(iter(before.values()), "translated"))
    for change in changes:
        rank_zero_info(f"translated: {change}")


def check_trainer_keys(merged: Merged) -> None:
    known = trainer_keys()
    for key in merged.config.lightning.trainer:
        if key not in known:
            full = f"lightning.trainer.{key}"
            raise UserError(f"unknown key {full}{suggest(str(key), known)} in {merged.where(full)}")


def name_run(args: argparse.Namespace, now: str) -> Path:
    """`<logdir>/<now>_<name><postfix>`, with a number behind it if another run took the name in the same second."""
    if os.environ.get(RUN_VARIABLE) and os.environ.get("LOCAL_RANK"):
        return Path(os.environ[RUN_VARIABLE])
    name = args.name or Path(args.base[0]).stem
    wanted = Path(args.logdir) / f"{now}_{name}{args.postfix}"
    if args.print_config or args.dry_run:
        return wanted
    for number in range(1, 1000):
        logdir = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            logdir.mkdir(parents=True)  # fails when it is there: two runs of one second never share a directory
        except FileExistsError:
            continue
        except OSError as e:
            raise UserError(
                f"cannot make the run directory {logdir}: {e.strerror}; choose another place with -l"
            ) from e
        os.environ[RUN_VARIABLE] = str(logdir)
        return logdir
    raise UserError(f"{args.logdir} holds 999 runs of this second and name: choose another name with -n")


# --- objects ----------------------------------------------------------------------------------------------------------


def build_data(run: Run) -> tuple[pl.LightningDataModule, dict[str, Any]]:
    """The data module, read far enough to know classes and sizes, and its plain config."""
    config = resolve(run.merged, run.merged.config.data, "data")
    data = instantiate_from_config(config)
    if hasattr(data, "seed"):
        data.seed = run.args.seed
    data.prepare_data()
    data.setup("fit" if run.args.train else "test")
    return data, config


def build_model(run: Run, data: pl.LightningDataModule | None) -> tuple[pl.LightningModule, dict[str, Any]]:
    """The model, with values `auto` taken from the data and the first stage, and its plain config."""
    config = model_config(run, data)
    build = {k: config[k] for k in ("target", "params") if k in config}
    if run.resume is not None and (build.get("params") or {}).get("weights"):
        from ldm.models.pretrained import without_source

        build["params"] = without_source(build["params"])  # what the run started from may be gone
    model = instantiate_from_config(build)
    model.class_names = getattr(data, "class_names", None)
    inline_first_stage(config)
    return model, config


def model_config(run: Run, data: pl.LightningDataModule | None) -> dict[str, Any]:
    """The plain config of the model, its values `auto` filled in."""
    config = resolve(run.merged, run.merged.config.model, "model")
    lines = fill_auto(config, lambda name: latent_shape(config, data).get(name, getattr(data, name, None)), "model")
    for line in dict.fromkeys(lines):
        rank_zero_info(line)
    return config


def first_stage_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """{target, params} of a latent model's first stage, also where it is given as a run directory or checkpoint."""
    stage = (config.get("params") or {}).get("first_stage_config")
    if not isinstance(stage, str):
        return stage
    if stage.startswith("__"):
        return None
    from ldm.generate import run_config, without_weights

    run, _ = checkpoint.find_run(stage)
    return without_weights(run_config(run, checkpoint.read(checkpoint.find_best(stage)))["model"])


def latent_shape(config: dict[str, Any], data: pl.LightningDataModule | None) -> dict[str, Any]:
    """What `auto` means in a latent model: the first stage's channels, and the data's size through it.

    Raises:
        UserError: the pictures' size is no multiple of the first stage's factor.
    """
    params = (first_stage_config(config) or {}).get("params") or {}
    if not {"embed_dim", "ddconfig"} <= set(params):
        return {}
    found = dict.fromkeys(("channels", "in_channels", "out_channels"), params["embed_dim"])
    halvings = len(params["ddconfig"].get("ch_mult", (1, 2, 4, 8))) - 1
    factor, size = params["ddconfig"].get("patch_size", 1) * 2**halvings, getattr(data, "size", None)
    if size is None:
        return found
    sides = [size, size] if isinstance(size, int) else list(size)
    if any(side % factor for side in sides):
        raise UserError(f"data.params.size: got {size}, expected a multiple of {factor}, as the first stage needs")
    latent = [side // factor for side in sides]
    return {**found, "image_size": latent[0] if isinstance(size, int) else latent}


def inline_first_stage(config: dict[str, Any]) -> None:
    """Replaces a first stage given as a path by that run's config: the weights are in this run's checkpoints."""
    params = config.get("params") or {}
    if isinstance(params.get("first_stage_config"), str) and (first := first_stage_config(config)) is not None:
        own = first.get("params") or {}
        own |= {"lossconfig": {"target": "torch.nn.Identity"}} if "lossconfig" in own else {}
        own |= {"use_ema": False} if "use_ema" in own else {}  # the averaged weights are the weights now
        params["first_stage_config"] = {"target": first["target"], "params": own}


def set_learning_rate(run: Run, model: pl.LightningModule, config: dict[str, Any], trainer: pl.Trainer) -> None:
    """`learning_rate` as written; `base_learning_rate` times accumulation, GPUs and batch size (official rule)."""
    if config.get("learning_rate") is not None:
        model.learning_rate = float(config["learning_rate"])
        rank_zero_info(f"learning rate {model.learning_rate:.3e} (model.learning_rate, used as written)")
        return
    base = config.get("base_learning_rate")
    if base is None:
        raise UserError("model.learning_rate is missing: set it, or model.base_learning_rate to have it scaled")
    batch = int(run.merged.config.data.params.get("batch_size", 1))
    accumulate = trainer.accumulate_grad_batches or 1
    gpus = 1 if trainer.strategy.root_device.type == "cpu" else trainer.num_devices
    if run.args.scale_lr:
        model.learning_rate = accumulate * gpus * batch * float(base)
        rank_zero_info(
            f"learning rate {model.learning_rate:.2e} = {accumulate} (accumulate_grad_batches) * {gpus} (gpus) * "
            f"{batch} (batch_size) * {float(base):.2e} (base_learning_rate)"
        )
    else:
        model.learning_rate = float(base)
        rank_zero_info(f"learning rate {model.learning_rate:.2e} (model.base_learning_rate, --scale_lr false)")


def yaml_of(node: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(node))


def train(run: Run) -> tuple[dict[str, float], dict[str, Any]]:
    """Seed, data, model, Trainer, fit, test. Returns (metrics, {model, data, trainer})."""
    from ldm.trainer import build_trainer

    pl.seed_everything(run.args.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    data, data_config = build_data(run)
    model, model_config = build_model(run, data)
    project = yaml_of({"model": model_config, "data": data_config})
    trainer = build_trainer(run, model, data, project)
    set_learning_rate(run, model, model_config, trainer)
    if run.args.init_from:
        state = checkpoint.read_state(run.args.init_from)
        rank_zero_info(
            f"--init-from {run.args.init_from}: "
            + checkpoint.load(model, state, source=run.args.init_from, partial=run.args.allow_partial)
        )
    metrics: dict[str, float] = {}
    if run.args.train:
        announce(run, trainer, model)
        trainer.fit(model, data, ckpt_path=trainer_checkpoint(run.resume))
        metrics.update(trainer.callback_metrics)
        rank_zero_info(f"done: {trainer.global_step} steps; run directory {run.logdir}")
    if not run.args.no_test:
        metrics.update(test(run, trainer, model, data))
    return {k: float(v) for k, v in metrics.items()}, {"model": model, "data": data, "trainer": trainer}


def trainer_checkpoint(path: Path | None) -> str | None:
    """The path, if the file can be resumed from.

    Raises:
        UserError: it holds weights only.
    """
    if path is None:
        return None
    content = checkpoint.read(path)
    if "loops" not in content or "optimizer_states" not in content:
        raise UserError(f"{path} holds weights but no trainer state: start from them with --init-from {path}")
    rank_zero_info(f"resumed from {path} at step {content.get('global_step', 0)}")
    return str(path)


def announce(run: Run, trainer: pl.Trainer, model: pl.LightningModule) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    rank_zero_info(f"{type(model).__name__}: {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained")
    if trainer.max_steps < 0 and not trainer.max_epochs:
        rank_zero_info("no lightning.trainer.max_steps or max_epochs is set: training goes on for 1000 epochs")
    rank_zero_info(f"run directory {run.logdir}")


def test(run: Run, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """Tests on the test set, if there is one."""
    data.setup("test")
    if not getattr(data, "has_test", True):
        if not run.args.train:
            raise UserError("nothing to do: no -t, and the config has no data.params.test to test on")
        rank_zero_info("no test set (data.params.test): testing is left out")
        return {}
    path = None
    if not run.args.train:
        if run.resume is None:
            raise UserError("testing needs weights: -r logs/<run> (or -t to train first)")
        path = str(run.resume)
    trainer.test(model, data, ckpt_path=path, verbose=True)
    return dict(trainer.callback_metrics)
