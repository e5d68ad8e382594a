"""scripts/compare.py: a training within its time, measured, on a page; what is done is not done again."""

import json
import time

import pytest

from ldm.util import UserError
from scripts import common, compare
from tests.cli.tools import QUICK, ROOT, config

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
    assert compare.trained(VAE, 3.0, args, SMALL)["run"] == trained["run"] and time.time() - before < 60


def test_two_stages_share_the_time(monkeypatch, tmp_path):
    calls = []

    def fake(argv, log):
        calls.append(argv)
        if "-l" in argv:
            run = tmp_path / "runs" / argv[2].rpartition("/")[2].removesuffix(".yaml") / "2026_x"
            run.mkdir(parents=True)
        return "steps       500; 100 ms a step; about 50 s of training"

    monkeypatch.setattr(compare, "call", fake)
    args = compare.build_parser().parse_args(["x", "--budget", "20", "--outdir", str(tmp_path)])
    found = compare.prepared("a/stage.yaml+b/model.yaml", args, ["data.params.batch_size=4"])
    dry, first, _, second = calls
    assert "--dry-run" in dry and "data.params.batch_size=4" in dry
    assert "lightning.trainer.max_steps=90" in first  # 0.9 of 10 s at 100 ms
    assert "lightning.trainer.max_time={seconds: 10}" in first
    assert f"first_stage={tmp_path / 'runs/stage/2026_x'}" in second and found["name"] == "model"


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
    assert "seconds" not in compare.origins(rows[1:]) and "Taken" not in compare.origins(rows[:1])
    features = {"name": "digits", "layer": "fc", "sha256": "0" * 64}
    rows[0] |= {"features": features, "result": {"real": REAL, "versions": {"torch": "2"}, "device": "cpu"}}
    flags = ["--real", f"{ROOT}/configs/a.yaml", "--features", "digits", "--seed", "4"]
    texts = compare.texts(compare.build_parser().parse_args(["x.yaml", *flags]), rows)
    assert "--seed 4 --real configs/a.yaml --features digits" in texts["footer"]


def test_a_failed_training_is_told_with_its_last_line(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, VAE, "model.params.latent=3", "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "failed (exit code 2" in error and "unknown key latent" in error


@pytest.mark.parametrize("argv", [["a=b"], ["nowhere.yaml"]])
def test_nothing_to_compare(argv, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *argv, "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "nothing to compare" in error or "does not exist" in error
