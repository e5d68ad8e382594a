"""What every recipe shares: reading a batch, optimiser and scheduler, EMA, logging, weights to start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.framework import Module, rank_zero_info
from ldm.models.param_groups import by_role, tables
from ldm.modules.ema import LitEma
from ldm.optim import HiddenAndRest, muon_for_this_processor
from ldm.util import UserError, accepted_params, class_of, instantiate_from_config

Config = dict[str, Any]
DEFAULT_OPTIMIZER = {"target": "torch.optim.AdamW"}


class BaseModel(Module):
    """A recipe. Subclasses write `loss` and `log_images`, generative ones also `sample` and `condition`.

    Args:
        monitor: logged metric that decides which checkpoint is the best one (`val/loss`, ...); None keeps the last.
        ckpt_path: weights to start from.
        ignore_keys: prefixes of state-dict keys not to read from `ckpt_path`.
        optimizer_config: `{target: torch.optim.X, params: {...}}` without the learning rate; None is AdamW.
        scheduler_config: `{target, params}`: an official lambda scheduler (`ldm.lr_scheduler.*`) or any
            `torch.optim.lr_scheduler` class, stepped after every update.
        compile: True or a `torch.compile` mode: compiles `networks()` in place, so that no key changes its name.

    main.py sets `learning_rate` before the optimiser is built.
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        optimizer_config: Config | None = None,
        scheduler_config: Config | None = None,
        compile: bool | str = False,  # noqa: A002  (the field's name for it)
    ) -> None:
        super().__init__()
        if monitor is not None:
            self.monitor = monitor
        self.learning_rate = 1e-4
        self.class_names: list[str] | None = None
        self.optimizer_config, self.scheduler_config = optimizer_config, scheduler_config
        self.compile_mode = compile
        self._ckpt_path, self._ignore_keys = ckpt_path, tuple(ignore_keys)

    # --- what a recipe fills in ---------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """batch -> (scalar to minimise, named scalars to log without the split's prefix)."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss(batch)")

    def log_images(self, batch: dict[str, Any], n: int = 8, **kwargs: Any) -> dict[str, Tensor]:
        """batch -> name -> pictures [B, C, H, W] in [-1, 1]."""
        return {}

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> dict[str, Any] | None:
        """What `sample` takes as its condition, one entry per seed; this one is for unconditional models.

        Raises:
            UserError: a class or a prompt was given to a model that knows neither.
        """
        for name, value in (("class", classes), ("prompt", prompts), ("negative prompt", negative_prompt)):
            if value is not None:
                raise UserError(f"{type(self).__name__} was trained without conditions: it takes no {name}")
        return None

    def networks(self) -> list[nn.Module]:
        """The networks worth compiling."""
        return [self.model] if isinstance(getattr(self, "model", None), nn.Module) else []

    # --- batch --------------------------------------------------------------------------------------------------------

    def get_input(self, batch: dict[str, Any], key: str) -> Tensor:
        """`batch[key]` [B, H, W, C] or [B, H, W] in [-1, 1] -> [B, C, H, W] float32, channels-last in memory."""
        if key not in batch:
            raise UserError(
                f"the batch has no key {key!r}; the data set gives {sorted(batch)} (model.params.first_stage_key)"
            )
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).to(memory_format=torch.channels_last, dtype=torch.float32)

    # --- EMA ----------------------------------------------------------------------------------------------------------

    def init_ema(self, module: nn.Module, decay: float = 0.9999, rampup: float | None = None) -> None:
        """Keeps an average of `module`'s trained weights as `model_ema` (official key names); see `LitEma`."""
        self.model_ema = LitEma(module, decay=decay, rampup=rampup)
        # a list hides the module from nn.Module, which would otherwise register it (and its keys) twice
        self._ema_source = [module]

    @property
    def use_ema(self) -> bool:
        return hasattr(self, "model_ema")

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Averaged weights inside the block, trained weights after it, whatever happens inside."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.swapped(self._ema_source[0]):
            yield

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_ema()

    def update_ema(self) -> None:
        """Moves the average by one update. Recipes with manual optimisation call it after their generator's step."""
        if self.use_ema:
            self.model_ema(self._ema_source[0])

    # --- steps --------------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The official name of `loss`."""
        return self.loss(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, logs = self.shared_step(batch)
        self.log_dict({self.log_name("train", k): v.detach() for k, v in logs.items()}, batch_size=self._size(batch))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        _, logs = self.shared_step(batch)
        if self.use_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch)
            logs = {**logs, **{f"{k}_ema": v for k, v in averaged.items()}}
        logs = {self.log_name(split, k): v for k, v in logs.items()}
        self.log_dict(logs, batch_size=self._size(batch), sync_dist=True)

    def log_name(self, split: str, name: str) -> str:
        """`split/name`, whether or not the name has a split already, as those of official `shared_step`s do."""
        return f"{split}/{name.rpartition('/')[2]}"

    @staticmethod
    def _size(batch: dict[str, Any]) -> int:
        return len(next(iter(batch.values())))

    # --- optimiser ----------------------------------------------------------------------------------------------------

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer(self.trained_parameters())
        scheduler = self.build_scheduler(optimizer)
        return ([optimizer], [scheduler]) if scheduler else optimizer

    def build_optimizer(self, params: Any, key: str = "optimizer_config") -> torch.optim.Optimizer:
        """The one under `key`, else `optimizer_config` (default AdamW), over `params` or groups, at `learning_rate`."""
        key = key if getattr(self, key) else "optimizer_config"
        config = getattr(self, key) or DEFAULT_OPTIMIZER
        cls = class_of(config, f"model.params.{key}")
        params = list(params)
        if cls is HiddenAndRest and not isinstance(params[0], dict):
            params = by_role(self, params)
        if "fallback_lr_scale" in (accepted_params(cls) or {}):
            params = self._tables_apart(params)
        return muon_for_this_processor(instantiate_from_config(config, params=params, lr=self.learning_rate))

    def _tables_apart(self, params: Any) -> Any:
        """For Muon of timm, which orthogonalises matrices: the rows of an embedding are none, AdamW has them."""
        params = list(params)
        apart = tables(self)
        parts = [p for p in params if id(p) not in apart], [p for p in params if id(p) in apart]
        return [{"params": parts[0]}, {"params": parts[1], "use_fallback": True}] if parts[1] else params

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """A Lightning scheduler entry that steps once per update, or None."""
        if not self.scheduler_config:
            return None
        cls = class_of(self.scheduler_config, "model.params.scheduler_config")
        if issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
            scheduler = instantiate_from_config(self.scheduler_config, optimizer=optimizer)
        else:
            factor = instantiate_from_config(self.scheduler_config).schedule
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
        return {"scheduler": scheduler, "interval": "step", "frequency": 1}

    def on_train_start(self) -> None:
        """A learning rate changed on resuming counts: the restored optimiser and scheduler are scaled to it."""
        saved = getattr(self, "_saved_learning_rate", None)
        if not saved or saved == self.learning_rate:
            return
        ratio = self.learning_rate / saved
        rank_zero_info(f"learning rate {saved:.3e} of the checkpoint -> {self.learning_rate:.3e}")
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= ratio
                if "initial_lr" in group:
                    group["initial_lr"] *= ratio
        for entry in self.trainer.lr_scheduler_configs:
            entry.scheduler.base_lrs = [lr * ratio for lr in entry.scheduler.base_lrs]
        self._saved_learning_rate = None

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_ckpt_path(self) -> None:
        """Reads `ckpt_path`; a subclass calls it at the end of its constructor."""
        if self._ckpt_path is not None:
            self.init_from_ckpt(self._ckpt_path, self._ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Loads a checkpoint file, leaving out keys that start with one of `ignore_keys`."""
        from ldm import checkpoint

        state = checkpoint.read_state(path)
        state = {k: v for k, v in state.items() if not k.startswith(tuple(ignore_keys))}
        report = checkpoint.load(self, state, source=path, allow=tuple(ignore_keys))
        rank_zero_info(f"{path}: {report}")

    def configure_model(self) -> None:
        """Called by the Trainer once the module is where it will run."""
        for module in self.networks():
            module.to(memory_format=torch.channels_last)
            if self.compile_mode:
                mode = self.compile_mode if isinstance(self.compile_mode, str) else None
                module.compile(mode=mode)
        self.compile_mode = False  # fit, validate and test all call this hook; once is enough

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        checkpoint["learning_rate"] = self.learning_rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.class_names = checkpoint.get("class_names")
        self._saved_learning_rate = checkpoint.get("learning_rate")
