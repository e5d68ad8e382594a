import io

import numpy as np
import pytest
from PIL import Image

from ldm.data import pixels
from ldm.data.pixels import Fit
from ldm.util import UserError
from tests.data.pictures import picture


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = np.asarray(picture(16, 16, 0.5))


def test_exact_formats_come_back_exactly():
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (Fit((16, 16))(encoded(picture(16, 16, 0.5), kind)) == RGB).all(), kind


def test_grey_1bit_palette_and_gif():
    grey = picture(16, 16).convert("L")
    assert (Fit((16, 16), 3)(encoded(grey)) == np.asarray(grey)[..., None]).all()
    assert (Fit((16, 16), 1)(encoded(grey))[..., 0] == np.asarray(grey)).all()
    one_bit = grey.convert("1")
    assert set(np.unique(Fit((16, 16), 3)(encoded(one_bit)))) == {0, 255}
    palette = picture(16, 16, 0.5).quantize(256)
    for kind in ("PNG", "GIF"):
        got = Fit((16, 16))(encoded(palette, kind)).astype(int)
        assert np.abs(got - np.asarray(palette.convert("RGB"))).max() <= 1


def test_16_bit_and_float():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        got = Fit((16, 16), 1)(encoded(Image.fromarray(ramp), kind))[..., 0]
        assert np.abs(got.astype(int) - np.arange(256).reshape(16, 16)).max() <= 1, kind
    as_float = Image.fromarray((ramp / 65535).astype(np.float32))
    assert (
        np.abs(Fit((16, 16), 1)(encoded(as_float, "TIFF"))[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max()
        <= 1
    )
    as_int = Image.fromarray(ramp.astype(np.int32))
    assert (
        np.abs(Fit((16, 16), 1)(encoded(as_int, "TIFF"))[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max()
        <= 1
    )


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (Fit((8, 8))(encoded(clear)) == 255).all()
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert np.abs(Fit((8, 8))(encoded(half))[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    grey = Image.new("LA", (8, 8), (0, 0))
    assert (Fit((8, 8), 1)(encoded(grey)) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] + [0] * 765)
    assert (Fit((8, 8))(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_cmyk_jpeg():
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    got = Fit((16, 16))(encoded(red, "JPEG", quality=95))
    assert np.abs(got.astype(int) - [200, 30, 30]).max() <= 6
    assert Fit((16, 16), 1)(encoded(red, "JPEG")).shape == (16, 16, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation(kind):
    upright = picture(12, 20)
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = 6  # stored turned; to be turned by 90 degrees clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    got = Fit((12, 20))(encoded(stored, kind, exif=exif, **options)).astype(int)
    assert np.abs(got - np.asarray(upright)).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_fast_jpeg_agrees_with_pil(channels):
    data = encoded(picture(32, 32, 0.3), "JPEG", quality=90)
    fast = pixels.decode_small_jpeg(data, channels)
    slow = pixels.as_array(pixels.open_image(data, channels))
    assert fast is not None and fast.shape == slow.shape == (32, 32, channels)
    assert np.abs(fast.astype(int) - slow).max() <= 2


def test_large_jpeg_decoded_at_a_reduced_scale_agrees():
    image = picture(640, 800, 0.4)
    data = encoded(image, "JPEG", quality=95)
    reduced = pixels.open_image(data, 3, (32, 32))
    assert reduced.size == (100, 80)
    full = Fit((32, 32))(encoded(image))
    assert np.abs(Fit((32, 32))(data).astype(int) - full).max() <= 4


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (64, 96), (7, 50), (1, 1)])
def test_any_shape_becomes_the_size(shape):
    for fit in (
        Fit((16, 24)),
        Fit((16, 24), mode="pad"),
        Fit((16, 24), random=True),
        Fit((16, 16), resize_to=(24, 24)),
    ):
        got = fit(encoded(picture(*shape)), 0.9, 0.1)
        assert got.shape == (*fit.size, 3) and got.dtype == np.uint8 and got.flags.c_contiguous is not None


def test_centre_crop_keeps_the_middle_and_pad_keeps_everything():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    data = encoded(Image.fromarray(wide))
    assert (Fit((20, 20))(data) == 255).all()
    padded = Fit((20, 60), mode="pad")(encoded(Image.new("L", (20, 20), 0)))
    assert (padded[:, :19] == 255).all() and (padded[:, 41:] == 255).all() and (padded[:, 20:40] == 0).all()


def test_random_crop_reaches_both_ends():
    data = encoded(picture(20, 60))
    fit = Fit((20, 20), random=True)
    left, right = fit(data, 0.5, 0.0), fit(data, 0.5, 0.999)
    assert left[0, 0, 0] == 0 and right[0, -1, 0] == 255
    assert (fit(data, 0.5, 0.5) == np.asarray(picture(20, 60))[:, 20:40]).all()


def test_numpy_files():
    buffer = io.BytesIO()
    np.save(buffer, RGB.transpose(2, 0, 1)[None])
    assert (Fit((16, 16))(buffer.getvalue()) == RGB).all()
    buffer = io.BytesIO()
    np.save(buffer, RGB.astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        Fit((16, 16))(buffer.getvalue())


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(picture(64, 64), "JPEG")[:300], b"\x93NUMPYxx"])
def test_what_is_no_picture_raises_something_known(data):
    with pytest.raises(pixels.UNREADABLE):
        Fit((16, 16))(data)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="interpolation must be one of nearest"):
        Fit((8, 8), interpolation="cubic")
    with pytest.raises(UserError, match="fit must be crop or pad"):
        Fit((8, 8), mode="stretch")
    with pytest.raises(UserError, match="cannot crop"):
        Fit((16, 16), resize_to=(8, 8))
