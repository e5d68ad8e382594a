"""Prompts: `(word:1.3)` weights, chunks for long texts, and the base class of the embedders that read text."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STEP = 1.1  # one pair of brackets
_SYNTAX = re.compile(
    r"\\(?P<literal>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<mark>[()\[\]])|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Splits a prompt with weights, written as in AUTOMATIC1111's web UI, into (text, weight) runs.

    `(x)` = 1.1, `(x:1.3)` = 1.3, `[x]` = 1 / 1.1; brackets nest and multiply; one that is never closed reaches to the
    end, one that was never opened is text. `\(` `\)` `\[` `\]` `\\` are the characters themselves.
    """
    runs: list[list] = []  # [text, weight]
    opened: list[tuple[str, int]] = []  # (bracket, index of the first run inside)
    for m in _SYNTAX.finditer(prompt):
        if m["mark"] and m["mark"] in "([":
            opened.append((m["mark"], len(runs)))
        elif not _close(m, runs, opened):
            runs.append([m["literal"] or m[0], 1.0])
    for bracket, start in opened:
        for run in runs[start:]:
            run[1] *= STEP if bracket == "(" else 1 / STEP
    return _join(runs)


def _close(m: re.Match[str], runs: list[list], opened: list[tuple[str, int]]) -> bool:
    """Scales the runs since the bracket that `m` closes; False if it closes none."""
    if m["weight"] is not None:
        bracket, factor = "(", float(m["weight"])
    elif m["mark"]:
        bracket, factor = ("(", STEP) if m["mark"] == ")" else ("[", 1 / STEP)
    else:
        return False
    for i in range(len(opened) - 1, -1, -1):
        if opened[i][0] == bracket:
            for run in runs[opened.pop(i)[1] :]:
                run[1] *= factor
            return True
    return False


def _join(runs: list[list]) -> list[tuple[str, float]]:
    """Neighbours of equal weight become one run; an empty prompt is one empty run."""
    joined: list[tuple[str, float]] = []
    for text, weight in runs:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


class TokenisedPrompt(NamedTuple):
    """One prompt as tokens without start, end and padding.

    Attributes:
        ids: token ids.
        weights: one per id.
        rest: per id, (index of its run, where its piece starts in that run's cleaned text).
        runs: cleaned text of each run.
    """

    ids: list[int]
    weights: list[float]
    rest: list[tuple[int, int]]
    runs: list[str]

    def words_after(self, n: int) -> list[str]:
        """Words that are not wholly in the first n tokens."""
        if n >= len(self.ids):
            return []
        run, start = self.rest[n]
        return " ".join([self.runs[run][start:], *self.runs[run + 1 :]]).split()


def tokenise(tokenizer: Tokenizer, prompt: str, weights: bool = True) -> TokenisedPrompt:
    """Each run of equal weight is tokenised by itself; without `weights` brackets are plain text."""
    out = TokenisedPrompt([], [], [], [])
    for i, (text, weight) in enumerate(parse_weights(prompt) if weights else [(prompt, 1.0)]):
        cleaned, pieces = tokenizer.pieces(text)
        out.runs.append(cleaned)
        for start, ids in pieces:
            out.ids.extend(ids)
            out.weights.extend([weight] * len(ids))
            out.rest.extend([(i, start)] * len(ids))
    return out


def apply_weights(z: Tensor, weights: Tensor) -> Tensor:
    """Scales each token's embedding, then the whole row so that its mean is what it was.

    Args:
        z: [B, L, D].
        weights: [B, L]. A row of ones comes back unchanged.
    """
    scaled = z.float() * weights[..., None].float()
    before, after = (t.mean(dim=(1, 2), keepdim=True) for t in (z.float(), scaled))
    # a mean of zero cannot be restored: such a row is only scaled
    return (scaled * torch.where(after == 0, 1.0, before / after)).to(z.dtype)


