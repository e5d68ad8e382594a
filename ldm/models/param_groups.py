"""Which parameters of a network are trained, how fast, and with what weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ldm.optim import ROLE
from ldm.util import UserError, suggest

Group = dict[str, Any]
# the name of a block: up to the first component that is a number or ends in _number (layer1.0, encoder_layer_3)
BLOCK = re.compile(r"^(.*?(?:\.|_)\d+)\.")
OUTSIDE = 4  # channels of a picture or latent at most


def spared(name: str, p: nn.Parameter) -> bool:
    """Biases, norms, class tokens and position embeddings are not decayed."""
    return p.ndim < 2 or name.endswith(("token", "embedding", "pos_embed"))


def head(net: nn.Module, num_classes: int) -> str:
    """The name of the last layer: the last one with `num_classes` outputs.

    Raises:
        UserError: there is none.
    """
    widths = {n: getattr(m, "out_features", getattr(m, "out_channels", None)) for n, m in net.named_modules()}
    found = [n for n, width in widths.items() if width == num_classes and list(net.get_submodule(n).parameters())]
    if not found:
        raise UserError(f"train_only: {type(net).__name__} has no layer with {num_classes} outputs: name it instead")
    return found[-1]


def layer_numbers(net: nn.Module) -> dict[str, int]:
    """Parameter name -> depth of its block, 0 at the images."""
    numbers: dict[str, int] = {}
    depth, block = 0, None
    for name, p in net.named_parameters():
        match = BLOCK.match(name)
        key = match[1] if match else name.rpartition(".")[0]
        if p.ndim >= 2 and not spared(name, p) and key != block:
            depth, block = depth + (block is not None), key
        numbers[name] = depth
    return numbers


def tables(net: nn.Module) -> set[int]:
    """`id` of each embedding's weight: its rows are no directions of a matrix."""
    return {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}


def by_role(net: nn.Module, params: Iterable[nn.Parameter]) -> list[Group]:
    """Groups with `hidden`, for optimisers that orthogonalise: true for weights that are matrices or filters.

    Not hidden are tables (embeddings) and what touches pictures, latents or logits: a side of at most four channels.
    """
    apart = tables(net)
    names = {id(p): n for n, p in net.named_parameters()}
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in params:
        matrix = p.ndim >= 2 and names.get(id(p), "").endswith("weight") and id(p) not in apart
        parts[matrix and min(p.shape[:2]) > OUTSIDE].append(p)
    return [{"params": part, ROLE: hidden} for hidden, part in parts.items() if part]


def freeze(net: nn.Module, train_only: str | Sequence[str], num_classes: int) -> None:
    """Leaves only parameters whose names start with one of `train_only` to be trained; `head`: the last layer.

    Raises:
        UserError: a name that fits no parameter.
    """
    wanted = [train_only] if isinstance(train_only, str) else list(train_only)
    names = [n for n, _ in net.named_parameters()]
    prefixes = [head(net, num_classes) if w == "head" else w for w in wanted]
    for prefix in prefixes:
        if not any(_below(n, prefix) for n in names):
            known = {n.partition(".")[0] for n in names} | {n.rpartition(".")[0] for n in names}
            raise UserError(
                f"model.params.train_only: {type(net).__name__} has no {prefix!r}{suggest(prefix, known)}; "
                f"it has {', '.join(dict.fromkeys(n.partition('.')[0] for n in names))}, or head for the last layer"
            )
    for name, p in net.named_parameters():
        p.requires_grad_(any(_below(name, prefix) for prefix in prefixes))


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rest_frozen_parts(net: nn.Module) -> None:
    """Puts what is not trained into evaluation mode: its batch norms keep their statistics, its dropout is off."""
    for module in net.modules():
        params = list(module.parameters())
        if params and not any(p.requires_grad for p in params):
            module.eval()


def groups(
    net: nn.Module,
    params: Iterable[nn.Parameter],
    lr: float,
    layer_decay: float = 1.0,
    num_classes: int | None = None,
) -> list[Group]:
    """Parameter groups: no weight decay where it does harm, and slower learning near the images.

    Args:
        net: the network.
        params: what is trained; those outside `net` are one more group.
        lr: learning rate of the last layer.
        layer_decay: each layer learns so many times as fast as the next (Clark et al. 2020, section 3.4.1).
        num_classes: outputs of the last layer, for `hidden`; None: it is not asked for.

    Returns:
        groups with `params` and, where they differ from the optimiser's own, `weight_decay` and `lr`; also `hidden` (a
        weight between the first and the last layer) if `num_classes` is given.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"model.params.layer_decay must be above 0 and at most 1, got {layer_decay}")
    names = {id(p): n for n, p in net.named_parameters()}
    numbers = layer_numbers(net)
    deepest = max(numbers.values(), default=0)
    made: dict[tuple[Any, ...], Group] = {}
    for p in params:
        name = names.get(id(p), "")
        no_decay = spared(name, p)
        depth = numbers.get(name, deepest)
        last = p.shape[:1] == (num_classes,) and depth == deepest
        hidden = num_classes is not None and not no_decay and depth > 0 and not last
        scale = layer_decay ** (deepest - depth)
        group = made.setdefault((no_decay, hidden, scale), {"params": []})
        group["params"].append(p)
        if num_classes is not None:
            group[ROLE] = hidden
        if no_decay:
            group["weight_decay"] = 0.0
        if layer_decay != 1:
            group["lr"] = lr * scale
    return [made[k] for k in sorted(made)]
