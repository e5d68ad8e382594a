"""scripts/evaluate.py as a user calls it: what the result says, in several processes, killed, with wrong words."""

import csv
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation.features import MODELS
from ldm.evaluation.provenance import commit
from ldm.util import UserError
from scripts import common, evaluate, results
from tests.cli.tools import QUICK, ROOT, config, finish, only_run, run_main, start
from tests.evaluation import weights

TINY = ["model.params.unet_config.params.num_res_blocks=1", "model.params.unet_config.params.channel_mult=[1,1]"]
TINY += [
    "model.params.unet_config.params.attention_resolutions=[]",
    "lightning.callbacks.image_logger.params.disabled=true",
]
DIGITS = str(MODELS / "classifier/digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A diffusion model that was hardly trained."""
    logs = tmp_path_factory.mktemp("logs")
    argv = ["-t", "-b", config("configs/diffusion/ddpm_digits.yaml"), "-l", logs, "--max_steps", 2, "--no-test"]
    assert run_main(*argv, *QUICK, *TINY, "lightning.trainer.limit_val_batches=1") == 0
    return only_run(logs)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    argv = ["-t", "-b", config("configs/autoencoder/vae_digits.yaml"), "-l", logs, "--max_steps", 2, "--no-test"]
    small = ["model.params.iwae_samples=2", "lightning.callbacks.image_logger.params.disabled=true"]
    assert run_main(*argv, *QUICK, *small, "lightning.trainer.limit_val_batches=1") == 0
    return only_run(logs)


def call(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
    return common.main(evaluate.build_parser(), evaluate.measure)


def arguments(run, outdir, *more, n=24):
    return ["-r", run, "-n", n, "--set", "steps=2", "--batch-size", 8, "--device", "cpu", "--outdir", outdir, *more]


def test_the_result_says_all_it_depends_on(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, *arguments(run, out, "--json", tmp_path / "result.json")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    metrics = result["metrics"]
    for name in ("fid", "kid", "precision", "recall", "density", "coverage", "diversity", "class_agreement", "copies"):
        assert np.isfinite(metrics[name]), name
    assert metrics["fid"] > 1 and metrics["copies"] == 0
    assert result["real"]["split"] == "train" and result["real"]["n"] == 1257 and len(result["real"]["sha256"]) == 64
    assert result["features"]["name"] == "digits" and "bicubic" in result["features"]["resize"]
    sampling = result["sampling"]
    assert (
        sampling["knobs"]["steps"] == 2 and sampling["knobs"]["sampler"] == "ddim" and sampling["knobs"]["scale"] == 1
    )
    assert sampling["n"] == 24 and sampling["seed"] == 0 and sampling["asked_by"] == "classes"
    assert sampling["cost"]["network_calls_per_picture"] == 2 and sampling["cost"]["seconds_per_picture"] > 0
    assert sampling["knobs"]["eta"] == 0 and sampling["knobs"]["grid"]  # what their None stands for
    (drawer,) = sampling["drawn_by"]
    assert drawer["commit"] == result["commit"] and drawer["batch_size"] == 8 and drawer["versions"]["torch"]
    assert result["real"]["resize"] == "bicubic, antialiased, from 8x8" and result["drawn"]["resize"] == "none"
    assert result["weights"] == "ema" and result["commit"] and result["versions"]["torch"]
    assert any("24 pictures for 64 features" in n for n in result["notes"])
    assert (out / f"{sampling_folder(result)}-nearest.png").is_file()
    with open(metrics["nearest_list"], newline="") as f:
        listed = {r["picture"]: int(r["nearest"]) for r in csv.DictReader(f)}
    assert sorted(listed) == [f"{i:08}.png" for i in range(24)] and all(0 <= i < 1257 for i in listed.values())


def sampling_folder(result):
    return result["drawn"]["folder"].rpartition("/")[2]


def test_classes_are_asked_for_as_often_as_the_data_has_them(run, tmp_path, monkeypatch):
    assert call(monkeypatch, *arguments(run, tmp_path, "--metrics", "agreement", n=20)) == 0
    folder = next((tmp_path / "pictures").iterdir())
    asked = [int(json.loads(Image.open(p).text["ldm"])["classes"]) for p in sorted(folder.glob("*.png"))]
    assert (np.bincount(asked, minlength=10) == 2).all()  # the digits are as good as balanced


# scripts/evaluate.py with one process that is behind the other: before it asks what it shall draw, and at each picture
UNEQUAL = """
import os, sys, time
sys.path.insert(0, {root!r})
from ldm.evaluation.sampling import Drawing
from scripts import common, evaluate

def late(method):
    def call(self, *args):
        if os.environ.get("LOCAL_RANK", "0") == {behind!r}:
            time.sleep(0.3)
        return method(self, *args)
    return call

Drawing.predict_dataloader = late(Drawing.predict_dataloader)
Drawing._save = late(Drawing._save)
if __name__ == "__main__":
    sys.exit(common.main(evaluate.build_parser(), evaluate.measure))
"""


@pytest.mark.parametrize(("behind", "threads"), [("0", 1), ("1", None)])
def test_two_processes_draw_what_one_draws(run, tmp_path, monkeypatch, behind, threads):
    """With a fixed number of threads bit by bit; with the default one, which processes share, but for the last bits."""
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    flags = ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2"]
    argv = arguments(run, tmp_path / "two", "--metrics", "fid", *flags, n=40)
    (tmp_path / "unequal.py").write_text(UNEQUAL.format(root=str(ROOT), behind=behind))
    code, out = finish(start(tmp_path / "unequal.py", *argv))
    assert code == 0, out
    code, one = finish(start("scripts/evaluate.py", *arguments(run, tmp_path / "one", "--metrics", "fid", n=40)))
    assert code == 0, one
    a, b = (sorted((tmp_path / n / "pictures").rglob("*.png")) for n in ("two", "one"))
    assert [p.name for p in a] == [p.name for p in b] and len(a) == 40
    apart = [np.asarray(Image.open(p)).astype(int) - np.asarray(Image.open(q)) for p, q in zip(a, b, strict=True)]
    results = [json.loads(next((tmp_path / n).glob("*.json")).read_text()) for n in ("two", "one")]
    drawers = [r["sampling"]["drawn_by"] for r in results]
    assert [len(d) for d in drawers] == [1, 1]  # both processes of one evaluation are the same drawer
    if threads is None:
        assert all(d[0]["threads"] >= 1 for d in drawers)
        assert np.abs(apart).max() <= 1 and (np.array(apart) != 0).mean() < 0.01
        assert results[0]["metrics"]["fid"] == pytest.approx(results[1]["metrics"]["fid"], rel=1e-4)
    else:
        assert drawers[0][0]["threads"] == drawers[1][0]["threads"] == threads
        assert not np.any(apart) and results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["sampling"]["cost"]["devices"] == 2


def test_a_killed_evaluation_goes_on(run, tmp_path, monkeypatch):
    argv = ["-r", run, "-n", 400, "--set", "steps=40", "--batch-size", 20, "--device", "cpu", "--metrics", "fid"]
    process = start("scripts/evaluate.py", *argv, "--outdir", tmp_path / "killed")
    folder = tmp_path / "killed/pictures"
    while len(list(folder.rglob("*.png"))) < 20 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("[0-9]*.png")}
    assert 20 <= len(kept) < 400
    n = 20 * (len(kept) // 20 + 2)  # a few batches more
    argv[3] = n
    assert call(monkeypatch, *argv, "--outdir", tmp_path / "killed") == 0
    whole = [p for p in kept if int(p.stem) < 20 * (len(kept) // 20)]
    assert whole and all(p.stat().st_mtime_ns == kept[p] for p in whole)  # not drawn again
    assert call(monkeypatch, *argv, "--outdir", tmp_path / "whole") == 0
    a, b = (json.loads(next((tmp_path / x).glob("*.json")).read_text())["metrics"] for x in ("killed", "whole"))
    assert a == b


def test_a_row_of_the_readme_s_table_from_a_run(run, tmp_path, monkeypatch, capsys):
    """All of it from the run itself: the command that trained it, its minutes, cores and commit."""
    file, cores = tmp_path / "results/ddpm_digits.json", min(2, torch.get_num_threads())
    argv = arguments(run, tmp_path / "out", "--metrics", "agreement", "fid")
    few = [f"cores={cores}"] * (torch.get_num_threads() > 2)  # the table is of two at most
    assert call(monkeypatch, *argv, "--row", file, *few) == 0
    result = json.loads(capsys.readouterr().out)
    row = results.read_row(file)
    training = result["training"]
    assert row["config"] == "configs/diffusion/ddpm_digits.yaml" and row["family"] == "diffusion"
    assert row["command"].startswith("python main.py -t -b configs/diffusion/ddpm_digits.yaml --max_steps 2 --no-test")
    assert TINY[0] in row["command"] and "-l" not in row["command"].split() and str(run) not in row["command"]
    assert (row["metric"], row["n"]) == ("class_agreement", 24)
    assert row["value"] == pytest.approx(result["metrics"]["class_agreement"], rel=1e-3)
    assert row["minutes"] == round(training["minutes"], 1) and row["commit"] == training["commit"] == commit()
    assert row["cores"] == cores and (training["cores"], training["device"]) == (torch.get_num_threads(), "cpu")
    assert row["config"] in results.table(file.parent)
    given = ["family=diffusion, small", "minutes=4.4", "cores=1", "commit=1234567", "command=python main.py -t -b x"]
    assert call(monkeypatch, *argv, "--row", file, *given) == 0
    row = results.read_row(file)
    assert (row["minutes"], row["cores"], row["commit"]) == (4.4, 1, "1234567") and row["command"].endswith("-b x")
    assert call(monkeypatch, *argv, "--row", file, *few) == 0
    row = results.read_row(file)  # the words for the family stay, figures are the run's again
    assert row["family"] == "diffusion, small" and row["commit"] == commit()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["value=1"], "--row value=1: expected KEY=VALUE of family, config, command, minutes, commit, cores"),
        (["minute=1"], "(did you mean minutes?)"),
        (["minutes=few"], "--row minutes=few: expected a number"),
    ],
)
def test_wrong_words_of_a_row_are_said_before_anything_is_measured(run, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "trainer_settings", lambda _: pytest.fail("measured"))
    assert call(monkeypatch, *arguments(run, tmp_path), "--row", tmp_path / "a.json", *words) == 2
    assert message in capsys.readouterr().err


TRAINING = {"command": "python main.py -t -b configs/a.yaml", "config": "configs/a.yaml", "commit": "1234567"}
TRAINING |= {"cores": 2, "device": "cpu", "minutes": 1.04}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": None, "cores": None}, "does not say its commit, cores: add commit=... cores=..."),
        ({"device": "cuda"}, "trained on cuda"),
        ({"cores": 8}, "trained on 8 cores"),
        (
            {"command": "python main.py -t -b configs/a.yaml first_stage=/home/me/run"},
            "first_stage=/home/me/run is on this",
        ),
    ],
)
def test_what_is_no_row(change, message, tmp_path):
    """Of a run from before runs kept where they come from, too."""
    words, model = [str(tmp_path / "a.json")], "ldm.models.vae.VAE"
    with pytest.raises(UserError, match=re.escape(message)):
        results.write_row(words, "fid", 1.23456, 10, {**TRAINING, **change}, model)
    assert not (tmp_path / "a.json").exists()
    results.write_row(words, "fid", 1.23456, 10, TRAINING, model)
    row = results.read_row(tmp_path / "a.json")
    own = {k: v for k, v in TRAINING.items() if k != "device"}
    assert row == {**own, "family": "VAE", "metric": "fid", "value": 1.235, "n": 10, "minutes": 1.0}


