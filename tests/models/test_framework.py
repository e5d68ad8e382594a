"""Recipes without Lightning: the same numbers in a process that only draws, and none of it in one that trains."""

import subprocess
import sys

import lightning.pytorch as pl
import pytest

from ldm.models.base import BaseModel
from tests.cli.tools import ROOT

CODE = """
import sys
if {lean}:
    from ldm.models import framework
    framework.sampling_only()
import torch
from ldm.models.diffusion.ddpm import DDPM
torch.manual_seed(0)
params = dict(image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1,
              attention_resolutions=[], channel_mult=[1], num_heads=1)
model = DDPM({{"target": "ldm.modules.unet.UNetModel", "params": params}}, image_size=8)
torch.nn.init.normal_(model.model.diffusion_model.out[2].weight)
with model.ema_scope():
    x = model.sample(seeds=[1, 2], steps=3)
assert ("lightning" in sys.modules) is not {lean}, sorted(m for m in sys.modules if "lightning" in m)
print(model.device, [round(v, 5) for v in x.flatten()[:20].tolist()])
"""


@pytest.mark.smoke
def test_recipes_are_lightning_modules_here():
    assert issubclass(BaseModel, pl.LightningModule)


def test_the_same_numbers_without_lightning():
    found = []
    for lean in (True, False):
        command = [sys.executable, "-c", CODE.format(lean=lean)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1] and found[0].startswith("cpu [")
