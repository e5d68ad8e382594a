"""Classifiers against timm and torchvision: the training step of ResNet-18, and a forward pass of every twin.

python benchmarks/classifiers.py train          (ResNet-18, 32x32, batch 128, fp32; timm's network with the same stem)
python benchmarks/classifiers.py infer          (every network that torchvision has too, batch 8)
python benchmarks/classifiers.py infer --only resnet50 vgg16_bn

timm's side is what its train.py does for these settings: SGD with Nesterov, label smoothing, no EMA, default layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report  # noqa: E402
from ldm.published import CLASSIFIERS, LARGER, TORCHVISION  # noqa: E402
from ldm.util import get_obj_from_str  # noqa: E402

BATCH, CLASSES = 128, 10
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def ours() -> Callable[[], None]:
    """The recipe's own loss, groups and memory format."""
    from ldm.models.classifier import Classifier

    network = {"target": f"{CLASSIFIERS}.resnet.resnet18", "params": {"stem": "small"}}
    sgd = {"target": "torch.optim.SGD", "params": {k: v for k, v in SGD.items() if k != "lr"}}
    model = Classifier(network, CLASSES, label_smoothing=0.1, optimizer_config=sgd)
    model.configure_model()
    model.learning_rate = SGD["lr"]
    optimizer = model.build_optimizer(model.trained_parameters())
    batch = {"image": torch.rand(BATCH, 32, 32, 3) * 2 - 1, "class_label": torch.randint(CLASSES, (BATCH,))}

    def step() -> None:
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timms() -> Callable[[], None]:
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    model = timm.create_model("resnet18", num_classes=CLASSES)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=SGD["lr"], momentum=0.9, weight_decay=5e-4)
    loss_of = LabelSmoothingCrossEntropy(0.1)
    x, y = torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(net: nn.Module, x: torch.Tensor, channels_last: bool) -> Callable[[], None]:
    net.eval()
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run() -> None:
        net(x)

    return run


def infer(only: list[str], rounds: int) -> None:
    import torchvision

    for file, names in TORCHVISION.items():
        for name in names:
            if only and name not in only:
                continue
            size = LARGER.get(name, 224)
            x = torch.rand(8, 3, size, size)
            plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            sides = {
                "ldm": forward(get_obj_from_str(f"{CLASSIFIERS}.{file}.{name}")(), x, True),
                "torchvision": forward(getattr(torchvision.models, name)(**plain), x, False),
            }
            report(f"{name}, 8 images of {size}x{size}", compare(sides, rounds), "ldm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("train", "infer"))
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.case == "infer":
        infer(args.only, args.rounds)
    else:
        sides = {"ldm": ours(), "timm": timms()}
        report(f"training step of ResNet-18, 32x32, batch {BATCH}", compare(sides, args.rounds), "ldm")


if __name__ == "__main__":
    main()
