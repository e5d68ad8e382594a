"""The model that comes with the project: drawn with where there is no Stable Diffusion."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.builtin import OpenMoji
from ldm.evaluation.captions import nearest
from scripts import common
from tests.cli.painting import run

ONE = ["--n_iter", 1, "--n_samples", 1, "--skip_grid"]


@pytest.fixture(autouse=True)
def not_linked(monkeypatch):
    """Whatever stands in the checkout: Stable Diffusion is looked for where it is not."""
    monkeypatch.setattr(common, "SD_WEIGHTS", "models/ldm/nowhere/model.ckpt")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(tmp_path_factory.mktemp("data")))
        return OpenMoji("all", size=64)


def only(folder):
    files = sorted(folder.glob("*.png"))
    assert len(files) == 1, files
    return files[0]


def caption_of(file, data):
    """The captions of the drawing that a picture is nearest to."""
    x = torch.tensor(np.asarray(Image.open(file)))[None].float()
    assert x.shape == (1, 64, 64, 3)
    return data.captions[int(nearest(x, data.images.float()))]


@pytest.mark.smoke
@pytest.mark.parametrize("prompt", ["red apple", "tiger face", "rocket"])
def test_a_prompt_is_drawn_by_it(prompt, tmp_path, capsys, drawings):
    run("txt2img", "--prompt", prompt, "--outdir", tmp_path, *ONE)
    said = capsys.readouterr().out
    assert "no Stable Diffusion at models/ldm/nowhere/model.ckpt, so this is drawn by models/ldm/openmoji" in said
    assert "ln -s" in said and "CC BY-SA 4.0" in said
    file = only(tmp_path / "samples")
    assert prompt in caption_of(file, drawings)
    made = json.loads(Image.open(file).text["ldm"])
    assert made["steps"] == 20 and made["prompt"] == prompt and made["ckpt"].startswith("models/ldm/openmoji")


def test_pictures_are_white_around_and_sharp(tmp_path, drawings):
    run("txt2img", "--prompt", "red apple", "--outdir", tmp_path, *ONE)
    x = np.asarray(Image.open(only(tmp_path / "samples"))).astype(int)
    assert (x[0].mean(), x[-1].mean(), x[:, 0].mean(), x[:, -1].mean()) > (250,) * 4
    assert x.min() < 30  # the outline is black, not grey


def test_unknown_words_are_named(tmp_path, capsys):
    run("txt2img", "--prompt", "red aple", "--outdir", tmp_path, *ONE, "--steps", 2)
    said = capsys.readouterr().out
    assert 'the model does not know the word "aple" (similar words that it knows: ' in said
    assert "apple" in said.partition("that it knows: ")[2].split(")")[0]


def test_like_preview_file_and_negative_prompt(tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("red apple\n\nrocket\n", encoding="utf-8")
    few = ["--steps", 4, "--skip_grid", "--n_iter", 1]
    run("txt2img", "--from-file", lines, "--negative-prompt", "star", "--preview", 2, "--outdir", tmp_path / "a", *few)
    made = sorted((tmp_path / "a" / "samples").glob("*.png"))
    assert len(made) == 2 and (tmp_path / "a" / "preview.png").is_file()
    run("txt2img", "--like", made[1], "--outdir", tmp_path / "b", "--skip_grid")
    again = only(tmp_path / "b" / "samples")
    assert np.array_equal(np.asarray(Image.open(made[1])), np.asarray(Image.open(again)))


def test_img2img_and_inpaint_scale_to_the_size_of_the_model(tmp_path, capsys, drawings):
    apple = drawings.captions.index(["red apple", "apple"])
    picture = Image.fromarray(drawings.images[apple].numpy())
    picture.resize((300, 200)).save(tmp_path / "in.png")
    run(
        "img2img", "--prompt", "pear", "--init-img", tmp_path / "in.png", "--outdir", tmp_path / "a", *ONE, "--steps", 4
    )
    assert "scaled from 300x200 to 64x64" in capsys.readouterr().out
    assert Image.open(only(tmp_path / "a" / "samples")).size == (64, 64)
    picture.save(tmp_path / "apple.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["--image", tmp_path / "apple.png", "--mask", tmp_path / "mask.png", "--prompt", "red apple"]
    run("inpaint", *argv, "--outdir", tmp_path / "b", *ONE, "--steps", 4)
    after = np.asarray(Image.open(only(tmp_path / "b" / "samples")))
    assert np.array_equal(after[:, :32], np.asarray(picture)[:, :32])
    assert not np.array_equal(after[:, 32:], np.asarray(picture)[:, 32:])


def test_a_checkpoint_or_a_linked_stable_diffusion_goes_before_it(tmp_path, monkeypatch, capsys):
    run("txt2img", "--ckpt", tmp_path / "none.ckpt", "--prompt", "x", "--outdir", tmp_path, code=2)
    assert "none.ckpt does not exist" in capsys.readouterr().err
    linked = tmp_path / "model.ckpt"
    linked.write_bytes(b"no checkpoint")
    monkeypatch.setattr(common, "SD_WEIGHTS", str(linked))
    run("txt2img", "--prompt", "x", "--outdir", tmp_path, code=2)
    assert str(linked) in capsys.readouterr().err
