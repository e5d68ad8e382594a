"""Every file of configs/classifier/options over a config: what it asks for is what the run does."""

import pytest
import torch
from omegaconf import OmegaConf
from torchvision.transforms import v2

from ldm.config import Merged, load_yaml
from ldm.generate import load_run
from ldm.modules.classifiers.resnet import resnet20
from tests.cli.tools import DIGITS, QUICK, ROOT, config, only_run, run_main

OPTIONS = sorted((ROOT / "configs/classifier/options").glob("*.yaml"))
WIDTH = "model.params.network_config.params.width=0.5"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_another_target_with_parameters_replaces_the_old_ones():
    merged = Merged()
    merged.add(OmegaConf.create({"a": {"target": "x.A", "params": {"p": 1, "q": 2}}}), "one")
    merged.add(OmegaConf.create({"a": {"target": "x.A", "params": {"p": 3}}}), "two")
    assert merged.config.a.params == {"p": 3, "q": 2}
    merged.add_dotlist(["a.target=x.B"])  # by itself it keeps them
    assert merged.config.a.params == {"p": 3, "q": 2}
    merged.add(OmegaConf.create({"a": {"target": "x.C", "params": {"r": 1}}}), "three")
    assert merged.config.a.params == {"r": 1} and merged.where("a.params.r") == "three"
    assert "a.params.p" not in merged.source


def train(tmp_path, *argv, steps=3):
    base = ["-t", "-b", config(DIGITS)]
    quick = [*QUICK, "-l", tmp_path, "--max_steps", steps, "--no-test", "--limit_val_batches", 2, WIDTH]
    quick += ["lightning.callbacks.image_logger.params.disabled=true"]
    assert run_main(*base, *argv, *quick) == 0
    return only_run(tmp_path)


@pytest.mark.parametrize(
    "path", [p for p in OPTIONS if p.stem not in ("head_only", "distill", "muon")], ids=lambda p: p.stem
)
def test_option_trains(path, tmp_path):
    run = train(tmp_path, path)
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    merged = OmegaConf.create(saved["config"])
    wanted = load_yaml(path)
    assert OmegaConf.merge(merged, wanted) == merged
    model, _ = load_run(run)
    if path.stem == "augment":
        assert [type(t) for t in model.augment.single] == [v2.TrivialAugmentWide, v2.RandomErasing]
        assert [type(t) for t in model.augment.mixers] == [v2.MixUp, v2.CutMix]
    groups = saved["optimizer_states"][0]["param_groups"]
    if path.stem == "layer_decay":
        rates = sorted({g["initial_lr"] for g in groups})
        assert len(rates) == 11 and rates[-1] == 0.001 and rates[0] == pytest.approx(0.001 * 0.75**10)
    if path.stem == "lamb":
        assert "trust_clip" in groups[0]
    if path.stem == "one_cycle":
        assert groups[0]["max_lr"] == 0.1


def test_muon_for_a_transformer(tmp_path):
    path = ROOT / "configs/classifier/options/muon.yaml"
    network = "model.params.network_config"
    vit = [f"{network}.target=ldm.modules.classifiers.vit.vit_ti_16", f"{network}.params.stem=small"]
    vit += [f"{network}.params.image_size=16", f"{network}.params.depth=2"]
    saved = torch.load(train(tmp_path, path, *vit) / "checkpoints/last.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert {bool(g["hidden"]) for g in groups} == {True, False}
    assert all(("ns_steps" in g) == g["hidden"] for g in groups)
    assert {g["initial_lr"] for g in groups} == {0.02, 0.001}


def test_head_only_over_weights_of_another_class_count(tmp_path):
    path = ROOT / "configs/classifier/options/head_only.yaml"
    source = resnet20(num_classes=7, in_channels=1, width=0.5)
    torch.save(source.state_dict(), tmp_path / "start.pth")
    fresh = [f"model.params.weights={tmp_path / 'start.pth'}", "model.params.network_config.params.stem=small"]
    run = train(tmp_path / "logs", path, *fresh)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for key, value in source.state_dict().items():
        assert torch.equal(state[f"model.{key}"], value) or key.startswith("fc."), key


def test_distilling_a_run(tmp_path):
    teacher = train(tmp_path / "a")
    path = ROOT / "configs/classifier/options/distill.yaml"
    run = train(tmp_path / "b", path, f"model.params.distill_config.params.run={teacher}")
    (teacher / "checkpoints/last.ckpt").unlink()
    load_run(run)  # a trained student needs no teacher
