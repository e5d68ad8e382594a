"""Turns a checkpoint into diffusers' folder layout and back, or into a .safetensors file.

python scripts/convert.py --ckpt models/ldm/stable-diffusion-v1/model.ckpt --to diffusers --out sd-v1
python scripts/convert.py --ckpt sd-v1 --to official --out model.ckpt
python scripts/convert.py --ckpt model.ckpt --to safetensors --out model.safetensors --half
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help="checkpoint file, run directory, or diffusers folder")
    add(
        "--to",
        required=True,
        choices=("diffusers", "official", "safetensors"),
        help="a diffusers folder; one file with official names (.ckpt or .safetensors by its name); .safetensors",
    )
    add("--out", required=True, metavar="PATH", help="what to write; must not exist")
    add(
        "--config",
        default=None,
        metavar="YAML",
        help="config of the model (default: in the file, beside it, by family)",
    )
    add("--half", action="store_true", help="write float16 weights")
    add(
        "--weights",
        choices=("ema", "raw"),
        default=None,
        help="averaged or last weights (default: ema where there are)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    from ldm.conversion.job import convert

    for line in convert(args.ckpt, args.to, args.out, config=args.config, half=args.half, weights=args.weights):
        print(line)


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), run))
