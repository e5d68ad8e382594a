"""What a classifier starts from: torchvision's and timm's files, own runs, older names; and reopening such a run."""

import csv
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision

from ldm.generate import load_run
from ldm.models import pretrained
from ldm.models.classifier import Classifier
from ldm.modules.classifiers import resnet
from ldm.util import UserError
from tests.cli.tools import DIGITS, QUICK, config, only_run, run_main
from tests.models.test_classifier import NET, batch, classifier, picture_folder

SLIM = [
    "model.params.network_config.params.width=0.5",
    "data.params.channels=3",
    "lightning.callbacks.image_logger.params.disabled=true",
]
TIMM = {"target": "timm.create_model", "params": {"model_name": "resnet10t"}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def train(logs, *argv, steps=1):
    quick = [*QUICK, "-l", logs, "--max_steps", steps, "--no-test", "--limit_val_batches", 1, *SLIM]
    assert run_main("-t", "-b", config(DIGITS), *quick, *argv) == 0
    return only_run(logs)


def old_names(state, *renames):
    for new, old in renames:
        state = {k.replace(new, old): v for k, v in state.items()}
    return state


# --- of other projects ------------------------------------------------------------------------------------------------


def test_weights_of_timm_come_with_their_statistics(monkeypatch):
    theirs = timm.create_model("resnet10t", num_classes=9).eval()
    asked = []

    def create_model(name, pretrained=False, **params):
        asked.append((name, pretrained))
        return theirs if pretrained else real(name, **params)

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    statistics = SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, allow_unregistered: statistics)
    model = classifier(9, {**TIMM, "target": "timm.models.create_model"}, weights="timm://resnet10t.c3_in1k").eval()
    assert asked == [("resnet10t.c3_in1k", True)]
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
    torch.testing.assert_close(model(x * 2 - 1), theirs((x - mean) / std), rtol=1e-4, atol=1e-5)


def test_own_folder_on_a_file_of_torchvision(tmp_path, capfd):
    picture_folder(tmp_path / "mine", each=4)
    source = torchvision.models.resnet18().state_dict()
    torch.save(source, tmp_path / "resnet18.pth")
    argv = ["-t", "-b", config("configs/classifier/folder.yaml"), f"data.params.root={tmp_path / 'mine'}", *QUICK]
    argv += ["model.params.network_config.params.stem=imagenet", f"model.params.weights={tmp_path / 'resnet18.pth'}"]
    argv += ["model.learning_rate=0", "--max_steps", 1, "-l", tmp_path / "logs"]
    assert run_main(*argv) == 2
    err = capfd.readouterr().err
    assert "is for 1000 classes, the model has 3" in err
    assert "model.params.allow_head=true, or give main.py --allow-head" in err
    shutil.rmtree(tmp_path / "logs")
    assert run_main(*argv, "--allow-head") == 0
    run = only_run(tmp_path / "logs")
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
    assert state["model.fc.weight"].shape == (3, 512)
    assert any(r.get("val/acc1") for r in csv.DictReader((run / "metrics.csv").open()))


@pytest.mark.parametrize(
    ("name", "renames"),
    [
        ("vit_b_32", ((".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2."))),
        ("densenet121", ((".norm1.", ".norm.1."), (".norm2.", ".norm.2."), (".conv1.", ".conv.1."))),
    ],
)
def test_old_names_of_torchvision_s_own_networks(name, renames, tmp_path):
    network = {"target": f"torchvision.models.{name}", "params": {}}
    theirs = torchvision.models.get_model(name, num_classes=7)
    state = old_names(theirs.state_dict(), *renames)
    assert state.keys() != theirs.state_dict().keys()
    torch.save(state, tmp_path / "old.pth")
    model = classifier(7, network, weights=str(tmp_path / "old.pth"))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in model.model.state_dict().items())
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "old.pth")
    with pytest.raises(UserError, match="1 unexpected .first: extra"):
        classifier(7, network, weights=str(tmp_path / "old.pth"))


