"""Classifier runs side by side: accuracy against operations and parameters, as a chart and a table."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.published import Figure, gflops, parameters
from ldm.util import UserError

LOSS, ACCURACY = "train/loss", ("val/acc1_ema", "val/acc1")  # of the curves; the first accuracy that there is
ROUNDS, BATCH = 3, 64  # of the timing


def measure(path: str | Path, timed: bool = True) -> Figure:
    """The row of one run: last epoch's top-1 with the weights that the run would be used with.

    Args:
        path: run directory, checkpoint, or a file that `keep` wrote.
        timed: pass pictures through the network for its images per second.

    Raises:
        UserError: no run of a classifier.
    """
    from ldm.recognition import open_run

    if is_kept(path):
        return kept(path)[0]
    reader = open_run(path)
    run = run_of(Path(path))
    net, fit = reader.model.model, reader.fit
    assert fit.size is not None
    x = torch.zeros(2, fit.channels, *fit.size)
    top1, source, minutes = accuracy(run)
    rate = images_per_second(net, torch.zeros(BATCH, fit.channels, *fit.size)) if timed else None
    return Figure(label_of(run), parameters(net), gflops(net, x), top1, source, rate, minutes)


def run_of(path: Path) -> Path:
    """The directory of a run or of a checkpoint."""
    return path if path.is_dir() else path.parent.parent


# --- kept rows --------------------------------------------------------------------------------------------------------


def is_kept(path: str | Path) -> bool:
    """Whether this is a row's file rather than a run."""
    return Path(path).suffix == ".json"


