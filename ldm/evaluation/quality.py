"""What is seen in drawn pictures: the class asked for, sharpness, copies of training images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm import generate
from ldm.evaluation.pictures import Pictures
from ldm.evaluation.store import write_csv
from ldm.util import UserError, image_grid

COPY = 1 / 3  # a copy is nearer than a third of the distance to the second nearest (Yoon et al. 2023, section 3)
HELD = 2**24  # numbers of drawn pictures that are compared with the training images at once: 64 MiB
SHOWN = 24  # pairs in the picture
COLUMNS = ("picture", "nearest", "nearest_picture", "distance", "second_distance")  # of the list of pairs


def class_agreement(logits: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """How often a classifier reads the class that was asked for.

    Args:
        logits: [N, K].
        asked: class of each picture, int64 [N].

    Returns:
        {"class_agreement": share in [0, 1], "per_class": share of each class, None where none was asked for}.
    """
    right = np.argmax(logits, 1) == asked
    classes = range(logits.shape[1])
    per_class = [float(right[asked == c].mean()) if (asked == c).any() else None for c in classes]
    return {"class_agreement": float(right.mean()), "per_class": per_class}


def class_balance(logits: np.ndarray, shares: np.ndarray) -> dict[str, Any]:
    """Which classes a classifier reads in the pictures, and how far that is from the data's.

    Args:
        logits: [N, K].
        shares: of the classes in the data, [K].

    Returns:
        {"classes_read": share of each class, "class_distance": half the sum of differences, 0 to 1}.
    """
    read = np.bincount(np.argmax(logits, 1), minlength=logits.shape[1]) / len(logits)
    return {"classes_read": read.tolist(), "class_distance": float(np.abs(read - shares).sum() / 2)}


def sharpness(pictures: Pictures, size: int = 256) -> float:
    """Mean absolute difference of neighbouring pixels, in grey levels."""
    total, count = 0.0, 0
    for batch in pictures.batches(size):
        x = batch.float()
        total += float(x.diff(dim=2).abs().mean((1, 2, 3)).sum() + x.diff(dim=3).abs().mean((1, 2, 3)).sum()) / 2
        count += len(x)
    return total / count


# --- memorisation -----------------------------------------------------------------------------------------------------


def nearest(drawn: Pictures, real: Pictures) -> tuple[Tensor, Tensor]:
    """For each drawn picture the two nearest real ones, by root mean squared pixel difference.

    Drawn pictures are held `HELD` numbers at a time; the real ones are read once for each such block.

    Returns:
        (distances [n, 2] in grey levels, indices int64 [n, 2]).
    """
    if len(real) < 2:
        raise UserError(f"the nearest two training images need at least 2, got {len(real)}")
    rows, n = max(1, HELD // (drawn.channels * math.prod(drawn.size))), len(drawn)
    found = []
    for start in tqdm(range(0, n, rows), desc="nearest training pictures", unit="block", leave=False):
        part = range(start, min(start + rows, n))
        x = torch.cat([drawn.get(part[i : i + 256]) for i in range(0, len(part), 256)]).float().flatten(1)
        found.append(_nearest_of_block(x, real))
    distances, where = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, where


def _nearest_of_block(x: Tensor, real: Pictures) -> tuple[Tensor, Tensor]:
    """The same of a block of drawn pictures [B, D]."""
    best, where, start = x.new_full((len(x), 2), float("inf")), torch.zeros(len(x), 2, dtype=torch.long), 0
    for batch in real.batches():
        d = torch.cat([best, torch.cdist(x, batch.float().flatten(1))], 1)
        index = torch.cat([where, torch.arange(start, start + len(batch)).expand(len(x), -1)], 1)
        best, order = d.topk(2, largest=False)
        where = index.gather(1, order)
        start += len(batch)
    return best / x.shape[1] ** 0.5, where


def memorisation(drawn: Pictures, real: Pictures, picture: Path) -> dict[str, Any]:
    """Share of copies among the drawn pictures.

    Writes every drawn picture with its nearest real one as a list beside `picture` (the same name, .csv), the smallest
    distance first; `picture` shows the first `SHOWN` of it, in pairs.

    Returns:
        {"copies": share, "nearest_distance": median in grey levels, "nearest_compared": drawn pictures,
        "nearest_picture": path, "nearest_list": path}.
    """
    distances, where = nearest(drawn, real)
    ratio = distances[:, 0] / distances[:, 1].clamp_min(1e-6)
    order, table = distances[:, 0].argsort(stable=True).tolist(), picture.with_suffix(".csv")
    rows = [(drawn.name(i), int(where[i, 0]), real.name(int(where[i, 0])), *_rounded(distances[i])) for i in order]
    write_csv(table, COLUMNS, rows)
    pairs = [p for i in order[:SHOWN] for p in (drawn.get([i])[0], real.get([int(where[i, 0])])[0])]
    grid = image_grid(torch.stack(pairs).float() / 127.5 - 1, nrow=12)
    said = f"drawn, nearest real; the {len(order[:SHOWN])} of the smallest distance of {len(drawn)}"
    generate.save_png(generate.pictures(grid[None], str(picture))[0], picture, {"pairs": said, "all": table.name})
    return {
        "copies": float((ratio < COPY).float().mean()),
        "nearest_distance": float(distances[:, 0].median()),
        "nearest_compared": len(drawn),
        "nearest_picture": str(picture),
        "nearest_list": str(table),
    }


def _rounded(distances: Tensor) -> list[float]:
    return [round(d, 4) for d in distances.tolist()]