def test_a_folder_is_measured_like_a_run(run, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *arguments(run, tmp_path, "--metrics", "fid", "prc")) == 0
    first = json.loads(capsys.readouterr().out)
    folder = first["drawn"]["folder"]
    assert call(monkeypatch, "-r", folder, "--real", run, "--metrics", "fid", "prc", "--outdir", tmp_path) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["metrics"] == first["metrics"]
    yaml = config("configs/diffusion/ddpm_digits.yaml")
    argv = ["-r", folder, "--real", yaml, "--split", "validation", "--metrics", "fid", "--outdir", tmp_path]
    assert call(monkeypatch, *argv) == 0
    third = json.loads(capsys.readouterr().out)
    assert third["real"]["n"] == 180 and third["metrics"]["fid"] != first["metrics"]["fid"]


def test_a_folder_against_itself_is_at_distance_zero(run, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *arguments(run, tmp_path, "--metrics", "fid")) == 0
    folder = json.loads(capsys.readouterr().out)["drawn"]["folder"]
    argv = ["-r", folder, "--real", folder, "--metrics", "fid", "prc", "--features", "digits", "--outdir", tmp_path]
    assert call(monkeypatch, *argv) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert abs(metrics["fid"]) < 1e-3 and metrics["precision"] == metrics["recall"] == 1
    packed = shutil.make_archive(str(tmp_path / "pictures"), "zip", folder)  # read in place, and no checkpoint
    argv[3] = packed
    assert call(monkeypatch, *argv) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == metrics


