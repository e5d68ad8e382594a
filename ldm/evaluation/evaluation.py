"""What an evaluation works on: the model, real and drawn pictures, their features, each made when first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm import generate
from ldm.checkpoint import find_run, read
from ldm.data.pixels import EXTENSIONS
from ldm.evaluation import likelihood, recognition
from ldm.evaluation.features import ClassifierFeatures, FeatureNetwork, find_features, shipped
from ldm.evaluation.pictures import Pictures, of_config, of_files, of_folder
from ldm.evaluation.sampling import NAMED, Plan, balanced
from ldm.evaluation.store import Features, features_of
from ldm.models.classifier import Classifier
from ldm.models.first_stage import AutoencoderBase
from ldm.models.vae import VAE
from ldm.util import UserError


@dataclass
class Request:
    """What is to be measured.

    Attributes:
        run: run directory, checkpoint, or a folder of pictures.
        metrics: names of METRICS; empty: those that the run's family usually has.
        real: config, run or folder with the real pictures; None: the run's own data.
        split: of the real pictures; None: train for drawn pictures, else test, else validation.
        n: drawn pictures.
        features: see `find_features`.
        classifier: a classifier run that reads drawn pictures; None: the feature network, if it is one.
        trainer: arguments of the Trainer that draws.
        outdir: pictures, features and results go here.
    """

    run: str
    metrics: Sequence[str] = ()
    real: str | None = None
    split: str | None = None
    n: int = 1000
    features: str | None = None
    classifier: str | None = None
    seed: int = 0
    weights: str | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 250
    device: str = "auto"
    trainer: dict[str, Any] = field(default_factory=dict)
    outdir: str | Path = "outputs/evaluation"


class Evaluation:
    """What metrics ask for, each made when it is first needed."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device = generate.pick_device(request.device)
        self.notes: list[str] = []
        self.model, self.info = self._load()
        self.kinds = kinds_of(self.model)

    def _load(self) -> tuple[Any, dict[str, Any]]:
        path = Path(self.request.run)
        try:
            find_run(path)
        except UserError:
            if not path.exists():
                raise
            return None, {}
        return generate.load_run(path)

    # --- pictures ---

    @cached_property
    def real(self) -> Pictures:
        """The real pictures."""
        place, config = self.request.real, self.info.get("config")
        key = getattr(self.model, "first_stage_key", "image")
        if place is None and config is None:
            raise UserError(f"{self.request.run} is a folder of pictures: give --real, what to compare it with")
        if place is not None and place.endswith((".yaml", ".yml")):
            from omegaconf import OmegaConf

            from ldm.config import load_yaml

            config = OmegaConf.to_container(load_yaml(place), resolve=True)
        elif place is not None:
            found = _run_in(place)
            if found is None:
                return of_folder(place, *self._shape())
            run, file = found
            config = generate.run_config(run, read(file))
        return of_config(config, self._split(config), key)

    def _split(self, config: dict[str, Any]) -> str:
        if self.request.split:
            return self.request.split
        there = (config.get("data") or {}).get("params") or {}
        if self.kinds & {"generator", "folder"}:
            return "train"
        return next((s for s in ("test", "validation", "train") if there.get(s)), "test")

    def _shape(self) -> tuple[Any, int]:
        """(height, width) and channels where a folder stands for the data: the run's own, or the first file's."""
        params = (self.info.get("config", {}).get("data") or {}).get("params") or {}
        if params.get("size"):
            size = params["size"]
            return (size, size) if isinstance(size, int) else size, params.get("channels", 3)
        if self.model is not None:
            raise UserError(f"--real {self.request.real}: of which size? the run's config has no data.params.size")
        from PIL import Image

        files = sorted(p for p in Path(self.request.run).rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise UserError(f"{self.request.run} holds neither a checkpoint nor pictures")
        with Image.open(files[0]) as picture:
            return (picture.height, picture.width), 1 if picture.mode == "L" else 3

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Classes to draw, in the shares of the real pictures; in turn where those have none. At least `NAMED`."""
        count = self.model_classes
        if not count:
            return None
        shares = self.shares
        return balanced(np.ones(count) if shares is None or len(shares) != count else shares, self.most)

    @property
    def most(self) -> int:
        """Classes and captions that are made ready."""
        return max(self.request.n, NAMED)

    @property
    def model_classes(self) -> int | None:
        """Number of classes that the model can be asked for."""
        names = getattr(self.model, "class_names", None)
        return getattr(self.model, "num_classes", None) or (len(names) if names else None)

    @cached_property
    def shares(self) -> np.ndarray | None:
        """Of each class among the real pictures."""
        if self.request.real is None and "data" not in self.info.get("config", {}):
            return None
        labels = self.real.labels()
        return None if labels is None else np.bincount(labels, minlength=len(self.real.class_names or [])) / len(labels)

    @cached_property
    def captions(self) -> list[str] | None:
        """Captions to draw from: those of the real pictures, in turn. At least `NAMED`."""
        if self.model is None or (self.request.real is None and "data" not in self.info.get("config", {})):
            return None
        key = getattr(self.model, "cond_stage_key", None)
        if key is None or not isinstance(self.real.raw([0]).get(key), list):
            return None
        return [str(self.real.raw([i % len(self.real)])[key][0]) for i in range(self.most)]

    @cached_property
    def plan(self) -> Plan:
        """What is drawn."""
        r = self.request
        if r.n < 2:
            raise UserError(f"-n {r.n}: expected at least 2 pictures")
        root, seeds = Path(r.outdir) / "pictures", range(r.seed, r.seed + r.n)
        return Plan(self.model, self.info, seeds, r.knobs, r.weights, self.labels, self.captions, r.batch_size, root)

    @cached_property
    def drawn(self) -> Pictures:
        """The drawn pictures, or those of the folder; at the size and with the channels of the real ones.

        Nearest neighbours, sharpness and features of pictures of another size would be no comparison.
        """
        if self.model is None:
            return of_folder(self.request.run, self.real.size, self.real.channels)
        labels = self.plan.labels if self.plan.conditional == "classes" else np.zeros(self.request.n, np.int64)
        return of_files(self.plan.folder, self.plan.names(), labels, self.real.channels, self.real.size)

    # --- features ---

    @cached_property
    def network(self) -> FeatureNetwork:
        """The feature network."""
        target = self.real.about.get("data")
        name = self.request.features or (None if shipped(target) else self.request.classifier)
        return find_features(name, target).to(self.device)

    def features(self, pictures: Pictures, what: str) -> Features:
        """Of a set, from the disk if they are there."""
        return features_of(pictures, self.network, Path(self.request.outdir) / "features", what)

    @cached_property
    def real_features(self) -> Features:
        return self.features(self.real, "real features")

    @cached_property
    def drawn_features(self) -> Features:
        return self.features(self.drawn, "drawn features")

    @cached_property
    def logits(self) -> np.ndarray:
        """What a classifier reads in the drawn pictures."""
        if self.request.classifier is None:
            if not isinstance(self.network, ClassifierFeatures):
                raise UserError(f"{self.network.name} is no classifier of the data's classes: give --classifier RUN")
            return self.drawn_features.logits
        network = ClassifierFeatures(self.request.classifier).to(self.device)
        return features_of(self.drawn, network, Path(self.request.outdir) / "features", "reading").logits

    # --- answers of a classifier ---

    @property
    def classes(self) -> np.ndarray:
        """Of the real pictures, int64 [N].

        Raises:
            UserError: they have none.
        """
        labels = self.real.labels()
        if labels is None:
            raise UserError("the real pictures have no classes: accuracy cannot be measured")
        return labels

    @cached_property
    def answers(self) -> recognition.Answers:
        """What the classifier that is measured says of the real pictures, read once for all figures."""
        labels = self.classes
        with self.scope():
            read = recognition.reader(self.model, self.device)
            return recognition.answers(recognition.readings(read, self.real, labels))

    # --- weights ---

    def scope(self) -> Any:
        """The weights that were asked for."""
        self.model.to(self.device)
        return generate.weights_scope(self.model, self.request.weights)[0]

    @property
    def weights_used(self) -> str:
        """ema or raw."""
        return generate.weights_scope(self.model, self.request.weights)[1]


def _run_in(place: str) -> tuple[Path, Path] | None:
    """Run directory and checkpoint; None for a folder or zip of pictures (checkpoints are zips, but called .ckpt)."""
    if Path(place).suffix.lower() == ".zip":
        return None
    try:
        return find_run(place)
    except UserError:
        return None


def kinds_of(model: Any) -> set[str]:
    """What can be measured of a model: folder, classifier, generator, autoencoder, likelihood, elbo."""
    if model is None:
        return {"folder"}
    if isinstance(model, Classifier):
        return {"classifier"}
    if isinstance(model, AutoencoderBase):  # a first stage; the prior that it draws from is another model
        return {"autoencoder"}
    kinds = {"autoencoder", "elbo"} if isinstance(model, VAE) else set()
    if likelihood.has_likelihood(model):
        kinds.add("likelihood")
    return kinds | ({"generator"} if hasattr(model, "sample") else set())
