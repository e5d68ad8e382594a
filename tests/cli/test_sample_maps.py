"""scripts/sample.py on pairs models/<name>/config.yaml + model.ckpt of every kind of condition, maps from files."""

import copy

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm import checkpoint
from ldm.util import instantiate_from_config
from tests.models.test_latent_diffusion import CLASS, CONDITIONS, KL, VQ, plain_unet, tiny, unet
from tests.reference import filler

LATENT = "ldm.models.diffusion.ddpm.LatentDiffusion"
IDENTITY = {"target": "torch.nn.Identity"}
MODELS = {
    "uncond": CONDITIONS["none"],
    "class": {"cond_stage_config": {**CLASS, "params": {**CLASS["params"], "n_classes": 1001}}},
    "adm": CONDITIONS["adm"],
    "text": CONDITIONS["text"],
    "hybrid": CONDITIONS["hybrid"],
    "sr": {
        "first_stage_config": VQ,
        "cond_stage_key": "LR_image",
        "cond_stage_config": IDENTITY,
        "conditioning_key": None,
        "concat_mode": True,
        "unet_config": plain_unet(7),
    },
    "semantic": {
        "cond_stage_key": "segmentation",
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.SpatialRescaler",
            "params": {"n_stages": 1, "in_channels": 12, "out_channels": 3},
        },
        "conditioning_key": "concat",
        "unet_config": plain_unet(7),
    },
    "inpainting": {  # as models/ldm/inpainting_big: the mask is not in the config
        "cond_stage_key": "masked_image",
        "cond_stage_config": "__is_first_stage__",
        "conditioning_key": "concat",
        "unet_config": plain_unet(9),
    },
}


@pytest.fixture
def model(tmp_path):
    """Writes a released model's two files and gives their folder."""

    def write(name, **data):
        params = {
            "first_stage_config": KL, "cond_stage_config": CLASS, "cond_stage_key": "class_label",
            "conditioning_key": "crossattn", "unet_config": unet(), "timesteps": 20, "image_size": 8, "channels": 4,
            "use_ema": False, "monitor": "val/loss_simple_ema", **copy.deepcopy(MODELS[name]),
        }  # fmt: skip
        config = {"model": {"base_learning_rate": 1e-6, "target": LATENT, "params": params}, **data}
        built = filler.fill(instantiate_from_config({"target": LATENT, "params": params}), 0)
        folder = tmp_path / "models/ldm" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        checkpoint.save_atomic({"state_dict": built.state_dict(), "global_step": 5}, folder / "model.ckpt")
        return folder

    return write


@pytest.fixture
def sample(tmp_path, monkeypatch):
    from scripts import common
    from scripts import sample as script

    def run(*argv, code=0):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        argv = ["sample.py", *argv, "--steps", 2, "--outdir", out]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        assert common.main(script.build_parser(), script.draw) == code
        return out

    return run


