"""Feature networks: in evaluation mode whatever was done to them, equal to torch-fidelity's way, named when missing."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ldm.data.builtin import Digits, OpenMoji
from ldm.evaluation import distances, features, metrics
from ldm.evaluation.pictures import of_folder
from ldm.evaluation.store import features_of
from ldm.util import UserError


@pytest.fixture(scope="module")
def network():
    return features.find_features("digits")


def digits(n, seed=0, split="all"):
    """uint8 [n, 1, 16, 16]."""
    x = Digits(split).images
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]].permute(0, 3, 1, 2)


def fid(a, b):
    return distances.frechet_distance(distances.moments(a), distances.moments(b))


def write(folder, pictures, **options):
    folder.mkdir(parents=True)
    suffix = ".jpg" if options else ".png"
    for i, p in enumerate(pictures):
        Image.fromarray(p[0].numpy()).save(folder / f"{i:04}{suffix}", **options)
    return folder


class DigitFeatures(FeatureExtractorBase):
    """The project's classifier for torch-fidelity."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = features.find_features("digits")

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        return tuple(dict(zip(("features", "logits"), self.network(x), strict=True))[n] for n in self.features_list)


@pytest.mark.smoke
def test_the_shipped_classifier_reads_digits(network):
    x, test = Digits("test"), Digits("test").labels
    f, logits = network(x.images.permute(0, 3, 1, 2))
    assert f.shape == (360, 64) and logits.shape == (360, 10)
    assert (logits.argmax(1) == test).float().mean() > 0.99
    files = [p for p in (features.MODELS / "classifier/digits").iterdir()]
    assert {p.name for p in files} >= {"model.safetensors", "config.yaml", "README.md"}
    assert sum(p.stat().st_size for p in files) < 2e6


@pytest.mark.smoke
def test_the_shipped_classifier_tells_drawings_apart():
    data = OpenMoji(colors=True, classes="drawing")
    network = features.find_features(None, "ldm.data.openmoji.OpenMoji")
    assert network.name == "openmoji" and network.class_names == data.class_names
    at = torch.arange(0, len(data), 5)
    x = data.images[at].permute(0, 3, 1, 2)
    f, logits = network(x)
    assert f.shape == (len(at), 96) and (logits.argmax(1) == data.labels[at]).float().mean() > 0.85
    held_out = OpenMoji("validation", colors=True, classes="drawing")
    _, logits = network(held_out.images.permute(0, 3, 1, 2))
    assert (logits.argmax(1) == held_out.labels).float().mean() > 0.9
    distances_of_blur = []
    for side in (32, 24, 16):
        blurred = torch.nn.functional.interpolate(x.float(), side, mode="bicubic", antialias=True)
        blurred = torch.nn.functional.interpolate(blurred, 64, mode="bicubic").clamp(0, 255).byte()
        distances_of_blur.append(fid(network(blurred)[0].numpy(), f.numpy()))
    assert distances_of_blur[0] > 5 and distances_of_blur == sorted(distances_of_blur)


def test_the_shipped_classifier_of_cifar10_sees_what_photographs_lose():
    """The more blur, the further away; and two photographs are further apart than halves of one."""
    network = features.find_features(None, "ldm.data.vision.CIFAR10")
    assert network.name == "cifar10" and network.class_names[:3] == ["airplane", "automobile", "bird"]
    assert (network.size, network.channels, network.num_classes) == (32, 3, 10)
    photographs = [torch.from_numpy(x.copy()).permute(2, 0, 1)[None] for x in load_sample_images().images]
    squares = [F.unfold(x.float(), 32, stride=16).mT.reshape(-1, 3, 32, 32).byte() for x in photographs]
    first, second = (network(x)[0] for x in squares)
    assert first.shape[1] == 64 and network(squares[0][:2])[1].shape == (2, 10)
    assert fid(first.numpy(), second.numpy()) > 5 * fid(first[::2].numpy(), first[1::2].numpy())
    found = []
    for side in (24, 16, 8):
        small = F.interpolate(squares[0].float(), side, mode="bicubic", antialias=True)
        blurred = F.interpolate(small, 32, mode="bicubic").clamp(0, 255).byte()
        found.append(fid(network(blurred)[0].numpy(), first.numpy()))
    assert found[0] > 0 and found == sorted(found)


def test_features_do_not_depend_on_the_batch_nor_on_training_mode(network):
    """Inception left in training mode is a known way to wrong figures: batch statistics."""
    x = digits(64)
    f, _ = network(x)
    network.model.train()
    network._network.train()
    again, _ = network(x)
    parts = torch.cat([network(p)[0] for p in x.split(5)])
    assert torch.equal(f, again) and torch.allclose(f, parts, atol=1e-4)
    wrong = []
    last = network.model.model.get_submodule(network.last)
    hook = last.register_forward_pre_hook(lambda _, inputs: wrong.append(inputs[0].flatten(1)))
    with torch.no_grad():
        network.model.train()
        network.model.model(x.float() / 127.5 - 1)
        network.model.eval()
    hook.remove()
    assert fid(wrong[0].numpy(), f.numpy()) > 0.5  # so the mistake would be seen
    restored = features.find_features("digits")  # the running statistics were moved
    network.model.load_state_dict(restored.model.state_dict())


def test_parts_of_a_batch_give_what_the_batch_gives(network, monkeypatch):
    x = digits(50)
    whole, logits = network(x)
    monkeypatch.setattr(features, "CPU_PIXELS", 16 * 16 * 12)
    calls, forward = [], network._network.forward
    monkeypatch.setattr(network._network, "forward", lambda part: calls.append(len(part)) or forward(part))
    parts, part_logits = network(x)
    assert calls == [12, 12, 12, 12, 2]
    assert torch.allclose(parts, whole, atol=1e-5) and torch.allclose(part_logits, logits, atol=1e-5)
    assert not network._seen  # nothing of a batch is kept


