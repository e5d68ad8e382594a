"""Optimiser, schedulers, EMA and learning rate of every recipe, on the smallest one there can be."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from ldm.models.base import BaseModel
from ldm.util import UserError


class Line(BaseModel):
    def __init__(self, ema=None, **kwargs):
        super().__init__(**kwargs)
        self.model = nn.Linear(1, 1)
        if ema is not None:
            self.init_ema(self.model, ema)

    def loss(self, batch):
        loss = (self.model(batch["image"].mean((1, 2))) - 1).square().mean()
        return loss, {"loss": loss}


def fit(model, steps, **kwargs):
    data = [{"image": torch.full((4, 2, 2, 1), float(i % 3))} for i in range(64)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, **off, **kwargs)
    trainer.fit(model, loader)
    return trainer


def test_ema_moves_once_per_update_not_per_batch():
    model = Line(ema=0.9)
    fit(model, 3, accumulate_grad_batches=4)
    assert int(model.model_ema.num_updates) == 3


def test_ema_scope_gives_the_weights_back_even_after_an_error():
    model = Line(ema=0.9)
    fit(model, 5)
    raw = model.model.weight.clone()
    with pytest.raises(RuntimeError), model.ema_scope():
        assert not torch.equal(model.model.weight, raw)
        raise RuntimeError
    assert torch.equal(model.model.weight, raw)


@pytest.mark.parametrize(
    "config",
    [
        {
            "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 2, "lr_min": 0, "lr_max": 1, "lr_start": 0, "max_decay_steps": 4},
        },
        {
            "target": "torch.optim.lr_scheduler.LinearLR",
            "params": {"start_factor": 1.0, "end_factor": 0.25, "total_iters": 4},
        },
    ],
)
def test_schedulers_step_once_per_update(config):
    model = Line(scheduler_config=config, optimizer_config={"target": "torch.optim.SGD", "params": {"momentum": 0.9}})
    model.learning_rate = 0.1
    trainer = fit(model, 4)
    expected = 0.0 if "Lambda" in config["target"] else 0.025
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9


def test_an_unconditional_model_takes_no_condition():
    assert Line().condition([1, 2]) is None
    with pytest.raises(UserError, match="takes no class"):
        Line().condition([1], classes=[0])
    with pytest.raises(UserError, match="takes no prompt"):
        Line().condition([1], prompts=["a"])


def test_get_input_is_the_only_permute():
    x = torch.rand(2, 4, 5, 3)
    y = Line().get_input({"image": x}, "image")
    assert y.shape == (2, 3, 4, 5) and y.is_contiguous(memory_format=torch.channels_last)
    assert y.data_ptr() == x.data_ptr()  # HWC in memory is channels-last already
    assert Line().get_input({"mask": torch.zeros(2, 4, 5)}, "mask").shape == (2, 1, 4, 5)
    with pytest.raises(UserError, match="first_stage_key"):
        Line().get_input({"image": x}, "jpg")


def test_compile_leaves_the_keys_alone():
    model = Line(compile=True)
    keys = set(model.state_dict())
    model.configure_model()
    assert set(model.state_dict()) == keys == {"model.weight", "model.bias"}


def test_ckpt_path_and_ignore_keys(tmp_path):
    torch.save(
        {"state_dict": {"model.weight": torch.full((1, 1), 5.0), "model.bias": torch.ones(2)}}, tmp_path / "w.ckpt"
    )

    class Loaded(Line):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.load_ckpt_path()

    assert float(Loaded(ckpt_path=str(tmp_path / "w.ckpt"), ignore_keys=["model.bias"]).model.weight) == 5.0
    with pytest.raises(UserError, match="another shape"):
        Loaded(ckpt_path=str(tmp_path / "w.ckpt"))


def test_muon_leaves_tables_and_vectors_to_adamw():
    class Net(BaseModel):
        def __init__(self):
            super().__init__(optimizer_config={"target": "timm.optim.Muon", "params": {"fallback_lr_scale": 0.5}})
            self.table, self.layer = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 4)

    torch.manual_seed(0)
    model = Net()
    optimizer = model.build_optimizer(model.trained_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    (model.layer(model.table(torch.tensor([1, 2, 3, 4]))) ** 2).sum().backward()
    optimizer.step()
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert (moved[0][[0, 5]] == 0).all()  # rows that were not read; an orthogonalised step moves all of them
    assert moved[0][1:5].abs().min() > 0
    step, gradient = (torch.linalg.svdvals(m) for m in (moved[1], model.layer.weight.grad))
    assert step[0] / step[2] < 1.2 and gradient[0] / gradient[2] > 1.5  # Newton and Schulz' iteration is not exact


def test_adamw_gets_plain_parameters():
    class Net(BaseModel):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(6, 4)

    model = Net()
    assert len(model.build_optimizer(model.trained_parameters()).param_groups) == 1
