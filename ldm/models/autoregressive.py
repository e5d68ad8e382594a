"""Transformers that draw: ImageGPT (classes) and DALL-E (text). CogView is in `ldm.models.cogview`."""

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
from ldm.models.rerank import ClipRanker
from ldm.models.tokens import Condition, TokenModel


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
        first_stage_config: Config | str,
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

    Of several pictures (`rerank`), CLIP chooses.
    """

    def __init__(
        self,
        first_stage_config: Config | str,
        transformer_config: Config,
        text_vocab: int = 4096,
        text_length: int = 256,
        text_weight: float = 1.0,
        image_weight: float = 7.0,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, text_vocab=text_vocab, text_length=text_length, **base)
        self.text_weight, self.image_weight = text_weight, image_weight
        self._ranker: list[ClipRanker] | None = None
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

    def fit(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """CLIP's cosine of picture and caption (the paper's section 2.6).

        Raises:
            UserError: no CLIP weights.
        """
        if self._ranker is None:
            self._ranker = [ClipRanker().to(tokens.device)]  # a list: its weights are not the model's
        return self._ranker[0](self.decode_tokens(tokens), [self.text.decode(r) for r in rows.tolist()])
