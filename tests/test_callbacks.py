"""Pictures at the right steps, the same randomness at the same step, NaN named."""

from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks import ImageLogger, NaNGuard, StepSeed, peak_memory_mib
from ldm.util import UserError


def steps(logger, upto):
    return [s for s in range(upto + 1) if logger.due(s)]


@pytest.mark.smoke
def test_image_logger_is_due_at_its_frequency_and_at_powers_of_two_before():
    assert steps(ImageLogger(batch_frequency=10), 32) == [1, 2, 4, 8, 10, 20, 30]
    assert steps(ImageLogger(batch_frequency=5, increase_log_steps=False), 20) == [5, 10, 15, 20]
    assert steps(ImageLogger(batch_frequency=5, increase_log_steps=False, log_first_step=True), 5) == [0, 5]


def trainer(step, rank=0, world=1):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=step))
    return SimpleNamespace(fit_loop=loop, world_size=world, global_rank=rank)


def draw(seed, step, rank=0, world=1):
    StepSeed(seed).on_train_batch_start(trainer(step, rank, world), None, None, 0)
    return torch.rand(3).tolist()


@pytest.mark.smoke
def test_randomness_is_a_function_of_seed_step_and_rank():
    assert draw(1, 5) == draw(1, 5)
    streams = [draw(1, 5), draw(1, 6), draw(2, 5), draw(1, 5, 1, 2), draw(1, 6, 0, 2)]
    assert len({tuple(s) for s in streams}) == len(streams)


def test_every_validation_draws_the_same():
    callback = StepSeed(3)
    callback.on_validation_start(None, None)
    first = torch.rand(3).tolist()
    torch.rand(10)
    callback.on_validation_start(None, None)
    assert torch.rand(3).tolist() == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_guard_names_step_and_batch(bad):
    guard = NaNGuard()
    guard.on_train_batch_end(SimpleNamespace(global_step=1), None, {"loss": torch.tensor(1.0)}, None, 0)
    with pytest.raises(UserError, match="step 42, batch 7"):
        guard.on_train_batch_end(SimpleNamespace(global_step=42), None, {"loss": torch.tensor(bad)}, None, 7)


def test_peak_memory_of_the_process():
    assert peak_memory_mib(torch.device("cpu")) > 100
