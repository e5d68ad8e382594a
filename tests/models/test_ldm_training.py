"""Latent diffusion through main.py: two stages on digits, every training key, text and inpainting models."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.generate import load_run
from tests.cli.tools import config, only_run, run_main
from tests.models.ldm_runs import LDM, QUICK, TINY, UNET, first_stage, logged, network, same, train


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of the first stage."""
    return first_stage(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def plain(first, tmp_path_factory):
    """The run that others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(folder, first)


# --- two stages -------------------------------------------------------------------------------------------------------


def test_the_first_stage_of_a_run(first, plain):
    folder, content = plain
    trained = torch.load(first / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    held = {k: v for k, v in content["state_dict"].items() if k.startswith("first_stage_model.")}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    averages = {
        f"first_stage_model.{k}": trained["model_ema." + k.replace(".", "")] for k in trained if k.startswith(parts)
    }
    assert same(held, averages)
    project = yaml.safe_load(next((only_run(folder) / "configs").glob("*-project.yaml")).read_text())
    inlined = project["model"]["params"]["first_stage_config"]
    assert inlined["target"].endswith("AutoencoderKL") and inlined["params"]["use_ema"] is False
    assert inlined["params"]["lossconfig"]["target"] == "torch.nn.Identity"
    model, _ = load_run(only_run(folder))  # nothing of the first run is needed any more
    assert model.num_classes == 10 and model.null_class == 10
    x = model.sample(model.condition([0, 1]), seeds=[0, 1], steps=2, scale=2.0)
    assert x.shape == (2, 1, 16, 16)


def test_the_scale_is_measured_stored_and_logged(plain):
    folder, content = plain
    scale = float(content["state_dict"]["scale_factor"])
    assert scale != 1.0 and logged(folder, "scale_factor") == [pytest.approx(scale, rel=1e-5)]
    model, info = load_run(only_run(folder))
    data = model_data(info, "train")
    with torch.no_grad():
        z = model.encode_first_stage(data.permute(0, 3, 1, 2)).sample()
    assert float(z.std()) * scale == pytest.approx(1.0, abs=0.05)


def model_data(info, split):
    from ldm.data.builtin import Digits

    assert info["config"]["data"]["params"]["size"] == 16
    return Digits(split).get_batch(range(1000))["image"]


def test_a_checkpoint_file_as_first_stage_and_the_same_run_twice(first, plain, tmp_path):
    content = train(tmp_path, first / "checkpoints/last.ckpt")
    assert same(network(content), network(plain[1]))


def test_faults(first, tmp_path, capsys):
    train(tmp_path / "a", tmp_path / "nowhere", code=2)
    assert "nowhere does not exist" in capsys.readouterr().err
    assert run_main("-t", "-b", config(LDM), "-l", tmp_path / "c", *QUICK, *TINY) == 2
    assert "model.params.first_stage_config=... (or first_stage=...)" in capsys.readouterr().err


# --- latents on disk --------------------------------------------------------------------------------------------------


def test_cached_latents_train_as_pictures_do(first, tmp_path, capsys):
    flip = ["data.params.train.params.flip_p=0.5", "--limit_val_batches", 1]
    latents = tmp_path / "latents"
    slow = train(tmp_path / "slow", first, *flip)
    for run in ("fast", "again"):
        fast = train(tmp_path / run, first, *flip, f"model.params.cache_latents={latents}")
        np.testing.assert_allclose(
            logged(tmp_path / run, "train/loss_simple"), logged(tmp_path / "slow", "train/loss_simple"), rtol=1e-3
        )
        torch.testing.assert_close(
            fast["state_dict"]["scale_factor"], slow["state_dict"]["scale_factor"], rtol=1e-4, atol=0
        )
    folders = sorted(p.name.partition("-")[0] for p in latents.iterdir())
    assert folders == ["train", "validation"]
    table = np.load(next(latents.glob("train-*/latents.npy")))
    assert table.shape == (2 * 1257, 4, 8, 8)  # picture and mirror image; mean and log-variance of two channels


def test_random_shifts_cannot_be_cached(first, tmp_path, capsys):
    shift = ["data.params.train.params.pad_crop=1", f"model.params.cache_latents={tmp_path / 'latents'}"]
    train(tmp_path / "runs", first, *shift, code=2)
    assert "pad_crop: 1" in capsys.readouterr().err


def test_a_dry_run_writes_no_latents(first, tmp_path):
    train_argv = ["-t", "-b", config(LDM), "-l", tmp_path, *QUICK, *TINY, f"first_stage={first}", "--dry-run"]
    assert run_main(*train_argv, f"model.params.cache_latents={tmp_path / 'latents'}") == 0
    assert not any(tmp_path.iterdir())


def test_pictures_are_drawn_from_cached_latents(first, tmp_path):
    argv = [
        f"model.params.cache_latents={tmp_path / 'latents'}",
        "lightning.callbacks.image_logger.params.disabled=false",
    ]
    train(tmp_path / "runs", first, *argv, "lightning.callbacks.image_logger.params.log_images_kwargs={ddim_steps: 2}")
    names = {p.name.partition("_gs")[0] for p in (only_run(tmp_path / "runs") / "images/train").iterdir()}
    assert {"inputs", "reconstruction", "conditioning", "samples"} <= names


# --- every key does something -----------------------------------------------------------------------------------------

KEYS = [
    ("parameterization", "eps"),
    ("parameterization", "x0"),
    ("parameterization", "flow"),
    ("loss_weight", "uniform"),
    ("min_snr_gamma", 1.0),
    ("offset_noise", 0.5),
    ("zero_terminal_snr", True),
    ("learn_logvar", True),
    ("cond_dropout", 0.9),
    ("loss_type", "l1"),
    ("original_elbo_weight", 1.0),
    ("beta_schedule", "linear"),
    ("scale_factor", 1.0),
    ("cond_stage_trainable", False),
    ("num_timesteps_cond", 5),
]


@pytest.mark.parametrize(("key", "value"), KEYS)
def test_a_training_key_changes_what_is_learned(first, plain, tmp_path, key, value):
    content = train(tmp_path, first, f"model.params.{key}={value}")
    state, before = content["state_dict"], plain[1]["state_dict"]
    assert not same(network(content), network(plain[1]))
    embedding = "cond_stage_model.embedding.weight"
    if key == "zero_terminal_snr":
        assert state["alphas_cumprod"][-1] < 1e-9 < before["alphas_cumprod"][-1]
    elif key == "learn_logvar":
        assert "logvar" not in before and (state["logvar"] != 0).sum() > 1
    elif key == "scale_factor":
        assert "scale_factor" not in state
    elif key == "cond_stage_trainable":
        assert not torch.equal(state[embedding], before[embedding])
        again = train(tmp_path / "longer", first, f"model.params.{key}={value}", steps=4)
        assert torch.equal(again["state_dict"][embedding], state[embedding])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activation_checkpointing_recomputes(first, tmp_path, precision):
    """The same weights after two steps, by another forward pass of every block, in the same precision."""

    def calls(folder, *argv):
        seen = []

        def hook(module, inputs, output):
            if type(module).__name__ == "ResBlock" or isinstance(module, torch.nn.Linear):
                seen.append((type(module).__name__, output.dtype))

        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            content = train(folder, first, *argv, "model.params.use_ema=false", "--precision", precision)
        finally:
            handle.remove()
        return seen, content

    without, plain = calls(tmp_path / "without")
    with_, checkpointed = calls(tmp_path / "with", UNET + "use_checkpoint=true")
    blocks = [s for s in without if s[0] == "ResBlock"]
    assert len([s for s in with_ if s[0] == "Linear"]) > len([s for s in without if s[0] == "Linear"])
    assert {s[1] for s in with_} == {s[1] for s in without} and len(blocks) >= 2
    for key, value in network(checkpointed).items():
        torch.testing.assert_close(value, network(plain)[key], atol=1e-4, rtol=1e-3)


MASKS = [
    "data.params.train=null",
    "data.params.train.target=ldm.data.masks.RandomMasks",
    "data.params.train.params.dataset={target: ldm.data.builtin.Digits}",
    "model.params.concat_keys=[mask, masked_image]",
    UNET + "in_channels=5",
]
NO_CONTEXT = [
    UNET + "use_spatial_transformer=false",
    UNET + "context_dim=null",
    "model.params.cond_stage_trainable=false",
]
NO_CLASS = ["model.params.num_classes=null", "model.params.cond_dropout=0"]
KINDS = {
    "none": ["model.params.cond_stage_config=__is_unconditional__", *NO_CONTEXT, *NO_CLASS],
    "adm": [
        "model.params.conditioning_key=adm",
        "model.params.cond_stage_config=null",
        "model.params.cond_stage_config.target=torch.nn.Identity",
        *NO_CONTEXT,
    ],
    "concat": [
        *MASKS,
        "model.params.conditioning_key=concat",
        "model.params.cond_stage_key=masked_image",
        "model.params.cond_stage_config=__is_first_stage__",
        "model.params.concat_keys=[mask]",
        *NO_CONTEXT,
        *NO_CLASS,
    ],
    "hybrid": [*MASKS, "model.params.conditioning_key=hybrid"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_condition(first, plain, tmp_path, kind, sample):
    content = train(tmp_path, first, *KINDS[kind])
    assert not same(network(content), network(plain[1]))
    asked = {"adm": ["--class", "3", "--scale", "2"], "hybrid": ["--class", "3", "--scale", "2"]}.get(kind, [])
    if kind in ("concat", "hybrid"):
        asked += ["--cond-from", pairs(tmp_path / "pairs")]
    out = sample("-r", only_run(tmp_path), "-n", 3, "--steps", 2, *asked)
    assert len(list(out.glob("0*.png"))) == 3


# --- text and inpainting from a folder --------------------------------------------------------------------------------

SMALL = {
    "model": {
        "learning_rate": 0.01,
        "params": {
            "image_size": 8,
            "scheduler_config": None,
            "unet_config": {
                "params": {
                    "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2],
                    "num_heads": 2, "context_dim": 32,
                }
            },
            "first_stage_config": {"params": {"ddconfig": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}}},
            "cond_stage_config": {
                "params": {"clip_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                           "num_attention_heads": 2}}
            },
        },
    },
    "data": {"params": {"size": 16, "batch_size": 4, "num_workers": 0}},
    "lightning": {"callbacks": {"image_logger": {"params": {"log_images_kwargs": {"ddim_steps": 2}}}}},
}  # fmt: skip


def captioned(folder, n=12):
    """Pictures with captions."""
    folder.mkdir()
    for i in range(n):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (24, 20), colour).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a {colour} card")
    return folder


def pairs(folder, n=3, size=16):
    """Pictures with masks."""
    folder.mkdir()
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        mask = np.zeros((size, size), np.uint8)
        mask[2:9, 3:12] = 255
        Image.fromarray(mask).save(folder / f"{i}_mask.png")
    return folder


@pytest.fixture
def small(tmp_path):
    """Runs a config of configs/stable-diffusion at a small size over a folder of pictures with captions."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    pictures = captioned(tmp_path / "pictures")

    def run(name, *argv):
        logs = tmp_path / f"logs{len(list(tmp_path.glob('logs*')))}"
        base = ["-b", config(f"configs/stable-diffusion/{name}.yaml"), tmp_path / "small.yaml"]
        argv = [
            "-t",
            *base,
            "-l",
            logs,
            "--max_steps",
            2,
            *QUICK[:1],
            "--no-test",
            f"data.params.root={pictures}",
            *argv,
        ]
        assert run_main(*argv) == 0
        return only_run(logs)

    return run


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """scripts/sample.py; gives the folder with the pictures."""
    from scripts import common
    from scripts import sample as script

    def run(*argv, code=0):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, argv), "--outdir", str(out)])
        assert common.main(script.build_parser(), script.draw) == code
        return out

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_stable_diffusion_from_a_folder(small, sample, capsys):
    run = small("v1-train")
    assert "random weights" in capsys.readouterr().err
    images = {p.name.partition("_gs")[0] for p in (run / "images/train").iterdir()}
    assert {"inputs", "reconstruction", "conditioning", "samples"} <= images
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert any(k.startswith("model_ema.") for k in content["state_dict"])
    params = yaml.safe_load(content["config"])["model"]["params"]
    assert params["cond_dropout"] == 0.1 and params["unet_config"]["params"]["use_checkpoint"]
    knobs = ["-n", 2, "--steps", 3, "--scale", 3, "--weights", "raw"]
    red, again, blue = (sample("-r", run, "--prompt", p, *knobs) for p in ("a red card", "a red card", "a blue card"))
    assert pixels(red / "00000.png").shape == (16, 16, 3)
    assert (pixels(red / "00000.png") == pixels(again / "00000.png")).all()
    assert (pixels(red / "00000.png") != pixels(blue / "00000.png")).any()
    negative = sample("-r", run, "--prompt", "a red card", "--negative-prompt", "a blue card", *knobs)
    assert (pixels(red / "00000.png") != pixels(negative / "00000.png")).any()
    skipped = sample("-r", run, "--prompt", "a red card", *knobs, "--set", "clip_skip=2", "height=32")
    assert pixels(skipped / "00000.png").shape == (32, 16, 3)
    settings = json.loads(Image.open(skipped / "00001.png").text["ldm"])
    assert settings["knobs"]["clip_skip"] == 2 and settings["knobs"]["height"] == 32


