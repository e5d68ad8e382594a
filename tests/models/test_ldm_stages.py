"""First stage and latents of a run: which weights, which scale, which shapes; resuming; what is logged and averaged."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
import yaml

from ldm.checkpoint import find_best
from ldm.models.base import BaseModel
from ldm.util import UserError
from tests.cli.tools import config, finish, only_run, run_main, start
from tests.models.ldm_runs import LDM, QUICK, TINY, UNET, first_stage, last, logged, network, rows, same, train

STAGE = "first_stage_model."


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of the first stage."""
    return first_stage(tmp_path_factory.mktemp("first"))


# --- the first stage --------------------------------------------------------------------------------------------------


def test_the_best_weights_of_the_first_stage(tmp_path):
    every = ["lightning.trainer.val_check_interval=2", "lightning.trainer.check_val_every_n_epoch=null"]
    worst = "lightning.modelcheckpoint.params.mode=max"  # the largest error is that of the first validation
    run = first_stage(tmp_path / "kl", *every, worst, steps=6)
    best = find_best(run)
    assert best.name.startswith("epoch=") and find_best(run / "checkpoints/last.ckpt").name == "last.ckpt"
    moved = shutil.move(run, tmp_path / "elsewhere")
    best = find_best(moved)
    content = torch.load(best, weights_only=True)
    assert content["global_step"] == 2
    held = train(tmp_path / "ldm", moved)["state_dict"]
    key = "decoder.conv_out.weight"
    assert torch.equal(held[STAGE + key], content["state_dict"]["model_ema." + key.replace(".", "")])
    best.unlink()
    assert find_best(moved).name == "last.ckpt"


VQ = [
    "model.target=ldm.models.autoencoder.VQModel",
    "model.params.embed_dim=3",
    "model.params.n_embed=32",
    "model.params.ddconfig.double_z=false",
    "model.params.ddconfig.z_channels=3",
    "model.params.lossconfig=null",
    "model.params.lossconfig={target: ldm.modules.losses.VQLPIPSWithDiscriminator, params: {disc_start: 0, "
    "disc_in_channels: 1, disc_num_layers: 1, disc_ndf: 8, perceptual_loss: pixel_gradient}}",
]


