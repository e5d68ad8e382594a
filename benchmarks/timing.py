"""Alternating measurements: each round times every side once, and the ratio is the median over rounds."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch


def rounds_asked(doc: str | None) -> int:
    """`--rounds` of a benchmark whose only other flag is `--threads`; sets threads and seed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args.rounds


def compare(sides: dict[str, Callable[[], float | None]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Times every side once a round, in turn. A side may return its own seconds; else the whole call is timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            own = side()
            took = time.perf_counter() - start if own is None else own
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def report(title: str, seconds: dict[str, list[float]], ours: str) -> None:
    """Prints medians and the median of the per-round ratios of `ours` to each other side."""
    print(f"\n{title}  ({machine()})")
    for name, values in seconds.items():
        line = f"  {name:32s} {statistics.median(values):8.3f} s"
        if name != ours:
            ratios = [a / b for a, b in zip(seconds[ours], values, strict=True)]
            line += f"   {ours} / {name} = {statistics.median(ratios):.3f}"
            line += f"  ({len(ratios)} rounds: {min(ratios):.3f}..{max(ratios):.3f})"
        print(line)


def process(command: list[str], environment: dict[str, str] | None = None, show: bool = False) -> tuple[float, float]:
    """(seconds, GiB that it had resident at most) of a process; `show` prints what it said.

    Pages of a mapped file count once they are read.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{log.read()}")
        if show:
            print(log.read().strip())
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
