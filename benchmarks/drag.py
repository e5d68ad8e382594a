"""Random drags on a StyleGAN2 run: how near the handles come, how much the rest changes, what a step costs.

    python benchmarks/drag.py -r models/gan/openmoji_faces     # 20 drags of 8 pixels, at most 100 steps each

Handles lie where the picture has edges, since nothing tells one pixel of an even surface from the next. With --mask
everything further than 12 pixels from the way of the handle is kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm import editing, latents  # noqa: E402
from ldm.util import SeededNoise  # noqa: E402


def random_pair(image: Tensor, pixels: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A handle at one of the strongest tenth of the edges and a target so far away, both inside; [1, 2] each."""
    size = image.shape[2]
    grey = image.mean(0)
    edges = torch.zeros_like(grey)
    edges[1:-1, 1:-1] = (grey[2:, 1:-1] - grey[:-2, 1:-1]).abs() + (grey[1:-1, 2:] - grey[1:-1, :-2]).abs()
    strong = edges.flatten().argsort(descending=True)[: size * size // 10]
    while True:
        at = int(strong[torch.randint(len(strong), (1,), generator=rng)])
        angle = float(torch.rand(1, generator=rng)) * 2 * math.pi
        handle = torch.tensor([[float(at % size), float(at // size)]])
        target = handle + pixels * torch.tensor([[math.cos(angle), math.sin(angle)]])
        if bool(((target >= 2) & (target <= size - 3)).all()):
            return handle, target


def around(handle: Tensor, target: Tensor, size: int, reach: float = 12) -> Tensor:
    """bool [size, size], true within `reach` pixels of the way from handle to target."""
    line = torch.arange(size, dtype=torch.float32)
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), 2)  # (x, y)
    way = target[0] - handle[0]
    share = (((pixels - handle[0]) * way).sum(2) / way.square().sum()).clamp(0, 1)
    return (pixels - handle[0] - share[..., None] * way).norm(dim=2) <= reach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--run", required=True)
    parser.add_argument("-n", type=int, default=20, help="drags (20)")
    parser.add_argument("--pixels", type=float, default=8, help="from handle to target (8)")
    parser.add_argument("--steps", type=int, default=100, help="at most (100)")
    parser.add_argument("--lr", type=float, default=editing.DragOptions.lr)
    parser.add_argument("--truncation", type=float, default=0.7)
    parser.add_argument("--mask", action="store_true", help="keep what is far from the way")
    parser.add_argument("--mask-weight", type=float, default=editing.DragOptions.mask_weight)
    parser.add_argument("--w", action="store_true", help="drag in W instead of W+")
    args = parser.parse_args()
    model, _ = latents.load_stylegan(args.run)
    options = editing.DragOptions(lr=args.lr, mask_weight=args.mask_weight, w_plus=not args.w)
    size, rng = model.generator.img_resolution, torch.Generator().manual_seed(0)
    rest, changes, steps, began = [], [], 0, time.perf_counter()
    for seed in range(args.n):
        ws = model.latents(model.condition([seed]), SeededNoise([seed]), args.truncation).detach()
        handle, target = random_pair(model.synthesize(ws)[0].detach(), args.pixels, rng)
        mask = around(handle, target, size) if args.mask else None
        job, state = editing.start(model.generator, ws, handle, target, mask, options)
        before = editing.picture(job, state)
        for moved in editing.drag_points(job, state, args.steps):
            state = moved
        rest.append(float(editing.distances(job, state.handles)))
        steps += state.step
        if mask is not None:
            changes.append(float((editing.picture(job, state) - before).abs().mean((0, 1))[~mask].mean()) / 2)
        print(f"drag {seed}: {state.step} steps, {rest[-1]:.1f} pixels to go", flush=True)
    seconds = time.perf_counter() - began
    print(f"mean final distance {sum(rest) / len(rest):.2f} pixels; {1e3 * seconds / max(1, steps):.1f} ms a step")
    if changes:
        print(f"outside of the mask the picture changed by {sum(changes) / len(changes):.2%} of its range on average")


if __name__ == "__main__":
    main()
