"""Two optimisers under Lightning: generator and discriminator, with what manual optimisation leaves to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.base import BaseModel, Config
from ldm.models.framework import rank_zero_info
from ldm.util import UserError

Losses = tuple[Tensor, dict[str, Tensor]]
PLAYERS = ("generator", "discriminator")


class AdversarialModel(BaseModel):
    """A recipe that trains a generator against a discriminator, by turns: one update of each per step.

    Subclasses write `generator_loss`, `discriminator_loss`, `generator_parameters` and `discriminator_parameters`.
    A step is one update of the generator: `max_steps`, `global_step`, schedulers, the average and `updates` (what
    `disc_start` counts) all mean that, however many optimisers and batches it takes.

    Args:
        accumulate: batches per update; what is left at the end of an epoch makes an update too.
        disc_steps: updates of the discriminator per update of the generator, each on batches of its own.
        lr_g_factor: learning rate of the generator as a multiple of the discriminator's, which is `learning_rate`: two
            time scales (Heusel et al. 2017).
        generator_optimizer_config: `{target, params}` of the generator's optimiser, if not that of both.
        clip: largest gradient norm, of the generator and of the discriminator apart; None for no limit.

    `accumulate_grad_batches` and `gradient_clip_val` of the Trainer, which Lightning refuses for two optimisers, are
    taken over as these two. Over several processes, plain `strategy: ddp` works.

    A loss that is not finite stops the run with a UserError that names the player, under a fp16 scaler too: scaling
    heals a gradient that has overflowed, never a loss.
    """

    loss_names = ("generator_loss", "discriminator_loss")  # what the two losses are logged as

    def __init__(
        self,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        disc_steps: int = 1,
        lr_g_factor: float = 1.0,
        generator_optimizer_config: Config | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        for name, value in (("accumulate", accumulate), ("disc_steps", disc_steps)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if lr_g_factor <= 0:
            raise ValueError(f"lr_g_factor: got {lr_g_factor}, expected a number over 0")
        self.automatic_optimization = False
        self.accumulate, self.clip, self.disc_steps, self.lr_g_factor = accumulate, clip, disc_steps, lr_g_factor
        self.generator_optimizer_config = generator_optimizer_config
        self.clip_algorithm: str | None = None
        self.updates = self.disc_updates = self._batch_idx = 0
        self._window: list[dict[str, Any]] = []
        self._last_loss: tuple[str, Tensor, str] | None = None  # player, loss, where

    # --- what a recipe fills in ---------------------------------------------------------------------------------------

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        """batch -> (scalar for the generator's parameters, logs without the split's prefix)."""
        raise NotImplementedError(f"{type(self).__name__} does not define generator_loss(batch)")

    def discriminator_loss(self, batch: dict[str, Any]) -> Losses:
        """batch -> (scalar for the discriminator's parameters, logs); the generator is to run without gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not define discriminator_loss(batch)")

    def generator_parameters(self) -> list[nn.Parameter]:
        """What the first optimiser holds."""
        raise NotImplementedError(f"{type(self).__name__} does not define generator_parameters()")

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """What the second optimiser holds; nothing = there is no second one, and no discriminator_loss."""
        raise NotImplementedError(f"{type(self).__name__} does not define discriminator_parameters()")

    def after_discriminator(self) -> None:
        """Called after each update of the discriminator."""

    # --- optimisers ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Any]:
        """Lightning calls this just before it would refuse the two Trainer settings below."""
        from lightning.pytorch.strategies import DDPStrategy

        trainer = self.trainer
        if isinstance(trainer.strategy, DDPStrategy):  # one network at a time is all that a backward pass ever uses
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if trainer.accumulate_grad_batches != 1:
            self.accumulate, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
            rank_zero_info(f"two optimisers: the model accumulates {self.accumulate} batches per update")
        if trainer.gradient_clip_val:
            self.clip, trainer.gradient_clip_val = float(trainer.gradient_clip_val), None
            self.clip_algorithm = trainer.gradient_clip_algorithm
            rank_zero_info(f"two optimisers: the model clips gradients at {self.clip}")
        return []

    def configure_optimizers(self) -> Any:
        optimizers = [self.build_optimizer(self.generator_parameters(), "generator_optimizer_config")]
        for group in optimizers[0].param_groups:
            group["lr"] *= self.lr_g_factor
        if others := self.discriminator_parameters():
            optimizers.append(self.build_optimizer(others))
        schedulers = [self.build_scheduler(o) for o in optimizers]
        return optimizers, [s for s in schedulers if s is not None]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.clip:  # here, since a fp16 scaler has taken its scale out of the gradients just before
            self.clip_gradients(optimizer, self.clip, self.clip_algorithm or "norm")

    # --- the step -----------------------------------------------------------------------------------------------------

    def _window_ends(self, batch_idx: int) -> bool:
        # not trainer.is_last_batch, which is wrong for the first batch after resuming at the end of an epoch
        return len(self._window) >= self.accumulate or batch_idx + 1 == self.trainer.num_training_batches

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._window.append(batch)
        self._batch_idx = batch_idx
        optimizers = self.optimizers()
        generator, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        plays = (self.disc_updates + 1) % self.disc_steps == 0  # the generator has its turn in this window
        total = torch.zeros((), device=self.device)
        if plays:
            total = self._backward("generator", self.generator_loss, batch, self.discriminator_parameters())
        if not self._window_ends(batch_idx):
            return total
        # all batches of one network before the next: a fp16 scaler may change its scale at every step
        window, self._window = self._window, []
        if plays:
            generator.step()
            generator.zero_grad(set_to_none=True)
        for discriminator in others:
            total = total + self._train_discriminator(discriminator, window)
        self.disc_updates += 1
        if plays:
            self._count_update()
        return total

    def _count_update(self) -> None:
        for scheduler in self._schedulers():
            scheduler.step()
        self.updates += 1
        self.update_ema()

    def _train_discriminator(self, discriminator: Any, window: Sequence[dict[str, Any]]) -> Tensor:
        frozen_ones = self.generator_parameters()
        losses = [self._backward("discriminator", self.discriminator_loss, b, frozen_ones) for b in window]
        # past Lightning's wrapper, which would count this as another step
        self.trainer.strategy.optimizer_step(discriminator.optimizer, lambda: None)
        discriminator.zero_grad(set_to_none=True)
        self.after_discriminator()
        return torch.stack(losses).sum()

    def _backward(
        self,
        player: str,
        loss_of: Callable[[dict[str, Any]], Losses],
        batch: dict[str, Any],
        others: list[nn.Parameter],
    ) -> Tensor:
        self.check_loss()
        with frozen(others):
            loss, logs = loss_of(batch)
            self._last_loss = (player, loss.detach(), f"step {self.updates}, batch {self._batch_idx}")
            if loss.device.type == "cpu":
                self.check_loss()  # before the backward pass: weights and statistics of the optimiser stay as they were
            self.manual_backward(loss / self.accumulate)
        size = self._size(batch)
        self.log(self.loss_names[PLAYERS.index(player)], loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{k}": v.detach() for k, v in logs.items()}, batch_size=size)
        return loss.detach()

    def check_loss(self) -> None:
        """Raises UserError if the last player's loss was not finite; on a GPU one turn late, so that nothing waits."""
        if self._last_loss is not None:
            (player, loss, where), self._last_loss = self._last_loss, None
            if not bool(loss.isfinite().all()):
                raise not_finite("the loss", f"{where}: the {player}'s")

    def check_finite(self) -> None:
        """Raises UserError for what was not finite in the last step, by its player's name."""
        self.check_loss()

    def _schedulers(self) -> Sequence[Any]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return ()
        return schedulers if isinstance(schedulers, list) else (schedulers,)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict[str, Any]) -> Losses:
        """The generator's loss, and the logs of both networks."""
        loss, logs = self.generator_loss(batch)
        _, more = self.discriminator_loss(batch) if self.discriminator_parameters() else (None, {})
        return loss, {**logs, **more}

    def loss(self, batch: dict[str, Any]) -> Losses:
        return self.shared_step(batch)

    # --- weights ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        super().on_save_checkpoint(checkpoint)
        checkpoint["updates"], checkpoint["disc_updates"] = self.updates, self.disc_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.updates = int(checkpoint.get("updates", checkpoint.get("global_step", 0)))
        self.disc_updates = int(checkpoint.get("disc_updates", self.updates * self.disc_steps))


def not_finite(what: str, where: str) -> UserError:
    """The error that stops a run."""
    return UserError(
        f"{what} is not finite at {where}; the last good checkpoint is kept. Lower model.learning_rate, or set "
        "lightning.trainer.gradient_clip_val=1 or precision=32-true"
    )


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters inside the block; those that had none before keep none after it."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
