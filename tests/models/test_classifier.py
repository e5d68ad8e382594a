"""The Classifier: loss and metrics against their definitions, pretrained weights, faults, pictures, and main.py."""

import csv
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from ldm.models import pretrained
from ldm.models.classifier import Classifier
from ldm.models.classifier_pictures import TILE, filter_picture, labelled
from ldm.modules.classifiers import resnet
from ldm.util import ConfigError, UserError, instantiate_from_config
from tests.cli.tools import QUICK, ROOT, config, only_run, run_main

NET = {"target": "ldm.modules.classifiers.resnet.resnet20", "params": {"width": 0.5}}
GOOGLENET = {"target": "ldm.modules.classifiers.googlenet.googlenet", "params": {"width": 0.125, "stem": "small"}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def classifier(num_classes=7, network=NET, **params):
    return Classifier(network, num_classes, **params)


def batch(n=6, classes=7, size=16, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(n, size, size, channels, generator=g) * 2 - 1,
        "class_label": torch.randint(classes, (n,), generator=g),
    }


class Pictures(torch.utils.data.Dataset):
    """27 random images: batches of 8 leave a last one of 3."""

    def __init__(self, classes=7):
        self.data = batch(27, classes)

    def __len__(self):
        return 27

    def __getitem__(self, i):
        return {k: v[i] for k, v in self.data.items()}


def fit(model, steps=4, data=None, **options):
    loaders = DataLoader(data or Pictures(), 8), DataLoader(data or Pictures(), 8)
    defaults = {"max_steps": steps, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(**{**defaults, **options})
    trainer.fit(model, *loaders)
    return trainer


# --- loss and metrics -------------------------------------------------------------------------------------------------


def test_loss_is_smoothed_cross_entropy_in_training_only():
    model, b = classifier(label_smoothing=0.2), batch()
    labels = b["class_label"]
    for training in (True, False):
        model.train(training)
        loss, logs = model.loss(b)
        logits = model(model.get_input(b, "image"))
        log_p = logits.log_softmax(1)
        expected = -log_p[range(6), labels].mean()
        if training:  # Szegedy et al. 2015, section 7
            expected = 0.8 * expected + 0.2 * -log_p.mean()
        torch.testing.assert_close(loss, expected)
        assert float(logs["acc"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_class_weights():
    weights = [1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0]
    model, b = classifier(class_weights=weights).eval(), batch()
    logits = model(model.get_input(b, "image"))
    w = torch.tensor(weights)[b["class_label"]]
    expected = (w * F.cross_entropy(logits, b["class_label"], reduction="none")).sum() / w.sum()
    torch.testing.assert_close(model.loss(b)[0], expected)
    with pytest.raises(ValueError, match="got 2 class_weights, expected 7"):
        classifier(class_weights=[1.0, 2.0])


@pytest.mark.parametrize("theirs", [False, True])
def test_auxiliary_heads_count_in_training(theirs):
    network = GOOGLENET
    if theirs:
        network = {"target": "torchvision.models.googlenet", "params": {"init_weights": False, "aux_logits": True}}
    model, b = classifier(network=network, aux_weight=0.3), batch(size=32)
    torch.manual_seed(1)
    loss, _ = model.loss(b)
    torch.manual_seed(1)
    out = model(model.get_input(b, "image"))
    logits, aux = (out[0], out[1:]) if theirs else out
    each = [float(F.cross_entropy(o, b["class_label"])) for o in (logits, *aux)]
    assert len(each) == 3
    assert float(loss) == pytest.approx(each[0] + 0.3 * (each[1] + each[2]), rel=1e-5)
    loss, _ = model.eval().loss(b)
    assert float(loss) == pytest.approx(float(F.cross_entropy(model(model.get_input(b, "image")), b["class_label"])))


@pytest.mark.parametrize("classes", [7, 3])
def test_validation_is_over_all_images_and_for_both_weights(classes):
    model = classifier(classes, use_ema=True, ema_decay=0.5, class_weights=None)
    model.learning_rate = 0.05
    trainer = fit(model, data=Pictures(classes))
    data = Pictures(classes).data
    model.eval()
    for suffix in ("", "_ema"):
        with torch.no_grad(), model.ema_scope() if suffix else torch.no_grad():
            logits = model(model.get_input(data, "image"))
        y, top = data["class_label"], logits.argsort(1, descending=True)
        expected = {"val/loss": F.cross_entropy(logits, y), "val/acc1": (top[:, 0] == y).float().mean()}
        if classes > 5:
            expected["val/acc5"] = (top[:, :5] == y[:, None]).any(1).float().mean()
        for name, value in expected.items():
            assert float(trainer.callback_metrics[name + suffix]) == pytest.approx(float(value), rel=1e-5), name
    assert ("val/acc5" in trainer.callback_metrics) == (classes > 5)
    assert {"train/loss", "train/acc"} <= set(trainer.callback_metrics)


def test_test_set_is_scored_by_itself():
    model = classifier()
    trainer = fit(model)
    before = float(trainer.callback_metrics["val/acc1"])
    logged = trainer.test(model, DataLoader(Pictures(), 8), verbose=False)[0]
    assert set(logged) == {"test/loss", "test/acc1", "test/acc5", "test/ece"}
    assert logged["test/acc1"] == pytest.approx(before)


def test_training_moves_weights_and_average():
    model = classifier(use_ema=True, scheduler_config=None)
    model.learning_rate = 0.01
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, steps=3)
    after = model.state_dict()
    assert int(after["model_ema.num_updates"]) == 3
    for key in ("model.fc.weight", "model.bn1.running_mean", "model_ema.fcweight", "model_ema.bn1running_mean"):
        assert not torch.equal(before[key], after[key]), key
    assert not any(k.startswith("scores") or "pixel" in k for k in after)


# --- optimiser --------------------------------------------------------------------------------------------------------


def test_no_decay_for_biases_norms_and_positions():
    network = {"target": "ldm.modules.classifiers.vit.vit_ti_16", "params": {"stem": "small", "depth": 1}}
    options = {"target": "torch.optim.SGD", "params": {"momentum": 0.9, "weight_decay": 0.3}}
    model = classifier(network=network, optimizer_config=options)
    optimizer = model.build_optimizer(model.trained_parameters())
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named)
    spared = {n for n, p in named.items() if decay[id(p)] == 0}
    assert {"model.class_token", "model.encoder.pos_embedding", "model.encoder.ln.weight"} <= spared
    assert {n for n, p in named.items() if p.ndim >= 2} - spared == {
        n for n in named if n.endswith("weight") and "ln" not in n
    }


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 0.1, "total_steps": "auto"}),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": "auto"}),
        ("ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "cosine"),
    ],
)
@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 2}])
def test_schedule_ends_with_the_run(target, params, length):
    if params == "cosine":
        params = {"warm_up_steps": 1, "max_decay_steps": "auto", "lr_start": 0.1, "lr_max": 1.0, "lr_min": 0.0}
    model = classifier(
        optimizer_config={"target": "torch.optim.SGD"}, scheduler_config={"target": target, "params": params}
    )
    model.learning_rate = 0.1
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(model, **length, callbacks=[Rates()])
    # one-cycle is at its end in the last step, the others after it
    assert min(rates[-2:]) < 1e-3 < max(rates[:-2])
    assert "auto" in model.scheduler_config["params"].values()


