"""scripts/compare.py: a training within its time, measured, on a page; what is done is not done again."""

import json
import time

import pytest

from scripts import common, compare
from tests.cli.tools import QUICK, config

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


def test_a_failed_training_is_told_with_its_last_line(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, VAE, "model.params.latent=3", "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "failed (exit code 2" in error and "unknown key latent" in error


@pytest.mark.parametrize("argv", [["a=b"], ["nowhere.yaml"]])
def test_nothing_to_compare(argv, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *argv, "--outdir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "nothing to compare" in error or "does not exist" in error
