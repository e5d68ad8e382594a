"""Inception, CLIP and DINOv2 by torch-fidelity: read from their files, strictly, and nothing is downloaded."""

import socket
import urllib.request

import numpy as np
import pytest
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from ldm.evaluation import features
from ldm.evaluation.path_length import EPSILON, path_length
from ldm.evaluation.text import load_clip
from ldm.models.vae import VAE
from ldm.modules.open_clip_text import CLIP
from ldm.util import UserError
from tests.evaluation import weights

INCEPTION, CLIP_B, DINO = NAMES = ("inception-v3-compat", "clip-vit-b-32", "dinov2-vit-s-14")
URLS = {INCEPTION: features.INCEPTION_URL, CLIP_B: "https://openaipublic.azureedge.net/clip/models/"}
URLS |= {DINO: "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"}
FILES = {INCEPTION: features.INCEPTION_FILE, CLIP_B: "clip-vit-b-32-", DINO: "dinov2_vits14_pretrain.pth"}


@pytest.fixture(scope="module")
def inception_state(tmp_path_factory):
    return weights.inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty place for weights; whoever asks the network for anything fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()

    def asked(*args, **kwargs):
        pytest.fail(f"asked for {args}")

    for target, name in ((torch.hub, "urlopen"), (urllib.request, "urlopen"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, asked)
    monkeypatch.setattr(torch.hub, "download_url_to_file", asked)
    return tmp_path / "hub"


@pytest.fixture
def state_of(hub, inception_state):
    """name -> {key: tensor}; DINOv2's repository is put in its place, too."""
    makers = {INCEPTION: lambda: dict(inception_state), CLIP_B: weights.clip, DINO: lambda: weights.dinov2(hub)}
    return lambda name: makers[name]()


def pictures(n=3, channels=3, size=20):
    g = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize(("name", "width"), [(INCEPTION, 2048), (CLIP_B, 16), (DINO, 32)])
def test_weights_on_the_disk_are_used(name, width, hub, state_of, monkeypatch):
    file = weights.place(name, hub, state_of(name), monkeypatch)
    network = features.find_features(name).to("cpu")
    about = network.about()
    assert about["name"] == name and about["sha256"] == features._sha256(file)
    assert about["layer"] == FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
    x = pictures()
    found, logits = network(x)
    assert found.shape == (3, width) and found.dtype == torch.float32 and found.std() > 0
    assert torch.equal(found, network.extractor(x)[0].float())  # torch-fidelity's own way
    assert (logits is None) == (name != INCEPTION) and (logits is None or logits.shape == (3, 1008))
    grey = pictures(channels=1)
    assert torch.equal(network(grey)[0], network(grey.expand(-1, 3, -1, -1))[0])


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_give_other_features(name, hub, state_of, monkeypatch):
    """So it is the file that is read, not a network as it was built."""
    found = []
    for factor in (1, -2):
        state = {k: v * factor if v.is_floating_point() and v.ndim == 4 else v for k, v in state_of(name).items()}
        weights.place(name, hub, state, monkeypatch)
        found.append(features.find_features(name)(pictures())[0])
    assert not torch.allclose(*found)


@pytest.mark.parametrize("change", ["one less", "one more"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_must_fit_wholly(name, change, hub, state_of, monkeypatch):
    state = state_of(name)
    key = "visual.ln_pre.weight" if name == CLIP_B else next(k for k, v in state.items() if v.ndim == 4)
    other = f"{key.rpartition('.')[0]}.another"
    if change == "one less":
        del state[key]
    else:
        state[other] = torch.zeros(2)
    file = weights.place(name, hub, state, monkeypatch)
    with pytest.raises(UserError) as e:
        features.find_features(name)
    assert f"--features {name}: {file} does not hold the weights" in str(e.value)
    assert (key if change == "one less" else other) in str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_its_url_and_place(name, hub, state_of):
    if name == DINO:
        with pytest.raises(UserError, match="github.com/facebookresearch/dinov2") as e:
            features.find_features(name)
        assert str(hub / "facebookresearch_dinov2_main") in str(e.value) and URLS[DINO] in str(e.value)
        state_of(DINO)  # the repository is there now, the weights are not
    with pytest.raises(UserError) as e:
        features.find_features(name)
    assert f"--features {name}: its weights are not here. Download {URLS[name]}" in str(e.value)
    assert str(hub / "checkpoints" / FILES[name]) in str(e.value)


@pytest.mark.parametrize("name", NAMES[:2])
def test_another_file_is_refused_before_it_is_read(name, hub, state_of, monkeypatch):
    weights.place(name, hub, state_of(name), monkeypatch).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the published file"):
        features.find_features(name)


@pytest.mark.parametrize("name", NAMES)
def test_floats_are_taken_as_they_are(name, hub, state_of, monkeypatch):
    """Whole levels as 8 bits of them; what lies between is not rounded, so that close pictures differ."""
    weights.place(name, hub, state_of(name), monkeypatch)
    network = features.find_features(name)
    x = pictures()
    floats = x.float() / 127.5 - 1
    expected = network(x)[0]
    assert torch.allclose(network.of_floats(floats), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) / 127.5
    one, two = ((network.of_floats(floats + h * d) - network.of_floats(floats)).norm() for h in (0.1, 0.2))
    assert one > 0 and float(two / one) == pytest.approx(2, rel=0.1)
    with pytest.raises(ValueError, match="uint8"):
        network.extractor(floats)  # the package's own check is back


@pytest.mark.parametrize("name", NAMES)
def test_path_lengths_in_these_features(name, hub, state_of, monkeypatch):
    """Along a decoder that is a straight line, in a network that is nearly linear there: the mean of |J (b - a)|^2."""
    weights.place(name, hub, state_of(name), monkeypatch)
    network = features.find_features(name)
    mlp = {"target": "ldm.modules.vae_nets.MLPDecoder", "params": {"hidden": [4]}}
    encoder = {"target": "ldm.modules.vae_nets.MLPEncoder", "params": {"hidden": [4]}}
    model = VAE(size=2, channels=1, latent_dim=4, encoder_config=encoder, decoder_config=mlp).eval()
    model.decode = lambda z: 0.2 * z.reshape(-1, 1, 2, 2)

    def squared(a, b):
        f, g = network.of_floats(a), network.of_floats(b)
        steps.append(((g - f) / EPSILON).square().sum(1))
        return ((f - g) ** 2).sum(1)

    steps = []
    found = path_length(model, squared, None, 6, 0, "cpu", batch_size=3)
    each = torch.cat(steps).numpy()
    low, high = np.percentile(each, [1, 99])
    assert found["ppl"] == pytest.approx(each[(each >= low) & (each <= high)].mean(), rel=1e-3) and found["ppl"] > 0


def test_the_clip_score_reads_the_same_file(hub, state_of, monkeypatch):
    state = state_of(CLIP_B)
    weights.place(CLIP_B, hub, state, monkeypatch)
    monkeypatch.setattr(CLIP, "from_name", classmethod(lambda cls, name: cls(weights.VISION, weights.TEXT)))
    model = load_clip(CLIP_B)
    assert all(torch.equal(v, state[k].float()) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="its weights are not here"):
        load_clip("clip-vit-b-16")
