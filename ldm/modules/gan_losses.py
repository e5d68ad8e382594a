"""Losses and penalties of generative adversarial networks, by name: formulas of logits, gradients and parameters.

`LOSSES[name]` holds two functions of logits [B, ...] (a critic's scores for "wgan"), each giving a scalar:

    discriminator(real, fake)    generator(fake, real)

Only the relativistic losses look at `real` in the generator's. `PENALTIES[name]` is a function
`(discriminator, real, fake, generator=None) -> scalar` of images, to be multiplied by its weight (gamma for R1 and R2,
lambda for the gradient penalty) and added to the discriminator's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Critic = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> logits [B, ...]
TINY = 1e-16  # under a root: keeps its gradient finite at 0


class GanLoss(NamedTuple):
    """The two players' losses.

    relativistic: the generator's needs the logits of real images.
    boundary: the logit that parts real from generated; None where the numbers have no such meaning.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    relativistic: bool = False
    boundary: float | None = 0.0


# --- losses -----------------------------------------------------------------------------------------------------------


def logistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))): Goodfellow et al. 2014, equation 1, as StyleGAN2 sums it."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-log sigmoid(D(G(z))): Goodfellow et al. 2014, section 3; strong gradients where the generator loses."""
    return F.softplus(-fake).mean()


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy over both halves of the batch: half of `logistic_d`."""
    return 0.5 * logistic_d(real, fake)


def minimax_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """log(1 - sigmoid(D(G(z)))): the game's own value; it saturates where the generator loses."""
    return -F.softplus(fake).mean()


def lsgan_d(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares with targets 1 and 0: Mao et al. 2017, equation 9."""
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def lsgan_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Mao et al. 2017, equation 9."""
    return 0.5 * (fake - 1).square().mean()


def wgan_d(real: Tensor, fake: Tensor) -> Tensor:
    """Minus the Wasserstein estimate: Arjovsky et al. 2017, equation 2; the critic must be kept Lipschitz."""
    return fake.mean() - real.mean()


def wgan_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Arjovsky et al. 2017, algorithm 1."""
    return -fake.mean()


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """Lim & Ye 2017, Miyato et al. 2018 (equation 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(x) - D(G(z)))) over pairs: Jolicoeur-Martineau 2018; Huang et al. 2024 (R3GAN), equation 2.

    Raises:
        ValueError: not as many real as generated images.
    """
    return F.softplus(_pairs(fake, real)).mean()


def relativistic_g(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The same with the roles changed.

    Raises:
        ValueError: no logits of real images, or not as many as of generated ones.
    """
    if real is None:
        raise ValueError("relativistic loss: got no logits of real images, expected as many as of generated ones")
    return F.softplus(_pairs(real, fake)).mean()


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"relativistic loss: got logits {list(a.shape)} and {list(b.shape)}, expected equal shapes")
    return a - b


LOSSES: dict[str, GanLoss] = {
    "vanilla": GanLoss(vanilla_d, non_saturating_g),
    "minimax": GanLoss(vanilla_d, minimax_g),
    "softplus": GanLoss(logistic_d, non_saturating_g),
    "lsgan": GanLoss(lsgan_d, lsgan_g, boundary=0.5),
    "wgan": GanLoss(wgan_d, wgan_g, boundary=None),
    "hinge": GanLoss(hinge_d, wgan_g),
    "relativistic": GanLoss(relativistic_d, relativistic_g, relativistic=True, boundary=None),
}


def accuracy(real: Tensor, fake: Tensor, boundary: float = 0.0) -> Tensor:
    """Share of images that the discriminator puts on the right side of the boundary."""
    return 0.5 * ((real > boundary).float().mean() + (fake < boundary).float().mean())


def diversity(images: Tensor, labels: Tensor | None = None, side: int = 64) -> Tensor:
    """Mean distance between two different images, root mean square over pixels; NaN without a pair.

    Args:
        images: [B, C, H, W]; larger ones are averaged down to `side` pixels.
        labels: [B]; only pairs of the same class count.
    """
    if max(images.shape[2:]) > side:
        images = F.adaptive_avg_pool2d(images, [min(side, n) for n in images.shape[2:]])
    x = images.detach().float().flatten(1)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    pairs = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    if labels is not None:
        pairs &= labels[:, None] == labels[None, :]
    return (distances * pairs).sum() / pairs.sum()


