"""From a trained classifier to answers about picture files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import generate
from ldm.data.base import to_float
from ldm.data.pixels import EXTENSIONS, UNREADABLE, Fit
from ldm.models.classifier import Classifier
from ldm.models.classifier_pictures import heat, labelled
from ldm.util import UserError, image_grid, suggest, to_pil

Row = dict[str, Any]


@dataclass
class Reader:
    """A classifier, and how pictures are brought into its form.

    Attributes:
        model: in evaluation mode, with the weights that are to be used.
        fit: size and channels of its pictures.
        names: of the classes.
        source: where it comes from, for people.
    """

    model: Classifier
    fit: Fit
    names: list[str]
    source: str

    def load(self, path: Path) -> Tensor:
        """A picture file -> [C, H, W] in [-1, 1], scaled to cover the size and cut in the centre.

        Raises:
            one of UNREADABLE.
        """
        return to_float(torch.from_numpy(self.fit(path.read_bytes()).copy())).permute(2, 0, 1)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, classes]."""
        return self.model.predict(x.to(self.model.device)).float().softmax(1).cpu()


# --- opening ----------------------------------------------------------------------------------------------------------


def open_run(path: str | Path, weights: str | None = None) -> Reader:
    """The classifier of a run directory or checkpoint.

    Args:
        weights: ema or raw; None: averaged weights where there are.

    Raises:
        UserError: no run, or none of a classifier.
    """
    model, info = generate.load_run(path)
    if not isinstance(model, Classifier) or model.main_score != "acc1":
        raise UserError(f"{path} is a run of {type(model).__name__}, expected a classifier's")
    _, use = generate.weights_scope(model, weights)
    if use == "ema":
        model.model_ema.copy_to(model.model)
    params = (info["config"].get("data") or {}).get("params") or {}
    size = _given(params, "size") or getattr(model.model, "image_size", None)
    if size is None:
        raise UserError(f"{path}: the config does not say how large its pictures are (data.params.size)")
    channels = _given(params, "channels") or getattr(model.model, "in_channels", 3)
    pair = (size, size) if isinstance(size, int) else tuple(size)
    names = list(model.class_names or map(str, range(model.num_classes)))
    return Reader(model, Fit(pair, channels), names, f"{info['checkpoint']} ({use} weights)")


def _given(params: dict[str, Any], key: str) -> Any:
    """A value for all data sets, or the training set's own."""
    own = (params.get("train") or {}).get("params") or {}
    return params.get(key) or own.get(key)


def open_torchvision(name: str, weights: str = "DEFAULT") -> Reader:
    """A classifier of torchvision with its published weights, its sizes and its names of the classes.

    Raises:
        UserError: no such network or weights, or they cannot be fetched.
    """
    from torchvision.models import get_model_weights, list_models

    known = [n for n in list_models() if n.partition("_")[0] not in ("quantized", "raft", "fcn")]
    if name not in list_models():
        raise UserError(f"--model {name}: torchvision has no such network{suggest(name, known)}")
    members = get_model_weights(name).__members__
    if weights not in members:
        raise UserError(f"--weights {weights}: {name} has {', '.join(members)}")
    entry = members[weights]
    names = list(entry.meta.get("categories") or ())
    transform = entry.transforms()
    if not names or not hasattr(transform, "crop_size"):
        raise UserError(f"--model {name} is no classifier of images")
    config = {"target": f"torchvision.models.{name}", "params": {}}
    model = Classifier(config, len(names), weights=f"torchvision://{entry.name}").eval().requires_grad_(False)
    model.class_names = names
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    interpolation = transform.interpolation.value
    fit = Fit((crop, crop), 3, interpolation=interpolation, resize_to=(max(resize, crop),) * 2)
    return Reader(model, fit, names, f"torchvision {name}, {entry.name}")


# --- reading ----------------------------------------------------------------------------------------------------------


def find_pictures(given: Sequence[str]) -> list[Path]:
    """Files, and all pictures below folders, in the order given.

    Raises:
        UserError: a path that does not exist, or no picture at all.
    """
    found: list[Path] = []
    for item in given:
        path = Path(item)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{item} does not exist: expected picture files or folders of them")
    if not found:
        raise UserError(f"no pictures in {', '.join(given)}; looked for {' '.join(sorted(EXTENSIONS))}")
    return found


def loaded(reader: Reader, paths: Sequence[Path], batch_size: int, unread: list[str]) -> Iterator[tuple[list, Tensor]]:
    """Batches of (paths, pictures [B, C, H, W]); what cannot be read is added to `unread` with the reason."""
    waiting: list[tuple[Path, Tensor]] = []
    for number, path in enumerate(paths, 1):
        try:
            waiting.append((path, reader.load(path)))
        except UNREADABLE as e:
            unread.append(f"{path}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
        if waiting and (len(waiting) == batch_size or number == len(paths)):
            yield [p for p, _ in waiting], torch.stack([x for _, x in waiting])
            waiting = []
    if waiting:
        yield [p for p, _ in waiting], torch.stack([x for _, x in waiting])


def answers(reader: Reader, files: Sequence[Path], x: Tensor, top: int) -> list[Row]:
    """For each picture {"file", "top": [{"class", "index", "probability"}, ...]}, the likeliest first."""
    share, index = reader.probabilities(x).topk(min(top, len(reader.names)))
    rows = []
    for file, values, classes in zip(files, share.tolist(), index.tolist(), strict=True):
        best = [
            {"class": reader.names[c], "index": c, "probability": round(v, 6)}
            for c, v in zip(classes, values, strict=True)
        ]
        rows.append({"file": str(file), "top": best})
    return rows


# --- showing ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The answers as aligned columns."""
    lines = [[r["file"], *(f"{t['class']} {t['probability']:.1%}" for t in r["top"])] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each answer: file, rank, class, index, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "index", "probability"])
    for row in rows:
        for rank, t in enumerate(row["top"], 1):
            writer.writerow([row["file"], rank, t["class"], t["index"], t["probability"]])
    return text.getvalue()


def looks_at_picture(reader: Reader, x: Tensor, rows: Sequence[Row]) -> Any:
    """Pictures [B, C, H, W], each beside where the network looks for its first answer, as one PIL image.

    Raises:
        UserError: a network without maps.
    """
    classes = torch.tensor([r["top"][0]["index"] for r in rows], device=reader.model.device)
    maps = reader.model.looks_at(x.to(reader.model.device), classes)
    if maps is None:
        name = type(reader.model.model).__name__
        raise UserError(
            f"--grad-cam: {reader.source}: no layer of the {name} gives a map, and it does not attend from one class "
            "token to a square of patches either; leave --grad-cam out"
        )
    captions = [f"{r['top'][0]['class']} {r['top'][0]['probability']:.0%}" for r in rows]
    plain = labelled(x, captions, [False] * len(rows))
    hot = labelled(heat(x, maps), [Path(r["file"]).name for r in rows], [False] * len(rows))
    side = min(plain.shape[2], hot.shape[2]), min(plain.shape[3], hot.shape[3])
    pairs = torch.cat([plain[..., : side[0], : side[1]], hot[..., : side[0], : side[1]]], 3)
    return to_pil(image_grid(pairs, nrow=2)[None])[0]