def test_inpainting_from_a_folder_begun_with_a_text_model(small, sample, tmp_path, capsys):
    text = small("v1-train") / "checkpoints/last.ckpt"
    capsys.readouterr()
    run = small("v1-inpaint-train", "--init-from", text)
    said = capsys.readouterr().err
    assert "5 input channels less; they start at zero" in said and "random weights" not in said
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 9
    folder = pairs(tmp_path / "pairs")
    knobs = ["--prompt", "a red card", "--steps", 3, "--scale", 2, "--weights", "raw", "--cond-from", folder]
    out = sample("-r", run, *knobs)
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    other = sample("-r", run, *knobs, "--prompt", "a blue card")
    assert (pixels(out / "00001.png") != pixels(other / "00001.png")).any()
    again = sample("--like", out / "00002.png")
    assert (pixels(out / "00002.png") == pixels(again / "00002.png")).all()
    data = sample("-r", run, "-n", 2, "--steps", 2, "--scale", 2, "--cond-from", "data")
    assert pixels(data / "00000.png").shape == (16, 16, 3)


def test_a_widened_network_starts_as_the_narrow_one(tmp_path):
    from ldm import checkpoint
    from tests.models.test_latent_diffusion import CONDITIONS, TEXT, batch_of, tiny

    narrow = tiny(**TEXT)
    wide = tiny(**{**CONDITIONS["hybrid"], "widen_input": True, "use_ema": True}, seed=5)
    checkpoint.load(wide, narrow.state_dict())
    batch, x, t = batch_of(2), torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    cond = wide.get_cond(batch)
    with torch.no_grad():
        expected = narrow.apply_model(x, t, cond["c_crossattn"])
        torch.testing.assert_close(wide.apply_model(x, t, cond), expected)
        with wide.ema_scope():
            torch.testing.assert_close(wide.apply_model(x, t, cond), expected)
    from ldm.util import UserError

    with pytest.raises(UserError, match="another shape"):
        checkpoint.load(tiny(**CONDITIONS["hybrid"]), narrow.state_dict())


