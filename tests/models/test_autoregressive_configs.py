"""Every YAML in configs/autoregressive/ trains on a folder of pictures and draws; only its sizes are shrunk."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import load_yaml
from ldm.generate import load_run
from ldm.util import instantiate_from_config
from tests.cli.tools import QUICK, ROOT, only_run, run_main

FOLDER = ROOT / "configs/autoregressive"
# what another config is laid over, and the image tokens that it starts from
OVER = {"openmoji_cogview_upscale": "openmoji_cogview"}
FIRST = {"openmoji_dalle": "openmoji_vqgan", "openmoji_cogview": "openmoji_vqgan", "cifar10_gpt": "cifar10_vqgan"}
FIRST |= {"digits_vqgpt": "digits_vqgan"}
NAMES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
SIZE = 32
OWN_SIZE = {"digits_gpt": 8, "digits_vqgan": 16, "digits_vqgpt": 16}
TRANSFORMER = {"n_layer": 1, "n_head": 2, "n_embd": 16, "use_checkpoint": "false"}
STAGE = {"ch": 32, "num_res_blocks": 1, "resolution": "${data.params.size}"}


def small(name):
    """Overrides that make the config small and quick."""
    config = load_yaml(FOLDER / f"{name}.yaml")
    params = config.model.params
    if "transformer_config" in params:
        for key, value in TRANSFORMER.items():
            yield f"model.params.transformer_config.params.{key}={value}"
        if "text_length" in params:
            yield from ("model.params.text_length=24", "model.params.text_vocab=300")
    stage = "model.params" if "ddconfig" in params else "model.params.first_stage_config.params"
    inner = params if "ddconfig" in params else params.get("first_stage_config")
    if "ddconfig" in params or (inner and "ddconfig" in inner.params):
        for key, value in STAGE.items():
            yield f"{stage}.ddconfig.{key}={value}"
    if "encconfig" in params:
        yield "model.params.encconfig={ch: 32, num_res_blocks: 1}"
    yield "lightning.trainer.strategy=auto"
    if config.lightning.trainer.get("precision") == "16-mixed":  # needs a GPU
        yield "lightning.trainer.precision=bf16-mixed"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """name -> the run of a config after two steps, trained when it is first asked for."""
    root, rng, runs = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), {}
    for i in range(16):
        folder = root / ("cat", "dog")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {folder.name}, number {i}")

    def run(name):
        if name not in runs:
            below = OVER.get(name)
            files = [FOLDER / f"{n}.yaml" for n in (below, name) if n]
            logs, size = tmp_path_factory.mktemp(name), OWN_SIZE.get(name, SIZE)
            argv = ["-t", "-b", *files, "-l", logs, "--max_steps", 2, *QUICK, "data.params.batch_size=4", "--no-test"]
            argv += [f"data.params.root={root}", f"data.params.size={size}", *small(below or name)]
            argv += ["lightning.callbacks.image_logger.params.batch_frequency=2", "--limit_val_batches", 1]
            argv += ["lightning.callbacks.image_logger.params.max_images=2", "--limit_train_batches", 4]
            if (below or name) in FIRST:
                argv.append(f"first_stage={run(FIRST[below or name])}")
            argv += ["--init-from", run(below) / "checkpoints/last.ckpt"] if below else []
            assert run_main(*argv) == 0
            runs[name] = only_run(logs)
        return runs[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_pictures_and_samples(name, train):
    run = train(name)
    assert list((run / "images/train").glob("*_gs-000002_*.png"))
    model, _ = load_run(run)
    if not hasattr(model, "sample"):
        return
    prompt = {"prompts": ["a dog, number 3"]} if hasattr(model, "text_rows") else {}
    both = model.sample(model.condition([3, 4], **prompt), seeds=[3, 4])
    alone = model.sample(model.condition([4], **prompt), seeds=[4])
    assert both.min() >= -1 and both.max() <= 1 and both.shape[1:] == model.picture_shape
    assert (both[1:] - alone).abs().max() <= 2 / 255


def test_the_digits_of_every_two_stage_family_have_one_size():
    """That of ddpm_digits, so that one page can compare them; a stage and what is trained on it read the same."""
    places = {"autoregressive": ["digits_vqgan", "digits_vqgpt"], "autoencoder": ["kl_digits"]}
    places |= {"latent-diffusion": ["digits_class"], "diffusion": ["ddpm_digits"]}
    params = [load_yaml(FOLDER.parent / p / f"{n}.yaml").data.params for p, names in places.items() for n in names]
    assert {(p["size"], p["channels"], p.train["target"]) for p in params} == {(16, 1, "ldm.data.builtin.Digits")}


def test_the_digits_tokens_at_the_size_of_the_gans(tmp_path):
    """data.params.size alone decides, for both stages: 8x8 codes instead of 4x4."""
    logs, run = [tmp_path / "a", tmp_path / "b"], None
    for place, name in zip(logs, ("digits_vqgan", "digits_vqgpt"), strict=True):
        argv = ["-t", "-b", FOLDER / f"{name}.yaml", "-l", place, "--max_steps", 1, "--no-test", *QUICK]
        argv += ["data.params.size=32", "data.params.batch_size=4", "--limit_val_batches", 0, *small(name)]
        argv += ["lightning.callbacks.image_logger.params.disabled=true", *([f"first_stage={run}"] if run else [])]
        assert run_main(*argv) == 0
        run = only_run(place)
    model, _ = load_run(run)
    assert tuple(model.grid) == (8, 8) and model.picture_shape == (1, 32, 32)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OVER])
def test_they_say_when_they_end_and_how_fast_they_learn(name):
    config = load_yaml(FOLDER / f"{name}.yaml")
    assert config.lightning.trainer.get("max_steps") or config.lightning.trainer.get("max_epochs")
    assert config.model.get("learning_rate") or config.model.get("base_learning_rate")


@pytest.mark.parametrize(
    ("name", "parameters", "sequence"), [("dalle", 12.0e9, 256 + 1024 + 1), ("cogview", 4.0e9, 64 + 1024 + 4 + 192)]
)
def test_the_papers_sizes(name, parameters, sequence):
    config = load_yaml(FOLDER / f"{name}.yaml").model
    with torch.device("meta"):
        model = instantiate_from_config(
            {"target": config.target, "params": {**config.params, "scheduler_config": None}}
        )
    total = sum(p.numel() for p in model.transformer.parameters())
    assert total == pytest.approx(parameters, rel=0.05) and model.grid == (32, 32)
    assert model.transformer.block_size == sequence
    if name == "dalle":
        kinds = model.transformer.kinds
        assert len(kinds) == 64 and kinds[-1] == "conv" and kinds.count("column") == 16
