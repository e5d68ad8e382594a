"""Pictures of a classifier that look over more than one batch or into foreign networks, and faults inside those."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from ldm.models import classifier as recipes
from ldm.models.classifier_pictures import Mistakes, filter_picture
from ldm.modules.classifiers import explain
from ldm.util import UserError
from tests.models.test_classifier import Pictures, batch, classifier, fit

FASTNET = {"target": "ldm.modules.classifiers.fastnet.fastnet", "params": {"width": 0.125}}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_the_most_confident_mistakes_of_all_batches():
    x, labels = torch.rand(40, 3, 4, 4), torch.randint(5, (40,))
    logits = torch.randn(40, 5) * 3
    mistakes = Mistakes(6)
    assert mistakes.picture(str) is None
    for start in range(0, 40, 7):  # the last batch has five
        part = slice(start, start + 7)
        mistakes.update(x[part], logits[part], labels[part])
        assert all(len(v) <= 6 for v in mistakes.kept.values())
    sure, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    first = wrong[sure[wrong].argsort(descending=True)][:6]
    assert torch.equal(mistakes.kept["x"], x[first]) and torch.equal(mistakes.kept["labels"], labels[first])
    captions = []
    picture = mistakes.picture(lambda c: captions.append(int(c)) or f"class {c}")
    assert captions[:2] == [int(predicted[first[0]]), int(labels[first[0]])]
    assert picture.shape[:2] == (1, 3) and picture.min() >= -1 and picture.max() <= 1
    mistakes.reset()
    mistakes.update(x, 20 * torch.eye(5)[labels], labels)  # all are right
    assert mistakes.picture(str) is None


class Late(Pictures):
    """The network finds class 0 in all pictures: only those of the last batch are of another class."""

    def __init__(self):
        super().__init__()
        self.data["class_label"] = torch.tensor([0] * 24 + [3] * 3)


def test_mistakes_of_late_batches_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(recipes, "write_picture", lambda trainer, split, name, picture: drawn.append((split, name)))
    model = classifier(use_ema=True, ema_decay=0.0)
    torch.nn.init.zeros_(model.model.fc.weight)
    model.model.fc.bias.data = torch.tensor([5.0, 0, 0, 0, 0, 0, 0])
    model.model_ema = recipes.BufferEma(model.model, decay=0.0)
    model.learning_rate = 0.0
    kept = []
    picture = model.mistakes.picture
    monkeypatch.setattr(model.mistakes, "picture", lambda name: kept.append(dict(model.mistakes.kept)) or picture(name))
    fit(model, steps=1, data=Late(), logger=CSVLogger(tmp_path), default_root_dir=str(tmp_path), val_check_interval=1)
    assert drawn == [("val", "mistakes")]
    found = kept[0]["labels"][kept[0]["sure"] >= 0]
    assert found.tolist() == [3, 3, 3]
    expected = Late().data["image"][24:].permute(0, 3, 1, 2)
    assert all((x == expected).flatten(1).all(1).any() for x in kept[0]["x"][:3])
    assert not model.mistakes.kept  # nothing is held between two epochs


def test_mistakes_are_in_the_run_directory(tmp_path):
    fit(classifier(), steps=1, logger=CSVLogger(tmp_path), default_root_dir=str(tmp_path), val_check_interval=1)
    (file,) = (tmp_path / "images/val").glob("mistakes_gs-000001_e-*.png")
    assert np.asarray(Image.open(file)).shape[2] == 3


# --- filters, maps ----------------------------------------------------------------------------------------------------


def test_filters_of_a_network_that_begins_with_a_whitening():
    model = classifier(network=FASTNET).eval()
    shown = model.log_images(batch(size=32), n=2)["filters"]
    torch.testing.assert_close(shown, filter_picture(model.model.whiten.weight))


def vit_of(kind):
    if kind == "torchvision":
        net = torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=7)
        torch.nn.init.normal_(net.heads.head.weight)
        return net.eval()
    return timm.models.VisionTransformer(**TINY_VIT, qk_norm=kind == "normed").eval()


@pytest.mark.parametrize("kind", ["torchvision", "timm", "normed"])
def test_rollout_of_other_projects_transformers(kind):
    net, x = vit_of(kind), torch.randn(2, 3, 32, 32)
    seen = []
    layers = [m for m in net.modules() if explain._is_attention(m)]
    assert len(layers) == 2 and explain.attends(net)
    for m in layers:
        m.register_forward_pre_hook(lambda m, args, kwargs: seen.append(attention_of(m, args[0])), with_kwargs=True)
    maps = explain.attention_rollout(net, x)
    eye = torch.eye(17)
    flow = ((seen[1] + eye) / 2) @ ((seen[0] + eye) / 2)
    expected = flow[:, 0, 1:].reshape(2, 4, 4)
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-5)


def attention_of(layer, x):
    """By the layers' own code."""
    if isinstance(layer, torch.nn.MultiheadAttention):
        hooks, layer._forward_pre_hooks = layer._forward_pre_hooks, type(layer._forward_pre_hooks)()
        weights = layer(x, x, x, need_weights=True)[1]
        layer._forward_pre_hooks = hooks
        return weights
    # values that are unit vectors make the output the attention; heads one by one, since there are fewer channels
    n, length, dim = x.shape
    q, k = layer.qkv(x).reshape(n, length, 3, layer.num_heads, dim // layer.num_heads).permute(2, 0, 3, 1, 4)[:2]
    one = torch.eye(length).expand(n, layer.num_heads, -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(layer.q_norm(q), layer.k_norm(k), one)
    return out.mean(1)


@pytest.mark.parametrize("kind", ["swin", "mean", "registers"])
def test_no_map_is_better_than_a_wrong_one(kind):
    if kind == "swin":
        net = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=7)
    else:
        other = {"mean": {"class_token": False, "global_pool": "avg"}, "registers": {"reg_tokens": 2}}[kind]
        net = timm.models.VisionTransformer(**TINY_VIT, **other)
    model = classifier()
    model.model = net.eval()
    assert explain.attends(net)
    with pytest.raises(ValueError, match="attend"):
        explain.attention_rollout(net, torch.randn(2, 3, 32, 32))
    assert "looks_at" not in model.eval().log_images(batch(size=32), n=2)


def test_grad_cam_without_a_map_is_a_fault(tmp_path):
    from ldm.data.pixels import Fit
    from ldm.recognition import Reader, looks_at_picture

    model = classifier()
    model.model = timm.models.VisionTransformer(**TINY_VIT, class_token=False, global_pool="avg")
    reader = Reader(model.eval(), Fit((32, 32), 3), list("abcdefg"), "a run")
    rows = [{"file": "x.png", "top": [{"class": "a", "index": 0, "probability": 1.0}]}]
    with pytest.raises(UserError, match="--grad-cam: a run: no layer of the VisionTransformer gives a map"):
        looks_at_picture(reader, torch.zeros(1, 3, 32, 32), rows)


# --- faults inside networks of torchvision and timm -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("torchvision.models.alexnet", {}),
        ("torchvision.models.vgg11", {}),
        ("torchvision.models.inception_v3", {"init_weights": False}),
        ("torchvision.models.vit_b_32", {}),
        ("timm.create_model", {"model_name": "vit_tiny_patch16_224"}),
    ],
)
def test_images_too_small_for_a_network_by_target(target, params):
    model = classifier(network={"target": target, "params": params})
    with pytest.raises(UserError, match="got images of 16x16, expected a size that the network takes .*data.params.s"):
        fit(model, steps=1)


def test_a_last_batch_of_one_image():
    class One(Pictures):
        def __len__(self):
            return 9  # 8 and 1

    model = classifier(network={"target": "torchvision.models.resnet18", "params": {}})
    with pytest.raises(UserError, match=r"got a batch of 1 image of 16x16.*data.params.drop_last=true, or a data.par"):
        fit(model, steps=3, data=One())


def test_other_errors_stay_as_they_are():
    model = classifier()
    model.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 7))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.loss(batch())