def noise(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path):
    """Folders of conditions."""
    for name in ("low", "labels", "pairs"):
        (tmp_path / name).mkdir()
    for i, size in enumerate(((8, 8), (8, 16))):
        noise(i, size).save(tmp_path / f"low/{i}.png")
        labels = np.random.default_rng(i).integers(0, 12, (16, 16), dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / f"labels/{i}.png")
        noise(i).save(tmp_path / f"pairs/{i}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[:, : 4 + 4 * i] = 255
        Image.fromarray(mask).save(tmp_path / f"pairs/{i}_mask.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


ASKED = {
    "uncond": [],
    "class": ["--class", "999", "--scale", "2"],
    "adm": ["--class", "3", "--scale", "2"],
    "text": ["--prompt", "a cat", "--scale", "2"],
    "hybrid": ["--prompt", "a cat", "--scale", "2", "--cond-from", "pairs"],
    "sr": ["--cond-from", "low"],
    "semantic": ["--cond-from", "labels"],
    "inpainting": ["--cond-from", "pairs"],
}


@pytest.mark.parametrize("name", MODELS)
def test_a_released_pair_is_sampled(model, sample, files, name):
    asked = [str(files / a) if (files / a).is_dir() else a for a in ASKED[name]]
    count = [] if "--cond-from" in asked else ["-n", 2]
    out = sample("-r", model(name), *count, *asked)
    first, second = pixels(out / "00000.png"), pixels(out / "00001.png")
    assert first.shape == (16, 16, 3) and second.shape == ((16, 32, 3) if name == "sr" else (16, 16, 3))
    again = sample("--like", out / "00001.png")
    assert np.abs(pixels(again / "00001.png") - second).max() <= 1
    if count:
        return
    other = sample("-r", files / f"models/ldm/{name}", "-n", 3, *asked)  # the third goes with the first file again
    assert len(list(other.glob("0*.png"))) == 3
    (files / "moved").mkdir()
    for path in (files / asked[-1]).glob("1*"):
        path.rename(files / "moved" / path.name.replace("1", "0"))
    changed = sample("-r", files / f"models/ldm/{name}", *asked[:-1], files / "moved")
    assert pixels(changed / "00000.png").shape != first.shape or (pixels(changed / "00000.png") != first).any()


def test_the_mask_of_the_released_inpainting_model(files):
    """Beside the encoded picture with black holes: -1 = keep, 1 = repaint."""
    from ldm import conditions

    built = tiny(**MODELS["inpainting"])
    _, get = conditions.samples_of(built, {}, str(files / "pairs"))
    cond = conditions.condition_from(built, [get(0)], [0], {})["c_concat"]
    assert cond.shape == (1, 5, 8, 8)
    assert (cond[:, 4, :, :2] == 1).all() and (cond[:, 4, :, 2:] == -1).all()
    sd = tiny(**CONDITIONS["hybrid"])
    _, get = conditions.samples_of(sd, {}, str(files / "pairs"))
    assert get(0)["masked_image"][0, 0].tolist() == [0, 0, 0] and built.masked_image_key == "masked_image"
    cond = conditions.condition_from(sd, [get(0)], [0], {"prompts": ["cat"]})
    assert (cond["c_concat"][:, 0, :, :2] == 1).all() and (cond["c_concat"][:, 0, :, 2:] == 0).all()
    assert set(cond) == {"c_concat", "c_crossattn", "uncond"}


DATA = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 4,
        "validation": {
            "target": "ldm.data.masks.RandomMasks",
            "params": {
                "seed": 0,
                "dataset": {"target": "ldm.data.builtin.Digits", "params": {"split": "validation", "channels": 3}},
            },
        },
    },
}


def test_data_is_the_validation_data_though_data_sets_are_kept_in_a_folder_of_that_name(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from ldm import conditions

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    digits = {"target": "ldm.data.builtin.Digits", "params": {"split": "validation", "size": 8}}
    config = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "validation": digits}}
    count, get = conditions.samples_of(SimpleNamespace(), {"data": config}, "data")
    assert count == 180 and get(3)["image"].shape == (8, 8, 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "data/one.png")  # now it is a folder with pictures
    assert conditions.samples_of(SimpleNamespace(), {"data": config}, "data")[0] == 1


@pytest.mark.parametrize("name", ["class", "adm", "inpainting"])
def test_conditions_from_the_validation_data(model, sample, name):
    out = sample("-r", model(name, data=DATA), "-n", 2, "--cond-from", "data")
    assert pixels(out / "00001.png").shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("sr", "nowhere", "expected a folder with pictures"),
        ("sr", "data", "names no data"),
        ("class", "low", "not conditioned on pictures"),
        ("inpainting", "low", "has no mask"),
        ("semantic", "pairs", "expected numbers below 12"),
    ],
)
def test_faults(model, sample, files, capsys, name, folder, message):
    where = folder if folder == "data" else files / folder
    sample("-r", model(name), "-n", 1, "--cond-from", where, code=2)
    assert message in capsys.readouterr().err


def test_a_map_model_without_maps_says_how_to_give_them(model, sample, capsys):
    sample("-r", model("sr"), code=2)
    assert "--cond-from" in capsys.readouterr().err


def test_never_released_data_say_what_is_missing(model, sample, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path / "none"))
    target = "ldm.data.openimages.SuperresOpenImagesAdvancedValidation"
    params = {"size": 16, "degradation": "pil_nearest", "downscale_f": 2}
    data = {**DATA, "params": {"batch_size": 1, "validation": {"target": target, "params": params}}}
    sample("-r", model("sr", data=data), "-n", 1, "--cond-from", "data", code=2)
    assert "neither was ever released with the official code" in capsys.readouterr().err


def test_sizes_that_the_network_cannot_halve(model, sample, tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    noise(0, (9, 8)).save(tmp_path / "odd/x.png")
    sample("-r", model("sr"), "--cond-from", tmp_path / "odd", code=2)
    assert "9" in capsys.readouterr().err
    assert torch.is_grad_enabled()