def test_schedule_without_an_end():
    entry = {"target": "torch.optim.lr_scheduler.CosineAnnealingLR", "params": {"T_max": "auto"}}
    with pytest.raises(UserError, match="set lightning.trainer.max_steps or max_epochs"):
        fit(classifier(scheduler_config=entry), max_steps=-1, max_epochs=-1)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [7, -1])
def test_label_out_of_range(label):
    data = Pictures()
    data.data["class_label"][10] = label
    with pytest.raises(UserError, match=rf"image 2 of the batch has class {label}, expected 0 to 6"):
        fit(classifier(), data=data)


def test_label_out_of_range_names_the_file():
    b = batch(n=2)
    b["class_label"][1] = 9
    with pytest.raises(UserError, match=r"image 1 of the batch \(cats/b.png\) has class 9"):
        classifier().check_batch({**b, "relpath": ["cats/a.png", "cats/b.png"]})


def test_batch_that_does_not_fit():
    with pytest.raises(UserError, match=r"no key 'label'; the data set gives \['image'\] \(model.params.label_key\)"):
        classifier(label_key="label").check_batch({"image": torch.zeros(1, 8, 8, 3)})
    with pytest.raises(UserError, match=r"got images \[6, 1, 16, 16\], expected \[B, 3, H, W\]"):
        classifier().check_batch(batch(channels=1))
    network = {"target": "ldm.modules.classifiers.alexnet.alexnet", "params": {"width": 0.1}}
    with pytest.raises(UserError, match=r"16x16, expected at least 63x63 \(stem: small .* data.params.size"):
        classifier(network=network).check_batch(batch())


