"""The discrete VAE that makes DALL-E's image tokens (Ramesh et al. 2021, section 2.1 and appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.adversarial import Losses
from ldm.models.base import Config
from ldm.models.vqgan import GumbelVQ, VQNoDiscModel
from ldm.modules.likelihoods import LogitLaplace


class DVAE(VQNoDiscModel, GumbelVQ):
    """Encoder q(code | x) at each place, relaxed by Gumbel-softmax while training; uniform prior; logit-Laplace p(x).

    Logged: `loss`, `rec` = -log p in nats per number of the image, `kl` = KL(q, uniform) in nats per place,
    `temperature`, `perplexity` and in evaluation `psnr`.

    Args:
        ddconfig: parameters of `Encoder` and `Decoder`; out_ch is set, `double_z` false unless given.
        n_embed: number of codes.
        embed_dim: width of a code, `ddconfig.z_channels`.
        temperature_scheduler_config: `{target, params}` of an object called with the update, giving the temperature;
            the paper goes from 1 to 1/16.
        kl_weight: weight of the KL term, both terms in nats per image; 1 is the ELBO, the paper's is 6.6.
        kl_warmup: updates over which the weight grows from 0.
    """

    def __init__(
        self,
        ddconfig: Config,
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Config | None = None,
        kl_weight: float = 6.6,
        kl_warmup: int = 0,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        **base: Any,
    ) -> None:
        ddconfig = {"double_z": False, **ddconfig, "out_ch": 2 * ddconfig["in_channels"]}
        super().__init__(
            ddconfig,
            {"target": "torch.nn.Identity"},
            n_embed,
            embed_dim,
            temperature_scheduler_config=temperature_scheduler_config,
            kl_weight=1.0,
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            **base,
        )
        self.quantize.straight_through = False
        self.kl_weight, self.kl_warmup = kl_weight, kl_warmup
        self.likelihood = LogitLaplace()

    def current_kl_weight(self) -> float:
        """Weight of the KL term at this update."""
        return self.kl_weight * (min(1.0, self.updates / self.kl_warmup) if self.kl_warmup > 0 else 1.0)

    def decode(self, quant: Tensor) -> Tensor:
        """[B, embed_dim, h, w] -> images [B, C, h f, w f] in [-1, 1]."""
        return self.likelihood.mean(super().decode(quant))

    def shared_step(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        if self.temperature_scheduler is not None:
            self.quantize.temperature = float(self.temperature_scheduler(self.updates))
        quant, kl, (_, _, indices) = self.encode(x)
        out = super().decode(quant).float()
        numbers, places = x[0].numel(), indices[0].numel()
        rec = -self.likelihood.log_prob(x, out).mean() / numbers
        loss = rec + self.current_kl_weight() * kl * places / numbers
        logs = {"loss": loss, "rec": rec, "kl": kl, "temperature": loss.new_full((), self.quantize.temperature)}
        with torch.no_grad():
            logs.update(self.quality(x, self.likelihood.mean(out), indices))
        return loss, logs