def test_a_network_that_asks_for_the_version_of_its_weights(tmp_path):
    theirs = torchvision.models.mnasnet0_5(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = classifier(7, {"target": "torchvision.models.mnasnet0_5", "params": {}}, weights=str(tmp_path / "x.pth"))
    assert torch.equal(model.model.layers[0].weight, theirs.layers[0].weight)


# --- of this project --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["directory", "file"])
def test_own_run_as_a_start_gives_its_averaged_weights(tmp_path, what):
    run = train(tmp_path / "logs", "model.params.normalize=imagenet", "model.params.ema_decay=0.5", steps=3)
    start = run if what == "directory" else run / "checkpoints/last.ckpt"
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    model = Classifier(NET, 10, weights=str(start))
    for key in ("fc.weight", "bn1.running_mean"):
        own = model.model.state_dict()[key]
        assert torch.equal(own, state["model_ema." + key.replace(".", "")])
        assert not torch.equal(own, state["model." + key])
    assert model.statistics == pretrained.IMAGENET  # as it was trained
    with pytest.raises(UserError, match="is for 10 classes, the model has 4"):
        Classifier(NET, 4, weights=str(start))
    wider = {**NET, "params": {"width": 1.0}}
    with pytest.raises(UserError, match="of another shape"):
        Classifier(wider, 10, weights=str(start))


def test_statistics_of_runs_that_did_not_note_them_down(tmp_path):
    net = resnet.resnet20(num_classes=7, width=0.5)
    content = {"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}
    for params, expected in (
        ("weights: torchvision://X, network_config: {target: a.resnet18}", pretrained.IMAGENET),
        ("weights: torchvision://X, network_config: {target: a.googlenet}", pretrained.HALF),
        ("weights: torchvision://X, normalize: none, network_config: {target: a.resnet18}", pretrained.HALF),
        ("normalize: imagenet", pretrained.IMAGENET),
        ("weights: x.pth, network_config: {target: a.resnet18}", pretrained.HALF),
    ):
        torch.save({**content, "config": f"model: {{params: {{{params}}}}}"}, tmp_path / "old.ckpt")
        assert classifier(weights=str(tmp_path / "old.ckpt")).statistics == expected, params
    torch.save(content, tmp_path / "old.ckpt")
    assert classifier(weights=str(tmp_path / "old.ckpt")).statistics == pretrained.HALF


# --- reopening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["torchvision", "file", "run"])
def test_a_run_is_reopened_without_what_it_started_from(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    target = "model.params.network_config.target=ldm.modules.classifiers.resnet."
    argv = ["model.params.use_ema=false", "data.params.batch_size=16"]
    if source == "torchvision":
        name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
        (tmp_path / "hub/checkpoints").mkdir(parents=True)
        file = tmp_path / "hub/checkpoints" / name
        net, start = resnet.resnet18(width=0.125, stem="small"), "torchvision://IMAGENET1K_V1"
        argv += [target + "resnet18", "model.params.network_config.params.width=0.125", "--allow-head"]
        argv += ["model.params.network_config.params.stem=small"]
        torch.save(net.state_dict(), file)
    elif source == "file":
        file = tmp_path / "start.pth"
        torch.save(resnet.resnet20(num_classes=10, width=0.5).state_dict(), file)
        start = file
    else:
        file = start = train(tmp_path / "first", "model.params.normalize=imagenet") / "checkpoints/last.ckpt"
    run = train(tmp_path / "logs", *argv, f"model.params.weights={start}")
    file.unlink()
    expected = pretrained.HALF if source == "file" else pretrained.IMAGENET
    model, info = load_run(run)
    assert model.statistics == expected and info["config"]["model"]["params"]["weights"] == str(start)
    x = batch(n=2)["image"].permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in expected)
    if source == "file":
        torch.testing.assert_close(model.normalize(x), x)
    else:
        torch.testing.assert_close(model.normalize(x), (x / 2 + 0.5 - mean) / std)
    assert run_main("-t", "-r", run, "--max_steps", 2, "--no-test", "--limit_val_batches", 1) == 0
    again = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert again["global_step"] == 2 and [tuple(v) for v in again["pixel_statistics"]] == list(expected)
    # checkpoints that did not note the statistics down say them by their config
    if source == "torchvision":
        del again["pixel_statistics"]
        torch.save(again, run / "checkpoints/last.ckpt")
        assert load_run(run)[0].statistics == expected


def test_statistics_given_by_hand():
    model = classifier(normalize=[[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]])
    x = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in model.statistics)
    torch.testing.assert_close(model.normalize(x * 2 - 1), (x - mean) / std)
