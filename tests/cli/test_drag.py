"""scripts/drag.py, invert.py and the GAN flags of sample.py, as a user runs them."""

import json
import os

import numpy as np
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

from ldm import stylegan_pickle
from ldm.generate import load_run, read_settings
from ldm.latents import load_stylegan
from ldm.release import release
from scripts import drag, invert, sample
from tests.cli.gan_runs import call, gan_run, stylegan_run
from tests.test_stylegan_pickle import Calls, nvidia, save, write_generator  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return stylegan_run(tmp_path_factory.mktemp("stylegan"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.set_num_threads(1)
    return gan_run(tmp_path_factory.mktemp("gan"))


POINTS = ["--points", "8,8>14,8; 20,20>20,14"]


# --- drag -------------------------------------------------------------------------------------------------------------


def test_drag_writes_movie_picture_and_latent(run, tmp_path, capsys):
    out = tmp_path / "a/x.gif"
    assert call(drag, drag.drag, "-r", run, "--seed", 3, "--class", 7, *POINTS, "--steps", 3, "--out", out) == 0
    said = capsys.readouterr().out
    assert "pixels from the targets: " in said and "3 steps" in said
    with Image.open(out) as movie:
        assert movie.n_frames in range(2, 6) and movie.size == (256, 256)
    assert Image.open(out.with_name("x_last.png")).size == (32, 32)
    about = read_settings(out.with_name("x_last.png"))
    assert (about["seed"], about["class"], about["points"]) == (3, "7", POINTS[1])
    # the latent goes on where this drag ended
    argv = ["-r", run, "--latent", out.with_suffix(".safetensors"), *POINTS, "--steps", 1, "--out", tmp_path / "y.png"]
    assert call(drag, drag.drag, *argv) == 0
    assert (tmp_path / "y.png").is_file()


def test_drag_with_a_mask_says_how_much_the_rest_changed(run, tmp_path, capsys):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    argv = ["-r", run, "--points", "8,8>12,8", "--mask", tmp_path / "m.png", "--steps", 2, "--out", tmp_path / "x.gif"]
    assert call(drag, drag.drag, *argv) == 0
    assert "where the mask is black, the picture changed by" in capsys.readouterr().out


def test_faults_of_drag(run, plain, tmp_path, capsys):
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "small.png")
    for argv, text in (
        (["--points", "40,8>9,9"], "handle 1 (40, 8) is outside of the picture: expected 0 to 31"),
        (["--points", "8,8>8,8"], "handle 1 (8, 8) is at its target already"),
        (["--points", "8,8"], "--points '8,8': expected \"x,y>x,y\""),
        (["--points", "8,9>12,9", "--mask", tmp_path / "m.png"], "handle 1 (8, 9) is on a pixel that the mask keeps"),
        (["--points", "8,8>9,9", "--mask", tmp_path / "small.png"], "is 8x8 pixels, the picture 32x32"),
        (["--points", "8,8>9,9", "--out", "x.avi"], "ends in .gif, .mp4 or .png"),
        (["--points", "8,8>9,9", "--steps", "0"], "--steps 0: expected at least 1"),
        (["--points", "8,8>9,9", "--class", "11"], "--class 11: expected 0..9"),
        (["--points", "8,8>9,9", "--latent", tmp_path / "m.png"], "cannot be read"),
    ):
        assert call(drag, drag.drag, "-r", run, *argv) == 2
        assert text in capsys.readouterr().err
    assert call(drag, drag.drag, "-r", plain, *POINTS) == 2
    assert "is a GAN; dragging and inverting need a StyleGAN2" in capsys.readouterr().err


# --- invert -----------------------------------------------------------------------------------------------------------


def test_invert_then_drag(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "me.png")
    argv = ["-r", run, "--image", tmp_path / "me.png", "--class", 3, "--steps", 3, "--tune", 3, "--outdir", tmp_path]
    assert call(invert, invert.invert, *argv) == 0
    said = capsys.readouterr().out
    assert "60x40: its middle 40x40 is used" in said and "PSNR" in said
    rows = (tmp_path / "me_loss.csv").read_text().splitlines()
    assert rows[0] == "phase,step,loss" and len(rows) == 7
    assert [r.split(",")[0] for r in rows[1:]] == ["project"] * 3 + ["tune"] * 3
    argv = ["-r", run, "--latent", tmp_path / "me.safetensors", *POINTS, "--steps", 2, "--out", tmp_path / "me.gif"]
    assert call(drag, drag.drag, *argv) == 0


def test_faults_of_invert(run, tmp_path, capsys):
    assert call(invert, invert.invert, "-r", run, "--image", tmp_path / "none.png") == 2
    assert "does not exist: expected a picture" in capsys.readouterr().err


# --- a generator alone, and NVIDIA's files ----------------------------------------------------------------------------


def test_a_released_generator_draws_the_same_and_is_dragged(run, tmp_path):
    for half, tolerance in ((False, 0), (True, 0.05)):
        folder = tmp_path / str(half)
        release(run, folder, half=half)
        assert {p.name for p in folder.iterdir()} == {"config.yaml", "model.safetensors"}
        model, _ = load_run(folder)
        assert model.discriminator is None and model.class_names == [str(d) for d in range(10)]
        original, _ = load_stylegan(run)
        cond = model.condition([3, 4])
        assert (model.sample(cond, seeds=[3, 4]) - original.sample(cond, seeds=[3, 4])).abs().max() <= tolerance
        assert call(drag, drag.drag, "-r", folder, *POINTS, "--steps", 1, "--out", folder / "x.gif") == 0


def test_nvidias_files_are_sampled_and_dragged(nvidia, tmp_path, capsys):  # noqa: F811
    path, generator = write_generator(nvidia, tmp_path)
    model, _ = load_run(path)
    z = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    expected = generator(z, torch.tensor([[0.0, 1.0]]), noise_mode="const").clamp(-1, 1)
    assert torch.allclose(model.sample(model.condition([4], classes=[1]), seeds=[4]), expected, atol=1e-5)
    assert call(sample, sample.draw, "-r", path, "-n", 2, "--truncation", 0.7, "--outdir", tmp_path / "s") == 0
    argv = ["-r", path, "--class", 1, "--points", "4,4>8,4", "--steps", 1, "--out", tmp_path / "x.gif"]
    assert call(drag, drag.drag, *argv) == 0
    save(tmp_path / "bad.pkl", {"G_ema": Calls(os.system, "true")})
    assert call(drag, drag.drag, "-r", tmp_path / "bad.pkl", *POINTS) == 2
    assert "refused: it would use posix.system" in capsys.readouterr().err


def test_a_pickle_becomes_a_checkpoint_with_its_discriminator(nvidia, tmp_path):  # noqa: F811
    path, _ = write_generator(nvidia, tmp_path)
    content = stylegan_pickle.as_checkpoint(path)
    assert any(k.startswith("discriminator.b16.") for k in content["state_dict"])


# --- sample -----------------------------------------------------------------------------------------------------------


def test_flags_of_gans(run, plain, tmp_path):
    flags = ["--truncation", 0.5, "--noise-mode", "none", "--style-mix", 9, "--class", 7, "--seeds", "1-2,5"]
    assert call(sample, sample.draw, "-r", run, *flags, "--outdir", tmp_path) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"00001.png", "00002.png", "00005.png", "grid.png"}
    model, _ = load_stylegan(run)
    cond = model.condition([5], classes=[7])
    expected = model.sample(cond, seeds=[5], truncation=0.5, noise_mode="none", style_mix=9)
    found = torch.from_numpy(np.asarray(Image.open(tmp_path / "00005.png"), dtype=np.float32)) / 127.5 - 1
    assert (found - expected[0, 0]).abs().max() < 2.1 / 127.5
    assert call(sample, sample.draw, "--like", tmp_path / "00005.png", "--outdir", tmp_path / "again") == 0
    assert (tmp_path / "again/00005.png").is_file()
    assert json.loads(json.dumps(read_settings(tmp_path / "00005.png")))["knobs"]["style_mix"] == 9


