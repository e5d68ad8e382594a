"""ldm.processor: memory that is kept, and Muon where bfloat16 is slow."""

import subprocess
import sys

import pytest
import torch

from ldm import processor
from ldm.optim import HiddenAndRest

FAULTS = """
import resource, sys, torch
from ldm.processor import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_memory()
def step():
    torch.ones(1 << 24)  # 64 MiB, freed at once: more than malloc keeps by itself
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode, **environment):
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_not_fetched_anew():
    assert faults("default") > 10 * faults("kept")


def test_settings_of_the_environment_win(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert processor.keep_memory() is False


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
