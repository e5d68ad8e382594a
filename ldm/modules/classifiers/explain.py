"""Where a classifier looks: Grad-CAM for convolutional networks, attention rollout for Vision Transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
        net: a Vision Transformer of this project, torchvision or timm, in evaluation mode.
        x: what it takes, [B, C, S, S].

    Returns:
        [B, g, g] in [0, 1], g patches a side, each map scaled to a maximum of 1.

    Raises:
        ValueError: no attention layers, or layers that are not all of one class token and the patches of a square:
            windows, merged patches, further tokens.
    """
    layers = [m for m in net.modules() if _is_attention(m)]
    if not layers:
        raise ValueError(f"{type(net).__name__} has no attention layers")
    attention: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs: attention.append(_weights(m, args, kwargs)), with_kwargs=True
        )
        for m in layers
    ]
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    length = attention[0].shape[-1] if attention else 0
    side = math.isqrt(max(0, length - 1))
    if not side or 1 + side**2 != length or any(a.shape != (len(x), length, length) for a in attention):
        raise ValueError(f"{type(net).__name__} does not attend from one class token to the patches of a square")
    flow = torch.eye(length, device=x.device)
    for a in attention:
        flow = (a.float() + torch.eye(length, device=x.device)) / 2 @ flow
    maps = flow[:, 0, 1:].unflatten(1, (side, side))
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def _is_attention(module: nn.Module) -> bool:
    """Layers of this project and of torch, and those of timm and torchvision by their name."""
    return isinstance(module, (MultiHeadAttention, nn.MultiheadAttention)) or type(module).__name__.endswith(
        "Attention"
    )


def _weights(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The attention of a layer that is about to be called, averaged over heads, [B, L, L].

    Raises:
        ValueError: a layer of a kind that is not known here.
    """
    if isinstance(module, MultiHeadAttention):
        return module.weights(args[0]).mean(1)
    x = args[0] if args else kwargs.get("query")
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"{type(module).__name__} does not attend to a sequence")
    if isinstance(module, nn.MultiheadAttention):
        x = x if module.batch_first else x.transpose(0, 1)
        if module.in_proj_weight is None:
            raise ValueError("MultiheadAttention over sequences of different sizes")
        q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        q, k = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k))
    elif type(module).__name__ == "Attention" and isinstance(getattr(module, "qkv", None), nn.Linear):  # timm's
        q, k, _ = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (getattr(module, name, nn.Identity())(t) for name, t in (("q_norm", q), ("k_norm", k)))
    else:
        raise ValueError(f"{type(module).__name__} is no attention that is known here")
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)


def attends(net: nn.Module) -> bool:
    """Whether the network is a transformer: Grad-CAM's last map would be the patches before any attention."""
    return any(_is_attention(m) for m in net.modules())
