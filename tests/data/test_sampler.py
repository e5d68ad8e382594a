import random

import numpy as np
import pytest
import torch

from ldm.data.base import ArrayDataset
from ldm.data.sampler import EpochSampler, ResumableLoader, Streamed, collate


def indices(sampler):
    return [k % sampler.length for k in sampler]


def test_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(50, 8, shuffle=True, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first != list(range(50))
    assert list(sampler) == first == list(EpochSampler(50, 8, True, 1))
    sampler.set_epoch(3)
    third = list(sampler)
    assert {k // 50 for k in third} == {3} and [k % 50 for k in third] != first
    assert indices(EpochSampler(50, 8, True, 2)) != first
    assert list(EpochSampler(5, 2, False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_images(world):
    ranks = [indices(EpochSampler(10, 2, True, 0, world, r)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1 and set(sum(ranks, [])) == set(range(10))
    exact = [EpochSampler(10, 2, False, 0, world, r, pad=False) for r in range(world)]
    assert sorted(sum(map(indices, exact), [])) == list(range(10))
    assert [len(s) for s in exact] == [len(list(s)) for s in exact]


def test_more_ranks_than_images_leaves_no_rank_without():
    assert [indices(EpochSampler(2, 1, False, 0, 3, r, pad=False)) for r in range(3)] == [[0], [1], [0]]


@pytest.mark.parametrize("world", [1, 2])
def test_a_position_within_an_epoch(world):
    whole = EpochSampler(23, 4, True, 5, world, world - 1)
    whole.set_epoch(2)
    rest = EpochSampler(23, 4, True, 5, world, world - 1)
    place = [(2, 1)]
    rest.follow(lambda: place[0])
    assert list(rest) == list(whole)[4:]
    assert len(rest) == len(whole), "an epoch's length does not depend on where a run was resumed"
    place[0] = (3, 0)
    rest.set_epoch(77)  # whatever the Trainer calls it
    whole.set_epoch(3)
    assert list(rest) == list(whole)


class Noisy:
    """A user's data set: draws from the global generators, returns plain dicts."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {
            "image": np.full((2, 2, 3), random.random() + np.random.rand() + float(torch.rand(1)), np.float32),
            "class_label": i % 3,
            "caption": f"no {i}",
        }


def epoch_of(dataset, workers, epoch, seed=4):
    sampler = EpochSampler(len(dataset), 4, True, seed)
    sampler.set_epoch(epoch)
    loader = ResumableLoader(Streamed(dataset, seed), 4, sampler=sampler, num_workers=workers, collate_fn=collate)
    return list(loader)


def test_users_random_numbers_do_not_depend_on_workers():
    one, two = epoch_of(Noisy(), 0, 1), epoch_of(Noisy(), 2, 1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["caption"] == b["caption"]
        assert a["class_label"].dtype == torch.int64
    other = epoch_of(Noisy(), 0, 2)
    assert not {x.sum().item() for b in one for x in b["image"]} & {x.sum().item() for b in other for x in b["image"]}


def test_the_main_process_keeps_its_own_random_numbers():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    Streamed(Noisy(), 0).__getitems__([3, 5])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_own_data_sets_come_as_batches_with_fresh_augmentation_each_epoch():
    data = ArrayDataset(
        torch.arange(12 * 16 * 16 * 3).remainder(251).byte().view(12, 16, 16, 3), flip_p=0.5, pad_crop=3
    )

    def by_index(epoch, workers):
        data.labels = torch.arange(12)
        batches = epoch_of(data, workers, epoch)
        return {int(i): x for b in batches for i, x in zip(b["class_label"], b["image"], strict=True)}

    a, b, c = by_index(0, 0), by_index(0, 2), by_index(1, 0)
    assert all(torch.equal(a[i], b[i]) for i in range(12))
    assert sum(torch.equal(a[i], c[i]) for i in range(12)) < 4


def test_plain_indices_work_too():
    data = Streamed(ArrayDataset(torch.zeros(3, 4, 4, 1, dtype=torch.uint8), np.arange(3)), 0)
    assert data[2]["class_label"] == 2 and data[2]["image"].shape == (4, 4, 1)
    assert Streamed(Noisy(), 0)[5]["caption"] == "no 5"
