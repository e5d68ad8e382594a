"""scripts/compare.py: a training within its time, measured, on a page; what is done is not done again."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from ldm.evaluation import claims
from ldm.evaluation.reconstruction import reconstruct
from ldm.generate import load_run
from ldm.util import UserError
from scripts import common, compare
from tests.cli.tools import QUICK, ROOT, config, run_main

VAE = config("configs/autoencoder/vae_digits.yaml")
SMALL = ["model.params.iwae_samples=0", *QUICK]


def call(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, argv)])
    return common.main(compare.build_parser(), compare.compare)


def test_a_page_from_a_config_and_the_second_time_from_what_is_there(tmp_path, monkeypatch):
    out = tmp_path / "report"
    argv = [VAE, *SMALL, "--budget", 3, "-n", 70, "--outdir", out, "--title", "Digits"]
    assert call(monkeypatch, *argv) == 0
    (row,) = json.loads((out / "rows.json").read_text())
    assert row["family"] == "VAE" and row["fid"] > 1 and row["network_calls_per_picture"] == 1
    assert 0 < row["trained_steps"] < 3000 and row["parameters"] > 1000 and row["minutes"] > 0
    html = (out / "index.html").read_text()
    assert "vae_digits" in html and "No GAN" in html and "70 pictures" in html
    assert "scripts/compare.py configs/autoencoder/vae_digits.yaml" in html  # no path of this machine
    assert "Trained for this page, within 3 seconds each" in html and "Taken as they were" not in html
    assert "--seed 23" in html and "train, 16x16; resized: bicubic, antialiased, from 8x8" in html
    trained = json.loads((out / "runs/vae_digits.json").read_text())
    before = time.time()
    args = compare.build_parser().parse_args([str(a) for a in argv])
    assert compare.trained(VAE, 3.0, args, SMALL, "vae_digits")["run"] == trained["run"] and time.time() - before < 60


def test_two_stages_share_the_time(monkeypatch, tmp_path):
    calls = []

    def fake(argv, log):
        calls.append(argv)
        if "-l" in argv:
            Path(argv[argv.index("-l") + 1], f"2026_{len(calls)}").mkdir(parents=True)
        return "steps       500; 100 ms a step; about 50 s of training"

    monkeypatch.setattr(compare, "call", fake)
    args = compare.build_parser().parse_args(["x", "--budget", "20", "--outdir", str(tmp_path)])
    found = compare.prepared("a/stage.yaml+b/model.yaml", args, ["data.params.batch_size=4"], "model")
    dry, first, _, second = calls
    assert "--dry-run" in dry and "data.params.batch_size=4" in dry
    assert "lightning.trainer.max_steps=90" in first  # 0.9 of 10 s at 100 ms
    assert "lightning.trainer.max_time={seconds: 10}" in first
    assert f"first_stage={tmp_path / 'runs/model-on-stage/2026_2'}" in second and found["name"] == "model"
    assert "lightning.trainer.max_time={seconds: 10}" in second and found["first_stage"] == "stage"
    alone = compare.prepared("a/stage.yaml", args, ["data.params.batch_size=4"], "stage")
    assert "lightning.trainer.max_time={seconds: 20}" in calls[-1] and alone["budget"] == 20
    again = compare.prepared("a/stage.yaml+b/model.yaml", args, ["data.params.batch_size=4"], "model")
    assert again == found and len(calls) == 6  # the stage alone, with the whole time, has not taken its place


FAMILIES = {
    "autoregressive": ("autoregressive/digits_vqgan", "autoregressive/digits_vqgpt"),
    "latent diffusion": ("autoencoder/kl_digits", "latent-diffusion/digits_class"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_of_a_family_are_trained_within_the_time(family, tmp_path, monkeypatch, capfd):
    """The second one draws with the first one's weights, and needs its run no more."""
    first, second = (config(f"configs/{c}.yaml") for c in FAMILIES[family])

    def here(argv, log):
        capfd.readouterr()
        assert run_main(*argv[1:]) == 0
        return "".join(capfd.readouterr())

    monkeypatch.setattr(compare, "call", here)
    args = compare.build_parser().parse_args(["x", "--budget", "4", "--outdir", str(tmp_path)])
    quick = [*QUICK, "lightning.callbacks.image_logger.params.disabled=true"]
    compare.one_size(f"{first}+{second}", quick)
    found = compare.prepared(f"{first}+{second}", args, quick, "model")
    stage = json.loads((tmp_path / f"runs/model-on-{Path(first).stem}.json").read_text())
    assert found["name"] == "model" and found["minutes"] > stage["minutes"] > 0
    model, own = load_run(found["run"])[0], load_run(stage["run"])[0]
    assert claims.family_of(f"{type(model).__module__}.{type(model).__name__}") == family
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    with own.ema_scope():
        torch.testing.assert_close(reconstruct(model.first_stage_model, x), reconstruct(own, x))
    shutil.rmtree(stage["run"])
    assert load_run(found["run"])[0].sample(model.condition([0]), seeds=[0]).shape == (1, 1, 16, 16)


