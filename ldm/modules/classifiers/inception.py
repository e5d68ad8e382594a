"""Inception-v3 ("Rethinking the Inception Architecture for Computer Vision", 2015; torchvision's key names) and v4
("Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", 2016; timm's key names)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import ConvBN, ImageNetwork, Outputs, Parallel, is_small, scaled

Kernel = int | tuple[int, int]
Step = Any  # "avg" | "max" | (name, channels, kernel[, stride]) | [step, step]: two convolutions side by side
Scale = Callable[[int], int]


def same(kernel: Kernel) -> Kernel:
    """The padding that keeps the size at stride 1."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


class Mixed(nn.Module):
    """Chains of layers side by side, their outputs concatenated.

    Convolutions of stride 1 keep the size, those of stride 2 and the max pool are not padded.

    Args:
        in_channels: of the input.
        chains: each a list of steps (see `Step`); names become state-dict keys.
        scale: channels of the paper -> channels here.
        count_pad: whether the average pool counts the zeros at the border.
    """

    def __init__(self, in_channels: int, chains: Sequence[Sequence[Step]], scale: Scale, count_pad: bool) -> None:
        super().__init__()
        self.count_pad, self.out_channels = count_pad, 0
        self.chains: list[list[Any]] = []
        for chain in chains:
            at, names = in_channels, []
            for step in chain:
                if isinstance(step, str):
                    names.append(step)
                    continue
                fork = step if isinstance(step, list) else [step]
                names.append([s[0] for s in fork])
                at = sum(self._add(at, scale, *s) for s in fork)
            self.chains.append(names)
            self.out_channels += at

    def _add(self, at: int, scale: Scale, name: str, channels: int, kernel: Kernel, stride: int = 1) -> int:
        out = scale(channels)
        conv = ConvBN(at, out, kernel, stride, same(kernel) if stride == 1 else 0)
        # timm keeps the pool of this branch in a Sequential before its convolution
        self.add_module(name.partition(".")[0], nn.Sequential(nn.Identity(), conv) if "." in name else conv)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, h, w]."""
        outputs = []
        for chain in self.chains:
            h = x
            for step in chain:
                if step == "avg":
                    h = F.avg_pool2d(h, 3, 1, 1, count_include_pad=self.count_pad)
                elif step == "max":
                    h = F.max_pool2d(h, 3, 2)
                else:
                    parts = [getattr(self, name.partition(".")[0])(h) for name in step]
                    h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(h)
        return torch.cat(outputs, 1)


# --- version 3 --------------------------------------------------------------------------------------------------------


def v3_a(pool: int) -> list[list[Step]]:
    """Figure 5: 5x5 filters as two 3x3."""
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["avg", ("branch_pool", pool, 1)],
    ]


def v3_c(c: int) -> list[list[Step]]:
    """Figure 6: 7x7 filters as 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    steps = [c, c, c, c, 192], [1, column, row, column, row]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, row), ("branch7x7_3", 192, column)],
        [(f"branch7x7dbl_{i}", channels, k) for i, (channels, k) in enumerate(zip(*steps, strict=True), 1)],
        ["avg", ("branch_pool", 192, 1)],
    ]


