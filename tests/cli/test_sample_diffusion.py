"""scripts/sample_diffusion.py: the official flags, folders and names."""

import sys

import numpy as np
import pytest
import yaml

from scripts import common, sample_diffusion
from tests.cli import painting
from tests.cli.painting import names, pixels

PARAMS = {
    **painting.SD,
    "unet_config": painting.without_text(),
    "cond_stage_config": "__is_unconditional__",
    "cond_stage_key": "image",
}


@pytest.fixture
def model(tmp_path):
    return painting.save(tmp_path / "celeba", PARAMS)[1]


def draw(*argv, code=0):
    old, sys.argv = sys.argv, ["sample_diffusion.py", *map(str, argv)]
    try:
        assert common.main(sample_diffusion.build_parser(), sample_diffusion.draw) == code
    finally:
        sys.argv = old


def only(folder):
    found = list(folder.iterdir())
    assert len(found) == 1
    return found[0]


def test_folders_and_names(model):
    draw("-r", model.parent, "-n", 3, "-c", 2, "-e", 0, "--batch_size", 2)
    run = only(model.parent / "samples/00470000")
    assert names(run) == ["img", "numpy", "sampling_config.yaml"]
    assert names(run / "img") == [f"sample_00000{i}.png" for i in range(3)]
    stack = np.load(run / "numpy/3x64x64x3-samples.npz")["arr_0"]
    assert (stack[2] == pixels(run / "img/sample_000002.png")).all()
    settings = yaml.safe_load((run / "sampling_config.yaml").read_text())
    assert settings["custom_steps"] == 2 and settings["n_samples"] == 3 and settings["weights"] == "raw"


def test_another_folder_all_steps_and_a_changed_config(model, tmp_path):
    argv = ["-r", model, "-n", 1, "-v", "-l", tmp_path / "out", "model.params.timesteps=4"]
    draw(*argv, code=2)  # the file's noise schedule has 1000 steps
    draw("-r", model, "-n", 1, "-c", 1, "-l", tmp_path / "out", "model.params.image_size=4")
    run = only(tmp_path / "out/celeba/samples/00470000")
    assert pixels(run / "img/sample_000000.png").shape == (32, 32, 3)


@pytest.mark.parametrize("argv", [[], ["-r", "nowhere"]])
def test_no_run(argv, capsys):
    draw(*argv, code=2)
    assert capsys.readouterr().err.startswith("error: ")
