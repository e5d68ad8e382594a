"""Paints what a text says, with Stable Diffusion, the latent diffusion text-to-image models, or a run of this project.

python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse" --plms
python scripts/txt2img.py --prompt "a red fox" --sampler dpmpp_2m --steps 20 --seed 7 --n_samples 1 --n_iter 1
python scripts/txt2img.py --from-file prompts.txt --n_iter 1 --outdir outputs/list
python scripts/txt2img.py -r logs/<run> --prompt "red apple" --preview 4
python scripts/txt2img.py --like outputs/txt2img-samples/samples/00000.png --scale 5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

LDM_CONFIG, LDM_WEIGHTS = "configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt"
OUTDIR = "outputs/txt2img-samples"
LAION_OUTDIR = "outputs/txt2img-samples-laion400m"
# the defaults of latent-diffusion's own txt2img.py
LDM_DEFAULTS = {"steps": 200, "n_iter": 1, "n_samples": 4, "scale": 5.0, "H": 256, "W": 256}


def build_parser() -> argparse.ArgumentParser:
    parser = common.painting_parser("txt2img.py", __doc__)
    add = parser.add_argument
    add("--H", type=int, metavar="PIXELS", help="height, any (default: 512)")
    add("--W", type=int, metavar="PIXELS", help="width, any (default: 512)")
    add(
        "-r", "--run", metavar="RUN", help="a run of this project that knows prompts: latent diffusion, DALL-E, CogView"
    )
    add("--dpm_solver", "--dpm-solver", action="store_true", help="the official DPM-Solver call")
    add("--laion400m", action="store_true", help="the LAION-400M model: its config, checkpoint and outdir")
    add("--ldm", action="store_true", help="config, checkpoint, defaults and file names of latent-diffusion's script")
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    from ldm.util import UserError

    if args.dpm_solver:
        if args.plms or args.sampler not in (None, "dpm_solver"):
            raise UserError("--dpm_solver and another sampler: choose one")
        args.sampler = "dpm_solver"
    if args.outdir is None:
        args.outdir = LAION_OUTDIR if args.laion400m else OUTDIR
    return common.settle(args, "txt2img", run=None, **({"H": 512, "W": 512} | (LDM_DEFAULTS if args.ldm else {})))


def run(args: argparse.Namespace) -> None:
    from ldm.picture_files import Named, Numbered
    from ldm.text2image import plan

    settings = settings_of(args)
    prompts = common.prompts_of(args, settings)
    out = Path(args.outdir)
    if args.ldm:
        files = Numbered(out / "samples", digits=4), Named(out, settings["prompt"].replace(" ", "-"))
    else:
        files = Numbered(out / "samples"), Numbered(out, "grid-", 4)
    pictures = common.gallery(args, settings, *files)
    if settings["run"] and common.draws_tokens(settings["run"]):
        paint_run(args, settings, prompts, pictures)
        return
    run = settings.pop("run")
    settings["ckpt"] = settings["ckpt"] or run
    other = args.laion400m or args.ldm
    config, weights = (LDM_CONFIG, LDM_WEIGHTS) if other else (common.SD_CONFIG, common.SD_WEIGHTS)
    painter = common.open_painter(args, settings, config, weights)
    painter.report_cuts(prompts)
    wanted = settings["H"], settings["W"]
    own = painter.trained_size
    if args.H is None and args.W is None and not args.like and own != wanted:
        print(f"note: the model was trained on {own[1]}x{own[0]} pixels: --H {own[0]} --W {own[1]}")
    size = common.fitting_size(painter, wanted, "cut to its middle")
    batches = plan(prompts, settings["n_samples"], settings["n_iter"], settings["seed"], args.fixed_code)
    settings["script"] = "txt2img"
    finish = common.crop_to(size, wanted, corner=False)
    common.paint(args, settings, painter, batches, size, pictures, finish=finish)


def paint_run(args: argparse.Namespace, settings: dict[str, Any], prompts: list[str], pictures: Any) -> None:
    """Paints with a run of DALL-E or CogView, whose pictures have the size that they were trained at."""
    from ldm.text2image import plan

    painter = common.open_token_painter(args, settings)
    batches = plan(prompts, settings["n_samples"], settings["n_iter"], settings["seed"], args.fixed_code)
    settings["script"] = "txt2img"
    common.paint(args, settings, painter, batches, None, pictures)


if __name__ == "__main__":
    sys.exit(common.paint_main(build_parser(), run))
