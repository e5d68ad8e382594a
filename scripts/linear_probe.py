"""Says how much an autoencoder's features know of the classes: a linear classifier on them, and one on the pixels.

python scripts/linear_probe.py -r logs/<vae_run>
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linear_probe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="run directory or checkpoint file of an autoencoder")
    add("--limit", type=int, default=20000, help="pictures of a split at most (default: 20000)")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add("--batch-size", type=int, default=256)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--json", metavar="FILE", default=None, help="write the result here too")
    return parser


def probe(args: argparse.Namespace) -> None:
    from ldm import generate, probing

    model, info = generate.load_run(args.run)
    model.to(generate.pick_device(args.device))
    scope, weights = generate.weights_scope(model, args.weights)
    train, test, split = probing.labelled_data(info["config"])
    with scope:
        parts = [probing.read(model, data, args.batch_size, args.limit) for data in (train, test)]
    result: dict[str, Any] = {"run": info["checkpoint"], "sha256": info["sha256"], "weights": weights, "split": split}
    result |= probing.accuracies(*parts)
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), probe))
