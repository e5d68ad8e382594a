"""A forward pass of the U-Net of Stable Diffusion v1 (859.52 M parameters), here and in diffusers, with equal weights.

python benchmarks/sd_unet.py              memory, eager, compiled in place (needs: pip install diffusers)
python benchmarks/sd_unet.py --only eager

Latent 32x32, batch 2, a context of 77 tokens, fp32; the outputs have to agree. The memory is the peak of a process that
holds one of the two and calls it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.timing import compare, process, report  # noqa: E402


def unet_config() -> dict[str, Any]:
    from omegaconf import OmegaConf

    from ldm.config import load_yaml

    config = load_yaml(ROOT / "configs/stable-diffusion/v1-inference.yaml")
    return OmegaConf.to_container(config.model.params.unet_config)


def random_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """By name: matrices that keep the scale of their inputs, norms near the identity."""
    torch.manual_seed(0)
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        if len(shape) > 1:
            out[name] = noise.mul_(shape[1:].numel() ** -0.5)
        else:
            out[name] = noise.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    return out


def ours(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The network; a checkpoint's tensors become its weights as `ldm.text2image.load` does it."""
    from ldm import checkpoint
    from ldm.util import instantiate_from_config

    with checkpoint.NoWeights():
        net = instantiate_from_config(unet_config())
    weights = weights or random_weights({k: p.shape for k, p in net.state_dict().items()})
    for name in list(weights):
        if weights[name].ndim == 4:
            weights[name] = weights[name].contiguous(memory_format=torch.channels_last)
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def diffusers(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """UNet2DConditionModel with the same weights, in its own layout."""
    from diffusers import UNet2DConditionModel

    from ldm.conversion import unet
    from ldm.conversion.rows import to_theirs

    p = unet.full_params(unet_config())
    config = {k: v for k, v in unet.to_config(p, "eps").items() if not k.startswith("_")}
    with torch.device("meta"):
        net = UNet2DConditionModel(**config)
    rows = unet.rows(p)
    if weights is None:
        weights = random_weights({k: v.shape for k, v in net.state_dict().items()})
    else:
        weights, left = to_theirs(weights, rows)
        assert not left
        weights = {k: v.contiguous() for k, v in weights.items()}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, 32, 32), torch.full((batch,), 500), torch.randn(batch, 77, 768)


def call(net: nn.Module) -> Callable[[], Tensor]:
    """A forward pass without gradients, by either class."""
    x, t, context = inputs()

    def run() -> Tensor:
        with torch.inference_mode():
            out = net(x, t, context)
        return out if isinstance(out, Tensor) else out.sample

    return run


def peak(side: str) -> float:
    """GiB at most of a process that builds one side and calls it three times."""
    return process([sys.executable, __file__, "--alone", side, "--threads", str(torch.get_num_threads())])[1]


def memory() -> None:
    peaks = {side: peak(side) for side in SIDES}
    for side, gib in peaks.items():
        print(f"  {side:32s} {gib:8.2f} GiB peak   ldm / {side} = {peaks['ldm'] / gib:.3f}")


def timed(run: Callable[[], Tensor]) -> Callable[[], None]:
    def side() -> None:
        run()

    return side


SIDES = {"ldm": ours, "diffusers": diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("eager", "compile", "memory"), help="one of the three measurements")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        run = call(SIDES[args.alone]())
        for _ in range(3):
            run()
        return
    if args.only in (None, "memory"):
        print("SD v1 U-Net, latent 32x32, batch 2, fp32")
        memory()
    if args.only == "memory":
        return
    mine = ours()
    theirs = diffusers(mine.state_dict())
    print(f"{sum(p.numel() for p in mine.parameters()) / 1e6:.2f} M parameters")
    runs = {"ldm": call(mine), "diffusers": call(theirs)}
    torch.testing.assert_close(runs["ldm"](), runs["diffusers"](), rtol=1e-4, atol=1e-4)
    title = "SD v1 U-Net, latent 32x32, batch 2, fp32"
    if args.only != "compile":
        report(title, compare({name: timed(run) for name, run in runs.items()}, args.rounds), "ldm")
    if args.only != "eager":
        mine.compile()  # as --compile does it
        torch.testing.assert_close(runs["ldm"](), runs["diffusers"](), rtol=1e-4, atol=1e-4)
        sides = {"ldm, compiled": timed(runs["ldm"]), "diffusers": timed(runs["diffusers"])}
        report(title, compare(sides, args.rounds), "ldm, compiled")


if __name__ == "__main__":
    main()
