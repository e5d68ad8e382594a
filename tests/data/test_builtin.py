import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ldm.data.builtin import Digits
from ldm.util import UserError


def test_splits_cover_all_digits_once():
    sizes = {s: len(Digits(s)) for s in ("train", "validation", "test", "all")}
    assert sizes == {"train": 1257, "validation": 180, "test": 360, "all": 1797}
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


def test_upscaling_is_pils_bicubic_and_8x8_is_the_original():
    original = load_digits().images
    small, big = Digits("all", size=8).images, Digits("all", size=32).images
    assert np.abs(small[..., 0].double().numpy() * (16.0 / 255) - original).max() < 0.05
    for i in range(0, 1797, 100):
        expected = Image.fromarray(original[i].astype(np.float32) * 255 / 16).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.clip(np.asarray(expected), 0, 255) - big[i, ..., 0].float().numpy()).max() <= 1


def test_another_seed_is_another_split_and_a_wrong_name_is_told():
    assert not torch.equal(Digits("test").images, Digits("test", seed=1).images)
    with pytest.raises(UserError, match="split must be one of all, test, train, validation, got 'val'"):
        Digits("val")
