"""The figures of a text-to-image run, at its end and at every checkpoint of it."""

import json

import pytest
from PIL import Image

from ldm.checkpoint import in_order_of_steps, minutes_of, read
from scripts import results
from tests.cli.tools import QUICK, config, only_run, run_main
from tests.docs.test_commands import run_script

SMALL = [
    "model.params.unet_config.params.hidden_size=32",
    "model.params.unet_config.params.depth=1",
    "model.params.cond_stage_config.params.depth=1",
    "data.params.train.params.groups=hearts",
    "lightning.callbacks.image_logger.params.batch_frequency=1000",
]
KEEP = [
    "lightning.modelcheckpoint.params.every_n_train_steps=2",
    "lightning.modelcheckpoint.params.save_top_k=-1",
    "lightning.modelcheckpoint.params.filename=at_{step}",
]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(logs / "data"))
        yaml = config("configs/latent-diffusion/openmoji_demo.yaml")
        steps = "lightning.trainer.max_steps=4"
        assert run_main("-t", "-b", yaml, "-l", logs / "runs", *QUICK, *SMALL, *KEEP, steps) == 0
        yield logs


def captions(logs, *argv):
    return run_script("evaluate_captions.py", [*argv, "-n", 12, "--steps", 2, "--json", logs / "figures.json"])


def test_figures_at_every_checkpoint(logs, capsys):
    run = only_run(logs / "runs")
    assert captions(logs, "-r", run, "--over-time", logs / "curve.png", "--after", 20) == 0
    found = json.loads((logs / "figures.json").read_text())
    rows = found["checkpoints"]
    assert [r["step"] for r in rows] == [2, 4] and all(r["n"] == 12 for r in rows)
    assert 20 < rows[0]["minutes"] < rows[1]["minutes"] < 30
    assert rows[0]["psnr"] != rows[1]["psnr"]
    assert Image.open(logs / "curve.png").width > 600
    # twelve captions give ten columns, two checkpoints two rows
    with Image.open(logs / "curve_samples.png") as samples:
        assert samples.width > 10 * 64 and 2 * 64 < samples.height < 3 * 64
    capsys.readouterr()
    assert captions(logs, "-r", run) == 0
    at_the_end = json.loads((logs / "figures.json").read_text())["fidelity"]
    assert at_the_end["psnr"] == pytest.approx(rows[1]["psnr"], abs=1e-6)


def test_a_row_of_the_readme_s_table(logs, tmp_path, capsys):
    file = tmp_path / "openmoji_demo.json"
    assert captions(logs, "-r", only_run(logs / "runs"), "--row", file, "family=text to image", "cores=2") == 0
    row, found = results.read_row(file), json.loads((logs / "figures.json").read_text())
    assert (row["metric"], row["value"], row["n"]) == ("caption_fidelity", found["fidelity"]["top1_pixels"], 12)
    assert row["config"] == "configs/latent-diffusion/openmoji_demo.yaml" and row["family"] == "text to image"
    assert row["commit"] == found["training"]["commit"] and row["minutes"] == round(found["training"]["minutes"], 1)


def test_one_checkpoint_is_no_curve(logs, tmp_path, capsys):
    run = only_run(logs / "runs")
    alone = tmp_path / "run"
    (alone / "checkpoints").mkdir(parents=True)
    (alone / "checkpoints/last.ckpt").hardlink_to(run / "checkpoints/last.ckpt")
    assert captions(logs, "-r", alone, "--over-time", tmp_path / "curve.png") == 2
    assert "every_n_train_steps" in capsys.readouterr().err
    assert captions(logs, "-r", run, "--over-time", tmp_path / "a.png", "--picture", tmp_path / "b.png") == 2
    assert "--picture" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))


def test_minutes_go_on_when_a_run_is_resumed(logs):
    run = only_run(logs / "runs")
    before = minutes_of(read(run / "checkpoints/last.ckpt"))
    assert run_main("-t", "-r", run, "lightning.trainer.max_steps=6") == 0
    last = in_order_of_steps(run)[-1]
    assert read(last)["global_step"] == 6 and minutes_of(read(last)) > before > 0
    assert minutes_of({"state_dict": {}}) is None
