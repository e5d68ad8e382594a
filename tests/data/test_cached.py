"""CachedLatents: each picture and its mirror image are encoded once, for one first stage."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import cached
from ldm.data.builtin import Digits
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.image import ImageFolder
from ldm.data.imagenet import ImageNetSRTrain
from ldm.data.masks import RandomMasks
from ldm.util import UserError


class Halved:
    """A first stage that averages 2x2 pixels, and counts what it is given."""

    def __init__(self):
        self.pictures = 0

    def __call__(self, x):
        self.pictures += len(x)
        assert x.abs().max() <= 1
        return torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2)


@pytest.mark.parametrize(("flip_p", "variants"), [(0.0, 1), (0.3, 2), (1.0, 1)])
def test_latents_are_those_of_the_augmented_picture(tmp_path, flip_p, variants):
    data, encode = Digits("validation", flip_p=flip_p), Halved()
    fast = cached.cache(data, tmp_path, "train", encode, "v1", batch_size=50)
    assert encode.pictures == variants * (180 + 1)  # one more to learn the shape
    for stream in (0, 7):
        indices = [5, 179, 0, 42, 5]
        slow = data.get_batch(indices, stream)
        batch = fast.get_batch(indices, stream)
        torch.testing.assert_close(batch["latents"], encode(slow.pop("image")))
        assert set(batch) == {"latents", *slow} and torch.equal(batch["class_label"], slow["class_label"])
    assert fast[3]["latents"].shape == (1, 8, 8) and len(fast) == 180
    assert fast.class_names == data.class_names and fast.num_classes == 10 and fast.in_memory


def test_the_second_run_encodes_nothing(tmp_path):
    cached.cache(Digits("validation"), tmp_path, "train", Halved(), "v1")
    again = Halved()
    cached.cache(Digits("validation"), tmp_path, "train", again, "v1")
    assert again.pictures == 0
    for other in ({"identity": "v2"}, {"dataset": Digits("test")}, {"dataset": Digits("validation", size=20)},
                  {"dataset": Digits("validation", flip_p=0.5)}, {"split": "validation"}):  # fmt: skip
        asked = {"dataset": Digits("validation"), "split": "train", "identity": "v1", "encode": Halved(), **other}
        cached.cache(directory=tmp_path, **asked)
        assert asked["encode"].pictures >= 180, other


def test_interrupted_work_goes_on(tmp_path):
    class Stops(Halved):
        def __call__(self, x):
            if self.pictures > 100:
                raise KeyboardInterrupt
            return super().__call__(x)

    with pytest.raises(KeyboardInterrupt):
        cached.cache(Digits("validation"), tmp_path, "train", Stops(), "v1")
    rest = Halved()
    fast = cached.cache(Digits("validation"), tmp_path, "train", rest, "v1")
    assert 0 < rest.pictures < 100
    slow = Digits("validation").get_batch(range(180))
    torch.testing.assert_close(fast.get_batch(range(180))["latents"], Halved()(slow["image"]))


def test_processes_share_the_work(tmp_path):
    parts = [Halved(), Halved()]
    for rank, encode in enumerate(parts):
        fast = cached.cache(Digits("validation"), tmp_path, "train", encode, "v1", rank=rank, world=2)
    assert parts[0].pictures == 91 and parts[1].pictures <= 90
    torch.testing.assert_close(
        fast.get_batch(range(0, 180, 2))["latents"], Halved()(Digits("validation").get_batch(range(0, 180, 2))["image"])
    )


def pictures(folder, n=12):
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}\nthe {i}th picture")
    return str(folder)


def test_captions_stay(tmp_path):
    data = ImageFolder(pictures(tmp_path), size=16, flip_p=0.5)
    fast = cached.cache(data, tmp_path / "cache", "train", Halved(), "v1")
    slow, batch = (d.get_batch(range(12), 3) for d in (data, fast))
    assert batch["caption"] == slow["caption"] and batch["relpath"] == slow["relpath"]


def test_augmentations_without_end_are_refused(tmp_path):
    root = pictures(tmp_path)
    refused = {
        "pad_crop: 2": Digits("validation", pad_crop=2),
        "random_crop: true": ImageFolder(root, size=16, random_crop=True),
        "second map, LR_image": ImageNetSRTrain(size=16, degradation="pil_bicubic", root=root),
        "is a RandomMasks": RandomMasks({"target": "ldm.data.builtin.Digits"}),
        "is a list": [{"image": torch.zeros(16, 16, 1)}],
    }
    for message, data in refused.items():
        with pytest.raises(UserError, match=message):
            cached.cache(data, tmp_path / "cache", "train", Halved(), "v1")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot hold"):
        cached.cache(Digits("validation"), tmp_path / "file", "train", Halved(), "v1")


def test_the_data_module_serves_latents(tmp_path):
    config = lambda split: {"target": "ldm.data.builtin.Digits", "params": {"split": split}}  # noqa: E731
    data = DataModuleFromConfig(8, config("train"), config("validation"))
    plain = next(iter(data.train_dataloader()))
    encode = Halved()
    for _ in range(2):
        data.cache_latents(str(tmp_path), encode, "v1")
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(batch["latents"], Halved()(plain["image"]))
    assert torch.equal(batch["class_label"], plain["class_label"]) and data.num_classes == 10
    assert next(iter(data.val_dataloader()))["latents"].shape == (8, 1, 8, 8)
    assert encode.pictures == 1257 + 180 + 2
