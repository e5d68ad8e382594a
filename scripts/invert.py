"""Finds the latent of your own picture in a StyleGAN2 model, so that it can be dragged.

python scripts/invert.py -r logs/<run> --image me.png
python scripts/invert.py -r logs/<run> --image me.png --space w --tune 0
python scripts/drag.py -r logs/<run> --latent outputs/invert/me.safetensors --points "20,40>20,46"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="invert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    text = "run directory, checkpoint or NVIDIA .pkl (default: models/gan/openmoji, faces that come with the project)"
    add("-r", "--run", "--ckpt", default=str(ROOT / "models/gan/openmoji"), metavar="RUN", help=text)
    add("--image", required=True, metavar="FILE", help="the picture; its middle square is used")
    add("--class", dest="class_label", default=None, help="class of the picture, for conditional models")
    add("--space", choices=("w", "w+"), default="w+", help="one latent for all layers (easier to edit), or one each")
    add("--steps", type=int, default=400, help="steps of the projection (default: 400)")
    add("--tune", type=int, default=200, metavar="N", help="steps of pivotal tuning (default: 200; 0: none)")
    add("--perceptual", choices=("pixel_gradient", "lpips", "none"), default="pixel_gradient", help="second distance")
    add(
        "--weights",
        choices=("ema", "raw"),
        default=None,
        help="averaged or last weights (default: ema)",
    )
    add("--seed", type=int, default=0, help="of the search")
    add("--outdir", default="outputs/invert", help="where latent, picture and losses go (default: outputs/invert)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def invert(args: argparse.Namespace) -> None:
    import torch

    from ldm import generate, inversion, latents
    from ldm.util import UserError, image_grid

    if args.steps < 1 or args.tune < 0:
        raise UserError(f"--steps {args.steps} --tune {args.tune}: expected at least 1 and 0")
    model, info = latents.load_stylegan(args.run, args.weights, args.device)
    g = model.generator
    target = latents.square_picture(args.image, g.img_resolution, g.img_channels, print).to(model.device)
    perceptual = distance_of(args.perceptual, model.device)
    classes = None if args.class_label is None else [generate.class_index(model, args.class_label)]
    cond = model.condition([args.seed], classes=classes)
    c = None if cond is None else model.encode_classes(cond)
    losses: dict[str, list[float]] = {}
    with bar("projecting", args.steps) as callback:
        ws, losses["project"] = inversion.project(
            g, target, c, args.space, args.steps, perceptual=perceptual, seed=args.seed, callback=callback
        )
    projected = inversion.render(g, ws).detach().clamp(-1, 1)
    tuned: dict[str, Any] = {}
    if args.tune:
        before = {k: v.clone() for k, v in g.state_dict().items()}
        with bar("tuning", args.tune) as callback:
            losses["tune"] = inversion.tune(g, ws, target, args.tune, perceptual=perceptual, callback=callback)
        tuned = {k: v for k, v in g.state_dict().items() if not torch.equal(v, before[k])}
    found = inversion.report(g, ws, target, losses)
    about = {"image": args.image, "space": args.space, "mse": found.mse, "psnr": found.psnr, "sha256": info["sha256"]}
    stem, outdir = Path(args.image).stem, Path(args.outdir)
    latents.save_latent(latents.Latent(ws, tuned, about), outdir / f"{stem}.safetensors")
    final = inversion.render(g, ws).detach().clamp(-1, 1)
    sheet = image_grid(torch.cat([target, projected, final]), nrow=3)
    generate.save_png(generate.pictures(sheet[None], args.run)[0], outdir / f"{stem}.png", about)
    write_losses(losses, outdir / f"{stem}_loss.csv")
    print(f"picture, projection, after tuning: {outdir / f'{stem}.png'}; latent: {outdir / f'{stem}.safetensors'}")
    print(f"mean squared error {found.mse:.5f}, PSNR {found.psnr:.1f} dB; losses: {outdir / f'{stem}_loss.csv'}")


def distance_of(name: str, device: Any) -> Any:
    from ldm.modules.lpips import LPIPS, make_perceptual_loss

    loss = make_perceptual_loss(name)
    if isinstance(loss, LPIPS):
        loss.load_pretrained()
    return None if loss is None else loss.to(device)


def bar(what: str, total: int) -> Any:
    """A progress bar that shows the loss; gives the callback that moves it."""
    import contextlib

    from tqdm import tqdm

    @contextlib.contextmanager
    def shown() -> Any:
        with tqdm(total=total, desc=what, unit="step") as progress:

            def step(phase: str, i: int, loss: float) -> None:
                progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
                progress.update()

            yield step

    return shown()


def write_losses(losses: dict[str, list[float]], path: Path) -> None:
    rows = [f"{phase},{i},{value:.6g}" for phase, values in losses.items() for i, value in enumerate(values)]
    path.write_text("\n".join(["phase,step,loss", *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), invert))
