"""scripts/classify.py, compare_classifiers.py and export.py, as a user types them."""

import csv
import importlib
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ldm.generate import load_run
from ldm.modules.classifiers import vit
from ldm.published import WITHOUT, gflops, parameters, published
from tests.cli.tools import DIGITS, QUICK, ROOT, config, only_run, run_main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps of the digits classifier, tested."""
    logs = tmp_path_factory.mktemp("logs")
    argv = ["-t", "-b", config(DIGITS), "-l", logs, *QUICK, "--max_steps", 12, "--check_val_every_n_epoch", 1]
    argv += ["model.params.network_config.params.width=0.5", "lightning.trainer.limit_train_batches=12"]
    assert run_main(*argv) == 0
    return only_run(logs)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five grey pictures, two in a sub-folder, one larger than the network's size."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (root / "more").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png", "more/d.png", "more/e.png")):
        size = (16, 16) if i else (40, 32)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
    return root


def script(name, *argv):
    """(exit code, standard output, standard error) of a script in this process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, argv)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capfd):
    """The same without a process of its own."""

    def run_it(name, *argv):
        module = importlib.import_module(f"scripts.{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        action = {"classify": "classify", "compare_classifiers": "compare", "export": "export"}[name]
        code = module.common.main(module.build_parser(), getattr(module, action))
        return (code, *capfd.readouterr())

    return run_it


# --- classify ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_model_s(run, pictures, call, tmp_path):
    files = tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "looks.png"
    code, out, err = call(
        "classify", "-r", run, pictures, "--top", 3, "--json", files[0], "--csv", files[1], "--grad-cam", files[2]
    )
    assert code == 0, err
    rows = json.loads(files[0].read_text())
    assert [r["file"] for r in rows] == [
        str(pictures / n) for n in ("a.png", "b.png", "c.png", "more/d.png", "more/e.png")
    ]
    model, _ = load_run(run)
    pixels = torch.from_numpy(np.asarray(Image.open(pictures / "b.png"))).float()[None, None] / 127.5 - 1
    with model.ema_scope():
        expected = model(pixels).softmax(1)[0]
    values, classes = expected.topk(3)
    assert [t["index"] for t in rows[1]["top"]] == classes.tolist()
    assert [t["probability"] for t in rows[1]["top"]] == pytest.approx(values.tolist(), abs=1e-4)
    assert re.search(rf"b.png +{classes[0]} {float(values[0]):.1%}  ", out) and "(ema weights)" in out
    lines = list(csv.DictReader(files[1].open()))
    assert len(lines) == 15 and lines[3] == {
        "file": str(pictures / "b.png"),
        "rank": "1",
        "class": str(int(classes[0])),
        "index": str(int(classes[0])),
        "probability": str(rows[1]["top"][0]["probability"]),
    }
    assert Image.open(files[2]).width > 4 * 128
    code, out, _ = call("classify", "-r", run, pictures / "b.png", "--json", "-", "--weights", "raw")
    raw = json.loads(out)[0]["top"]
    assert code == 0 and len(raw) == 5
    assert raw[0]["probability"] == pytest.approx(float(model(pixels).softmax(1).max()), abs=1e-4)


@pytest.mark.parametrize("place", [(), ("-",)])
def test_answers_on_standard_output(run, pictures, call, place):
    code, out, _ = call("classify", "-r", run, pictures / "a.png", "--top", 2, "--json", *place)
    top = json.loads(out)[0]["top"]
    assert code == 0 and len(top) == 2
    code, out, _ = call("classify", "-r", run, pictures / "a.png", "--top", 2, "--csv", *place)
    lines = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [line["class"] for line in lines] == [t["class"] for t in top]


def test_a_picture_is_not_taken_for_the_file_to_write(run, pictures, call):
    before = (pictures / "a.png").read_bytes()
    for flag in ("--json", "--csv"):
        code, out, err = call("classify", "-r", run, flag, pictures / "a.png", pictures / "b.png")
        assert code == 2 and not out and f"a.png: expected a name that ends in .{flag[2:]}" in err
    assert (pictures / "a.png").read_bytes() == before
    code, _, err = call("classify", "-r", run, pictures / "a.png", "--json", "--csv")
    assert code == 2 and "cannot both go to standard output" in err


def test_a_broken_picture_does_not_lose_the_others(run, pictures, call, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, out, err = call("classify", "-r", run, tmp_path / "bad.png", pictures / "a.png")
    assert code == 2 and "a.png" in out and "1 of 2 pictures cannot be read" in err and "bad.png" in err


def test_faults_of_classify(run, pictures, call, tmp_path):
    for argv, message in (
        ([pictures], "give either -r logs/<run> or --model NAME"),
        (["-r", run, tmp_path / "no.png"], "no.png does not exist: expected picture files or folders"),
        (["-r", run, tmp_path], "no pictures in"),
        (["-r", run, pictures, "--weights", "best"], "with -r expected ema or raw"),
        (["-r", run, pictures, "--top", 0], "--top 0: expected at least 1"),
        (["--model", "resnet5", pictures], "torchvision has no such network (did you mean resnet50?)"),
        (["--model", "resnet50", "--weights", "V3", pictures], "resnet50 has IMAGENET1K_V1, IMAGENET1K_V2"),
    ):
        code, _, err = call("classify", *argv)
        assert code == 2 and message in err and "Traceback" not in err, err


def test_torchvision_s_weights_sizes_and_names(call, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / entry.url.rpartition("/")[2])
    smooth = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((300, 360), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "x.png")
    code, out, err = call("classify", "--model", "resnet18", tmp_path / "x.png", "--json", "-")
    assert code == 0, err
    top = json.loads(out)[0]["top"]
    with torch.no_grad():
        expected = net(entry.transforms()(picture)[None]).softmax(1)[0]
    assert top[0]["class"] == entry.meta["categories"][int(expected.argmax())]
    assert top[0]["probability"] == pytest.approx(float(expected.max()), rel=0.02)  # another order of cut and resize


# --- compare ----------------------------------------------------------------------------------------------------------


def test_comparison_of_runs(run, call, tmp_path):
    code, out, err = call("compare_classifiers", run, tmp_path, "--outdir", tmp_path / "out", "--title", "Digits")
    assert code == 0, err
    assert f"left out: {tmp_path} holds no checkpoint" in err
    assert Image.open(tmp_path / "out/chart.png").size == (960, 600)
    assert Image.open(tmp_path / "out/curves.png").size == (1100, 440)
    text = (tmp_path / "out/table.md").read_text()
    assert text.startswith("# Digits\n") and text.partition("\n\n")[2] in out
    row = [c.strip() for c in text.splitlines()[-1].strip("|").split("|")]
    model, _ = load_run(run)
    report = json.loads((run / "report_test.json").read_text())
    assert row[0] == "resnet_digits" and row[1] == f"{parameters(model.model) / 1e6:.2f}"
    assert row[2] == f"{gflops(model.model, torch.zeros(1, 1, 16, 16)):.3g}"
    assert float(row[3]) > 0 and float(row[4]) > 0
    assert row[5] == f"{100 * report['ema']['acc1']:.2f}" and row[6].startswith("test, epoch ")


def test_a_kept_row_stands_for_its_run(run, call, tmp_path):
    code, out, err = call("compare_classifiers", run, "--outdir", tmp_path / "a", "--keep", tmp_path / "rows")
    assert code == 0, err
    file = tmp_path / "rows/resnet_digits.json"
    assert str(file) in out
    code, untimed, err = call("compare_classifiers", run, "--outdir", tmp_path / "d", "--no-speed")
    assert code == 0 and "| GFLOPs | minutes | top-1 (%) |" in untimed, err
    code, again, err = call("compare_classifiers", file, "--outdir", tmp_path / "b")
    assert code == 0, err
    tables = [(tmp_path / n / "table.md").read_text() for n in "ab"]
    assert tables[0] == tables[1] and tables[1].partition("\n\n")[2] in again
    curves = json.loads(file.read_text())["curves"]
    assert 2 <= len(curves["train/loss"]) <= 61 and all(0 <= v <= 1 for _, v in curves["val/acc1_ema"])
    pictures = [np.asarray(Image.open(tmp_path / n / "curves.png")) for n in "ab"]
    difference = np.abs(pictures[0].astype(int) - pictures[1])
    assert difference.max() < 16  # kept with six digits: no line is elsewhere
    file.write_text("{}")
    code, _, err = call("compare_classifiers", file, run, "--outdir", tmp_path / "c")
    assert code == 0 and f"left out: {file}: expected a row that compare_classifiers.py --keep wrote" in err


def test_no_run_is_a_classifier_s(call, tmp_path):
    code, _, err = call("compare_classifiers", tmp_path, "--outdir", tmp_path / "out")
    assert code == 2 and "none of 1 runs is a classifier's" in err


@pytest.fixture(scope="module")
def rows():
    return {f.label: f for f in published()}


def test_published_figures(rows):
    assert {"alexnet", "nin", "vgg19", "googlenet", "inception_v4", "resnet152", "senet154", "vit_l_16"} <= set(rows)
    # parameters (M) of each network's implementation, and GFLOPs as twice torchvision's multiply-adds
    for label, params in {"alexnet": 61.10, "vgg16": 138.36, "googlenet": 6.62, "senet154": 115.09}.items():
        assert rows[label].params / 1e6 == pytest.approx(params, abs=0.006)
    for label in ("resnet50", "vgg16", "alexnet"):
        ops = torchvision.models.get_model_weights(label)["IMAGENET1K_V1"].meta["_ops"]
        assert rows[label].gflops == pytest.approx(2 * ops, rel=0.01)
    assert rows["alexnet"].top1 < rows["googlenet"].top1 < rows["resnet50"].top1 < rows["senet154"].top1
    assert all(re.search("torchvision|timm|gist|arxiv", f.source) for f in rows.values())
    huge = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1.meta
    assert rows["vit_h_14"].top1 == huge["_metrics"]["ImageNet-1K"]["acc@1"]
    assert rows["vit_h_14"].gflops == pytest.approx(2 * huge["_ops"], rel=0.01)


def test_every_network_has_a_published_figure_or_a_reason(rows):
    built = set()
    for file in (ROOT / "ldm/modules/classifiers").glob("[a-z]*.py"):
        module = importlib.import_module(f"ldm.modules.classifiers.{file.stem}")
        for name, f in inspect.getmembers(module, inspect.isfunction):
            if f.__module__ == module.__name__ and name[0] != "_" and "num_classes" in inspect.signature(f).parameters:
                built.add(name)
    figures = {label.partition(",")[0] for label in rows}
    reasons = {name for names in WITHOUT for name in names.split(", ")}
    assert len(built) > 40 and built == figures | reasons and not figures & reasons
    assert "alexnet, norm: bn" in rows


@pytest.mark.parametrize("build", [vit.vit_ti_16, torchvision.models.vit_b_16])
def test_operations_of_attention_are_counted_on_every_device(build):
    with torch.device("meta"):
        expected = gflops(build(), torch.zeros(1, 3, 224, 224))
    assert gflops(build(), torch.zeros(1, 3, 224, 224)) == pytest.approx(expected)


def test_chart_without_runs(tmp_path):
    code, out, err = script("compare_classifiers.py", "--outdir", tmp_path)
    assert code == 0, err
    assert "| senet154 | 115.09 |" in out and "published figures" in err and (tmp_path / "chart.png").is_file()
    assert "plain18, plain34 (only of ten crops" in out and "fastnet (" in (tmp_path / "table.md").read_text()


# --- export -----------------------------------------------------------------------------------------------------------


def test_exported_file_gives_the_same_answers(run, call, tmp_path):
    import onnxruntime

    code, out, err = call("export", "-r", run, "--onnx", tmp_path / "new/model.onnx")
    assert code == 0, err
    assert "onnxruntime agrees" in out and "10 classes" in out
    session = onnxruntime.InferenceSession(str(tmp_path / "new/model.onnx"), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"]) == [str(d) for d in range(10)] and notes["size"] == "16x16"
    x = torch.rand(5, 1, 16, 16) * 2 - 1
    model, _ = load_run(run)
    with model.ema_scope():
        expected = model(x).softmax(1)
    (got,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_an_export_that_differs_is_refused(run, call, tmp_path, monkeypatch):
    from ldm import exporting

    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    code, _, err = call("export", "-r", run, "--onnx", tmp_path / "x.onnx")
    assert code == 2 and "onnxruntime differs by" in err and not (tmp_path / "x.onnx").exists()
