"""The two-optimiser loop: what a step is, accumulation, clipping, schedules, precision, resuming."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from ldm.models.adversarial import AdversarialModel, frozen

SGD = {"target": "torch.optim.SGD"}


class Toy(AdversarialModel):
    """A generator that shifts its input, against a linear critic; batch statistics nowhere, so that sums add up."""

    def __init__(self, use_ema=False, **base):
        super().__init__(**{"optimizer_config": SGD, **base})
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
        self.learning_rate, self.calls = 0.1, []
        if use_ema:
            self.init_ema(self.generator, decay=0.5)

    def generator_parameters(self):
        return list(self.generator.parameters())

    def discriminator_parameters(self):
        return list(self.discriminator.parameters())

    def generator_loss(self, batch):
        self.calls.append(("generator", self.updates, self.discriminator.weight.requires_grad))
        loss = -self.discriminator(self.generator(batch["image"])).mean()
        return loss, {"g_loss": loss}

    def discriminator_loss(self, batch):
        self.calls.append(("discriminator", self.updates, self.generator.weight.requires_grad))
        with torch.no_grad():
            fake = self.generator(batch["image"])
        loss = (
            torch.relu(1 + self.discriminator(fake)).mean() + torch.relu(1 - self.discriminator(batch["image"])).mean()
        )
        return loss, {"disc_loss": loss}


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=64, period=64):
        self.x = torch.randn(period, 4, generator=torch.Generator().manual_seed(1)).repeat(n // period + 1, 1)[:n]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": self.x[i]}


def loader(batch_size=4, n=64, period=64):
    return DataLoader(Rows(n, period), batch_size=batch_size)


def trainer(tmp_path, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = False
    return pl.Trainer(default_root_dir=tmp_path, **{**quiet, **kwargs})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in (*model.generator.parameters(), *model.discriminator.parameters())])


def test_max_steps_counts_generator_updates(tmp_path):
    model, t = Toy(), trainer(tmp_path, max_steps=10)
    t.fit(model, loader())
    assert t.global_step == model.updates == 10
    assert [c[0] for c in model.calls] == ["generator", "discriminator"] * 10


def test_each_loss_leaves_the_other_network_alone(tmp_path):
    model = Toy()
    trainer(tmp_path, max_steps=2).fit(model, loader())
    assert not any(other_trains for _, _, other_trains in model.calls)
    assert all(p.requires_grad for p in model.parameters())


def test_the_discriminator_sees_the_updated_generator(tmp_path):
    """One step by hand: generator first, then the discriminator on what it makes now."""
    model, batch = Toy(), next(iter(loader()))
    expected = Toy()
    g = torch.autograd.grad(expected.generator_loss(batch)[0], expected.generator_parameters())
    with torch.no_grad():
        for p, grad in zip(expected.generator_parameters(), g, strict=True):
            p -= 0.1 * grad
    d = torch.autograd.grad(expected.discriminator_loss(batch)[0], expected.discriminator_parameters())
    with torch.no_grad():
        for p, grad in zip(expected.discriminator_parameters(), d, strict=True):
            p -= 0.1 * grad
    trainer(tmp_path, max_steps=1).fit(model, loader())
    assert torch.allclose(weights(model), weights(expected), atol=1e-7)


@pytest.mark.parametrize("by_trainer", [False, True])
def test_accumulation_is_one_large_batch(tmp_path, by_trainer):
    large, small = Toy(), Toy(accumulate=1 if by_trainer else 4)
    trainer(tmp_path, max_steps=3).fit(large, loader(16))
    t = trainer(tmp_path, max_steps=3, accumulate_grad_batches=4 if by_trainer else 1)
    t.fit(small, loader(4))
    assert torch.allclose(weights(small), weights(large), atol=1e-6)
    assert t.global_step == small.updates == 3
    assert [c[0] for c in small.calls[:8]] == ["generator"] * 4 + ["discriminator"] * 4


def test_the_last_batches_of_an_epoch_make_a_step(tmp_path):
    model = Toy(accumulate=4)
    t = trainer(tmp_path, max_epochs=2)
    t.fit(model, loader(4, n=24))  # 6 batches an epoch
    assert t.global_step == model.updates == 4


@pytest.mark.parametrize("by_trainer", [False, True])
def test_clipping(tmp_path, by_trainer):
    model, start = Toy(clip=None if by_trainer else 1e-3), Toy()
    t = trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3 if by_trainer else None)
    t.fit(model, loader())
    for part in ("generator", "discriminator"):
        a, b = getattr(model, part), getattr(start, part)
        moved = torch.cat([(p - q).flatten() for p, q in zip(a.parameters(), b.parameters(), strict=True)])
        assert torch.allclose(moved.norm(), torch.tensor(0.1 * 1e-3), rtol=1e-3)


def test_schedules_step_once_per_update(tmp_path):
    schedule = {"target": "torch.optim.lr_scheduler.StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    model = Toy(scheduler_config=schedule, accumulate=2)
    t = trainer(tmp_path, max_steps=3)
    t.fit(model, loader())
    assert [o.param_groups[0]["lr"] for o in t.optimizers] == pytest.approx([0.1 / 8] * 2)


@pytest.mark.parametrize("warm_up", [False, True])
def test_two_time_scales(tmp_path, warm_up):
    target = "torch.optim.lr_scheduler.StepLR"
    schedule = {"target": target, "params": {"step_size": 1, "gamma": 0.5}} if warm_up else None
    model = Toy(scheduler_config=schedule, lr_g_factor=4.0)
    t = trainer(tmp_path, max_steps=2)
    t.fit(model, loader())
    ours, theirs = (o.param_groups[0]["lr"] for o in t.optimizers)
    assert theirs == pytest.approx(0.1 / 4 if warm_up else 0.1) and ours == pytest.approx(4 * theirs)
    with pytest.raises(ValueError, match="lr_g_factor: got 0"):
        Toy(lr_g_factor=0)


def test_the_average_moves_once_per_update(tmp_path):
    model = Toy(use_ema=True, accumulate=2)
    trainer(tmp_path, max_steps=5).fit(model, loader())
    assert int(model.model_ema.num_updates) == 5


def test_updates_survive_the_checkpoint(tmp_path):
    # all batches are alike: where Lightning goes on in an epoch is not the point here
    straight = Toy(accumulate=2)
    trainer(tmp_path, max_steps=6).fit(straight, loader(n=16, period=4))
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="kept", save_on_train_epoch_end=True)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(
        Toy(accumulate=2), loader(n=16, period=4)
    )
    resumed = Toy(accumulate=2)
    t = trainer(tmp_path, max_steps=6)
    t.fit(resumed, loader(n=16, period=4), ckpt_path=tmp_path / "kept.ckpt")
    assert resumed.updates == t.global_step == 6
    assert resumed.calls[0][1] == 4
    assert torch.equal(weights(resumed), weights(straight))


def test_updates_of_an_official_checkpoint():
    model = Toy()
    model.on_load_checkpoint({"global_step": 7})
    assert model.updates == 7


def test_fp16_scale_changes_between_the_two_steps(tmp_path):
    """A scaler that doubles at every step: gradients accumulated over a window must still be unscaled rightly."""
    plain, scaled = Toy(accumulate=2, clip=0.05), Toy(accumulate=2, clip=0.05)
    trainer(tmp_path, max_steps=4).fit(plain, loader())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(tmp_path, max_steps=4, plugins=[plugin]).fit(scaled, loader())
    assert scaler.get_scale() == 4.0 * 2**8  # two steps an update, none skipped
    assert torch.allclose(weights(scaled), weights(plain), atol=2e-3)


def test_bf16(tmp_path):
    model = Toy()
    trainer(tmp_path, max_steps=3, precision="bf16-mixed").fit(model, loader())
    assert weights(model).isfinite().all() and weights(model).dtype == torch.float32


TWO_PROCESSES = """
import os
import sys
import torch
from torch.utils.data import DataLoader, Subset
from tests.models.test_adversarial import Rows, Toy, trainer, weights

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = Toy(accumulate=2, clip=0.5)
    t = trainer(sys.argv[1], max_steps=4, devices=2, strategy="ddp", use_distributed_sampler=False)
    own = Subset(Rows(), range(int(os.environ.get("LOCAL_RANK", 0)), 64, 2))
    t.fit(model, DataLoader(own, batch_size=4))
    torch.save(weights(model), f"{sys.argv[1]}/{t.global_rank}.pt")
    assert t.global_step == model.updates == 4
