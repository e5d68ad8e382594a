"""Says what pictures show, with a run of CogView.

python scripts/caption.py -r logs/<run> picture.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="caption.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="picture files")
    add("-r", "--run", required=True, metavar="RUN", help="run directory or checkpoint file")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add(
        "--rerank",
        type=int,
        default=1,
        metavar="N",
        help="read each picture N times and keep the caption on which captioning and drawing agree best (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the captions that are drawn, with --rerank (default: 0)")
    add("--batch-size", type=int, default=32, help="pictures per network call")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def caption(args: argparse.Namespace) -> None:
    from ldm import generate
    from ldm.token_painter import read_pictures
    from ldm.util import UserError

    model, _ = generate.load_run(args.run)
    if not hasattr(model, "caption"):
        raise UserError(f"{args.run} is a {type(model).__name__}, which does not caption: expected a run of CogView")
    model.to(generate.pick_device(args.device))
    scope, _ = generate.weights_scope(model, args.weights)
    with scope:
        for start in range(0, len(args.pictures), args.batch_size):
            files = args.pictures[start : start + args.batch_size]
            texts = model.caption(read_pictures(model, files), rerank=args.rerank, seed=args.seed)
            for file, text in zip(files, texts, strict=True):
                print(f"{file}: {text}")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), caption))
