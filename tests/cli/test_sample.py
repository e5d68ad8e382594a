"""scripts/sample.py: one seed per picture, pictures that say how they were made, the same picture again."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.cli.tools import QUICK, ROOT, config, only_run, run_main

TINY = [
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.channel_mult=[1]",
    "model.params.unet_config.params.attention_resolutions=[]",
    "model.params.scheduler_config=null",
    "model.learning_rate=0.01",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    argv = ["-t", "-b", config("configs/diffusion/ddpm_digits.yaml"), "-l", logs, "--max_steps", 12, *QUICK, *TINY]
    assert run_main(*argv, "--no-test", "lightning.callbacks.image_logger.params.disabled=true") == 0
    return only_run(logs)


def sample(*argv, code=0):
    command = [sys.executable, str(ROOT / "scripts/sample.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.smoke
def test_a_seed_is_a_picture_whatever_the_batch(run, tmp_path):
    sample("-r", run, "-n", 4, "--seed", 7, "--steps", 4, "--outdir", tmp_path / "a")
    sample("-r", run, "-n", 1, "--seed", 8, "--steps", 4, "--outdir", tmp_path / "b")
    sample("-r", run, "-n", 4, "--seed", 7, "--steps", 4, "--outdir", tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "00007.png",
        "00008.png",
        "00009.png",
        "00010.png",
        "grid.png",
    ]
    assert np.abs(pixels(tmp_path / "a/00008.png") - pixels(tmp_path / "b/00008.png")).max() <= 1
    for name in ("00007.png", "00010.png", "grid.png"):
        assert (pixels(tmp_path / "a" / name) == pixels(tmp_path / "c" / name)).all()
    assert (pixels(tmp_path / "a/00007.png") != pixels(tmp_path / "a/00008.png")).any()


def test_a_picture_is_made_again_from_itself(run, tmp_path):
    argv = ["--seed", 3, "--class", 7, "--scale", 2, "--steps", 5, "--sampler", "euler_ancestral", "--weights", "raw"]
    sample("-r", run, "-n", 2, *argv, "--outdir", tmp_path / "a")
    sample("--like", tmp_path / "a/00004.png", "--outdir", tmp_path / "b")
    assert np.abs(pixels(tmp_path / "a/00004.png") - pixels(tmp_path / "b/00004.png")).max() <= 1
    settings = json.loads(Image.open(tmp_path / "b/00004.png").text["ldm"])
    assert settings["seed"] == 4 and settings["class_label"] == "7" and settings["weights"] == "raw"
    assert settings["knobs"] == {"scale": 2.0, "steps": 5, "sampler": "euler_ancestral"}
    assert settings["sha256"] and settings["torch"]


def test_no_other_flag_is_needed_and_nothing_is_overwritten(run, tmp_path):
    for _ in range(2):
        sample("-r", run, "-n", 2, "--outdir", tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000-2.png", "00000.png", "00001-2.png", "00001.png", "grid-2.png", "grid.png"]


def test_ema_and_raw_differ(run, tmp_path):
    for weights in ("ema", "raw"):
        done = sample("-r", run, "-n", 1, "--steps", 3, "--weights", weights, "--outdir", tmp_path / weights)
        assert f"weights: {weights}" in done.stdout
    assert (pixels(tmp_path / "ema/00000.png") != pixels(tmp_path / "raw/00000.png")).any()


def test_the_class_decides(run, tmp_path):
    for label in ("1", "8"):
        sample("-r", run, "-n", 1, "--steps", 3, "--class", label, "--outdir", tmp_path / label)
    assert (pixels(tmp_path / "1/00000.png") != pixels(tmp_path / "8/00000.png")).any()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--class", "11"], ["11", "0..9"]),
        (["--class", "dog"], ["dog"]),
        (["--sampler", "eular"], ["eular", "euler"]),
        (["--steps", "0"], ["0"]),
        (["--prompt", "a cat"], ["prompt"]),
        (["--set", "truncation=0.7"], ["truncation"]),
        (["--set", "x"], ["knob=value"]),
        (["-n", "0"], ["at least 1"]),
        (["--device", "cuda"], ["cuda", "available: cpu"]),
    ],
)
def test_wrong_flags_are_one_message(run, tmp_path, argv, words):
    done = sample("-r", run, "--outdir", tmp_path, *argv, code=2)
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message


def test_no_run(tmp_path):
    assert "-r logs/<run>" in sample("-n", 1, code=2).stderr
    assert "does not exist" in sample("-r", tmp_path / "no", code=2).stderr


def test_like_of_a_strange_picture(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert "holds no settings" in sample("--like", tmp_path / "x.png", code=2).stderr
    (tmp_path / "y.png").write_text("no picture")
    assert "cannot be read" in sample("--like", tmp_path / "y.png", code=2).stderr


def test_a_classifier_generates_nothing(tmp_path):
    argv = [
        "-t",
        "-b",
        config("configs/classifier/resnet_digits.yaml"),
        "-l",
        tmp_path,
        "--max_steps",
        1,
        *QUICK,
        "--no-test",
    ]
    assert run_main(*argv) == 0
    assert "generates nothing" in sample("-r", only_run(tmp_path), code=2).stderr
