"""Transformers that draw: ImageGPT (classes), DALL-E (text), CogView (text to picture and picture to text)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.base import Config
from ldm.models.captions import CaptionModel
from ldm.models.diffusion.classes import ClassLabels
from ldm.models.tokens import Condition, TokenModel
from ldm.modules.decoding import generate
from ldm.util import SeededNoise, UserError


class ImageGPT(TokenModel, ClassLabels):
    """Image tokens after a start token, or after the token of a class (Chen et al. 2020; Esser et al. 2021).

    Logs `loss` in nats per token.

    Args:
        first_stage_config, first_stage_key, cache_codes, use_ema, ema_decay: as for `TokenModel`.
        transformer_config: `{params}` of `ldm.modules.gpt.Transformer`; vocab_size, block_size, grid and image_start
            are set.
        num_classes: number of classes; 0 is a model without classes, `auto` in YAML takes it from the data.
        cond_stage_key: batch key of the labels.
        cond_dropout: share of the labels that become the null class, which guidance needs.
    """

    def __init__(
        self,
        first_stage_config: Config,
        transformer_config: Config,
        num_classes: int = 0,
        cond_stage_key: str = "class_label",
        cond_dropout: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, **base)
        self.cond_stage_key = cond_stage_key if num_classes else None
        self.num_classes, self.cond_dropout = num_classes or None, cond_dropout
        self.has_null_class = bool(num_classes and cond_dropout > 0)
        h, w = self.grid
        self.n_codes = self.first_stage_model.n_embed
        vocabulary = self.n_codes + max(1, num_classes + self.has_null_class)
        self.transformer = self.build_transformer(
            transformer_config, vocab_size=vocabulary, block_size=1 + h * w, grid=[h, w], image_start=1
        )
        self._finish()

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.image_tokens(batch)
        labels = None
        if self.cond_stage_key is not None:
            labels = self.drop_labels(self.value_of(batch, self.cond_stage_key))
        tokens = torch.cat([self._prefix(labels, len(z), z.device), z[:, :-1]], 1)
        logits = self.transformer.logits(self.transformer.features(tokens), 0, self.n_codes)
        loss = F.cross_entropy(logits.flatten(0, 1), z.flatten())
        return loss, {"loss": loss, "bits_per_token": loss.detach() / math.log(2)}

    def _prefix(self, labels: Tensor | None, n: int, device: Any) -> Tensor:
        """Start tokens [n, 1]."""
        if labels is None:
            labels = torch.zeros(n, dtype=torch.int64, device=device)
        return (self.n_codes + labels)[:, None]

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> Condition:
        """Start tokens; classes default to seed mod number of classes."""
        if self.num_classes is None:
            super().condition(seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
            return {"prefix": self._prefix(None, len(seeds), self.device)}
        labels = self.class_labels(seeds, classes, prompts or negative_prompt, self.device)
        cond: Condition = {"prefix": self._prefix(labels, len(seeds), self.device)}
        if self.has_null_class:
            cond["uncond"] = torch.full_like(cond["prefix"], self.n_codes + self.null_class)
        return cond

    @torch.no_grad()
    def sample(
        self,
        cond: Condition | None = None,
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        scale: float = 1.0,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """One picture per seed, [len(seeds), C, H, W] in [-1, 1].

        Args:
            cond: from `condition`.
            temperature: 0 takes the most probable token, 1 the model's own distribution.
            top_k: draw from the k most probable tokens; null from all.
            top_p: draw from the most probable tokens that together reach probability p.
            scale: classifier-free guidance; 1 is off.
            callback: called after each token.
        """
        cond = self.condition(seeds) if cond is None else cond
        tokens = self.draw_tokens(
            cond, seeds, temperature=temperature, top_k=top_k, top_p=top_p, scale=scale, callback=callback
        )
        return self.decode_tokens(tokens)

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, **knobs: Any) -> dict[str, Tensor]:
        """inputs, what their tokens hold, samples, and samples that begin with the upper half of the inputs."""
        x = self.get_input(batch, self.first_stage_key)[:n]
        seeds = list(range(len(x)))
        classes = None if self.cond_stage_key is None else batch[self.cond_stage_key][:n].tolist()
        cond = self.condition(seeds, classes=classes)
        with self.ema_scope():
            return {
                "inputs": x,
                "reconstructions": self.decode_tokens(self.encode_images(x)),
                "samples": self.sample(cond, seeds=seeds, **knobs),
                "samples_half": self.sample(self.prime(cond, x), seeds=seeds, **knobs),
            }


class DALLE(CaptionModel):
    """Text tokens, then image tokens (Ramesh et al. 2021, section 2.2).

    The rest of the text is filled with padding tokens, one for each place. Logs `loss`, `loss_text` and `loss_image`,
    nats per token.

    Args:
        first_stage_config, first_stage_key, cache_codes, use_ema, ema_decay: as for `TokenModel`.
        transformer_config: `{params}` of `ldm.modules.gpt.Transformer`; vocab_size, block_size, grid and image_start
            are set.
        text_vocab, text_length, tokenizer_file, cond_stage_key, cond_dropout: as for `CaptionModel`.
        text_weight, image_weight: weights of the two parts of the loss (the paper: 1 and 7).
    """

    def __init__(
        self,
        first_stage_config: Config,
        transformer_config: Config,
        text_vocab: int = 4096,
        text_length: int = 256,
        text_weight: float = 1.0,
        image_weight: float = 7.0,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, text_vocab=text_vocab, text_length=text_length, **base)
        self.text_weight, self.image_weight = text_weight, image_weight
        h, w = self.grid
        self.start_token = text_vocab + text_length
        self.first_code, self.n_codes = self.start_token + 1, self.first_stage_model.n_embed
        self.transformer = self.build_transformer(
            transformer_config,
            vocab_size=self.first_code + self.n_codes,
            block_size=1 + text_length + h * w,
            grid=[h, w],
            image_start=1 + text_length,
        )
        self._finish()

    def text_rows(self, texts: Sequence[str]) -> Tensor:
        rows = super().text_rows(texts)
        places = self.text.vocab_size + torch.arange(self.text_length)
        return torch.where(rows < 0, places, rows)

    def prefix(self, rows: Tensor) -> Tensor:
        """Text tokens [B, text_length] -> the sequence before the image, [B, 1 + text_length]."""
        return F.pad(rows, (1, 0), value=self.start_token)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.image_tokens(batch)
        rows, kept = self.training_rows(batch, z.device)
        tokens = torch.cat([self.prefix(rows), z + self.first_code], 1)[:, :-1]
        features = self.transformer.features(tokens)
        on_text, on_image = features.split([self.text_length, z.shape[1]], 1)
        text = self.token_loss(on_text, rows.masked_fill(~kept[:, None], -100), 0, self.start_token)
        image = self.token_loss(on_image, z, self.first_code, self.first_code + self.n_codes)
        loss = (self.text_weight * text + self.image_weight * image) / (self.text_weight + self.image_weight)
        return loss, {"loss": loss, "loss_text": text, "loss_image": image}


class CogView(CaptionModel):
    """One vocabulary and one network for pictures from text and text from pictures (Ding et al. 2021).

    Sequences are `[ROI] text [BASE] [BOI] image` and `[BASE] [BOI] image [EOI] [ROI] text`. Logs `loss`, and for either
    direction the nats per token of text and image.

    Args:
        first_stage_config, first_stage_key, cache_codes, use_ema, ema_decay: as for `TokenModel`.
        transformer_config: `{params}` of `ldm.modules.gpt.Transformer`; vocab_size, block_size, grid and image_start
            are set, Sandwich-LN and the two scalings against overflow are on unless switched off.
        text_vocab, text_length, tokenizer_file, cond_stage_key, cond_dropout: as for `CaptionModel`.
        text_weight, image_weight: weights of the two parts of the loss.
        caption_share: share of the training pictures that are captioned rather than drawn.
    """

    def __init__(
        self,
        first_stage_config: Config,
        transformer_config: Config,
        text_vocab: int = 4096,
        text_length: int = 64,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        caption_share: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, text_vocab=text_vocab, text_length=text_length, **base)
        self.text_weight, self.image_weight, self.caption_share = text_weight, image_weight, caption_share
        h, w = self.grid
        self.end_token = text_vocab  # of a text; it also fills the rest
        self.roi, self.base, self.boi, self.eoi = (text_vocab + i for i in range(1, 5))
        self.first_code, self.n_codes = text_vocab + 5, self.first_stage_model.n_embed
        stable = {"sandwich_norm": True, "scaled_norm": True, "stable_attention": True}
        config = {**transformer_config, "params": {**stable, **(transformer_config.get("params") or {})}}
        self.transformer = self.build_transformer(
            config,
            vocab_size=self.first_code + self.n_codes,
            block_size=text_length + h * w + 4,
            grid=[h, w],
            image_start=text_length + 3,
        )
        self._finish()

    # --- sequences ----------------------------------------------------------------------------------------------------

    def text_rows(self, texts: Sequence[str]) -> Tensor:
        rows = super().text_rows(texts)
        return torch.where(rows < 0, self.end_token, rows)

    def prefix(self, rows: Tensor) -> Tensor:
        """Text tokens [B, L] -> [ROI] text [BASE] [BOI], [B, L + 3]."""
        return torch.cat([_column(rows, self.roi), rows, _column(rows, self.base), _column(rows, self.boi)], 1)

    def picture_prefix(self, z: Tensor) -> Tensor:
        """Image tokens [B, N] -> [BASE] [BOI] image [EOI] [ROI], [B, N + 4]."""
        ends = (_column(z, t) for t in (self.base, self.boi, self.eoi, self.roi))
        base, boi, eoi, roi = ends
        return torch.cat([base, boi, z + self.first_code, eoi, roi], 1)

    def _targets(self, rows: Tensor) -> Tensor:
        """Text tokens with one end token to learn; those behind it do not count."""
        behind = (rows == self.end_token).cumsum(1) > 1
        return rows.masked_fill(behind, -100)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """In training each picture serves one of the two directions, otherwise both."""
        z = self.image_tokens(batch)
        rows, kept = self.training_rows(batch, z.device)
        n = len(z)
        captioned = n
        if self.training:
            captioned = int(n * self.caption_share + torch.rand(()).item())
            z_draw, rows_draw, kept_draw = z[captioned:], rows[captioned:], kept[captioned:]
        else:
            z_draw, rows_draw, kept_draw = z, rows, kept
        logs: dict[str, Tensor] = {}
        total = z.new_zeros((), dtype=torch.float32)
        if len(z_draw):
            total = total + len(z_draw) * self._draw_loss(z_draw, rows_draw, kept_draw, logs)
        if captioned:
            # of whole captions: a dropped one has nothing to say about its picture
            whole = self.text_rows(self.value_of(batch, self.cond_stage_key)[:captioned]).to(z.device)
            total = total + captioned * self._caption_loss(z[:captioned], whole, logs)
        loss = total / (len(z_draw) + captioned)
        return loss, {"loss": loss, **logs}

    def _draw_loss(self, z: Tensor, rows: Tensor, kept: Tensor, logs: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([self.prefix(rows), z + self.first_code], 1)[:, :-1]
        features = self.transformer.features(tokens)
        L = self.text_length
        text = self.token_loss(
            features[:, :L], self._targets(rows).masked_fill(~kept[:, None], -100), 0, self.end_token + 1
        )
        image = self.token_loss(features[:, L + 2 :], z, self.first_code, self.first_code + self.n_codes)
        logs.update(draw_text=text, draw_image=image)
        return self._weighted(text, image)

    def _caption_loss(self, z: Tensor, rows: Tensor, logs: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([self.picture_prefix(z), rows], 1)[:, :-1]
        features = self.transformer.features(tokens, image_start=2)
        N = z.shape[1]
        image = self.token_loss(features[:, 1 : N + 1], z, self.first_code, self.first_code + self.n_codes)
        text = self.token_loss(features[:, N + 3 :], self._targets(rows), 0, self.end_token + 1)
        logs.update(caption_text=text, caption_image=image)
        return self._weighted(text, image)

    def _weighted(self, text: Tensor, image: Tensor) -> Tensor:
        return (self.text_weight * text + self.image_weight * image) / (self.text_weight + self.image_weight)

    # --- pictures and captions ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, images: Tensor) -> list[str]:
        """Pictures [B, C, H, W] in [-1, 1] -> their most probable captions, token by token."""
        return self.caption_tokens(self.encode_images(images.to(self.device)))

    def caption_tokens(self, z: Tensor) -> list[str]:
        """Image tokens [B, N] -> captions."""
        rows = generate(
            self.transformer,
            self.picture_prefix(z),
            self.text_length,
            last=self.end_token + 1,
            image_start=2,
            end=self.end_token,
        )
        texts = []
        for row in rows.tolist():
            texts.append(self.text.decode(row[: row.index(self.end_token)] if self.end_token in row else row))
        return texts

    @torch.no_grad()
    def caption_likelihood(self, z: Tensor, rows: Tensor) -> Tensor:
        """Image tokens [B, N] and text tokens [B, L] -> mean log-likelihood of a text token given the picture, [B]."""
        tokens = torch.cat([self.picture_prefix(z), rows], 1)[:, :-1]
        features = self.transformer.features(tokens, image_start=2)[:, z.shape[1] + 3 :]
        targets = self._targets(rows)
        logits = self.transformer.logits(features, 0, self.end_token + 1).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(rows)
        return -nll.sum(1) / (targets >= 0).sum(1)

    @torch.no_grad()
    def sample(
        self,
        cond: Condition | None = None,
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        scale: float = 1.0,
        rerank: int = 1,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """One picture per seed, [len(seeds), C, H, W] in [-1, 1].

        Args:
            cond, temperature, top_k, top_p, scale, callback: as for `CaptionModel`.
            rerank: pictures to draw per seed, of which the one is kept that the prompt fits best as a caption.
        """
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "scale": scale, "callback": callback}
        if rerank == 1:
            return super().sample(cond, seeds=seeds, **knobs)
        if rerank < 1:
            raise UserError(f"rerank: got {rerank}, expected at least 1 picture per seed")
        cond = self.condition(seeds) if cond is None else cond
        n, N = len(seeds), self.grid[0] * self.grid[1]
        u = SeededNoise(seeds).rand((n, rerank, N), device=self.device).flatten(0, 1)
        several = {k: None if v is None else v.repeat_interleave(rerank, 0) for k, v in cond.items()}
        tokens = self.draw_tokens(
            several, [s for s in seeds for _ in range(rerank)], first=self.first_code, u=u, **knobs
        )
        rows = several["prefix"][:, 1 : 1 + self.text_length].to(tokens.device)
        best = self.caption_likelihood(tokens, rows).view(n, rerank).argmax(1)
        return self.decode_tokens(tokens.view(n, rerank, N)[torch.arange(n, device=best.device), best])

    def caption_texts(self, tokens: Tensor) -> list[str]:
        return self.caption_tokens(tokens)


def _column(like: Tensor, token: int) -> Tensor:
    return like.new_full((len(like), 1), token)