class TextEmbedder(nn.Module, ABC):
    """Base of the embedders that read text.

    The vocabulary is read when the first text arrives: building and loading a model needs no tokenizer file.
    """

    output_keys: tuple[str, ...] = ("crossattn",)  # where GeneralConditioner puts each output
    per_token = True  # False: one vector per text, for which chunks and weights mean nothing
    n_layers = 1  # layers that are run when clip_skip is 1: the largest clip_skip

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: Tokenizer | None = None

    @abstractmethod
    def make_tokenizer(self) -> Tokenizer:
        """A new tokenizer; raises UserError if its vocabulary is missing."""

    @abstractmethod
    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor | tuple[Tensor, Tensor]:
        """[B, L] int64 -> [B, L, D], or that and a pooled [B, D']."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Made on first use."""
        if self._tokenizer is None:
            self._tokenizer = self.make_tokenizer()
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Texts, or tokens [B, L] int64, -> what `embed` returns. Brackets are text; what does not fit is cut."""
        tokens = text if isinstance(text, Tensor) else self.tokenizer(text)
        return self.embed(tokens.to(self.device))

    def encode(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        clip_skip: int = 1,
        long_prompt: bool = False,
        weights: bool = True,
        min_chunks: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts -> [B, L, D] (and pooled [B, D'] where forward gives it, from the first chunk).

        Args:
            prompts: texts; a negative prompt is just another one. Tokens [B, L] go straight to `forward`, and so do the
                texts of an embedder that gives one vector per text.
            clip_skip: 1 = the layer that the model was trained with, 2 = one before it, ...; the final norm is applied
                where it is applied for 1.
            long_prompt: encode in chunks of L - 2 tokens and join the outputs, [B, n L, D]; n is that of the longest
                prompt, the others get empty chunks. Otherwise what does not fit is cut, and a warning says which words.
            weights: read `(word:1.3)`; False = brackets are text.
            min_chunks: at least so many chunks, for a prompt whose partner (see `chunk_count`) is longer.

        Raises:
            ValueError: clip_skip out of range.
        """
        if not self.per_token and (clip_skip != 1 or long_prompt):
            raise ValueError(f"{type(self).__name__} gives one vector per text: clip_skip and long_prompt do not apply")
        if isinstance(prompts, Tensor) or not self.per_token:
            return self.encode_whole(prompts)
        if not 1 <= clip_skip <= max(1, self.n_layers):
            raise ValueError(f"got clip_skip {clip_skip}, expected 1..{max(1, self.n_layers)}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}  # a batch often repeats one prompt
        tokenised = [tokenise(self.tokenizer, p, weights) for p in index]
        n = max([self._chunks(t) for t in tokenised] + [min_chunks]) if long_prompt else 1
        z, *pooled = self._embed_rows([row for t in tokenised for row in self._rows(t, n)], clip_skip)
        order = [index[p] for p in prompts]
        z = z.reshape(len(tokenised), -1, z.shape[-1])[order]
        return (z, pooled[0][::n][order]) if pooled else z

    def encode_whole(self, text: str | Sequence[str] | Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """`encode` without options."""
        return self(text)

    def _embed_rows(self, rows: list[tuple[list[int], list[float]]], clip_skip: int) -> tuple[Tensor, ...]:
        """Rows of (ids, weights) -> what `embed` returns, weighted, as a tuple."""
        scale = torch.tensor([r[1] for r in rows])
        out = self.embed(torch.tensor([r[0] for r in rows]).to(self.device), clip_skip)
        z, *pooled = out if isinstance(out, tuple) else (out,)
        if any(w != 1 for row in rows for w in row[1]):
            z = apply_weights(z, scale.to(z.device))
        return (z, *pooled)

    def _chunks(self, prompt: TokenisedPrompt) -> int:
        return max(1, -(-len(prompt.ids) // (self.tokenizer.max_length - 2)))

    def _rows(self, prompt: TokenisedPrompt, n: int) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of the first n chunks, each with start, end and padding; warns of what is left over."""
        room = self.tokenizer.max_length - 2
        if cut := prompt.words_after(n * room):
            log.warning("the prompt is longer than %d tokens; cut: %s", n * room, " ".join(cut))
        rows = []
        for i in range(0, n * room, room):
            w = prompt.weights[i : i + room]
            rows.append((self.tokenizer.row(prompt.ids[i : i + room]), [1.0, *w, *[1.0] * (room + 1 - len(w))]))
        return rows

    def chunk_count(self, prompts: Sequence[str], weights: bool = True) -> int:
        """Chunks that `encode(prompts, long_prompt=True)` uses: guidance needs as many on both sides."""
        return max(self._chunks(tokenise(self.tokenizer, p, weights)) for p in prompts)

    def truncated_words(self, prompt: str, weights: bool = True) -> list[str]:
        """Words of the prompt that `encode` cuts without `long_prompt`; [] if all fit."""
        return tokenise(self.tokenizer, prompt, weights).words_after(self.tokenizer.max_length - 2)
