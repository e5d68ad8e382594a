"""The Classifier's options: augmentation, distillation, freezing, views in testing, report, fast recipe."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ldm.config import load_yaml
from ldm.models import classifier_pictures as pictures
from ldm.models.classifier_report import by_class, shares
from ldm.modules.classifiers import augment, explain
from ldm.modules.classifiers.fastnet import Whitening, fastnet
from ldm.modules.classifiers.resnet import resnet20
from ldm.modules.classifiers.vit import vit_ti_16
from ldm.util import ConfigError, UserError
from tests.cli.tools import QUICK, ROOT, config, only_run, run_main
from tests.models.test_classifier import NET, Pictures, batch, classifier, fit

V2 = "torchvision.transforms.v2."


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_each_image_is_changed_by_itself_and_only_in_training():
    configs = [{"target": V2 + "RandomHorizontalFlip"}, {"target": V2 + "RandomErasing", "params": {"p": 1.0}}]
    model, b = classifier(augment_config=configs), batch(n=16)
    x = model.get_input(b, "image")
    seen = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(1)
    model.loss(b)
    model.eval().loss(b)
    changed, plain = seen
    assert torch.equal(plain, x)
    flipped = [(c - o.flip(2)).abs().mean() < (c - o).abs().mean() for c, o in zip(changed, x, strict=True)]
    assert 0 < sum(flipped) < 16
    erased = (changed == -1).all(1).flatten(1).sum(1)  # black
    assert (erased > 0).all() and len(erased.unique()) > 1


def test_shift_of_a_batch_moves_each_image_by_itself():
    x = torch.rand(64, 3, 6, 5) * 2 - 1
    moved = augment.RandomShift(1)(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    crops = torch.stack([padded[:, :, i : i + 6, j : j + 5] for i in range(3) for j in range(3)])
    same = (crops == moved).flatten(2).all(2)  # [9, 64]
    assert same.any(0).all() and same.any(1).all()
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_a_shift_beyond_the_image_is_one_message():
    with pytest.raises(UserError, match=r"pixels=6 for images of 8x6, expected at most 5"):
        augment.RandomShift(6)(torch.zeros(2, 3, 8, 6))


def test_cutout_is_a_square_that_the_border_cuts():
    x = torch.ones(400, 2, 9, 7)
    grey = augment.Cutout(4)(x) == 0
    assert torch.equal(grey[:, 0], grey[:, 1])
    rows, columns = grey[:, 0].any(2).sum(1), grey[:, 0].any(1).sum(1)
    assert torch.equal(grey[:, 0].sum((1, 2)), rows * columns)  # a rectangle
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4}
    assert grey[:, 0].any(0).all() and (x == 1).all()


def test_transforms_of_batches_come_after_those_of_images(monkeypatch):
    seen = []
    monkeypatch.setattr(augment.Cutout, "forward", lambda self, x: seen.append(x) or x)
    a = augment.Augment([augment.Cutout(2), v2.RandomErasing(p=1.0), v2.MixUp(num_classes=4)])
    x, labels = a(torch.zeros(4, 3, 16, 16), torch.arange(4))
    assert seen[0].shape == (4, 3, 16, 16) and set(seen[0].unique().tolist()) == {-1.0, 0.0}
    assert labels.shape == (4, 4)


@pytest.mark.parametrize(
    "wrong", [{"target": "RandomShift", "params": {"pixels": 0}}, {"target": "Cutout", "params": {"size": 0}}]
)
def test_sizes_of_the_transforms_of_batches(wrong):
    with pytest.raises(ConfigError, match="expected at least 1"):
        classifier(augment_config=[{**wrong, "target": "ldm.modules.classifiers.augment." + wrong["target"]}])


@pytest.mark.parametrize("target", ["RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"])
def test_policies_of_torchvision_keep_shape_and_range(target):
    a = augment.Augment([getattr(v2, target)()])
    x, labels = a(torch.rand(4, 3, 16, 16) * 2 - 1, torch.arange(4))
    assert x.shape == (4, 3, 16, 16) and x.min() >= -1 and x.max() <= 1 and torch.equal(labels, torch.arange(4))


def test_mixed_labels_follow_the_mixed_images():
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    for mixer in (v2.MixUp(num_classes=2, alpha=1.0), v2.CutMix(num_classes=2, alpha=1.0)):
        x, soft = augment.Augment([mixer])(images, torch.tensor([0, 1]))
        assert soft.shape == (2, 2)
        torch.testing.assert_close(soft[:, 1], (x.mean((1, 2, 3)) + 1) / 2)


def test_loss_of_a_mixed_batch_is_against_soft_labels():
    mixers = [{"target": V2 + "MixUp", "params": {"alpha": 1.0}}, {"target": V2 + "CutMix"}]
    model, b = classifier(augment_config=mixers, label_smoothing=0.1), batch(n=8)
    assert [m.num_classes for m in model.augment.mixers] == [7, 7]
    kinds = set()
    for seed in range(6):
        torch.manual_seed(seed)
        loss, logs = model.loss(b)
        torch.manual_seed(seed)
        x, soft = model.augment(model.get_input(b, "image"), b["class_label"])
        expected = F.cross_entropy(model(x), soft, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)
        unmixed = model.get_input(b, "image")
        kinds.add(bool((x == unmixed).any()))  # cutmix leaves pixels as they are
        assert 0 <= float(logs["acc"]) <= 1
    assert kinds == {True, False}


def test_something_else_than_a_transform():
    with pytest.raises(ValueError, match="got Linear, expected a transform"):
        classifier(augment_config=[{"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}])
    with pytest.raises(ConfigError, match="unknown key alhpa"):
        classifier(augment_config=[{"target": V2 + "MixUp", "params": {"alhpa": 1.0}}])


def test_noise_of_a_random_strength():
    noise = augment.RandomNoise(0.1)
    torch.manual_seed(0)
    deviations = torch.stack([(noise(torch.full((3, 32, 32), 0.5)) - 0.5).std() for _ in range(300)])
    assert 0 <= deviations.min() < 0.003 and 0.097 < deviations.max() < 0.105
    assert deviations.mean() == pytest.approx(0.05, abs=0.005)  # uniform between both
    x = noise(torch.ones(3, 32, 32))
    assert x.max() <= 1 and x.min() >= 0
    with pytest.raises(ValueError, match="got sigma=0, expected a number above 0"):
        augment.RandomNoise(0)


# --- views ------------------------------------------------------------------------------------------------------------


def test_views():
    x = torch.rand(2, 3, 6, 6)
    assert augment.views(x, "none")[0][0] is x
    assert torch.equal(augment.views(x, "flip")[1][0], x.flip(3))
    all_of_them = augment.views(x, "flip+shift")
    assert len(all_of_them) == 6 and sum(weight for _, weight in all_of_them) == 1
    down, up = all_of_them[2][0], all_of_them[4][0]
    assert torch.equal(down[..., 1:, 1:], x[..., :-1, :-1]) and torch.equal(up[..., :-1, :-1], x[..., 1:, 1:])
    with pytest.raises(ValueError, match="got test_views='mirror'"):
        classifier(test_views="mirror")


def test_logits_are_averaged_over_the_views_in_testing_only():
    model, b = classifier(test_views="flip"), batch()
    x = model.get_input(b, "image")
    model.eval()
    expected = (model(x) + model(x.flip(3))) / 2
    torch.testing.assert_close(model.predict(x), expected)
    torch.testing.assert_close(model.loss(b)[0], F.cross_entropy(expected, b["class_label"]))


# --- freezing, distillation -------------------------------------------------------------------------------------------


def test_head_only_training_leaves_the_rest_untouched():
    model = classifier(train_only="head", use_ema=True)
    model.learning_rate = 0.1
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    fit(model, steps=3)
    moved = {k for k, v in model.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"fc.weight", "fc.bias"}


def test_learning_from_another_run(tmp_path, monkeypatch):
    from ldm import generate

    teacher = classifier(use_ema=True).eval()
    monkeypatch.setattr(generate, "load_run", lambda path: (teacher, {}))
    params = {"run": "logs/x", "weight": 0.25, "temperature": 3.0}
    teaching = {"target": "ldm.models.distillation.Teacher", "params": params}
    model, b = classifier(distill_config=teaching), batch()
    loss, _ = model.loss(b)
    x = model.get_input(b, "image")
    logits, target = model(x), teacher(x)
    p, q = (target / 3).softmax(1), (logits / 3).softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.75 * F.cross_entropy(logits, b["class_label"]) + 0.25 * 9 * kl
    torch.testing.assert_close(loss, expected)
    assert not any("teacher" in k for k in model.state_dict())
    torch.testing.assert_close(model.eval().loss(b)[0], F.cross_entropy(model(x), b["class_label"]))
    with pytest.raises(UserError, match="logs/x has 7 classes, the model 3"):
        classifier(3, distill_config=teaching).loss(batch(classes=3))
    with pytest.raises(ConfigError, match="got weight=2"):
        classifier(distill_config={**teaching, "params": {"run": "x", "weight": 2.0}})


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_states_last_and_best_and_every_class(tmp_path):
    model = classifier(use_ema=True, ema_decay=0.5)
    model.class_names = [f"c{i}" for i in range(7)]
    model.learning_rate = 0.05
    logger = CSVLogger(tmp_path)
    trainer = fit(model, steps=12, logger=logger, default_root_dir=str(tmp_path), log_every_n_steps=1)
    report = json.loads((tmp_path / "report_val.json").read_text())
    assert report["step"] == 12 and set(report) == {"step", "epoch", "minutes", "raw", "ema"}
    data = Pictures().data
    model.eval()
    with torch.no_grad():
        right = model(model.get_input(data, "image")).argmax(1) == data["class_label"]
    for c in range(7):
        of_class = data["class_label"] == c
        value = report["raw"]["per_class"][f"c{c}"]
        assert value == (pytest.approx(float(right[of_class].float().mean()), abs=1e-5) if of_class.any() else None)
    assert report["raw"]["acc1"] == pytest.approx(float(trainer.callback_metrics["val/acc1"]))
    best = float(trainer.callback_metrics["val/acc1_best"])
    assert report["raw"]["best"]["acc1"] == pytest.approx(best) and best >= report["raw"]["acc1"]
    assert {"val/ece", "val/ece_ema", "val/acc1_ema_best"} <= set(trainer.callback_metrics)
    assert len(list((tmp_path / "images/val").glob("confusion_gs-*.png"))) == 3
    assert len(list((tmp_path / "images/val").glob("confusion_ema_gs-*.png"))) == 3
    state: dict = {}
    model.on_save_checkpoint(state)
    other = classifier()
    other.on_load_checkpoint(state)
    assert other.report.best == model.report.best and other.report.minutes >= state["report"]["minutes"] > 0


def test_the_classes_are_named_at_the_end_of_training_and_testing(caplog, tmp_path):
    model = classifier(use_ema=True, ema_decay=0.5)
    model.class_names = [f"c{i}" for i in range(7)]
    with caplog.at_level("INFO"):
        trainer = fit(model, steps=4, logger=CSVLogger(tmp_path), default_root_dir=str(tmp_path))
        trainer.test(model, DataLoader(Pictures(), 8), verbose=False)
    for split in ("val", "test"):
        (line,) = [m for m in caplog.messages if m.startswith(f"{split}/acc1_ema by class, the lowest first: c")]
        report = json.loads((tmp_path / f"report_{split}.json").read_text())["ema"]["per_class"]
        known = {name: v for name, v in report.items() if v is not None}
        said = [part.rsplit(" ", 2) for part in line.partition(": ")[2].split(", ")]
        assert {name: float(v) for name, v, _ in said} == {
            k: pytest.approx(100 * v, abs=0.06) for k, v in known.items()
        }
        assert [float(v) for _, v, _ in said] == sorted(float(v) for _, v, _ in said)
    many = by_class({str(i): i / 100 for i in range(100)} | {"none": None})
    assert many.startswith("by class, the lowest 20 of 100: 0 0.0 %, 1 1.0 %") and many.endswith(", 19 19.0 %")


def test_shares_and_confusion_picture():
    assert shares(torch.tensor([1, 0]), torch.tensor([4, 0]), ["a", "b"]) == {"a": 0.25, "b": None}
    few = pictures.confusion_picture(torch.tensor([[9, 1], [0, 10]]), ["cat", "dog"])
    many = pictures.confusion_picture(torch.eye(40, dtype=torch.int64))
    for p in (few, many):
        assert p.shape[:2] == (1, 3) and p.min() >= -1 and p.max() <= 1
    assert many[0, 2, 3, 3] > many[0, 0, 3, 3] + 1  # right: blue
    assert torch.equal(many[0, :, 3, -3], torch.ones(3))  # nothing there: white


# --- where the network looks ------------------------------------------------------------------------------------------


def test_grad_cam_finds_what_the_class_hangs_on():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 1, 1)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    pool, head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(1, 2, bias=False)
    net = torch.nn.Sequential(conv, pool, torch.nn.Flatten(), head)
    head.weight.data = torch.tensor([[1.0], [-1.0]])
    x = torch.zeros(1, 3, 8, 8)
    x[:, :, 2, 5] = 1
    with torch.inference_mode():
        cam = explain.grad_cam(net, x, [0])
        against = explain.grad_cam(net, x, [1])
    assert cam.shape == (1, 8, 8) and cam[0, 2, 5] == 1 and cam.sum() == 1
    assert not against.any()
    with pytest.raises(ValueError, match="nothing for Grad-CAM"):
        explain.grad_cam(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), x)


def test_grad_cam_is_the_paper_s_formula_in_a_resnet():
    net = resnet20(num_classes=7, width=0.5).eval().requires_grad_(False)
    x = torch.randn(3, 3, 32, 32)
    cam = explain.grad_cam(net, x)
    features = net.features(x)
    logits = net(x)
    # after global average pooling the gradient of a logit is its weight over the number of positions
    expected = torch.einsum("bc,bchw->bhw", net.fc.weight[logits.argmax(1)], features).relu()
    torch.testing.assert_close(cam, expected / expected.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-5)


def test_attention_rollout():
    net = vit_ti_16(num_classes=5, stem="small", image_size=16, width=0.34, depth=2).eval()
    maps = explain.attention_rollout(net, torch.randn(2, 3, 16, 16))
    assert maps.shape == (2, 4, 4) and maps.amax((1, 2)).allclose(torch.ones(2)) and maps.min() >= 0
    assert explain.attends(net) and not explain.attends(resnet20())
    # a class token that sees one patch only
    layer = net.encoder.layers[1].self_attention
    picked = torch.zeros(2, 1, 17, 17)
    picked[..., 7] = 1
    layer.weights = lambda x: picked
    net.encoder.layers[0].self_attention.weights = lambda x: torch.eye(17).expand(2, 1, 17, 17)
    assert explain.attention_rollout(net, torch.randn(2, 3, 16, 16))[0].argmax() == 6


def test_pictures_show_where_it_looks():
    model = classifier().eval()
    shown = model.log_images(batch(size=32), n=4)
    assert shown["looks_at"].shape == (4, 3, 128, 128)
    assert shown["looks_at"].min() >= -1 and shown["looks_at"].max() <= 1


# --- the fast recipe --------------------------------------------------------------------------------------------------


def test_whitening_makes_patches_white():
    layer = Whitening(3)
    smooth = F.interpolate(torch.rand(40, 3, 8, 8), scale_factor=4, mode="bilinear") * 2 - 1
    before = layer.weight.clone()
    layer.fit(smooth)
    assert not torch.equal(before, layer.weight) and bool(layer.done)
    out = layer(smooth).detach().transpose(0, 1).flatten(1)
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    covariance = torch.cov(out[:12])
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02
    # directions well above the regularisation have unit variance, none has more
    variances = covariance.diagonal().tolist()
    assert max(variances) == pytest.approx(1, abs=0.02) and min(variances[:3]) > 0.9 and min(variances) < 0.7
    kept = layer.weight.clone()
    layer.fit(torch.rand(4, 3, 32, 32))
    assert torch.equal(kept, layer.weight)


def test_first_batch_fits_the_whitening_and_a_restart_keeps_it():
    network = {"target": "ldm.modules.classifiers.fastnet.fastnet", "params": {"width": 0.125}}
    model = classifier(network=network, use_ema=True)
    fit(model, steps=2, data=Pictures32())
    assert bool(model.model.whiten.done)
    again = classifier(network=network, use_ema=True)
    again.load_state_dict(model.state_dict())
    kept = again.model.whiten.weight.clone()
    fit(again, steps=1, data=Pictures32(1))
    assert torch.equal(kept, again.model.whiten.weight)


class Pictures32(Pictures):
    def __init__(self, seed=0):
        self.data = batch(27, 7, size=32, seed=seed)


def test_fastnet_takes_small_images_only():
    assert fastnet(width=0.125, depth=3)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="at least 24x24"):
        fastnet(width=0.125)(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="expected small"):
        fastnet(stem="imagenet")


def test_the_fast_config_s_header_says_what_it_does_and_what_was_measured():
    path = ROOT / "configs/classifier/fast_cifar10.yaml"
    text = " ".join(line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    yaml, row = load_yaml(path), json.loads((ROOT / "results/cifar10/fastnet.json").read_text())
    assert f"in {yaml.lightning.trainer.max_epochs} epochs" in text
    assert yaml.model.params.use_ema and yaml.model.params.test_views == "flip+shift" and "averaged weights" in text
    assert yaml.data.params.train.params.flip_p == "alternate" and "flips in turn" in text
    assert "Muon" in text and yaml.model.params.optimizer_config.params.hidden.target.endswith("Muon")
    assert f"{row['top1']:.1f} % after {row['minutes']:.0f}" in text and "ema weights" in row["source"]
    short = json.loads((ROOT / "results/cifar10/fastnet_10_epochs.json").read_text())
    assert "with 10:" in text and f"{short['top1']:.1f} % after {short['minutes']:.0f}" in text
    assert short["source"] == "validation, epoch 9, ema weights" and short["minutes"] <= 25 and short["top1"] >= 90
    curve = row["curves"]["val/acc1_ema"]
    share, minutes = re.search(r"(\d+) % within (\d+) minutes", text).groups()
    reached = next(step for step, value in curve if 100 * value >= int(share))
    assert reached / curve[-1][0] * row["minutes"] <= int(minutes)


def test_fast_config_learns(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "data" / ("red", "green", "blue")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += 60
        Image.fromarray(pixels).save(path)
    argv = ["-t", "-b", config("configs/classifier/fast_cifar10.yaml"), f"data.params.root={tmp_path / 'data'}"]
    argv += [*QUICK, "model.params.network_config.params.width=0.125", "--max_epochs", 8, "-l", tmp_path / "logs"]
    argv += ["model.params.scheduler_config.params.warm_up_steps=[2]", "model.params.ema_decay=0.5"]
    argv += ["--check_val_every_n_epoch", 8]
    assert run_main(*argv) == 0
    report = json.loads((only_run(tmp_path / "logs") / "report_val.json").read_text())
    assert report["raw"]["acc1"] > 0.8 and set(report["raw"]["per_class"]) == {"red", "green", "blue"}


def test_step_schedule():
    from ldm.lr_scheduler import LambdaWarmUpStepScheduler

    s = LambdaWarmUpStepScheduler(10, [0.5, 0.75], 100)
    assert s(0) == pytest.approx(0.01) and s(10) == 1 and s(49) == 1
    assert s(50) == pytest.approx(0.1) and s(75) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="ascending shares"):
        LambdaWarmUpStepScheduler(10, [0.75, 0.5], 100)


def test_one_cycle_keeps_the_rates_of_the_layers():
    entry = {"target": "torch.optim.lr_scheduler.OneCycleLR", "params": {"max_lr": "auto", "total_steps": "auto"}}
    model = classifier(network=NET, layer_decay=0.5, scheduler_config=entry)
    model.learning_rate = 0.1
    trainer = fit(model, steps=3)
    peaks = {g["max_lr"] for g in trainer.optimizers[0].param_groups}
    assert max(peaks) == 0.1 and min(peaks) == pytest.approx(0.1 * 0.5**10)
