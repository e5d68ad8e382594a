"""20 steps straight, and 10 steps, kill -9, -r and the rest, end with the same bits."""

import os
import signal

import lightning.pytorch as pl
import pytest
import torch

from tests.cli.tools import QUICK, config, finish, only_run, start

FAMILIES = {
    "classifier": ["configs/classifier/resnet_digits.yaml"],
    "vae": ["configs/autoencoder/vae_digits.yaml"],
    "ddpm": [
        "configs/diffusion/ddpm_digits.yaml",
        "model.params.unet_config.params.model_channels=32",
        "model.params.unet_config.params.num_res_blocks=1",
    ],
}


class KillAt(pl.Callback):
    """kill -9 after this step, as a cluster does it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(*argv):
    """Every run is a process of its own: another number of threads in this one would round differently."""
    returned, out = finish(start("main.py", *argv))
    assert returned == 0, out


def same(a, b, where=""):
    """Bit-equal, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_and_resumed_is_uninterrupted(family, tmp_path):
    name, *extra = FAMILIES[family]
    # 1,257 images in batches of 100: step 13 ends the first epoch, so the kill at 16 and the resume at 10 cross one
    shared = ["-t", "-b", config(name), "--no-test", "--max_steps", 20, *QUICK, "data.params.batch_size=100", *extra]
    main(*shared, "-l", tmp_path / "straight")
    keep = ["lightning.modelcheckpoint.params.every_n_train_steps=10", "--trust", "tests"]
    kill = ["lightning.callbacks.kill.target=tests.cli.test_resume.KillAt", "lightning.callbacks.kill.params.step=16"]
    returned, out = finish(start("main.py", *shared, *keep, *kill, "-l", tmp_path / "killed"))
    assert returned == -signal.SIGKILL, out
    run = only_run(tmp_path / "killed")
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 10
    main("-t", "-r", run, "--no-test", "--trust", "tests", "lightning.callbacks.kill.params.step=-1")
    straight = torch.load(only_run(tmp_path / "straight") / "checkpoints/last.ckpt", weights_only=True)
    resumed = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert straight["global_step"] == resumed["global_step"] == 20
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        same(straight[part], resumed[part], part)
