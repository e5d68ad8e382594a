"""Muon on a processor without fast bfloat16: the training step of the slim ViT, its products in float32 / in bfloat16.

python benchmarks/muon.py               (32x32, batch 128, fp32, torch.optim.Muon; both are the same with AVX-512)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report, rounds_asked  # noqa: E402
from ldm.models.param_groups import groups  # noqa: E402
from ldm.modules.classifiers.vit import vit_ti_16  # noqa: E402
from ldm.optim import HiddenAndRest, muon_for_this_processor  # noqa: E402


def step_of(bfloat16: bool) -> Callable[[], None]:
    """bfloat16: Muon as it is, whatever the processor."""
    net = vit_ti_16(num_classes=10, stem="small", image_size=32, width=0.67, depth=6)
    parts = {"target": "torch.optim.Muon"}, {"target": "torch.optim.AdamW"}
    optimizer = HiddenAndRest(groups(net, net.parameters(), 0.02, num_classes=10), 0.02, *parts)
    if not bfloat16:
        muon_for_this_processor(optimizer)
    x, y = torch.rand(128, 3, 32, 32) * 2 - 1, torch.randint(10, (128,))

    def step() -> None:
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    rounds = rounds_asked(__doc__)
    sides = {"ldm": step_of(False), "bfloat16": step_of(True)}
    report("training step of the slim ViT, 32x32, batch 128", compare(sides, rounds), "ldm")


if __name__ == "__main__":
    main()
