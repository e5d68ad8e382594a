"""torchvision's data sets as dicts: downloaded if they are absent, or read from files that are in place."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ldm.data.base import ArrayDataset, Size, check_channels, data_dir, parse_size, resize_arrays, stratified_split
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.entries import Entries
from ldm.data.image import FileImages
from ldm.data.imagenet import find_imagenet, human_labels, imagenet_entries
from ldm.data.pixels import Fit
from ldm.data.sources import Folder
from ldm.util import UserError

log = logging.getLogger(__name__)

NET_TIMEOUT = 30.0  # seconds without an answer before a download counts as blocked
MNIST_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
# class: (files, where to get them, folder below data_root)
FILES = {
    "MNIST": (MNIST_FILES, "https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw"),
    "FashionMNIST": (
        MNIST_FILES,
        "https://github.com/zalandoresearch/fashion-mnist",
        "FashionMNIST/raw",
    ),
    "CIFAR10": ("cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html", ""),
    "CIFAR100": ("cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html", ""),
    "SVHN": ("{train,test}_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", ""),
    "CelebA": (
        "img_align_celeba.zip (unpacked), list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
        "list_landmarks_align_celeba.txt, list_eval_partition.txt",
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        "celeba",
    ),
}


def fetch(name: str, root: Path, download: bool, **options: Any) -> Any:
    """A torchvision data set, from the files in `root` or else downloaded there.

    Raises:
        UserError: neither works; the message names the files, where to get them and where to put them.
    """
    import torchvision

    cls = getattr(torchvision.datasets, name)
    try:
        return cls(str(root), download=False, **options)
    except (RuntimeError, OSError) as e:
        why = str(e)
    if download:
        log.info("downloading %s to %s", name, root)
        try:
            with _download_lock(root), _quiet_and_impatient():
                return cls(str(root), download=True, **options)
        except Exception as e:  # urllib, gdown, tarfile and torchvision each have their own
            why = f"the download failed: {type(e).__name__}: {e}"
    files, url, folder = FILES[name]
    raise UserError(
        f"{name} is not in {root} ({' '.join(why.split())[:200]}). Get {files} from {url} and put them into "
        f"{root / folder}; data_root or LDM_DATA sets another place"
    )


@contextlib.contextmanager
def _download_lock(root: Path) -> Iterator[None]:
    """One process downloads, the others wait and then find the files."""
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        yield


@contextlib.contextmanager
def _quiet_and_impatient() -> Iterator[None]:
    """torchvision prints each failed mirror, and waits for ever where a firewall drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NET_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def check_split(split: str, known: Sequence[str] = ("train", "validation", "test")) -> None:
    if split not in known:
        raise UserError(f"split must be one of {', '.join(known)}, got {split!r}")


