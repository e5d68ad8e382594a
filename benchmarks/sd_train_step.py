"""A training step of a small Stable Diffusion U-Net (34.97 M parameters), here and in diffusers: loss, AdamW, EMA.

python benchmarks/sd_train_step.py          (needs: pip install diffusers)

Widths 64, 128, 256, 256, transformers at the three upper levels, latent 32x32, batch 16, a context of 77 tokens of
width 256, fp32, equal weights. diffusers' side is the step of its examples, with its EMAModel; both use PyTorch's
AdamW, in the form (fused) that this project's configs get.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, process, report  # noqa: E402

BATCH, SIZE, WIDTH, TOKENS = 16, 32, 256, 77
UNET = {
    "target": "ldm.modules.unet.UNetModel",
    "params": {
        "image_size": SIZE, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "num_heads": 8, "context_dim": WIDTH,
        "use_spatial_transformer": True, "legacy": False,
    },
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4, SIZE, SIZE), torch.randn(BATCH, TOKENS, WIDTH)


def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


class Ours:
    """The recipe's loss on given latents, its optimiser and its averages."""

    def __init__(self) -> None:
        from ldm.models.diffusion.ddpm import DDPM

        self.recipe = DDPM(
            UNET, image_size=SIZE, channels=4, conditioning_key="crossattn", use_ema=True, clip_denoised=False
        )
        self.recipe.configure_model()
        self.net = self.recipe.model.diffusion_model
        self.optimizer = optimizer(list(self.recipe.model.parameters()))

    def __call__(self) -> None:
        x, context = batch()
        t = self.recipe.draw_times(x)
        loss, _ = self.recipe.losses_at(x, t, None, {"c_crossattn": context})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.recipe.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recipe.update_ema()


class Diffusers:
    """The step of diffusers' examples/text_to_image/train_text_to_image.py on latents, without accelerate."""

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        from ldm.conversion import unet
        from ldm.conversion.rows import to_theirs

        p = unet.full_params(UNET)
        self.net = UNet2DConditionModel(**{k: v for k, v in unet.to_config(p, "eps").items() if not k.startswith("_")})
        if weights is not None:
            self.net.load_state_dict(to_theirs(weights, unet.rows(p))[0])
        self.scheduler = DDPMScheduler(1000)
        self.ema = EMAModel(self.net.parameters(), model_cls=UNet2DConditionModel, model_config=self.net.config)
        self.optimizer = optimizer(list(self.net.parameters()))

    def __call__(self) -> None:
        x, context = batch()
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        out = self.net(self.scheduler.add_noise(x, noise, t), t, context, return_dict=False)[0]
        F.mse_loss(out.float(), noise.float(), reduction="mean").backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())


def agree(mine: Ours, theirs: Diffusers) -> None:
    """Both networks give the same output, away from the start where the last layer is zero."""
    torch.manual_seed(2)
    weights = {k: torch.randn_like(v) * 0.02 + v for k, v in mine.net.state_dict().items()}
    from ldm.conversion import unet
    from ldm.conversion.rows import to_theirs

    mine.net.load_state_dict(weights)
    theirs.net.load_state_dict(to_theirs(weights, unet.rows(unet.full_params(UNET)))[0])
    (x, context), t = batch(), torch.randint(0, 1000, (BATCH,))
    with torch.no_grad():
        torch.testing.assert_close(mine.net(x, t, context), theirs.net(x, t, context).sample, rtol=1e-4, atol=1e-4)


def alone(side: str) -> float:
    """GiB at most of a process that makes three steps."""
    return process([sys.executable, __file__, "--alone", side, "--threads", str(torch.get_num_threads())])[1]


SIDES: dict[str, Callable[[], Callable[[], None]]] = {"ldm": Ours, "diffusers": Diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.alone:
        step = SIDES[args.alone]()
        for _ in range(3):
            step()
        return
    sides = {name: side() for name, side in SIDES.items()}
    agree(sides["ldm"], sides["diffusers"])
    print(f"{sum(p.numel() for p in sides['ldm'].net.parameters()) / 1e6:.2f} M parameters")
    report("SD training step, latent 32x32, batch 16", compare(sides, args.rounds), "ldm")
    peaks = {side: alone(side) for side in SIDES}
    print(f"  peak memory {', '.join(f'{side} {gib:.2f} GiB' for side, gib in peaks.items())}")


if __name__ == "__main__":
    main()
