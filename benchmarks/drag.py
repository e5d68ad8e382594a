"""How well a StyleGAN2 is dragged: random drags of 8 pixels, how near they come, and what changes outside of the mask.

    python benchmarks/drag.py                       # the model that comes with the project
    python benchmarks/drag.py -r logs/<run> -n 20 --pixels 8 --steps 100

Each drag has a picture of its own (seeds from `--seed` on), a handle in the middle half of it, a target in a random
direction, and a mask: pixels within twice the way of the line from handle to target may change, the others are kept.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm import editing, latents  # noqa: E402


def random_pair(size: int, pixels: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A handle in the middle half of a picture and a target `pixels` away, whole pixels, [1, 2] each."""
    handle = (size * (0.25 + 0.5 * torch.rand(2, generator=generator))).round()
    angle = 2 * math.pi * float(torch.rand(1, generator=generator))
    target = handle + pixels * torch.tensor([math.cos(angle), math.sin(angle)])
    return handle[None], target.clamp(0, size - 1)[None]


def corridor(size: int, handle: Tensor, target: Tensor, width: float) -> Tensor:
    """Pixels within `width` of the line from handle to target, bool [size, size]."""
    line = torch.arange(size, dtype=torch.float32)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    way = target - handle
    along = (((points - handle) @ way.T) / way.square().sum()).clamp(0, 1)
    return (points - handle - along * way).norm(dim=-1) <= width


def one_drag(model, seed: int, args: argparse.Namespace) -> tuple[float, float, int]:
    """(pixels left, mean change outside of the mask as a share of the range, steps)."""
    ws = latents.from_seed(model, seed, None, args.truncation).ws
    size = model.generator.img_resolution
    handle, target = random_pair(size, args.pixels, torch.Generator().manual_seed(seed))
    mask = corridor(size, handle, target, 2 * args.pixels)
    options = editing.DragOptions(lr=args.lr, mask_weight=args.mask_weight)
    job, state = editing.start(model.generator, ws, handle, target, mask, options)
    before = editing.picture(job, state)
    for moved in editing.drag_points(job, state, args.steps):
        state = moved
    change = (editing.picture(job, state) - before).abs().mean((0, 1))[~mask].mean() / 2
    return float(editing.distances(job, state.handles).mean()), float(change), state.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--run", default=str(ROOT / "models/gan/openmoji"))
    parser.add_argument("-n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first drag")
    parser.add_argument("--pixels", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=editing.DragOptions.lr)
    parser.add_argument("--mask-weight", type=float, default=editing.DragOptions.mask_weight)
    parser.add_argument("--truncation", type=float, default=0.7)
    args = parser.parse_args()
    model, _ = latents.load_stylegan(args.run, None, "cpu")
    seeds = range(args.seed, args.seed + args.n)
    rows = torch.tensor([one_drag(model, seed, args) for seed in tqdm(seeds, desc="dragging", unit="drag")])
    left, change, steps = rows.unbind(1)
    print(f"{args.n} drags of {args.pixels:g} pixels, at most {args.steps} steps:")
    print(f"  pixels left     {left.mean():.2f} on average, at most {left.max():.2f}")
    print(f"  steps           {steps.mean():.0f} on average")
    print(f"  kept by a mask  changed by {change.mean():.2%} of the range on average, at most {change.max():.2%}")


if __name__ == "__main__":
    main()
