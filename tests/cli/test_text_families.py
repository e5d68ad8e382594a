"""Every family of text-to-image models through scripts/txt2img.py and img2img.py: one file, its config beside it."""

import inspect

import pytest
import torch
import yaml

from ldm.text2image import load
from tests.cli import painting
from tests.cli.painting import names, picture, pixels, run
from tests.conversion import models
from tests.modules.test_tokenizer import VOCAB

FAMILIES = ["sd1", "sd2", "sd2-v", "sdxl-base", "sdxl-refiner", "ldm-text", "ldm-text-vq"]
FLAGS = ["--steps", 2, "--n_iter", 1, "--n_samples", 1, "--skip_grid"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Writes the file of a family, with the names of its release, and its config beside it."""
    folder, made = tmp_path_factory.mktemp("released"), {}

    def write(name):
        if name not in made:
            made[name] = folder / f"{name}.ckpt"
            torch.save({"state_dict": models.official_state(name, models.modules(name))}, made[name])
            made[name].with_suffix(".yaml").write_text(yaml.safe_dump(models.config(name)))
        return made[name]

    return write


@pytest.fixture(autouse=True)
def vocabulary(tmp_path, monkeypatch):
    path = tmp_path / "models/bert-base-uncased/vocab.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_becomes_a_picture(name, released, tmp_path, capsys):
    argv = ["--ckpt", released(name), "--H", 32, "--W", 32, *FLAGS]
    for out, words in (("one", ["a photo"]), ("two", ["a cat"]), ("three", ["a photo", "--negative-prompt", "cat"])):
        run("txt2img", *argv, "--prompt", *words, "--outdir", tmp_path / out)
    one, two, three = (pixels(tmp_path / out / "samples/00000.png") for out in ("one", "two", "three"))
    assert one.shape == (32, 32, 3) and (one != two).any() and (one != three).any()
    start = picture(tmp_path / "start.png")
    run("img2img", "--ckpt", released(name), "--init-img", start, "--prompt", "a photo", *FLAGS, "--outdir", "again")
    assert names(tmp_path / "again/samples") == ["00000.png"]
    assert f"config: {released(name).with_suffix('.yaml')}" in capsys.readouterr().out


def test_sdxl_is_told_the_size_that_is_painted(released):
    model = load(released("sdxl-base"), None, "none").model
    told = {}
    for size in (16, 32):
        cond = model.condition([0], prompts=["a fox"], height=size, width=size)
        told[size] = cond["y"]
    numbers = [told[size][0, 48:] for size in (16, 32)]  # behind the pooled text
    assert (numbers[0] != numbers[1]).any()


def test_the_painter_tells_the_size(released, monkeypatch):
    from ldm.painter import Knobs, Painter

    model, seen = load(released("sdxl-base"), None, "none").model, []
    condition = model.condition

    def told(seeds, *, height, width, **text):
        seen.append((height, width))
        return condition(seeds, height=height, width=width, **text)

    told.__signature__ = inspect.signature(condition)
    monkeypatch.setattr(model, "condition", told)
    painter = Painter(model, Knobs(steps=1))
    for size in ((16, 32), (16, 32), (32, 16)):
        painter.paint([(0, "a fox")], size)
    assert seen == [(16, 32), (32, 16)]


def test_a_size_that_the_model_was_not_trained_on_is_said(tmp_path, capsys):
    config, ckpt = painting.save(tmp_path / "model")
    argv = ["--config", config, "--ckpt", ckpt, "--n_iter", 1, "--n_samples", 1, "--steps", 1, "--skip_grid"]
    run("txt2img", *argv, "--outdir", "default")
    assert "the model was trained on 64x64 pixels: --H 64 --W 64" in capsys.readouterr().out
    assert pixels("default/samples/00000.png").shape == (512, 512, 3)
    run("txt2img", *argv, "--outdir", "asked", "--H", 64, "--W", 64)
    assert "was trained on" not in capsys.readouterr().out
