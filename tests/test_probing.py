"""Linear probes: known features give known accuracies; the script on a run."""

import json

import numpy as np
import pytest
import torch

from ldm import probing
from ldm.models.vae import VAE
from ldm.util import UserError
from tests.cli.tools import QUICK, config, only_run, run_main
from tests.docs.test_commands import run_script

NETS = {
    "encoder_config": {"target": "ldm.modules.vae_nets.MLPEncoder", "params": {"hidden": [8]}},
    "decoder_config": {"target": "ldm.modules.vae_nets.MLPDecoder", "params": {"hidden": [8]}},
}


def test_accuracies_of_known_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    noise = rng.normal(size=(400, 3))
    telling = noise + 8 * np.stack([labels, -labels, 0 * labels], 1)
    part = [telling, noise, labels]
    found = probing.accuracies(tuple(a[:300] for a in part), tuple(a[300:] for a in part))
    assert found["features"] == {"accuracy": 1.0, "numbers": 3} and found["pixels"]["accuracy"] < 0.7
    assert (found["n_train"], found["n_test"]) == (300, 100)


def test_features_are_the_means():
    model = VAE(size=4, channels=1, latent_dim=3, **NETS).eval()
    x = torch.rand(5, 1, 4, 4) * 2 - 1
    assert torch.equal(probing.features(model, x), model.encoder(x)[:, :3])
    data = [{"image": p.permute(1, 2, 0), "class_label": i} for i, p in enumerate(x)]
    z, pixels, labels = probing.read(model, data, batch_size=2, limit=4)
    assert z.shape == (4, 3) and labels.tolist() == [0, 1, 2, 3] and np.allclose(pixels, x[:4].flatten(1))
    with pytest.raises(UserError, match="needs class_label"):
        probing.read(model, [{"image": x[0].permute(1, 2, 0)}], 1, 1)
    with pytest.raises(UserError, match="Linear does not encode"):
        probing.features(torch.nn.Linear(1, 1), x)
    with pytest.raises(UserError, match="needs data.params.train and test"):
        probing.labelled_data({"data": {"params": {"train": {}}}})


def test_the_script(tmp_path):
    argv = ["-t", "-b", config("configs/autoencoder/vae_digits.yaml"), "-l", tmp_path, "--max_steps", 30, *QUICK]
    argv += ["model.params.iwae_samples=0", "lightning.callbacks.image_logger.params.disabled=true", "--no-test"]
    assert run_main(*argv) == 0
    result = tmp_path / "probe.json"
    assert run_script("linear_probe.py", ["-r", only_run(tmp_path), "--json", result]) == 0
    found = json.loads(result.read_text())
    assert found["split"] == "test" and found["n_test"] == 360 and found["features"]["numbers"] == 16
    assert found["pixels"]["accuracy"] > 0.9 and found["features"]["accuracy"] > 0.3
