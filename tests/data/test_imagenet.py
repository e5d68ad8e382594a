import numpy as np
import pytest
import torch

from ldm.data import imagenet, lsun
from ldm.util import UserError, get_obj_from_str
from tests.data.pictures import fill

SYNSETS = ("n01440764", "n01443537", "n02102040")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a small ImageNet in torchvision's layout."""
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, n in (("train", 4), ("val", 2)):
        for synset in SYNSETS:
            fill(tmp_path / "imagenet" / part / synset, n, "jpg", (40, 50))
    (tmp_path / "imagenet" / "synset_human.txt").write_text("n01440764 tench\nn01443537 goldfish, Carassius\n")
    return tmp_path


def test_imagenet_has_the_official_keys(data):
    train = imagenet.ImageNetTrain(config={"size": 32})
    batch = train.get_batch([0, 5, 11], stream=1)
    assert len(train) == 12 and batch["image"].shape == (3, 32, 32, 3)
    assert batch["class_label"].tolist() == [0, 1, 2] and batch["synsets"] == list(SYNSETS)
    assert batch["human_label"] == ["tench", "goldfish, Carassius", "n02102040"]
    assert batch["relpath"][0] == "n01440764/0000.jpg" and batch["file_path_"][0].startswith(str(data))
    assert len(imagenet.ImageNetValidation(config={"size": 32})) == 6


def test_train_is_cut_at_random_and_validation_in_the_centre(data):
    train, held = imagenet.ImageNetTrain({"size": 32}), imagenet.ImageNetValidation({"size": 32})
    assert not torch.equal(train.get_batch([0], 1)["image"], train.get_batch([0], 2)["image"])
    assert torch.equal(held.get_batch([0], 1)["image"], held.get_batch([0], 2)["image"])
    centred = imagenet.ImageNetTrain({"size": 32, "ImageNetTrain": {"random_crop": False}})
    assert torch.equal(centred.get_batch([0], 1)["image"], centred.get_batch([0], 2)["image"])


def test_some_classes_only(data):
    some = imagenet.ImageNetTrain({"size": 16, "sub_indices": "0, 2"})
    assert len(some) == 8 and some.num_classes == 2 and set(some.entries.labels) == {0, 1}
    kept = imagenet.ImageNetTrain({"size": 16, "sub_indices": "1-2", "keep_orig_class_label": True})
    assert set(kept.entries.labels) == {1, 2} and kept.num_classes == 3
    for text, message in (("a", "must look like"), ("0-9", "names class 9, but there are 3")):
        with pytest.raises(UserError, match=message):
            imagenet.ImageNetTrain({"size": 16, "sub_indices": text})


def test_the_official_cache_folder_is_found(data, tmp_path):
    official = tmp_path / "cache/autoencoders/data/ILSVRC2012_validation/data"
    official.parent.mkdir(parents=True)
    (tmp_path / "imagenet/val").rename(official)
    assert len(imagenet.ImageNetValidation({"size": 16})) == 6


def test_missing_imagenet_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match="ILSVRC2012_img_train.tar .* https://image-net.org .*data.params.root=FOLDER"
    ) as e:
        imagenet.ImageNetTrain({"size": 16})
    assert str(tmp_path / "none" / "imagenet" / "train") in str(e.value)
    with pytest.raises(UserError, match="unknown key config.sise"):
        imagenet.ImageNetTrain({"sise": 16})


@pytest.mark.parametrize("degradation", ["pil_nearest", "cv_bicubic", "bsrgan_light"])
def test_super_resolution_pairs(data, degradation):
    pairs = imagenet.ImageNetSRTrain(size=32, degradation=degradation)
    batch = pairs.get_batch([0, 7, 7], stream=3)
    assert batch["image"].shape == (3, 32, 32, 3) and batch["LR_image"].shape == (3, 8, 8, 3)
    for key in ("image", "LR_image"):
        assert batch[key].dtype == torch.float32 and batch[key].min() >= -1 and batch[key].max() <= 1
    assert torch.equal(batch["LR_image"][1], batch["LR_image"][2])
    assert batch["class_label"].tolist() == [0, 1, 1] and batch["caption"][0] == "tench"
    again, other = pairs.get_batch([0], 3), pairs.get_batch([0], 4)
    assert torch.equal(again["LR_image"][0], batch["LR_image"][0])
    assert not torch.equal(other["image"], again["image"])


