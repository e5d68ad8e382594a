"""Says how far the feature maps of a trained CNN move with the picture, by strides, as a table and a chart.

python scripts/shift.py -r models/classifier/digits
python scripts/shift.py -r logs/<classifier_run> --out shift.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shift.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="run directory or checkpoint file of a classifier")
    add("-n", "--n_samples", type=int, default=8, help="validation pictures (default: 8)")
    add("--largest", type=int, default=8, metavar="N", help="largest shift in pixels (default: 8)")
    add("--out", metavar="PNG", default="outputs/shift.png", help="the chart (default: outputs/shift.png)")
    return parser


def measure(args: argparse.Namespace) -> None:
    from ldm import generate
    from ldm.comparison import pyplot_without_window
    from ldm.evaluation.pictures import of_config
    from ldm.modules.classifiers.equivariance import shift_errors
    from ldm.util import UserError

    if args.n_samples < 1 or args.largest < 1:
        raise UserError(f"got -n {args.n_samples} and --largest {args.largest}, expected at least 1 each")
    model, info = generate.load_run(args.run)
    if not hasattr(model, "num_classes") or not hasattr(model, "model"):
        raise UserError(f"{args.run} is a {type(model).__name__}: expected a classifier")
    pictures = of_config(info["config"], "validation")
    count = min(args.n_samples, len(pictures))
    x = pictures.get(range(0, len(pictures), max(1, len(pictures) // count)))[:count]
    with generate.weights_scope(model, None)[0]:
        errors = shift_errors(model.model, model.normalize(x.float() / 127.5 - 1), args.largest)
    print("pixels " + "".join(f"{s:>8}" for s in range(args.largest + 1)))
    for stride, values in errors.items():
        print(f"stride {stride:<2}" + "".join(f"{v:8.3f}" for v in values))
    plt = pyplot_without_window()
    figure, axes = plt.subplots(figsize=(6, 3))
    for stride, values in errors.items():
        axes.plot(values, marker="o", label=f"stride {stride}")
    axes.set_xlabel("shift of the picture in pixels")
    axes.set_ylabel("what no shift of the map explains")
    axes.legend()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90, bbox_inches="tight")
    plt.close(figure)
    print(f"{count} pictures of {info['checkpoint']}; chart: {args.out}")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), measure))
