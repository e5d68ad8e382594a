import csv

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import annotated
from ldm.data.annotated import AnnotatedObjectsOpenImages
from ldm.util import UserError

COLUMNS = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsGroupOf", "IsDepiction", "IsInside"]
NAMES = {"/m/1": "Man", "/m/2": "Person", "/m/3": "Tree", "/m/4": "Speck"}
ROWS = [
    ("a", "/m/1", 0.0, 0.5, 0.0, 0.5, 0, 1, 0, 0),
    ("a", "/m/3", 0.75, 1.0, 0.0, 1.0, 1, 0, 0, 1),
    ("b", "/m/2", 0.2, 0.4, 0.2, 0.4, 0, 0, 0, 0),
    ("c", "/m/3", 0.1, 0.9, 0.1, 0.9, 0, 0, 0, 0),
    ("c", "/m/4", 0.1, 0.101, 0.1, 0.101, 0, 0, 0, 0),
    ("absent", "/m/3", 0.1, 0.9, 0.1, 0.9, 0, 0, 0, 0),
]


@pytest.fixture
def root(tmp_path):
    for split in ("train", "validation"):
        with (tmp_path / f"{split}-annotations-bbox.csv").open("w", newline="") as f:
            csv.writer(f).writerows([COLUMNS, *ROWS])
    with (tmp_path / "class-descriptions-boxable.csv").open("w", newline="") as f:
        csv.writer(f).writerows(NAMES.items())
    (tmp_path / "images").mkdir()
    for name, size in (("a", (40, 20)), ("b", (20, 20)), ("c", (20, 30))):
        ramp = np.tile(np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None], (size[1], 1, 3))
        Image.fromarray(ramp).save(tmp_path / "images" / f"{name}.jpg", quality=95)
    return tmp_path


def build(root, **options):
    given = {
        "split": "train", "keys": None, "target_image_size": 16, "min_object_area": 1e-4, "min_objects_per_image": 1,
        "max_objects_per_image": 3, "crop_method": "none", "random_flip": False, "no_tokens": 101, "encode_crop": True,
        "use_group_parameter": True, "use_additional_parameters": True, "category_mapping_target": annotated.UNIFIED,
        "category_allow_list_target": annotated.TOP_300,
    }  # fmt: skip
    return AnnotatedObjectsOpenImages(str(root), **{**given, **options})


def test_objects_are_tokens(root):
    data = build(root)
    # no_tokens 101: ten places along a side, 100 fills the rest; categories Person, Speck, Tree
    assert data.category_names == {"Person": 0, "Speck": 1, "Tree": 2} and len(data) == 3
    batch = data.get_batch([0, 1])
    assert batch["image"].shape == (2, 16, 16, 3) and batch["image"].dtype == torch.float32
    assert batch["file_name"] == ["a.jpg", "b.jpg"] and batch["annotations"] == [["Person", "Tree"], ["Person"]]
    person, tree = [0 + 3 * 1, 0, 44], [2 + 3 * (2 + 8), 7, 99]
    assert batch["objects_bbox"][0].tolist() == [*person, *tree, 100, 100, 100, 0, 99]
    assert batch["objects_bbox"].dtype == torch.int64 and batch["objects_bbox"].shape == (2, 11)
    assert set(build(root, keys=["image", "objects_bbox"]).get_batch([0])) == {"image", "objects_bbox"}
    plain = build(root, encode_crop=False, use_group_parameter=False, use_additional_parameters=False)
    assert plain.get_batch([0])["objects_bbox"][0].tolist() == [0, 0, 44, 2, 7, 99, 100, 100, 100]


def test_boxes_follow_the_crop_and_the_flip(root):
    centre = build(root, crop_method="center")
    # the middle half of a 40x20 picture: the person keeps its right half, the tree is outside
    tokens = centre.get_batch([0])["objects_bbox"][0].tolist()
    assert tokens[:3] == [3, 0, 44] and tokens[3:9] == [100] * 6
    assert tokens[9:] == centre.corners((0.25, 0.0, 0.5, 1.0))
    thing = centre.things["images/a.jpg"][0]
    whole = (0.0, 0.0, 1.0, 1.0)
    assert centre.tokens([thing], whole, flipped=True)[1:3] == centre.corners((0.5, 0.0, 0.5, 0.5))
    flipped = build(root, random_flip=True)
    seen = set()
    for stream in range(12):
        batch = flipped.get_batch([0], stream)
        dark_left = bool(batch["image"][0, :, 0].mean() < batch["image"][0, :, -1].mean())
        assert (batch["objects_bbox"][0, 1] == 0) == dark_left  # the person is in the dark half
        seen.add(dark_left)
    assert seen == {True, False}


@pytest.mark.parametrize("method", annotated.CROPS)
def test_crops_stay_inside(root, method):
    data = build(root, crop_method=method)
    for stream in range(5):
        assert data.get_batch([0, 1, 2], stream)["image"].isfinite().all()
        draws = np.random.default_rng(stream).random(9)
        x, y, w, h = data.crop_of((40, 20), draws)
        assert x >= 0 and y >= 0 and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9
        if method != "none":
            assert w * 40 == pytest.approx(h * 20)


def test_lists_of_ones_own(root):
    (root / "allow.txt").write_text("Tree\n")
    data = build(root, category_allow_list_target=str(root / "allow.txt"), category_mapping_target="")
    assert data.category_names == {"Tree": 0} and len(data) == 2
    (root / "map.txt").write_text("Man\tTree\n")
    mapped = build(root, category_allow_list_target="", category_mapping_target=str(root / "map.txt"))
    assert mapped.get_batch([0])["annotations"] == [["Tree", "Tree"]]
    assert len(build(root, min_objects_per_image=2)) == 1
    assert len(build(root, min_object_area=0.0, min_objects_per_image=2)) == 2


def test_faults(root, tmp_path):
    with pytest.raises(UserError, match="crop_method must be one of none"):
        build(root, crop_method="left")
    with pytest.raises(UserError, match="no picture of train is left.* 4 are annotated, 3 are there"):
        build(root, min_objects_per_image=9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="train-annotations-bbox.csv is not in .* get the boxes"):
        build(tmp_path / "empty")
    with pytest.raises(UserError, match="the list of categories .*none.txt cannot be read"):
        build(root, category_allow_list_target=str(root / "none.txt"))
