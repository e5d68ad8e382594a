"""First stages of latent diffusion: AutoencoderKL and VQModel (Rombach et al. 2022; Esser et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.adversarial import Losses
from ldm.models.base import Config
from ldm.models.first_stage import AutoencoderBase, unprefixed
from ldm.models.framework import rank_zero_warn
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import measure_perplexity
from ldm.modules.quantize import EMAVectorQuantizer, VectorQuantizer2
from ldm.util import SeededNoise, instantiate_from_config


class AutoencoderKL(AutoencoderBase):
    """Autoencoder whose latent is a Gaussian with a slight pull towards N(0, 1) (Rombach et al. 2022, section 3.1).

    Args:
        ddconfig, lossconfig, image_key, colorize_nlabels: as for `AutoencoderBase`; ddconfig needs `double_z: true`.
        embed_dim: channels of the latent.
        learn_logvar: train the loss' log-variance too, which no official optimiser holds.
    """

    def __init__(
        self,
        ddconfig: Config,
        lossconfig: Config,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        learn_logvar: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(
            ddconfig,
            lossconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            **base,
        )
        if not ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z: got False, expected True (mean and log-variance)")
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.embed_dim, self.learn_logvar = embed_dim, learn_logvar
        self._finish()

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """[B, C, H, W] in [-1, 1] -> q(z | x) over [B, embed_dim, H/f, W/f]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """[B, embed_dim, h, w] -> [B, C, h f, w f]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self,
        input: Tensor,
        sample_posterior: bool = True,  # noqa: A002  (official name)
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Images -> (reconstructions, posterior)."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def generator_parameters(self) -> list[nn.Parameter]:
        return super().generator_parameters() + ([self.loss.logvar] if self.learn_logvar else [])

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(x)
        loss, logs = self.loss(x, reconstructions, posterior, 0, self.updates, last_layer=self.get_last_layer())
        return loss, unprefixed(logs)

    def discriminator_loss(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        with torch.no_grad():
            reconstructions, posterior = self(x)
        loss, logs = self.loss(x, reconstructions, posterior, 1, self.updates)
        return loss, unprefixed(logs)

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, only_inputs: bool = False, **_: Any) -> dict[str, Tensor]:
        """inputs, reconstructions and samples (decoded prior noise).

        Prior samples are left out where the weight of the KL term is under 1e-3: the latents of such a model are far
        from N(0, 1), and its samples noise however good it is.
        """
        x = self.get_input(batch, self.image_key)[:n]
        images = {"inputs": self.to_rgb(x)}
        if only_inputs:
            return images
        reconstructions, posterior = self(x)
        images["reconstructions"] = self.to_rgb(reconstructions).clamp(-1, 1)
        if getattr(self.loss, "kl_weight", 1.0) >= 1e-3:
            images["samples"] = self.to_rgb(self.decode(torch.randn_like(posterior.mean))).clamp(-1, 1)
        return images

    @torch.no_grad()
    def sample(self, cond: None = None, *, seeds: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Decoded N(0, temperature^2) noise, [len(seeds), C, H, W] in [-1, 1], of the size in `ddconfig.resolution`."""
        like = self.get_last_layer()
        shape = (len(seeds), self.embed_dim, *self.decoder.z_shape[2:])
        z = temperature * SeededNoise(seeds)(shape, device=like.device, dtype=like.dtype)
        return self.decode(z).clamp(-1, 1)


