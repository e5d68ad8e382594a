"""scripts/demo.py from outside: what Ctrl-C and a wrong config do to it."""

import os
import signal
import subprocess
import sys

import torch

from tests.cli.test_main import SLOW, wait_for_step
from tests.cli.tools import DIGITS, QUICK, ROOT, config, finish


def start(*argv):
    """In a process group of its own, which gets a Ctrl-C as a whole, as a terminal's does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/demo.py"), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_saves_the_training_and_says_how_to_go_on(tmp_path):
    process = start("-l", tmp_path, "--config", config(DIGITS), SLOW, *QUICK)
    run = wait_for_step(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    returned, out = finish(process)
    assert returned == 130 and "Traceback" not in out, out
    assert f"stopped by SIGINT; go on: python main.py -t -r {run}\n" in out
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] > 0


def test_a_wrong_config_ends_it(tmp_path):
    returned, out = finish(start("-l", tmp_path, "--config", tmp_path / "none.yaml"))
    assert returned == 2 and "none.yaml" in out and "Traceback" not in out, out
    assert not list(tmp_path.iterdir())


def test_an_unknown_demo_is_named(tmp_path):
    returned, out = finish(start("digit", "-l", tmp_path))
    assert returned == 2 and "got 'digit', expected prompts or digits" in out and "Traceback" not in out, out
