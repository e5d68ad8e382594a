"""What a folder of drawn pictures says of how, by what, and at which cost they were drawn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation import metrics, sampling
from ldm.evaluation.store import write_json
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.engine import DiffusionEngine
from ldm.models.vae import VAE
from ldm.trainer import RISING

UNET = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1], "attention_resolutions": []}
UNET |= {"image_size": 8, "in_channels": 1, "out_channels": 1, "num_heads": 1}
NETWORK = {"target": "ldm.modules.unet.UNetModel", "params": UNET}
EDM = "ldm.diffusion.sgm"


def ddpm():
    return DDPM(NETWORK, timesteps=20, use_ema=False, channels=1, image_size=8).eval()


def plan(model, root, n=6, batch_size=2, **knobs):
    info = {"sha256": "0" * 64, "run": "runs/2026_x", "checkpoint": "last.ckpt"}
    return sampling.Plan(model, info, range(n), knobs, None, None, None, batch_size, root)


def engine():
    """Steps, sampler and noise levels are what its config says."""
    levels = {"target": f"{EDM}.EDMDiscretization"}
    sampler = {"num_steps": 7, "s_churn": 0.5, "discretization_config": levels}
    scaling = {"target": f"{EDM}.EDMScaling"}
    denoiser = {"target": f"{EDM}.Denoiser", "params": {"scaling_config": scaling}}
    return DiffusionEngine(
        network_config=NETWORK,
        denoiser_config=denoiser,
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        sampler_config={"target": f"{EDM}.HeunEDMSampler", "params": sampler},
        image_size=8,
    ).eval()


def test_an_engine_s_own_steps_and_sampler_are_stated(tmp_path):
    model = engine()
    found = sampling.settings(plan(model, tmp_path))
    assert found["steps"] == 7 and found["sampler"] == "heun" and found["scale"] == 1.0
    assert found["s_churn"] == 0.5 and found["grid"] == "EDMDiscretization"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "generate" not in vars(model)  # the model can draw again
    assert sampling.settings(plan(model, tmp_path, steps=3, sampler="euler"))["steps"] == 3


def test_defaults_that_are_none_are_written_out(tmp_path):
    found = sampling.settings(plan(ddpm(), tmp_path, steps=4))
    assert found["steps"] == 4 and found["sampler"] == "ddim" and found["eta"] == 0.0 and found["scale"] == 1.0
    assert found["grid"] == ddpm().path.default_grid
    vae = VAE(size=8, channels=1, latent_dim=2).eval()
    assert sampling.settings(plan(vae, tmp_path)) == {"temperature": 1.0}


# --- cost and origin --------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_after_its_last_picture_leaves_its_cost(tmp_path, monkeypatch):
    p = plan(ddpm(), tmp_path, steps=2)

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling.Drawing, "on_predict_end", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        sampling.draw(p, {}, "cpu")
    cost = json.loads((p.folder / "cost.json").read_text())
    assert cost["network_calls_per_picture"] == 2 and cost["seconds_per_picture"] > 0 and cost["devices"] == 1


def drawers(folder):
    return [d["commit"] for d in sampling.drawn_by(folder)]


def test_pictures_say_which_code_drew_them(tmp_path, monkeypatch):
    """The first half by one commit, the rest by another one; measured by a third."""
    facts = {"device": "cpu", "versions": {"torch": torch.__version__}}
    model = ddpm()
    for name, n in (("aaa", 2), ("bbb", 6)):
        monkeypatch.setattr(sampling, "provenance", lambda _, name=name: {"commit": name, **facts})
        p = plan(model, tmp_path, n=n, steps=2)
        assert sampling.draw(p, {}, "cpu")
    assert sorted(drawers(p.folder)) == ["aaa", "bbb"] and sampling.drawn_by(p.folder)[0]["batch_size"] == 2
    monkeypatch.setattr(metrics, "commit", lambda: "ccc")
    e = SimpleNamespace(plan=p, model=model, notes=[])
    about = metrics._sampling(e)
    assert about["drawn_by"] == sampling.drawn_by(p.folder) and "drawn by aaa, bbb, measured by ccc" in e.notes[0]
    sampling.draw(p, {}, "cpu")  # nothing is missing: who draws nothing leaves no name
    monkeypatch.setattr(sampling, "provenance", lambda _: {"commit": "ddd", **facts})
    sampling.draw(p, {}, "cpu")
    assert sorted(drawers(p.folder)) == ["aaa", "bbb"]


def test_pictures_of_before_there_were_records_are_not_claimed(tmp_path):
    p = plan(ddpm(), tmp_path, n=4, steps=2)
    p.folder.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(p.folder / p.name(i))
    assert drawers(p.folder) == [None]  # where nothing was missing, too
    sampling.draw(p, {}, "cpu")
    assert None in drawers(p.folder) and len(drawers(p.folder)) == 2
    e = SimpleNamespace(plan=p, model=p.model, notes=[])
    metrics._sampling(e)
    assert "an unknown commit" in e.notes[0]


def test_processes_that_write_one_file_do_not_take_each_other_s_part(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr("os.replace", lambda part, path: parts.append(str(part)))
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        write_json(tmp_path / "a.json", {})
    assert len(set(parts)) == 2


# --- the best checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["val/diversity", "val/precision", "val/coverage", "val/agreement"])
def test_what_is_better_when_higher_is_maximised(metric):
    assert any(word in metric for word in RISING)
