"""ldm.processor: which processors are slow at bfloat16, and Muon on them."""

from types import SimpleNamespace

import pytest
import torch

from ldm import processor, training
from ldm.optim import HiddenAndRest


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
def test_muon_in_float32_is_muon(monkeypatch, target):
    def moved(fast):
        monkeypatch.setattr("ldm.optim.multiplies_bfloat16", lambda: fast)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(24, 48))
        weight.grad = torch.randn(24, 48)
        gradient, before = weight.grad.clone(), weight.detach().clone()
        part = {"target": target, "params": {"weight_decay": 0.0}}
        HiddenAndRest([{"params": [weight], "hidden": True}], 0.1, part, part).step()
        assert torch.equal(weight.grad, gradient)
        return weight.detach() - before

    slow, fast = moved(False), moved(True)
    assert 0 < (slow - fast).abs().max() < 0.05 * slow.abs().max()


@pytest.mark.parametrize(
    "device, precision, fast, said",
    [
        ("cpu", "bf16-mixed", False, True),
        ("cpu", "bf16-mixed", True, False),
        ("cpu", "32-true", False, False),
        ("cuda", "bf16-mixed", False, False),
    ],
)
def test_a_slow_precision_is_named(monkeypatch, device, precision, fast, said):
    lines = []
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(training, "rank_zero_info", lines.append)
    strategy = SimpleNamespace(root_device=torch.device(device))
    training.judge_precision(SimpleNamespace(strategy=strategy, precision=precision))
    assert ["--precision 32-true" in line for line in lines] == [True] * said
