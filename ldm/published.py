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
    "alexnet, norm: bn": (
        "alexnet.alexnet",
        {"norm": "bn"},
        60.1,
        "Caffe model of Simon et al. 2016 (arxiv.org/abs/1612.01452), which has batch norms after hidden layers too",
    ),
    "nin": ("nin.nin", {}, 59.36, "the authors' Caffe model (gist.github.com/mavenlin/d802a5849de39225bcc6)"),
    "nin, norm: bn": ("nin.nin", {"norm": "bn"}, 62.6, "Torch model (gist.github.com/szagoruyko/0f5b4c5e2d2b18472854)"),
    "inception_v4": ("inception.inception_v4", {}, 80.156, f"{TIMM} (inception_v4.tf_in1k)"),
    "seresnet18": ("resnet.seresnet18", {}, 71.766, f"{TIMM} (legacy_seresnet18.in1k)"),
    "seresnet34": ("resnet.seresnet34", {}, 74.808, f"{TIMM} (legacy_seresnet34.in1k)"),
    "seresnet50": ("resnet.seresnet50", {}, 77.644, f"{TIMM} (legacy_seresnet50.in1k)"),
    "seresnet101": ("resnet.seresnet101", {}, 78.386, f"{TIMM} (legacy_seresnet101.in1k)"),
    "seresnet152": ("resnet.seresnet152", {}, 78.660, f"{TIMM} (legacy_seresnet152.in1k)"),
    "senet154": ("senet.senet154", {}, 81.308, f"{TIMM} (legacy_senet154.in1k)"),
    "vit_ti_16": ("vit.vit_ti_16", {}, 72.172, f"{TIMM} (deit_tiny_patch16_224.fb_in1k)"),
    "vit_s_16": ("vit.vit_s_16", {}, 79.844, f"{TIMM} (deit_small_patch16_224.fb_in1k)"),
    "vit_s_32": (
        "vit.vit_s_32",
        {},
        75.994,
        f"{TIMM} (vit_small_patch32_224.augreg_in21k_ft_in1k), trained on ImageNet-21k first",
    ),
    "vit_h_14": (
        "vit.vit_h_14",
        {},
        85.708,
        "torchvision, IMAGENET1K_SWAG_LINEAR_V1, trained on 3.6 billion pictures of Instagram first",
    ),
}
# the networks of this project without such a figure, and why
WITHOUT = {
    "enet, enet_encoder": "only as a bubble of a chart (Canziani et al. 2016, arxiv.org/abs/1605.07678)",
    "plain18, plain34": "only of ten crops (He et al. 2015, table 2)",
    "resnet20, resnet32, resnet44, resnet56, resnet110, plain20, plain32, plain44, plain56, plain110": "for CIFAR-10",
    "fastnet": "this project's own, for 32x32 images",
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
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # the counter overlooks what torch does in one piece: attention on the CPU, and nn.MultiheadAttention
    counter, mha = FlopCounterMode(display=False), torch.backends.mha
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net.eval()(x)
    finally:
        mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / len(x) / 1e9


def left_out() -> str:
    """A sentence on the networks without a published figure, for below the table."""
    return "No published top-1 of one crop: " + "; ".join(f"{names} ({why})" for names, why in WITHOUT.items()) + ".\n"


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
