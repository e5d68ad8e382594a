"""What the recipes that draw from captions share: text tokens, their vocabulary, prompts, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.base import Config
from ldm.models.framework import rank_zero_info, rank_zero_warn
from ldm.models.tokens import Condition, TokenModel
from ldm.modules.bpe import BytePairs
from ldm.util import SeededNoise, UserError, log_txt_as_img


class CaptionModel(TokenModel):
    """A transformer over text and image tokens. Subclasses write `prefix`, `loss`, and set `first_code`.

    The text tokens are learned from the training captions when training starts, and travel in the checkpoint.

    Args:
        first_stage_config: of what makes image tokens.
        text_vocab: text tokens, at least 256.
        text_length: tokens of a caption; longer ones are cut, and it is said what was cut.
        tokenizer_file: a tokenizer.json of the `tokenizers` package instead.
        cond_stage_key: batch key of the captions.
        cond_dropout: share of the captions left out in training, which guidance and empty prompts need.
        temperature: at which the model draws unless another is asked for.
    """

    first_code: int

    def __init__(
        self,
        first_stage_config: Config | str,
        *,
        text_vocab: int,
        text_length: int,
        tokenizer_file: str | None = None,
        cond_stage_key: str = "caption",
        cond_dropout: float = 0.1,
        temperature: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(first_stage_config, **base)
        self.temperature = temperature
        self.text_length, self.cond_stage_key, self.cond_dropout = text_length, cond_stage_key, cond_dropout
        self.text = BytePairs(text_vocab, tokenizer_file)
        self._rows: dict[str, list[int]] = {}
        self._cut_said = False

    # --- text ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        sets = getattr(self.trainer.datamodule, "datasets", None) or {}
        if self.cond_dropout <= 0:
            self._warn_of_empty_captions(sets.get("train"))
        if self.text.learned:
            return
        if "train" not in sets:
            raise UserError(
                f"{type(self).__name__} has no text tokens: give tokenizer_file, or a data module that holds the "
                "training captions, or call model.text.learn(captions)"
            )
        captions = list(captions_of(sets["train"], self.cond_stage_key))
        self.text.learn(captions)
        self._rows.clear()
        merged = int((self.text.merges[:, 0] >= 0).sum())
        rank_zero_info(f"text tokens: 256 bytes and {merged} pairs, learned from {len(captions)} captions")

    def _warn_of_empty_captions(self, dataset: Any) -> None:
        empty, count = empty_captions(dataset)
        if empty:
            rank_zero_warn(
                f"{len(empty)} of {count} training pictures have an empty {self.cond_stage_key}, e.g. {empty[0]}: "
                "without cond_dropout the model refuses empty prompts, and learns nothing of use from these; give them "
                "captions, or set model.params.cond_dropout above 0"
            )

    def value_of(self, batch: dict[str, Any], key: str) -> list[str]:
        """The captions of a batch."""
        if key not in batch:
            raise UserError(f"the batch has no key {key!r}; the data set gives {sorted(batch)} (cond_stage_key)")
        return list(batch[key])

    def text_rows(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token ids int64 [B, text_length], -1 behind the last one. Too long ones are cut with a warning."""
        return torch.tensor([self._row(t) for t in texts], dtype=torch.int64).view(-1, self.text_length)

    def _row(self, text: str) -> list[int]:
        if text not in self._rows:
            ids = self.text.encode(text)
            if len(ids) > self.text_length:
                self._say_cut(ids)
                ids = ids[: self.text_length]
            self._rows[text] = ids + [-1] * (self.text_length - len(ids))
        return self._rows[text]

    def _say_cut(self, ids: list[int]) -> None:
        if self.training and self._cut_said:
            return
        rank_zero_warn(
            f"a caption has {len(ids)} tokens, the text window {self.text_length} (text_length): cut off is "
            f"{self.text.decode(ids[self.text_length :])!r}{' (said once in training)' * self.training}"
        )
        self._cut_said = True

    def training_rows(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Text tokens [B, text_length] of the batch, some left out in training; bool [B], those that were kept."""
        texts = self.value_of(batch, self.cond_stage_key)
        rows, kept = self.text_rows(texts), torch.ones(len(texts), dtype=torch.bool)
        if self.training and self.cond_dropout > 0:
            kept = torch.rand(len(texts)) >= self.cond_dropout
            rows = torch.where(kept[:, None], rows, self.text_rows([""]))
        return rows.to(device), kept.to(device)

    def prefix(self, rows: Tensor) -> Tensor:
        """Text tokens [B, text_length] -> the sequence before the image."""
        raise NotImplementedError(f"{type(self).__name__} does not define prefix(rows)")

    def token_loss(self, features: Tensor, targets: Tensor, first: int, last: int) -> Tensor:
        """Mean cross-entropy [] of targets [B, n] among the tokens first..last; -100 does not count."""
        logits = self.transformer.logits(features, first, last)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp_min(1)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> Condition:
        """Prompts (one per seed, or one for all) as the start of the sequence; without prompts, empty ones.

        Raises:
            UserError: a class was given, an empty prompt for a model that never saw one, or another number of prompts.
        """
        if classes is not None:
            raise UserError(f"{type(self).__name__} was trained on captions: it takes no class, give a prompt")
        texts = list(prompts) if prompts is not None else [""]
        texts = texts * len(seeds) if len(texts) == 1 else texts
        if len(texts) != len(seeds):
            raise UserError(f"got {len(texts)} prompts for {len(seeds)} pictures, expected one each (or one for all)")
        if self.cond_dropout <= 0:
            if negative_prompt is not None:
                raise UserError("negative prompt: the model was trained without cond_dropout and takes none")
            if not all(t.strip() for t in texts):
                raise UserError("empty prompt: the model was trained without cond_dropout and draws from text only")
        if prompts is not None and not all(t.strip() for t in texts):
            rank_zero_warn("empty prompt: the picture is drawn without a condition; give a prompt to say what it shows")
        for text in dict.fromkeys(texts):
            self._check_characters(text)
        cond: Condition = {"prefix": self.prefix(self.text_rows(texts)).to(self.device)}
        if self.cond_dropout > 0:
            other = self.prefix(self.text_rows([negative_prompt or ""])).to(self.device)
            cond["uncond"] = other.expand(len(seeds), -1)
        return cond

    def _check_characters(self, text: str) -> None:
        unseen = self.text.unseen(text) if self.text.learned else []
        if unseen:
            rank_zero_warn(
                f"the prompt {text!r} holds {', '.join(map(repr, unseen[:10]))}, which no training caption holds: the "
                "model cannot know what it means"
            )

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
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """One picture per seed, [len(seeds), C, H, W] in [-1, 1].

        Args:
            cond: from `condition`; with `prime` the pictures have a given upper part.
            temperature: 0 takes the most probable token, 1 the model's own distribution; None is the model's default.
            top_k: draw from the k most probable tokens; null from all.
            top_p: draw from the most probable tokens that together reach probability p.
            scale: classifier-free guidance; 1 is off.
            rerank: pictures to draw per seed, of which the one is kept that fits the prompt best (see `fit`).
            callback: called after each token.
        """
        cond = self.condition(seeds) if cond is None else cond
        temperature = self.temperature if temperature is None else temperature
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "scale": scale, "callback": callback}
        return self.decode_tokens(self.best_tokens(cond, seeds, rerank, **knobs))

    def best_tokens(self, cond: Condition, seeds: Sequence[int], rerank: int, **knobs: Any) -> Tensor:
        """Image tokens [len(seeds), h w], the best of `rerank` drawings per seed.

        Raises:
            UserError: rerank below 1.
        """
        if rerank == 1:
            return self.draw_tokens(cond, seeds, first=self.first_code, **knobs)
        if rerank < 1:
            raise UserError(f"rerank: got {rerank}, expected at least 1 picture per seed")
        n, N = len(seeds), self.grid[0] * self.grid[1]
        u = SeededNoise(seeds).rand((n, rerank, N), device=self.device).flatten(0, 1)
        several = {k: None if v is None else v.repeat_interleave(rerank, 0) for k, v in cond.items()}
        each = [s for s in seeds for _ in range(rerank)]
        tokens = self.draw_tokens(several, each, first=self.first_code, u=u, **knobs)
        rows = several["prefix"][:, 1 : 1 + self.text_length].to(tokens.device)
        best = self.fit(tokens, rows).view(n, rerank).argmax(1)
        return tokens.view(n, rerank, N)[torch.arange(n, device=best.device), best]

    def fit(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """How well pictures fit their captions, [B]: image tokens [B, N], text tokens [B, text_length]."""
        raise NotImplementedError(f"{type(self).__name__} does not define fit(tokens, rows)")

    def caption_texts(self, tokens: Tensor) -> list[str]:
        """The model's own captions of image tokens [B, N], if it makes any."""
        return []

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, **knobs: Any) -> dict[str, Tensor]:
        """inputs, what their tokens hold, captions (and the model's own, where it makes them) as pictures, samples from
        the captions, and samples that begin with the upper half of the inputs."""
        x = self.get_input(batch, self.first_stage_key)[:n]
        texts, seeds = self.value_of(batch, self.cond_stage_key)[: len(x)], list(range(len(x)))
        page = (max(128, x.shape[3]), max(128, x.shape[2]))
        prefix = self.prefix(self.text_rows(texts)).to(self.device)
        cond: Condition = {"prefix": prefix}
        if self.cond_dropout > 0:
            cond["uncond"] = self.prefix(self.text_rows([""])).to(self.device).expand(len(x), -1)
        with self.ema_scope():
            tokens = self.encode_images(x)
            images = {"inputs": x, "reconstructions": self.decode_tokens(tokens)}
            images["conditioning"] = log_txt_as_img(page, texts)
            own = self.caption_texts(tokens)
            if own:
                images["captions"] = log_txt_as_img(page, own)
            images["samples"] = self.sample(cond, seeds=seeds, **knobs)
            images["samples_half"] = self.sample(self.prime(cond, x), seeds=seeds, **knobs)
        return images


def captions_of(dataset: Any, key: str) -> Iterable[str]:
    """All captions of a data set: from its list where it keeps one, else from its samples."""
    entries = getattr(getattr(dataset, "entries", None), "captions", None)
    own = entries if entries is not None else getattr(dataset, "captions", None)
    if own is not None:
        for several in own:
            yield from ([several] if isinstance(several, str) else several)
        return
    for i in range(len(dataset)):
        yield str(dataset[i][key])


def empty_captions(dataset: Any) -> tuple[list[str], int]:
    """(the pictures of a data set that have an empty caption, how many pictures there are), where it keeps a list."""
    entries = getattr(dataset, "entries", None)
    captions = getattr(entries, "captions", None) or []
    where = getattr(getattr(dataset, "source", None), "where", str)
    empty = [where(n) for n, texts in zip(entries.names, captions, strict=True) if not all(texts)] if captions else []
    return empty, len(captions)
