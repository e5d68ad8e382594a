"""The data of a run: a data set a split, by config, in an order that survives a restart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.data.base import Size, Txt2ImgIterableBaseDataset
from ldm.data.cached import CachedLatents, Encode, cache
from ldm.data.entries import NoSplitError
from ldm.data.image import ImageFolder, available_cpus
from ldm.data.sampler import EpochSampler, ResumableLoader, Streamed, collate
from ldm.util import UserError, accepted_params, get_obj_from_str, instantiate_from_config

FOLDER = "ldm.data.image.ImageFolder"
MAX_WORKERS = 8
STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets by config: `{target: ..., params: {...}}` for each of train, validation, test and predict.

    Args:
        batch_size: images a batch, on each device.
        train, validation, test, predict: configs of the data sets; each may be absent.
        wrap: accepted for official configs; any object with `__len__` and `__getitem__` is taken.
        num_workers: processes that read images; null chooses: 0 for data in memory, else one per CPU, at most 8.
        shuffle_test_loader: random order in test.
        use_worker_init_fn: seed NumPy in each worker, for streaming sets that draw from it.
        shuffle_val_dataloader: random order in validation.
        root: a folder or zip of your own pictures. Handed to data sets that take `root`; any other data set gives way
            to `ldm.data.image.ImageFolder` over it, with the same size and channels.
        size: pixels, or [height, width]; handed to each data set that takes it and does not set it.
        channels: 1 or 3; likewise.
        drop_last: leave out a last, smaller training batch.
        seed: of the order and of the augmentations; null: the run's seed.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        root: str | None = None,
        size: Size | None = None,
        channels: int | None = None,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, or null, got {num_workers}")
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.configs = {split: config for split, config in given.items() if config is not None}
        if not self.configs:
            raise UserError("data.params names no data set: expected train, validation, test or predict")
        self.batch_size, self.num_workers, self.drop_last = batch_size, num_workers, drop_last
        self.use_worker_init_fn = use_worker_init_fn
        self.shuffled = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.defaults = {"root": root, "size": size, "channels": channels}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.datasets: dict[str, Any] = {}
        self._start = (0, 0)  # epoch and batch that this process starts from
        self._resumed: dict[str, int] = {}
        self._replaced: set[str] = set()
        # Lightning looks whether these exist to know which loops to run.
        loaders = {"train": "train", "validation": "val", "test": "test", "predict": "predict"}
        for split in self.configs:
            setattr(self, f"{loaders[split]}_dataloader", getattr(self, f"_{loaders[split]}_dataloader"))

    # -- data sets --

    def setup(self, stage: str | None = None) -> None:
        """Builds the data sets of a stage (fit, validate, test, predict; None: all), once each."""
        for split in STAGES.get(stage or "", tuple(self.configs)):
            if split in self.configs and split not in self.datasets:
                self._build(split)

    def _build(self, split: str) -> None:
        config = self.configs[split]
        if not isinstance(config, Mapping) or "target" not in config:
            raise UserError(f"data.params.{split} must be a mapping with target and params, got {config!r:.80}")
        params, folder = dict(config.get("params") or {}), self.defaults["root"]
        accepted = accepted_params(get_obj_from_str(config["target"])) or {}
        if folder is not None and "root" not in accepted:
            dataset = self._own_pictures(split, config["target"], params)
        else:
            missing = {k: v for k, v in self.defaults.items() if v is not None and k in accepted and k not in params}
            if split == "predict" and "split" in accepted and "root" in missing and "split" not in params:
                missing["split"] = "all"
            dataset = self._unless_absent(split, {**config, "params": {**params, **missing}})
        if dataset is None:
            return
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise UserError(f"the data set of data.params.{split} ({config['target']}) is empty")
        self.datasets[split] = dataset

    def _unless_absent(self, split: str, config: Mapping[str, Any]) -> Any:
        """The data set, or None where a folder given by `root` has no test set."""
        try:
            return instantiate_from_config(config)
        except NoSplitError as e:
            if split != "test" or self.defaults["root"] is None:
                raise
            rank_zero_info(f"no test set: {e}")
            del self.configs[split]
            del self.test_dataloader
            return None

    def _own_pictures(self, split: str, target: str, params: dict[str, Any]) -> Any:
        """The image folder in place of a data set that cannot read one, with that one's size and channels."""
        cls = get_obj_from_str(target)
        known = {k: v for k, v in params.items() if k in accepted_params(ImageFolder)}
        if isinstance(params.get("config"), Mapping):  # ImageNet keeps its size there
            known = {k: v for k, v in params["config"].items() if k == "size"}
        known["size"] = params.get("crop_size") or known.get("size") or self.defaults["size"] or _native(cls, "size")
        known["channels"] = known.get("channels") or self.defaults["channels"] or _native(cls, "channels")
        known = {k: v for k, v in known.items() if v is not None}
        part = "all" if split == "predict" else split
        root = self.defaults["root"]
        if target not in self._replaced:
            rank_zero_info(f"the pictures in {root} take the place of {target.rpartition('.')[2]}")
            self._replaced.update(c.get("target") for c in self.configs.values())  # one line for all splits
        return self._unless_absent(split, {"target": FOLDER, "params": {**known, "root": root, "split": part}})

    def cache_latents(self, directory: str, encode: Encode, identity: str) -> None:
        """From now on the training and validation sets give latents, kept in `directory` (see `ldm.data.cached`).

        Args:
            encode: pictures [B, H, W, C] in [-1, 1] -> float32 [B, c, h, w].
            identity: of the weights that encode.

        Raises:
            UserError: the data sets draw other augmentations than flips, or the disk is full.
        """
        for split in [s for s in STAGES["fit"] if s in self.configs]:
            self.setup("fit")
            strategy = {}
            if self.trainer is not None and self.trainer.world_size > 1:
                rank, world = self.trainer.global_rank, self.trainer.world_size
                strategy = {"rank": rank, "world": world, "barrier": self.trainer.strategy.barrier}
            if not isinstance(self.datasets[split], CachedLatents):
                self.datasets[split] = cache(
                    self.datasets[split], directory, split, encode, identity, self.batch_size, **strategy
                )

    @property
    def has_test(self) -> bool:
        """Whether there is a test set."""
        return "test" in self.configs

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set."""
        return "validation" in self.configs

    # -- what models ask for (values `auto` in the config) --

    def _about(self, name: str) -> Any:
        """An attribute of the first data set that has it, in the order train, validation, test, predict."""
        if not self.datasets:
            self.setup("fit" if {"train", "validation"} & set(self.configs) else None)
        found = (getattr(d, name, None) for d in self.datasets.values())
        return next((f for f in found if f is not None), None)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, None where the data set does not tell."""
        return self._about("class_names")

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None where the data set does not tell."""
        return self._about("num_classes")

    @property
    def words(self) -> list[str] | None:
        """The words of the captions, None where the data set does not tell."""
        return self._about("words")

    @property
    def channels(self) -> int | None:
        """1 (grey) or 3; of the first image if the data set does not tell."""
        return self._about("channels") or self._first_image_shape()[2]

    @property
    def size(self) -> int | list[int] | None:
        """Pixels, or [height, width] if they differ; of the first image if the data set does not tell."""
        size = self._about("size") or self._first_image_shape()[:2]
        if isinstance(size, int) or None in size:
            return size if isinstance(size, int) else None
        return int(size[0]) if size[0] == size[1] else [int(s) for s in size]

    def _first_image_shape(self) -> tuple[int | None, ...]:
        dataset = next(iter(self.datasets.values()), None)
        if dataset is None or isinstance(dataset, IterableDataset):
            return (None, None, None)
        sample = dataset[0]
        image = sample.get("image", sample.get("jpg")) if isinstance(sample, Mapping) else None
        return tuple(np.shape(image)) if image is not None and np.ndim(image) == 3 else (None, None, None)

    # -- loaders --

    def _train_dataloader(self) -> DataLoader:
        loader = self._loader("train")
        if isinstance(loader.sampler, EpochSampler):
            loader.sampler.follow(self.position)
        return loader

    def _val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def _test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _predict_dataloader(self) -> DataLoader:
        return self._loader("predict")

    def _loader(self, split: str) -> DataLoader:
        self.setup({"train": "fit", "validation": "validate"}.get(split, split))
        dataset, train = self.datasets[split], split == "train"
        workers = self._workers(dataset)
        streaming = isinstance(dataset, IterableDataset)
        sampler = None
        if not streaming:
            trainer = self.trainer
            world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
            shuffle = self.shuffled.get(split, False)
            sampler = EpochSampler(len(dataset), self.batch_size, shuffle, self.seed, world, rank, pad=train)
        split_streams = isinstance(dataset, Txt2ImgIterableBaseDataset) or self.use_worker_init_fn
        return (ResumableLoader if train else DataLoader)(
            dataset if streaming else Streamed(dataset, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self._on_gpu(),
            drop_last=self.drop_last and train,
            worker_init_fn=init_worker if split_streams else None,
            persistent_workers=workers > 0,
        )

    def _workers(self, dataset: Any) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if getattr(dataset, "in_memory", False):
            # Lightning would advise more workers, which here only copy
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            return 0
        share = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, min(MAX_WORKERS, available_cpus() // max(1, share)))

    def _on_gpu(self) -> bool:
        if self.trainer is not None:
            return self.trainer.strategy.root_device.type == "cuda"
        return torch.cuda.is_available()

    # -- resume --

    def position(self) -> tuple[int, int]:
        """(epoch, batch) that comes next: counted in batches trained on, whatever Lightning calls its epochs.

        Its own count skips a number after a restart between two epochs, and ends an epoch that max_steps cuts short.
        """
        epoch, batch = self._start
        trained = self._batches_trained() - self._resumed.get("total", 0)
        # without a Trainer, or before it has a loader, nothing was trained yet
        if self.trainer is None or not trained or self.trainer.num_training_batches == float("inf"):
            return epoch, batch
        per_epoch = int(self.trainer.num_training_batches)
        return divmod(epoch * per_epoch + batch + trained, per_epoch)

    def _batches_trained(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def state_dict(self) -> dict[str, int]:
        """The place in the data after the last batch that was trained on."""
        if self.trainer is None or self.trainer.num_training_batches == float("inf"):
            return {}
        epoch, batch = self.position()
        progress = self.trainer.fit_loop.epoch_progress.current
        return {
            "epoch": epoch,
            "batch": batch,
            "cut_short": int(batch > 0 and progress.processed >= progress.started),
            "total": self._batches_trained(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.trainer.world_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from a place that `state_dict` named, with the seed of that run."""
        self._resumed = dict(state_dict)
        self.seed = state_dict["seed"]
        self._start = state_dict["epoch"], state_dict["batch"]
        if state_dict["cut_short"] and self.trainer is not None and self.trainer.max_steps == -1:
            self._start = state_dict["epoch"] + 1, 0  # limited by epochs, Lightning starts a whole one
        world = self.trainer.world_size if self.trainer is not None else 1
        if self._start[1] and (state_dict["batch_size"], state_dict["world_size"]) != (self.batch_size, world):
            rank_zero_info(
                f"resumed within an epoch with batch_size {self.batch_size} x {world} instead of "
                f"{state_dict['batch_size']} x {state_dict['world_size']}: some images of this epoch are seen twice or "
                "not at all"
            )


def _native(cls: Any, name: str) -> Any:
    """A data set's own size or channels: its class attribute, or its parameter's default."""
    parameter = (accepted_params(cls) or {}).get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return getattr(cls, f"native_{name}", None) or default


def init_worker(worker_id: int) -> None:
    """Seeds NumPy in a worker, and gives it its own part of a streaming set's records."""
    info = get_worker_info()
    np.random.seed(info.seed % 2**32)
    dataset = info.dataset
    if isinstance(dataset, Txt2ImgIterableBaseDataset) and dataset.valid_ids is not None:
        part = len(dataset.valid_ids) // info.num_workers
        last = worker_id == info.num_workers - 1
        dataset.sample_ids = dataset.valid_ids[worker_id * part : None if last else (worker_id + 1) * part]
