"""Text to token ids, offline: CLIP's byte-pair encoding (Sennrich et al. 2016) and BERT's WordPiece."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ldm.util import UserError

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BERT_FILE = "models/bert-base-uncased/vocab.txt"
HUB_NAMES = ("bert-base-uncased", "google-bert--bert-base-uncased")  # before and after the hub's renaming
N_MERGES = 49152 - 256 - 2  # the file holds more lines than CLIP was trained with
CACHE_LIMIT = 200_000


class Piece(NamedTuple):
    """One word (or word part) of a text: where it begins in the cleaned text, and its token ids."""

    start: int
    ids: list[int]


class Tokenizer(ABC):
    """What the text embedders ask of a vocabulary.

    Attributes:
        max_length: tokens of one row, start and end included.
        start_id, end_id, pad_id: the special tokens.
    """

    max_length: int
    start_id: int
    end_id: int
    pad_id: int

    @abstractmethod
    def pieces(self, text: str) -> tuple[str, list[Piece]]:
        """Text -> the cleaned text and its pieces in order, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Text -> token ids of any number, without special tokens."""
        return [i for piece in self.pieces(text)[1] for i in piece.ids]

    def row(self, ids: Sequence[int]) -> list[int]:
        """At most max_length - 2 ids -> one row of max_length: start, ids, end, padding."""
        row = [self.start_id, *ids, self.end_id]
        return row + [self.pad_id] * (self.max_length - len(row))

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 [len(texts), max_length]; what does not fit is cut."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([self.row(self.encode(t)[: self.max_length - 2]) for t in texts], dtype=torch.int64)

    def truncated_words(self, text: str) -> list[str]:
        """Words of the cleaned text that do not fit (wholly or in part) into max_length tokens."""
        cleaned, pieces = self.pieces(text)
        room = self.max_length - 2
        for piece in pieces:
            room -= len(piece.ids)
            if room < 0:
                return cleaned[piece.start :].split()
        return []


# --- CLIP -------------------------------------------------------------------------------------------------------------


def find_bpe_file(path: str | None = None) -> Path:
    """CLIP's merge list: `path`, or the copy in the open_clip_torch (or OpenAI's clip) package, found without import.

    Raises:
        UserError: not there.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"vocab_path {path} does not exist: expected CLIP's {BPE_FILE}")
        return Path(path)
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (file := Path(folder) / BPE_FILE).is_file():
                return file
    raise UserError(f"CLIP's vocabulary was not found: pip install open_clip_torch, or give vocab_path ({BPE_FILE})")


def byte_symbols() -> list[str]:
    """One printable character per byte: itself where it has a shape in Latin-1, else the next one from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    table = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


@functools.lru_cache(maxsize=4)
def _read_merges(path: Path) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """(symbol -> id, pair -> rank). Ids in this order: bytes, bytes that end a word, merges, start and end of text."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : N_MERGES + 1]
        merges = [(a, b) for a, b in (line.split() for line in lines)]
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path} is not CLIP's {BPE_FILE}: {e}") from e
    if len(merges) != N_MERGES:
        raise UserError(f"{path} is not CLIP's {BPE_FILE}: {len(merges)} merges, expected {N_MERGES}")
    letters = sorted(byte_symbols(), key=lambda c: (ord(c) >= 256, ord(c)))
    symbols = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    symbols += [CLIPTokenizer.START, CLIPTokenizer.END]
    return {s: i for i, s in enumerate(symbols)}, {pair: i for i, pair in enumerate(merges)}


