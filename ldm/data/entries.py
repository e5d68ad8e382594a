"""Which pictures of a folder belong to a split, and what label and captions each has."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ldm.data.pixels import EXTENSIONS
from ldm.data.sources import Source
from ldm.util import UserError

log = logging.getLogger(__name__)

LAYOUT = """expected one of
  ROOT/*.jpg                                  a flat folder
  ROOT/<class>/*.jpg                          one sub-folder per class
  ROOT/0001.jpg + ROOT/0001.txt               captions in text files of the same name
  ROOT/metadata.jsonl or metadata.csv         lines with file_name and text (or caption, or label)
and, if you wish, each of them inside ROOT/train and ROOT/val; ROOT may be a .zip"""
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
SPLITS = ("train", "validation", "test", "all")
METADATA = ("metadata.jsonl", "metadata.csv")
# Names that look like one of METADATA and would otherwise lose somebody's captions without a word.
METADATA_LIKE = re.compile(
    r"^(meta[-_ ]?data|captions?)(?![a-z]).*\.(json\w*|csv|tsv|txt|parquet|xlsx?|ya?ml)$", re.IGNORECASE
)
NOT_CAPTIONS = re.compile(
    r"^(readme|licen[cs]e|notice|credits|classes|labels|filelist|train|val|validation|test)", re.IGNORECASE
)
TEXT_KEYS = ("text", "caption", "captions", "prompt")
LABEL_KEYS = ("label", "class_label", "class")


class NoSplitError(UserError):
    """The folder has no such part."""


@dataclass
class Entries:
    """The pictures of one split.

    Attributes:
        names: file names inside the source.
        labels: int64 [N].
        class_names: one per label.
        captions: the captions of each picture (at least one; "" where it has none), or None if nothing has any.
        empty: class folders without a picture, which are no class.
    """

    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    captions: list[list[str]] | None = None
    empty: list[str] = field(default_factory=list)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Entries:
        """The entries with these positions."""
        captions = None if self.captions is None else [self.captions[i] for i in chosen]
        return Entries([self.names[i] for i in chosen], self.labels[chosen], self.class_names, captions, self.empty)


def suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def find_entries(
    source: Source, captions: str = "auto", labels: str = "auto"
) -> tuple[Entries, dict[str, list[int]] | None]:
    """All pictures of a source, and the positions of each split if it has split folders.

    Raises:
        UserError: no pictures, captions or metadata lines without a picture, mixed layouts, unreadable metadata.
    """
    for name, value, known in (
        ("captions", captions, ("auto", "none")),
        ("labels", labels, ("auto", "folder", "none")),
    ):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    images = [n for n in source.names if suffix(n) in EXTENSIONS]
    if not images:
        raise UserError(_nothing_found(source))
    tops = {n.partition("/")[0].lower() if "/" in n else "" for n in images}
    in_splits = "" not in tops and tops <= set(SPLIT_FOLDERS) and any(SPLIT_FOLDERS[t] == "train" for t in tops)
    depth = 1 if in_splits else 0
    table = {} if captions == "none" and labels == "none" else _read_metadata(source, depth)
    if table:
        images = _listed(source, images, table)
    class_names, label_array = _labels(source, images, table, depth, labels)
    texts = None if captions == "none" else _captions(source, images, table)
    empty = [] if labels == "none" else _empty_classes(source, images, depth, class_names)
    entries = Entries(images, label_array, class_names, texts, empty)
    if not in_splits:
        return entries, None
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for i, n in enumerate(images):
        parts[SPLIT_FOLDERS[n.partition("/")[0].lower()]].append(i)
    _compare_classes(entries, parts, source.where(""))
    return entries, parts


def _nothing_found(source: Source) -> str:
    others = [n for n in source.names if suffix(n) not in EXTENSIONS]
    seen = f"it holds {len(others)} other files, e.g. {others[0]}" if others else "it is empty"
    pattern = " ".join(f"*{e}" for e in sorted(EXTENSIONS))
    return f"no images in {source.where('')}: {seen}; looked for {pattern}\n{LAYOUT}"


# --- metadata ---------------------------------------------------------------------------------------------------------


def _read_metadata(source: Source, depth: int) -> dict[str, dict[str, Any]]:
    """{image name: row} of every metadata file at the top, or at the top of a split folder."""
    table: dict[str, dict[str, Any]] = {}
    near = [n for n in source.names if n.count("/") <= depth and suffix(n) not in EXTENSIONS]
    files = [n for n in near if n.rpartition("/")[2] in METADATA]
    lookalike = next((n for n in near if METADATA_LIKE.match(n.rpartition("/")[2])), None)
    if lookalike and not files:
        raise UserError(
            f"{source.where(lookalike)} is not read: captions and labels come from a file named exactly "
            f"{' or '.join(METADATA)}; rename it, or set captions: none and labels: none"
        )
    for name in files:
        folder = name.rpartition("/")[0]
        for line, row in _rows(source, name):
            image = "/".join(filter(None, (folder, _file_name(source, name, line, row))))
            where = f"{source.where(name)} line {line}"
            if image in table and not table[image]["_where"].startswith(source.where(name)):
                raise UserError(f"{where} and {table[image]['_where']} both describe {image}: keep one metadata file")
            table[image] = {**row, "_where": where}
    return table


def _rows(source: Source, name: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = source.read(name).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{source.where(name)} cannot be read as UTF-8 text: {e}") from e
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{source.where(name)} line {number} is not JSON ({e.msg}): {line[:80]!r}") from e
        if not isinstance(row, dict):
            raise UserError(f"{source.where(name)} line {number} must be an object with file_name: {line[:80]!r}")
        yield number, row


def _file_name(source: Source, name: str, line: int, row: dict[str, Any]) -> str:
    value = row.get("file_name")
    if not isinstance(value, str) or not value:
        keys = ", ".join(map(str, row))
        raise UserError(f"{source.where(name)} line {line} has no file_name (it has: {keys})")
    return str(PurePosixPath(value.replace("\\", "/")))


def _listed(source: Source, images: list[str], table: dict[str, dict[str, Any]]) -> list[str]:
    """The images that the metadata names; every line must have its file."""
    there = set(images)
    missing = [(n, row["_where"]) for n, row in table.items() if n not in there]
    if missing:
        first = "; ".join(f"{where} names {n}" for n, where in missing[:3])
        raise UserError(
            f"{len(missing)} metadata line{'s' * (len(missing) > 1)} without a file: {first}. file_name is the path "
            f"from the metadata file's folder, with its extension"
        )
    unlisted = len(there) - len(table)
    if unlisted:
        log.warning(
            "%d of %d images in %s have no metadata line and are left out", unlisted, len(there), source.where("")
        )
    return sorted(table)


def _first(row: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((row[k] for k in keys if row.get(k) not in (None, "")), None)


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(
    source: Source, images: list[str], table: dict[str, dict[str, Any]], depth: int, how: str
) -> tuple[list[str], np.ndarray]:
    """Class names and int64 [N]: from the metadata's label column, else from the sub-folders, else one class."""
    given = [_first(table[n], LABEL_KEYS) if table else None for n in images]
    if how == "auto" and any(g is not None for g in given):
        return _labels_given(images, table, given)
    folders = [n.split("/")[depth] if n.count("/") > depth else "" for n in images]
    loose = next((n for n, f in zip(images, folders, strict=True) if not f), None)
    if how == "none" or not any(folders) or (loose and table and how == "auto"):
        return [PurePosixPath(source.where("").replace("\\", "/")).stem or "all"], np.zeros(len(images), np.int64)
    if loose:
        raise UserError(
            f"{source.where('')} holds images both beside and inside sub-folders (e.g. {loose}): put each into "
            "a class sub-folder, or set labels: none (all are one class)"
        )
    names = sorted(set(folders))
    index = {c: i for i, c in enumerate(names)}
    return names, np.array([index[f] for f in folders], np.int64)


def _labels_given(
    images: list[str], table: dict[str, dict[str, Any]], given: list[Any]
) -> tuple[list[str], np.ndarray]:
    """Numbers are taken as they are, words become numbers in sorted order."""
    for n, g in zip(images, given, strict=True):
        if g is None:
            raise UserError(f"{table[n]['_where']} has no label, but other lines have one")
    words = [str(g) for g in given]
    if all(re.fullmatch(r"-?\d+", w) for w in words):
        numbers = np.array([int(w) for w in words], np.int64)
        low = int(numbers.argmin())
        if numbers[low] < 0:
            raise UserError(f"{table[images[low]]['_where']}: label {numbers[low]} is below 0")
        return [str(i) for i in range(int(numbers.max()) + 1)], numbers
    names = sorted(set(words))
    index = {c: i for i, c in enumerate(names)}
    return names, np.array([index[w] for w in words], np.int64)


def _empty_classes(source: Source, images: list[str], depth: int, class_names: list[str]) -> list[str]:
    """Folders without a picture beside class folders, where no split has a picture of that class."""
    filled = {tuple(n.split("/")[: depth + 1]) for n in images if n.count("/") > depth}
    parents = {f[:-1] for f in filled if f[-1] in class_names}
    folders = {tuple(f.split("/")) for f in getattr(source, "folders", list)()}
    empty = (
        "/".join(f) for f in folders - filled if len(f) == depth + 1 and f[:-1] in parents and f[-1] not in class_names
    )
    return [source.where(f) for f in sorted(empty)]


def _say_empty_classes(entries: Entries, split: str) -> None:
    """Warns of them once, not for every split."""
    if entries.empty and split in ("all", "train"):
        shown = ", ".join(entries.empty[:5])
        log.warning(
            "no pictures in the class folder%s %s: not counted as a class", "s" * (len(entries.empty) > 1), shown
        )


def _compare_classes(entries: Entries, parts: dict[str, list[int]], where: str) -> None:
    """The classes of the split folders must be those of train/.

    Raises:
        UserError: a class that validates or tests, but of which there is nothing to learn from.
    """
    classes = {split: set(entries.labels[members].tolist()) for split, members in parts.items() if members}
    for split, found in classes.items():
        extra = [entries.class_names[c] for c in sorted(found - classes["train"])]
        if extra:
            raise UserError(
                f"{where}: the class folders differ: {', '.join(extra[:5])} in {split} but not in train (train has "
                f"{', '.join(entries.class_names[c] for c in sorted(classes['train']))[:200]}); give both the same "
                "folders, or set labels: none if they are no classes"
            )
        lacking = [entries.class_names[c] for c in sorted(classes["train"] - found)]
        if lacking:
            log.warning("%s: no pictures of %s in %s", where, ", ".join(lacking[:5]), split)


def check_label_range(entries: Entries, num_classes: int | None, where: Callable[[str], str]) -> None:
    """Raises UserError for a label that a model of `num_classes` classes cannot take, naming the picture."""
    if num_classes is None or not len(entries.labels):
        return
    worst = int(entries.labels.argmax())
    label = int(entries.labels[worst])
    if label >= num_classes:
        raise UserError(
            f"label {label} ({entries.class_names[label]}) of {where(entries.names[worst])} is out of range: "
            f"num_classes is {num_classes}, so labels are 0 to {num_classes - 1}"
        )


# --- captions ---------------------------------------------------------------------------------------------------------


def _captions(source: Source, images: list[str], table: dict[str, dict[str, Any]]) -> list[list[str]] | None:
    """Captions from the metadata, else from text files of the same name, else None."""
    found = [_as_list(_first(table[n], TEXT_KEYS)) if table else [] for n in images]
    if not any(found):
        found = _sidecars(source, images, complete=not table)
    if not any(found):
        return None
    without = [n for n, c in zip(images, found, strict=True) if not c]
    if without:
        log.warning(
            "%d of %d images have no caption and get an empty one, e.g. %s",
            len(without),
            len(images),
            ", ".join(source.where(n) for n in without[:3]),
        )
    return [c or [""] for c in found]


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(v).strip() for v in values if v is not None and str(v).strip()]


def _sidecars(source: Source, images: list[str], complete: bool) -> list[list[str]]:
    """The lines of `x.txt` beside `x.jpg`: several lines are several captions of that image."""
    texts = {n[:-4]: n for n in source.names if n.lower().endswith(".txt")}
    stems = [str(PurePosixPath(n).with_suffix("")) for n in images]
    orphans = sorted(set(texts) - set(stems))
    orphans = [o for o in orphans if not NOT_CAPTIONS.match(o.rpartition("/")[2])]
    if complete and orphans:
        first = ", ".join(source.where(texts[o]) for o in orphans[:3])
        raise UserError(
            f"{len(orphans)} caption{'s' * (len(orphans) > 1)} without an image: {first}. A caption has its image's "
            "name with .txt instead of the extension; set captions: none if these are no captions"
        )
    found = []
    for stem in stems:
        if stem not in texts:
            found.append([])
            continue
        try:
            found.append(_as_list(source.read(texts[stem]).decode("utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{source.where(texts[stem])} cannot be read as UTF-8 text: {e}") from e
    return found


# --- splits -----------------------------------------------------------------------------------------------------------


def choose_split(
    entries: Entries, parts: dict[str, list[int]] | None, split: str, val_fraction: float = 0.1, how: str = "hash"
) -> Entries:
    """The part of the entries that belongs to `split`.

    Split folders decide where they exist; a missing validation folder, or none at all, cuts `val_fraction` off the
    training pictures: by a hash of the file name (a picture never changes sides when others are added), or the last of
    each class (`how="last"`).

    Raises:
        UserError: unknown split, or one that the folder does not have.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if how not in ("hash", "last"):
        raise UserError(f"split_by must be hash or last, got {how!r}")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be in [0, 1), got {val_fraction!r}")
    _say_empty_classes(entries, split)
    if split == "all":
        return entries
    if split == "test":
        if not parts or not parts["test"]:
            raise NoSplitError("there is no test set here: expected a sub-folder test/ beside train/")
        return entries.take(parts["test"])
    if parts and parts["validation"]:
        return entries.take(parts[split])
    pool = np.asarray(parts["train"] if parts else range(len(entries.names)), np.int64)
    held = _held_out(entries, pool, val_fraction, how)
    chosen = pool[held] if split == "validation" else pool[~held]
    if len(pool) == 1:
        log.warning("one image only: it trains and validates")
        chosen = pool
    if not len(chosen):
        raise NoSplitError(f"no images are left for {split}: val_fraction is {val_fraction} of {len(pool)} images")
    return entries.take(chosen)


def _held_out(entries: Entries, pool: np.ndarray, fraction: float, how: str) -> np.ndarray:
    """bool [len(pool)]: which pictures validate. At least one, and at least one is left, if there are two or more."""
    if how == "last":
        held = np.zeros(len(pool), bool)
        for c in np.unique(entries.labels[pool]):
            members = np.flatnonzero(entries.labels[pool] == c)
            held[members[len(members) - round(fraction * len(members)) :]] = True
        return held
    rank = np.array([_hash(entries.names[i]) for i in pool])
    held = rank < fraction
    if fraction > 0 and len(pool) > 1:
        held[rank.argmin()], held[rank.argmax()] = True, False
    return held


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48
