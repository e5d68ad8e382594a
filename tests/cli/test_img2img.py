"""scripts/img2img.py: official flags and names, any picture, strength from 0 to 1."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.official import DDIMSampler
from ldm.painter import to_bytes
from ldm.text2image import load
from ldm.util import SeededNoise
from scripts import common, img2img
from tests.cli import painting
from tests.cli.painting import names, picture, pixels, run

ONE = ["--n_samples", 1, "--skip_grid", "--prompt", "a fox"]
OFFICIAL = {"prompt": common.PROMPT, "steps": 50, "n_iter": 1, "n_samples": 2, "scale": 5.0, "strength": 0.75}
OFFICIAL |= {"seed": 42, "precision": "autocast", "sampler": "ddim"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return painting.save(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def paint(files, tmp_path):
    def go(image, *argv, code=0, out="out"):
        flags = ["--config", files[0], "--ckpt", files[1], "--init-img", image, "--outdir", tmp_path / out]
        run("img2img", *flags, "--steps", 4, *argv, code=code)
        return tmp_path / out / "samples"

    return go


@pytest.mark.smoke
def test_official_flags_and_defaults(monkeypatch):
    monkeypatch.setattr(common, "SD_WEIGHTS", __file__)  # any file: Stable Diffusion is there
    flags = "--prompt --init-img --outdir --skip_grid --skip_save --ddim_steps --plms --fixed_code --ddim_eta --n_iter"
    flags += " --C --f --n_samples --n_rows --scale --strength --from-file --config --ckpt --seed --precision"
    known = img2img.build_parser().format_help()
    assert [f for f in flags.split() if f not in known] == []
    args = img2img.build_parser().parse_args([])
    found = common.settle(args, "img2img", **img2img.DEFAULTS)
    assert {k: found[k] for k in OFFICIAL} == OFFICIAL and args.outdir == "outputs/img2img-samples"


@pytest.mark.smoke
def test_the_official_call(paint, files, tmp_path):
    """A posterior sample, noised and denoised by the official class, which starts where the noise is."""
    image = picture(tmp_path / "in.png", (64, 64))
    samples = paint(image, "--steps", 8, "--strength", 0.5, "--n_samples", 2, "--seed", 3, "--prompt", "a fox")
    assert names(samples) == ["00000.png", "00001.png"] and names(samples.parent) == ["grid-0000.png", "samples"]
    model = load(files[1], str(files[0]), "").model
    with torch.no_grad():
        c, uc = model.get_learned_conditioning(["a fox"]), model.get_learned_conditioning([""])
        x = torch.from_numpy(pixels(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        posterior = model.encode_first_stage(x)
        sampler = DDIMSampler(model)
        sampler.make_schedule(8, verbose=False)
        for i, seed in enumerate((3, 4)):
            # the noise of the posterior is the seed's other stream
            z = model.scale_factor * posterior.sample(SeededNoise([-1 - seed]))
            noisy = sampler.path.add_noise(z, SeededNoise([seed])(z), sampler.grid[4])
            out = sampler.decode(noisy, c, 4, 5.0, uc)
            expected = to_bytes(model.decode_first_stage(out))[0]
            assert np.abs(pixels(samples / f"0000{i}.png") - expected).max() <= 1


@pytest.mark.smoke
def test_strength_from_nothing_to_all(paint, tmp_path):
    image = picture(tmp_path / "in.png", (64, 64))
    found = {s: pixels(paint(image, *ONE, "--strength", s, out=f"s{s}") / "00000.png") for s in (0, 0.1, 0.5, 1)}
    for sampler in ("plms", "dpmpp_2m", "heun", "euler_ancestral"):
        for s in (0, 1):
            again = pixels(paint(image, *ONE, "--strength", s, "--sampler", sampler, out=f"{sampler}{s}") / "00000.png")
            assert s or (again == found[0]).all()
    # nothing: what the first stage makes of the picture, whatever the seed's noise; 0.1 of 4 steps is none either
    assert (found[0] == found[0.1]).all()
    assert (found[0.5] != found[0]).any() and (found[1] != found[0.5]).any()
    for wrong in (-0.1, 1.5):
        paint(image, "--strength", wrong, code=2)


def test_strength_0_is_what_the_first_stage_makes_of_the_picture(paint, files, tmp_path):
    image = picture(tmp_path / "in.png", (64, 64))
    found = pixels(paint(image, *ONE, "--strength", 0) / "00000.png")
    model = load(files[1], str(files[0]), "").model
    with torch.no_grad():
        x = torch.from_numpy(pixels(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        z = model.scale_factor * model.encode_first_stage(x).sample(SeededNoise([-43]))
        assert np.abs(found - to_bytes(model.decode_first_stage(z))[0]).max() <= 1


def test_any_size(paint, tmp_path, capsys):
    image = picture(tmp_path / "in.png", (51, 70))
    samples = paint(image, *ONE)
    assert Image.open(samples / "00000.png").size == (51, 70)
    assert "size 51x70: the model takes multiples of 16, so 64x80 is painted and cut back" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_any_mode(mode, paint, tmp_path, capsys):
    image = tmp_path / f"in.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray((pixels(picture(tmp_path / "grey.png", (32, 32), "L")) * 257).astype(np.uint16)).save(image)
    else:
        picture(image, (32, 32), mode)
    samples = paint(image, *ONE, "--steps", 1, "--strength", 1)
    assert Image.open(samples / "00000.png").mode == "RGB"


def test_transparent_parts_are_laid_on_white(paint, tmp_path, capsys):
    rgb = pixels(picture(tmp_path / "rgb.png", (32, 32))).astype(np.uint8)
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:, :16] = 0
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "alpha.png")
    rgb[:, :16] = 255
    Image.fromarray(rgb).save(tmp_path / "white.png")
    a = pixels(paint(tmp_path / "alpha.png", *ONE, "--strength", 0, out="a") / "00000.png")
    assert "alpha channel" in capsys.readouterr().out
    b = pixels(paint(tmp_path / "white.png", *ONE, "--strength", 0, out="b") / "00000.png")
    assert (a == b).all()


def test_made_again(paint, tmp_path):
    image = picture(tmp_path / "in.png", (32, 32))
    first = paint(image, *ONE, "--strength", 0.5, "--seed", 9)
    settings = json.loads(Image.open(first / "00000.png").text["ldm"])
    assert settings["strength"] == 0.5 and settings["init_img"] == str(image) and settings["seed"] == 9
    run("img2img", "--like", first / "00000.png", "--outdir", tmp_path / "again")
    assert (pixels(tmp_path / "again/samples/00000.png") == pixels(first / "00000.png")).all()


def test_one_picture_for_each_line(paint, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na dog\n\na cat\n")
    samples = paint(picture(tmp_path / "in.png"), "--from-file", tmp_path / "p.txt", "--n_samples", 2)
    assert names(samples) == ["00000.png", "00001.png", "00002.png"]


@pytest.mark.parametrize("name", ["nothing.png", "text.png", None])
def test_no_picture(name, paint, files, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    if name is None:
        run("img2img", "--config", files[0], "--ckpt", files[1], code=2)
    else:
        paint(tmp_path / name, code=2)
    assert capsys.readouterr().err.startswith("error: ")
