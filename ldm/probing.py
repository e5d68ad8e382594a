"""Linear probes: what a linear classifier finds in features (Alain & Bengio 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # features [N, D], pixels [N, P], labels [N]


def labelled_data(config: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """(training set, set to test on, its name) of a run's config.

    Raises:
        UserError: the run has no training set, or nothing to test on.
    """
    params = (config.get("data") or {}).get("params") or {}
    split = next((s for s in ("test", "validation") if params.get(s)), None)
    if split is None or not params.get("train"):
        raise UserError("a linear probe needs data.params.train and test (or validation) in the run's config")
    data = instantiate_from_config(config["data"])
    data.prepare_data()
    data.setup("fit")
    data.setup({"validation": "validate"}.get(split, split))
    return data.datasets["train"], data.datasets[split], split


@torch.no_grad()
def features(model: Any, x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] -> the latents of an autoencoder, [B, D]: the mean where they are random.

    Raises:
        UserError: the model does not encode.
    """
    encode = getattr(model, "encode_to_prequant", getattr(model, "encode", None))
    if encode is None:
        raise UserError(f"{type(model).__name__} does not encode pictures: expected the run of an autoencoder")
    z = encode(x)
    return (z.mode() if isinstance(z, DiagonalGaussianDistribution) else z).flatten(1)


def read(model: Any, data: Any, batch_size: int, limit: int) -> Part:
    """Features, pixels and labels of the first `limit` pictures.

    Raises:
        UserError: the data have no labels.
    """
    data = Subset(data, range(min(limit, len(data))))
    parts: list[tuple[Tensor, ...]] = []
    for batch in tqdm(DataLoader(data, batch_size), desc="encoding", unit="batch", leave=False):
        if "class_label" not in batch:
            raise UserError(f"a linear probe needs class_label in the batch; the data set gives {sorted(batch)}")
        x = model.get_input(batch, model.first_stage_key).to(next(model.parameters()).device)
        parts.append((features(model, x).float().cpu(), x.flatten(1).cpu(), batch["class_label"]))
    z, x, labels = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return z, x, labels


def accuracies(train: Part, test: Part) -> dict[str, Any]:
    """Share of the test pictures that logistic regression reads right, from features and from pixels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found: dict[str, Any] = {}
    for name, column in (("features", 0), ("pixels", 1)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(train[column], train[2])
        found[name] = {
            "accuracy": float(classifier.score(test[column], test[2])),
            "numbers": int(train[column].shape[1]),
        }
    return {**found, "n_train": len(train[2]), "n_test": len(test[2])}
