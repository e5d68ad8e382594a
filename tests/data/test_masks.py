"""RandomMasks: masks and masked pictures beside those of any image data set."""

import numpy as np
import pytest
import torch

from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.masks import RandomMasks
from ldm.util import ConfigError, UserError

DIGITS = {"target": "ldm.data.builtin.Digits", "params": {"split": "validation", "size": 32}}


@pytest.mark.parametrize("kind", ["mixed", "strokes", "boxes", "all"])
def test_masks(kind):
    data = RandomMasks(DIGITS, kind=kind, channels=3)
    batch = data.get_batch(range(64), stream=5)
    mask = batch["mask"]
    assert mask.shape == (64, 32, 32, 1) and mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}
    share = mask.mean(dim=(1, 2, 3))
    assert (share > 0).all()
    full = int((share == 1).sum())
    assert full == 64 if kind == "all" else 6 <= full <= 28 if kind == "mixed" else full == 0
    assert torch.equal(batch["masked_image"], batch["image"] * (1 - mask))
    assert batch["image"].shape == (64, 32, 32, 3) and batch["class_label"].shape == (64,)
    if kind != "all":
        assert len({m.numpy().tobytes() for m in mask}) > 32


def test_a_mask_depends_on_its_picture_and_epoch_alone():
    data = RandomMasks(DIGITS)
    assert torch.equal(data.get_batch([3, 7], stream=1)["mask"][1], data.get_batch([7], stream=1)["mask"][0])
    assert not torch.equal(data.get_batch(range(8), stream=1)["mask"], data.get_batch(range(8), stream=2)["mask"])
    fixed = RandomMasks(DIGITS, seed=0)
    assert torch.equal(fixed.get_batch(range(8), stream=1)["mask"], fixed.get_batch(range(8), stream=2)["mask"])
    sample = data[-1]
    assert sample["mask"].shape == (32, 32, 1) and torch.equal(sample["image"], data.dataset[179]["image"])


def test_the_share_of_full_masks():
    data = RandomMasks(DIGITS, full=0.0)
    assert all(float(m.mean()) < 1 for m in data.get_batch(range(64))["mask"])
    assert RandomMasks(DIGITS, full=1.0).get_batch(range(8))["mask"].min() == 1


def test_it_stands_for_its_data_set():
    data = RandomMasks({"target": "ldm.data.builtin.Digits"}, size=20, channels=3)
    assert len(data) == 1257 and data.size == (20, 20) and data.channels == 3
    assert data.class_names == [str(i) for i in range(10)] and data.num_classes == 10 and data.in_memory


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "blobs"}, "kind must be one of"),
        ({"full": 2}, "full must be a share"),
        ({"dataset": {"target": "torch.utils.data.TensorDataset"}}, "none of this project's"),
        ({"dataset": {"target": "ldm.data.builtin.Digit"}}, "Digits"),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises((UserError, ConfigError), match=message):
        RandomMasks(**{"dataset": DIGITS, **params})


def test_root_reaches_the_data_set(tmp_path):
    from PIL import Image

    for i in range(20):
        colour = tuple(int(v) for v in np.random.default_rng(i).integers(0, 255, 3))
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    folder = lambda split: {  # noqa: E731
        "target": "ldm.data.masks.RandomMasks",
        "params": {"dataset": {"target": "ldm.data.image.ImageFolder", "params": {"split": split}}},
    }
    data = DataModuleFromConfig(4, folder("train"), folder("validation"), root=str(tmp_path), size=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["masked_image"].shape == (4, 16, 16, 3) and batch["caption"][0].startswith("picture")
    assert len(data.datasets["train"]) + len(data.datasets["validation"]) == 20
