"""Writes a classifier as an ONNX file and checks it in onnxruntime.

python scripts/export.py -r logs/<classifier_run> --onnx model.onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-r", "--run", metavar="RUN", required=True, help="run directory (logs/<run>) or checkpoint of a classifier")
    add("--onnx", metavar="FILE", required=True, help="the file to write")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    return parser


def export(args: argparse.Namespace) -> None:
    from ldm import exporting
    from ldm.recognition import open_run

    path = Path(args.onnx)
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = open_run(args.run, args.weights)
    difference = exporting.export(reader, path)
    print(f"{reader.source} -> {path}: {path.stat().st_size / 2**20:.1f} MiB, {len(reader.names)} classes")
    print(f"onnxruntime agrees: probabilities differ by at most {difference:.1g}")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), export))
