import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from ldm.data import vision
from ldm.util import UserError
from tests.data.pictures import fill


def idx(array):
    """MNIST's file format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist_files(folder, n=60):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("t10k", n // 3)):
        labels = np.arange(count) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (count, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.mark.parametrize(("cls", "folder"), [(vision.MNIST, "MNIST"), (vision.FashionMNIST, "FashionMNIST")])
def test_mnist_from_files_in_place(tmp_path, cls, folder):
    mnist_files(tmp_path / folder / "raw")
    parts = {s: cls(s, data_root=str(tmp_path), val_fraction=0.5) for s in ("train", "validation", "test")}
    assert {s: len(d) for s, d in parts.items()} == {"train": 30, "validation": 30, "test": 20}
    batch = parts["train"].get_batch([0, 1])
    assert batch["image"].shape == (2, 28, 28, 1) and batch["class_label"].dtype == torch.int64
    assert parts["test"].num_classes == 10
    assert len(cls("train", data_root=str(tmp_path), val_fraction=0.0)) == 60
    big = cls("test", size=32, channels=3, data_root=str(tmp_path))
    assert big[0]["image"].shape == (32, 32, 3)


def test_default_root_is_the_data_folder(tmp_path, monkeypatch):
    mnist_files(tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.delenv("LDM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert len(vision.MNIST("test")) == 20
    monkeypatch.chdir("/")
    monkeypatch.setenv("LDM_DATA", str(tmp_path / "data"))
    assert vision.MNIST("test").class_names == list("0123456789")


def cifar_files(root, cls, monkeypatch):
    """A small copy in torchvision's format, with its checksums."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = cls.meta["key"]

    def dump(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    def part(n):
        labels = "fine_labels" if key == "fine_label_names" else "labels"
        return {"data": rng.integers(0, 256, (n, 3072)).astype(np.uint8), labels: [i % 10 for i in range(n)]}

    train = [dump(cls.train_list[0][0], part(40))]
    test = [dump(cls.test_list[0][0], part(20))]
    name, checksum = dump(cls.meta["filename"], {key: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(cls, "train_list", train)
    monkeypatch.setattr(cls, "test_list", test)
    monkeypatch.setattr(cls, "meta", {"filename": name, "key": key, "md5": checksum})


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_from_files_in_place(tmp_path, monkeypatch, name):
    cifar_files(tmp_path, getattr(torchvision.datasets, name), monkeypatch)
    cls = getattr(vision, name)
    train, test = cls("train", data_root=str(tmp_path), flip_p=0.5, pad_crop=4), cls("test", data_root=str(tmp_path))
    assert len(train) == 36 and len(test) == 20 and test.class_names[3] == "class 3"
    batch = test.get_batch(range(20))
    assert batch["image"].shape == (20, 32, 32, 3) and batch["class_label"].tolist() == [i % 10 for i in range(20)]
    original = getattr(torchvision.datasets, name)(str(tmp_path), train=False).data
    assert torch.equal(test.images, torch.from_numpy(original))


def test_svhn_from_files_in_place(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lists = {}
    for part in ("train", "test"):
        buffer = io.BytesIO()
        images, labels = rng.integers(0, 256, (32, 32, 3, 20)).astype(np.uint8), np.arange(1, 21)[:, None] % 10 + 1
        scipy.io.savemat(buffer, {"X": images, "y": labels.astype(np.uint8)})
        (tmp_path / f"{part}_32x32.mat").write_bytes(buffer.getvalue())
        lists[part] = ["http://nowhere", f"{part}_32x32.mat", hashlib.md5(buffer.getvalue()).hexdigest()]
        if part == "test":
            first = images[..., 0]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    test = vision.SVHN("test", data_root=str(tmp_path))
    assert (test.images[0].numpy() == first).all() and test.labels.max() == 9 and test.labels.min() == 0


def test_celeba_from_files_in_place(tmp_path, monkeypatch):
    folder = tmp_path / "celeba"
    fill(folder / "img_align_celeba", 6, "jpg", (54, 44), start=1)
    fill(folder / "img_align_celeba", 2, "jpg", (54, 44), start=7)
    names = [f"{i:04d}.jpg" for i in range(1, 9)]
    attributes = "Male Smiling"
    values = [[1, -1], [-1, -1], [1, 1], [-1, 1], [1, 1], [-1, -1], [1, 1], [-1, -1]]
    table = "\n".join(f"{n} {a} {b}" for n, (a, b) in zip(names, values, strict=True))
    (folder / "list_attr_celeba.txt").write_text(f"8\n{attributes}\n{table}\n")
    parts = (0, 0, 0, 0, 1, 1, 2, 2)
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, parts, strict=True)))
    for name, columns in (("identity_CelebA", 1), ("list_bbox_celeba", 4), ("list_landmarks_align_celeba", 10)):
        head = "" if columns == 1 else "8\n" + " ".join(f"c{i}" for i in range(columns)) + "\n"
        (folder / f"{name}.txt").write_text(head + "".join(f"{n} {' '.join(['1'] * columns)}\n" for n in names))
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    train = vision.CelebA("train", size=32, data_root=str(tmp_path))
    batch = train.get_batch(range(4))
    assert batch["image"].shape == (4, 32, 32, 3) and batch["attributes"].tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]
    assert batch["class_label"].tolist() == [1, 0, 1, 0] and train.class_names == ["not_Male", "Male"]
    smiling = vision.CelebA("validation", size=32, data_root=str(tmp_path), attribute="Smiling")
    assert smiling[0]["class_label"] == 1 and len(vision.CelebA("test", data_root=str(tmp_path))) == 2
    with pytest.raises(UserError, match="attribute must be one of Male, Smiling"):
        vision.CelebA("train", data_root=str(tmp_path), attribute="Bald")


