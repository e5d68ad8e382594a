"""Tiny two-stage runs through main.py, for the tests of latent diffusion."""

import csv

import torch

from tests.cli.tools import config, only_run, run_main

QUICK = ["lightning.trainer.log_every_n_steps=1", "data.params.num_workers=0", "--limit_val_batches", 0, "--no-test"]
SILENT = "lightning.callbacks.image_logger.params.disabled=true"
KL = "configs/autoencoder/kl_digits.yaml"
LDM = "configs/latent-diffusion/digits_class.yaml"
UNET = "model.params.unet_config.params."
TINY = [
    "data.params.batch_size=16",
    SILENT,
    UNET + "model_channels=32",
    UNET + "channel_mult=[1]",
    UNET + "attention_resolutions=[1]",
    UNET + "context_dim=16",
    "model.params.cond_stage_config.params.embed_dim=16",
    "model.params.scheduler_config=null",
    "model.learning_rate=0.01",
]


def first_stage(folder, *argv, steps=2):
    """A run of kl_digits.yaml."""
    argv = ["-t", "-b", config(KL), *argv, "-l", folder, "--max_steps", steps, *QUICK[:2], "--no-test"]
    assert run_main(*argv, "data.params.batch_size=16", SILENT, "--limit_val_batches", 1) == 0
    return only_run(folder)


def train(folder, first, *argv, steps=2, code=0):
    """A two-step run of digits_class.yaml, and its checkpoint."""
    argv = ["-t", "-b", config(LDM), "-l", folder, "--max_steps", steps, *QUICK, *TINY, f"first_stage={first}", *argv]
    assert run_main(*argv) == code
    return None if code else last(folder)


def last(folder):
    """The content of the only run's last checkpoint."""
    return torch.load(only_run(folder) / "checkpoints/last.ckpt", weights_only=True)


def rows(folder):
    """metrics.csv of the only run."""
    with (only_run(folder) / "metrics.csv").open() as f:
        return list(csv.DictReader(f))


def logged(folder, name):
    """The values of a metric."""
    return [float(row[name]) for row in rows(folder) if row.get(name)]


def network(content):
    """The weights of the U-Net."""
    return {k: v for k, v in content["state_dict"].items() if k.startswith("model.diffusion_model.")}


def same(a, b):
    """Bit-equal state dicts."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
