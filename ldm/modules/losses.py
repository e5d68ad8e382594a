"""Losses of autoencoders that train against a discriminator: reconstruction, perceptual, KL or codebook, GAN.

Esser et al. 2021 (VQGAN), equations 4 to 7; Rombach et al. 2022 (LDM), appendix G.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.discriminator import NLayerDiscriminator, weights_init
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.modules.lpips import make_perceptual_loss

logger = logging.getLogger(__name__)
Logs = dict[str, Tensor]


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Cross-entropy loss of a discriminator (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def hinge_d_loss_with_exemplar_weights(logits_real: Tensor, logits_fake: Tensor, weights: Tensor) -> Tensor:
    """`hinge_d_loss` with one weight per image, [B].

    Raises:
        ValueError: the number of weights is not the number of images.
    """
    if not weights.shape[0] == logits_real.shape[0] == logits_fake.shape[0]:
        raise ValueError(f"weights: got {weights.shape[0]}, expected one per image ({logits_real.shape[0]})")
    loss_real = F.relu(1.0 - logits_real).flatten(1).mean(1)
    loss_fake = F.relu(1.0 + logits_fake).flatten(1).mean(1)
    return 0.5 * ((weights * loss_real).sum() + (weights * loss_fake).sum()) / weights.sum()


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`value` before step `threshold`, `weight` from there on."""
    return value if global_step < threshold else weight


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Code indices of any shape -> (perplexity, number of codes in use).

    The perplexity exp(-sum p log p) is `n_embed` when all codes are equally frequent and 1 when only one is used.
    """
    counts = torch.zeros(n_embed, device=predicted_indices.device)
    flat = predicted_indices.flatten()
    p = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype)) / flat.numel()
    return torch.exp(-(p * torch.log(p + 1e-10)).sum()), (p > 0).sum()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of the images [B, C, H, W] in [-1, 1], clipped to that range: [B]."""
    mse = (x - y.clamp(-1, 1)).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs()


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (x - y) ** 2


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
PIXEL_LOSSES = {"l1": l1, "l2": l2}


def _choose(table: dict[str, object], option: str, name: str) -> object:
    if name not in table:
        raise ValueError(f"{option}: got {name!r}, expected one of {', '.join(table)}")
    return table[name]


