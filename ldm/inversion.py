"""From a picture to the latent that a StyleGAN2 generator makes it from, and a generator tuned to make it exactly.

Projection as in Karras et al. 2020 (StyleGAN2, appendix D) in W or W+ (Abdal et al. 2019), then pivotal tuning (Roich
et al. 2021, "Pivotal tuning for latent-based editing of real images"): the generator is trained on that one picture
with the latent held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError

SPACES = ("w", "w+")
Step = Callable[[str, int, float], None]  # phase, step, loss


@dataclass(frozen=True)
class Inversion:
    """What was found.

    Attributes:
        ws: [1, num_ws, w_dim].
        losses: by phase, "project" and "tune", one number per step.
        mse: mean squared error of the final picture, in [-1, 1]; psnr: in dB.
    """

    ws: Tensor
    losses: dict[str, list[float]]
    mse: float
    psnr: float


def distance(a: Tensor, b: Tensor, perceptual: nn.Module | None = None) -> Tensor:
    """Mean squared error over an image pyramid, and a perceptual distance if there is one; scalar."""
    total, scale, x, y = a.new_zeros(()), 0, a, b
    while min(x.shape[2:]) >= 8 or scale == 0:
        total, scale = total + F.mse_loss(x, y), scale + 1
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    total = total / scale
    if perceptual is None:
        return total
    a, b = (t.expand(-1, 3, -1, -1) if t.shape[1] == 1 else t for t in (a, b))
    return total + perceptual(a, b).mean()


@torch.no_grad()
def start_from(
    generator: nn.Module, target: Tensor, c: Tensor | None, loss: Callable[[Tensor], Tensor], n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The nearest of n random w, and of their mean, [1, w_dim]; and the deviation of w, a scalar."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, generator.z_dim, generator=rng).to(target.device)
    ws = generator.mapping(z, None if c is None else c.expand(n, -1))[:, 0]
    candidates = torch.cat([ws.mean(0, keepdim=True), ws])
    found = [float(loss(render(generator, w[None, None]))) for w in candidates]
    return candidates[found.index(min(found))][None].clone(), ws.std(0).square().sum().sqrt()


def render(generator: nn.Module, ws: Tensor) -> Tensor:
    """ws [1, 1 or num_ws, w_dim] -> [1, C, H, W], not clamped; in float32 on every device."""
    return generator.synthesis(ws.expand(-1, generator.num_ws, -1), noise_mode="const", force_fp32=True)


def project(
    generator: nn.Module,
    target: Tensor,
    c: Tensor | None = None,
    space: str = "w+",
    steps: int = 400,
    lr: float = 0.05,
    perceptual: nn.Module | None = None,
    candidates: int = 100,
    seed: int = 0,
    callback: Step | None = None,
) -> tuple[Tensor, list[float]]:
    """The ws [1, num_ws, w_dim] whose picture is nearest to `target`, and the loss per step.

    Args:
        target: [1, C, H, W] in [-1, 1].
        c: condition of the mapping [1, c_dim].
        space: "w" (one latent for all layers, easier to edit) or "w+" (one per layer, nearer to the picture).
        candidates: random latents of which the nearest is where the search begins.

    Raises:
        UserError: another space, a picture of another size.
    """
    check_target(generator, target)
    if space not in SPACES:
        raise UserError(f"space {space!r}: expected one of {', '.join(SPACES)}")
    generator.requires_grad_(False)
    first, spread = start_from(generator, target, c, lambda x: distance(x, target, perceptual), candidates, seed)
    layers = 1 if space == "w" else generator.num_ws
    ws = first[:, None].repeat(1, layers, 1).requires_grad_()
    rng, losses = torch.Generator().manual_seed(seed + 1), []
    optimizer = torch.optim.Adam([ws], lr=lr)
    best, best_loss = ws.detach().clone(), math.inf
    for step in range(steps):
        t = step / steps
        optimizer.param_groups[0]["lr"] = lr * min(1.0, t / 0.05 + 0.05, 0.5 - 0.5 * math.cos(math.pi * (1 - t)) + 1e-3)
        # noise at the start keeps the search out of the first hollow
        shake = 0.05 * float(spread) / math.sqrt(ws.shape[2]) * max(0.0, 1 - t / 0.75) ** 2
        noise = torch.randn(ws.shape, generator=rng).to(ws.device) * shake
        loss = distance(render(generator, ws + noise), target, perceptual)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if losses[-1] < best_loss:
            best, best_loss = (ws + noise).detach().clone(), losses[-1]
        optimizer.step()
        if callback is not None:
            callback("project", step, losses[-1])
    return best.expand(-1, generator.num_ws, -1).clone(), losses


def tune(
    generator: nn.Module,
    ws: Tensor,
    target: Tensor,
    steps: int = 200,
    lr: float = 1e-3,
    perceptual: nn.Module | None = None,
    callback: Step | None = None,
) -> list[float]:
    """Pivotal tuning: trains the synthesis network, in place, to make `target` from `ws`; the loss per step."""
    check_target(generator, target)
    synthesis = generator.synthesis.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(synthesis.parameters(), lr=lr), []
    for step in range(steps):
        loss = distance(render(generator, ws), target, perceptual)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if callback is not None:
            callback("tune", step, losses[-1])
    generator.requires_grad_(False)
    return losses


@torch.no_grad()
def report(generator: nn.Module, ws: Tensor, target: Tensor, losses: dict[str, list[float]]) -> Inversion:
    """How near the picture of `ws` is."""
    mse = float(F.mse_loss(render(generator, ws).clamp(-1, 1), target))
    return Inversion(ws, losses, mse, 10 * math.log10(4 / max(mse, 1e-10)))


def check_target(generator: nn.Module, target: Tensor) -> None:
    """Raises UserError for a picture of another shape than the generator's."""
    want = (1, generator.img_channels, generator.img_resolution, generator.img_resolution)
    if target.shape != want:
        raise UserError(f"the picture is {list(target.shape)}, expected {list(want)}: crop and resize it first")
