"""The order of the images: a function of (seed, epoch) that any batch can be continued from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from ldm.data.base import stream_of


class EpochSampler(DistributedSampler):
    """Yields `epoch * length + index`, so that whoever reads the image knows its epoch too (see `Streamed`).

    The order is a function of (seed, epoch) alone; each rank takes every n-th index. `follow` lets it start within an
    epoch: a resumed run then sees the batches that the uninterrupted one would have seen.

    Args:
        length: number of images.
        batch_size: images a batch, to count batches.
        shuffle: random order, or 0, 1, 2, ...
        seed: of the order.
        num_replicas, rank: processes, and which of them this is.
        pad: repeat some images so that all ranks get equally many (needed in training); otherwise each image is seen
            exactly once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        pad: bool = True,
    ) -> None:
        super().__init__(range(length), num_replicas, rank, shuffle, seed)
        self.length, self.batch_size = length, batch_size
        self.pad = pad or length < num_replicas
        self.first_batch = 0
        self._position: Callable[[], tuple[int, int]] | None = None

    def follow(self, position: Callable[[], tuple[int, int]]) -> None:
        """From now on `position()` says, at the start of each epoch, which (epoch, batch) comes next."""
        self._position = position
        self.epoch, self.first_batch = position()

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer when an epoch starts."""
        self.epoch, self.first_batch = (epoch, 0) if self._position is None else self._position()

    def __len__(self) -> int:
        """Images of this rank in a whole epoch."""
        return self.num_samples if self.pad else len(range(self.rank, self.length, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        else:
            order = np.arange(self.length)
        if self.pad:
            order = np.resize(order, self.num_samples * self.num_replicas)
        mine = order[self.rank :: self.num_replicas][self.first_batch * self.batch_size :]
        return iter((mine + self.epoch * self.length).tolist())


class Streamed(Dataset):
    """A map-style data set whose random numbers depend on (seed, epoch, index) only.

    Our own data sets get the name of the epoch's random stream. Others, which draw from the generators of Python,
    NumPy and torch, find these seeded for each image; in the main process the generators are put back afterwards.

    Args:
        dataset: anything with `__len__` and `__getitem__`.
        seed: of the run.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[int]) -> Any:
        """A batch dict, or a list of samples to collate; keys are those of EpochSampler (or plain indices)."""
        epoch, indices = keys[0] // len(self), [k % len(self) for k in keys]
        stream = stream_of(self.seed, epoch)
        if hasattr(self.dataset, "get_batch"):
            return self.dataset.get_batch(indices, stream)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._seeded(i, stream) for i in indices]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])

    def _seeded(self, index: int, stream: int) -> Any:
        seed = stream_of(stream >> 1, index)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed >> 1)
        return self.dataset[index]

    def __getitem__(self, key: int) -> Any:
        batch = self.__getitems__([key])
        return {k: v[0] for k, v in batch.items()} if isinstance(batch, dict) else batch[0]


def collate(samples: Any) -> Any:
    """Batches that come ready-made pass; lists of samples are stacked as torch does."""
    return samples if isinstance(samples, dict) else default_collate(samples)


class ResumableLoader(DataLoader):
    """Tells Lightning that a restart within an epoch keeps the order.

    The position itself is in the data module's state: that one counts the batches that were trained on, a loader those
    that it handed out.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore here."""
