"""Draws accuracy against operations and parameters, the chart by which networks are compared.

python scripts/compare_classifiers.py logs/<classifier_run>
python scripts/compare_classifiers.py logs/<classifier_run> results/cifar10/*.json    (beside the project's own runs)
python scripts/compare_classifiers.py              (no runs: published figures of all networks on ImageNet)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_classifiers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run directories (logs/*), or rows kept of some; other models' are left out",
    )
    add("--outdir", default="outputs/compare", help="where charts and table go (default: outputs/compare)")
    add("--title", help="of the chart")
    add("--keep", metavar="FOLDER", help="write each run's row and curves there as JSON, to be named like a run")
    add("--no-speed", action="store_true", help="do not time the networks")
    return parser


def compare(args: argparse.Namespace) -> None:
    from ldm import comparison
    from ldm.published import left_out

    found = of_runs(args.runs, not args.no_speed) if args.runs else of_papers()
    figures = list(found.values())
    title = args.title or ("Runs compared" if args.runs else "Published top-1 on ImageNet (one crop)")
    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    text = comparison.markdown(figures)
    if not args.runs:
        text += f"\n{left_out()}"
    (outdir / "table.md").write_text(f"# {title}\n\n{text}", encoding="utf-8")
    comparison.chart(figures, outdir / "chart.png", title)
    written = [outdir / "chart.png", outdir / "table.md"]
    if args.runs and comparison.curves(list(found), outdir / "curves.png"):
        written.append(outdir / "curves.png")
    if args.runs and args.keep:
        rows = [(f, Path(run)) for run, f in found.items() if not comparison.is_kept(run)]
        written += [comparison.keep(f, run, Path(args.keep)) for f, run in rows]
    print(text + "\n" + ", ".join(map(str, written)))


def of_papers() -> dict[str, Any]:
    """Name -> row."""
    from ldm.published import published

    print("no runs given: published figures", file=sys.stderr)
    return {f.label: f for f in published()}


def of_runs(runs: list[str], timed: bool) -> dict[str, Any]:
    """Run -> row, of those that are a classifier's."""
    from tqdm import tqdm

    from ldm import comparison
    from ldm.util import UserError

    figures, left_out = {}, []
    for run in tqdm(runs, desc="runs", unit="run", leave=False):
        try:
            figures[run] = comparison.measure(run, timed)
        except UserError as e:
            left_out.append(str(e))
    for why in left_out:
        print(f"left out: {why}", file=sys.stderr)
    if not figures:
        raise UserError(f"none of {len(runs)} runs is a classifier's: expected logs/<run> of configs/classifier")
    return figures


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), compare))