def keep(figure: Figure, run: Path, folder: Path) -> Path:
    """Writes the row of a run with its curves as `folder`/<label>.json, to be compared when the run is gone."""
    columns = columns_of(run)
    found = {LOSS: _smooth(columns.get(LOSS, [])), **{name: columns.get(name, []) for name in ACCURACY}}
    row = {**asdict(figure), "curves": {name: [[s, round(v, 6)] for s, v in p] for name, p in found.items() if p}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{figure.label}.json"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def kept(path: str | Path) -> tuple[Figure, dict[str, list[tuple[int, float]]]]:
    """The row and the curves that `keep` wrote.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        row = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {name: [(s, v) for s, v in points] for name, points in row.pop("curves").items()}
        return Figure(**row), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: expected a row that compare_classifiers.py --keep wrote ({e})") from e


def columns_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What was logged, by name: [(step, value)]."""
    return kept(run)[1] if is_kept(run) else _columns(run_of(run) / "metrics.csv")


# --- measured ---------------------------------------------------------------------------------------------------------


def label_of(run: Path) -> str:
    """The run's name without its date."""
    if is_kept(run):
        return run.stem
    run = run_of(run)
    return run.resolve().name.partition("_")[2] or run.resolve().name


def accuracy(run: Path) -> tuple[float | None, str, float | None]:
    """(top-1 per cent, what it is of, minutes of training) from the reports of the run: test before validation,
    averaged weights before raw ones."""
    reports: dict[str, Any] = {}
    for split in ("test", "val"):
        file = run / f"report_{split}.json"
        if file.is_file():
            reports[split] = json.loads(file.read_text(encoding="utf-8"))
    minutes = reports.get("val", {}).get("minutes")
    for split, report in reports.items():
        weights = "ema" if "ema" in report else "raw"
        words = {"test": "test", "val": "validation"}[split]
        return 100 * report[weights]["acc1"], f"{words}, epoch {report['epoch']}, {weights} weights", minutes
    return None, "no report", minutes


@torch.no_grad()
def images_per_second(net: nn.Module, x: torch.Tensor) -> float:
    """Median over a few forward passes of the batch x [B, C, H, W]."""
    net.eval().to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    seconds = []
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        net(x)
        if number:  # the first one also pays for memory
            seconds.append(time.perf_counter() - start)
    return len(x) / statistics.median(seconds)


def markdown(figures: Sequence[Figure]) -> str:
    """The table, the most accurate first."""
    ordered = sorted(figures, key=lambda f: -(f.top1 or 0))
    timed, trained = any(f.rate for f in figures), any(f.minutes for f in figures)
    more = ["images/s"] * timed + ["minutes"] * trained
    head = ["network", "parameters (M)", "GFLOPs", *more, "top-1 (%)", "of"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for f in ordered:
        cells = [f.label, f"{f.params / 1e6:.2f}", f"{f.gflops:.3g}"]
        cells += [_number(f.rate, ".0f")] * timed
        cells += [_number(f.minutes, ".1f" if (f.minutes or 0) >= 1 else ".2g")] * trained
        lines.append("| " + " | ".join([*cells, _number(f.top1, ".2f"), f.source]) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def curves(runs: Sequence[str | Path], path: Path) -> bool:
    """Loss of the training (smoothed) and accuracy of the validation by step, a line for each run; False if no run has
    them."""
    pyplot = pyplot_without_window()
    many = len(runs) > 10  # colours that one can tell apart, and names that hide no line
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2) if many else (11, 4.4))
    for axis in axes:
        axis.set_prop_cycle(color=pyplot.get_cmap("tab20" if many else "tab10").colors)
    drawn = 0
    for run in map(Path, runs):
        columns = columns_of(run)
        accuracy = next((c for c in ACCURACY if columns.get(c)), ACCURACY[-1])
        for axis, name in zip(axes, (LOSS, accuracy), strict=True):
            points = columns.get(name, [])
            if points:
                drawn += 1
                steps, values = zip(*(_smooth(points) if name == LOSS else points), strict=True)
                axis.plot(steps, values, label=label_of(run), marker="." if len(steps) < 40 else None)
    for axis, name in zip(axes, ("training loss", "validation accuracy"), strict=True):
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
        if axis.lines and not many:
            axis.legend(fontsize=8)
    if many and axes[1].lines:
        axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    if drawn:
        figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return bool(drawn)


def _columns(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv -> name -> [(step, value)]."""
    found: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        with path.open(newline="") as f:
            for row in csv.DictReader(f):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def _smooth(points: list[tuple[int, float]], parts: int = 60) -> list[tuple[float, float]]:
    """Means over at most `parts` stretches."""
    n = max(1, len(points) // parts)
    groups = (points[i : i + n] for i in range(0, len(points), n))
    return [(statistics.mean(s for s, _ in g), statistics.mean(v for _, v in g)) for g in groups]


def pyplot_without_window() -> Any:
    """matplotlib without a window.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise UserError("charts need the package matplotlib: pip install matplotlib") from e
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def chart(figures: Sequence[Figure], path: Path, title: str) -> None:
    """Top-1 against GFLOPs; the area of a bubble is the number of parameters (Canziani et al. 2016, figure 2).

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = pyplot_without_window()
    shown = [f for f in figures if f.top1 is not None]
    largest = max((f.params for f in shown), default=1)
    figure, axes = pyplot.subplots(figsize=(9.6, 6))
    colours = pyplot.get_cmap("tab20")
    for i, f in enumerate(sorted(shown, key=lambda f: -f.params)):  # small bubbles lie on top
        area = 2200 * f.params / largest
        axes.scatter(f.gflops, f.top1, s=max(area, 12), alpha=0.55, color=colours(i % 20), edgecolors="black")
        away = max(area, 12) ** 0.5 / 2 + 2  # areas are in square points
        crowded = any(abs(g.top1 - f.top1) < 1 and 0.8 < f.gflops / g.gflops < 1 for g in shown if g is not f)
        place, side = ((-away, -3), "right") if crowded else ((0, away), "center")
        axes.annotate(f.label, (f.gflops, f.top1), place, textcoords="offset points", fontsize=7, ha=side)
    axes.set(xlabel="operations for one image (GFLOPs)", ylabel="top-1 (%)", title=title, xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    low = min((f.params for f in shown), default=1)
    steps = [n for n in (1e4, 1e5, 1e6, 5e6, 25e6, 100e6) if low / 2 <= n <= largest]
    for n in steps:
        grey = {"color": "lightgrey", "edgecolors": "black"}
        axes.scatter([], [], s=max(2200 * n / largest, 12), label=f"{n / 1e6:g} M", **grey)
    if steps:
        axes.legend(title="parameters", loc="lower right", labelspacing=1.6, borderpad=1.1, fontsize=8)
    axes.margins(0.08)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
