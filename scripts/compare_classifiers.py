"""Draws accuracy against operations and parameters, the chart by which networks are compared.

python scripts/compare_classifiers.py logs/<classifier_run>
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
    add("runs", nargs="*", metavar="RUN", help="run directories (logs/*); those of other models are left out")
    add("--outdir", default="outputs/compare", help="where charts and table go (default: outputs/compare)")
    add("--title", help="of the chart")
    add("--no-speed", action="store_true", help="do not time the networks")
    return parser


def compare(args: argparse.Namespace) -> None:
    from ldm import comparison

    figures = of_runs(args.runs, not args.no_speed) if args.runs else of_papers()
    title = args.title or ("Runs compared" if args.runs else "Published top-1 on ImageNet (one crop)")
    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    text = comparison.markdown(figures)
    (outdir / "table.md").write_text(f"# {title}\n\n{text}", encoding="utf-8")
    comparison.chart(figures, outdir / "chart.png", title)
    written = [outdir / "chart.png", outdir / "table.md"]
    if args.runs and comparison.curves(args.runs, outdir / "curves.png"):
        written.append(outdir / "curves.png")
    print(text + "\n" + ", ".join(map(str, written)))


def of_papers() -> Any:
    from ldm.published import published

    print("no runs given: published figures", file=sys.stderr)
    return published()


def of_runs(runs: list[str], timed: bool) -> Any:
    from tqdm import tqdm

    from ldm import comparison
    from ldm.util import UserError

    figures, left_out = [], []
    for run in tqdm(runs, desc="runs", unit="run", leave=False):
        try:
            figures.append(comparison.measure(run, timed))
        except UserError as e:
            left_out.append(str(e))
    for why in left_out:
        print(f"left out: {why}", file=sys.stderr)
    if not figures:
        raise UserError(f"none of {len(runs)} runs is a classifier's: expected logs/<run> of configs/classifier")
    return figures


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), compare))
