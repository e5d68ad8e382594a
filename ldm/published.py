"""Published accuracies of the networks of this project on ImageNet, and what a network costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config

CLASSIFIERS = "ldm.modules.classifiers"
# networks whose figure is that of torchvision's IMAGENET1K_V1 weights, by our file
TORCHVISION = {
    "alexnet": ("alexnet",),
    "vgg": ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    "googlenet": ("googlenet",),
    "inception": ("inception_v3",),
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "vit": ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"),
}
TIMM = "timm, results/results-imagenet.csv"
# label -> (file.function, its parameters, top-1 per cent of one crop of the validation set, where from)
OTHERS: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "nin": ("nin.nin", {}, 59.36, "the authors' Caffe model (gist.github.com/mavenlin/d802a5849de39225bcc6)"),
    "nin, norm: bn": ("nin.nin", {"norm": "bn"}, 62.6, "Torch model (gist.github.com/szagoruyko/0f5b4c5e2d2b18472854)"),
    "inception_v4": ("inception.inception_v4", {}, 80.156, f"{TIMM} (inception_v4.tf_in1k)"),
    "seresnet18": ("resnet.seresnet18", {}, 71.766, f"{TIMM} (legacy_seresnet18.in1k)"),
    "seresnet34": ("resnet.seresnet34", {}, 74.808, f"{TIMM} (legacy_seresnet34.in1k)"),
    "seresnet50": ("resnet.seresnet50", {}, 77.644, f"{TIMM} (legacy_seresnet50.in1k)"),
    "seresnet101": ("resnet.seresnet101", {}, 78.386, f"{TIMM} (legacy_seresnet101.in1k)"),
    "seresnet152": ("resnet.seresnet152", {}, 78.660, f"{TIMM} (legacy_seresnet152.in1k)"),
    "senet154": ("senet.senet154", {}, 81.308, f"{TIMM} (legacy_senet154.in1k)"),
}
LARGER = {"inception_v3": 299, "inception_v4": 299}  # pixels, where they are not 224
AUXILIARY = ("aux", "AuxLogits")


@dataclass
class Figure:
    """A row of the comparison.

    Attributes:
        label: name of network or run.
        params: parameters that an answer needs, auxiliary heads left out.
        gflops: for one image, counted by torch: a multiplication and an addition are two.
        top1: per cent, or None.
        source: where top1 comes from.
        rate: images per second, or None.
        minutes: of training, or None.
    """

    label: str
    params: int
    gflops: float
    top1: float | None
    source: str
    rate: float | None = None
    minutes: float | None = None


def parameters(net: nn.Module) -> int:
    """Parameters without those of auxiliary heads, which serve in training only."""
    return sum(p.numel() for n, p in net.named_parameters() if not n.startswith(AUXILIARY))


def gflops(net: nn.Module, x: Tensor) -> float:
    """GFLOP of one image of the batch x [B, C, H, W] (`torch.utils.flop_counter`)."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net.eval()(x)
    return counter.get_total_flops() / len(x) / 1e9


def published() -> list[Figure]:
    """All networks of this project with a published top-1 figure on ImageNet, built without weights."""
    from torchvision.models import get_model_weights

    rows: list[tuple[str, str, dict[str, Any], float, str]] = []
    for file, names in TORCHVISION.items():
        for name in names:
            meta = get_model_weights(name)["IMAGENET1K_V1"].meta
            source = "torchvision, IMAGENET1K_V1"
            rows.append((name, f"{file}.{name}", {}, meta["_metrics"]["ImageNet-1K"]["acc@1"], source))
    rows += [(label, *row) for label, row in OTHERS.items()]
    figures = []
    for label, target, params, top1, source in rows:
        with torch.device("meta"):
            net = instantiate_from_config({"target": f"{CLASSIFIERS}.{target}", "params": params})
            size = LARGER.get(label, 224)
            figures.append(Figure(label, parameters(net), gflops(net, torch.zeros(1, 3, size, size)), top1, source))
    return figures
