"""Byte-pair encoding learned from the user's captions (Sennrich et al. 2016), on bytes, so that no text is unknown."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.modules.tokenizer import byte_symbols
from ldm.util import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256


class BytePairs(nn.Module):
    """A vocabulary of bytes and merged pairs. The pairs are a buffer: a checkpoint needs no other file.

    Attributes:
        merges: int32 [vocab_size - 256, 2]: token 256 + i stands for these two; -1 where there are none.
        seen: bool [vocab_size]: tokens of the captions that it was learned from.

    Args:
        vocab_size: tokens at most.
        file: a tokenizer.json of the `tokenizers` package (byte-level BPE) to take the pairs from.

    Raises:
        ValueError: no room for the bytes.
        UserError: the file cannot be read or is of another kind.
    """

    merges: Tensor
    seen: Tensor

    def __init__(self, vocab_size: int, file: str | None = None) -> None:
        super().__init__()
        if vocab_size < BYTES:
            raise ValueError(f"vocab_size: got {vocab_size}, expected at least {BYTES} (one token per byte)")
        self.vocab_size = vocab_size
        self.register_buffer("merges", torch.full((vocab_size - BYTES, 2), -1, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(vocab_size, dtype=torch.bool))
        self._tokenizer: tuple[tuple[int, int], Tokenizer] | None = None
        if file is not None:
            self.read(file)

    @property
    def learned(self) -> bool:
        """Whether there are pairs, or captions were seen."""
        return bool(self.seen.any())

    # --- learning -----------------------------------------------------------------------------------------------------

    def learn(self, texts: Iterable[str]) -> None:
        """Takes the most frequent pairs of `texts`.

        Raises:
            UserError: the texts are all empty.
        """
        from tokenizers import models, trainers

        texts = [clean(t) for t in texts]
        if not any(texts):
            raise UserError("the captions are all empty: there is nothing to learn the text tokens from")
        tokenizer = _tokenizer(models.BPE())
        alphabet = sorted(byte_symbols())
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        self._take(json.loads(tokenizer.to_str()), "the captions")
        used = {i for text in set(texts) for i in self.encode(text)}
        self.seen.zero_()
        self.seen[torch.tensor(sorted(used), device=self.seen.device)] = True

    def read(self, file: str | Path) -> None:
        """Takes the pairs of a tokenizer.json; all its tokens count as seen."""
        try:
            content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"the tokenizer file {file} cannot be read: {e}") from e
        self._take(content, str(file))
        self.seen[: BYTES + int((self.merges[:, 0] >= 0).sum())] = True

    def _take(self, content: dict, source: str) -> None:
        model = content.get("model") or {}
        if model.get("type") != "BPE" or "merges" not in model:
            raise UserError(f"{source} holds no byte-pair encoding (model.type: {model.get('type')!r})")
        ids = {symbol: i for i, symbol in enumerate(byte_symbols())}
        rows: list[tuple[int, int]] = []
        for merge in model["merges"][: len(self.merges)]:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            if a not in ids or b not in ids:
                raise UserError(f"{source} does not work on bytes: it merges {a!r} and {b!r}")
            rows.append((ids[a], ids[b]))
            ids.setdefault(a + b, BYTES + len(rows) - 1)
        self.merges.fill_(-1)
        if rows:
            self.merges[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        self._tokenizer = None

    # --- text <-> tokens ----------------------------------------------------------------------------------------------

    def _symbols(self) -> list[str]:
        symbols = list(byte_symbols())
        for a, b in self.merges.tolist():
            if a < 0:
                break
            symbols.append(symbols[a] + symbols[b])
        return symbols

    @property
    def tokenizer(self) -> Tokenizer:
        """The same as an object of the `tokenizers` package; made again when other weights were loaded."""
        version = id(self.merges), self.merges._version
        if self._tokenizer is None or self._tokenizer[0] != version:
            from tokenizers import models

            symbols = self._symbols()
            pairs = [(symbols[a], symbols[b]) for a, b in self.merges.tolist() if a >= 0]
            vocabulary = {s: i for i, s in reversed(list(enumerate(symbols)))}
            self._tokenizer = version, _tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        return self._tokenizer[1]

    def encode(self, text: str) -> list[int]:
        """Text -> token ids, without special ones."""
        return self.tokenizer.encode(clean(text)).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text; bytes that make no letter become the replacement sign."""
        symbols, numbers = self._symbols(), {s: i for i, s in enumerate(byte_symbols())}
        data = bytes(numbers[c] for i in ids if 0 <= i < len(symbols) for c in symbols[i])
        return data.decode("utf-8", errors="replace").strip()

    def unseen(self, text: str) -> list[str]:
        """Characters of the text that the captions had no token for."""
        known = self.seen.tolist()
        return [c for c in dict.fromkeys(clean(text)) if not c.isspace() and not self._known(c, known)]

    def _known(self, character: str, known: list[bool]) -> bool:
        """Whether any seen token holds all bytes of the character."""
        numbers = byte_symbols()
        spelled = "".join(numbers[b] for b in character.encode())
        return any(k and spelled in s for k, s in zip(known, self._symbols(), strict=False))


def clean(text: str) -> str:
    """Lower case, composed characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _tokenizer(model: object) -> Tokenizer:
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer
