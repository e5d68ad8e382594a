"""The training step of fastnet in bf16 as it is / without packed small maps / with freed memory given back.

python benchmarks/packed.py               (32x32, batch 500; the first two are the same on a processor without AMX)
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report, rounds_asked  # noqa: E402
from ldm.memory import keep_freed_memory  # noqa: E402
from ldm.modules.classifiers import packed  # noqa: E402
from ldm.modules.classifiers.fastnet import fastnet  # noqa: E402

STEPS = 5


def measure(pack: bool, keep: bool) -> None:
    """Prints the seconds of a step, the median of `STEPS`; in a process of its own, since memory that is kept stays."""
    packed.AMX = packed.AMX and pack
    if keep:
        keep_freed_memory()
    net = fastnet(depth=3).to(memory_format=torch.channels_last)
    x = (torch.rand(500, 3, 32, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (500,))
    seconds = []
    for _ in range(3 + STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        nn.functional.cross_entropy(out.float(), y).backward()
        net.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(sorted(seconds[3:])[STEPS // 2])


def child(pack: bool, keep: bool) -> float:
    """Seconds of a step, from a process with as many threads."""
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    code += f"from benchmarks.packed import measure\nmeasure({pack}, {keep})"
    command, root = [sys.executable, "-c", code], Path(__file__).resolve().parents[1]
    return float(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    rounds = rounds_asked(__doc__)
    sides = {
        "ldm": partial(child, True, True),
        "not packed": partial(child, False, True),
        "given back": partial(child, True, False),
    }
    report("training step of fastnet, depth 3, bf16, 32x32, batch 500", compare(sides, rounds, warm_up=0), "ldm")


if __name__ == "__main__":
    main()
