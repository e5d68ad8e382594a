"""Writes a trained run as small .safetensors files and a config.yaml, as the models in models/ are.

python scripts/release.py -r logs/<run> --out models/ldm/mine --sampling steps=20 scale=3 sampler=euler H=64 W=64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="release.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="run directory or checkpoint")
    add("--out", required=True, metavar="FOLDER", help="where model.safetensors and config.yaml go")
    text = "defaults of txt2img.py for this model: sampler, steps, scale, H, W"
    add("--sampling", nargs="+", default=[], metavar="KNOB=VALUE", help=text)
    add("--full", action="store_true", help="float32 instead of float16")
    return parser


def run(args: argparse.Namespace) -> None:
    from ldm.release import release

    for line in release(args.run, args.out, common.parse_settings(args.sampling), half=not args.full):
        print(line)


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), run))
