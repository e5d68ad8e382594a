"""The table of metrics, and one result that says all it depends on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm.evaluation import distances, likelihood, quality, recognition, reconstruction
from ldm.evaluation.evaluation import Evaluation, Request
from ldm.evaluation.features import ClassifierFeatures
from ldm.evaluation.path_length import path_length
from ldm.evaluation.pictures import of_files
from ldm.evaluation.provenance import commit, provenance
from ldm.evaluation.sampling import draw, drawn_by, settings
from ldm.evaluation.store import write_json
from ldm.util import UserError, count_params, suggest

# --- metrics ----------------------------------------------------------------------------------------------------------


def _moments(e: Evaluation) -> tuple[distances.Moments, distances.Moments]:
    pair = distances.moments(e.drawn_features.features), distances.moments(e.real_features.features)
    smaller, dims = min(m.n for m in pair), len(pair[0].total)
    if smaller <= dims:
        e.notes.append(f"FID: {smaller} pictures for {dims} features leave the covariance singular; draw more (-n)")
    return pair


def _agreement(e: Evaluation) -> dict[str, Any]:
    if e.model is None or e.plan.conditional != "classes":
        raise UserError("the generative run knows no classes: class agreement cannot be measured")
    logits = e.logits
    if logits.shape[1] != e.model_classes:
        raise UserError(f"the classifier has {logits.shape[1]} classes, the generative run {e.model_classes}")
    return quality.class_agreement(logits, e.plan.labels)


def _balance(e: Evaluation) -> dict[str, Any]:
    classes = e.logits.shape[1]
    if e.shares is not None and len(e.shares) != classes:
        raise UserError(f"the classifier has {classes} classes, the data {len(e.shares)}: give --classifier RUN")
    return quality.class_balance(e.logits, np.full(classes, 1 / classes) if e.shares is None else e.shares)


def _inception(e: Evaluation) -> dict[str, Any]:
    if e.drawn_features.logits is None:
        raise UserError(f"{e.network.name} gives no logits: the inception score cannot be measured")
    return distances.inception_score(e.drawn_features.logits)


def _sharpness(e: Evaluation) -> dict[str, Any]:
    drawn, real = quality.sharpness(e.drawn), quality.sharpness(e.real)
    return {"sharpness": drawn / real, "sharpness_of_data": real}


def _memorisation(e: Evaluation) -> dict[str, Any]:
    name = e.plan.folder.name if e.model is not None else Path(e.request.run).name
    return quality.memorisation(e.drawn, e.real, Path(e.request.outdir) / f"{name}-nearest.png")


def _clip(e: Evaluation) -> dict[str, Any]:
    from ldm.evaluation.text import clip_score, load_clip

    if e.captions is None:
        raise UserError("CLIP score needs a model that is asked by captions, and data that has them")
    return clip_score(load_clip(), e.drawn, e.captions[: e.request.n], e.device)


def _path_length(e: Evaluation) -> dict[str, Any]:
    labels = e.plan.labels if e.plan.conditional == "classes" else None

    def squared(a: Tensor, b: Tensor) -> Tensor:
        f, g = (e.network.of_floats(x) for x in (a, b))
        return ((f - g) ** 2).sum(1)

    with e.scope():
        return path_length(e.model, squared, labels, e.request.n, e.request.seed, e.device)


def _reconstruction(name: str) -> Callable[[Evaluation], dict[str, Any]]:
    def measure(e: Evaluation) -> dict[str, Any]:
        with e.scope():
            return reconstruction.reconstruction(e.model, e.real, [name], None, e.device)

    return measure


def _rfid(e: Evaluation) -> dict[str, Any]:
    folder = Path(e.request.outdir) / "reconstructions" / f"{Path(e.info['run']).name}-{e.info['sha256'][:8]}"
    with e.scope():
        reconstruction.reconstruction(e.model, e.real, [], folder, e.device)
    names = [f"{i:08}.png" for i in range(len(e.real))]
    again = of_files(folder, names, np.zeros(len(names)), e.real.channels)
    pair = distances.moments(e.features(again, "features").features), distances.moments(e.real_features.features)
    return {"rfid": distances.frechet_distance(*pair)}


def _robustness(e: Evaluation) -> dict[str, Any]:
    with e.scope():
        return recognition.robustness(recognition.reader(e.model, e.device), e.real, e.classes)


def _bits(e: Evaluation) -> dict[str, Any]:
    with e.scope():
        return likelihood.bits_per_dimension(e.model, e.real, e.device, seed=e.request.seed)


def _elbo(e: Evaluation) -> dict[str, Any]:
    with e.scope():
        return likelihood.elbo(e.model, e.real, e.device, seed=e.request.seed)


Metric = Callable[[Evaluation], dict[str, Any]]
DRAWN = {"generator", "folder"}
# name -> (what it can be measured of, how)
METRICS: dict[str, tuple[set[str], Metric]] = {
    "fid": (DRAWN, lambda e: {"fid": distances.frechet_distance(*_moments(e))}),
    "kid": (DRAWN, lambda e: distances.kernel_distance(e.drawn_features.features, e.real_features.features)),
    "is": (DRAWN, _inception),
    "prc": (DRAWN, lambda e: distances.precision_recall(e.drawn_features.features, e.real_features.features)),
    "dc": (DRAWN, lambda e: distances.density_coverage(e.drawn_features.features, e.real_features.features)),
    "diversity": (DRAWN, lambda e: {"diversity": distances.diversity(*_moments(e))}),
    "agreement": ({"generator"}, _agreement),
    "balance": (DRAWN, _balance),
    "sharpness": (DRAWN, _sharpness),
    "memorisation": (DRAWN, _memorisation),
    "clip_score": ({"generator"}, _clip),
    "ppl": ({"generator"}, _path_length),
    "psnr": ({"autoencoder"}, _reconstruction("psnr")),
    "ssim": ({"autoencoder"}, _reconstruction("ssim")),
    "lpips": ({"autoencoder"}, _reconstruction("lpips")),
    "rfid": ({"autoencoder"}, _rfid),
    "accuracy": ({"classifier"}, lambda e: recognition.accuracy(e.answers)),
    "calibration": ({"classifier"}, lambda e: recognition.calibration(e.answers)),
    "corruptions": ({"classifier"}, _robustness),
    "bpd": ({"likelihood"}, _bits),
    "elbo": ({"elbo"}, _elbo),
}
USUAL = {
    "generator": ("fid", "kid", "prc", "dc", "diversity", "sharpness", "memorisation"),
    "folder": ("fid", "kid", "prc", "dc", "diversity", "sharpness", "memorisation"),
    "autoencoder": ("psnr", "ssim", "rfid"),
    "classifier": ("accuracy", "calibration", "corruptions"),
    "likelihood": (),
    "elbo": (),
}


def _knows_classes(e: Evaluation) -> bool:
    """Whether the feature network tells the data's classes apart (OpenMoji's tells drawings apart, not groups)."""
    if not isinstance(e.network, ClassifierFeatures):
        return False
    return e.shares is None or len(e.shares) == e.network.num_classes


def choose(e: Evaluation) -> list[str]:
    """The metrics to measure.

    Raises:
        UserError: an unknown one, or one that this run does not have.
    """
    if not e.request.metrics:
        chosen = [m for kind in USUAL if kind in e.kinds for m in USUAL[kind]]
        if "generator" in e.kinds and (e.request.classifier or _knows_classes(e)):
            chosen += ["balance"] + ["agreement"] * (e.plan.conditional == "classes")
        return list(dict.fromkeys(chosen))
    for name in e.request.metrics:
        if name not in METRICS:
            raise UserError(f"--metrics {name}: expected {', '.join(METRICS)}{suggest(name, METRICS)}")
        if not METRICS[name][0] & e.kinds:
            has = ", ".join(m for m, (of, _) in METRICS.items() if of & e.kinds)
            what = "a folder of pictures" if e.model is None else f"a {type(e.model).__name__}"
            raise UserError(f"--metrics {name} cannot be measured of {what}, which has {has}")
    return list(e.request.metrics)


# --- the result -------------------------------------------------------------------------------------------------------


def evaluate(request: Request) -> dict[str, Any] | None:
    """Measures, writes `<outdir>/<run>-<8 digits>.json` and returns its content.

    Returns None in a process that only helped to draw (`trainer.devices=2`).

    Raises:
        UserError: an unknown metric, or whatever the metric lacks.
    """
    started = time.perf_counter()
    e = Evaluation(request)
    chosen = choose(e)
    draws = e.model is not None and any("generator" in METRICS[m][0] for m in chosen)
    if draws and not draw(e.plan, request.trainer, request.device):
        return None
    metrics: dict[str, Any] = {}
    for name in chosen:
        metrics |= METRICS[name][1](e)
    result = {"run": str(request.run), "metrics": metrics, **_about(e, draws)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    stem = e.plan.folder.name if draws else Path(request.run).name
    result["file"] = str(Path(request.outdir) / f"{stem}.json")
    write_json(result["file"], result)
    return result


def _about(e: Evaluation, draws: bool) -> dict[str, Any]:
    """Everything that the figures depend on, as far as it was used."""
    used, about = vars(e), {}
    if e.model is not None:
        about |= {k: e.info[k] for k in ("checkpoint", "sha256", "global_step")}
        about |= {"model": f"{type(e.model).__module__}.{type(e.model).__name__}", "weights": e.weights_used}
        about["parameters"] = count_params(e.model)
        about["training"] = {"minutes": e.info["minutes"], **e.info["origin"]}
    if draws:
        about["sampling"] = _sampling(e)
    if "drawn" in used:
        about["drawn"] = e.drawn.about
    if "real" in used:
        about["real"] = e.real.about
    if "network" in used:
        about["features"] = e.network.about()
    notes = [note for name in ("drawn", "real") if name in used for note in used[name].notes]
    return {**about, "notes": list(dict.fromkeys([*e.notes, *notes])), **provenance(e.device)}


def _sampling(e: Evaluation) -> dict[str, Any]:
    """How the pictures were drawn, defaults written out, by which code, and what it cost."""
    cost, drawers = e.plan.folder / "cost.json", drawn_by(e.plan.folder)
    others = sorted({str(d["commit"] or "an unknown commit") for d in drawers if d["commit"] != commit()})
    if others:
        e.notes.append(f"pictures in {e.plan.folder} were drawn by {', '.join(others)}, measured by {commit()}")
    return {
        "n": len(e.plan.seeds),
        "seed": e.plan.seeds.start,
        "asked_by": e.plan.conditional,
        "knobs": {**settings(e.plan), **e.plan.options},
        "batch_size": e.plan.batch_size,
        "drawn_by": drawers,
        "cost": json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else None,
    }
