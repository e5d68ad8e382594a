"""Reading pictures and masks of any kind, numbered names, grids."""

import numpy as np
import pytest
from PIL import Image

from ldm.picture_files import (
    Named,
    Numbered,
    eight_bit,
    grid,
    open_image,
    padded,
    read_image,
    rounded_up,
    threshold,
)
from ldm.util import UserError


def silent(line):
    raise AssertionError(line)


@pytest.mark.smoke
def test_sixteen_bits_become_eight(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "x.png")
    assert (np.asarray(eight_bit(open_image(tmp_path / "x.png"))) == ramp).all()
    assert (read_image(tmp_path / "x.png", silent)[0] == ramp[..., None]).all()
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "x.tif")
    assert (np.asarray(eight_bit(open_image(tmp_path / "x.tif"))) == ramp).all()


def test_exif_turns_the_picture(tmp_path):
    picture, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (2, 4)


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "x.png")
    picture, alpha = read_image(tmp_path / "x.png", silent)
    assert alpha is None and (picture == (1, 2, 3)).all()


def test_threshold_says_what_is_grey():
    lines = []
    mask = threshold(np.array([[0, 127], [128, 255]], np.uint8), "m", lines.append)
    assert mask.tolist() == [[False, False], [True, True]] and "50% of it is grey" in lines[0]
    threshold(np.array([[0, 4], [250, 255]], np.uint8), "m", silent)
    with pytest.raises(UserError, match="no white pixel"):
        threshold(np.zeros((2, 2), np.uint8), "m", silent)


@pytest.mark.parametrize("size", [(1, 1), (513, 700), (64, 64), (65, 1)])
def test_padding_to_a_multiple(size):
    fitting = rounded_up(size, 64)
    assert all(b % 64 == 0 and a <= b < a + 64 for a, b in zip(size, fitting, strict=True))
    x = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    y = padded(x, fitting)
    assert y.shape[:2] == fitting and (y[: size[0], : size[1]] == x).all()


@pytest.mark.smoke
def test_names_are_never_taken_twice(tmp_path):
    x = np.zeros((2, 2, 3), np.uint8)
    (tmp_path / "00007.png").touch()
    (tmp_path / "grid-0003.png").touch()
    a, b = Numbered(tmp_path), Numbered(tmp_path)  # two processes
    found = [a.save(x, {}), b.save(x, {}), a.save(x, {})]
    assert [p.name for p in found] == ["00008.png", "00009.png", "00010.png"]
    assert Numbered(tmp_path, "grid-", 4).save(x, {}).name == "grid-0004.png"
    assert Numbered(tmp_path / "new").save(x, {}).name == "00000.png"
    names = [Named(tmp_path, "a/b: c").save(x, {}).name for _ in range(2)]
    assert names == ["a-b--c.png", "a-b--c-2.png"]


def test_grids():
    pictures = [np.full((4, 6, 3), i + 1, np.uint8) for i in range(3)]
    page = grid(pictures, 2)
    assert page.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert (page[2:6, 2:8] == 1).all() and (page[2:6, 10:16] == 2).all() and (page[8:12, 2:8] == 3).all()
    assert (page[8:12, 10:16] == 0).all() and (page[0] == 0).all()
