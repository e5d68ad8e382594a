"""scripts/convert.py as a user types it: exit codes, one-line errors, and what it says."""

import sys

import pytest
import torch
import yaml

from scripts import common, convert
from tests.cli.tools import finish, start
from tests.conversion.models import config, modules, official_state


@pytest.fixture(scope="module")
def state():
    return official_state("ldm-uncond", modules("ldm-uncond"))


@pytest.fixture
def ckpt(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config("ldm-uncond")))
    return tmp_path / "model.ckpt"


def run(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, argv)])
    code = common.main(convert.build_parser(), convert.run)
    return code, *capsys.readouterr()


def test_there_and_back(ckpt, state, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--ckpt", ckpt, "--to", "diffusers", "--out", tmp_path / "folder")
    assert code == 0 and "weights: raw" in out and "LDMPipeline in" in out
    code, out, _ = run(
        monkeypatch, capsys, "--ckpt", tmp_path / "folder", "--to", "official", "--out", tmp_path / "back.ckpt"
    )
    assert code == 0 and f"{len(state)} tensors" in out
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_in_a_process_of_its_own(ckpt, tmp_path):
    args = ("--ckpt", ckpt, "--to", "safetensors", "--out", tmp_path / "model.safetensors", "--half")
    code, out = finish(start("scripts/convert.py", *args, cwd=tmp_path))
    assert code == 0, out
    assert "float16" in out and (tmp_path / "model.safetensors").is_file()


FAULTS = {
    "no file": (["--ckpt", "missing.ckpt"], "does not exist"),
    "a text file": (["--ckpt", "model.yaml"], "is a text file"),
    "truncated": (["--ckpt", "short.ckpt"], "short.ckpt cannot be read"),
    "no config": (["--ckpt", "lonely.ckpt"], "give it by --config"),
    "config of nothing": (["--ckpt", "model.ckpt", "--config", "short.ckpt"], "short.ckpt"),
    "config of a classifier": (["--ckpt", "model.ckpt", "--config", "classifier.yaml"], "only diffusion models"),
    "no averages": (["--ckpt", "model.ckpt", "--weights", "ema"], "--weights ema"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_and_exit_code_2(fault, ckpt, state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = ckpt.read_bytes()
    (tmp_path / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "lonely").mkdir()
    torch.save({"state_dict": state}, tmp_path / "lonely" / "lonely.ckpt")
    (tmp_path / "classifier.yaml").write_text("model: {target: ldm.models.classifier.Classifier, params: {}}")
    argv, message = FAULTS[fault]
    argv = [a.replace("lonely.ckpt", "lonely/lonely.ckpt") for a in argv]
    code, _, err = run(monkeypatch, capsys, *argv, "--to", "diffusers", "--out", "out")
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
