"""Drags points of a generated picture to where they should be (DragGAN), without a window.

python scripts/drag.py --seed 3 --points "20,40>20,46"
python scripts/drag.py -r logs/<run> --seed 3 --points "20,40>20,46; 44,40>44,46" --mask m.png --out drag.gif
python scripts/drag.py -r logs/<run> --latent outputs/invert/me.safetensors --points "20,40>20,46"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drag.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    text = "run directory, checkpoint or NVIDIA .pkl (default: models/gan/openmoji, faces that come with the project)"
    add("-r", "--run", "--ckpt", default=str(ROOT / "models/gan/openmoji"), metavar="RUN", help=text)
    add("--seed", type=int, default=0, help="which picture (default: 0)")
    add("--class", dest="class_label", default=None, help="class by number or name")
    add("--truncation", type=float, default=0.7, help="psi of the picture (default: 0.7)")
    add("--latent", metavar="FILE", default=None, help="a picture of scripts/invert.py or of an earlier drag instead")
    add("--points", required=True, help='"x,y>x,y; x,y>x,y": from where to where, in pixels from the upper left')
    add("--mask", metavar="PNG", default=None, help="white: may change; black: is kept")
    add("--steps", type=int, default=100, help="at most so many (default: 100)")
    add("--lr", type=float, default=0.1, help="step size in the latent (default: 0.1)")
    add("--space", choices=("w", "w+"), default="w+", help="one latent for all layers that move, or one each")
    add("--layers", type=int, default=6, help="leading layers that move (default: 6)")
    add("--mask-weight", type=float, default=10.0, help="how firmly the rest is kept (default: 10)")
    add("--motion-radius", type=float, default=None, help="pixels around a handle that move with it")
    add("--track-radius", type=int, default=None, help="pixels around a handle in which it is looked for")
    add("--out", default="outputs/drag/drag.gif", help=".gif, .mp4, or .png for the last picture only")
    add(
        "--weights",
        choices=("ema", "raw"),
        default=None,
        help="averaged or last weights (default: ema)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def drag(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ldm import editing, generate, latents
    from ldm.picture_files import check_movie, read_mask, write_movie
    from ldm.util import UserError, to_uint8

    check_movie(args.out)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected at least 1")
    handles, targets = editing.parse_points(args.points)
    model, info = latents.load_stylegan(args.run, args.weights, args.device)
    if args.latent:
        latent = latents.read_latent(args.latent, model)
    else:
        latent = latents.from_seed(model, args.seed, args.class_label, args.truncation)
    size = model.generator.img_resolution
    mask = torch.from_numpy(read_mask(args.mask, (size, size), print)) if args.mask else None
    options = editing.DragOptions(
        lr=args.lr,
        layers=args.layers,
        w_plus=args.space == "w+",
        mask_weight=args.mask_weight,
        motion_radius=args.motion_radius,
        track_radius=args.track_radius,
    )
    job, state = editing.start(model.generator, latent.ws, handles, targets, mask, options)
    scale, frames = max(1, 256 // size), []

    def film(state: editing.DragState) -> None:
        page = editing.mark(editing.picture(job, state)[0], state.handles, job.targets, scale)
        frames.append(to_uint8(page[None])[0])

    before = editing.picture(job, state)
    film(state)
    with tqdm(total=args.steps, desc="dragging", unit="step") as bar:
        for moved in editing.drag_points(job, state, args.steps):
            state = moved
            film(state)
            bar.set_postfix(pixels=f"{editing.distances(job, state.handles).mean():.1f}", refresh=False)
            bar.update(state.step - bar.n)
    out = Path(args.out)
    write_movie(frames, out, fps=12)
    after, about = editing.picture(job, state), {**latent.about, "points": args.points, "sha256": info["sha256"]}
    generate.save_png(generate.pictures(after, args.run)[0], out.with_name(f"{out.stem}_last.png"), about)
    ws = editing.full_ws(job, state.head)
    latents.save_latent(latents.Latent(ws, latent.tuned, about), out.with_suffix(".safetensors"))
    rest = ", ".join(f"{d:.1f}" for d in editing.distances(job, state.handles).tolist())
    print(
        f"{state.step} steps; pixels from the targets: {rest}{'' if state.arrived else ' (try more --steps or --lr)'}"
    )
    if mask is not None and bool((~mask).any()):
        change = float(((after - before).abs().mean((0, 1)).cpu() * ~mask).sum() / (~mask).sum() / 2)
        print(f"where the mask is black, the picture changed by {change:.1%} of its range on average")
    print(f"{out}, {out.stem}_last.png, {out.stem}.safetensors")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), drag))
