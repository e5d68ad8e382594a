"""Perceptual distances: LPIPS over VGG16, and an image-gradient distance that needs no weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"
# layers of torchvision's vgg16().features up to the ReLU of each block, by official slice
_SLICES = {"slice1": (0, 4), "slice2": (4, 9), "slice3": (9, 16), "slice4": (16, 23), "slice5": (23, 30)}
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
_CHANNELS = (64, 128, 256, 512, 512)


class ScalingLayer(nn.Module):
    """Images in [-1, 1] to the statistics that VGG16 was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """One non-negative weight per feature channel; the dropout belongs to LPIPS' own training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class VGG16Features(nn.Module):
    """[B, 3, H, W] -> the activations after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in _VGG16:
            if item == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
            width = item
        for name, (start, stop) in _SLICES.items():
            block = nn.Sequential()
            for i in range(start, stop):
                block.add_module(str(i), layers[i])  # torchvision's index is part of the official key
            self.add_module(name, block)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for name in _SLICES:
            x = getattr(self, name)(x)
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018, equation 1), version 0.1 over VGG16.

    Weights come from a checkpoint (`load_state_dict`) or from `load_pretrained`; the constructor reads nothing. The
    module is frozen and stays in evaluation mode whatever its parents do, as its dropout is not meant for use.
    """

    def __init__(self, use_dropout: bool = True) -> None:
        super().__init__()
        if not use_dropout:
            raise ValueError("LPIPS: got use_dropout False, expected True (the official key names depend on it)")
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, channels in enumerate(_CHANNELS):
            self.add_module(f"lin{i}", NetLinLayer(channels))
        self.requires_grad_(False)
        super().train(False)
        self.has_weights = False

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.has_weights |= f"{prefix}net.slice1.0.weight" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  (official name)
        """Two batches [B, 3, H, W] in [-1, 1] -> distances [B, 1, 1, 1]."""
        features = zip(
            self.net(self.scaling_layer(input)),
            self.net(self.scaling_layer(target)),
            range(len(_CHANNELS)),
            strict=True,
        )
        total = input.new_zeros(())
        for a, b, i in features:
            difference = (_unit(a) - _unit(b)) ** 2
            total = total + getattr(self, f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return total

    def load_pretrained(self, vgg16: str | Path | None = None) -> LPIPS:
        """Trained weights: VGG16 from torchvision's file, the linear layers from the `lpips` or `torchmetrics` package.

        Args:
            vgg16: path of the file; None looks in torch's cache, then in `models/lpips/`.

        Raises:
            UserError: a file is missing; the message says where to get it and where to put it.
        """
        state = torch.load(_find_vgg16(vgg16), map_location="cpu", weights_only=True)
        for name in _SLICES:
            for i, layer in getattr(self.net, name).named_children():
                if isinstance(layer, nn.Conv2d):
                    layer.load_state_dict({k: state[f"features.{i}.{k}"] for k in ("weight", "bias")})
        linear = torch.load(_find_linear(), map_location="cpu", weights_only=True)
        for i in range(len(_CHANNELS)):
            getattr(self, f"lin{i}").load_state_dict({"model.1.weight": linear[f"lin{i}.model.1.weight"]})
        self.has_weights = True
        return self


def _unit(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Features of length 1 along the channels."""
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + eps)


def _find_vgg16(path: str | Path | None) -> Path:
    cache = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    places = [Path(path)] if path is not None else [cache, Path("models/lpips") / VGG16_FILE]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"LPIPS needs torchvision's VGG16 weights: download {VGG16_URL} to {' or '.join(map(str, places))}; "
        "or train without them by lossconfig.params.perceptual_loss=pixel_gradient (or none)"
    )


def _find_linear() -> Path:
    for package, inside in (
        ("lpips", "weights/v0.1/vgg.pth"),
        ("torchmetrics", "functional/image/lpips_models/vgg.pth"),
    ):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if (Path(root) / inside).is_file():
                return Path(root) / inside
    raise UserError("LPIPS needs its linear layers: pip install lpips (or torchmetrics)")


class PixelGradient(nn.Module):
    """Mean absolute difference of the image gradients at several scales: sharp edges without any weights.

    The gradient difference loss of Mathieu et al. 2016 (equation 6, with the sign kept) on an image pyramid.

    Args:
        scales: levels of the pyramid, each half the size of the one above; levels under 4 pixels are left out.
    """

    def __init__(self, scales: int = 3) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  (as LPIPS)
        """Two batches [B, C, H, W] -> distances [B, 1, 1, 1]."""
        difference, total, n = input - target, input.new_zeros(()), 0
        for _ in range(self.scales):
            if n and min(difference.shape[-2:]) < 4:
                break
            for axis in (2, 3):
                total = total + difference.diff(dim=axis).abs().mean(dim=(1, 2, 3), keepdim=True)
            difference, n = F.avg_pool2d(difference, 2, ceil_mode=True), n + 1
        return total / n


def make_perceptual_loss(name: str) -> nn.Module | None:
    """The distance of that name: lpips, pixel_gradient or none.

    Raises:
        ValueError: another name.
    """
    makers = {"lpips": LPIPS, "pixel_gradient": PixelGradient, "none": lambda: None}
    if name not in makers:
        raise ValueError(f"perceptual_loss: got {name!r}, expected one of {', '.join(makers)}")
    return makers[name]()
