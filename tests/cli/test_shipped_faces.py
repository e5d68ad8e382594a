"""The StyleGAN2 of faces that comes with the project: it draws, is dragged without a run of one's own, and arrives."""

import argparse
import json

import pytest
import torch
from PIL import Image

from benchmarks.drag import one_drag
from ldm import latents
from ldm.editing import DragOptions
from scripts import drag, evaluate, sample
from tests.cli.gan_runs import call
from tests.cli.tools import ROOT

FACES = ROOT / "models/gan/openmoji"


def test_the_files_are_small():
    assert sum(f.stat().st_size for f in FACES.rglob("*") if f.is_file()) < 20e6


def test_faces_are_drawn(tmp_path):
    assert call(sample, sample.draw, "-r", FACES, "-n", 4, "--truncation", 0.8, "--outdir", tmp_path) == 0
    pictures = [Image.open(tmp_path / f"0000{i}.png").convert("RGB") for i in range(4)]
    assert all(p.size == (64, 64) for p in pictures)
    for picture in pictures:  # a white page with something in its middle
        corners = [picture.getpixel((x, y)) for x in (1, 62) for y in (1, 62)]
        assert min(min(c) for c in corners) > 200 and min(picture.getpixel((32, 32))) < 200


def test_a_picture_is_one_network_call(tmp_path):
    argv = ["-r", FACES, "-n", 4, "--metrics", "sharpness", "--outdir", tmp_path, "--json", tmp_path / "x.json"]
    assert call(evaluate, evaluate.measure, *argv) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["sampling"]["cost"]["network_calls_per_picture"] == 1 and 0.2 < result["metrics"]["sharpness"] < 2


def test_dragging_needs_no_run(tmp_path, capsys):
    argv = ["--seed", 3, "--points", "32,40>32,46", "--steps", 3, "--out", tmp_path / "x.gif"]
    assert call(drag, drag.drag, *argv) == 0
    assert (tmp_path / "x.gif").is_file() and "pixels from the targets" in capsys.readouterr().out


@pytest.mark.smoke
def test_random_drags_arrive_and_the_rest_stays():
    """docs/drag.md has the figures of more of them."""
    model, _ = latents.load_stylegan(str(FACES), None, "cpu")
    options = {"lr": DragOptions.lr, "mask_weight": DragOptions.mask_weight}
    args = argparse.Namespace(pixels=8.0, steps=100, truncation=0.7, **options)
    left, change, _ = torch.tensor([one_drag(model, seed, args) for seed in range(20)]).mean(0).tolist()
    assert left < 1.5 and change < 0.02
