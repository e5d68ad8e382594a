"""Images to and from uint8, and one generator per picture."""

import numpy as np
import pytest
import torch

from ldm import util


@pytest.mark.smoke
def test_noise_of_a_picture_does_not_depend_on_its_batch():
    together = util.SeededNoise([7, 8, 9])
    alone = util.SeededNoise([8])
    like = torch.empty(3, 2, 4, 4)
    for _ in range(3):
        assert torch.equal(together(like)[1:2], alone(like[1:2]))
    assert torch.equal(together.rand((3, 5))[1], alone.rand((1, 5))[0])


def test_noise_follows_the_template():
    noise = util.SeededNoise([1, 2])(torch.empty(2, 3, dtype=torch.bfloat16))
    assert noise.dtype == torch.bfloat16 and noise.shape == (2, 3)
    with pytest.raises(ValueError, match="expected 2 images"):
        util.SeededNoise([1, 2])(torch.empty(3, 3))


@pytest.mark.smoke
def test_uint8():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert util.to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256).view(1, 1, 16, 16) / 127.5 - 1
    assert (util.to_uint8(levels).ravel() == np.arange(256)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_picture(bad):
    with pytest.raises(ValueError, match="non-finite"):
        util.to_uint8(torch.full((1, 1, 2, 2), bad))


def test_pil_modes_and_grid():
    assert [p.mode for p in util.to_pil(torch.zeros(2, 1, 4, 4))] == ["L", "L"]
    assert util.to_pil(torch.zeros(1, 3, 4, 6))[0].size == (6, 4)
    assert util.image_grid(torch.zeros(5, 3, 8, 8), nrow=4).shape == (3, 22, 42)


def test_captions_as_pictures():
    x = util.log_txt_as_img((64, 32), ["a red apple", "", "a" * 200])
    assert x.shape == (3, 3, 32, 64) and x.min() < 0 < x.max() <= 1
    assert x[1].min() == 1  # an empty caption is a white page


def test_small_helpers():
    assert util.default(None, 3) == 3 and util.default(0, 3) == 0 and util.default(None, lambda: 4) == 4
    assert util.exists(0) and not util.exists(None)
    assert util.mean_flat(torch.ones(2, 3, 4)).tolist() == [1.0, 1.0]
    assert util.count_params(torch.nn.Linear(3, 2)) == 8
    assert util.isimage(torch.zeros(1, 3, 2, 2)) and util.ismap(torch.zeros(1, 4, 2, 2))
    assert not util.isimage(torch.zeros(3, 2, 2)) and not util.ismap(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("marker", ["__is_first_stage__", "__is_unconditional__"])
def test_official_markers(marker):
    assert util.instantiate_from_config(marker) is None


def test_config_without_target():
    with pytest.raises(util.ConfigError, match="target"):
        util.instantiate_from_config({"params": {}})


def test_an_error_in_the_constructor_becomes_a_config_error():
    with pytest.raises(util.ConfigError) as e:
        util.instantiate_from_config({"target": "torch.nn.Conv2d", "params": {"in_channels": 3, "out_channels": 4}})
    assert "kernel_size" in str(e.value)
    params = {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}
    with pytest.raises(util.ConfigError, match="divisible"):
        util.instantiate_from_config({"target": "torch.nn.Conv2d", "params": params})


def double(part):
    return [2 * x for x in part]


def numbered(part, worker):
    return [(worker, x) for x in part]


@pytest.mark.parametrize("cpu_intensive", [True, False])
def test_parallel_data_prefetch(cpu_intensive):
    options = {"cpu_intensive": cpu_intensive}
    found = util.parallel_data_prefetch(double, np.arange(7), 3, **options)
    assert isinstance(found, np.ndarray) and found.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert util.parallel_data_prefetch(double, [1, 2, 3], 2, "list", **options) == [2, 4, 6]
    assert util.parallel_data_prefetch(double, {"a": 1, "b": 2}, 2, "list", **options) == [2, 4]
    found = util.parallel_data_prefetch(numbered, ["a", "b", "c"], 2, "list", use_worker_id=True, **options)
    assert found == [(0, "a"), (0, "b"), (1, "c")]
    with pytest.raises(ValueError, match="target_data_type"):
        util.parallel_data_prefetch(double, [1], 1, "tensor")
    with pytest.raises(ValueError, match="iterate"):
        util.parallel_data_prefetch(double, 5, 1)
