"""Weights to start from: `torchvision://IMAGENET1K_V1`, `timm://resnet18.a1_in1k`, a file, or a run of this project."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm import checkpoint
from ldm.models.framework import rank_zero_info
from ldm.util import UserError, suggest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # [0, 1] -> [-1, 1], this project's own range
# torchvision turns the input of these (weights by Google) from its ImageNet statistics back to [-1, 1]
_TRAINED_ON_HALF = ("googlenet", "inception_v3")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def pixel_statistics(weights: str | None, network: str) -> Statistics:
    """(mean, std) in [0, 1] that pretrained weights expect their pixels to be normalised by.

    Args:
        weights: as in `read_weights`. A run of this project: what it was trained with; any other file, or None: this
            project's own range.
        network: name of the builder (`resnet18`).
    """
    kind, _, name = (weights or "").partition("://")
    if kind == "torchvision" and network not in _TRAINED_ON_HALF:
        return IMAGENET
    if kind == "timm":
        config = _fetch(str(weights), lambda: _timm().get_pretrained_cfg(name, allow_unregistered=False))
        return tuple(config.mean), tuple(config.std)
    if name or not kind or not checkpoint.in_project(kind).exists():  # reading the weights says what is wrong
        return HALF
    return _statistics_of_run(checkpoint.read(checkpoint.find_best(kind)))


def _statistics_of_run(content: Mapping[str, Any]) -> Statistics:
    """What a checkpoint says of its pixels; those from before it was noted down have a config that tells."""
    if "pixel_statistics" in content:
        mean, std = content["pixel_statistics"]
        return tuple(mean), tuple(std)
    if not isinstance(content.get("config"), str):
        return HALF
    params = (OmegaConf.to_container(OmegaConf.create(content["config"])).get("model") or {}).get("params") or {}
    weights, normalize = params.get("weights"), params.get("normalize")
    if normalize is None and weights and "://" in weights:
        return pixel_statistics(weights, params["network_config"]["target"].rpartition(".")[2])
    return IMAGENET if normalize == "imagenet" else HALF


def without_source(params: dict[str, Any]) -> dict[str, Any]:
    """A classifier's parameters without `weights`, for a checkpoint that has its own.

    The scale of the pixels that published weights imply stays, as `normalize`; `Classifier.on_load_checkpoint` has that
    of a file.
    """
    weights, normalize = params.get("weights"), params.get("normalize")
    if normalize is None and str(weights).startswith("torchvision://"):
        mean, std = pixel_statistics(weights, params["network_config"]["target"].rpartition(".")[2])
        normalize = [list(mean), list(std)]
    return {**params, "weights": None, "normalize": normalize}


def read_weights(weights: str, network: str) -> dict[str, Tensor]:
    """The state dict that `weights` names.

    Args:
        weights: `torchvision://NAME` (weights of the torchvision function `network`), `timm://name`, a file, or
            a run directory of this project, whose best checkpoint is taken. Of a checkpoint of this project the
            averaged weights are taken where it has them, as in sampling.
        network: name of the builder (`resnet18`).

    Raises:
        UserError: unknown name, no network, or a file that is no checkpoint.
    """
    kind, found, name = weights.partition("://")
    if not found:
        return _network_of_recipe(checkpoint.read_state(checkpoint.find_best(weights)))
    if kind == "torchvision":
        return _from_torchvision(network, name)
    if kind == "timm":
        return _fetch(weights, lambda: _timm().create_model(name, pretrained=True).state_dict())
    raise UserError(f"weights {weights}: expected torchvision://NAME, timm://name, a file or a run directory")


def _network_of_recipe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors of a recipe's, with averaged weights where there are; any other state as it is."""
    if not all(k.startswith(("model.", "model_ema.")) for k in state):
        return state
    chosen, which = checkpoint.choose_weights(state)
    rank_zero_info(f"a checkpoint of this project: its {which} weights")
    return {k.removeprefix("model."): v for k, v in chosen.items()}


def _from_torchvision(network: str, name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights, list_models

    if network not in list_models():
        raise UserError(f"weights torchvision://{name}: torchvision has no {network}{suggest(network, list_models())}")
    known = get_model_weights(network).__members__  # DEFAULT is an alias of one of them
    if name not in known:
        raise UserError(f"weights torchvision://{name}: {network} has {', '.join(known)}")
    url = known[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]  # file names end in the first digits of their SHA-256
        _fetch(url, lambda: torch.hub.download_url_to_file(url, str(path), digest, progress=True))
    return checkpoint.read_state(path)


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as e:
        raise UserError("weights timm://... need the package timm: pip install timm") from e
    return timm


def _fetch(source: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    except Exception as e:  # urllib, requests, huggingface_hub and timm each raise their own
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"{source} cannot be fetched ({reason[:200]}); download it elsewhere, then give the file"
        ) from e


def load_weights(net: nn.Module, weights: str, network: str, num_classes: int, allow_head: bool = False) -> str:
    """Fills `net` strictly; returns "loaded N of M tensors".

    Args:
        net: a classifier. Its method `adapt_state(state) -> state`, if there is one, renames and resizes first.
        weights, network: see `read_weights`.
        num_classes: outputs of `net`.
        allow_head: leave last layers of another class count as they were initialised.

    Raises:
        UserError: another class count without `allow_head`, or any other key that does not fit.
    """
    state = read_weights(weights, network)
    if hasattr(net, "adapt_state"):
        state = net.adapt_state(state)
    state = todays_names(net, state)
    own = net.state_dict()
    for key in own:  # files older than PyTorch 0.4.1 lack these counters
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, own[key])
    heads = [k for k in own if k in state and _differs_in_classes(own[k], state[k], num_classes)]
    if heads and not allow_head:
        raise UserError(
            f"{weights} is for {state[heads[0]].shape[0]} classes, the model has {num_classes} ({', '.join(heads)}): "
            "set model.params.allow_head=true, or give main.py --allow-head, to start the last layer afresh"
        )
    try:
        report = checkpoint.load(net, state, source=weights, allow=tuple(heads))
    except UserError as e:  # its advice is a flag of --init-from
        raise UserError(str(e).partition(" --allow-partial")[0]) from e
    return report + (f"; fresh: {', '.join(heads)}" if heads else "")


def todays_names(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names that the network has today, where it knows itself how its older files called them.

    torchvision's networks rename while they load (`_load_from_state_dict`, load hooks), which is too late for a check
    of the names: their code runs here first, on a state of our own. It fills what fits of `net` on the way.
    """
    own, renamed = net.state_dict().keys(), dict(state)
    if renamed.keys() >= own:
        return renamed
    for key in [k for k in renamed if k not in own]:  # torchvision renames these outside of its DenseNet
        new = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
        if new in own:
            renamed[new] = renamed.pop(key)
    for name, module in net.named_modules():
        changed = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        if (changed and not type(module).__module__.startswith("torch.nn.")) or module._load_state_dict_pre_hooks:
            module._load_from_state_dict(renamed, f"{name}." if name else "", {}, False, [], [], [])
    return renamed


def _differs_in_classes(own: Tensor, given: Tensor, num_classes: int) -> bool:
    return own.ndim > 0 and own.shape[0] == num_classes != given.shape[0] and own.shape[1:] == given.shape[1:]