def clean(text: str) -> str:
    """Repairs mis-decoded text, resolves HTML entities twice, joins white space, lower case."""
    try:
        import ftfy
    except ModuleNotFoundError as e:
        raise UserError("CLIP's tokenizer needs ftfy: pip install ftfy regex") from e
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding; the same ids as OpenCLIP's tokenizer.

    Args:
        vocab_path: merge list (.txt.gz); None = the one that open_clip_torch ships.
        pad: "end" repeats the end-of-text token (OpenAI's CLIP in SD v1), "zero" fills with id 0 (OpenCLIP).
        max_length: tokens of one row.

    Raises:
        UserError: no vocabulary, or ftfy / regex are missing.
    """

    START, END = "<start_of_text>", "<end_of_text>"

    def __init__(self, vocab_path: str | None = None, pad: str = "end", max_length: int = 77) -> None:
        if pad not in ("end", "zero"):
            raise ValueError(f"got pad {pad!r}, expected end or zero")
        try:
            import regex
        except ModuleNotFoundError as e:
            raise UserError("CLIP's tokenizer needs regex: pip install ftfy regex") from e
        self.ids, self.ranks = _read_merges(find_bpe_file(vocab_path))
        self.max_length = max_length
        self.start_id, self.end_id = self.ids[self.START], self.ids[self.END]
        self.pad_id = self.end_id if pad == "end" else 0
        self._bytes = byte_symbols()
        # Contractions, runs of letters, single digits, runs of anything else but white space.
        words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self._split = regex.compile(f"{self.START}|{self.END}|{words}", regex.IGNORECASE)
        self._cache: dict[str, list[int]] = {self.START: [self.start_id], self.END: [self.end_id]}

    def pieces(self, text: str) -> tuple[str, list[Piece]]:
        text = clean(text)
        return text, [Piece(m.start(), self._word(m.group())) for m in self._split.finditer(text)]

    def _word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = self._merge(word)
            if len(self._cache) < CACHE_LIMIT:
                self._cache[word] = ids
        return ids

    def _merge(self, word: str) -> list[int]:
        """Joins the pair of neighbours that was learned first, everywhere in the word, until none is left."""
        parts = [self._bytes[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, pair = min((self.ranks.get(p, len(self.ranks)), p) for p in zip(parts, parts[1:], strict=False))
            if rank == len(self.ranks):
                break
            merged, i = [], 0
            while i < len(parts):
                hit = tuple(parts[i : i + 2]) == pair
                merged.append(pair[0] + pair[1] if hit else parts[i])
                i += 1 + hit
            parts = merged
        return [self.ids[p] for p in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text; special tokens come out as their names, broken characters as U+FFFD."""
        symbols, values = list(self.ids), {c: b for b, c in enumerate(self._bytes)}
        text = "".join(symbols[i] for i in ids)
        raw = bytes(values[c] for c in text)
        return raw.decode("utf-8", errors="replace").replace("</w>", " ")


# --- BERT -------------------------------------------------------------------------------------------------------------


def find_bert_file(path: str | None = None) -> Path:
    """bert-base-uncased's vocab.txt: `path`, else models/bert-base-uncased/ here or in the project, else the hub cache.

    Raises:
        UserError: not there.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"vocab_path {path} does not exist: expected the vocab.txt of bert-base-uncased")
        return Path(path)
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    cached = [f for name in HUB_NAMES for f in sorted(hub.glob(f"models--{name}/snapshots/*/vocab.txt"))]
    for file in (Path(BERT_FILE), Path(__file__).parents[2] / BERT_FILE, *cached):
        if file.is_file():
            return file
    raise UserError(
        f"BERT's vocabulary was not found: put the vocab.txt of bert-base-uncased (30522 lines) at {BERT_FILE}, "
        "or give vocab_path"
    )


class WordPieceTokenizer(Tokenizer):
    """WordPiece of bert-base-uncased (Devlin et al. 2019): lower case, accents off, [CLS] text [SEP] [PAD]...

    Args:
        vocab_path: vocab.txt, one token a line; None = see `find_bert_file`.
        max_length: tokens of one row.

    Raises:
        UserError: no vocabulary, or the tokenizers package is missing.
    """

    def __init__(self, vocab_path: str | None = None, max_length: int = 77) -> None:
        file = find_bert_file(vocab_path)
        try:
            from tokenizers import BertWordPieceTokenizer
        except ModuleNotFoundError as e:
            raise UserError("BERT's tokenizer needs tokenizers: pip install tokenizers") from e
        lines = set(file.read_text(encoding="utf-8").splitlines())
        if missing := [t for t in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if t not in lines]:
            raise UserError(f"{file} is not a BERT vocabulary: no line {missing[0]}")
        self.max_length = max_length
        self._model: BertWordPieceTokenizer = BertWordPieceTokenizer(str(file), lowercase=True)
        self.start_id, self.end_id, self.pad_id = (self._model.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]"))

    def pieces(self, text: str) -> tuple[str, list[Piece]]:
        out = self._model.encode(text, add_special_tokens=False)
        found: list[Piece] = []
        previous = None
        for i, (start, _), word in zip(out.ids, out.offsets, out.word_ids, strict=True):
            if word is None or word != previous:
                found.append(Piece(start, []))
            found[-1].ids.append(i)
            previous = word
        return text, found
