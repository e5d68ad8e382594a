import numpy as np
import pytest
import torch

from ldm.data import base
from ldm.util import UserError


def test_uniforms_are_uniform_and_depend_on_stream_and_index_alone():
    u = base.uniforms(base.stream_of(1, 2), np.arange(20000), 4)
    assert u.shape == (20000, 4) and u.min() >= 0 and u.max() < 1
    assert np.allclose(u.mean(0), 0.5, atol=0.01) and np.allclose(u.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    again = base.uniforms(base.stream_of(1, 2), np.array([17, 3]), 4)
    assert (again == u[[17, 3]]).all()
    assert not (base.uniforms(base.stream_of(1, 3), np.arange(100), 4) == u[:100]).any()
    assert not (base.uniforms(base.stream_of(2, 2), np.arange(100), 4) == u[:100]).any()


def test_stream_takes_any_seed():
    assert len({base.stream_of(s, e) for s in (-1, 0, 1, 2**40) for e in range(50)}) == 200


@pytest.mark.parametrize(("size", "parsed"), [(16, (16, 16)), ([16, 32], (16, 32)), (None, None), (0, None)])
def test_parse_size(size, parsed):
    assert base.parse_size(size) == parsed


@pytest.mark.parametrize("size", ["16", -1, [1, 2, 3], 3.5, True, [16, 0]])
def test_parse_size_refuses(size):
    with pytest.raises(UserError, match="size must be"):
        base.parse_size(size)


def test_to_float_hits_the_ends_exactly():
    x = base.to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == [-1.0, 1.0]


def test_resize_arrays_channels():
    grey = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert base.resize_arrays(grey, None, 3).shape == (1, 8, 8, 3)
    assert (base.resize_arrays(grey, None, 1)[0, ..., 0].numpy() == grey[0]).all()
    red = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0] = 200
    assert base.resize_arrays(red, (4, 6), 1).unique().tolist() == [60]  # 0.299 * 200
    assert base.resize_arrays(red, (4, 6), 3).shape == (2, 4, 6, 3)


def test_stratified_split_is_a_partition_with_equal_shares():
    labels = np.repeat(np.arange(5), 40)
    parts = base.stratified_split(labels, {"test": 0.25, "train": 0.75})
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(200))
    assert np.bincount(labels[parts["test"]]).tolist() == [10] * 5
    uneven = np.repeat(np.arange(7), [3, 11, 5, 8, 1, 2, 13])
    parts_of = base.stratified_split(uneven, {"a": 0.3, "b": 0.25, "c": 0.45})
    assert [len(p) for p in parts_of.values()] == [13, 11, 19]
    assert np.abs(np.bincount(uneven[parts_of["a"]], minlength=7) - 0.3 * np.bincount(uneven)).max() < 1
    assert (base.stratified_split(labels, {"test": 0.25, "train": 0.75})["test"] == parts["test"]).all()


def images(n=6, size=8):
    return torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_array_dataset_batches_equal_single_samples():
    data = base.ArrayDataset(images(), np.arange(6), [str(i) for i in range(6)], flip_p=0.5, pad_crop=2)
    batch = data.get_batch([4, 1, 1], stream=7)
    assert batch["image"].shape == (3, 8, 8, 3) and batch["image"].dtype == torch.float32
    assert batch["class_label"].tolist() == [4, 1, 1] and batch["class_label"].dtype == torch.int64
    assert torch.equal(batch["image"][0], data.get_batch([4], stream=7)["image"][0])
    assert torch.equal(data[-2]["image"], data.get_batch([4])["image"][0])
    assert data.num_classes == 6
    with pytest.raises(IndexError):
        data[6]


def test_flip_and_shift_are_what_they_say():
    x = images()
    plain = base.ArrayDataset(x).get_batch(range(6))["image"]
    flipped = base.ArrayDataset(x, flip_p=1.0).get_batch(range(6))["image"]
    assert torch.equal(flipped, plain.flip(2))
    data = base.ArrayDataset(x, pad_crop=2)
    shifted = data.get_batch(range(6), stream=5)["image"]
    padded = torch.nn.functional.pad(plain, (0, 0, 2, 2, 2, 2), value=-1.0)
    places = set()
    for i in range(6):
        found = [(t, c) for t in range(5) for c in range(5) if torch.equal(shifted[i], padded[i, t : t + 8, c : c + 8])]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 1


def test_iterable_base_keeps_the_official_fields():
    class Stream(base.Txt2ImgIterableBaseDataset):
        def __iter__(self):
            return iter(self.sample_ids)

    data = Stream(num_records=3, valid_ids=["a", "b", "c"], size=64)
    assert (data.num_records, data.valid_ids, data.sample_ids, data.size) == (3, ["a", "b", "c"], ["a", "b", "c"], 64)
    assert len(data) == 3 and list(data) == ["a", "b", "c"]


# --- flips in turn ----------------------------------------------------------------------------------------------------


def test_alternate_flips_show_each_image_both_ways_in_two_epochs():
    images = torch.arange(40 * 4, dtype=torch.uint8).view(40, 1, 4, 1)
    data = base.ArrayDataset(images, flip_p="alternate")
    plain = base.to_float(images)
    mirrored = []
    for epoch in range(4):
        shown = data.get_batch(range(40), base.stream_of(7, epoch))["image"]
        flipped = (shown == plain.flip(2)).flatten(1).all(1)
        assert ((shown == plain).flatten(1).all(1) ^ flipped).all()
        mirrored.append(flipped)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert 8 < mirrored[0].sum() < 32
    assert base.stream_of(7, 3) & 1 and not base.stream_of(7, 4) & 1


@pytest.mark.parametrize("wrong", ["always", 1.5, True])
def test_flip_is_a_probability_or_alternate(wrong):
    with pytest.raises(UserError, match=r"flip_p must be a probability in \[0, 1\] or alternate, got"):
        base.ArrayDataset(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), flip_p=wrong)