def test_wrong_parameters():
    for wrong in ("zero", [0.5, 0.5], [[0.5, 0.5], [0.2]], [[0.5], [0.0]], [[], []], 3, [["a"], ["b"]]):
        with pytest.raises(
            UserError, match=rf"^model.params.normalize: got {re.escape(repr(wrong))}, expected imagenet"
        ):
            classifier(normalize=wrong)
    with pytest.raises(ValueError, match="got num_classes=1, expected 2 or more"):
        classifier(1)
    with pytest.raises(ConfigError, match="unknown key widht"):
        classifier(network={"target": NET["target"], "params": {"widht": 2}})


# --- pretrained weights -----------------------------------------------------------------------------------------------


def save(tmp_path, module, name="weights.pth"):
    torch.save(module.state_dict(), tmp_path / name)
    return str(tmp_path / name)


def test_weights_from_a_file(tmp_path):
    source = resnet.resnet20(num_classes=7, width=0.5)
    path = save(tmp_path, source)
    model = classifier(weights=path, use_ema=True)
    assert torch.equal(model.model.fc.weight, source.fc.weight)
    assert torch.equal(model.model_ema.fcweight, source.fc.weight)
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, path)
    assert torch.equal(classifier(weights=path).model.conv1.weight, source.conv1.weight)