# --- penalties on the discriminator's gradient ------------------------------------------------------------------------


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of d logits / d images per image, [B]; itself differentiable.

    Raises:
        ValueError: images that ask for no gradient.
    """
    if not images.requires_grad:
        raise ValueError("squared_gradient: got images without requires_grad, expected requires_grad_() before D")
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return grad.square().flatten(1).sum(1)


def _at(discriminator: Critic, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        return squared_gradient(discriminator(images), images)


def r1(
    discriminator: Critic, real: Tensor, fake: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """E |grad D(x)|^2 / 2 at real images: Mescheder et al. 2018, equation 9; the weight is gamma."""
    return 0.5 * _at(discriminator, real).mean()


def r2(discriminator: Critic, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """E |grad D(G(z))|^2 / 2 at generated images: Mescheder et al. 2018, equation 10."""
    return 0.5 * _at(discriminator, fake).mean()


def r1_r2(discriminator: Critic, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """R1 + R2: what makes the relativistic loss converge (Huang et al. 2024, R3GAN)."""
    return r1(discriminator, real) + r2(discriminator, real, fake)


def gradient_penalty(
    discriminator: Critic, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """E (|grad D(x)| - 1)^2 between pairs of real and generated images: Gulrajani et al. 2017, equation 3.

    Args:
        generator: draws where between the two, on the device of `real`; None for the global one.

    Raises:
        ValueError: real and generated images of different shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(f"gradient penalty: got {list(real.shape)} and {list(fake.shape)}, expected equal shapes")
    share = torch.rand([real.shape[0]] + [1] * (real.ndim - 1), device=real.device, generator=generator)
    between = real.detach().lerp(fake.detach(), share.to(real.dtype))
    # the root has no gradient at 0, where a fresh critic may be
    return ((_at(discriminator, between) + 1e-12).sqrt() - 1).square().mean()


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "gp": gradient_penalty,
    "r1": r1,
    "r2": r2,
    "r1_r2": r1_r2,
}


@torch.no_grad()
def clip_weights(parameters: Iterable[nn.Parameter], limit: float = 0.01) -> None:
    """Every weight into [-limit, limit], in place, after each step of the critic (Arjovsky et al. 2017, algorithm 1).

    Raises:
        ValueError: a limit that is not above 0.
    """
    if limit <= 0:
        raise ValueError(f"clip_weights: got limit {limit}, expected above 0")
    parameters = list(parameters)
    torch._foreach_clamp_min_(parameters, -limit)
    torch._foreach_clamp_max_(parameters, limit)


class PathLength(nn.Module):
    """E (|J_w^T y| - a)^2, a the running mean of |J_w^T y|: StyleGAN2, equation 4; the weight is the caller's.

    A step in w of fixed size is to change the image by a fixed amount, whatever w and the direction.

    Args:
        decay: share of the batch's mean that the running mean takes over.
    """

    def __init__(self, decay: float = 0.01) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros([]))

    def forward(self, images: Tensor, ws: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scalar, from generated images [B, C, H, W] and the ws [B, num_ws, w_dim] that they came from.

        Args:
            noise: y, unit normal, of the images' shape; None draws it.
        """
        y = torch.randn_like(images) if noise is None else noise
        # the scale makes lengths comparable between resolutions
        (grad,) = torch.autograd.grad((images * y).sum() / math.sqrt(images[0, 0].numel()), ws, create_graph=True)
        # [B]; ws, and with it grad, is half under autocast. A picture that w does not change, such as one that tanh has
        # driven to white, has length 0, where the root has no gradient
        lengths = grad.float().square().sum(2).mean(1).clamp_min(TINY).sqrt()
        mean = self.mean.lerp(lengths.detach().mean(), self.decay)
        self.mean.copy_(mean)
        return (lengths - mean).square().mean()
