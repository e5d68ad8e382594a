"""Paints a picture anew as a text says, keeping as much of it as --strength leaves.

python scripts/img2img.py --init-img sketch.png --prompt "a fantasy landscape, matte painting" --strength 0.8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

DEFAULTS = {"n_iter": 1, "n_samples": 2, "scale": 5.0, "strength": 0.75, "init_img": None}


def build_parser() -> argparse.ArgumentParser:
    parser = common.painting_parser("img2img.py", __doc__)
    add = parser.add_argument
    add("--init-img", nargs="?", metavar="FILE", help="the picture to start from, of any size and mode")
    add("--strength", type=float, help="how much noise goes over it: 0 nothing changes, 1 all is new (default: 0.75)")
    parser.set_defaults(outdir="outputs/img2img-samples")
    return parser


def run(args: argparse.Namespace) -> None:
    from ldm.painter import Start
    from ldm.picture_files import Numbered, padded, read_image
    from ldm.text2image import plan
    from ldm.util import UserError

    settings = common.settle(args, "img2img", **DEFAULTS)
    if settings["init_img"] is None:
        raise UserError("which picture? give --init-img FILE")
    if not 0 <= settings["strength"] <= 1:
        raise UserError(f"--strength {settings['strength']}: expected a number from 0 to 1")
    picture = common.at_model_size(settings, read_image(settings["init_img"], print)[0], settings["init_img"])
    prompts = common.prompts_of(args, settings)
    out = Path(args.outdir)
    pictures = common.gallery(args, settings, Numbered(out / "samples"), Numbered(out, "grid-", 4))
    painter = common.open_painter(args, settings, common.SD_CONFIG, common.SD_WEIGHTS)
    painter.report_cuts(prompts)
    wanted = picture.shape[:2]
    size = common.fitting_size(painter, wanted, "cut back to the picture")
    batches = plan(prompts, settings["n_samples"], settings["n_iter"], settings["seed"], args.fixed_code)
    settings["script"] = "img2img"
    start = Start(padded(picture, size), strength=settings["strength"])
    finish = common.crop_to(size, wanted, corner=True)
    common.paint(args, settings, painter, batches, size, pictures, start=start, finish=finish)


if __name__ == "__main__":
    sys.exit(common.paint_main(build_parser(), run))
