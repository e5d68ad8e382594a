"""Files of any age are read without running anything, checked by name, and written whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm import checkpoint
from ldm.util import UserError


def old_lightning_file():
    """What Lightning 1 left behind: classes as keys, omegaconf nodes, numpy scalars."""
    import numpy as np

    return {
        "state_dict": {"weight": torch.arange(4.0).view(2, 2), "bias": torch.ones(2)},
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best": np.float64(0.5)}},
        "hyper_parameters": OmegaConf.create({"a": 1, "b": [1, {"c": 2}]}),
        "global_step": 470000,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_old_lightning_files_with_objects_in_them(tmp_path, zipped):
    torch.save(old_lightning_file(), tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    content = checkpoint.read(tmp_path / "m.ckpt")
    assert content["global_step"] == 470000
    linear = nn.Linear(2, 2)
    assert checkpoint.load(linear, checkpoint.state_dict_of(content)) == "loaded 2 of 2 tensors"
    assert linear.weight.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
def test_every_format(tmp_path, suffix):
    path, state = tmp_path / f"m.{suffix}", nn.Linear(2, 3).state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    read = checkpoint.read_state(path)
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = checkpoint.state_dict_of({f"{prefix}a": torch.zeros(1), f"{prefix}b": torch.zeros(1)})
    assert set(state) == {"a", "b"}
    assert set(checkpoint.state_dict_of({"model._orig_mod.a": torch.zeros(1)})) == {"model.a"}


def test_strict_with_named_exceptions():
    linear = nn.Linear(2, 2)
    state = {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as e:
        checkpoint.load(linear, state, source="x.ckpt")
    for part in ("x.ckpt", "1 missing (first: bias)", "1 unexpected (first: extra)", "weight (2, 3) (model: (2, 2))"):
        assert part in str(e.value)
    report = checkpoint.load(linear, {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, allow=["bias", "extra"])
    assert report == "loaded 1 of 2 tensors (1 missing, 1 unexpected)"
    assert "loaded 1 of 2" in checkpoint.load(linear, {"weight": torch.zeros(2, 2)}, partial=True)
    with pytest.raises(UserError):
        checkpoint.load(linear, {"nothing": torch.zeros(1)}, partial=True)


def test_assigned_tensors_are_the_files_own():
    with torch.device("meta"):
        linear = nn.Linear(2, 2)
    state = nn.Linear(2, 2).state_dict()
    checkpoint.load(linear, state, assign=True)
    assert linear.weight.data_ptr() == state["weight"].data_ptr()


def test_no_weights_in_it(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="holds no weights"):
        checkpoint.read_state(tmp_path / "m.ckpt")


def test_find_run(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find_run(tmp_path / "run")
    older = tmp_path / "run/checkpoints/epoch=000001.ckpt"
    older.touch()
    assert checkpoint.find_run(tmp_path / "run") == (tmp_path / "run", older)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.touch()
    assert checkpoint.find_run(tmp_path / "run") == (tmp_path / "run", last)
    assert checkpoint.find_run(older) == (tmp_path / "run", older)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find_run(tmp_path / "nowhere")


WRITER = """
import sys, torch
from ldm import checkpoint
for i in range(10**6):
    checkpoint.save_atomic({"a": torch.full((500_000,), float(i)), "i": i}, sys.argv[1])
"""


def test_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    content = checkpoint.read(path)
    assert (content["a"] == content["i"]).all()
