"""Autoencoders: how near the reconstruction is to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from ldm import generate
from ldm.evaluation.pictures import Pictures
from ldm.modules.lpips import LPIPS

METRICS = ("psnr", "ssim", "lpips")


@torch.no_grad()
def reconstruct(model: Any, x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> the same, through encoder and decoder; the mode of a posterior, not a sample."""
    latent = model.encode(x)
    latent = latent[0] if isinstance(latent, tuple) else latent  # (code, loss, indices) of a codebook
    latent = latent if isinstance(latent, Tensor) else latent.mode()
    return model.decode(latent).clamp(-1, 1)


def reconstruction(
    model: Any, pictures: Pictures, metrics: Sequence[str], folder: Path | None, device: Any, batch_size: int = 64
) -> dict[str, float]:
    """PSNR in dB, SSIM and LPIPS, each the mean over pictures; with `folder`, the reconstructions as PNG files.

    Pictures and reconstructions are compared in 8 bits, as a viewer sees them.
    """
    distance = LPIPS().load_pretrained().to(device) if "lpips" in metrics else None
    sums, start = dict.fromkeys([m for m in METRICS if m in metrics], 0.0), 0
    for batch in tqdm(pictures.batches(batch_size), total=-(-len(pictures) // batch_size), desc="reconstructing"):
        x = batch.to(device).float() / 127.5 - 1
        y = ((reconstruct(model, x) + 1) * 127.5).round() / 127.5 - 1
        for name in sums:
            sums[name] += float(of_each(name, y, x, distance).double().sum())
        if folder is not None:
            for i, picture in enumerate(generate.pictures(y, str(folder)), start):
                generate.save_png(picture, folder / f"{i:08}.png", {"reconstruction": i})
        start += len(batch)
    return {name: total / start for name, total in sums.items()}


def of_each(name: str, y: Tensor, x: Tensor, distance: LPIPS | None = None) -> Tensor:
    """psnr (dB), ssim or lpips of each pair of pictures [B, C, H, W] in [-1, 1], [B]."""
    if distance is not None and name == "lpips":
        return distance(y.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)).flatten()
    if name == "ssim":  # of brightnesses from 0 on: its first term compares means, which may not be near 0
        return structural_similarity_index_measure((y + 1) / 2, (x + 1) / 2, data_range=1.0, reduction="none")
    return peak_signal_noise_ratio(y, x, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
