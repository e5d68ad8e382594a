"""Drawing pictures to measure against the network alone: the share of the time that the network's calls take.

One side draws as scripts/evaluate.py does, PNG files included; the other calls the network as often, on batches of that
size, and does nothing else. Weights are random, which costs the same.

    python benchmarks/drawing.py
    python benchmarks/drawing.py --config configs/diffusion/ddpm_cifar10_slim.yaml -n 64 --steps 20
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import compare, report  # noqa: E402
from ldm.evaluation.sampling import Plan, draw  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffusion/ddpm_digits.yaml")
    parser.add_argument("-n", "--n_samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = OmegaConf.load(args.config)
    config.model.params.update({k: 10 for k, v in config.model.params.items() if v == "auto"})
    OmegaConf.resolve(config)
    model = instantiate_from_config(OmegaConf.to_container(config.model)).eval()
    info = {"run": "benchmark", "checkpoint": "none", "sha256": "none"}
    inputs: list[tuple[tuple, dict]] = []
    network = model.networks()[0]
    hook = network.register_forward_pre_hook(lambda _, a, k: inputs.append((a, k)), with_kwargs=True)

    def evaluation() -> None:
        inputs.clear()
        with tempfile.TemporaryDirectory() as root:
            labels = np.arange(max(args.n_samples, 100)) % 10
            seeds, knobs = range(args.n_samples), {"steps": args.steps}
            plan = Plan(model, info, seeds, knobs, None, labels, None, args.batch_size, root)
            draw(plan, {"accelerator": "cpu"})
            assert len(list(plan.folder.glob("*.png"))) == args.n_samples

    def alone() -> None:
        calls = list(inputs)  # those of the evaluation just before
        with torch.no_grad(), model.ema_scope() if hasattr(model, "model_ema") else torch.no_grad():
            for a, k in calls:
                network(*a, **k)

    seconds = compare({"evaluation": evaluation, "network": alone}, args.rounds)
    hook.remove()
    title = f"{args.n_samples} pictures of {Path(args.config).stem}, batch {args.batch_size}, {args.steps} steps"
    report(title, seconds, "network")


if __name__ == "__main__":
    main()
