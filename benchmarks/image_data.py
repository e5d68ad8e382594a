"""Loading and augmenting small pictures: this project against torchvision's ImageFolder and DataLoader.

python benchmarks/image_data.py                 (makes 10,000 JPEG files of 32x32 in a temporary folder)
python benchmarks/image_data.py --zip FILE      (a zip of class folders of JPEG files)

Equal batches, workers and transforms (flip, shift by up to 4 pixels, [-1, 1]). `zip`: decoded when asked for, out of
the zip. `memory`: decoded before the first epoch, which is timed apart and not part of an epoch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report  # noqa: E402

COUNT, CLASSES, BATCH = 10_000, 10, 128


def make(root: Path) -> Path:
    """Smooth random pictures as JPEG files, in class folders and in a stored zip of them."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / "pictures" / f"class{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=90)
    return pack(root / "pictures", root / "pictures.zip")


def pack(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        for file in sorted(folder.rglob("*.jpg")):
            z.write(file, file.relative_to(folder))
    return path


def ours(path: Path, cache: bool, workers: int) -> Callable[[], None]:
    from ldm.data.datamodule import DataModuleFromConfig

    params = {"root": str(path), "split": "all", "size": 32, "captions": "none", "flip_p": 0.5, "pad_crop": 4}
    config = {"target": "ldm.data.image.ImageFolder", "params": {**params, "cache": cache, "verify": 1}}
    data = DataModuleFromConfig(BATCH, train=config, num_workers=0 if cache else workers)
    start = time.perf_counter()
    data.setup("fit")
    loader = data.train_dataloader()
    print(f"  ready after {time.perf_counter() - start:.1f} s ({'memory' if cache else 'zip'})")

    def epoch() -> None:
        for batch in loader:
            batch["image"].shape  # noqa: B018

    return epoch


def theirs(folder: Path, workers: int) -> Callable[[], None]:
    from torchvision import datasets, transforms

    steps = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.5,) * 3, (0.5,) * 3))
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def epoch() -> None:
        for images, _ in loader:
            images.shape  # noqa: B018

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zip", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        path = args.zip or make(root)
        if args.zip:
            with zipfile.ZipFile(args.zip) as z:
                z.extractall(root / "pictures")
        sides = {
            "ldm, zip": ours(path, False, args.workers),
            "ldm, memory": ours(path, True, args.workers),
            "torchvision": theirs(root / "pictures", args.workers),
        }
        seconds = compare(sides, args.rounds)
        title = f"an epoch of JPEG files of 32x32, batch {BATCH}, {args.workers} workers"
        for name in ("ldm, zip", "ldm, memory"):
            report(title, {name: seconds[name], "torchvision": seconds["torchvision"]}, name)


if __name__ == "__main__":
    main()
