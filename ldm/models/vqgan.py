"""Relatives of VQModel from taming-transformers: Gumbel codes, and training without a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.adversarial import Losses
from ldm.models.autoencoder import VQModel
from ldm.models.base import BaseModel, Config
from ldm.models.first_stage import unprefixed
from ldm.modules.losses import VQLPIPSWithDiscriminator, measure_perplexity, psnr
from ldm.modules.quantize import GumbelQuantize
from ldm.util import UserError, instantiate_from_config


class GumbelVQ(VQModel):
    """VQModel whose codes are chosen by a Gumbel-softmax that sharpens over the training (DALL-E's dVAE).

    Args:
        ddconfig, lossconfig, n_embed, embed_dim: as for `VQModel`; embed_dim must be `ddconfig.z_channels`.
        temperature_scheduler_config: `{target, params}` of an object called with the update, giving the temperature
            (`ldm.lr_scheduler.LambdaWarmUpCosineScheduler`, ...); None keeps 1.
        kl_weight: weight of KL(q(code | x), uniform).
        remap, quantizer_config: of `VQModel` alone; None.

    Raises:
        UserError: remap or quantizer_config.
        ValueError: another embed_dim.
    """

    def __init__(
        self,
        ddconfig: Config,
        lossconfig: Config,
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Config | None = None,
        kl_weight: float = 1e-8,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        remap: str | None = None,
        quantizer_config: Config | None = None,
        **base: Any,
    ) -> None:
        if embed_dim != ddconfig["z_channels"]:
            raise ValueError(f"embed_dim: got {embed_dim}, expected ddconfig.z_channels ({ddconfig['z_channels']})")
        for name, value in (("remap", remap), ("quantizer_config", quantizer_config)):
            if value is not None:
                raise UserError(
                    f"{name}: got {value}, expected none: {type(self).__name__} has all codes of its Gumbel-softmax "
                    "and no other; leave it out, or take ldm.models.autoencoder.VQModel"
                )
        super().__init__(ddconfig, lossconfig, n_embed, embed_dim, **base)
        self.quantize = GumbelQuantize(embed_dim, embed_dim, n_embed=n_embed, kl_weight=kl_weight)
        self.temperature_scheduler = (
            instantiate_from_config(temperature_scheduler_config) if temperature_scheduler_config else None
        )
        if self.use_ema:
            self.init_ema(self, decay=self._averaged)
        self._ckpt_path, self._ignore_keys = ckpt_path, tuple(ignore_keys)
        self.load_ckpt_path()

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        if self.temperature_scheduler is not None:
            self.quantize.temperature = float(self.temperature_scheduler(self.updates))
        loss, logs = super().generator_loss(batch)
        return loss, {**logs, "temperature": loss.new_full((), self.quantize.temperature)}


class VQNoDiscModel(VQModel):
    """VQModel trained without a discriminator: one optimiser, which Lightning steps.

    Args: as for `VQModel`; the loss is called with (codebook loss, images, reconstructions, split="train") and gives
        (loss, logs): `ldm.modules.losses.PixelLossWithQuant`. `VQLPIPSWithDiscriminator` serves too: its discriminator
        then stays out.

    Validation also logs `psnr` in dB, the mean over images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True

    def configure_callbacks(self) -> list[Any]:
        return []  # one optimiser: Lightning accumulates and clips itself

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer(self.generator_parameters(), "generator_optimizer_config")
        scheduler = self.build_scheduler(optimizer)
        return ([optimizer], [scheduler]) if scheduler else optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates += 1

    def shared_step(self, batch: dict[str, Any]) -> Losses:
        x = self.get_input(batch, self.image_key)
        reconstructions, quant_loss, indices = self(x, return_pred_indices=True)
        if isinstance(self.loss, VQLPIPSWithDiscriminator):
            # update -1: before disc_start, whatever it is
            loss, logs = self.loss(quant_loss, x, reconstructions, 0, -1, last_layer=self.get_last_layer())
        else:
            loss, logs = self.loss(quant_loss, x, reconstructions, split="train")
        return loss, {**unprefixed(logs), **self.quality(x, reconstructions, indices)}

    def quality(self, x: Tensor, reconstructions: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """perplexity of the codes, and in evaluation psnr; counts the codes for `codebook_usage`."""
        logs = {"perplexity": measure_perplexity(indices, self.n_embed)[0]}
        if not self.training:
            self._count(indices)
            logs["psnr"] = psnr(x, reconstructions).mean()
        return logs

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return BaseModel.training_step(self, batch, batch_idx)


class VQSegmentationModel(VQNoDiscModel):
    """VQModel of one-hot segmentation maps: cross-entropy, one optimiser, no discriminator.

    Args:
        n_labels: number of labels, the channels of the maps.
        ddconfig, lossconfig, n_embed, embed_dim, ...: as for `VQModel`; the loss is `BCELossWithQuant`.
    """

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"colorize_nlabels": n_labels, **kwargs})

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, only_inputs: bool = False, **_: Any) -> dict[str, Tensor]:
        """inputs and reconstructions, the most probable label of each pixel, in random colours."""
        x = self.get_input(batch, self.image_key)[:n]
        images = {"inputs": self.to_rgb(x)}
        if not only_inputs:
            labels = self(x)[0].argmax(1)
            one_hot = torch.nn.functional.one_hot(labels, x.shape[1]).movedim(-1, 1)
            images["reconstructions"] = self.to_rgb(one_hot.to(x.dtype))
        return images
