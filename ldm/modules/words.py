"""A text encoder for small vocabularies: whole words, and a transformer that is trained with the image model."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import Tensor, nn

from ldm.modules.classifiers.transformer import EncoderLayer
from ldm.modules.prompts import TextEmbedder
from ldm.modules.tokenizer import Piece, Tokenizer
from ldm.util import words_of

PAD, START, END, UNKNOWN = range(4)
SPECIAL = 4  # ids before the words


class WordTokenizer(Tokenizer):
    """A word is a token; a word that is not in the vocabulary is the token `unknown`.

    Args:
        words: the vocabulary; its order decides the ids.
        max_length: tokens of a row, start and end included.
    """

    start_id, end_id, pad_id = START, END, PAD

    def __init__(self, words: Sequence[str], max_length: int) -> None:
        self.max_length = max_length
        self._ids = {word: SPECIAL + i for i, word in enumerate(words)}

    def pieces(self, text: str) -> tuple[str, list[Piece]]:
        found, at = [], 0
        words = words_of(text)
        for word in words:
            found.append(Piece(at, [self._ids.get(word, UNKNOWN)]))
            at += len(word) + 1
        return " ".join(words), found

    def unknown(self, text: str) -> dict[str, list[str]]:
        """The words of a text that are not in the vocabulary, each with the most similar ones that are."""
        strange = dict.fromkeys(w for w in words_of(text) if w not in self._ids)
        return {w: get_close_matches(w, self._ids, n=3, cutoff=0.7) for w in strange}


class WordEmbedder(TextEmbedder):
    """Words through a small transformer encoder: texts -> [B, max_length, dim].

    The first token's output stands for the whole text. Trained with the diffusion model (`cond_stage_trainable`).

    Args:
        words: the vocabulary, as a list or with spaces between; `auto` in a config = that of the training captions.
        dim: width.
        depth: layers.
        heads: of the attention.
        max_length: tokens of a row, start and end included; longer texts are cut, and it is said which words.
        dropout: in training.
    """

    def __init__(
        self,
        words: Sequence[str] | str,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if words == "auto":
            raise ValueError("words: got auto, but the data set has no captions; expected a list of words")
        self.words = words.split() if isinstance(words, str) else list(words)
        self.max_length = max_length
        self.token = nn.Embedding(SPECIAL + len(self.words), dim)
        self.position = nn.Embedding(max_length, dim)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, 4 * dim, dropout, activation="gelu", norm_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02 if table is self.position else 1.0)

    def make_tokenizer(self) -> WordTokenizer:
        return WordTokenizer(self.words, self.max_length)

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """[B, L] int64 -> [B, L, dim]."""
        keep = (tokens != PAD)[:, None, None]
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, keep)
        return self.norm(x)

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """The words of a prompt that the model never saw, each with the most similar ones that it did see."""
        return self.tokenizer.unknown(prompt)