def test_balance_needs_a_reader_of_the_data_s_classes(network):
    e = SimpleNamespace(network=network, shares=np.full(3, 1 / 3), logits=np.zeros((5, 10)))
    assert not metrics._knows_classes(e)
    with pytest.raises(UserError, match="the classifier has 10 classes, the data 3: give --classifier RUN"):
        metrics._balance(e)
    e.shares = np.full(10, 0.1)
    assert metrics._knows_classes(e) and metrics._balance(e)


def test_colour_and_size_are_the_loader_s(network):
    x = digits(32)
    assert torch.allclose(network(x)[0], network(x.expand(-1, 3, -1, -1))[0], atol=1e-4)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert network(large)[0].shape == (32, 64)
    assert "bicubic" in network.about()["resize"]


def test_the_resize_filter_moves_the_distance(network):
    """The same pictures, made smaller by two filters, are measurably different sets."""
    large = torch.nn.functional.interpolate(digits(400).float(), 32, mode="nearest")
    good = torch.nn.functional.interpolate(large, 12, mode="bicubic", antialias=True)
    poor = torch.nn.functional.interpolate(large, 12, mode="nearest")
    a, b = (network(x.round().clamp(0, 255).byte())[0].numpy() for x in (good, poor))
    assert fid(a, b) > 100 * abs(fid(a, a)) and fid(a, b) > 0.1


def test_jpeg_files_move_the_distance_and_are_named(network, tmp_path):
    x = digits(200)
    png, jpg = write(tmp_path / "png", x), write(tmp_path / "jpg", x, quality=5)
    a, b = (of_folder(p, (16, 16), 1) for p in (png, jpg))
    assert not a.notes and "200 of 200 files" in b.notes[0] and "PNG" in b.notes[0]
    fa, fb = (features_of(p, network, tmp_path / "store").features for p in (a, b))
    assert abs(fid(fa, fa)) < 1e-3 < 0.1 < fid(fa, fb)


def test_every_metric_is_torch_fidelity_s_on_two_folders(network, tmp_path):
    real, other = digits(300, seed=1), digits(300, seed=2)
    other = (other.float() + 40 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    places = [write(tmp_path / n, x.byte()) for n, x in (("drawn", other), ("real", real))]
    register_feature_extractor("test-digits", DigitFeatures)
    theirs = calculate_metrics(
        input1=str(places[0]),
        input2=str(places[1]),
        feature_extractor="test-digits",
        cuda=False,
        verbose=False,
        cache=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=300,
        kid_subsets=100,
    )
    drawn, true = (features_of(of_folder(p, (16, 16), 1), network, tmp_path / "store") for p in places)
    ours = {
        "frechet_inception_distance": fid(drawn.features, true.features),
        "inception_score_mean": distances.inception_score(drawn.logits)["is"],
        "kernel_inception_distance_mean": distances.kernel_distance(drawn.features, true.features)["kid"],
        **distances.precision_recall(drawn.features, true.features),
    }
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-3), name
    assert ours["frechet_inception_distance"] > 1


def test_an_extractor_of_torch_fidelity_can_be_used(network):
    wrapped = features.FidelityFeatures(DigitFeatures("any", ["features", "logits"]), "none")
    x = digits(20)
    ours, theirs = network(x), wrapped(x)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4) and torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert "TensorFlow" in wrapped.about()["resize"]


# --- which network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inception-v3-compat", "clip-vit-b-32", "dinov2-vit-s-14", None])
def test_missing_weights_are_named_with_their_place(name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="https://") as e:
        features.find_features(name, "ldm.data.image.ImageFolder")
    assert str(tmp_path) in str(e.value) and (name or "inception-v3-compat") in str(e.value)


def test_a_file_that_is_not_the_published_one_is_not_unpickled(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / features.INCEPTION_FILE
    file.parent.mkdir()
    file.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()[:16]
    with pytest.raises(UserError, match=f"is not the published file: its SHA-256 is {digest}"):
        features.find_features("inception-v3-compat")


def test_names(network):
    assert features.find_features(None, "ldm.data.builtin.Digits").name == "digits"
    with pytest.raises(UserError, match=r"--features digit: neither a run nor one of .*did you mean digits"):
        features.find_features("digit")
    assert features.find_features(str(features.MODELS / "classifier/digits")).sha256 == network.sha256


# --- kept on disk -----------------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_go_on_after_a_kill(network, tmp_path, monkeypatch):
    pictures = of_folder(write(tmp_path / "p", digits(60)), (16, 16), 1)
    monkeypatch.setattr("ldm.evaluation.store.BATCH", 20)
    seen = []

    class Counting(features.FeatureNetwork):
        name, sha256, layer, resize = "counting", network.sha256, network.layer, network.resize
        broken = 40

        def __call__(self, x):
            if sum(seen) >= self.broken:
                raise KeyboardInterrupt
            seen.append(len(x))
            return network(x)

    counting = Counting()
    with pytest.raises(KeyboardInterrupt):
        features_of(pictures, counting, tmp_path / "store")
    counting.broken = 1000
    found = features_of(pictures, counting, tmp_path / "store")
    assert seen == [20, 20, 20]  # the last third only was computed after the kill
    assert np.allclose(found.features, network(pictures.get(range(60)))[0].numpy(), atol=1e-4)
    features_of(pictures, counting, tmp_path / "store")
    assert seen == [20, 20, 20]
    other = of_folder(write(tmp_path / "q", digits(60, seed=9)), (16, 16), 1)
    features_of(other, counting, tmp_path / "store")
    assert sum(seen) == 120  # other pixels, other features
