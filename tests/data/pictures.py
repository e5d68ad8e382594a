"""Small generated pictures: smooth, so that JPEG and resizing change them little."""

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height=24, width=24, shade=0.0):
    """An RGB ramp: red grows to the right, green downwards, blue is `shade` in [0, 1]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = (x / max(1, width - 1), y / max(1, height - 1), np.full_like(x, shade))
    return Image.fromarray((np.stack(channels, -1) * 255).round().astype(np.uint8))


def fill(folder, count=6, suffix="png", size=(24, 24), start=0):
    """`count` pictures 0000.png, ... in a folder; gives their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{start + i:04d}.{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        picture(*size, shade=(i + 1) / (count + 1)).save(path, **({"quality": 95} if suffix == "jpg" else {}))
    return paths


def metadata(folder, rows):
    text = "\n".join(json.dumps(r) for r in rows)
    (Path(folder) / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def zipped(folder, path, method=zipfile.ZIP_STORED, top=""):
    """The files of a folder in a zip, below the folder `top`."""
    with zipfile.ZipFile(path, "w", method) as z:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                z.write(file, top + str(file.relative_to(folder)))
    return path
