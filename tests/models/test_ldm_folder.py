"""Two stages on one's own pictures by the folder configs: classes, captions, neither; grey, 16-bit, not square."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from scripts import common
from scripts import sample as sample_script
from tests.cli.tools import config, only_run, run_main
from tests.models.ldm_runs import UNET, last

FAST = ["lightning.trainer.log_every_n_steps=1", "data.params.num_workers=0", "--limit_val_batches", 1, "--no-test"]
FAST += ["data.params.batch_size=4", "--max_steps", 2]
STAGE = ["ch=32", "ch_mult=[1,2]", "num_res_blocks=1"]
FIRST = [*(f"model.params.ddconfig.{s}" for s in STAGE), "model.params.lossconfig.params.disc_num_layers=1"]
SECOND = [
    UNET + s for s in ("model_channels=32", "channel_mult=[1,2]", "num_res_blocks=1", "attention_resolutions=[2]")
]
SECOND += [UNET + "context_dim=32", "lightning.callbacks.image_logger.params.log_images_kwargs={ddim_steps: 2}"]
CLASS = ["model.params.cond_stage_config.params.embed_dim=32"]
TEXT = [
    "model.params.cond_stage_config.params.clip_config={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2}"
]
SHAPES = {"colour": (16, 3, (16, 16)), "not square": ([16, 24], 3, (16, 24)), "grey": ([24, 16], 1, (24, 16))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes with captions: colour, palette and alpha PNGs, JPEGs, 8- and 16-bit grey, of many sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        name, size = ("cat", "dog")[i % 2], (30 + i, 20 + 3 * (i % 4))
        path = root / name / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        if i % 3 == 0:  # values that need their 16 bits
            Image.fromarray(rng.integers(0, 65536, size, dtype=np.uint16)).save(path)
        elif i % 3 == 1:
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
        else:
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path.with_suffix(".jpg"))
        path.with_suffix(".txt").write_text(f"a {name}, number {i}")
    return root


def first_stage(folder, pictures, *argv):
    argv = ["-t", "-b", config("configs/autoencoder/kl_folder.yaml"), "-l", folder, *FAST, *FIRST, *argv]
    assert run_main(*argv, f"data.params.root={pictures}") == 0
    return only_run(folder)


def second_stage(name, folder, pictures, first, *argv):
    argv = ["-t", "-b", config(f"configs/latent-diffusion/{name}.yaml"), "-l", folder, *FAST, *SECOND, *argv]
    assert run_main(*argv, f"data.params.root={pictures}", f"first_stage={first}") == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def first(pictures, tmp_path_factory):
    """A first stage of square colour pictures."""
    return first_stage(tmp_path_factory.mktemp("first"), pictures, "data.params.size=16")


def sample(monkeypatch, out, *argv):
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, argv), "--steps", "2", "--outdir", str(out)])
    assert common.main(sample_script.build_parser(), sample_script.draw) == 0
    return [np.asarray(Image.open(p)) for p in sorted(out.glob("0*.png"))]


@pytest.mark.parametrize("kind", SHAPES)
def test_both_stages_on_classes(pictures, tmp_path, monkeypatch, kind):
    size, channels, (height, width) = SHAPES[kind]
    shape = [f"data.params.size={size}", f"data.params.channels={channels}"]
    first = first_stage(tmp_path / "kl", pictures, *shape)
    reconstructions = sorted((first / "images/train").glob("reconstructions_*.png"))
    assert reconstructions and list((first / "images/train").glob("inputs_*.png"))
    run = second_stage("folder", tmp_path / "ldm", pictures, first, *CLASS, *shape)
    params = yaml.safe_load(last(tmp_path / "ldm")["config"])["model"]["params"]
    assert params["channels"] == 4 and params["num_classes"] == 2
    assert params["image_size"] == (8 if kind == "colour" else [height // 2, width // 2])
    cat, dog = sample(monkeypatch, tmp_path / "out", "-r", run, "-n", 2, "--scale", 2)
    assert cat.shape == dog.shape == ((height, width) if channels == 1 else (height, width, channels))
    named = sample(monkeypatch, tmp_path / "named", "-r", run, "-n", 1, "--class", "dog", "--seed", 1, "--scale", 2)
    np.testing.assert_allclose(named[0], dog.astype(int), atol=1)


def test_captions(pictures, first, tmp_path, monkeypatch):
    """The text encoder is trained with the network, from latents on disk."""
    options = ["data.params.size=16", f"model.params.cache_latents={tmp_path / 'latents'}", "model.learning_rate=0.01"]
    options += ["--max_steps", 4]  # the last layers, which start at zero, hand no gradient down at first
    warm = "model.params.scheduler_config=null"
    run = second_stage("folder_text", tmp_path / "ldm", pictures, first, *TEXT, *options, warm)
    content = last(tmp_path / "ldm")
    names = [k for k in content["state_dict"] if k.startswith("cond_stage_model.") and k.endswith("q_proj.weight")]
    trained = {k: content["state_dict"][k] for k in names}
    still = second_stage(
        "folder_text", tmp_path / "still", pictures, first, *TEXT, *options, warm, "model.learning_rate=1e-12"
    )
    before = torch.load(still / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert trained and all((v - before[k]).abs().max() > 1e-3 for k, v in trained.items())
    raw = ["-r", run, "-n", 1, "--weights", "raw", "--scale", 3]
    cat = sample(monkeypatch, tmp_path / "cat", *raw, "--prompt", "a cat")
    dog = sample(monkeypatch, tmp_path / "dog", *raw, "--prompt", "a dog")
    assert cat[0].shape == (16, 16, 3) and (cat[0] != dog[0]).any()
    written = {p.name.partition("_gs")[0] for p in (run / "images/train").iterdir()}
    assert {"inputs", "reconstruction", "conditioning", "samples"} <= written


def test_a_flat_folder_is_one_class(pictures, first, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in [*pictures.rglob("*.jpg"), *pictures.rglob("*.png")]:
        (flat / path.name).write_bytes(path.read_bytes())
    run = second_stage("folder", tmp_path / "ldm", flat, first, *CLASS, "data.params.size=16")
    assert len(sample(monkeypatch, tmp_path / "out", "-r", run, "-n", 2)) == 2


def test_no_condition_at_all(pictures, first, tmp_path, monkeypatch):
    free = ["model.params.cond_stage_config=__is_unconditional__", "model.params.cond_stage_trainable=false"]
    free += ["model.params.num_classes=null", "model.params.cond_dropout=0"]
    free += [UNET + "use_spatial_transformer=false", UNET + "context_dim=null"]
    run = second_stage("folder", tmp_path / "ldm", pictures, first, "data.params.size=16", *free)
    assert len(sample(monkeypatch, tmp_path / "out", "-r", run, "-n", 2)) == 2
