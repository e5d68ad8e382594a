"""Paints a part of a picture anew. White in the mask = repaint, black = keep; what is kept stays as it is.

python scripts/inpaint.py --indir data/inpainting_examples --outdir outputs/inpainting_results
    each x.png with its x_mask.png, without a text (models/ldm/inpainting_big)
python scripts/inpaint.py --image dog.png --mask mask.png --prompt "a cat on a bench"
    with a text: Stable Diffusion (kept parts are put back at each step), or its inpainting model by --ckpt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

LDM_CONFIG, LDM_WEIGHTS = "models/ldm/inpainting_big/config.yaml", "models/ldm/inpainting_big/last.ckpt"
DEFAULTS = {"n_iter": 1, "n_samples": 1, "prompt": "", "strength": 1.0, "image": None, "mask": None}


def build_parser() -> argparse.ArgumentParser:
    parser = common.painting_parser("inpaint.py", __doc__)
    add = parser.add_argument
    add("--indir", nargs="?", metavar="DIR", help="pairs x.png and x_mask.png; the results are <outdir>/x.png")
    add("--image", metavar="FILE", help="one picture, of any size and mode")
    add("--mask", metavar="FILE", help="its mask, of the same size: white = repaint (default: where it is transparent)")
    add("--strength", type=float, help="noise over what is repainted: 1 (default) forgets what was there")
    parser.set_defaults(outdir="outputs/inpaint-samples")
    return parser


def pairs(args: argparse.Namespace, settings: dict[str, Any]) -> list[tuple[Path, Path | None]]:
    """(picture, mask) files.

    Raises:
        UserError: none given, or a mask without its picture.
    """
    from ldm.util import UserError

    if args.indir is None:
        if settings["image"] is None:
            raise UserError("which picture? give --image FILE --mask FILE, or --indir DIR with x.png and x_mask.png")
        return [(Path(settings["image"]), Path(settings["mask"]) if settings["mask"] else None)]
    masks = sorted(Path(args.indir).glob("*_mask.png"))
    if not masks:
        raise UserError(f"--indir {args.indir} holds no *_mask.png: expected pairs x.png and x_mask.png")
    found = [(m.with_name(m.name.removesuffix("_mask.png") + ".png"), m) for m in masks]
    lonely = [str(m) for picture, m in found if not picture.is_file()]
    if lonely:
        raise UserError(f"no picture for the mask {lonely[0]}: expected {lonely[0].removesuffix('_mask.png')}.png")
    return found


def read_pair(picture: Path, mask: Path | None) -> tuple[Any, Any]:
    """uint8 [H, W, 3] and bool [H, W], true = repaint."""
    from ldm.picture_files import read_image, read_mask, threshold
    from ldm.util import UserError

    image, alpha = read_image(picture, print)
    if mask is not None:
        return image, read_mask(mask, (image.shape[1], image.shape[0]), print)
    if alpha is None:
        raise UserError(
            f"which part of {picture}? give --mask FILE (white = repaint); it has no transparent part either"
        )
    return image, threshold(255 - alpha, f"from the alpha channel of {picture}", print)


def at_model_size(settings: dict[str, Any], name: Path, image: Any, repaint: Any) -> tuple[Any, Any]:
    """Picture and mask in the size of the model, where it has but one."""
    image = common.at_model_size(settings, image, str(name))
    return image, common.at_model_size(settings, repaint, f"mask of {name}")


def run(args: argparse.Namespace) -> None:
    from ldm.picture_files import Named, Numbered
    from ldm.util import UserError

    settings = common.settle(args, "inpaint", **DEFAULTS)
    if not 0 < settings["strength"] <= 1:
        raise UserError(f"--strength {settings['strength']}: expected a number above 0, up to 1")
    files = pairs(args, settings)
    whole = [(*f, *at_model_size(settings, f[0], *read_pair(*f))) for f in files]  # faults before the model is loaded
    prompts = common.prompts_of(args, settings)
    text = any(prompts)
    config, weights = (common.SD_CONFIG, common.SD_WEIGHTS) if text else (LDM_CONFIG, LDM_WEIGHTS)
    painter = common.open_painter(args, settings, config, weights)
    painter.report_cuts(prompts)
    out = Path(args.outdir)
    for picture, mask, image, repaint in whole:
        samples = Named(out, picture.stem) if args.indir else Numbered(out / "samples")
        together = None if args.indir else Numbered(out, "grid-", 4)
        record = {**settings, "script": "inpaint", "image": str(picture), "mask": str(mask) if mask else None}
        repaint_one(args, record, painter, prompts, image, repaint, common.gallery(args, settings, samples, together))


def repaint_one(
    args: argparse.Namespace,
    settings: dict[str, Any],
    painter: Any,
    prompts: list[str],
    image: Any,
    repaint: Any,
    out: Any,
) -> None:
    """All pictures of one pair."""
    import numpy as np

    from ldm.painter import Start
    from ldm.picture_files import padded
    from ldm.text2image import plan

    wanted = image.shape[:2]
    size = common.fitting_size(painter, wanted, "cut back to the picture")
    crop = common.crop_to(size, wanted, corner=True)

    def keep_known(picture: Any) -> Any:
        return np.where(repaint[..., None], crop(picture), image)

    start = Start(padded(image, size), padded(repaint, size), settings["strength"])
    batches = plan(prompts, settings["n_samples"], settings["n_iter"], settings["seed"], args.fixed_code)
    common.paint(args, settings, painter, batches, size, out, start=start, finish=keep_known)


if __name__ == "__main__":
    sys.exit(common.paint_main(build_parser(), run))