def test_real_pictures_of_another_size_decide_the_size_of_both(run, tmp_path, monkeypatch, capsys):
    """Of one data set at one size whatever size the model draws: nearest neighbours and sharpness are comparable."""
    text = (ROOT / "configs/diffusion/ddpm_digits.yaml").read_text()
    assert text.count("    size: 16\n") == 1
    (tmp_path / "large.yaml").write_text(text.replace("    size: 16\n", "    size: 24\n"))
    argv = arguments(run, tmp_path, "--real", tmp_path / "large.yaml", "--metrics", "fid", "sharpness", "memorisation")
    assert call(monkeypatch, *argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["real"]["size"] == result["drawn"]["size"] == [24, 24]
    assert result["drawn"]["resize"] == "bicubic, crop, from 16x16"


def test_an_autoencoder(vae, tmp_path, monkeypatch, capsys):
    argv = ["-r", vae, "--metrics", "psnr", "ssim", "rfid", "bpd", "elbo", "--split", "test"]
    argv += ["--outdir", tmp_path]
    assert call(monkeypatch, *argv) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = result["metrics"]
    assert 0 < metrics["psnr"] < 30 and -1 < metrics["ssim"] < 1 and metrics["rfid"] > 1
    assert metrics["bits_per_dimension"] > 0 and "Bernoulli" in metrics["bits_per_dimension_note"]
    assert metrics["elbo"] < 0
    assert result["real"]["n"] == 360 and "sampling" not in result


def test_path_lengths_in_the_features_that_are_chosen(vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights.place("clip-vit-b-32", tmp_path / "hub", weights.clip(), monkeypatch)
    argv = ["-r", vae, "--metrics", "ppl", "-n", 12, "--outdir", tmp_path]
    found = []
    for features in ("digits", "clip-vit-b-32"):
        assert call(monkeypatch, *argv, "--features", features) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["features"]["name"] == features and result["metrics"]["ppl"] > 0
        found.append(result["metrics"]["ppl"])
    assert found[0] != found[1]


def test_a_classifier(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "-r", DIGITS, "--metrics", "accuracy", "calibration", "--outdir", tmp_path) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["real"]["split"] == "test" and result["metrics"]["top1"] > 0.99
    assert len(result["metrics"]["per_class"]) == 10 and 0 < result["metrics"]["calibration_error"] < 0.2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-r", "{run}", "--metrics", "fidd"], "--metrics fidd: expected fid, kid"),
        (["-r", "{run}", "--metrics", "accuracy"], "--metrics accuracy cannot be measured of a DDPM, which has fid"),
        (["-r", DIGITS, "--metrics", "fid"], "--metrics fid cannot be measured of a Classifier"),
        (["-r", "{run}", "--metrics", "clip_score", "-n", "4"], "CLIP score needs a model that is asked by captions"),
        (["-r", "{run}", "--split", "extra", "-n", "4"], "--split extra: the config's data has train, validation"),
        (
            ["-r", "{run}", "trainer.device=2"],
            "trainer.device: the Trainer has no such setting (did you mean devices?)",
        ),
        (["-r", "nowhere"], "nowhere does not exist"),
        (["-r", "{folder}"], "is a folder of pictures: give --real"),
        (["-r", "{run}", "-n", "1"], "-n 1: expected at least 2 pictures"),
        (["-r", "{run}", "--features", "inception"], "--features inception: neither a run nor one of"),
        (["-r", "{run}", "--set", "stepz=3"], "--stepz: DDPM has steps"),
    ],
)
def test_wrong_words(argv, message, run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (16, 16)).save(folder / "a.png")
    argv = [a.format(run=run, folder=folder) for a in argv]
    assert (
        call(
            monkeypatch,
            *argv,
            "--outdir",
            tmp_path / "out",
            "--set",
            *(["steps=2"] if "--set" not in argv else argv[-1:]),
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
