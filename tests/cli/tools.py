"""Runs main.py and the scripts as a user does: in this process for speed, or in another one where signals matter."""

import logging
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "configs/classifier/resnet_digits.yaml"
# small and quick: what the tests add to any config
QUICK = ["lightning.trainer.log_every_n_steps=1", "data.params.batch_size=16", "data.params.num_workers=0"]


def config(name):
    return str(ROOT / name)


def run_main(*argv):
    """Exit code of main.py, called in this process."""
    import main

    for name in [n for n in logging.root.manager.loggerDict if n.startswith("lightning")]:
        for handler in logging.getLogger(name).handlers:
            handler.stream = sys.stderr  # pytest gives each test another one
    threads = torch.get_num_threads()
    try:
        return main.main([str(a) for a in argv])
    finally:
        torch.set_num_threads(threads)


def only_run(logdir):
    runs = [p for p in Path(logdir).iterdir() if p.is_dir() and (p / "configs").is_dir()]
    assert len(runs) == 1, runs
    return runs[0]


def start(script, *argv, cwd=None):
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=240):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out
