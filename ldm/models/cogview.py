"""CogView: pictures from text, text from pictures, larger pictures from smaller ones (Ding et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.base import Config
from ldm.models.captions import CaptionModel
from ldm.models.tokens import Condition
from ldm.modules.decoding import generate
from ldm.util import SeededNoise, UserError


class CogView(CaptionModel):
    """One vocabulary and one network for all directions.

    Sequences are `[ROI] text [BASE] [BOI] image`, for captions `[BASE] [BOI] image [EOI] [ROI] text`, and for larger
    pictures `[BASE] [BOI] image of half the size [EOI] [BOI] image`. Logs `loss`, and for each direction the nats per
    token of text and image.

    Args:
        first_stage_config, first_stage_key, cache_codes, use_ema, ema_decay: as for `TokenModel`.
        transformer_config: `{params}` of `ldm.modules.gpt.Transformer`; vocab_size, block_size, grid and image_start
            are set, Sandwich-LN and the two scalings against overflow are on unless switched off.
        text_vocab, text_length, tokenizer_file, cond_stage_key, cond_dropout, temperature: as for `CaptionModel`.
        text_weight, image_weight: weights of the two parts of the loss.
        caption_share: share of the training pictures that are captioned rather than drawn.
        upscale_share: share of the training pictures that are drawn from the same in half the size.

    Raises:
        UserError: shares above 1, or a grid that has no half.
    """

    def __init__(
        self,
        first_stage_config: Config | str,
        transformer_config: Config,
        text_vocab: int = 4096,
        text_length: int = 64,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        caption_share: float = 0.5,
        upscale_share: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, text_vocab=text_vocab, text_length=text_length, **base)
        self.text_weight, self.image_weight = text_weight, image_weight
        self.caption_share, self.upscale_share = caption_share, upscale_share
        if min(caption_share, upscale_share) < 0 or caption_share + upscale_share > 1:
            raise UserError(
                f"caption_share and upscale_share: got {caption_share} and {upscale_share}, expected shares that "
                "leave something to draw from text (together at most 1)"
            )
        h, w = self.grid
        if upscale_share > 0:
            self._check_halves()
        self.end_token = text_vocab  # of a text; it also fills the rest
        self.roi, self.base, self.boi, self.eoi = (text_vocab + i for i in range(1, 5))
        self.first_code, self.n_codes = text_vocab + 5, self.first_stage_model.n_embed
        stable = {"sandwich_norm": True, "scaled_norm": True, "stable_attention": True}
        config = {**transformer_config, "params": {**stable, **(transformer_config.get("params") or {})}}
        self.transformer = self.build_transformer(
            config,
            vocab_size=self.first_code + self.n_codes,
            block_size=h * w + 4 + max(text_length, h * w // 4),
            grid=[h, w],
            image_start=text_length + 3,
        )
        self._finish()

    def _check_halves(self) -> None:
        h, w = self.grid
        if h % 4 or w % 4:
            raise UserError(f"larger pictures: got a grid of {h}x{w} tokens, expected multiples of 4 (half windows)")

    # --- sequences ----------------------------------------------------------------------------------------------------

    def text_rows(self, texts: Sequence[str]) -> Tensor:
        rows = super().text_rows(texts)
        return torch.where(rows < 0, self.end_token, rows)

    def prefix(self, rows: Tensor) -> Tensor:
        """Text tokens [B, L] -> [ROI] text [BASE] [BOI], [B, L + 3]."""
        return torch.cat([_column(rows, self.roi), rows, _column(rows, self.base), _column(rows, self.boi)], 1)

    def picture_prefix(self, z: Tensor) -> Tensor:
        """Image tokens [B, N] -> [BASE] [BOI] image [EOI] [ROI], [B, N + 4]."""
        return self._after_picture(z, self.roi)

    def half_prefix(self, z: Tensor) -> Tensor:
        """Image tokens of half the size [B, N / 4] -> [BASE] [BOI] image [EOI] [BOI], [B, N / 4 + 4]."""
        return self._after_picture(z, self.boi)

    def _after_picture(self, z: Tensor, last: int) -> Tensor:
        base, boi, eoi, end = (_column(z, t) for t in (self.base, self.boi, self.eoi, last))
        return torch.cat([base, boi, z + self.first_code, eoi, end], 1)

    def _targets(self, rows: Tensor) -> Tensor:
        """Text tokens with one end token to learn; those behind it do not count."""
        behind = (rows == self.end_token).cumsum(1) > 1
        return rows.masked_fill(behind, -100)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """In training each picture serves one of the directions, otherwise all that are trained."""
        z = self.image_tokens(batch)
        n, logs = len(z), {}
        if self.training:
            captioned = int(n * self.caption_share + torch.rand(()).item())
            larger = min(n - captioned, int(n * self.upscale_share + torch.rand(()).item()))
            parts = slice(0, captioned), slice(captioned, captioned + larger), slice(captioned + larger, n)
        else:
            parts = slice(0, n), slice(0, n if self.upscale_share > 0 else 0), slice(0, n)
        losses = self._caption_loss, self._upscale_loss, self._draw_loss
        counts = [len(z[part]) for part in parts]
        total = z.new_zeros((), dtype=torch.float32)
        for part, count, loss in zip(parts, counts, losses, strict=True):
            if count:
                total = total + count * loss({k: v[part] for k, v in batch.items()}, z[part], logs)
        loss = total / sum(counts)
        return loss, {"loss": loss, **logs}

    def _draw_loss(self, batch: dict[str, Any], z: Tensor, logs: dict[str, Tensor]) -> Tensor:
        rows, kept = self.training_rows(batch, z.device)
        tokens = torch.cat([self.prefix(rows), z + self.first_code], 1)[:, :-1]
        features = self.transformer.features(tokens)
        L = self.text_length
        text = self.token_loss(
            features[:, :L], self._targets(rows).masked_fill(~kept[:, None], -100), 0, self.end_token + 1
        )
        image = self._image_loss(features[:, L + 2 :], z)
        logs.update(draw_text=text, draw_image=image)
        return self._weighted(text, image)

    def _caption_loss(self, batch: dict[str, Any], z: Tensor, logs: dict[str, Tensor]) -> Tensor:
        # of whole captions: a dropped one has nothing to say about its picture
        rows = self.text_rows(self.value_of(batch, self.cond_stage_key)).to(z.device)
        tokens = torch.cat([self.picture_prefix(z), rows], 1)[:, :-1]
        features = self.transformer.features(tokens, image_start=2)
        N = z.shape[1]
        image = self._image_loss(features[:, 1 : N + 1], z)
        text = self.token_loss(features[:, N + 3 :], self._targets(rows), 0, self.end_token + 1)
        logs.update(caption_text=text, caption_image=image)
        return self._weighted(text, image)

    def _upscale_loss(self, batch: dict[str, Any], z: Tensor, logs: dict[str, Tensor]) -> Tensor:
        prefix = self.half_prefix(self.image_tokens(batch, shrink=2))
        tokens = torch.cat([prefix, z + self.first_code], 1)[:, :-1]
        start = prefix.shape[1]
        image = self._image_loss(self.transformer.features(tokens, image_start=start)[:, start - 1 :], z)
        logs.update(upscale_image=image)
        return image

    def _image_loss(self, features: Tensor, z: Tensor) -> Tensor:
        return self.token_loss(features, z, self.first_code, self.first_code + self.n_codes)

    def _weighted(self, text: Tensor, image: Tensor) -> Tensor:
        return (self.text_weight * text + self.image_weight * image) / (self.text_weight + self.image_weight)

    # --- captions -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, images: Tensor, rerank: int = 1, seed: int = 0) -> list[str]:
        """Pictures [B, C, H, W] in [-1, 1] -> their most probable captions, token by token.

        Args:
            rerank: read each picture so many times, once so and the others drawn at temperature 1, and keep the caption
                on which the network's two directions agree best: the product of p(text | picture), as it captions, and
                p(text) p(picture | text), as it draws (the paper's self-reranking, from both sides).
            seed: of the drawn captions; a picture's caption depends neither on its batch nor on its place in it.

        Raises:
            UserError: rerank below 1.
        """
        if rerank < 1:
            raise UserError(f"rerank: got {rerank}, expected at least 1")
        z = self.encode_images(images.to(self.device))
        said = [self.caption_tokens(z)]
        for k in range(1, rerank):
            u = SeededNoise([seed + k]).rand((1, self.text_length), device=self.device)
            said.append(self.caption_tokens(z, u.expand(len(z), -1)))
        if rerank <= 1:
            return said[0]
        rows = [self.text_rows(texts).to(z.device) for texts in said]
        lengths = [(self._targets(r) >= 0).sum(1) for r in rows]
        scores = torch.stack(
            [
                self.joint_likelihood(z, r) + n * self.caption_likelihood(z, r)
                for r, n in zip(rows, lengths, strict=True)
            ]
        )
        return [said[k][i] for i, k in enumerate(scores.argmax(0).tolist())]

    def caption_tokens(self, z: Tensor, u: Tensor | None = None) -> list[str]:
        """Image tokens [B, N] -> captions: the most probable tokens, or those drawn by uniform numbers u [B, L]."""
        rows = generate(
            self.transformer,
            self.picture_prefix(z),
            self.text_length,
            u=u,
            last=self.end_token + 1,
            image_start=2,
            end=self.end_token,
        )
        texts = []
        for row in rows.tolist():
            texts.append(self.text.decode(row[: row.index(self.end_token)] if self.end_token in row else row))
        return texts

    def caption_texts(self, tokens: Tensor) -> list[str]:
        return self.caption_tokens(tokens)

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
    def joint_likelihood(self, z: Tensor, rows: Tensor) -> Tensor:
        """Image tokens [B, N] and text tokens [B, L] -> log p(text) + log p(picture | text) in nats, [B]."""
        tokens = torch.cat([self.prefix(rows), z + self.first_code], 1)[:, :-1]
        features, L = self.transformer.features(tokens), self.text_length
        text = self.transformer.logits(features[:, :L], 0, self.end_token + 1).float()
        image = self.transformer.logits(features[:, L + 2 :], self.first_code, self.first_code + self.n_codes).float()
        parts = (text, self._targets(rows)), (image, z)
        return -sum(F.cross_entropy(x.mT, y, reduction="none").sum(1) for x, y in parts)

    def fit(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """`caption_likelihood`, the paper's self-reranking."""
        return self.caption_likelihood(tokens, rows)

    # --- larger pictures ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Condition | None = None,
        *,
        seeds: Sequence[int],
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        scale: float = 1.0,
        rerank: int = 1,
        upscale: bool = False,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """One picture per seed, [len(seeds), C, H, W] in [-1, 1].

        Args:
            cond, temperature, top_k, top_p, scale, rerank, callback: as for `CaptionModel`.
            upscale: draw the picture again at twice the size, [len(seeds), C, 2 H, 2 W].

        Raises:
            UserError: upscale, but the model was trained without.
        """
        temperature = self.temperature if temperature is None else temperature
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        x = super().sample(cond, seeds=seeds, scale=scale, rerank=rerank, callback=callback, **knobs)
        return self.enlarge(x, seeds=seeds, callback=callback, **knobs) if upscale else x

    @torch.no_grad()
    def enlarge(self, images: Tensor, *, seeds: Sequence[int], **knobs: Any) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> the same at twice the size, drawn by sliding windows (figure 11).

        A window is as large as a picture of the training set and moves by half of that; tokens that an earlier window
        has drawn stay. `knobs` are temperature, top_k, top_p and callback of `sample`.

        Raises:
            UserError: the model was trained without upscale_share, or has a grid without halves.
        """
        if self.upscale_share <= 0:
            raise UserError("upscale: the model was trained without upscale_share and cannot draw larger pictures")
        h, w = self.grid
        low = self.encode_images(images.to(self.device)).view(-1, h, w)
        out = low.new_full((len(low), 2 * h, 2 * w), -1)
        corners = [(i, j) for i in range(0, h // 2 + 1, h // 4) for j in range(0, w // 2 + 1, w // 4)]
        u = SeededNoise(seeds).rand((len(low), len(corners), h * w), device=self.device)
        for number, (i, j) in enumerate(corners):
            part = low[:, i : i + h // 2, j : j + w // 2]
            window = out[:, 2 * i : 2 * i + h, 2 * j : 2 * j + w]
            cond: Condition = {"prefix": self.half_prefix(part.flatten(1)), "primed": window.flatten(1)}
            start = cond["prefix"].shape[1]
            tokens = self.draw_tokens(cond, seeds, first=self.first_code, image_start=start, u=u[:, number], **knobs)
            window.copy_(tokens.view_as(window))
        return self.first_stage_model.decode_code(out).clamp(-1, 1)


def _column(like: Tensor, token: int) -> Tensor:
    return like.new_full((len(like), 1), token)