def test_imagenet_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    for part in ("train", "val"):
        for synset in ("n01440764", "n01443537"):
            fill(tmp_path / "imagenet" / part / synset, 2, "jpg")
    train = vision.ImageNet(size=16)
    assert len(train) == 4 and train.get_batch([3])["class_label"].tolist() == [1]
    assert vision.ImageNet("test", size=16).source.root.endswith("val")


def test_broken_imagenet_archives_are_told(tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w"):
        pass
    with pytest.raises(UserError, match="ILSVRC2012_devkit_t12.tar.gz must both be there"):
        vision.ImageNet("validation", size=16, data_root=str(tmp_path))


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN", "CelebA"])
def test_a_blocked_network_gives_one_clear_error(tmp_path, name, capsys):
    files, url, folder = vision.FILES[name]
    with pytest.raises(UserError) as e:
        getattr(vision, name)(data_root=str(tmp_path))
    message = str(e.value)
    assert f"Get {files} from {url} and put them into {tmp_path / folder}" in message
    assert message.count("\n") == 0
    assert capsys.readouterr().out == ""


def test_without_download_nothing_is_tried(tmp_path):
    with pytest.raises(UserError, match="MNIST is not in .* Get ") as e:
        vision.MNIST(data_root=str(tmp_path), download=False)
    assert "download failed" not in str(e.value) and not list(tmp_path.iterdir())


def test_half_a_file_is_no_data_set(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    with gzip.open(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz", "w") as f:
        f.write(b"half")
    with pytest.raises(UserError, match="MNIST is not in"):
        vision.MNIST(data_root=str(tmp_path))


def test_wrong_settings(tmp_path):
    with pytest.raises(UserError, match="split must be one of train, validation, test, got 'val'"):
        vision.CIFAR10("val", data_root=str(tmp_path))
    with pytest.raises(UserError, match="val_fraction must be in"):
        vision.CIFAR10("validation", val_fraction=0.0, data_root=str(tmp_path))


def test_the_toy_data_module_of_generative_models(tmp_path):
    mnist_files(tmp_path / "MNIST" / "raw")
    data = vision.MNISTLoader(8, num_workers=1, prefetch_factor=3, data_root=str(tmp_path))
    data.setup("fit")
    train, held = data.train_dataloader(), data.val_dataloader()
    assert len(train.dataset) == 60 and len(held.dataset) == 20 and train.prefetch_factor == 3
    batch = next(iter(vision.MNISTLoader(8, data_root=str(tmp_path)).train_dataloader()))
    assert set(batch) == {"jpg", "cls"} and batch["jpg"].shape == (8, 28, 28, 1)
    assert batch["jpg"].dtype == torch.float32 and batch["jpg"].abs().max() <= 1 and batch["cls"].dtype == torch.int64
    orders = []
    for shuffle in (False, True):
        loader = vision.MNISTLoader(60, data_root=str(tmp_path), shuffle=shuffle).train_dataloader()
        orders.append(next(iter(loader))["cls"])
    assert torch.equal(orders[0], torch.arange(60) % 10) and not torch.equal(*orders)
