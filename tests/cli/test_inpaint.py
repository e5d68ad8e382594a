"""scripts/inpaint.py: three kinds of models, known pixels, masks of any kind."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.diffusion.official import DDIMSampler
from ldm.painter import to_bytes
from ldm.text2image import load
from ldm.util import SeededNoise
from scripts import inpaint
from tests.cli import painting
from tests.cli.painting import names, picture, pixels, run

KINDS = {"sd": painting.SD, "sd-inpaint": painting.INPAINT_SD, "ldm-inpaint": painting.INPAINT_LDM}
KINDS["no-text"] = {
    **painting.SD,
    "unet_config": painting.without_text(),
    "cond_stage_config": "__is_unconditional__",
    "cond_stage_key": "image",
}
WITH_TEXT = ("sd", "sd-inpaint")
STEPS = ["--steps", 3, "--skip_grid"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: painting.save(folder / kind, params) for kind, params in KINDS.items()}


def make_mask(path, size=(64, 64), box=(16, 24, 40, 56), white=255, black=0, mode="L"):
    """White in box (left, top, right, bottom)."""
    x = np.full(size[::-1], black, np.uint8)
    x[box[1] : box[3], box[0] : box[2]] = white
    Image.fromarray(x).convert(mode).save(path)
    return path


@pytest.fixture
def scene(tmp_path):
    """(picture, mask) of 64x64 pixels."""
    return picture(tmp_path / "in.png", (64, 64)), make_mask(tmp_path / "mask.png")


@pytest.fixture
def paint(models, tmp_path):
    def go(kind, image, mask, *argv, code=0, out="out"):
        config, ckpt = models[kind]
        text = ["--prompt", "a fox"] if kind in WITH_TEXT else []
        masks = [] if mask is None else ["--mask", mask]
        flags = ["--config", config, "--ckpt", ckpt, "--image", image, *masks, *text, "--outdir", tmp_path / out]
        run("inpaint", *flags, *STEPS, *argv, code=code)
        return tmp_path / out / "samples"

    return go


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_known_pixels_stay_and_white_is_repainted(kind, paint, scene):
    samples = paint(kind, *scene, "--n_samples", 2)
    before, white = pixels(scene[0]), pixels(scene[1]) == 255
    for name in ("00000.png", "00001.png"):
        after = pixels(samples / name)
        assert (after[~white] == before[~white]).all()
        assert np.abs(after[white] - before[white]).mean() > 5
    assert (pixels(samples / "00000.png") != pixels(samples / "00001.png")).any()


@pytest.mark.parametrize("kind", KINDS)
def test_any_size(kind, paint, tmp_path, capsys):
    image, mask = picture(tmp_path / "in.png", (51, 70)), make_mask(tmp_path / "mask.png", (51, 70))
    after = pixels(paint(kind, image, mask) / "00000.png")
    assert (
        after[pixels(mask) == 0] == pixels(image)[pixels(mask) == 0]
    ).all() and "is painted" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["plms", "euler_ancestral", "dpmpp_2m", "dpm_solver", "ddpm"])
def test_samplers(sampler, paint, scene):
    after = pixels(paint("sd", *scene, "--sampler", sampler) / "00000.png")
    known = pixels(scene[1]) == 0
    assert (after[known] == pixels(scene[0])[known]).all()


def test_strength_lets_through_what_was_there(paint, scene):
    for kind in ("sd", "sd-inpaint"):
        found = {s: pixels(paint(kind, *scene, "--strength", s, out=f"{kind}{s}") / "00000.png") for s in (0.4, 1)}
        assert (found[0.4] != found[1]).any()
    paint("sd", *scene, "--strength", 0, code=2)


# --- what the networks were trained on --------------------------------------------------------------------------------


def tensors(scene):
    image = torch.from_numpy(pixels(scene[0])).permute(2, 0, 1)[None].float() / 127.5 - 1
    return image, torch.from_numpy(pixels(scene[1]) == 255)[None, None].float()


def test_the_official_latent_diffusion_script(models, scene, tmp_path):
    """Masked picture and mask in [-1, 1]: the hole is black and its mask 1; DDIM without guidance."""
    (tmp_path / "in_mask.png").symlink_to(scene[1])
    config, ckpt = models["ldm-inpaint"]
    flags = ["--config", config, "--ckpt", ckpt, "--indir", tmp_path, "--outdir", tmp_path / "o", "--steps", 5]
    run("inpaint", *flags)
    assert names(tmp_path / "o") == ["in.png"]
    model = load(ckpt, str(config), "").model
    image, mask = tensors(scene)
    masked = ((image + 1) / 2 * (1 - mask)) * 2 - 1
    with torch.no_grad():
        c = model.cond_stage_model.encode(masked)
        c = torch.cat([c, F.interpolate(mask * 2 - 1, size=c.shape[-2:])], dim=1)
        noise = SeededNoise([42])((1, 3, *c.shape[2:]))
        z, _ = DDIMSampler(model).sample(5, 1, (3, *c.shape[2:]), c, x_T=noise, verbose=False)
        predicted = model.decode_first_stage(z).clamp(-1, 1)
    expected = to_bytes((1 - mask) * image + mask * predicted)[0]
    assert np.abs(pixels(tmp_path / "o/in.png") - expected).max() <= 1


def test_the_stable_diffusion_inpainting_network(models, paint, scene):
    """Nine channels: latents, mask (1 = repaint), latents of the picture with a grey hole; guidance by the prompt."""
    found = pixels(paint("sd-inpaint", *scene, "--steps", 5, "--scale", 4) / "00000.png")
    config, ckpt = models["sd-inpaint"]
    model = load(ckpt, str(config), "").model
    image, mask = tensors(scene)
    with torch.no_grad():
        z = model.scale_factor * model.encode_first_stage(image * (mask < 0.5)).mode()
        maps = torch.cat([F.interpolate(mask, size=z.shape[2:]), z], dim=1)
        c = {"c_concat": [maps], "c_crossattn": [model.get_learned_conditioning(["a fox"])]}
        uc = {"c_concat": [maps], "c_crossattn": [model.get_learned_conditioning([""])]}
        x, _ = DDIMSampler(model).sample(
            5, 1, z.shape[1:], c, x_T=SeededNoise([42])(z), verbose=False, unconditional_guidance_scale=4,
            unconditional_conditioning=uc,
        )  # fmt: skip
        expected = to_bytes(mask * model.decode_first_stage(x) + (1 - mask) * image)[0]
    assert np.abs(found - expected).max() <= 1


@pytest.mark.smoke
def test_inpainting_networks_want_a_mask(models, scene, tmp_path, capsys):
    config, ckpt = models["sd-inpaint"]
    run("txt2img", "--config", config, "--ckpt", ckpt, "--n_iter", 1, "--outdir", tmp_path, code=2)
    assert "use scripts/inpaint.py" in capsys.readouterr().err


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_help_says_which_colour():
    assert "White in the mask = repaint, black = keep" in inpaint.build_parser().format_help()


def test_a_mask_of_another_size(paint, scene, tmp_path, capsys):
    wrong = make_mask(tmp_path / "wrong.png", (64, 32))
    paint("sd", scene[0], wrong, code=2)
    message = capsys.readouterr().err
    assert "wrong.png is 64x32 pixels, the picture 64x64" in message and not (tmp_path / "out").exists()


def test_a_grey_mask(paint, scene, tmp_path, capsys):
    grey = make_mask(tmp_path / "grey.png", white=200, black=100)
    after = pixels(paint("sd", scene[0], grey) / "00000.png")
    assert "grey; from 50 % brightness on it counts as white" in capsys.readouterr().out
    assert (after == pixels(paint("sd", *scene, out="sharp") / "00000.png")).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "P", "LA"])
def test_masks_of_any_mode(mode, paint, scene, tmp_path):
    mask = make_mask(tmp_path / "m.png", mode=mode)
    assert (
        pixels(paint("sd", scene[0], mask) / "00000.png") == pixels(paint("sd", *scene, out="l") / "00000.png")
    ).all()


def test_a_mask_with_nothing_to_do(paint, scene, tmp_path, capsys):
    paint("sd", scene[0], make_mask(tmp_path / "black.png", white=0), code=2)
    assert "no white pixel" in capsys.readouterr().err
    paint("sd", scene[0], None, code=2)
    assert "give --mask FILE" in capsys.readouterr().err


def test_transparent_parts_are_the_mask_if_there_is_none(paint, scene, tmp_path, capsys):
    alpha = 255 - pixels(scene[1]).astype(np.uint8)
    Image.fromarray(np.dstack([pixels(scene[0]).astype(np.uint8), alpha])).save(tmp_path / "alpha.png")
    after = pixels(paint("sd", tmp_path / "alpha.png", None) / "00000.png")
    known = alpha == 255
    assert after.shape[2] == 3 and (after[known] == pixels(scene[0])[known]).all()
    assert "alpha channel" in capsys.readouterr().out


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_folder_of_pairs(models, tmp_path):
    folder, config, ckpt = tmp_path / "in", *models["ldm-inpaint"]
    folder.mkdir()
    for name, size in (("a", (32, 32)), ("b", (40, 24))):
        picture(folder / f"{name}.png", size)
        make_mask(folder / f"{name}_mask.png", size, (8, 8, 24, 16))
    flags = ["--config", config, "--ckpt", ckpt, "--indir", folder, "--outdir", tmp_path / "o", "--steps", 2]
    run("inpaint", *flags)
    assert names(tmp_path / "o") == ["a.png", "b.png"]
    first = pixels(tmp_path / "o/b.png")
    run("inpaint", *flags, "--seed", 1)
    assert names(tmp_path / "o") == ["a-2.png", "a.png", "b-2.png", "b.png"]
    assert (pixels(tmp_path / "o/b.png") == first).all() and first.shape == (24, 40, 3)


def test_made_again(paint, scene, tmp_path):
    first = paint("sd", *scene, "--seed", 4)
    settings = json.loads(Image.open(first / "00000.png").text["ldm"])
    assert settings["script"] == "inpaint" and settings["mask"] == str(scene[1]) and settings["seed"] == 4
    run("inpaint", "--like", first / "00000.png", "--outdir", tmp_path / "again")
    assert (pixels(tmp_path / "again/samples/00000.png") == pixels(first / "00000.png")).all()


def test_incomplete_input(tmp_path, capsys):
    run("inpaint", code=2)
    assert "give --image FILE --mask FILE, or --indir DIR" in capsys.readouterr().err
    run("inpaint", "--indir", tmp_path, code=2)
    assert "no *_mask.png" in capsys.readouterr().err
    make_mask(tmp_path / "a_mask.png")
    run("inpaint", "--indir", tmp_path, code=2)
    assert "no picture for the mask" in capsys.readouterr().err
    picture(tmp_path / "a.png", (64, 64))
    run("inpaint", "--indir", tmp_path, code=2)
    assert "no weights at models/ldm/inpainting_big/last.ckpt" in capsys.readouterr().err
