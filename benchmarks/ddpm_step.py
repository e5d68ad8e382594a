"""A DDPM training step (forward, backward, AdamW, EMA) of one U-Net shape in three libraries.

python benchmarks/ddpm_step.py          (needs: pip install diffusers denoising-diffusion-pytorch)

Widths 64, 128, 256, 256, 32x32 RGB, batch 16, fp32. Against diffusers: two residual blocks a level, attention at 8x8
and 4x4, equal parameter counts. Against denoising-diffusion-pytorch: one residual block a level, which is that
library's size (18.07 M against 17.88 M parameters, 3.06 against 3.04 GFLOP for a forward pass of one picture).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report, rounds_asked  # noqa: E402

WIDTHS, BATCH, SIZE = (1, 2, 4, 4), 16, 32


def batch() -> torch.Tensor:
    return torch.rand(BATCH, SIZE, SIZE, 3) * 2 - 1


def ours(res_blocks: int) -> Callable[[], None]:
    from ldm.models.diffusion.ddpm import DDPM

    unet = {
        "target": "ldm.modules.unet.UNetModel",
        "params": {
            "image_size": SIZE, "in_channels": 3, "out_channels": 3, "model_channels": 64, "num_res_blocks": res_blocks,
            "channel_mult": WIDTHS, "attention_resolutions": [4, 8], "num_head_channels": 32,
        },
    }  # fmt: skip
    model = DDPM(unet, image_size=SIZE, use_ema=True)
    model.configure_model()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-4)

    def step() -> None:
        loss, _ = model.shared_step({"image": batch()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_ema()

    step.parameters = sum(p.numel() for p in model.model.parameters())
    return step


def diffusers() -> Callable[[], None]:
    """The step of diffusers' examples/unconditional_image_generation, with its EMAModel."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=tuple(64 * w for w in WIDTHS),
        layers_per_block=2,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    scheduler, ema = DDPMScheduler(1000), EMAModel(model.parameters(), use_ema_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        clean = batch().permute(0, 3, 1, 2).contiguous()
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (BATCH,))
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    step.parameters = sum(p.numel() for p in model.parameters())
    return step


def lucidrains() -> Callable[[], None]:
    """denoising-diffusion-pytorch's Unet, GaussianDiffusion and EMA, stepped as its Trainer does."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = GaussianDiffusion(Unet(64, dim_mults=WIDTHS, flash_attn=True), image_size=SIZE, objective="pred_noise")
    ema = EMA(model, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = model((batch().permute(0, 3, 1, 2).contiguous() + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    step.parameters = sum(p.numel() for p in model.parameters())
    return step


def main() -> None:
    rounds = rounds_asked(__doc__)
    pairs = (
        {"ldm, 2 blocks": ours(2), "diffusers": diffusers()},
        {"ldm, 1 block": ours(1), "denoising-diffusion-pytorch": lucidrains()},
    )
    for sides in pairs:
        for name, side in sides.items():
            print(f"{name}: {side.parameters / 1e6:.2f} M parameters")
        report("DDPM training step, 32x32, batch 16", compare(sides, rounds), next(iter(sides)))


if __name__ == "__main__":
    main()