def test_a_vq_first_stage_and_its_channels(tmp_path):
    """`channels: auto` follows the first stage, and pictures of x0 are snapped to the codebook."""
    run = first_stage(tmp_path / "vq", *VQ)
    cached = [f"model.params.cache_latents={tmp_path / 'latents'}"]
    pictures = ["lightning.callbacks.image_logger.params.disabled=false"]
    content = train(tmp_path / "ldm", run, *cached, *pictures, "model.learning_rate=0.001")
    params = yaml.safe_load(content["config"])["model"]["params"]
    assert (params["channels"], params["image_size"]) == (3, 8)
    assert params["unet_config"]["params"]["in_channels"] == 3
    assert content["state_dict"][STAGE + "quantize.embedding.weight"].shape == (32, 3)
    names = {p.name.partition("_gs")[0] for p in (only_run(tmp_path / "ldm") / "images/train").iterdir()}
    assert "samples_x0_quantized" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.params.channels=3", "set model.params.channels"),
        ("model.params.image_size=4", "set model.params.image_size=8 (or auto)"),
        ("data.params.size=17", "data.params.size: got 17, expected a multiple of 2"),
        ("data.params.channels=3", "the first stage takes pictures with 1 channels, the data has 3"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(first, tmp_path, capsys, change, message):
    latents = tmp_path / "latents"
    train(tmp_path / "runs", first, change, f"model.params.cache_latents={latents}", code=2)
    assert message in capsys.readouterr().err
    assert not latents.exists() and not list((tmp_path / "runs").glob("*/checkpoints/*"))


def test_a_conditioner_that_freezes_itself_is_not_trained_in_silence(first, tmp_path, capsys):
    clip = "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    target = "{target: ldm.modules.text_embedders.FrozenCLIPEmbedder, params: {clip_config: " + clip + "}}"
    classes = ["model.params.num_classes=null", "model.params.cond_stage_config=null"]
    train(tmp_path, first, *classes, f"model.params.cond_stage_config={target}", code=2)
    assert "freeze=false" in capsys.readouterr().err


# --- the scale --------------------------------------------------------------------------------------------------------


def test_two_processes_measure_the_scale_of_one(first, tmp_path):
    """Together they see the pictures that one sees; the latents that they share are written once."""
    one = train(tmp_path / "one", first, steps=1)
    argv = ["-t", "-b", config(LDM), "-l", tmp_path / "two", *QUICK, *TINY, "--max_steps", 1, f"first_stage={first}"]
    argv += [
        "--devices",
        2,
        "--strategy",
        "ddp",
        "--accelerator",
        "cpu",
        f"model.params.cache_latents={tmp_path / 'z'}",
    ]
    returned, out = finish(start("main.py", *argv, "data.params.batch_size=8"))
    assert returned == 0, out
    assert out.count("of the latents of 1008 training images") == 1, out
    two = last(tmp_path / "two")["state_dict"]
    torch.testing.assert_close(two["scale_factor"], one["state_dict"]["scale_factor"], rtol=1e-4, atol=0)
    assert logged(tmp_path / "two", "scale_factor") == [pytest.approx(float(two["scale_factor"]), rel=1e-5)]
    done = {p.name.partition("-")[0] for p in (tmp_path / "z").iterdir()}
    assert done == {"train", "validation"}


def test_the_official_rule_measures_the_first_batch(first, tmp_path, capsys):
    content = train(tmp_path, first, "model.params.scale_factor=1.0", "model.params.scale_by_std=true")
    assert "of the latents of 16 training images" in capsys.readouterr().err
    assert float(content["state_dict"]["scale_factor"]) != 1.0


# --- going on ---------------------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted(first, tmp_path):
    cached = [f"model.params.cache_latents={tmp_path / 'latents'}", "data.params.train.params.flip_p=0.5"]
    straight = train(tmp_path / "straight", first, *cached, steps=4)
    train(tmp_path / "halves", first, *cached, steps=2)
    assert run_main("-t", "-r", only_run(tmp_path / "halves"), "--max_steps", 4, "--no-test") == 0
    resumed = last(tmp_path / "halves")
    assert resumed["global_step"] == 4 and same(resumed["state_dict"], straight["state_dict"])
    assert len(logged(tmp_path / "halves", "scale_factor")) == 1  # not measured again


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(first, tmp_path, capsys, stage):
    if stage == "first":
        run = first_stage(tmp_path)
    else:
        train(tmp_path, first)
        run = only_run(tmp_path)
    good = (run / "checkpoints/last.ckpt").read_bytes()
    assert run_main("-t", "-r", run, "--max_steps", 8, "model.learning_rate=1e30", "--no-test") == 2
    message = capsys.readouterr().err
    assert "the loss is not finite at step" in message and ", batch " in message
    assert (run / "checkpoints/last.ckpt").read_bytes() == good


# --- what is logged ---------------------------------------------------------------------------------------------------

OWN = {"epoch", "step", "images_per_second", "memory_mib", "lr-AdamW", "scale_factor"}


def test_the_official_names_are_logged_and_no_others(first, tmp_path):
    every = ["lightning.trainer.val_check_interval=1", "lightning.trainer.check_val_every_n_epoch=null"]
    schedule = "{target: torch.optim.lr_scheduler.ConstantLR, params: {factor: 0.5, total_iters: 100}}"
    options = ["model.params.learn_logvar=true", f"model.params.scheduler_config={schedule}"]
    train(tmp_path, first, *every, "--limit_val_batches", 1, *options)
    official = {"train/loss_simple", "train/loss_gamma", "train/loss_vlb", "train/loss", "logvar", "logvar_ema"}
    official |= {f"val/{n}{e}" for n in ("loss_simple", "loss_gamma", "loss_vlb", "loss") for e in ("", "_ema")}
    assert {name for row in rows(tmp_path) for name in row} == official | {"global_step", "lr_abs"} | OWN
    assert set(logged(tmp_path, "lr-AdamW")) == {0.005}  # as the YAML says: 0.01, halved by the scheduler
    assert logged(tmp_path, "lr_abs") == pytest.approx([0.005] * 2)


def test_pictures_at_every_interval_on_disk_and_in_tensorboard(first, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = "lightning.callbacks.image_logger.params."
    options = [logger + "disabled=false", logger + "batch_frequency=2", logger + "increase_log_steps=false"]
    options += [logger + "log_images_kwargs={ddim_steps: 2, inpaint: false}", "lightning.trainer.val_check_interval=3"]
    options += ["lightning.trainer.check_val_every_n_epoch=null", "--limit_val_batches", 1]
    train(tmp_path, first, *options, steps=6)
    run = only_run(tmp_path)
    names = ("inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "progressive_row")
    for split, steps in (("train", (2, 4, 6)), ("val", (3, 6))):
        found = {p.name.partition("_e-")[0] for p in (run / "images" / split).iterdir()}
        assert found == {f"{name}_gs-{step:06}" for name in names for step in steps}
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"{split}/{name}" for split in ("train", "val") for name in names}
    assert [e.step for e in events.Images("train/samples")] == [2, 4, 6]


# --- averaged weights -------------------------------------------------------------------------------------------------


class Weights(pl.Callback):
    """Notes where the network's weights are, and what they are, around and inside a validation."""

    seen: list = []

    def on_validation_start(self, trainer, pl_module):
        first = next(pl_module.model.parameters())
        self.seen.append(("before", first.data_ptr(), first.sum().item()))
        self.hook = pl_module.model.register_forward_pre_hook(
            lambda m, x: self.seen.append(("in", first.data_ptr(), first.sum().item()))
        )

    def on_validation_end(self, trainer, pl_module):
        self.hook.remove()
        first = next(pl_module.model.parameters())
        self.seen.append(("after", first.data_ptr(), first.sum().item()))
        name = next(iter(pl_module.model_ema.m_name2s_name.values()))
        self.seen.append(("average", getattr(pl_module.model_ema, name).data_ptr(), None))


def test_validation_uses_the_average_where_it_lies_and_gives_the_weights_back(first, tmp_path):
    """No second copy of the model is made for it."""
    every = ["lightning.trainer.val_check_interval=2", "lightning.trainer.check_val_every_n_epoch=null"]
    callback = f"lightning.callbacks.weights.target={__name__}.Weights"
    Weights.seen.clear()
    train(tmp_path, first, *every, "--limit_val_batches", 1, callback, "--trust", "tests")
    (_, place, value), raw, averaged, after, average = Weights.seen
    assert raw[1:] == (place, value) == after[1:]
    assert averaged[1] == average[1] != place and averaged[2] != value


def test_averaged_and_raw_weights_are_alike_on_a_short_run(first, tmp_path):
    """The decay warms up: after a few updates the average is near the weights, not near the start."""
    content = train(tmp_path, first, steps=30)["state_dict"]
    start = train(tmp_path / "start", first, "model.learning_rate=1e-12", steps=1)["state_dict"]
    raw = {k.replace(".", ""): v for k, v in content.items() if k.startswith("model.diffusion_model.")}
    far = sum(float((content["model_ema." + k[5:]] - v).norm()) for k, v in raw.items())
    moved = sum(float((start[k] - content[k]).norm()) for k in network({"state_dict": content}))
    assert far < 0.5 * moved


# --- the machine ------------------------------------------------------------------------------------------------------


class Greedy(BaseModel):
    """Asks for four petabytes."""

    def __init__(self, **base):
        super().__init__(**base)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def loss(self, batch):
        return self.weight.sum() + torch.empty(2**50).sum(), {}


def test_out_of_memory_is_one_message_with_what_to_do(tmp_path, capsys):
    model = ["model.params=null", f"model.target={__name__}.Greedy", "--trust", "tests"]
    assert run_main("-t", "-b", config("configs/diffusion/ddpm_digits.yaml"), "-l", tmp_path, *model, *QUICK) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and message.count("error: ") == 1
    for word in ("out of memory (peak ", "GiB", "data.params.batch_size", "data.params.size", "bf16", "use_checkpoint"):
        assert word in message, message


def test_devices_mean_what_lightning_documents(monkeypatch):
    from omegaconf import OmegaConf

    from ldm.legacy import translate_trainer
    from ldm.trainer import make_trainer

    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    assert make_trainer({**quiet, "devices": 1}).num_devices == 1
    assert make_trainer({**quiet, "devices": 2}).num_devices == 2
    with pytest.raises(UserError, match="lightning.trainer: .*devices"):
        make_trainer({**quiet, "devices": [1]})  # the GPU with this number, and a CPU has none
    for given in (1, [1]):
        trainer = OmegaConf.create({"devices": given})
        assert translate_trainer(trainer) == [] and trainer.devices == given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for old, new in ((1, 1), ("0,", [0]), ("1,", [1]), ("0,1", [0, 1]), (2, 2)):
        trainer = OmegaConf.create({"gpus": old})
        translate_trainer(trainer)
        assert trainer.devices == new and trainer.accelerator == "gpu"


def test_a_model_that_cannot_fit_is_measured_and_not_tried(tmp_path, capsys, monkeypatch):
    from ldm import dry_run

    monkeypatch.setattr(dry_run, "memory_available", lambda: 2**20)
    argv = ["-t", "-b", config("configs/diffusion/ddpm_digits.yaml"), "--dry-run", "-l", tmp_path]
    assert run_main(*argv) == 0
    said = capsys.readouterr().out
    assert "1.24 M parameters" in said and "not tried" in said and "ms a step" not in said
    monkeypatch.setattr(dry_run, "memory_available", lambda: 2**40)
    assert run_main(*argv, UNET + "model_channels=32") == 0
    assert "ms a step" in capsys.readouterr().out
