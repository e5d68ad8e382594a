"""A first model in a few minutes: trains a class-conditional diffusion model on handwritten digits and draws with it.

python scripts/demo.py        (make digits does the same after installing)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-l", "--logdir", default="logs", help="folder of the run directory (default: logs)")
    parser.add_argument("--outdir", default="outputs/digits", help="where the pictures go (default: outputs/digits)")
    parser.add_argument("--config", default=str(ROOT / "configs/diffusion/ddpm_digits.yaml"), help="what to train")
    parser.add_argument("extra", nargs="*", help="further arguments of main.py: key.path=value")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    before = set(Path(args.logdir).glob("*"))
    train = ["main.py", "-t", "-b", args.config, "-l", args.logdir, *args.extra]
    if code := call(train):
        return code
    run = max(set(Path(args.logdir).glob("*")) - before, key=lambda p: p.stat().st_mtime)
    if code := call(["scripts/sample.py", "-r", str(run), "-n", "100", "--outdir", args.outdir]):
        return code
    grid = max(Path(args.outdir).glob("grid*.png"), key=lambda p: p.stat().st_mtime)
    print(f"\nThe model is in {run}\nThe pictures are in {grid.resolve()} (column = digit asked for)")
    print(f"Draw more:  python scripts/sample.py -r {run} -n 16 --class 7 --scale 3")
    return 0


def call(argv: list[str]) -> int:
    print("$ python", *argv, flush=True)
    return subprocess.call([sys.executable, str(ROOT / argv[0]), *argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
