"""Which code, packages and machine a figure or a picture comes from."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm import generate

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torchvision", "lightning", "torch-fidelity", "torchmetrics", "numpy", "pillow")


def provenance(device: Any) -> dict[str, Any]:
    """Commit, versions, machine, and the threads over which a process on the CPU splits its sums."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    about = {"commit": commit(), "device": str(device), "threads": torch.get_num_threads()}
    return {**about, "versions": {**generate.versions(), **found}}


def commit() -> str | None:
    """Of the project, with `+` behind it where files were changed since; None outside a git checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())
