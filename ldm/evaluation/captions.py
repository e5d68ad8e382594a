"""How well a text-to-image model that was trained on few drawings draws what its captions say.

Fidelity: one picture for each caption that the model was trained with; the nearest training picture should be one with
that caption. Composition: pictures of pairs of colour and object that were held out; they should have the shape of the
object, and the colour as their main hue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.comparison import pyplot_without_window
from ldm.data.openmoji import COLORS, OpenMoji, apart, main_hue
from ldm.evaluation.reconstruction import of_each, reconstruct

HUE_TOLERANCE = 30  # degrees


def images_of(data: OpenMoji) -> Tensor:
    """All pictures, float32 [N, C, H, W] in [-1, 1]."""
    return data.images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def first_stage(model: Any, x: Tensor, batch_size: int = 64) -> dict[str, float]:
    """The first stage on pictures [N, C, H, W]: PSNR (dB) and SSIM, means over pictures; PSNR of all pixels at once."""
    sums = dict.fromkeys(("psnr", "ssim"), 0.0)
    error = 0.0
    for part in tqdm(x.split(batch_size), desc="reconstructing", leave=False):
        part = part.to(model.device)
        again = reconstruct(model.first_stage_model, part)
        error += float((again - part).square().double().sum())
        for name in sums:
            sums[name] += float(of_each(name, again, part).double().sum())
    means = {name: total / len(x) for name, total in sums.items()}
    return {**means, "psnr_of_all_pixels": 10 * math.log10(4 * x.numel() / max(error, 1e-12)), "n": len(x)}


@torch.no_grad()
def draw(model: Any, prompts: Sequence[str], batch_size: int, seed: int, knobs: dict[str, Any]) -> Tensor:
    """One picture a prompt, [N, C, H, W] in [-1, 1] on the CPU; picture i has seed + i."""
    found = []
    for at in tqdm(range(0, len(prompts), batch_size), desc="drawing", unit="batch", leave=False):
        texts = list(prompts[at : at + batch_size])
        seeds = list(range(seed + at, seed + at + len(texts)))
        plain = {} if of_tokens(model) else {"weights": False}
        cond = model.condition(seeds, prompts=texts, **plain)
        found.append(model.sample(cond, seeds=seeds, **knobs).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def latents(model: Any, x: Tensor, batch_size: int = 64) -> Tensor:
    """Modes of the first stage's posteriors, or codes, [N, c, h, w] on the CPU."""
    found = []
    for part in x.split(batch_size):
        part = part.to(model.device)
        z = model.first_stage_model.encode(part)[0] if of_tokens(model) else model.encode_first_stage(part)
        found.append((z if isinstance(z, Tensor) else z.mode()).float().cpu())
    return torch.cat(found)


def of_tokens(model: Any) -> bool:
    """Whether the model is a transformer over tokens of a codebook, not a latent diffusion model."""
    return hasattr(model, "draw_tokens")


@torch.no_grad()
def captioning(model: Any, data: OpenMoji, batch_size: int = 64, rerank: int = 1) -> dict[str, Any]:
    """CogView's captions of all drawings; rerank: of so many for each.

    Returns:
        exact: share that is one of the drawing's own captions; wrong: what was said of the others, by their name.
    """
    parts = tqdm(images_of(data).split(batch_size), desc="captions", unit="batch", leave=False)
    said = [t for part in parts for t in model.caption(part, rerank=rerank)]
    pairs = list(zip(said, data.captions, strict=True))
    wrong = {names[0]: text for text, names in pairs if text not in names}
    return {
        "exact": sum(text in names for text, names in pairs) / len(pairs),
        "n": len(pairs),
        "rerank": rerank,
        "wrong": wrong,
    }


def fidelity(model: Any, drawn: Tensor, prompts: Sequence[str], data: OpenMoji) -> dict[str, Any]:
    """Pictures [N, C, H, W] of `prompts` against the training pictures `data`.

    Returns:
        top1_pixels, top1_latents: share whose nearest training picture has the caption (identical drawings count as
        one); psnr: mean dB to the picture of the caption; wrong: captions that failed in pixel space.
    """
    real = images_of(data)
    owner = {c: i for i, names in enumerate(data.captions) for c in names}
    wanted = torch.tensor([owner[p] for p in prompts])
    same = _identical(real)
    found = {"pixels": nearest(drawn, real), "latents": nearest(latents(model, drawn), latents(model, real))}
    right = {k: same[v] == same[wanted] for k, v in found.items()}
    wrong = [p for p, ok in zip(prompts, right["pixels"].tolist(), strict=True) if not ok]
    shares = {f"top1_{k}": float(v.float().mean()) for k, v in right.items()}
    return {**shares, "psnr": float(of_each("psnr", drawn, real[wanted]).mean()), "n": len(prompts), "wrong": wrong}


def nearest(x: Tensor, pictures: Tensor) -> Tensor:
    """For each of x [N, ...] the index of the nearest of pictures [M, ...], int64 [N]."""
    return torch.cdist(x.flatten(1), pictures.flatten(1)).argmin(dim=1)


def _identical(x: Tensor) -> Tensor:
    """For each picture the number of the first one that is identical to it, [N]."""
    first: dict[bytes, int] = {}
    keys = [p.numpy().tobytes() for p in x]
    return torch.tensor([first.setdefault(k, i) for i, k in enumerate(keys)])


def shape_of(x: Tensor) -> Tensor:
    """A picture [N, 3, H, W] without its hues: largest and smallest of the three channels, [N, 2, H, W]."""
    return torch.stack([x.amax(1), x.amin(1)], dim=1)


def composition(drawn: Tensor, held_out: OpenMoji, everything: OpenMoji) -> dict[str, Any]:
    """Pictures [N, 3, H, W] of the held-out captions, in their order.

    Returns:
        share: of pictures with the right object (nearest in shape among all recoloured objects) and the right colour
        (main hue within 30 degrees); object, color: of each alone; wrong: captions that failed.
    """
    pairs = list(range(everything.plain, len(everything)))
    shapes, owners = shape_of(images_of(everything)[pairs]), [everything.emoji[i] for i in pairs]
    found = [owners[i] for i in nearest(shape_of(drawn), shapes).tolist()]
    objects = np.array([f == e for f, e in zip(found, held_out.emoji, strict=True)])
    pixels = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = [COLORS[names[0].split()[0]] for names in held_out.captions]
    colors = np.array([apart(main_hue(p)[0], hue) <= HUE_TOLERANCE for p, hue in zip(pixels, wanted, strict=True)])
    right = objects & colors
    wrong = [names[0] for names, ok in zip(held_out.captions, right, strict=True) if not ok]
    share, obj, color = (float(v.mean()) for v in (right, objects, colors))
    return {"share": share, "object": obj, "color": color, "n": len(right), "wrong": wrong}


def chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Figures of `fidelity` with "step" and "minutes" of training: top-1 and PSNR against the minutes.

    Against the steps where a checkpoint does not say its minutes.

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = pyplot_without_window()
    timed = all(r["minutes"] is not None for r in rows)
    x = [r["minutes" if timed else "step"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for key, label in (("top1_pixels", "by pixels"), ("top1_latents", "by latents")):
        left.plot(x, [100 * r[key] for r in rows], "o-", label=label)
    left.set(ylabel="captions that give their drawing (%)", ylim=(0, 101))
    left.legend(loc="lower right")
    right.plot(x, [r["psnr"] for r in rows], "o-", color="tab:green")
    right.set(ylabel="PSNR to the drawing (dB)")
    for axes in (left, right):
        axes.set(xlabel="minutes of training" if timed else "steps")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
