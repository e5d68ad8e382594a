"""Networks that turn pictures into features: the project's classifiers, and torch-fidelity's where weights are."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.base import LUMA
from ldm.evaluation.distances import fidelity
from ldm.evaluation.folding import folded
from ldm.generate import load_run, weights_scope
from ldm.util import UserError, suggest

MODELS = Path(__file__).resolve().parents[2] / "models"
# data set -> the classifier of it that comes with the project
SHIPPED = {
    "ldm.data.builtin.Digits": "digits",
    "ldm.data.openmoji.OpenMoji": "openmoji",
    "ldm.data.vision.CIFAR10": "cifar10",
}
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA = "6726825d"  # the published file's name ends in the first digits of its SHA-256
RESIZE = "bicubic, antialiased"
CPU_PIXELS = 2**16  # of a batch: what the layers of more of them write does not stay in a processor's cache


class FeatureNetwork:
    """Pictures uint8 [B, C, H, W] -> (features float32 [B, D], logits float32 [B, K] or None), on the CPU.

    Attributes:
        name, sha256: which network, with which weights.
        layer: where the features are taken.
        resize: how pictures of another size are brought to the network's.
    """

    name: str
    sha256: str
    layer: str
    resize: str

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} gives no features")

    def of_floats(self, x: Tensor) -> Tensor:
        """Features [B, D] of pictures in [-1, 1] that are not rounded to 8 bits, for differences of close ones.

        Raises:
            UserError: the network takes 8 bits only.
        """
        raise UserError(f"{self.name} takes pictures of 8 bits only: a path length needs other features")

    def to(self, device: torch.device | str) -> FeatureNetwork:
        """Moves the network."""
        raise NotImplementedError(f"{type(self).__name__} cannot be moved")

    def about(self) -> dict[str, str]:
        """What a result says of the features."""
        return {"name": self.name, "layer": self.layer, "resize": self.resize, "sha256": self.sha256}


class ClassifierFeatures(FeatureNetwork):
    """What the last linear layer of a classifier run reads, and what it gives.

    Args:
        run: run directory, checkpoint, or a folder of `models/classifier/`.

    Raises:
        UserError: no classifier, or one without a linear layer.
    """

    resize = RESIZE

    def __init__(self, run: str | Path) -> None:
        self.model, info = load_run(run)
        if not hasattr(self.model, "num_classes") or hasattr(self.model, "sample"):
            raise UserError(f"{run} is a {type(self.model).__name__}: features need a classifier")
        linear = [n for n, m in self.model.model.named_modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError(f"{run}: {type(self.model.model).__name__} has no linear layer to take features from")
        self.last, self.layer = linear[-1], f"input of {linear[-1]}"
        self._network: nn.Module | None = None  # made of the first batch
        self._seen: list[Tensor] = []
        params = (info["config"].get("data") or {}).get("params") or {}
        self.size, self.channels = params.get("size"), params.get("channels")
        self.name, self.sha256 = str(run), info["sha256"]
        self.class_names, self.num_classes = self.model.class_names, self.model.num_classes
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> ClassifierFeatures:
        self.model.to(device)
        self.device, self._network = torch.device(device), None
        return self

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(fitted(pictures.to(self.device), self.size, self.channels))

    def of_floats(self, x: Tensor) -> Tensor:
        return self._run(fitted((x.to(self.device) + 1) * 127.5, self.size, self.channels, whole=False))[0]

    @torch.no_grad()
    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.normalize(x).to(memory_format=torch.channels_last)
        if self._network is None:
            with weights_scope(self.model, None)[0]:
                self._network = folded(self.model.model, x[:2])
            self._network.get_submodule(self.last).register_forward_pre_hook(lambda _, seen: self._seen.append(seen[0]))
        self._network.eval()  # batch statistics would make a picture's features depend on its batch
        at_once = max(1, CPU_PIXELS // x.shape[2:].numel()) if x.device.type == "cpu" else len(x)
        self._seen.clear()
        logits = torch.cat([self._network(part) for part in x.split(at_once)])
        features = torch.cat(self._seen)
        self._seen.clear()
        return features.flatten(1).float().cpu(), logits.float().cpu()


def fitted(pictures: Tensor, size: Any, channels: int | None, whole: bool = True) -> Tensor:
    """[B, C, H, W], 0 to 255 -> float32 in [-1, 1] of this size and number of channels, as the loader would give it.

    whole: round to 8 bits where the loader would.
    """
    x = pictures.float()
    if channels == 1 and x.shape[1] == 3:
        x = (x * torch.tensor(LUMA, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = x.round() if whole else x
    elif channels == 3 and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    wanted = (size, size) if isinstance(size, int) else tuple(size or x.shape[2:])
    if tuple(x.shape[2:]) != wanted:
        x = F.interpolate(x, wanted, mode="bicubic", antialias=True).clamp(0, 255)
        x = x.round() if whole else x
    return x / 127.5 - 1


class FidelityFeatures(FeatureNetwork):
    """A feature extractor of torch-fidelity, which resizes as TensorFlow 1 does.

    Args:
        extractor: a `torch_fidelity.FeatureExtractorBase` that gives one layer, or two: features and logits.
        sha256: of its weights.
    """

    resize = "torch-fidelity's own (bilinear, as TensorFlow 1)"

    def __init__(self, extractor: nn.Module, sha256: str) -> None:
        self.extractor, self.sha256 = extractor.eval(), sha256
        self.name, self.layer = extractor.get_name(), extractor.get_requested_features_list()[0]
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> FidelityFeatures:
        self.extractor.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        self.extractor.eval()
        x = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
        features, *logits = self.extractor(x.to(self.device))
        return features.float().cpu(), logits[0].float().cpu() if logits else None

    def of_floats(self, x: Tensor) -> Tensor:
        # the package's extractors turn 8 bits into floats first of all; what is in their way is a check of the type
        with replaced(inspect.getmodule(type(self.extractor)), "vassert", lambda *_: None):
            return self((x + 1) * 127.5)[0]


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within this, the module has `value` under that name; where it has none, nothing is done."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, value)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


# --- by name ----------------------------------------------------------------------------------------------------------


def shipped(data: str | None) -> str | None:
    """Name of the classifier of this data set that comes with the project, if there is one."""
    name = SHIPPED.get(data or "")
    return name if name and (MODELS / "classifier" / name / "config.yaml").is_file() else None


def find_features(name: str | None, data: str | None = None) -> FeatureNetwork:
    """The network of that name: a classifier run, the name of one in `models/classifier/`, or one of torch-fidelity's.

    Args:
        name: None chooses the project's classifier of the data set, else Inception.
        data: target of the data set.

    Raises:
        UserError: unknown, or its weights are not on the disk; the message says which file goes where.
    """
    name = name or shipped(data) or INCEPTION
    if (MODELS / "classifier" / name).is_dir():
        network = ClassifierFeatures(MODELS / "classifier" / name)
        network.name = name
        return network
    if Path(name).exists():
        return ClassifierFeatures(name)
    fidelity()
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as known

    if name not in known:
        ours = [p.name for p in (MODELS / "classifier").glob("*")]
        raise UserError(
            f"--features {name}: neither a run nor one of {', '.join([*ours, *known])}{suggest(name, [*ours, *known])}"
        )
    return _from_fidelity(name, known[name])


def _from_fidelity(name: str, cls: Any) -> FidelityFeatures:
    layer = cls.get_default_feature_layer_for_metric("fid")
    layers = [layer, "logits_unbiased"] if name == INCEPTION else [layer]
    if name.startswith("dinov2"):
        return _dinov2(name, cls, layers)
    file, url, sha = weights_of(name)
    check_file(name, file, url, sha)
    return _loaded(name, file, lambda: cls(name, layers, feature_extractor_weights_path=str(file)))


def _loaded(name: str, file: Path, make: Callable[[], nn.Module]) -> FidelityFeatures:
    try:
        return FidelityFeatures(make(), _sha256(file))
    except RuntimeError as e:  # torch-fidelity and DINOv2 load strictly
        raise UserError(f"--features {name}: {file} does not hold the weights of this network: {e}") from e


def _dinov2(name: str, cls: Any, layers: list[str]) -> FidelityFeatures:
    """torch-fidelity has torch.hub build it from DINOv2's repository, which reads the weights from their place."""
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

    own, hub = MODEL_METADATA[name], Path(torch.hub.get_dir())
    folder, file = hub / "facebookresearch_dinov2_main", hub / "checkpoints" / f"{own}_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{own}/{file.name}"
    if not (folder / "hubconf.py").is_file():
        raise UserError(
            f"--features {name}: its network is not here. Unpack https://github.com/facebookresearch/dinov2 as "
            f"{folder}, and download {url} to {file}"
        )
    check_file(name, file, url, "")  # no digest of it is published
    load = torch.hub.load
    with replaced(torch.hub, "load", lambda _, entry: load(str(folder), entry, source="local")):  # asks no one
        return _loaded(name, file, lambda: cls(name, layers))


def weights_of(name: str) -> tuple[Path, str, str]:
    """(file, where to get it, first digits of its SHA-256) of an extractor of torch-fidelity."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if name == INCEPTION:
        return folder / INCEPTION_FILE, INCEPTION_URL, INCEPTION_SHA
    if name == "vgg16":
        file = "vgg16-397923af.pth"
        return folder / file, f"https://download.pytorch.org/models/{file}", "397923af"
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    sha = MODEL_METADATA[name]["hash"]
    return folder / f"{name}-{sha}.pt", MODEL_URLS[name], sha


def check_file(name: str, file: Path, url: str, sha: str) -> None:
    """torch-fidelity would download a missing file, and unpickles what it finds: only the published one will do."""
    if not file.is_file():
        raise UserError(f"--features {name}: its weights are not here. Download {url} to {file}")
    found = _sha256(file)
    if not found.startswith(sha):
        raise UserError(
            f"--features {name}: {file} is not the published file: its SHA-256 is {found[:16]}..., expected "
            f"{sha[:16]}...; download {url} again"
        )


def _sha256(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(2**22):
            sha.update(block)
    return sha.hexdigest()