@pytest.mark.parametrize("which", ["run", "plain"])
def test_interpolation_movies(which, request, tmp_path):
    path = request.getfixturevalue(which)
    out = tmp_path / "x.gif"
    assert call(sample, sample.draw, "-r", path, "--seeds", "1,4", "--interpolate", out) == 0
    with Image.open(out) as movie:
        assert movie.n_frames > 5  # of 48: equal ones in a row are one that lasts longer


def test_interpolation_as_mp4(run, tmp_path, capsys):
    out = tmp_path / "a/walk.mp4"
    assert call(sample, sample.draw, "-r", run, "--seeds", "1,4", "--interpolate", out) == 0
    assert f"48 frames in {out}" in capsys.readouterr().out
    data = out.read_bytes()
    assert data[4:8] == b"ftyp" and b"moov" in data
    frames, seconds = count_frames_and_secs(str(out))
    assert frames == 48 and seconds > 1


def test_a_run_ends_with_its_film_strip(tmp_path):
    """One grid of the same seeds per interval, from left to right in one picture."""
    often = ["lightning.callbacks.image_logger.params.disabled=false"]
    often += ["lightning.callbacks.image_logger.params.batch_frequency=1"]
    path = gan_run(tmp_path, *often)
    grids = sorted((path / "images/train").glob("samples_gs-*.png"))
    strip, first = Image.open(path / "images/film_strip.png"), Image.open(grids[0])
    assert len(grids) >= 2
    assert strip.size == (len(grids) * (first.width + 6) - 6, first.height + 14)  # gaps, and a line for the steps
    for i, grid in enumerate(grids):
        left = i * (first.width + 6)
        part = strip.crop((left, 14, left + first.width, strip.height))
        assert np.array_equal(np.asarray(part), np.asarray(Image.open(grid).convert("RGB")))


def test_faults_of_sample(run, plain, tmp_path, capsys):
    for argv, text in (
        (["-r", run, "--seeds", "5-2"], "--seeds 5-2: expected numbers and ranges"),
        (["-r", run, "--seeds", "1", "-n", "4"], "leave --seed and -n out"),
        (["-r", run, "-n", "1", "--interpolate", "x.gif"], "needs two pictures or more"),
        (["-r", run, "-n", "2", "--interpolate", "x.txt"], "ends in .gif, .mp4 or .png"),
        (["-r", run, "-n", "2", "--interpolate", "x.gif", "--style-mix", "3"], "--style-mix and --interpolate"),
        (["-r", run, "--class", "12"], "--class 12: expected 0..9"),
        (["-r", plain, "--truncation", "0.5"], "--truncation: GAN has no knobs"),
        (["-r", run, "--noise-mode", "x"], "noise_mode 'x': expected one of"),
    ):
        assert call(sample, sample.draw, *argv, "--outdir", tmp_path) == 2
        assert text in capsys.readouterr().err
