"""`lightning.callbacks.evaluate`: figures while training, and the best checkpoint chosen by them."""

import csv

import pytest
import torch

from ldm import checkpoint
from ldm.evaluation.callback import Evaluate
from ldm.util import UserError
from tests.cli.tools import QUICK, config, only_run, run_main

VAE = config("configs/autoencoder/vae_digits.yaml")
SMALL = ["model.params.iwae_samples=0", "model.params.encoder_config.params.hidden=[32]"]
SMALL += ["model.params.decoder_config.params.hidden=[32]", "lightning.callbacks.image_logger.params.disabled=true"]
OFTEN = ["lightning.trainer.check_val_every_n_epoch=null", "lightning.trainer.val_check_interval=2", *QUICK, *SMALL]


def evaluate(**params):
    text = ", ".join(f"{k}: {v}" for k, v in {"n": 40, "limit": 300, **params}.items())
    return f"lightning.callbacks.evaluate.params={{{text}}}"


def rows(run):
    with (run / "metrics.csv").open() as f:
        return [r for r in csv.DictReader(f) if r.get("val/fid")]


def test_every_k_steps_and_between_them_the_last_figure(tmp_path):
    argv = ["-t", "-b", VAE, "-l", tmp_path, "--max_steps", 8, "--no-test", *OFTEN]
    assert run_main(*argv, evaluate(every_n_steps=4), "model.params.monitor=val/fid") == 0
    run = only_run(tmp_path)
    found = [(int(r["step"]), float(r["val/fid"])) for r in rows(run)]
    values = [v for _, v in found]
    assert len(values) == 4 and values[0] == values[1] != values[2] == values[3]
    best = [p for p in (run / "checkpoints").glob("*.ckpt") if p.name != "last.ckpt"]
    assert len(best) == 1  # ModelCheckpoint found the metric it monitors
    state = checkpoint.read(run / "checkpoints/last.ckpt")["callbacks"]
    kept = next(v for k, v in state.items() if k.startswith("Evaluate"))
    assert kept["step"] == 6 and kept["figures"]["fid"] == pytest.approx(values[-1])


def test_training_is_the_same_with_and_without(tmp_path):
    """Drawing uses no random number of the training."""
    states = []
    for name, more in (("with", [evaluate(every_n_steps=2)]), ("without", [])):
        argv = ["-t", "-b", VAE, "-l", tmp_path / name, "--max_steps", 4, "--no-test", *OFTEN, *more]
        assert run_main(*argv) == 0
        states.append(checkpoint.read_state(only_run(tmp_path / name) / "checkpoints/last.ckpt"))
    assert all(torch.equal(a, states[1][k]) for k, a in states[0].items())


def test_a_resumed_run_goes_on_with_the_last_figure(tmp_path):
    argv = ["-t", "-b", VAE, "-l", tmp_path, "--max_steps", 2, "--no-test", *OFTEN, evaluate(every_n_steps=100)]
    assert run_main(*argv) == 0
    run = only_run(tmp_path)
    first = float(rows(run)[-1]["val/fid"])
    assert run_main("-t", "-r", run, "--max_steps", 6, "--no-test") == 0
    assert {float(r["val/fid"]) for r in rows(run)} == {first}


def test_wrong_settings(tmp_path, capsys):
    with pytest.raises(UserError, match="metric fids: expected fid"):
        Evaluate(metrics=["fids"])
    argv = ["-t", "-b", config("configs/classifier/resnet_digits.yaml"), "-l", tmp_path, "--max_steps", 1, *QUICK]
    assert run_main(*argv, "lightning.callbacks.evaluate.params={n: 10}") == 2
    assert "Classifier draws no pictures" in capsys.readouterr().err