def test_weights_of_another_class_count(tmp_path):
    source = resnet.resnet20(num_classes=100, width=0.5)
    path = save(tmp_path, source)
    message = r"is for 100 classes, the model has 7 \(fc.weight, fc.bias\): set model.params.allow_head=true"
    with pytest.raises(UserError, match=message):
        classifier(weights=path)
    model = classifier(weights=path, allow_head=True)
    assert torch.equal(model.model.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    assert model.model.fc.weight.shape == (7, 32)


def test_weights_of_another_network(tmp_path):
    path = save(tmp_path, resnet.resnet32(num_classes=7, width=0.5))
    with pytest.raises(UserError, match=r"unexpected .*layer1.3.* Is it the checkpoint of this config\?$"):
        classifier(weights=path)
    with pytest.raises(UserError, match="unexpected"):  # allow_head opens the door for the head only
        classifier(weights=save(tmp_path, resnet.resnet32(num_classes=9, width=0.5)), allow_head=True)
    with pytest.raises(UserError, match="does not exist"):
        classifier(weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="expected torchvision://NAME, timm://name, a file or a run directory"):
        classifier(weights="hub://x")


def test_torchvision_weights_are_found_and_normalised_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision.models.resnet18().eval()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    save(tmp_path / "hub/checkpoints", theirs, url.rpartition("/")[2])
    network = {"target": "ldm.modules.classifiers.resnet.resnet18", "params": {}}
    model = classifier(1000, network, weights="torchvision://IMAGENET1K_V1").eval()
    x = torch.rand(2, 3, 40, 40)
    mean, std = (torch.tensor(v)[:, None, None] for v in pretrained.IMAGENET)
    torch.testing.assert_close(model(x * 2 - 1), theirs((x - mean) / std), rtol=1e-5, atol=1e-5)
    # torchvision's own class by target is the same model
    network = {"target": "torchvision.models.resnet18", "params": {}}
    again = classifier(1000, network, weights="torchvision://IMAGENET1K_V1").eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_normalisation_by_hand():
    model, x = classifier(normalize="imagenet"), torch.rand(2, 3, 8, 8)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(x * 2 - 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in pretrained.IMAGENET)
    torch.testing.assert_close(seen[0], (x - mean) / std)
    with pytest.raises(
        UserError, match="^model.params.normalize: got means and deviations of 3 channels for images of 1"
    ):
        model(torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(classifier(normalize=[[0.5], [0.25]]).normalize(x * 2 - 1), (x - 0.5) / 0.25)
    assert pretrained.pixel_statistics("torchvision://IMAGENET1K_V1", "googlenet") == pretrained.HALF
    assert pretrained.pixel_statistics("timm://resnet18.a1_in1k", "resnet18") == pretrained.IMAGENET
    assert pretrained.pixel_statistics("timm://inception_v4.tf_in1k", "inception_v4")[0] == (0.5, 0.5, 0.5)
    assert pretrained.pixel_statistics("weights.pth", "resnet18") == pretrained.HALF


def test_names_and_net_of_torchvision_and_timm(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = {"target": "ldm.modules.classifiers.resnet.resnet18", "params": {}}
    with pytest.raises(UserError, match="resnet18 has IMAGENET1K_V1"):
        classifier(1000, network, weights="torchvision://IMAGENET1K_V2")
    with pytest.raises(UserError, match="torchvision has no seresnet18"):
        classifier(1000, {"target": "ldm.modules.classifiers.resnet.seresnet18"}, weights="torchvision://X")
    with pytest.raises(UserError, match="cannot be fetched .* give the file"):
        classifier(1000, network, weights="torchvision://IMAGENET1K_V1")
    with pytest.raises(UserError, match="timm://resnet18.a1_in1k cannot be fetched .* give the file"):
        classifier(1000, network, weights="timm://resnet18.a1_in1k")
    with pytest.raises(UserError, match="timm://resnet19 cannot be fetched"):
        classifier(1000, network, weights="timm://resnet19")


def test_auxiliary_heads_of_pretrained_weights_may_be_left_out(tmp_path):
    path = save(tmp_path, classifier(network=GOOGLENET).model)
    bare = {**GOOGLENET, "params": {**GOOGLENET["params"], "aux_logits": False}}
    assert isinstance(classifier(network=bare, weights=path).train()(torch.zeros(2, 3, 32, 32)), torch.Tensor)


def test_vit_weights_of_timm_and_another_size(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7).eval()
    path = save(tmp_path, theirs)
    params = {"image_size": 64, "depth": 2}
    network = {"target": "ldm.modules.classifiers.vit.vit_ti_16", "params": params}
    model = classifier(network=network, weights=path).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    network = {**network, "params": {**params, "image_size": 96}}
    assert classifier(network=network, weights=path).model.encoder.pos_embedding.shape == (1, 37, 192)


@pytest.mark.parametrize(
    ("target", "params"),
    [("torchvision.models.mobilenet_v2", {}), ("timm.create_model", {"model_name": "resnet10t"})],
)
def test_any_torchvision_or_timm_model_by_target(target, params):
    model = classifier(network={"target": target, "params": params})
    loss, _ = model.loss(batch(size=32))
    loss.backward()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_mistakes_first_and_filters():
    model, b = classifier().eval(), batch(n=12)
    model.class_names = [f"name {i}" for i in range(7)]
    logits = model(model.get_input(b, "image"))
    p, predicted = logits.softmax(1).max(1)
    wrong = predicted != b["class_label"]
    assert wrong.any() and not wrong.all()
    pictures = model.log_images(b, n=12)
    shown = pictures["inputs"]
    assert shown.shape == (12, 3, TILE + 6 + 30, TILE + 6)
    for x in pictures.values():
        assert x.min() >= -1 and x.max() <= 1 and x.isfinite().all()
    reds = shown[:, :, 0, 0] == torch.tensor([1.0, -1.0, -1.0])
    assert reds.all(1).tolist() == [True] * int(wrong.sum()) + [False] * int((~wrong).sum())
    surest = torch.where(wrong, p, -1).argmax()
    top_left = shown[0, :, 3 : 3 + 16 * 8 : 8, 3 : 3 + 16 * 8 : 8]
    torch.testing.assert_close(top_left, b["image"][surest].permute(2, 0, 1))
    assert pictures["filters"].shape[:2] == (1, 3)
    assert len(model.log_images(b, n=4)["inputs"]) == 4


def test_pictures_of_grey_images_and_wide_filters():
    assert labelled(torch.rand(2, 1, 200, 100), ["a", "b"], [True, False]).shape == (2, 3, 236, 106)
    assert filter_picture(torch.randn(4, 8, 3, 3)).shape[:2] == (1, 3)  # a mean over channels, drawn in grey
    linear = classifier()
    linear.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    assert set(linear.eval().log_images(batch())) == {"inputs"}  # neither filters nor maps


# --- devices ----------------------------------------------------------------------------------------------------------


def test_loss_runs_where_the_model_is():
    with FakeTensorMode(), torch.device("cuda"):
        model = classifier(normalize="imagenet", label_smoothing=0.1, class_weights=[1.0] * 7)
        b = {"image": torch.zeros(4, 32, 32, 3), "class_label": torch.zeros(4, dtype=torch.int64)}
        with torch.no_grad():
            for training in (True, False):
                loss, logs = model.train(training).loss(b)
                assert loss.device.type == logs["acc"].device.type == "cuda"


# --- main.py ----------------------------------------------------------------------------------------------------------


def picture_folder(root, classes=("bird", "cat", "dog"), each=14):
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        for split, count in (("train", each), ("val", 4), ("test", 4)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
                pixels[..., c % 3] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_own_folder_trains_tests_and_goes_on_from_weights(tmp_path, capfd):
    picture_folder(tmp_path / "mine")
    argv = ["-t", "-b", config("configs/classifier/folder.yaml"), f"data.params.root={tmp_path / 'mine'}", *QUICK]
    slim = ["model.params.network_config.params.width=0.125", "data.params.size=16"]
    slim += ["model.params.scheduler_config.params.warm_up_steps=2"]  # of eighteen steps
    assert run_main(*argv, *slim, "--max_epochs", 6, "-l", tmp_path / "a", "model.learning_rate=0.02") == 0
    run = only_run(tmp_path / "a")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    accuracy = [float(r["val/acc1"]) for r in rows if r.get("val/acc1")]
    assert len(accuracy) == 6 and accuracy[-1] > 0.9
    assert [float(r["test/acc1"]) for r in rows if r.get("test/acc1")][0] > 0.9
    assert not any(r.get("val/acc5") for r in rows)  # three classes
    best = [p.name for p in (run / "checkpoints").glob("epoch=*.ckpt")]
    assert len(best) == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["class_names"] == ["bird", "cat", "dog"]
    assert list((run / "images/val").glob("inputs_*.png")) and list((run / "images/train").glob("filters_*.png"))
    # five classes on top of these weights
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    torch.save(state, tmp_path / "start.pth")
    picture_folder(tmp_path / "five", ("a", "b", "c", "d", "e"), 3)
    argv[3] = f"data.params.root={tmp_path / 'five'}"
    start = [*argv, *slim, f"model.params.weights={tmp_path / 'start.pth'}", "--max_steps", 1, "-l", tmp_path / "b"]
    capfd.readouterr()
    assert run_main(*start) == 2
    assert "is for 3 classes, the model has 5" in capfd.readouterr().err
    assert run_main(*start, "model.params.allow_head=true", "-f", "_second") == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/classifier").glob("*_cifar10.yaml")), ids=lambda p: p.stem)
def test_every_network_s_config_builds_and_steps(path):
    merged = OmegaConf.load(path)
    merged.model.params.num_classes = 10
    model = instantiate_from_config(OmegaConf.to_container(merged, resolve=True)["model"])
    loss, _ = model.loss(batch(n=2, classes=10, size=32))
    loss.backward()
    optimizer = model.build_optimizer(model.trained_parameters())
    optimizer.step()
    assert loss.isfinite()


def test_the_last_epoch_is_validated(tmp_path):
    argv = ["-t", "-b", config("configs/classifier/resnet_digits.yaml"), "-l", tmp_path, *QUICK, "--max_epochs", 3]
    argv += ["--limit_train_batches", 1, "--limit_val_batches", 1, "--check_val_every_n_epoch", 2, "--no-test"]
    assert run_main(*argv) == 0
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    assert [int(r["epoch"]) for r in rows if r.get("val/acc1")] == [1, 2]


def test_digits_config_learns(tmp_path):
    argv = ["-t", "-b", config("configs/classifier/resnet_digits.yaml"), "-l", tmp_path, "--max_steps", 60]
    extra = ["model.params.scheduler_config.params.warm_up_steps=10", "data.params.num_workers=0"]
    assert run_main(*argv, *extra, "--check_val_every_n_epoch", 3) == 0
    rows = list(csv.DictReader((only_run(tmp_path) / "metrics.csv").open()))
    scores = {k: float(r[k]) for r in rows for k in ("test/acc1", "test/acc1_ema", "test/acc5") if r.get(k)}
    assert scores["test/acc1"] > 0.9 and scores["test/acc1_ema"] > 0.9