def test_stages_of_two_sizes_are_refused_before_any_training(tmp_path, monkeypatch, capsys):
    stage, model = (config(f"configs/autoregressive/{c}.yaml") for c in ("openmoji_vqgan", "digits_vqgpt"))
    monkeypatch.setattr(compare, "trained", lambda *_: pytest.fail("trained"))
    assert call(monkeypatch, f"{stage}+{model}", "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "the first stage reads ldm.data.builtin.OpenMoji at 64x64, the second one ldm.data.builtin.Digits" in error


def test_entries_of_one_name_are_told_apart(tmp_path):
    """Their runs, results and lines in the plots would be taken for one another's."""
    runs = [tmp_path / f"2026-01-0{i}_ddpm_digits" for i in (1, 2)]
    for run in runs:
        run.mkdir()
    what = [
        "configs/autoencoder/folder.yaml",
        "configs/diffusion/folder.yaml",
        "a/kl.yaml+b/model.yaml",
        *map(str, runs),
    ]
    names = compare.names_of(what)
    assert list(names.values()) == ["autoencoder-folder", "diffusion-folder", "model", "ddpm_digits", "ddpm_digits-2"]


def test_runs_on_data_of_different_sizes_are_refused_before_any_training(tmp_path, monkeypatch, capsys):
    gan, vae = (config(f"configs/{c}.yaml") for c in ("gan/dcgan_digits", "autoencoder/vae_digits"))
    monkeypatch.setattr(compare, "trained", lambda *_: pytest.fail("trained"))
    assert call(monkeypatch, gan, vae, "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "dcgan_digits.yaml: ldm.data.builtin.Digits at 32x32" in error and "vae_digits.yaml" in error
    assert "at 16x16" in error and "Give one --real for all" in error
    same = compare.planned_data(gan, ["data.params.size=16", "model.params.size=16"])
    assert same == compare.planned_data(vae, []) == "ldm.data.builtin.Digits at 16x16"


REAL = {"data": "a.Set", "split": "train", "size": [8, 8], "channels": 1, "n": 9, "sha256": "0" * 64, "resize": "none"}


def test_runs_measured_on_other_pictures_are_refused():
    one, other = compare.measured_data(REAL), compare.measured_data({**REAL, "sha256": "1" * 64})
    compare.one_data_set({"a": one, "b": one, "c": None})
    with pytest.raises(UserError, match=r"a: a.Set at 8x8, train.*00000000; b: .*11111111.*Give one --real for all"):
        compare.one_data_set({"a": one, "b": other})


def test_a_result_without_its_cost_is_a_row_all_the_same(tmp_path, monkeypatch):
    result = {"metrics": {"fid": 2.0, "per_class": [1]}, "sampling": {"cost": None}, "model": "ldm.models.vae.VAE"}
    result |= {"parameters": 5, "global_step": 3, "drawn": {"folder": "f"}, "features": {}, "real": REAL}

    def fake(argv, log):
        file = tmp_path / "results/v.json"
        file.parent.mkdir()
        file.write_text(json.dumps(result))

    monkeypatch.setattr(compare, "call", fake)
    args = compare.build_parser().parse_args(["x", "--outdir", str(tmp_path)])
    entry = {"name": "v", "run": "r", "classes": False, "minutes": None, "budget": None}
    row = compare.measured(entry, args, None)
    assert row["fid"] == 2.0 and "seconds_per_picture" not in row and row["budget"] is None


def test_the_page_says_what_was_trained_what_was_taken_and_how():
    rows = [
        {"run": "a", "run_name": "made", "budget": 60.0, "minutes": 1.2},
        {"run": "b", "run_name": "older", "budget": None, "minutes": 14.2},
        {"run": "c", "run_name": "undated", "budget": None, "minutes": None},
    ]
    said = compare.origins(rows)
    assert (
        "within 60 seconds each" in said and "however long they had been trained: older (14.2 minutes), undated" in said
    )
    two = compare.origins([{**rows[0], "first_stage": "stage"}])
    assert "made (half of the time for its first stage, stage)" in two
    assert "seconds" not in compare.origins(rows[1:]) and "Taken" not in compare.origins(rows[:1])
    features = {"name": "digits", "layer": "fc", "sha256": "0" * 64}
    rows[0] |= {
        "features": features,
        "result": {"real": REAL, "versions": {"torch": "2"}, "device": "cpu", "threads": 3},
    }
    flags = ["--real", f"{ROOT}/configs/a.yaml", "--features", "digits", "--seed", "4"]
    texts = compare.texts(compare.build_parser().parse_args(["x.yaml", *flags]), rows)
    assert "--seed 4 --real configs/a.yaml --features digits" in texts["footer"]
    assert "torch 2, cpu, threads: 3." in texts["footer"]


def test_a_failed_training_is_told_with_its_last_line(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, VAE, "model.params.latent=3", "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "failed (exit code 2" in error and "unknown key latent" in error


@pytest.mark.parametrize("argv", [["a=b"], ["nowhere.yaml"]])
def test_nothing_to_compare(argv, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *argv, "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "nothing to compare" in error or "does not exist" in error
