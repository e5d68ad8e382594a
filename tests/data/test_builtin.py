import numpy as np
import pytest
import torch

from ldm.data.builtin import Digits
from ldm.util import UserError


def test_splits_cover_all_digits_once():
    sizes = {s: len(Digits(s)) for s in ("train", "validation", "test", "all")}
    assert sizes["all"] == 1797 == sizes["train"] + sizes["validation"] + sizes["test"]
    assert 170 <= sizes["validation"] <= 190 and 350 <= sizes["test"] <= 370
    counts = np.bincount(Digits("test").labels)
    assert len(counts) == 10 and counts.min() >= 34 and counts.max() <= 38


def test_no_image_is_in_two_splits():
    seen = [{x.numpy().tobytes() for x in Digits(s, size=8).images} for s in ("train", "validation", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), ([16, 24], 1)])
def test_format(size, channels):
    data = Digits(size=size, channels=channels)
    batch = data.get_batch(range(16))
    h, w = (size, size) if isinstance(size, int) else size
    assert batch["image"].shape == (16, h, w, channels) and batch["image"].dtype == torch.float32
    assert batch["image"].min() == -1.0 and 0.9 < batch["image"].max() <= 1.0
    assert batch["class_label"].dtype == torch.int64
    assert data.class_names == list("0123456789") and data.num_classes == 10


def test_upscaled_digits_keep_their_content():
    """Averaged back to 8x8 they are the originals, up to the filter."""
    big, small = Digits("all", size=32).images.float(), Digits("all", size=8).images.float()
    back = torch.nn.functional.avg_pool2d(big.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert (back - small).abs().mean() < 8
    from sklearn.datasets import load_digits

    assert (small[..., 0] * 16 / 255 - torch.from_numpy(load_digits().images)).abs().max() < 0.05


def test_another_seed_is_another_split_and_a_wrong_name_is_told():
    assert not torch.equal(Digits("test").images, Digits("test", seed=1).images)
    with pytest.raises(UserError, match="split must be one of all, test, train, validation, got 'val'"):
        Digits("val")
