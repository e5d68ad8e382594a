"""What the frame costs: an epoch through main.py's Trainer against a bare PyTorch loop.

python benchmarks/overhead.py classifier      (ResNet-18, 32x32)
python benchmarks/overhead.py ddpm

Same model class, same data module and batches, same optimiser; the frame logs, guards, seeds and shows progress.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lightning.pytorch as pl  # noqa: E402

from benchmarks.timing import compare, report  # noqa: E402
from ldm.util import instantiate_from_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CASES: dict[str, list[str]] = {
    "classifier": [
        "configs/classifier/resnet_digits.yaml",
        "model.params.network_config.target=ldm.modules.classifiers.resnet.resnet18",
        "model.params.network_config.params.stem=small",
        "model.params.use_ema=false",
        "model.params.scheduler_config=null",
        "data.params.size=32",
        "data.params.batch_size=64",
    ],
    "ddpm": ["configs/diffusion/ddpm_digits.yaml", "model.params.scheduler_config=null", "data.params.batch_size=128"],
}


class EpochClock(pl.Callback):
    """Seconds of the first epoch, from its first batch to its last."""

    seconds = 0.0

    def on_train_epoch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *args: Any) -> None:
        EpochClock.seconds = time.perf_counter() - self.start


def framed(case: list[str], steps: int) -> float:
    """One epoch by main.py."""
    import main

    with tempfile.TemporaryDirectory() as logs:
        argv = ["-t", "-b", str(ROOT / case[0]), "-l", logs, *case[1:], "data.params.validation=null", "--no-test"]
        argv += ["--max_steps", "-1", "--max_epochs", "1", "--trust", "benchmarks"]
        argv += ["lightning.callbacks.clock.target=benchmarks.overhead.EpochClock"]
        argv += [
            "lightning.callbacks.image_logger.params.disabled=true",
            f"lightning.trainer.limit_train_batches={steps}",
        ]
        assert main.main(argv) == 0
    return EpochClockOf().seconds


def EpochClockOf() -> type[EpochClock]:  # noqa: N802
    """The class that main.py instantiated: this file is imported once as a script and once as a module."""
    from benchmarks import overhead

    return overhead.EpochClock


def bare(case: list[str], steps: int) -> float:
    """The same epoch in a plain loop."""
    from ldm.training import build_data, build_model, prepare

    args, extra = arguments(case)
    run = prepare(args, extra)
    pl.seed_everything(23, verbose=False)
    data, _ = build_data(run)
    model, config = build_model(run, data)
    model.configure_model()
    model.learning_rate = config["learning_rate"]
    model.log_dict = model.log = lambda *a, **k: None
    optimizer = instantiate_from_config(model.optimizer_config, params=list(model.parameters()), lr=model.learning_rate)
    loader = data.train_dataloader()
    clip = run.merged.config.lightning.trainer.get("gradient_clip_val")
    start = time.perf_counter()
    for number, batch in enumerate(loader):
        if number == steps:
            break
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.update_ema()
    return time.perf_counter() - start


def arguments(case: list[str]) -> tuple[argparse.Namespace, list[str]]:
    from main import build_parser

    args = build_parser().parse_args(["-t", "-b", str(ROOT / case[0]), "--print-config"])
    return args, [*case[1:], "data.params.validation=null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = CASES[args.case]
    sides = {"main.py": lambda: framed(case, args.steps), "bare loop": lambda: bare(case, args.steps)}
    report(f"{args.case}: {args.steps} steps of an epoch", compare(sides, args.rounds), "main.py")


if __name__ == "__main__":
    main()