class VQModel(AutoencoderBase):
    """Autoencoder with a codebook: VQGAN (Esser et al. 2021).

    Args:
        ddconfig, lossconfig, image_key, colorize_nlabels, use_ema: as for `AutoencoderBase`.
        n_embed: number of codes.
        embed_dim: channels of a code.
        batch_resize_range: (lower, upper): each training batch is resized to a random multiple of 16 between them.
        lr_g_factor: learning rate of the autoencoder as a multiple of the discriminator's.
        remap: .npy file with the used codes.
        sane_index_shape: indices as [B, H, W].
        quantizer_config: `{target, params}` of another quantiser; its `n_e` and `e_dim` are n_embed and embed_dim.
    """

    def __init__(
        self,
        ddconfig: Config,
        lossconfig: Config,
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Config | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        quantizer_config: Config | None = None,
        **base: Any,
    ) -> None:
        super().__init__(
            ddconfig,
            lossconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            use_ema=use_ema,
            monitor=monitor,
            ckpt_path=ckpt_path,
            ignore_keys=ignore_keys,
            scheduler_config=scheduler_config,
            lr_g_factor=lr_g_factor,
            **base,
        )
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.batch_resize_range = batch_resize_range
        if quantizer_config is None:
            self.quantize: nn.Module = VectorQuantizer2(
                n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
            )
        else:
            self.quantize = instantiate_from_config(quantizer_config, n_e=n_embed, e_dim=embed_dim)
        z_channels = ddconfig["z_channels"] * (2 if ddconfig.get("double_z", True) else 1)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._code_counts: Tensor | None = None
        self._finish()

    # --- first stage --------------------------------------------------------------------------------------------------

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> continuous latents [B, embed_dim, h, w]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Images -> (codes [B, embed_dim, h, w], codebook loss [], (perplexity, encodings, indices))."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """[B, embed_dim, h, w] -> [B, C, h f, w f]."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Code indices [B, h, w] (or [B, h w] of a square map) -> images [B, C, H, W].

        Raises:
            ValueError: the number of indices per image is no square.
        """
        B, n = code_b.shape[0], code_b[0].numel()
        h, w = code_b.shape[1:] if code_b.ndim == 3 else (int(n**0.5),) * 2
        if h * w != n:
            raise ValueError(f"code_b: got {n} indices per image, expected [B, h, w] or a square number")
        return self.decode(self.quantize.get_codebook_entry(code_b.reshape(-1), (B, h, w, self.embed_dim)))

    def forward(
        self,
        input: Tensor,
        return_pred_indices: bool = False,  # noqa: A002  (official name)
    ) -> tuple[Tensor, ...]:
        """Images -> (reconstructions, codebook loss), and the code indices if asked for."""
        quant, diff, (_, _, indices) = self.encode(input)
        reconstructions = self.decode(quant)
        return (reconstructions, diff, indices) if return_pred_indices else (reconstructions, diff)

    # --- training -----------------------------------------------------------------------------------------------------

    def get_input(self, batch: dict[str, Any], key: str) -> Tensor:
        x = super().get_input(batch, key)
        if self.batch_resize_range is None or not self.training:
            return x
        lower, upper = self.batch_resize_range
        sizes = range(lower, upper + 16, 16)
        # the largest size first, so that memory runs out at once if it runs out
        size = upper if self.updates <= 4 else sizes[int(torch.randint(len(sizes), ()))]
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic").detach()

    def _between(self) -> list[nn.Module]:
        return [self.quantize, *super()._between()]

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        reconstructions, quant_loss, indices = self(x, return_pred_indices=True)
        loss, logs = self.loss(quant_loss, x, reconstructions, 0, self.updates, last_layer=self.get_last_layer())
        logs = unprefixed(logs)
        logs["perplexity"], usage = measure_perplexity(indices, self.n_embed)
        logs["cluster_usage"] = usage.float()
        if not self.training:
            self._count(indices)
        return loss, logs

    def discriminator_loss(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        with torch.no_grad():
            reconstructions, quant_loss = self(x)
        loss, logs = self.loss(quant_loss, x, reconstructions, 1, self.updates)
        return loss, unprefixed(logs)

    def _count(self, indices: Tensor) -> None:
        if self._code_counts is None:
            self._code_counts = torch.zeros(self.n_embed, device=indices.device)
        ones = torch.ones(indices.numel(), device=indices.device)
        self._code_counts.scatter_add_(0, indices.flatten(), ones)

    def on_validation_epoch_start(self) -> None:
        self._code_counts = None

    def on_validation_epoch_end(self) -> None:
        if self._code_counts is None:
            return
        usage = (self._code_counts > 0).float().mean()
        codes_seen = float(self._code_counts.sum())
        self._code_counts = None
        self.log("val/codebook_usage", usage, sync_dist=True)
        if float(usage) < 0.05 and codes_seen >= self.n_embed and not self.trainer.sanity_checking:
            advice = "A smaller n_embed or embed_dim, a lower learning rate or a later disc_start help"
            learned = isinstance(self.quantize, (VectorQuantizer2, EMAVectorQuantizer))
            if learned and not getattr(self.quantize, "restart", 0):
                advice = (
                    "Set model.params.quantizer_config to ldm.modules.quantize.EMAVectorQuantizer with restart: 0.05, "
                    f"which puts unused codes back into use. {advice} too"
                )
            rank_zero_warn(f"codebook collapse: {float(usage):.1%} of {self.n_embed} codes are in use. {advice}")

    @torch.no_grad()
    def log_images(
        self, batch: dict[str, Any], n: int = 8, only_inputs: bool = False, plot_ema: bool = True, **_: Any
    ) -> dict[str, Tensor]:
        """inputs, reconstructions, reconstructions_ema of the averaged weights, and the codebook as one picture."""
        x = self.get_input(batch, self.image_key)[:n]
        images = {"inputs": self.to_rgb(x)}
        if only_inputs:
            return images
        images["reconstructions"] = self.to_rgb(self(x)[0]).clamp(-1, 1)
        if plot_ema and self.use_ema:
            with self.ema_scope():
                images["reconstructions_ema"] = self.to_rgb(self(x)[0]).clamp(-1, 1)
        images["codebook"] = self.codebook_picture()
        return images

    @torch.no_grad()
    def codebook_picture(self, limit: int = 256) -> Tensor:
        """The first `limit` codes, each decoded from a map of itself: one picture [1, 3, H, W] in [-1, 1]."""
        n = min(limit, self.n_embed)
        codes = torch.arange(n, device=self.device)[:, None, None].expand(n, 3, 3)
        tiles = torch.cat([self.to_rgb(self.decode_code(c)) for c in codes.split(32)]).clamp(-1, 1)
        third = tiles.shape[2] // 3
        tiles = tiles[:, :, third : 2 * third, third : 2 * third]  # away from the borders
        columns = math.ceil(n**0.5)
        tiles = torch.cat([tiles, tiles.new_full((-n % columns, *tiles.shape[1:]), -1.0)])
        rows = tiles.unflatten(0, (-1, columns))  # [rows, columns, 3, f, f]
        return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None]


class VQModelInterface(VQModel):
    """VQModel as a first stage: its latents are the continuous ones, quantised only on the way back."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> continuous latents [B, embed_dim, h, w]."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Continuous latents -> images [B, C, H, W]; `force_not_quantize` decodes them as they are."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])

    def forward(
        self,
        input: Tensor,
        return_pred_indices: bool = False,  # noqa: A002  (official name)
    ) -> tuple[Tensor, ...]:
        """As VQModel, so that it trains as one: here `encode` and `decode` have no codes between them."""
        quant, diff, (_, _, indices) = super().encode(input)
        reconstructions = super().decode(quant)
        return (reconstructions, diff, indices) if return_pred_indices else (reconstructions, diff)


class IdentityFirstStage(nn.Module):
    """The first stage of a diffusion model in pixel space.

    Args:
        vq_interface: `quantize` answers as a VQ model does.
    """

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def quantize(self, x: Tensor) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x
