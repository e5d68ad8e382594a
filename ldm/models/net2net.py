"""taming-transformers' second stage: a transformer from the tokens of a condition to those of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.base import Config
from ldm.models.tokens import Condition, TokenModel
from ldm.modules.cond_stages import CoordStage, Labelator, SOSProvider
from ldm.util import UserError, instantiate_from_config

TOP_K = 100  # taming-transformers' default
FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"


class Net2NetTransformer(TokenModel):
    """Condition tokens, then image tokens, next token by next token (Esser et al. 2021, equation 9).

    Args:
        transformer_config: `{target, params}` of the transformer; block_size holds condition and image.
        first_stage_config: of the VQ model that makes image tokens; frozen.
        cond_stage_config: of what makes tokens of the condition; frozen. `__is_first_stage__`: the first stage itself.
            `__is_unconditional__`: a start token.
        permuter_config: order of the image tokens; None is raster order.
        first_stage_key, cond_stage_key: batch keys of image and condition.
        downsample_cond_size: side that the condition is scaled to first; -1 leaves it.
        pkeep: probability that an image token is shown as it is in training; others are random.
        sos_token: start token of unconditional models.
        unconditional: as cond_stage_config `__is_unconditional__`.
    """

    def __init__(
        self,
        transformer_config: Config,
        first_stage_config: Config | str,
        cond_stage_config: Config | str,
        permuter_config: Config | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "depth",
        downsample_cond_size: int = -1,
        pkeep: float = 1.0,
        sos_token: int = 0,
        unconditional: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(
            first_stage_config, first_stage_key=first_stage_key, ckpt_path=ckpt_path, ignore_keys=ignore_keys, **base
        )
        self.be_unconditional = unconditional or cond_stage_config == UNCONDITIONAL
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size, self.pkeep, self.sos_token = downsample_cond_size, pkeep, sos_token
        if self.be_unconditional:
            self.cond_stage_model = SOSProvider(sos_token)
        elif cond_stage_config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config).eval().requires_grad_(False)
        self.permuter = instantiate_from_config(permuter_config or {"target": "ldm.modules.cond_stages.Identity"})
        self.transformer = instantiate_from_config(transformer_config)
        n_codes, vocabulary = self.first_stage_model.n_embed, self.transformer.vocab_size
        if n_codes > vocabulary:
            raise UserError(
                f"transformer_config.params.vocab_size: got {vocabulary}, expected at least {n_codes}, the codes of "
                "the first stage"
            )
        self._finish()

    def train(self, mode: bool = True) -> Net2NetTransformer:
        super().train(mode)
        self.cond_stage_model.eval()
        return self

    # --- tokens -------------------------------------------------------------------------------------------------------

    def get_input(self, batch: dict[str, Any], key: str) -> Tensor:
        """Pictures as everywhere; classes [B] and tokens [B, n] of the data set as they are."""
        value = batch.get(key)
        if isinstance(value, Tensor) and value.ndim in (1, 2) and not value.is_floating_point():
            return value
        return super().get_input(batch, key)

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> tokens [B, n], in the order of the permuter.

        Raises:
            UserError: the images give another grid than the first stage was built for, which is the one to be drawn.
        """
        return self.permuter(self.encode_images(x))

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> Tensor:
        """What `get_input` gives for the condition -> tokens [B, T]."""
        if self.downsample_cond_size > -1:
            c = F.interpolate(c, size=(self.downsample_cond_size,) * 2)
        return self.cond_stage_model.encode(c)[2][2].reshape(len(c), -1)

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Tokens [B, h w] in the permuter's order, and the shape (B, C, h, w) of their map -> images [B, C, H, W]."""
        index = self.permuter(index, reverse=True)
        return self.first_stage_model.decode_code(index.view(-1, *zshape[2:]))

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Images and condition -> (logits [B, n, vocab_size] of the image tokens, those tokens [B, n])."""
        z, c = self.encode_to_z(x), self.encode_to_c(c)
        return self._logits(z, c), z

    def _logits(self, z: Tensor, c: Tensor) -> Tensor:
        self.check_sequence(c.shape[1], z.shape[1])
        shown = z
        if self.training and self.pkeep < 1.0:
            keep = torch.rand(z.shape, device=z.device) < self.pkeep
            shown = torch.where(keep, z, torch.randint_like(z, self.transformer.vocab_size))
        features = self.transformer.features(torch.cat([c, shown], 1)[:, :-1])
        return self.transformer.logits(features[:, c.shape[1] - 1 :])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the image tokens, in nats per token."""
        x, c = self.get_input(batch, self.first_stage_key), self.get_input(batch, self.cond_stage_key)
        logits, target = self(x, c)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss, {"loss": loss}

    # --- pictures -----------------------------------------------------------------------------------------------------

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> Condition:
        """The start token, the classes (all in turn), or the places of a whole picture's pixels; other conditions come
        from data.

        Raises:
            UserError: a class or prompt was given, or the condition has to come from data.
        """
        labels = self.cond_stage_model if isinstance(self.cond_stage_model, Labelator) else None
        given = None if labels else classes
        super().condition(seeds, classes=given, prompts=prompts, negative_prompt=negative_prompt)
        if labels:
            chosen = [s % labels.n_embed for s in seeds] if classes is None else list(classes)
            try:
                prefix = self.encode_to_c(torch.tensor(chosen))
            except ValueError as e:
                raise UserError(str(e)) from e
        elif self.be_unconditional:
            prefix = self.cond_stage_model.encode(seeds)[2][2]
        elif isinstance(self.cond_stage_model, CoordStage):
            h, w = (side * self.cond_stage_model.down_factor for side in self.grid)
            whole = (torch.arange(h * w) / (h * w)).view(1, 1, h, w)
            prefix = self.encode_to_c(whole).expand(len(seeds), -1)
        else:
            raise UserError(
                f"{type(self).__name__} draws from batch[{self.cond_stage_key!r}]: pass "
                '{"prefix": model.encode_to_c(model.get_input(batch, model.cond_stage_key))} to sample'
            )
        return {"prefix": prefix.to(self.device)}

    @torch.no_grad()
    def sample(
        self,
        cond: Condition | None = None,
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int | str | None = "auto",
        top_p: float | None = None,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """One picture per seed, [len(seeds), C, H, W] in [-1, 1].

        Args:
            cond: from `condition`.
            temperature: 0 takes the most probable token, 1 the model's own distribution.
            top_k: draw from the k most probable tokens; null from all. auto: 100, or all where there are fewer.
            top_p: draw from the most probable tokens that together reach probability p.
            callback: called after each token.
        """
        cond = self.condition(seeds) if cond is None else cond
        top_k = min(TOP_K, self.first_stage_model.n_embed) if top_k == "auto" else top_k
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "callback": callback}
        tokens = self.permuter(self.draw_tokens(cond, seeds, **knobs), reverse=True)
        return self.decode_tokens(tokens)

    @torch.no_grad()
    def log_images(
        self, batch: dict[str, Any], n: int = 4, temperature: float = 1.0, top_k: int | str | None = "auto", **_: Any
    ) -> dict[str, Tensor]:
        """inputs, reconstructions, samples with the upper half given, from the condition alone, and the most probable
        tokens; conditioning where it is a picture."""
        x = self.get_input(batch, self.first_stage_key)[:n]
        c = self.get_input(batch, self.cond_stage_key)[:n]
        z, prefix, seeds = self.encode_to_z(x), self.encode_to_c(c), list(range(len(x)))
        cond = {"prefix": prefix}
        images = {"inputs": x, "reconstructions": self.decode_tokens(self.permuter(z, reverse=True))}
        if isinstance(self.cond_stage_model, CoordStage):
            images["conditioning"] = 2 * c - 1
        elif self.cond_stage_model is self.first_stage_model and c.shape[1] in (1, 3):
            images["conditioning"] = c
        knobs: dict[str, Any] = {"seeds": seeds, "temperature": temperature, "top_k": top_k}
        images["samples_half"] = self.sample({**cond, "primed": z[:, : z.shape[1] // 2]}, **knobs)
        images["samples_nopix"] = self.sample(cond, **knobs)
        images["samples_det"] = self.sample(cond, **{**knobs, "temperature": 0.0})
        return images