class _AdversarialLoss(nn.Module):
    """What the two losses below share: the discriminator, its losses and the adaptive weight.

    Args: see `LPIPSWithDiscriminator`.
    """

    def __init__(
        self,
        disc_start: int,
        pixelloss_weight: float,
        disc_num_layers: int,
        disc_in_channels: int,
        disc_factor: float,
        disc_weight: float,
        perceptual_weight: float,
        use_actnorm: bool,
        disc_conditional: bool,
        disc_ndf: int,
        disc_loss: str,
        perceptual_loss: str,
    ) -> None:
        super().__init__()
        self.disc_loss = _choose(D_LOSSES, "disc_loss", disc_loss)
        if pixelloss_weight != 1.0:
            logger.warning("pixelloss_weight %s has no effect, as in the official code", pixelloss_weight)
        self.pixel_weight, self.perceptual_weight = pixelloss_weight, perceptual_weight
        self.perceptual_loss = make_perceptual_loss(perceptual_loss)
        self.discriminator = NLayerDiscriminator(
            input_nc=disc_in_channels, n_layers=disc_num_layers, use_actnorm=use_actnorm, ndf=disc_ndf
        ).apply(weights_init)
        self.discriminator_iter_start, self.disc_factor = disc_start, disc_factor
        self.discriminator_weight, self.disc_conditional = disc_weight, disc_conditional

    def perceptual(self, inputs: Tensor, reconstructions: Tensor) -> Tensor | None:
        """Perceptual distance [B, 1, 1, 1], or None if it has no weight."""
        if self.perceptual_loss is None or self.perceptual_weight <= 0:
            return None
        return self.perceptual_loss(inputs, reconstructions)

    def logits(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Discriminator logits of the images, with the condition stacked under them if the model has one.

        Raises:
            ValueError: a condition is missing, or given to a loss that is built without.
        """
        if self.disc_conditional != (cond is not None):
            got = "none" if cond is None else "a condition"
            raise ValueError(f"cond: got {got}, but disc_conditional is {self.disc_conditional}")
        return self.discriminator(images if cond is None else torch.cat((images, cond), dim=1))

    def calculate_adaptive_weight(
        self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor, discriminator_weight: float | None = None
    ) -> Tensor:
        """lambda of VQGAN, equation 7: both losses pull equally hard at the decoder's last layer."""
        weight = self.discriminator_weight if discriminator_weight is None else discriminator_weight
        nll_grads = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0]
        g_grads = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        d_weight = nll_grads.float().norm() / (g_grads.float().norm() + 1e-4)
        return d_weight.clamp(0.0, 1e4).detach() * weight

    def generator_part(
        self, nll_loss: Tensor, reconstructions: Tensor, last_layer: Tensor | None, cond: Tensor | None, step: int
    ) -> tuple[Tensor, Logs]:
        """Weighted adversarial term of the generator [] and its logs."""
        g_loss = -self.logits(reconstructions, cond).mean()
        if self.disc_factor <= 0 or not torch.is_grad_enabled():
            d_weight = g_loss.new_zeros(())
        elif last_layer is None:
            raise ValueError("last_layer: got None, expected the decoder's last weight")
        else:
            d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        factor = adopt_weight(self.disc_factor, step, threshold=self.discriminator_iter_start)
        logs = {"d_weight": d_weight.detach(), "disc_factor": g_loss.new_full((), factor), "g_loss": g_loss.detach()}
        return d_weight * factor * g_loss, logs

    def discriminator_part(
        self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None, step: int
    ) -> tuple[Tensor, Logs]:
        """Loss of the discriminator [] and its logs."""
        logits_real = self.logits(inputs.detach(), cond)
        logits_fake = self.logits(reconstructions.detach(), cond)
        factor = adopt_weight(self.disc_factor, step, threshold=self.discriminator_iter_start)
        d_loss = factor * self.disc_loss(logits_real, logits_fake)
        logs = {
            "disc_loss": d_loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        return d_loss, logs


def _check_index(optimizer_idx: int) -> None:
    if optimizer_idx not in (0, 1):
        raise ValueError(f"optimizer_idx: got {optimizer_idx}, expected 0 (generator) or 1 (discriminator)")


def _with_split(logs: Logs, split: str) -> Logs:
    return {f"{split}/{k}": v for k, v in logs.items()}


class LPIPSWithDiscriminator(_AdversarialLoss):
    """Loss of AutoencoderKL: Laplace likelihood with one learned scale, KL, perceptual and adversarial terms.

    Args:
        disc_start: first update in which the adversarial terms count.
        logvar_init: log-variance of the likelihood; official training leaves it there, since no optimiser holds it.
        kl_weight: weight of KL(q(z|x), N(0, 1)).
        pixelloss_weight: no effect (official files set it).
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: of the discriminator.
        disc_factor: 0 turns the adversarial terms off.
        disc_weight: factor on the adaptive weight.
        perceptual_weight: 0 turns the perceptual term off.
        disc_conditional: the discriminator sees `cond` too.
        disc_loss: hinge | vanilla.
        perceptual_loss: lpips | pixel_gradient (needs no weights) | none.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_loss: str = "lpips",
        disc_ndf: int = 64,
    ) -> None:
        super().__init__(
            disc_start=disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_ndf=disc_ndf,
            disc_loss=disc_loss,
            perceptual_loss=perceptual_loss,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float | None = None,
    ) -> tuple[Tensor, Logs]:
        """Images [B, C, H, W] in [-1, 1] -> (loss [], logs with the prefix `split`), per image in nats.

        optimizer_idx 0 is the autoencoder's loss, 1 the discriminator's; `last_layer` is the decoder's last weight.
        """
        _check_index(optimizer_idx)
        if optimizer_idx == 1:
            loss, logs = self.discriminator_part(inputs, reconstructions, cond, global_step)
            return loss, _with_split(logs, split)
        rec_loss = l1(inputs, reconstructions)
        p_loss = self.perceptual(inputs, reconstructions)
        if p_loss is not None:
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        nll = rec_loss / torch.exp(self.logvar) + self.logvar
        B = nll.shape[0]
        nll_loss = nll.sum() / B
        weighted_nll_loss = nll_loss if weights is None else (weights * nll).sum() / B
        kl_loss = posteriors.kl().sum() / B
        g_term, logs = self.generator_part(nll_loss, reconstructions, last_layer, cond, global_step)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + g_term
        logs = {
            "total_loss": loss.detach(),
            "logvar": self.logvar.detach(),
            "kl_loss": kl_loss.detach(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": rec_loss.detach().mean(),
            **logs,
        }
        return loss, _with_split(logs, split)


class PixelKL(nn.Module):
    """Loss of AutoencoderKL without a discriminator: for drawings, where sharp edges need no adversary.

    l2_weight mean (x - y)^2 + l1_weight mean |x - y| + kl_weight KL(q(z | x), N(0, 1)), the last in nats per image.
    """

    def __init__(self, l2_weight: float = 1.0, l1_weight: float = 0.0, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.l2_weight, self.l1_weight, self.kl_weight = l2_weight, l1_weight, kl_weight

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int = 0,
        global_step: int = 0,
        split: str = "train",
        **_: object,
    ) -> tuple[Tensor, Logs]:
        """Images [B, C, H, W] in [-1, 1] -> (loss [], logs with the prefix `split`); psnr in dB, of the whole batch."""
        error = reconstructions.float() - inputs.float()
        squared, kl_loss = error.square().mean(), posteriors.kl().mean()
        loss = self.l2_weight * squared + self.kl_weight * kl_loss
        if self.l1_weight:
            loss = loss + self.l1_weight * error.abs().mean()
        logs = {"total_loss": loss.detach(), "kl_loss": kl_loss.detach(), "rec_loss": squared.detach()}
        logs["psnr"] = 10 * torch.log10(4 / squared.detach().clamp(min=1e-12))
        return loss, _with_split(logs, split)


class VQLPIPSWithDiscriminator(_AdversarialLoss):
    """Loss of VQModel, of LDM and of taming-transformers: pixel, perceptual, codebook and adversarial terms, per pixel.

    Args: as for `LPIPSWithDiscriminator`, and
        codebook_weight: weight of the quantiser's loss.
        n_classes: codebook size; perplexity and codes in use are logged where it and the indices are known.
        pixel_loss: l1 | l2.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
    ) -> None:
        super().__init__(
            disc_start=disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_ndf=disc_ndf,
            disc_loss=disc_loss,
            perceptual_loss=perceptual_loss,
        )
        self.codebook_weight, self.n_classes = codebook_weight, n_classes
        self.pixel_loss = _choose(PIXEL_LOSSES, "pixel_loss", pixel_loss)

    def forward(
        self,
        codebook_loss: Tensor | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """Images [B, C, H, W] in [-1, 1] -> (loss [], logs with the prefix `split`); see `LPIPSWithDiscriminator`."""
        _check_index(optimizer_idx)
        if optimizer_idx == 1:
            loss, logs = self.discriminator_part(inputs, reconstructions, cond, global_step)
            return loss, _with_split(logs, split)
        quant_loss = inputs.new_zeros(()) if codebook_loss is None else codebook_loss.mean()
        rec_loss = self.pixel_loss(inputs, reconstructions)
        p_loss = self.perceptual(inputs, reconstructions)
        if p_loss is not None:
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        nll_loss = rec_loss.mean()
        g_term, logs = self.generator_part(nll_loss, reconstructions, last_layer, cond, global_step)
        loss = nll_loss + g_term + self.codebook_weight * quant_loss
        logs = {
            "total_loss": loss.detach(),
            "quant_loss": quant_loss.detach(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": rec_loss.detach().mean(),
            "p_loss": inputs.new_zeros(()) if p_loss is None else p_loss.detach().mean(),
            **logs,
        }
        if predicted_indices is not None and self.n_classes is not None:
            logs["perplexity"], usage = measure_perplexity(predicted_indices, self.n_classes)
            logs["cluster_usage"] = usage.float()
        return loss, _with_split(logs, split)


class DummyLoss(nn.Module):
    """Stands where a first stage that is only used, not trained, has its loss."""


class BCELossWithQuant(nn.Module):
    """Loss of a VQ model of one-hot segmentation maps: binary cross-entropy and the quantiser's loss.

    Args:
        codebook_weight: weight of the quantiser's loss.
    """

    def __init__(self, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.codebook_weight = codebook_weight

    def forward(self, qloss: Tensor, target: Tensor, prediction: Tensor, split: str) -> tuple[Tensor, Logs]:
        """target [B, n_labels, H, W] one-hot, prediction logits of the same shape -> (loss [], logs)."""
        bce_loss = F.binary_cross_entropy_with_logits(prediction, target)
        loss = bce_loss + self.codebook_weight * qloss
        logs = {"total_loss": loss, "bce_loss": bce_loss, "quant_loss": qloss}
        return loss, _with_split({k: v.detach().mean() for k, v in logs.items()}, split)


class PixelLossWithQuant(nn.Module):
    """Loss of a VQ model without a discriminator: pixels, a perceptual distance, the quantiser's loss.

    Args:
        pixel_loss: l1 | l2.
        perceptual_weight: 0 turns the perceptual term off.
        perceptual_loss: lpips | pixel_gradient (needs no weights) | none.
        codebook_weight: weight of the quantiser's loss.
    """

    def __init__(
        self,
        pixel_loss: str = "l1",
        perceptual_weight: float = 1.0,
        perceptual_loss: str = "lpips",
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pixel_loss = _choose(PIXEL_LOSSES, "pixel_loss", pixel_loss)
        self.perceptual_weight, self.codebook_weight = perceptual_weight, codebook_weight
        self.perceptual_loss = make_perceptual_loss(perceptual_loss)

    def forward(self, qloss: Tensor, inputs: Tensor, reconstructions: Tensor, split: str) -> tuple[Tensor, Logs]:
        """Images [B, C, H, W] in [-1, 1] and what became of them -> (loss [], logs)."""
        rec = self.pixel_loss(inputs, reconstructions).mean()
        nll = rec
        if self.perceptual_loss is not None and self.perceptual_weight > 0:
            nll = nll + self.perceptual_weight * self.perceptual_loss(inputs, reconstructions).mean()
        loss = nll + self.codebook_weight * qloss
        logs = {"total_loss": loss, "rec_loss": rec, "nll_loss": nll, "quant_loss": qloss}
        return loss, _with_split({k: v.detach() for k, v in logs.items()}, split)
