"""Measures a run.

python scripts/evaluate.py -r logs/<diffusion run> --classifier logs/<classifier run> -n 1000
    how often the classifier reads the class that was asked for
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="the generative run")
    add("--classifier", required=True, metavar="RUN", help="a classifier run over the same classes")
    add("-n", "--n_samples", type=int, default=1000, help="pictures, classes in turn (default: 1000)")
    add("--seed", type=int, default=0, help="seed of the first picture")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add("--set", nargs="+", default=[], metavar="KNOB=VALUE", help="knobs of the model's sample(): steps=50 scale=2")
    add("--batch-size", type=int, default=250)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--json", metavar="FILE", default=None, help="write the result here too")
    return parser


def evaluate(args: argparse.Namespace) -> None:
    from ldm import generate
    from ldm.evaluation import class_agreement

    device = generate.pick_device(args.device)
    model, info = generate.load_run(args.run)
    classifier, _ = generate.load_run(args.classifier)
    knobs = generate.check_knobs(model, common.parse_settings(args.set))
    scope, weights = generate.weights_scope(model, args.weights)
    with scope:
        result = class_agreement(
            model.to(device),
            classifier.to(device),
            range(args.seed, args.seed + args.n_samples),
            args.batch_size,
            knobs,
        )
    result |= {"run": info["checkpoint"], "sha256": info["sha256"], "classifier": args.classifier, "weights": weights}
    result |= {"seed": args.seed, "knobs": knobs, **generate.versions()}
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), evaluate))
