"""ldm.processor: which processors are slow at bfloat16, and Muon on them."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from ldm import processor, trainer
from ldm.models.base import BaseModel
from tests.cli.tools import QUICK, config, only_run, run_main


def test_no_bfloat16_within():
    x = torch.tensor([1.0, 1 + 2**-12])
    with processor.Float32():
        copies = x.bfloat16(), x.to(dtype=torch.bfloat16), x.double()
        copies[0].mul_(2)
    assert [c.dtype for c in copies] == [torch.float32, torch.float32, torch.float64]
    assert copies[1][1] != 1 and x[0] == 1
    assert x.bfloat16().dtype == torch.bfloat16


@pytest.mark.parametrize(
    "machine, capability, fast",
    [
        ("x86_64", "AVX2", False),
        ("AMD64", "DEFAULT", False),
        ("x86_64", "AVX512", True),
        ("arm64", "DEFAULT", True),
    ],
)
def test_processors(monkeypatch, machine, capability, fast):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor.multiplies_bfloat16() is fast


@pytest.mark.parametrize("target", ["torch.optim.Muon", "timm.optim.Muon"])
@pytest.mark.parametrize("part", [False, True])
def test_muon_in_float32_is_muon(monkeypatch, target, part):
    def moved(fast):
        monkeypatch.setattr("ldm.optim.multiplies_bfloat16", lambda: fast)
        torch.manual_seed(0)
        weight, x = torch.nn.Parameter(torch.randn(24, 48)), torch.randn(24, 48)
        seen = []

        def closure():
            loss = (weight * x).sum()
            seen.append(loss.bfloat16().dtype)  # the model's own casts stay
            loss.backward()
            return loss

        before = weight.detach().clone()
        config = {"target": target, "params": {"weight_decay": 0.0}}
        model = BaseModel(optimizer_config=hidden_and_rest(config) if part else config)
        model.learning_rate = 0.1
        optimizer = model.build_optimizer([{"params": [weight], "hidden": True}])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        assert optimizer.step(closure) == (before * x).sum()
        scheduler.step()
        assert seen == [torch.bfloat16] and torch.equal(weight.grad, x)
        optimizer.load_state_dict(optimizer.state_dict())
        return weight.detach() - before

    slow, fast = moved(False), moved(True)
    assert 0 < (slow - fast).abs().max() < 0.05 * slow.abs().max()


def hidden_and_rest(config):
    return {"target": "ldm.optim.HiddenAndRest", "params": {"hidden": config, "rest": config}}


@pytest.mark.parametrize(
    "params, source, fast, used, said",
    [
        ({"precision": "bf16-mixed"}, "resumed", False, "bf16-mixed", "--precision 32-true is faster"),
        ({"precision": "bf16-mixed"}, "a.yaml", False, "32-true", "instead of bf16-mixed (a.yaml)"),
        ({"precision": "bf16-mixed", "accelerator": "cpu"}, "a.yaml", False, "32-true", "instead of bf16-mixed"),
        ({"precision": "bf16-mixed"}, "the command line", False, "bf16-mixed", "--precision 32-true is faster"),
        ({"precision": "bf16-mixed"}, "a.yaml", True, "bf16-mixed", None),
        ({"precision": "bf16-mixed", "accelerator": "gpu"}, "a.yaml", False, "bf16-mixed", None),
        ({"precision": "16-mixed"}, "a.yaml", False, "16-mixed", None),
        ({}, "a.yaml", False, None, None),
    ],
)
def test_a_precision_that_is_slow_here(monkeypatch, params, source, fast, used, said):
    lines = []
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(trainer, "rank_zero_info", lines.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert trainer.trainer_params(run(source), {"trainer": params}).get("precision") == used
    assert [said in line for line in lines] == ([] if said is None else [True])


def run(source):
    merged = SimpleNamespace(where=lambda key: source)
    return SimpleNamespace(merged=merged, resume="last.ckpt" if source == "resumed" else None)


def test_a_gpu_keeps_it(monkeypatch):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    params = {"precision": "bf16-mixed"}
    assert trainer.trainer_params(run("a.yaml"), {"trainer": params}) == params


def test_a_run_goes_on_in_the_precision_it_began_with(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (tmp_path / "a.yaml").write_text("lightning: {trainer: {precision: bf16-mixed}}")
    start = ["-t", "-b", config("configs/classifier/resnet_digits.yaml"), tmp_path / "a.yaml", "-l", tmp_path / "logs"]
    assert run_main(*start, "--max_steps", 1, "--no-test", *QUICK) == 0
    assert "precision 32-true instead of bf16-mixed" in capsys.readouterr().err
    begun = only_run(tmp_path / "logs")
    saved = yaml.safe_load(next((begun / "configs").glob("*-lightning.yaml")).read_text())
    assert saved["lightning"]["trainer"]["precision"] == "32-true"
    assert run_main("-t", "-r", begun, "--max_steps", 2, "--no-test") == 0
    assert "bf16-mixed" not in capsys.readouterr().err
    assert torch.load(begun / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