def test_the_small_image_shows_the_same_cut(data):
    batch = imagenet.ImageNetSRValidation(size=32, degradation="cv_area").get_batch(range(6), 5)
    mean = batch["image"].unflatten(1, (8, 4)).unflatten(3, (8, 4)).mean((2, 4))
    assert (mean - batch["LR_image"]).abs().max() < 0.02


def test_crop_range_and_centre(data):
    whole = {"size": 32, "degradation": "pil_box", "min_crop_f": 1.0, "max_crop_f": 1.0, "random_crop": False}
    pairs = imagenet.ImageNetSRTrain(**whole)
    assert torch.equal(pairs.get_batch([0], 1)["image"], pairs.get_batch([0], 2)["image"])
    assert imagenet.ImageNetSRTrain(size=32, degradation="pil_box", downscale_f=2)[0]["LR_image"].shape == (16, 16, 3)


def test_own_pictures_and_chosen_ones(data, tmp_path):
    fill(tmp_path / "mine", 20)
    sizes = [
        len(c(size=16, degradation="pil_box", root=str(tmp_path / "mine")))
        for c in (imagenet.ImageNetSRTrain, imagenet.ImageNetSRValidation)
    ]
    assert sum(sizes) == 20 and min(sizes) > 0
    (tmp_path / "imagenet_train_hr_indices.txt").write_text("1\n11\n")
    chosen = imagenet.ImageNetSRTrain(size=16, degradation="pil_box")
    assert chosen.entries.names == ["n01440764/0001.jpg", "n02102040/0003.jpg"]
    (tmp_path / "imagenet_train_hr_indices.txt").write_text("99\n")
    with pytest.raises(UserError, match="must hold image numbers below 12"):
        imagenet.ImageNetSRTrain(size=16, degradation="pil_box")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degradation": "bicubic"}, "degradation must be one of bsrgan"),
        ({"degradation": None}, "degradation must be one of bsrgan"),
        ({"size": 30}, "size must be a multiple of downscale_f = 4"),
        ({"size": None}, "needs size"),
        ({"min_crop_f": 0.9, "max_crop_f": 0.5}, "min_crop_f <= max_crop_f"),
    ],
)
def test_wrong_super_resolution_settings(data, options, message):
    with pytest.raises(UserError, match=message):
        imagenet.ImageNetSRTrain(**{"size": 32, "degradation": "pil_box", **options})


# --- LSUN ---


@pytest.mark.parametrize("name", ["Churches", "Bedrooms", "Cats"])
def test_lsun_lists(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    train_class, held_class = (get_obj_from_str(f"ldm.data.lsun.LSUN{name}{s}") for s in ("Train", "Validation"))
    assert issubclass(train_class, lsun.LSUNBase)
    fill(tmp_path / train_class.folder, 5, "jpg", (30, 50))
    (tmp_path / train_class.lists["train"]).write_text("0000.jpg\n0001.jpg\n0003.jpg\n")
    with pytest.raises(
        UserError, match=f"{held_class.__name__} needs its images in .*{held_class.lists['validation']}"
    ):
        held_class(size=16)
    (tmp_path / train_class.lists["validation"]).write_text("0002.jpg\n")
    train, held = train_class(size=16), held_class(size=16)
    assert (len(train), len(held), train.flip_p, held.flip_p) == (3, 1, 0.5, 0.0)
    batch = train.get_batch([2])
    assert batch["relative_file_path_"] == ["0003.jpg"] and batch["file_path_"][0].endswith("0003.jpg")
    assert batch["image"].shape == (1, 16, 16, 3)


def test_lsun_interpolations_and_flip(tmp_path):
    fill(tmp_path, 1, size=(40, 40))
    options = {"txt_file": str(tmp_path / "l.txt"), "data_root": str(tmp_path), "size": 16}
    (tmp_path / "l.txt").write_text("0000.png\n")
    for name in ("linear", "bilinear", "bicubic", "lanczos"):
        assert lsun.LSUNCatsTrain(**options, interpolation=name)[0]["image"].shape == (16, 16, 3)
    plain, turned = (lsun.LSUNCatsTrain(**options, flip_p=p)[0]["image"] for p in (0.0, 1.0))
    assert torch.equal(turned, plain.flip(1))
    assert np.isclose(
        lsun.LSUNCatsTrain(txt_file=options["txt_file"], data_root=str(tmp_path))[0]["image"].shape, (40, 40, 3)
    ).all()
