"""What the autoencoders with a discriminator share: encoder, decoder, loss, optimisers, pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.adversarial import AdversarialModel
from ldm.models.base import BaseModel, Config
from ldm.models.framework import rank_zero_info
from ldm.modules.autoencoder import Decoder, Encoder
from ldm.modules.losses import PixelKL
from ldm.modules.lpips import LPIPS
from ldm.util import UserError, check_params, instantiate_from_config

ADAM = {"target": "torch.optim.Adam", "params": {"betas": (0.5, 0.9)}}


class AutoencoderBase(AdversarialModel):
    """Encoder, decoder and loss; subclasses add what lies between encoder and decoder.

    Args:
        ddconfig: parameters of `Encoder` and `Decoder`, given to both.
        lossconfig: `{target, params}` of the loss; `torch.nn.Identity` for a first stage that is only used. A loss
            without a discriminator trains with one optimiser.
        encconfig: what is different in the encoder's parameters: it may be smaller than the decoder.
        image_key: key of the images in the batch.
        colorize_nlabels: number of labels of one-hot segmentation maps, to be shown in random colours.
        use_ema: average the weights.
        ema_decay: of the average.
    """

    loss_names = ("aeloss", "discloss")
    # a first stage's file may come without the loss that it was trained with, or with one that is not wanted here
    tolerated_keys = ("loss.",)

    def __init__(
        self,
        ddconfig: Config,
        lossconfig: Config,
        *,
        encconfig: Config | None = None,
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        **base: Any,
    ) -> None:
        super().__init__(**{"optimizer_config": ADAM, **base})
        self.image_key, self.first_stage_key = image_key, image_key
        check_params(Encoder, "ddconfig", ddconfig)
        smaller = {**ddconfig, **(encconfig or {})}
        check_params(Encoder, "encconfig", smaller)
        self.encoder, self.decoder = Encoder(**smaller), Decoder(**ddconfig)
        self._modules["loss"] = instantiate_from_config(lossconfig)
        self._averaged = ema_decay if use_ema else None
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    def _finish(self) -> None:
        """The end of every constructor: the average needs all weights in place, the checkpoint the average."""
        if self._averaged is not None:
            self.init_ema(self, decay=self._averaged)
        self.load_ckpt_path()

    @property
    def loss(self) -> nn.Module:
        """The loss module, as in the official code; the loss of a batch is `shared_step(batch)` here."""
        return self._modules["loss"]

    def networks(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def configure_model(self) -> None:
        super().configure_model()
        self.loss.to(memory_format=torch.channels_last)

    def get_last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        perceptual = getattr(self.loss, "perceptual_loss", None)
        if isinstance(perceptual, LPIPS) and self.loss.perceptual_weight > 0 and not perceptual.has_weights:
            perceptual.load_pretrained()

    def configure_optimizers(self) -> Any:
        if not (hasattr(self.loss, "discriminator") or isinstance(self.loss, PixelKL)):
            raise UserError(
                f"{type(self).__name__} cannot be trained with the loss {type(self.loss).__name__}: set "
                "model.params.lossconfig.target to ldm.modules.losses.LPIPSWithDiscriminator (KL), "
                "ldm.modules.losses.VQLPIPSWithDiscriminator (VQ) or ldm.modules.losses.PixelKL (no discriminator)"
            )
        return super().configure_optimizers()

    def _between(self) -> list[nn.Module]:
        """Trained modules between encoder and decoder."""
        return [self.quant_conv, self.post_quant_conv]

    def generator_parameters(self) -> list[nn.Parameter]:
        return [p for m in (self.encoder, self.decoder, *self._between()) for p in m.parameters()]

    def discriminator_parameters(self) -> list[nn.Parameter]:
        return list(self.loss.discriminator.parameters()) if hasattr(self.loss, "discriminator") else []

    # --- pictures -----------------------------------------------------------------------------------------------------

    def to_rgb(self, x: Tensor) -> Tensor:
        """[B, n, H, W] with n > 3 -> [B, 3, H, W] in [-1, 1], one random colour per channel."""
        if x.shape[1] <= 3:
            return x
        colors = getattr(self, "colorize", None)
        if colors is None:
            colors = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
        x = F.conv2d(x, colors.to(x))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


def first_stage_of_run(path: str) -> nn.Module:
    """The first stage of a run directory (its best checkpoint) or a checkpoint file, with averaged weights where there
    are some.

    Raises:
        UserError: no such run, or one of another kind.
    """
    from ldm.checkpoint import find_best
    from ldm.generate import load_run

    file = find_best(path)
    model, info = load_run(file)
    if not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise UserError(f"first stage {path} is a {type(model).__name__}, expected an autoencoder")
    if isinstance(model, BaseModel) and model.use_ema:
        model.model_ema.copy_to(model)
        del model.model_ema
    if "loss" in model._modules:  # perceptual network and discriminator have done their work
        model._modules["loss"] = nn.Identity()
    rank_zero_info(f"first stage: {type(model).__name__} of {file}, step {info['global_step']}")
    return model


def unprefixed(logs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official losses name their logs `<split>/<name>`; the base class adds the split itself."""
    return {k.partition("/")[2]: v for k, v in logs.items()}
