"""FID of two folders of 10,000 PNG files of 32x32 with one feature network: this project and torch-fidelity, in turn.

python benchmarks/fid.py
python benchmarks/fid.py --n 1000 --rounds 3 --features models/classifier/cifar10
"""

from __future__ import annotations

import argparse
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
from ldm.evaluation.distances import frechet_distance, moments  # noqa: E402
from ldm.evaluation.features import find_features, fitted  # noqa: E402
from ldm.evaluation.pictures import of_folder  # noqa: E402
from ldm.evaluation.store import features_of  # noqa: E402


def write(folder: Path, n: int, seed: int) -> None:
    """Smooth random pictures, which compress about as photographs do."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:05}.png")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", default="digits")
    args = parser.parse_args()
    network, module, found = find_features(args.features), plain(args.features), {}
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("a", "b")]
        for seed, place in enumerate(places):
            write(place, args.n, seed)

        def ours() -> None:
            with tempfile.TemporaryDirectory() as store:  # nothing is kept from one round to the next
                both = [moments(features_of(of_folder(p, (32, 32), 3), network, store).features) for p in places]
            found["ldm"] = frechet_distance(*both)

        def fidelity() -> None:
            found["torch-fidelity"] = theirs(places, module)

        seconds = compare({"ldm": ours, "torch-fidelity": fidelity}, args.rounds)
    assert abs(found["ldm"] / found["torch-fidelity"] - 1) < 1e-3, found
    report(f"FID of 2 x {args.n} pictures, features {args.features}", seconds, "ldm")


if __name__ == "__main__":
    main()