V3_B: list[list[Step]] = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["max"],
]
V3_D: list[list[Step]] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    ["max"],
]
# figure 7: the wide modules on the coarsest grid
V3_E: list[list[Step]] = [
    [("branch1x1", 320, 1)],
    [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
    [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ],
    ["avg", ("branch_pool", 192, 1)],
]
V3: dict[str, list[list[Step]]] = {
    "Mixed_5b": v3_a(32),
    "Mixed_5c": v3_a(64),
    "Mixed_5d": v3_a(64),
    "Mixed_6a": V3_B,
    "Mixed_6b": v3_c(128),
    "Mixed_6c": v3_c(160),
    "Mixed_6d": v3_c(160),
    "Mixed_6e": v3_c(192),
    "Mixed_7a": V3_D,
    "Mixed_7b": V3_E,
    "Mixed_7c": V3_E,
}
AUX_AFTER = "Mixed_6e"


class AuxHead(nn.Module):
    """Logits from the 17x17 grid, or a smaller one where the images are: [B, C, H, W] -> [B, num_classes]."""

    def __init__(self, in_channels: int, num_classes: int, scale: Scale) -> None:
        super().__init__()
        self.conv0 = ConvBN(in_channels, scale(128), 1)
        self.conv1 = ConvBN(scale(128), scale(768), 5)
        self.fc = nn.Linear(scale(768), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # 5x5 positions are what conv1 needs
        x = F.avg_pool2d(x, 5, 3) if min(x.shape[2:]) >= 17 else F.adaptive_avg_pool2d(x, 5)
        return self.fc(self.conv1(self.conv0(x)).mean((2, 3)))


class InceptionV3(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes], in training mode `Outputs(logits, (aux,))`.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "imagenet" (299x299 images, 8x smaller after the stem) or "small" (2x smaller).
        aux_logits: with the auxiliary head.
        dropout: before the last layer.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        aux_logits: bool = True,
        dropout: float = 0.5,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=13 if small else 75)

        def scale(channels: int) -> int:
            return scaled(channels, width)

        c, pad = [scale(v) for v in (32, 32, 64, 80, 192)], 1 if small else 0
        self.Conv2d_1a_3x3 = ConvBN(in_channels, c[0], 3, 1 if small else 2, pad)
        self.Conv2d_2a_3x3 = ConvBN(c[0], c[1], 3, padding=pad)
        self.Conv2d_2b_3x3 = ConvBN(c[1], c[2], 3, padding=1)
        self.maxpool1 = nn.Identity() if small else nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvBN(c[2], c[3], 1)
        self.Conv2d_4a_3x3 = ConvBN(c[3], c[4], 3, padding=pad)
        self.maxpool2 = nn.MaxPool2d(3, 2, pad)
        at = c[4]
        for name, chains in V3.items():
            block = Mixed(at, chains, scale, count_pad=True)
            self.add_module(name, block)
            at = block.out_channels
            if name == AUX_AFTER and aux_logits:
                self.AuxLogits = AuxHead(at, num_classes, scale)
        self.aux_logits = aux_logits
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(at, num_classes)

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out the auxiliary head of pretrained weights where this network has none."""
        return state if self.aux_logits else {k: v for k, v in state.items() if not k.startswith("AuxLogits.")}

    def forward(self, x: Tensor) -> Tensor | Outputs:
        self.check(x.shape)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        aux = None
        for name in V3:
            x = getattr(self, name)(x)
            if name == AUX_AFTER and self.training and self.aux_logits:
                aux = self.AuxLogits(x)
        logits = self.fc(self.dropout(x.mean((2, 3))))
        return logits if aux is None else Outputs(logits, (aux,))


def inception_v3(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    aux_logits: bool = True,
    dropout: float = 0.5,
) -> InceptionV3:
    """Inception-v3; parameters as in the class."""
    return InceptionV3(num_classes, in_channels, width, stem, aux_logits, dropout)


# --- version 4 --------------------------------------------------------------------------------------------------------


def chain(at: int, scale: Scale, *steps: tuple[Any, ...]) -> nn.Sequential:
    """ConvBN after ConvBN; steps are (channels, kernel[, stride[, padding]]), padded as in `Mixed` if not said."""
    layers = []
    for channels, kernel, *rest in steps:
        stride = rest[0] if rest else 1
        padding = rest[1] if len(rest) > 1 else same(kernel) if stride == 1 else 0
        layers.append(ConvBN(at, scale(channels), kernel, stride, padding))
        at = scale(channels)
    return nn.Sequential(*layers)


def mean_pool() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def v4_stem(in_channels: int, scale: Scale, small: bool) -> tuple[list[nn.Module], int]:
    """Figure 3; the small one has a stride of 2 where the paper's has 8."""
    s, p = (1, 1) if small else (2, 0)
    c32, c64, c96, c192 = (scale(c) for c in (32, 64, 96, 192))
    layers: list[nn.Module] = [
        ConvBN(in_channels, c32, 3, s, p),
        ConvBN(c32, c32, 3, padding=p),
        ConvBN(c32, c64, 3, padding=1),
        Parallel(maxpool=nn.MaxPool2d(3, 2), conv=ConvBN(c64, c96, 3, 2)),
    ]
    at = c64 + c96
    layers.append(
        Parallel(
            branch0=chain(at, scale, (64, 1), (96, 3, 1, p)),
            branch1=chain(at, scale, (64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1, p)),
        )
    )
    at = 2 * c96
    layers.append(Parallel(conv=ConvBN(at, c192, 3, s, p), maxpool=nn.MaxPool2d(3, s, p)))
    return layers, at + c192


def v4_a(at: int, scale: Scale) -> tuple[nn.Module, int]:
    """Figure 4."""
    block = Parallel(
        branch0=ConvBN(at, scale(96), 1),
        branch1=chain(at, scale, (64, 1), (96, 3)),
        branch2=chain(at, scale, (64, 1), (96, 3), (96, 3)),
        branch3=nn.Sequential(mean_pool(), ConvBN(at, scale(96), 1)),
    )
    return block, 4 * scale(96)


def v4_reduce_a(at: int, scale: Scale) -> tuple[nn.Module, int]:
    """Figure 7 with k, l, m, n = 192, 224, 256, 384."""
    block = Parallel(
        branch0=ConvBN(at, scale(384), 3, 2),
        branch1=chain(at, scale, (192, 1), (224, 3), (256, 3, 2)),
        branch2=nn.MaxPool2d(3, 2),
    )
    return block, scale(384) + scale(256) + at


def v4_b(at: int, scale: Scale) -> tuple[nn.Module, int]:
    """Figure 5."""
    row, column = (1, 7), (7, 1)
    block = Parallel(
        branch0=ConvBN(at, scale(384), 1),
        branch1=chain(at, scale, (192, 1), (224, row), (256, column)),
        branch2=chain(at, scale, (192, 1), (192, column), (224, row), (224, column), (256, row)),
        branch3=nn.Sequential(mean_pool(), ConvBN(at, scale(128), 1)),
    )
    return block, scale(384) + 2 * scale(256) + scale(128)


def v4_reduce_b(at: int, scale: Scale) -> tuple[nn.Module, int]:
    """Figure 8."""
    block = Parallel(
        branch0=chain(at, scale, (192, 1), (192, 3, 2)),
        branch1=chain(at, scale, (256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2)),
        branch2=nn.MaxPool2d(3, 2),
    )
    return block, scale(192) + scale(320) + at


def v4_c(at: int, scale: Scale) -> tuple[nn.Module, int]:
    """Figure 6."""
    row, column = (1, 3), (3, 1)
    chains: list[list[Step]] = [
        [("branch0", 256, 1)],
        [("branch1_0", 384, 1), [("branch1_1a", 256, row), ("branch1_1b", 256, column)]],
        [
            ("branch2_0", 384, 1),
            ("branch2_1", 448, column),
            ("branch2_2", 512, row),
            [("branch2_3a", 256, row), ("branch2_3b", 256, column)],
        ],
        ["avg", ("branch3.1", 256, 1)],
    ]
    block = Mixed(at, chains, scale, count_pad=False)
    return block, block.out_channels


class InceptionV4(ImageNetwork):
    """Images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        num_classes: outputs.
        in_channels: of the images.
        width: multiplies all channels.
        stem: "imagenet" (299x299 images, 8x smaller after the stem) or "small" (2x smaller).
        dropout: before the last layer (the paper: 0.2).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        dropout: float = 0.0,
    ) -> None:
        small = is_small(stem)
        super().__init__(num_classes, in_channels, min_size=15 if small else 75)

        def scale(channels: int) -> int:
            return scaled(channels, width)

        layers, at = v4_stem(in_channels, scale, small)
        for build in [v4_a] * 4 + [v4_reduce_a] + [v4_b] * 7 + [v4_reduce_b] + [v4_c] * 3:
            block, at = build(at, scale)
            layers.append(block)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(at, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x.shape)
        return self.last_linear(self.dropout(self.features(x).mean((2, 3))))


def inception_v4(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str = "imagenet",
    dropout: float = 0.0,
) -> InceptionV4:
    """Inception-v4; parameters as in the class."""
    return InceptionV4(num_classes, in_channels, width, stem, dropout)