@pytest.mark.parametrize(("name", "channels"), [("v1-train", 4), ("v1-inpaint-train", 9)])
def test_full_size_models_have_the_official_keys(name, channels, tmp_path, capsys, monkeypatch):
    """--dry-run builds them without their numbers, and says what they take where that is not there."""
    from ldm import dry_run
    from tests.reference import FIXTURES

    built = []
    measure = dry_run.memory_needed
    monkeypatch.setattr(dry_run, "memory_available", lambda: 2**30)
    monkeypatch.setattr(dry_run, "memory_needed", lambda model: built.append(model) or measure(model))
    pictures = captioned(tmp_path / "pictures")
    argv = ["-t", "-b", config(f"configs/stable-diffusion/{name}.yaml"), f"data.params.root={pictures}", "--dry-run"]
    assert run_main(*argv, "-l", tmp_path / "logs") == 0
    out = capsys.readouterr().out
    assert "LatentDiffusion: 1066.2" in out and "859.5" in out and "not tried" in out
    assert built[0].image_size == 64 and {p.device.type for p in built[0].parameters()} == {"meta"}
    shapes = {k: list(v.shape) for k, v in built[0].state_dict().items() if not k.startswith("model_ema.")}
    official = json.loads((FIXTURES / "keys_sd_v1.json").read_text())["keys"]
    official["model.diffusion_model.input_blocks.0.0.weight"][1] = channels
    assert shapes == official
    averaged = sum(k.startswith("model_ema.diffusion_model") for k in built[0].state_dict())
    assert averaged == sum(k.startswith("model.diffusion_model.") for k in official)


def test_stable_diffusion_is_resumed(small):
    """Two steps and two more are four, by the flags that the config's head names."""
    fast = ["model.learning_rate=0.001", "--precision", "bf16-mixed"]
    straight = small("v1-train", *fast, "--max_steps", 4)
    half = small("v1-train", *fast, "-n", "half")
    assert run_main("-t", "-r", half, "--max_steps", 4, "--no-test") == 0
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (straight, half))
    assert a["global_step"] == b["global_step"] == 4
    assert same(a["state_dict"], b["state_dict"])
