"""Every YAML in configs/ trains on a folder of one's own pictures, draws, and is sampled; only its sizes are shrunk."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.conditions import condition_from, samples_of
from ldm.config import load_yaml, mappings
from ldm.generate import load_run
from ldm.util import instantiate_from_config
from tests.cli.tools import QUICK, ROOT, only_run, run_main
from tests.data.scenes import make_scenes

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINABLE = [  # the others go over one of these; those of autoregressive/ are tested by themselves
    c for c in CONFIGS if {"model", "data"} <= set(load_yaml(c)) and c.parent.name != "autoregressive"
]
SIZE = 32
# class -> what is made small; a parameter is only set where the class takes it
SMALL = {
    "UNetModel": {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]},
    "AutoencoderKL": {"ddconfig.ch": 32, "ddconfig.num_res_blocks": 1, "ddconfig.resolution": SIZE},
    "VQModel": {"ddconfig.ch": 32, "ddconfig.num_res_blocks": 1, "ddconfig.resolution": SIZE},
    "DiT": {"hidden_size": 32, "depth": 1, "num_heads": 2, "context_dim": 32},
    "WordEmbedder": {"dim": 32, "depth": 1, "heads": 2},
    "Generator": {"channel_base": 256, "channel_max": 16, "z_dim": 16, "w_dim": 16, "mapping_kwargs.num_layers": 2},
    "Discriminator": {"channel_base": 256, "channel_max": 16},
    "DCGANGenerator": {"channels": 8},
    "DCGANDiscriminator": {"channels": 8},
    "MLPGenerator": {"hidden": [32, 32]},
    "MLPDiscriminator": {"hidden": [32]},
    "FrozenCLIPEmbedder": {
        "clip_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    },
}


def shrink(path):
    """Overrides that make the config small and quick."""
    for key, node in mappings(load_yaml(path)):
        name = str(node.get("target", "")).rpartition(".")[2]
        for parameter, value in SMALL.get(name, {}).items():
            yield f"{key}.params.{parameter}={str(value).replace(chr(39), '')}"
        if name == "UNetModel" and "context_dim" in (node.get("params") or {}) and "FrozenCLIP" in path.read_text():
            yield f"{key}.params.context_dim=32"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two class folders of pictures with captions."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        folder = root / ("cat", "dog")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of {folder.name} number {i}")
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures with masks."""
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def first_stage(pictures, tmp_path_factory):
    """A run of kl_folder.yaml for pictures with so many channels."""
    runs = {}

    def run(channels):
        if channels not in runs:
            path, logs = ROOT / "configs/autoencoder/kl_folder.yaml", tmp_path_factory.mktemp("first")
            argv = ["-t", "-b", path, "-l", logs, "--max_steps", 1, *QUICK, "data.params.batch_size=4", "--no-test"]
            argv += [f"data.params.root={pictures}", f"data.params.size={SIZE}", f"data.params.channels={channels}"]
            assert run_main(*argv, *shrink(path), "lightning.callbacks.image_logger.params.disabled=true") == 0
            runs[channels] = only_run(logs)
        return runs[channels]

    return run


def conditions(model, run, seeds):
    """One for each seed; a model of inpainting gets its maps from the run's own data."""
    if getattr(model, "conditioning_key", None) != "hybrid":
        return model.condition(seeds)
    count, sample = samples_of(model, load_run(run)[1]["config"], "data")
    return condition_from(model, [sample(s % count) for s in seeds], seeds, {})


@pytest.mark.parametrize("path", TRAINABLE, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_two_steps_pictures_and_samples(path, pictures, scenes, first_stage, tmp_path):
    pictures = scenes if "SegmentationFolder" in path.read_text() else pictures
    argv = ["-t", "-b", path, "-l", tmp_path, "--max_steps", 2, *QUICK, "data.params.batch_size=4", "--no-test"]
    argv += [f"data.params.root={pictures}", f"data.params.size={SIZE}", *shrink(path)]
    argv += ["lightning.callbacks.image_logger.params.batch_frequency=2", "lightning.trainer.limit_val_batches=1"]
    argv += ["lightning.callbacks.image_logger.params.increase_log_steps=false", "--limit_train_batches", 4]
    config = load_yaml(path)
    if "first_stage_config: ???" in path.read_text(encoding="utf-8"):
        argv.append(f"first_stage={first_stage(config.data.params.get('channels', 3))}")
    assert run_main(*argv) == 0
    run = only_run(tmp_path)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert list((run / "images/train").glob("*_gs-000002_*.png"))
    model, _ = load_run(run)
    if hasattr(model, "sample"):
        quick = {"steps": 2} if "steps" in model.sample.__annotations__ else {}
        both = model.sample(conditions(model, run, [3, 4]), seeds=[3, 4], **quick)
        alone = model.sample(conditions(model, run, [4]), seeds=[4], **quick)
        assert torch.isfinite(both).all() and both.min() >= -1 and both.max() <= 1
        assert both.shape == (2, 3, SIZE, SIZE) or both.shape[:2] == (2, 1)
        assert (both[1:] - alone).abs().max() <= 2 / 255


@pytest.mark.parametrize("path", TRAINABLE, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_training_configs_say_when_they_end_and_how_fast_they_learn(path):
    config = load_yaml(path)
    assert config.lightning.trainer.get("max_steps") or config.lightning.trainer.get("max_epochs")
    assert config.model.get("learning_rate") or config.model.get("base_learning_rate")


@pytest.mark.parametrize(
    ("path", "part", "millions"),
    [
        ("diffusion/ddpm_cifar10", "unet_config", 35.7),
        ("gan/stylegan2_ffhq256", "generator_config", 24.77),
        ("gan/stylegan2_ffhq256", "discriminator_config", 24.00),
        ("gan/stylegan2_ffhq1024", "generator_config", 30.37),
        ("gan/stylegan2_ffhq1024", "discriminator_config", 29.01),
    ],
)
def test_configs_named_after_a_paper_s_model_have_its_size(path, part, millions):
    config = load_yaml(ROOT / f"configs/{path}.yaml")
    extra, digits = ({}, 1) if part == "unet_config" else ({"c_dim": 0}, 2)
    with torch.device("meta"):
        net = instantiate_from_config(config.model.params[part], **extra)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, digits) == millions
