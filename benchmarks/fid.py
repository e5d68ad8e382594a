"""FID of two folders of 10,000 pictures with one feature network: this project and torch-fidelity, in turn.

python benchmarks/fid.py
    random 32x32 pictures, as PNG files
python benchmarks/fid.py --real cifar10-train.zip --drawn cifar10-train.zip
    10,000 pictures of CIFAR-10 against 10,000 others of it
python benchmarks/fid.py --n 1000 --rounds 3 --real my_pictures --drawn drawn.zip --features logs/<classifier_run>

Pictures of a folder or zip are copied, as the files that they are, to a folder that both sides read; that is not timed.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import compare, report  # noqa: E402
from ldm.data.image import ImageFolder  # noqa: E402
from ldm.evaluation.distances import frechet_distance, moments  # noqa: E402
from ldm.evaluation.features import find_features, fitted  # noqa: E402
from ldm.evaluation.pictures import of_folder  # noqa: E402
from ldm.evaluation.store import features_of  # noqa: E402


def write(folder: Path, n: int, seed: int) -> tuple[int, int]:
    """Smooth random pictures, which compress about as photographs do; their (height, width)."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:05}.png")
    return 32, 32


def take(place: str, folder: Path, n: int, half: int) -> tuple[int, int]:
    """Copies n pictures of a folder or zip, evenly chosen from all, to a flat folder; their (height, width).

    Args:
        half: 0 or 1: begins with the first one, or as far behind it as half of the way to the next.

    Raises:
        SystemExit: they are not of one size.
    """
    dataset = ImageFolder(place, "all", 8, captions="none", cache=False, verify=0)
    folder.mkdir()
    step, sizes = max(1.0, len(dataset) / n), {}
    for i in (int((k + half / 2) * step) for k in range(min(n, len(dataset)))):
        name, content = dataset.entries.names[i], dataset.read(i)
        with Image.open(io.BytesIO(content)) as picture:
            sizes.setdefault((picture.height, picture.width), name)
        (folder / f"{i:07}{Path(name).suffix.lower()}").write_bytes(content)
    if len(sizes) > 1:
        said = ", ".join(f"{name}: {size}" for size, name in list(sizes.items())[:3])
        raise SystemExit(f"{place}: pictures of several sizes (height, width) cannot be measured in batches: {said}")
    return next(iter(sizes))


def plain(features: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same network as torch-fidelity's users would register it: the module as it is."""
    network, seen = find_features(features), []
    classifier = network.model.eval()
    classifier.model.get_submodule(network.last).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    @torch.no_grad()
    def run(x: torch.Tensor) -> torch.Tensor:
        seen.clear()
        classifier(fitted(x, network.size, network.channels))
        return seen.pop().flatten(1)

    return run


def theirs(places: list[Path], network: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """torch-fidelity, with that network registered."""
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Ours(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (network(x),)

    if "ours" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("ours", Ours)
    options = {"feature_extractor": "ours", "cuda": False, "verbose": False, "cache": False, "batch_size": 256}
    found = calculate_metrics(input1=str(places[0]), input2=str(places[1]), fid=True, **options)
    return found["frechet_inception_distance"]


def measure(places: list[Path], size: tuple[int, int], features: str, rounds: int) -> tuple[dict[str, float], Any]:
    """FID of two flat folders of pictures of this (height, width) by both sides, and their seconds."""
    network, module, found = find_features(features), plain(features), {}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as store:  # nothing is kept from one round to the next
            both = [moments(features_of(of_folder(p, size, 3), network, store).features) for p in places]
        found["ldm"] = frechet_distance(*both)

    def fidelity() -> None:
        found["torch-fidelity"] = theirs(places, module)

    seconds = compare({"ldm": ours, "torch-fidelity": fidelity}, rounds)
    apart = abs(found["ldm"] - found["torch-fidelity"])
    assert apart <= 1e-3 * max(1.0, abs(found["torch-fidelity"])), found
    return found, seconds


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10000, help="pictures of each set, at most (default: 10000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", default="digits")
    parser.add_argument("--real", metavar="PATH", help="folder or zip of pictures of one size, instead of random ones")
    parser.add_argument("--drawn", metavar="PATH", help="the other set; the same place gives other pictures of it")
    args = parser.parse_args(argv)
    if (args.real is None) != (args.drawn is None):
        parser.error("--real and --drawn: give both, or none")
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("drawn", "real")]
        if args.real is None:
            sizes = [write(place, args.n, seed) for seed, place in enumerate(places)]
            what = "random pictures"
        else:
            both = enumerate((args.drawn, args.real))
            sizes = [take(place, places[half], args.n, half) for half, place in both]
            what = f"{Path(args.drawn).name} against {Path(args.real).name}"
        if sizes[0] != sizes[1]:
            parser.error(f"--drawn has pictures of {sizes[0]}, --real of {sizes[1]} (height, width): expected one size")
        counts = " and ".join(str(len(list(p.iterdir()))) for p in places)
        found, seconds = measure(places, sizes[0], args.features, args.rounds)
    report(f"FID of {counts} pictures ({what}), features {args.features}: {found['ldm']:.4g}", seconds, "ldm")
    return found


if __name__ == "__main__":
    main()
