"""Where a classifier looks: Grad-CAM for convolutional networks, attention rollout for Vision Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.classifiers.transformer import MultiHeadAttention


def first_logits(out: Any) -> Tensor:
    """The logits of a network that may also return auxiliary ones."""
    return out if isinstance(out, Tensor) else out[0]


def grad_cam(net: nn.Module, x: Tensor, classes: Sequence[int] | Tensor | None = None) -> Tensor:
    """relu(sum over channels of weight * activation), the weight being the logit's mean gradient ("Grad-CAM: Visual
    Explanations from Deep Networks", Selvaraju et al. 2017, equations 1 and 2).

    Args:
        net: in evaluation mode. The layer is the last one whose output is a map of more than one position.
        x: what the network takes, [B, C, H, W].
        classes: whose logit is explained; None: the largest one.

    Returns:
        [B, h, w] in [0, 1], each map scaled to a maximum of 1 (all zero where nothing speaks for the class).

    Raises:
        ValueError: no layer gives a map.
    """
    maps: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1 and out.requires_grad:
            maps[:] = [out]

    hooks = [m.register_forward_hook(keep) for m in net.modules() if not list(m.children())]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = first_logits(net(x.detach().clone().requires_grad_()))
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ValueError(f"{type(net).__name__} has no layer whose output is a map: there is nothing for Grad-CAM")
    index = logits.argmax(1) if classes is None else torch.as_tensor(classes, device=logits.device)
    with torch.inference_mode(False), torch.enable_grad():
        score = logits.gather(1, index.clone()[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, maps[0])
    activation, gradient = maps[0].detach().float(), gradient.float()
    cam = (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def attention_rollout(net: nn.Module, x: Tensor) -> Tensor:
    """How much the class token draws from each patch, through all layers: the product of (A + 1) / 2, A being a layer's
    attention averaged over heads ("Quantifying Attention Flow in Transformers", Abnar and Zuidema 2020, section 3).

    Args:
        net: a Vision Transformer of this project, in evaluation mode.
        x: what it takes, [B, C, S, S].

    Returns:
        [B, g, g] in [0, 1], g patches a side, each map scaled to a maximum of 1.

    Raises:
        ValueError: a network without this project's attention layers.
    """
    layers = [m for m in net.modules() if isinstance(m, MultiHeadAttention)]
    if not layers:
        raise ValueError(f"{type(net).__name__} has no attention layers")
    attention: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: attention.append(m.weights(args[0]).mean(1))) for m in layers]
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    flow = torch.eye(attention[0].shape[-1], device=x.device)
    for a in attention:
        flow = (a.float() + torch.eye(a.shape[-1], device=x.device)) / 2 @ flow
    patches = flow[:, 0, 1:]
    side = round(patches.shape[1] ** 0.5)
    maps = patches.unflatten(1, (side, side))
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def attends(net: nn.Module) -> bool:
    """Whether `attention_rollout` takes the network."""
    return any(isinstance(m, MultiHeadAttention) for m in net.modules())
