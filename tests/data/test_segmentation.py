"""SegmentationFolder: pictures and masks stay together, and every fault has its message."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.segmentation import SegmentationFolder, mask_of
from ldm.util import UserError
from tests.data.scenes import COLOURS, make_scenes


def nearest_colour(image):
    """[B, H, W, 3] in [-1, 1] -> labels by colour."""
    pixels = (image + 1) * 127.5
    distance = ((pixels[..., None, :] - torch.tensor(COLOURS).float()) ** 2).sum(-1)
    return distance.argmin(-1)


def test_pictures_and_masks_are_cut_and_mirrored_alike(tmp_path):
    data = SegmentationFolder(make_scenes(tmp_path), size=32, random_crop=True, flip_p=0.5)
    assert data.class_names == ["ground", "red box", "blue box"] and len(data) == 12
    batches = [data.get_batch(range(12), stream) for stream in (1, 2)]
    for b in batches:
        assert b["image"].shape == (12, 32, 32, 3)
        assert b["mask"].shape == (12, 32, 32) and b["mask"].dtype == torch.int64
        counts = b["mask"] != 255
        right = (nearest_colour(b["image"]) == b["mask"])[counts].float().mean()
        assert right > 0.93  # all but the blurred edges of the boxes
    assert not torch.equal(batches[0]["mask"], batches[1]["mask"])


def test_splits_and_names(tmp_path):
    make_scenes(tmp_path, 6, folder="train", names=None)
    make_scenes(tmp_path, 3, folder="val", names=None)
    train, val = (SegmentationFolder(tmp_path, split=s, size=16) for s in ("train", "validation"))
    assert (len(train), len(val)) == (6, 3) and train.class_names == val.class_names == ["0", "1", "2"]
    assert mask_of("train/images/a.b.jpg") == "train/masks/a.b.png"
    flat = SegmentationFolder(make_scenes(tmp_path / "flat", 20), split="train", size=16, val_fraction=0.2)
    rest = SegmentationFolder(tmp_path / "flat", split="validation", size=16, val_fraction=0.2)
    assert len(flat) + len(rest) == 20 and not set(flat.entries.names) & set(rest.entries.names)


def test_masks_with_a_palette(tmp_path):
    make_scenes(tmp_path)
    labels = np.asarray(Image.open(tmp_path / "masks/0.png"))
    image = Image.fromarray(labels, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [9] * 759)
    image.save(tmp_path / "masks/0.png")
    data = SegmentationFolder(tmp_path, size=40)
    assert set(data[0]["mask"].unique().tolist()) <= {0, 1, 2, 255}


def test_faults(tmp_path):
    with pytest.raises(UserError, match=r"no pictures in .*images\nexpected\n  ROOT/images/a.jpg"):
        SegmentationFolder(tmp_path)
    make_scenes(tmp_path)
    (tmp_path / "masks/3.png").rename(tmp_path / "masks/x.png")
    with pytest.raises(UserError, match=r"1 of 12 pictures have no mask, e.g. .*3.png"):
        SegmentationFolder(tmp_path)
    (tmp_path / "masks/x.png").rename(tmp_path / "masks/3.png")
    Image.new("L", (20, 20)).save(tmp_path / "masks/4.png")
    with pytest.raises(UserError, match=r"4.png is 20x20, its picture 40x48"):
        SegmentationFolder(tmp_path, size=16).get_batch(range(12))
    make_scenes(tmp_path, names=("ground", "red box"))
    with pytest.raises(UserError, match=r"holds the label 2, but classes.txt names 2 classes \(0 to 1; 255"):
        SegmentationFolder(tmp_path, size=16).get_batch(range(12))
    Image.new("RGB", (48, 40)).save(tmp_path / "masks/0.png")
    with pytest.raises(UserError, match="must hold one label of 0 to 255 for each pixel"):
        SegmentationFolder(tmp_path, size=16).get_batch([0, 1])


def test_a_picture_that_breaks_later_is_replaced(tmp_path, caplog):
    data = SegmentationFolder(make_scenes(tmp_path), size=16)
    (tmp_path / data.entries.names[2]).write_bytes(b"broken")
    batch = data.get_batch([2])
    assert batch["relpath"] == [data.entries.names[3]] and "another image takes its place" in caplog.text
