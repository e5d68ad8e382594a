"""The variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.base import BaseModel, Config
from ldm.modules.distributions import LOG_2PI, DiagonalGaussianDistribution
from ldm.modules.likelihoods import make_likelihood
from ldm.util import SeededNoise, instantiate_from_config

CONV_ENCODER = {"target": "ldm.modules.vae_nets.ConvEncoder"}
CONV_DECODER = {"target": "ldm.modules.vae_nets.ConvDecoder"}


class VAE(BaseModel):
    """Encoder q(z | x) = N(mean, diag(var)), prior p(z) = N(0, 1), decoder p(x | z); trained on the ELBO.

    Logged, in nats per image: `rec` = -E_q log p(x | z), `kl` = KL(q(z | x), p(z)), `elbo` = -(rec + kl), and in
    evaluation `iwae`, the importance-weighted bound (Burda et al. 2016, equation 8), which is the tighter one.

    Args:
        size: side, or [height, width], of the images.
        channels: of the images.
        latent_dim: numbers per image.
        encoder_config, decoder_config: `{target, params}`; built with size, channels and out_dim or latent_dim.
        likelihood: bernoulli | gaussian (fixed scale) | gaussian_learned | logistic (discretised to 256 levels).
        likelihood_scale: of gaussian, or the start of a learned scale; images are in [-1, 1].
        beta: weight of the KL term (Higgins et al. 2017); 1 is the ELBO.
        kl_warmup: updates over which beta grows from 0 (Bowman et al. 2016).
        free_bits: nats per latent number that cost nothing (Kingma et al. 2016, equation 15).
        iwae_samples: k of the importance-weighted bound in validation and test; 0 leaves it out.
        use_ema: average the weights.
        ema_decay: of the average.
        image_key: key of the images in the batch.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        channels: int,
        latent_dim: int,
        encoder_config: Config = CONV_ENCODER,
        decoder_config: Config = CONV_DECODER,
        likelihood: str = "bernoulli",
        likelihood_scale: float = 0.1,
        beta: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        iwae_samples: int = 0,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        image_key: str = "image",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.latent_dim, self.image_key, self.first_stage_key = latent_dim, image_key, image_key
        self.beta, self.kl_warmup, self.free_bits, self.iwae_samples = beta, kl_warmup, free_bits, iwae_samples
        shape = {"size": size, "channels": channels}
        self.encoder = instantiate_from_config(encoder_config, out_dim=2 * latent_dim, **shape)
        self.decoder = instantiate_from_config(decoder_config, latent_dim=latent_dim, **shape)
        self.likelihood = make_likelihood(likelihood, likelihood_scale)
        if use_ema:
            self.init_ema(self, decay=ema_decay)
        self.load_ckpt_path()

    def networks(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    # --- model --------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """[B, C, H, W] in [-1, 1] -> q(z | x) over [B, latent_dim]; its mode is the feature vector."""
        return DiagonalGaussianDistribution(_full(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """[B, latent_dim] -> expected images [B, C, H, W] in [-1, 1]."""
        return self.likelihood.mean(_full(self.decoder(z))).clamp(-1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Images -> (reconstructions, posterior)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats, [B]."""
        return self.likelihood.log_prob(x, _full(self.decoder(z)))

    # --- bounds -------------------------------------------------------------------------------------------------------

    def current_beta(self) -> float:
        """Weight of the KL term at this update."""
        if self.kl_warmup <= 0:
            return self.beta
        return self.beta * min(1.0, self.global_step / self.kl_warmup)

    def kl_cost(self, posterior: DiagonalGaussianDistribution) -> Tensor:
        """The KL term of the loss [], with what free bits leave of it.

        Without free bits the mean over the batch of KL(q, p); with them sum_j max(free_bits, mean KL of z_j).
        """
        if self.free_bits <= 0:
            return posterior.kl().mean()
        each = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar)  # [B, latent_dim]
        return each.mean(0).clamp(min=self.free_bits).sum()

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.get_input(batch, self.image_key)
        posterior = self.encode(x)
        rec = -self.log_likelihood(x, posterior.sample()).mean()
        kl = posterior.kl().mean()
        loss = rec + self.current_beta() * self.kl_cost(posterior)
        logs = {"loss": loss, "rec": rec, "kl": kl, "elbo": -(rec + kl)}
        if self.kl_warmup > 0 and self.training:
            logs["beta"] = loss.new_full((), self.current_beta())
        if self.iwae_samples > 0 and not self.training:
            logs["iwae"] = self.iwae_bound(x, self.iwae_samples, posterior).mean()
        return loss, logs

    @torch.no_grad()
    def iwae_bound(
        self,
        x: Tensor,
        k: int,
        posterior: DiagonalGaussianDistribution | None = None,
        randn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """log (1/k) sum_i p(x, z_i) / q(z_i | x) with z_i from q, [B] nats; k = 1 is an ELBO sample.

        randn: template -> noise of its shape; None = from the global generator.
        """
        posterior = self.encode(x) if posterior is None else posterior
        log_weights = []
        for _ in range(k):
            z = posterior.sample(randn)
            log_prior = -0.5 * (z**2 + LOG_2PI).sum(1)
            log_weights.append(self.log_likelihood(x, z) + log_prior + posterior.nll(z))
        return torch.logsumexp(torch.stack(log_weights), 0) - math.log(k)

    # --- pictures -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, cond: None = None, *, seeds: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Decoded z from N(0, temperature^2): [len(seeds), C, H, W] in [-1, 1]."""
        like = next(self.decoder.parameters())
        z = SeededNoise(seeds)((len(seeds), self.latent_dim), device=like.device, dtype=like.dtype)
        return self.decode(temperature * z)

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """Latents [B, latent_dim] -> pictures along the lines from a to b, [B, steps, C, H, W] in [-1, 1]."""
        w = torch.linspace(0, 1, steps, device=a.device, dtype=a.dtype)[None, :, None]
        z = a[:, None] * (1 - w) + b[:, None] * w
        return self.decode(z.flatten(0, 1)).unflatten(0, (len(a), steps))

    @torch.no_grad()
    def traverse(self, z: Tensor, dims: Sequence[int], steps: int = 8, reach: float = 2.5) -> Tensor:
        """One latent [latent_dim] with one number at a time going from -reach to reach: [dims, steps, C, H, W]."""
        grid = z.expand(len(dims), steps, -1).clone()
        for row, dim in enumerate(dims):
            grid[row, :, dim] = torch.linspace(-reach, reach, steps, device=z.device, dtype=z.dtype)
        return self.decode(grid.flatten(0, 1)).unflatten(0, (len(dims), steps))

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, **_: Any) -> dict[str, Tensor]:
        """inputs, reconstructions, samples of the prior, and as one picture each: interpolation between pairs of
        inputs, and traversal of the latent numbers that carry most information (rows) from -2.5 to 2.5."""
        x = self.get_input(batch, self.image_key)[:n]
        with self.ema_scope():
            posterior = self.encode(x)
            mode, each = posterior.mode(), posterior.mean**2 + posterior.var - 1.0 - posterior.logvar
            dims = each.mean(0).argsort(descending=True)[: min(8, self.latent_dim)].tolist()
            images = {
                "inputs": x,
                "reconstructions": self.decode(mode),
                "samples": self.sample(seeds=range(n)),
                "traversal": _sheet(self.traverse(mode[0], dims)),
            }
            if len(x) > 1:
                half = len(x) // 2
                images["interpolation"] = _sheet(self.interpolate(mode[:half], mode[half : 2 * half]))
        return images


def _full(x: Tensor) -> Tensor:
    """Sums over pixels need more digits than autocast leaves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sheet(rows: Tensor, padding: int = 1) -> Tensor:
    """[R, S, C, H, W] -> one picture [1, C, R H', S W'] with dark lines between."""
    rows = nn.functional.pad(rows, (0, padding, 0, padding), value=-1.0)
    R, S, C, H, W = rows.shape
    return rows.permute(2, 0, 3, 1, 4).reshape(1, C, R * H, S * W)