class TorchvisionArrays(ArrayDataset):
    """A small torchvision set, decoded in memory.

    Batches hold `image` float32 [B, H, W, channels] in [-1, 1] and `class_label` int64 [B].

    Args:
        split: train, validation (a fixed, stratified part of torchvision's training set) or test.
        size: pixels, or [height, width]; None keeps the originals' size.
        channels: 1 or 3; None keeps the originals'.
        data_root: where the files are or go; default $LDM_DATA, else data/ in the working directory.
        download: fetch the files if they are absent.
        val_fraction: share of the training set that validates instead; 0 trains on all of it.
        flip_p: probability of a left-right flip; or `alternate`: each image in every other epoch.
        pad_crop: random shift by up to so many pixels, black outside.

    Raises:
        UserError: the files are absent and cannot be downloaded.
    """

    name = ""
    native_size, native_channels = 32, 3

    def __init__(
        self,
        split: str = "train",
        size: Size | None = None,
        channels: int | None = None,
        data_root: str | None = None,
        download: bool = True,
        val_fraction: float = 0.1,
        flip_p: float | str = 0.0,
        pad_crop: int = 0,
    ) -> None:
        check_split(split)
        if not 0 <= val_fraction < 1 or (split == "validation" and val_fraction == 0):
            raise UserError(f"val_fraction must be in [0, 1), and above 0 for split: validation; got {val_fraction!r}")
        root = Path(data_root).expanduser() if data_root else data_dir()
        images, labels, names = self.load(root, split != "test", download)
        if split != "test":
            parts = stratified_split(labels, {"validation": val_fraction, "train": 1 - val_fraction})
            images, labels = images[parts[split]], labels[parts[split]]
        pixels = resize_arrays(images, parse_size(size), check_channels(channels or self.native_channels))
        super().__init__(pixels, labels, names, flip_p, pad_crop)

    def load(self, root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """uint8 [N, H, W] or [N, H, W, C], labels [N], class names."""
        data = fetch(self.name, root, download, train=train)
        return np.asarray(data.data), np.asarray(data.targets, np.int64), [str(c) for c in data.classes]


class MNIST(TorchvisionArrays):
    name, native_size, native_channels = "MNIST", 28, 1

    def load(self, root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        images, labels, _ = super().load(root, train, download)
        return images, labels, [str(d) for d in range(10)]


class FashionMNIST(TorchvisionArrays):
    name, native_size, native_channels = "FashionMNIST", 28, 1


class CIFAR10(TorchvisionArrays):
    name = "CIFAR10"


class CIFAR100(TorchvisionArrays):
    name = "CIFAR100"


class SVHN(TorchvisionArrays):
    name = "SVHN"

    def load(self, root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        data = fetch(self.name, root, download, split="train" if train else "test")
        return data.data.transpose(0, 2, 3, 1), np.asarray(data.labels, np.int64), [str(d) for d in range(10)]


class CelebA(FileImages):
    """202,599 aligned faces with 40 attributes (Liu et al. 2015).

    Batches hold `image` float32 [B, H, W, channels] in [-1, 1], `attributes` int64 [B, 40] of 0 and 1, and
    `class_label` int64 [B]: one attribute, chosen by name.

    Args:
        split: train, validation or test.
        size: pixels, or [height, width]; the centre is cut.
        channels: 1 or 3.
        data_root: folder that holds celeba/; default $LDM_DATA, else data/ in the working directory.
        download: fetch the files if they are absent.
        attribute: the attribute that is the class.
        random_crop, flip_p, cache, cache_gb, max_unreadable: see ImageFolder.
    """

    def __init__(
        self,
        split: str = "train",
        size: Size = 64,
        channels: int = 3,
        data_root: str | None = None,
        download: bool = True,
        attribute: str = "Male",
        random_crop: bool = False,
        flip_p: float | str = 0.0,
        cache: str | bool = "auto",
        cache_gb: float = 2.0,
        max_unreadable: float = 0.05,
    ) -> None:
        check_split(split)
        root = Path(data_root).expanduser() if data_root else data_dir()
        part = {"train": "train", "validation": "valid", "test": "test"}[split]
        data = fetch("CelebA", root, download, split=part, target_type="attr")
        known = [a for a in data.attr_names if a]
        if attribute not in known:
            raise UserError(f"attribute must be one of {', '.join(known)}, got {attribute!r}")
        names = [str(f) for f in data.filename]
        attributes = np.asarray(data.attr, np.int64)[:, : len(known)]
        # class label and attributes travel together when unreadable files are left out
        self.attributes = dict(zip(names, attributes, strict=True))
        entries = Entries(names, attributes[:, known.index(attribute)], [f"not_{attribute}", attribute])
        fit = Fit(parse_size(size), check_channels(channels), random=random_crop)
        folder = Folder(root / "celeba" / "img_align_celeba", names)
        super().__init__(folder, entries, fit, flip_p, 0, cache, cache_gb, max_unreadable)

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        fields = super().fields(indices, draws)
        fields["attributes"] = torch.from_numpy(np.stack([self.attributes[n] for n in fields["relpath"]]))
        return fields


class ImageNet(FileImages):
    """ILSVRC 2012 in torchvision's layout, `data_root/{train,val}/<synset>/*.JPEG`.

    Batches hold `image` float32 [B, H, W, channels] in [-1, 1], `class_label` int64 [B], `relpath`.

    Args:
        split: train or validation; test is the validation set too (the test labels are not public).
        size: pixels, or [height, width].
        channels: 1 or 3.
        data_root: folder of train/ and val/; default `imagenet/` in the data folder.
        random_crop, flip_p, cache, cache_gb, max_unreadable: see ImageFolder.
    """

    def __init__(
        self,
        split: str = "train",
        size: Size = 224,
        channels: int = 3,
        data_root: str | None = None,
        random_crop: bool = False,
        flip_p: float | str = 0.0,
        cache: str | bool = "auto",
        cache_gb: float = 2.0,
        max_unreadable: float = 0.05,
    ) -> None:
        check_split(split)
        _unpack_imagenet(Path(data_root).expanduser() if data_root else data_dir() / "imagenet", split)
        place = find_imagenet("train" if split == "train" else "validation", data_root)
        source, entries = imagenet_entries(place, {})
        entries.class_names = human_labels(place, entries.class_names)
        fit = Fit(parse_size(size), check_channels(channels), random=random_crop)
        super().__init__(source, entries, fit, flip_p, 0, cache, cache_gb, max_unreadable)


def _unpack_imagenet(root: Path, split: str) -> None:
    """Lets torchvision unpack the archives, if they are there and their folder is not."""
    short = "train" if split == "train" else "val"
    if (root / short).is_dir() or not (root / f"ILSVRC2012_img_{short}.tar").is_file():
        return
    import torchvision

    log.info("unpacking ImageNet (%s) in %s: this takes a while", short, root)
    try:
        with _download_lock(root), contextlib.redirect_stdout(io.StringIO()):
            torchvision.datasets.ImageNet(str(root), split=short)
    except (RuntimeError, OSError) as e:
        raise UserError(
            f"the ImageNet archives in {root} cannot be unpacked ({' '.join(str(e).split())[:200]}): "
            f"ILSVRC2012_img_{short}.tar and ILSVRC2012_devkit_t12.tar.gz must both be there and complete"
        ) from e


class MNISTPairs(MNIST):
    """MNIST under the keys of generative-models: `jpg` and `cls`."""

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        batch = super().get_batch(indices, stream)
        return {"jpg": batch["image"], "cls": batch["class_label"]}


class MNISTLoader(DataModuleFromConfig):
    """The data module of generative-models' toy configs: `jpg` float32 [B, 28, 28, 1] in [-1, 1], `cls` int64 [B].

    All 60,000 training images train; the test images validate and test.

    Args:
        batch_size: images a batch, on each device.
        num_workers: processes; 0 is fastest, as the images are in memory.
        prefetch_factor: batches that each process keeps ready.
        shuffle: random order in training.
        data_root: where the files are or go; default $LDM_DATA, else data/ in the working directory.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        shuffle: bool = True,
        data_root: str | None = None,
    ) -> None:
        target = "ldm.data.vision.MNISTPairs"
        train = {"target": target, "params": {"split": "train", "val_fraction": 0.0, "data_root": data_root}}
        test = {"target": target, "params": {"split": "test", "data_root": data_root}}
        super().__init__(batch_size, train, test, test, num_workers=num_workers)
        self.shuffled["train"], self.prefetch_factor = shuffle, prefetch_factor

    def _loader(self, split: str) -> DataLoader:
        loader = super()._loader(split)
        if loader.num_workers > 0:
            loader.prefetch_factor = self.prefetch_factor
        return loader
