"""Features of a set of pictures, kept on disk under what decides them: nothing is computed twice."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.pictures import Pictures

BATCH = 256


class Features(NamedTuple):
    """features [N, D] and logits [N, K] (or None), memory-mapped float32 files."""

    features: np.ndarray
    logits: np.ndarray | None


def features_of(pictures: Pictures, network: FeatureNetwork, folder: str | Path, what: str = "features") -> Features:
    """The features of a set, from `folder` if they are there; else computed, from where an earlier try stopped.

    Args:
        what: shown at the progress bar.
    """
    own = {"pictures": pictures.sha256(), **network.about(), "torch": torch.__version__}
    own.pop("name")  # where a classifier lies changes nothing
    place = Path(folder) / hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    if not (place / "about.json").is_file():
        _compute(pictures, network, place, what)
        write_json(place / "about.json", own)
    logits = place / "logits.npy"
    return Features(_open(place / "features.npy"), _open(logits) if logits.is_file() else None)


def _open(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _compute(pictures: Pictures, network: FeatureNetwork, place: Path, what: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    done = place / "done"
    start = int(done.read_text()) if done.is_file() else 0
    files: dict[str, np.ndarray] = {}
    with tqdm(total=len(pictures), initial=start, desc=what, unit="picture", leave=False) as bar:
        for batch in pictures.batches(BATCH, start):
            for name, rows in zip(("features", "logits"), network(batch), strict=True):
                if rows is None:
                    continue
                if name not in files:
                    files[name] = _table(place / f"{name}.npy", (len(pictures), rows.shape[1]), start)
                files[name][start : start + len(batch)] = rows.numpy()
            start += len(batch)
            for table in files.values():
                table.flush()
            _write(done, str(start))
            bar.update(len(batch))


def _table(path: Path, shape: tuple[int, int], start: int) -> np.ndarray:
    """A new file, or the one that an earlier try left."""
    if start:
        return np.load(path, mmap_mode="r+")
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write the same file
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: str | Path, content: object) -> None:
    """Writes JSON; an interrupted one leaves no half file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(Path(path), json.dumps(content, indent=2) + "\n")


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table with a line of headings; an interrupted one leaves no half file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(Path(path), text.getvalue())
