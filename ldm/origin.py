"""Where a run comes from: the command, the code and the cores that trained it, kept in its checkpoints."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ldm.evaluation.provenance import ROOT, commit

ELSEWHERE = ("-l", "--logdir")  # where a run is written changes nothing in it


class Origin(Callback):
    """Keeps what a run comes from in every checkpoint; a resumed run keeps what it was started by.

    Args:
        words: of the command line, without the program.
        configs: the config files among them.

    Attributes:
        record: {"command", "config": its first file, "commit", "cores": threads of all processes, "device"}; None
            before the training starts. Where a resumption was done by another commit, it stands behind the first, and
            of the cores the most count.
    """

    def __init__(self, words: Sequence[str], configs: Sequence[str]) -> None:
        self.words, self.configs = [str(w) for w in words], [str(c) for c in configs]
        self.record: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.record or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record = dict(state_dict) or None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now, cores = commit(), torch.get_num_threads() * trainer.world_size
        if self.record is None:
            config = in_project(self.configs[0]) if self.configs else None
            self.record = {"command": command(self.words), "config": config, "commit": now, "cores": cores}
            self.record["device"] = pl_module.device.type
            return
        known = str(self.record.get("commit"))
        if str(now) not in known.split(", "):
            self.record["commit"] = f"{known}, {now}"
        self.record["cores"] = max(cores, self.record.get("cores") or 0)


def command(words: Sequence[str]) -> str:
    """How to train it again from the project's folder, without the place of the run."""
    kept: list[str] = []
    before = ""
    for word in words:
        if word not in ELSEWHERE and before not in ELSEWHERE and not word.startswith("--logdir="):
            kept.append(in_project(word))
        before = word
    return shlex.join(["python", "main.py", *kept])


def in_project(word: str) -> str:
    """A word of a command, the project's own folder taken away from its paths."""
    return word.replace(f"{ROOT}/", "")
