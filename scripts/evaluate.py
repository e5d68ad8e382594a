"""Measures a run, or a folder of pictures.

python scripts/evaluate.py -r logs/<run> -n 1000
    draws 1,000 pictures and compares them with the run's training data
python scripts/evaluate.py -r logs/<run> --metrics fid agreement --set steps=10 sampler=dpmpp_2m
    these metrics, other settings of the sampler
python scripts/evaluate.py -r my_pictures --real logs/<run>
    pictures that are there already
python scripts/evaluate.py -r logs/<run> --metrics agreement --row results/ddpm_digits.json
    a row of the README's table

Settings of the Trainer, at any place, share the drawing out: trainer.devices=2 trainer.strategy=ddp
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common, results  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="run directory, checkpoint, or a folder of pictures")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="what to measure (default: what the run's family has)")
    add(
        "--real",
        default=None,
        metavar="PLACE",
        help="config, run, folder or zip of the real pictures (default: the run's)",
    )
    add("--split", default=None, help="of the real pictures: train, validation or test")
    add("-n", "--n_samples", type=int, default=1000, help="drawn pictures (default: 1000)")
    add("--features", default=None, metavar="NAME", help="digits, inception-v3-compat, ..., or a classifier run")
    add("--classifier", default=None, metavar="RUN", help="reads the classes (default: the features' own classifier)")
    add("--seed", type=int, default=0, help="seed of the first picture")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add("--set", nargs="+", default=[], metavar="KNOB=VALUE", help="knobs of the model's sample(): steps=50 scale=2")
    add("--batch-size", type=int, default=250)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--outdir", default="outputs/evaluation", help="pictures, features, results (default: outputs/evaluation)")
    add("--json", metavar="FILE", default=None, help="write the result here too")
    add(
        "--row",
        nargs="+",
        default=[],
        metavar=("FILE", "KEY=VALUE"),
        help="write the first figure as a row of the README's table: results/NAME.json; what the run's checkpoint does "
        "not say of its training, or otherwise: family=, config=, command=, minutes=, cores=, commit=",
    )
    add("trainer", nargs="*", metavar="trainer.KEY=VALUE", help="settings of the Trainer that draws")
    return parser


def measure(args: argparse.Namespace) -> None:
    from ldm.evaluation.evaluation import Request
    from ldm.evaluation.metrics import evaluate
    from ldm.evaluation.store import write_json
    from ldm.training import quieten

    quieten()
    metrics, words = apart(args.metrics)
    knobs, more = apart(args.set)
    row, others = apart(args.row)
    if row:
        results.facts(row)  # wrong words are said now
    request = Request(
        run=args.run,
        metrics=metrics,
        real=args.real,
        split=args.split,
        n=args.n_samples,
        features=args.features,
        classifier=args.classifier,
        seed=args.seed,
        weights=args.weights,
        knobs=common.parse_settings(knobs),
        batch_size=args.batch_size,
        device=args.device,
        trainer=trainer_settings([*words, *more, *others, *args.trainer]),
        outdir=args.outdir,
    )
    result = evaluate(request)
    if result is None:  # a process that only helped to draw
        return
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)
    if row:
        written = results.write_row(row, *first_figure(result), result.get("training", {}), result.get("model", ""))
        print(f"{written}: written; `make results` puts it into the README", file=sys.stderr)


def first_figure(result: dict[str, Any]) -> tuple[str, float, int]:
    """(name, value, number of pictures) of the figure that was measured first."""
    from ldm.util import UserError

    n = result["sampling"]["n"] if "sampling" in result else result["real"]["n"]
    for name, value in result["metrics"].items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, float(value), n
    raise UserError(f"--row: {', '.join(result['metrics'])} is no single figure: give --metrics another one first")


def apart(words: list[str]) -> tuple[list[str], list[str]]:
    """(all others, those that start with `trainer.`): a flag that takes several words takes these too."""
    return [w for w in words if not w.startswith("trainer.")], [w for w in words if w.startswith("trainer.")]


def trainer_settings(words: list[str]) -> dict[str, object]:
    """["trainer.devices=2"] -> {"devices": 2}.

    Raises:
        UserError: a key that the Trainer does not have.
    """
    from ldm.training import trainer_keys
    from ldm.util import UserError, suggest

    settings = common.parse_settings([w.removeprefix("trainer.") for w in words])
    for key in settings:
        if key not in trainer_keys():
            raise UserError(f"trainer.{key}: the Trainer has no such setting{suggest(key, trainer_keys())}")
    return settings


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), measure))