"""


def test_two_processes_do_what_one_does(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "two.py", tmp_path]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    single = Toy(accumulate=2, clip=0.5)
    trainer(tmp_path, max_steps=4).fit(single, loader(8))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    assert torch.allclose(first, weights(single), atol=1e-6)


def test_validation_logs_both_networks(tmp_path):
    model = Toy(use_ema=True)
    t = trainer(tmp_path, max_epochs=1)
    t.fit(model, loader(n=8), loader(n=8))
    assert {"val/g_loss", "val/disc_loss", "val/g_loss_ema", "train/g_loss", "train/disc_loss"} <= set(
        t.callback_metrics
    )


def test_frozen_restores_what_it_found():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(RuntimeError, match="inside"), frozen([a, b]):
        assert not a.requires_grad
        raise RuntimeError("inside")
    assert a.requires_grad and not b.requires_grad


def test_wrong_accumulation():
    with pytest.raises(ValueError, match="accumulate: got 0"):
        Toy(accumulate=0)


class Alone(Toy):
    """No discriminator: an ordinary recipe."""

    def discriminator_parameters(self):
        return []

    def generator_loss(self, batch):
        loss = (self.generator(batch["image"]) - batch["image"]).square().mean()
        return loss, {"loss": loss}

    def discriminator_loss(self, batch):
        raise AssertionError("there is none")


def test_without_a_discriminator_there_is_one_optimiser(tmp_path):
    model = Alone(use_ema=True)
    critic = [p.clone() for p in model.discriminator.parameters()]
    fitter = trainer(tmp_path, max_steps=5)
    fitter.fit(model, loader())
    assert len(fitter.optimizers) == 1 and fitter.global_step == model.updates == 5
    assert all(torch.equal(a, b) for a, b in zip(critic, model.discriminator.parameters(), strict=True))
    assert {"val/loss", "val/loss_ema"} <= set(fitter.validate(model, loader(), verbose=False)[0])
