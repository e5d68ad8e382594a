"""What a run's checkpoints say of where it comes from."""

from types import SimpleNamespace

import pytest
import torch

from ldm import generate, origin
from ldm.checkpoint import read
from tests.cli.tools import QUICK, ROOT, config, only_run, run_main


@pytest.mark.smoke
def test_the_command_is_what_trains_it_again():
    words = ["-t", "-b", f"{ROOT}/configs/a.yaml", "-l", "/elsewhere/logs", "model.params.x=[1, 2]"]
    assert origin.command(words) == "python main.py -t -b configs/a.yaml 'model.params.x=[1, 2]'"
    assert origin.command(["-t", "--logdir=/x", "-b", "configs/a.yaml"]) == "python main.py -t -b configs/a.yaml"
    staged = origin.command(["-b", "configs/b.yaml", f"first_stage={ROOT}/logs/2026_a"])
    assert staged == "python main.py -b configs/b.yaml first_stage=logs/2026_a"


def test_a_resumed_run_keeps_its_beginning(monkeypatch):
    def start(callback, threads=1, world=1):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        trainer, model = SimpleNamespace(world_size=world), SimpleNamespace(device=torch.device("cpu"))
        callback.on_fit_start(trainer, model)
        return callback.state_dict()

    monkeypatch.setattr(origin, "commit", lambda: "aaa")
    first = start(origin.Origin(["-t", "-b", "configs/a.yaml"], ["configs/a.yaml", "configs/b.yaml"]), 1, 2)
    expected = {"command": "python main.py -t -b configs/a.yaml", "config": "configs/a.yaml"}
    assert first == {**expected, "commit": "aaa", "cores": 2, "device": "cpu"}
    for commits, now in (("aaa", "aaa"), ("aaa, bbb", "bbb")):
        monkeypatch.setattr(origin, "commit", lambda now=now: now)
        resumed = origin.Origin(["-t", "-r", "logs/x"], [])
        resumed.load_state_dict(first)
        assert start(resumed, 1) == {**expected, "commit": commits, "cores": 2, "device": "cpu"}


def test_checkpoints_keep_it_and_runs_say_it(tmp_path):
    argv = ["-t", "-b", config("configs/autoencoder/vae_digits.yaml"), "-l", tmp_path, "--no-test", *QUICK]
    argv += ["model.params.iwae_samples=0", "lightning.callbacks.image_logger.params.disabled=true"]
    assert run_main(*argv, "--max_steps", 1, "--limit_val_batches", 0) == 0
    run = only_run(tmp_path)
    assert run_main("-t", "-r", run, "--max_steps", 2, "--no-test") == 0
    found = generate.load_run(run)[1]["origin"]
    assert found["config"] == "configs/autoencoder/vae_digits.yaml" and "--max_steps 1 " in found["command"] + " "
    assert found["device"] == "cpu" and found["cores"] == torch.get_num_threads()
    assert generate.origin_of(read(run / "checkpoints/last.ckpt")) == found
    assert generate.origin_of({"callbacks": None}) == generate.origin_of({}) == {}
