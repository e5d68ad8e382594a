"""Pictures of what a classifier says: labelled images, heat maps, filters, confusion matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import image_grid, log_txt_as_img

TILE = 128  # pixels of one picture in the image log, so that its label can be read
GREEN, RED = (-1.0, 0.3, -1.0), (1.0, -1.0, -1.0)
NAMED = 32  # classes up to which a confusion matrix is written out


def enlarge(x: Tensor) -> Tensor:
    """Images [B, 1|3, H, W] -> [B, 3, H', W'] in [-1, 1], each pixel a square, the longer side about `TILE`."""
    factor = max(1, TILE // max(x.shape[2:]))
    x = x.float().cpu().clamp(-1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]


def labelled(x: Tensor, captions: Sequence[str], wrong: Sequence[bool]) -> Tensor:
    """Images [B, 1|3, H, W] -> [B, 3, H', W'] enlarged, in a green or red frame, each over its caption."""
    x = enlarge(x)
    frames = torch.tensor([RED if w else GREEN for w in wrong])[:, :, None, None]
    framed = frames.expand(-1, -1, x.shape[2] + 6, x.shape[3] + 6).clone()
    framed[:, :, 3:-3, 3:-3] = x
    return torch.cat([framed, log_txt_as_img((framed.shape[3], 30), captions)], 2)


class Mistakes:
    """The most confident mistakes of an epoch, of which no more than `n` pictures are held at a time.

    Each process of several keeps those of its own share of the data; what is drawn is the first one's.

    Args:
        n: pictures.
    """

    def __init__(self, n: int = 16) -> None:
        self.n = n
        self.kept: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forgets the epoch before."""
        self.kept = {}

    @torch.no_grad()
    def update(self, x: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Images [B, C, H, W] in [-1, 1], logits [B, classes], labels [B]; the device is not waited for."""
        sure, predicted = logits.float().softmax(1).max(1)
        found = {"sure": torch.where(predicted == labels, -1.0, sure), "predicted": predicted, "labels": labels, "x": x}
        if self.kept:
            found = {k: torch.cat([self.kept[k], v]) for k, v in found.items()}
        first = found["sure"].argsort(descending=True, stable=True)[: self.n]
        self.kept = {k: v[first] for k, v in found.items()}

    def picture(self, name_of: Callable[[int], str]) -> Tensor | None:
        """[1, 3, H, W] in [-1, 1]: each in a red frame over what was said and what it is; None without a mistake."""
        if not self.kept:
            return None
        wrong = self.kept["sure"] >= 0  # right answers are -1
        sure, predicted, labels = (self.kept[k][wrong].tolist() for k in ("sure", "predicted", "labels"))
        if not sure:
            return None
        rows = zip(sure, predicted, labels, strict=True)
        captions = [f"{name_of(p)} {s:.0%}, is {name_of(label)}" for s, p, label in rows]
        return image_grid(labelled(self.kept["x"][wrong], captions, [True] * len(sure)))[None]


def heat(x: Tensor, maps: Tensor) -> Tensor:
    """Images [B, 1|3, H, W] with maps [B, h, w] in [0, 1] laid over: [B, 3, H', W'], dark blue to yellow."""
    x = enlarge(x)
    maps = F.interpolate(maps.float().cpu()[:, None], x.shape[2:], mode="bilinear", align_corners=False)
    colour = torch.cat([maps * 2 - 1, maps**2 * 1.6 - 1, 0.2 - maps], 1)
    return (0.5 * x.mean(1, keepdim=True) + 0.5 * colour).clamp(-1, 1)


def first_filters(net: nn.Module) -> Tensor | None:
    """The weights [O, C, k, k] of a network's first layer that has such, a convolution or a whitening; None: none."""
    weights = (getattr(m, "weight", None) for m in net.modules())
    return next((w for w in weights if isinstance(w, Tensor) and w.ndim == 4), None)


def filter_picture(weight: Tensor) -> Tensor:
    """Weights of a first convolution [O, C, k, k] -> one picture [1, 1|3, H, W], each filter scaled to [-1, 1]."""
    w = weight.detach().float().cpu()
    w = w if w.shape[1] in (1, 3) else w.mean(1, keepdim=True)
    w = w / w.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    factor = max(1, 24 // w.shape[2])
    w = w.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return image_grid(w, nrow=max(1, round(len(w) ** 0.5)))[None]


def confusion_picture(matrix: Tensor, names: Sequence[str] | None = None) -> Tensor:
    """Counts [true, predicted] -> one picture [1, 3, H, W]: a row is a true class, blue is right, red is wrong.

    With up to `NAMED` classes each cell holds its per cent of the row; with more, a cell is a few pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    n = len(matrix)
    share = (matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
    cell = 34 if n <= NAMED else max(1, 1000 // n)
    right = np.eye(n, dtype=bool)[..., None]
    # errors are few: their colours grow with the square root
    strength = np.where(right, share[..., None], np.sqrt(share)[..., None])
    colour = 255 - strength * np.where(right, (205, 130, 40), (35, 165, 175))
    square = Image.fromarray(colour.round().astype(np.uint8)).resize((n * cell, n * cell), Image.Resampling.NEAREST)
    if n > NAMED:
        return _tensor(square)
    font = ImageFont.load_default(11)
    words = [str(names[i] if names else i)[:14] for i in range(n)]
    margin = 12 + int(max(font.getlength(w) for w in words))
    page = Image.new("RGB", (margin + n * cell + 4, margin + n * cell + 4), "white")
    page.paste(square, (margin, margin))
    draw = ImageDraw.Draw(page)
    for i, word in enumerate(words):
        centre = margin + i * cell + cell // 2
        draw.text((margin - 6, centre), word, fill="black", font=font, anchor="rm")
        upright = Image.new("L", (margin, 16), 0)
        ImageDraw.Draw(upright).text((2, 8), word, fill=255, font=font, anchor="lm")
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        page.paste("black", (centre - 8, 0), turned)
        for j in range(n):
            if share[i, j] >= 0.005:
                ink = "white" if i == j and share[i, j] > 0.6 else "black"
                at = (margin + j * cell + cell // 2, centre)
                draw.text(at, f"{100 * share[i, j]:.0f}", fill=ink, font=font, anchor="mm")
    return _tensor(page)


def _tensor(page: object) -> Tensor:
    """A PIL image -> [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)[None].float() / 127.5 - 1
