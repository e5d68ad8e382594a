"""What the scripts share: exit codes, progress bar, file names."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> int:
    """Parses, runs, and turns errors with an exit code into one line."""
    args = parser.parse_args()
    try:
        action(args)
    except KeyboardInterrupt:
        print("\nstopped; finished pictures stay", file=sys.stderr)
        return 130
    except Exception as e:
        code = getattr(e, "exit_code", None)
        if code is None and type(e).__name__ == "OutOfMemoryError":
            e, code = out_of_memory(e), 1
        if code is None:
            raise
        print(f"error: {e}", file=sys.stderr)
        return code
    return 0


def out_of_memory(error: BaseException) -> Exception:
    import torch

    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return MemoryError(f"out of memory (peak {peak:.1f} GiB): lower --batch-size or the size, or use --precision bf16")


def parse_settings(items: list[str]) -> dict[str, Any]:
    """["truncation=0.7"] -> {"truncation": 0.7}; values are read as YAML."""
    from omegaconf import OmegaConf

    from ldm.util import UserError

    for item in items:
        if "=" not in item:
            raise UserError(f"--set {item}: expected knob=value")
    return dict(OmegaConf.to_container(OmegaConf.from_dotlist(items)))


@contextlib.contextmanager
def progress(model: Any, knobs: dict[str, Any], **extra: Any) -> Iterator[dict[str, Any]]:
    """Gives {"callback": f} that moves a bar with the time per step, or {} if `sample` has no callback."""
    import inspect

    from tqdm import tqdm

    parameters = inspect.signature(model.sample).parameters
    if "callback" not in parameters:
        yield {}
        return
    total = knobs.get("steps") or getattr(parameters.get("steps"), "default", None)
    with tqdm(total=total if isinstance(total, int) else None, desc="sampling", unit="step", leave=False) as bar:

        def step(*args: Any, **kwargs: Any) -> None:  # a true result would stop the sampler
            bar.update()

        yield {"callback": step}


def free_name(outdir: Path, seed: int | None) -> Path:
    """`<seed>.png` or `grid.png`, with a number behind it if that is taken: nothing is overwritten."""
    stem = "grid" if seed is None else f"{seed:05}"
    path, number = outdir / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = outdir / f"{stem}-{number}.png"
    return path
