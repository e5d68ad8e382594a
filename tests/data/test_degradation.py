import numpy as np
import pytest
import torch

from ldm.data import degradation
from tests.data.pictures import picture


def image(h=64, w=48, channels=3):
    x = np.asarray(picture(h, w, 0.3))
    return x if channels == 3 else x[..., :1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("name", degradation.DEGRADATIONS)
def test_shape_type_and_rough_content(name, factor, channels):
    x = image(channels=channels)
    low = degradation.degrade(x, name, factor, np.random.default_rng(0))
    assert low.shape == (64 // factor, 48 // factor, channels) and low.dtype == np.uint8
    mean = x.reshape(64 // factor, factor, 48 // factor, factor, channels).mean((1, 3))
    assert np.abs(low - mean).mean() < 25
    assert (degradation.degrade(x, name, factor, np.random.default_rng(0)) == low).all()


def test_unknown_name():
    with pytest.raises(ValueError, match="degradation must be one of bsrgan, bsrgan_light, cv_nearest"):
        degradation.degrade(image(), "cv_cubic", 4, np.random.default_rng(0))


def test_the_chain_differs_from_draw_to_draw_and_light_is_lighter():
    x = image()
    mean = x.reshape(16, 4, 12, 4, 3).mean((1, 3))
    error = {}
    for name in ("bsrgan", "bsrgan_light"):
        draws = [degradation.degrade(x, name, 4, np.random.default_rng(i)) for i in range(20)]
        assert len({d.tobytes() for d in draws}) == 20
        error[name] = np.mean([np.abs(d - mean).mean() for d in draws])
    assert error["bsrgan_light"] < 0.8 * error["bsrgan"]


def test_tiny_images():
    assert degradation.bsrgan(image(8, 8), 4, np.random.default_rng(0)).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="too small to shrink by 4"):
        degradation.bsrgan(image(3, 3), 4)
    with pytest.raises(ValueError, match="expected a uint8 image"):
        degradation.bsrgan(image().astype(np.float32), 4)


@pytest.mark.parametrize(("name", "mode"), [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("area", "area")])
def test_opencv_rules_are_torchs_without_antialiasing(name, mode):
    x = np.random.default_rng(0).random((24, 20, 3))
    t = torch.from_numpy(x).permute(2, 0, 1)[None]
    options = {} if mode == "area" else {"align_corners": False}
    expected = torch.nn.functional.interpolate(t, (6, 5), mode=mode, **options)[0].permute(1, 2, 0).numpy()
    assert np.abs(degradation.resize_cv(x, (6, 5), name) - expected).max() < 1e-6


def test_nearest_and_lanczos():
    x = np.random.default_rng(0).random((24, 20, 1))
    assert (degradation.resize_cv(x, (6, 5), "nearest") == x[::4, ::4]).all()
    assert np.abs(degradation.resize_cv(np.full((24, 20, 1), 0.7), (6, 5), "lanczos") - 0.7).max() < 1e-12
    assert np.abs(degradation.resize_cv(x, (24, 20), "lanczos") - x).max() < 1e-12


def test_gaussian_kernel_has_the_covariance_it_is_given():
    kernel = degradation.gaussian_kernel(41, (9.0, 2.0), 0.0)
    r = np.arange(41) - 20
    assert abs(kernel.sum() - 1) < 1e-12
    assert abs((kernel.sum(0) * r**2).sum() - 9) < 0.01 and abs((kernel.sum(1) * r**2).sum() - 2) < 0.01
    turned = degradation.gaussian_kernel(41, (9.0, 2.0), np.pi / 2)
    assert np.abs(turned - kernel.T).max() < 1e-12


def test_convolution_mirrors_the_border_and_keeps_the_mean_level():
    flat = np.full((10, 12, 3), 77.0)
    assert np.abs(degradation.convolve(flat, degradation.gaussian_kernel(7, (4.0, 4.0), 0.0)) - 77).max() < 1e-3
    one = np.zeros((9, 9, 1))
    one[4, 4] = 1
    kernel = degradation.gaussian_kernel(5, (2.0, 1.0), 0.5)
    assert np.abs(degradation.convolve(one, kernel)[2:7, 2:7, 0] - kernel[::-1, ::-1]).max() < 1e-6
