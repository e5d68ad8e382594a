"""Says what is in pictures, by a classifier of this project or of torchvision.

python scripts/classify.py -r logs/<classifier_run> picture.png
python scripts/classify.py -r logs/<classifier_run> my_pictures --csv answers.csv --grad-cam looks.png
python scripts/classify.py --model resnet50 --weights IMAGENET1K_V2 picture.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

SHOWN = 16  # pictures of --grad-cam at most


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="classify.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    add("-r", "--run", metavar="RUN", help="run directory (logs/<run>) or checkpoint of a classifier")
    add("--model", metavar="NAME", help="a network of torchvision instead, with its published weights")
    add("--weights", help="with -r: ema or raw (default: ema where there are); with --model: IMAGENET1K_V1, ...")
    add("--top", type=int, default=5, help="answers for each picture (default: 5)")
    place = {"nargs": "?", "const": "-", "metavar": "FILE"}
    add("--json", **place, help="write the answers here; without FILE, to standard output instead of the table")
    add("--csv", **place, help="the same, one answer a line")
    add("--grad-cam", metavar="PNG", help=f"draw where the network looks in the first {SHOWN} pictures")
    add("--batch-size", type=int, default=64, help="pictures per network call")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def open_reader(args: argparse.Namespace) -> Any:
    from ldm.recognition import open_run, open_torchvision
    from ldm.util import UserError

    if bool(args.run) == bool(args.model):
        raise UserError("give either -r logs/<run> or --model NAME")
    if args.model:
        return open_torchvision(args.model, args.weights or "DEFAULT")
    if args.weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {args.weights}: with -r expected ema or raw")
    return open_run(args.run, args.weights)


def classify(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm import generate, recognition
    from ldm.util import UserError

    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    check_places(args)
    paths = recognition.find_pictures(args.images)
    reader = open_reader(args)
    reader.model.to(generate.pick_device(args.device))
    rows: list[Any] = []
    first: list[Any] = []
    unread: list[str] = []
    with tqdm(total=len(paths), desc="classifying", unit="picture", leave=False) as bar:
        for files, x in recognition.loaded(reader, paths, args.batch_size, unread):
            rows += recognition.answers(reader, files, x, args.top)
            first += list(x[: SHOWN - len(first)]) if args.grad_cam else []
            bar.update(len(files))
    if rows:
        show(args, reader, rows, first)
    if unread:
        raise UserError(f"{len(unread)} of {len(paths)} pictures cannot be read:\n  " + "\n  ".join(unread[:10]))


def check_places(args: argparse.Namespace) -> None:
    """Raises UserError for a file to write that is no such file: `--json a.png b.png` means to read a.png."""
    from ldm.util import UserError

    if args.json == args.csv == "-":
        raise UserError("--json and --csv cannot both go to standard output: give one of them a file")
    for flag in ("json", "csv"):
        file = getattr(args, flag)
        if file not in (None, "-") and Path(file).suffix.lower() != f".{flag}":
            raise UserError(
                f"--{flag} {file}: expected a name that ends in .{flag}; for standard output put --{flag} at the end"
            )


def show(args: argparse.Namespace, reader: Any, rows: list[Any], first: list[Any]) -> None:
    """The answers as a table, and in the files asked for."""
    import torch

    from ldm import recognition

    answers = {
        "json": json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
        "csv": recognition.as_csv(rows),
    }
    if "-" not in (args.json, args.csv):
        print(f"{reader.source}\n{recognition.table(rows)}")
    for flag, text in answers.items():
        file = getattr(args, flag)
        if file == "-":
            print(text, end="")
        elif file:
            Path(file).write_text(text, encoding="utf-8", newline="")
    if args.grad_cam:
        recognition.looks_at_picture(reader, torch.stack(first), rows[: len(first)]).save(args.grad_cam, format="PNG")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), classify))
