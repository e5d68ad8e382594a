"""Tiny runs of the GAN configs, made by main.py, and calls of the scripts."""

import sys

from scripts import common
from tests.cli.tools import QUICK, config, only_run, run_main

SMALL = [
    "model.params.generator_config.params.channel_base=128",
    "model.params.generator_config.params.channel_max=16",
    "model.params.generator_config.params.w_dim=16",
    "model.params.discriminator_config.params.channel_base=128",
    "model.params.discriminator_config.params.channel_max=16",
    "lightning.callbacks.image_logger.params.disabled=true",
    "lightning.trainer.limit_val_batches=0",
]


def stylegan_run(folder, *extra):
    """A StyleGAN2 of 32x32 digits after two steps."""
    argv = ["-t", "-b", config("configs/gan/stylegan2_digits.yaml"), "-l", folder, "--max_steps", 2, "--no-test"]
    assert run_main(*argv, *QUICK, "data.params.batch_size=4", *SMALL, *extra) == 0
    return only_run(folder)


def gan_run(folder, *extra):
    """A DCGAN of 16x16 digits after two steps."""
    argv = ["-t", "-b", config("configs/gan/dcgan_digits.yaml"), "-l", folder, "--max_steps", 2, "--no-test", *QUICK]
    argv += ["data.params.batch_size=4", "data.params.size=16", *SMALL[-2:]]
    argv += [f"model.params.{p}_config.params.channels=8" for p in ("generator", "discriminator")]
    assert run_main(*argv, *extra) == 0
    return only_run(folder)


def call(module, action, *argv):
    """The exit code of a script."""
    before, sys.argv = sys.argv, [module.__name__, *map(str, argv)]
    try:
        return common.main(module.build_parser(), action)
    finally:
        sys.argv = before
