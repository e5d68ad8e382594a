import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import filelist
from ldm.data.filelist import FileList
from ldm.util import UserError
from tests.data.pictures import fill


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path / "data"))
    fill(tmp_path / "pictures", 6, size=(30, 40))
    return tmp_path


def listed(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_list_and_captions(root):
    paths = listed(root / "l.txt", ["0003.png\ta red house", "", "0001.png"])
    data = FileList(paths, str(root / "pictures"), size=16)
    batch = data.get_batch([0, 1])
    assert batch["relpath"] == ["0003.png", "0001.png"] and batch["caption"] == ["a red house", ""]
    assert batch["file_path_"][0] == str(root / "pictures" / "0003.png")
    assert set(FileList(paths, str(root / "pictures"), size=16, keys=["image"])[0]) == {"image"}


def test_absolute_paths(root):
    paths = listed(root / "l.txt", [str(root / "pictures" / "0002.png")])
    assert len(FileList(paths, size=16)) == 1


def test_scale_then_crop_is_random_in_training_only(root):
    options = {"paths": ["0000.png"], "data_root": str(root / "pictures"), "size": 24, "crop_size": 16}
    fixed = FileList(**options)
    assert torch.equal(fixed.get_batch([0], 1)["image"], fixed.get_batch([0], 2)["image"])
    moved = filelist.FullOpenImagesTrain(**options)
    assert moved[0]["image"].shape == (16, 16, 3)
    assert not torch.equal(moved.get_batch([0], 1)["image"], moved.get_batch([0], 2)["image"])
    held = filelist.FullOpenImagesValidation(**options)
    assert torch.equal(held.get_batch([0], 1)["image"], fixed.get_batch([0])["image"])


@pytest.mark.parametrize(
    "name", ["CelebAHQ", "FFHQ", "FacesHQ", "FullOpenImages", "OpenImagesBBox", "RFW", "Previews", "Coco"]
)
def test_named_sets_say_what_to_put_where(root, name):
    name = {"Coco": "CocoImagesAndCaptions"}.get(name, name)
    for part in ("Train", "Validation"):
        with pytest.raises(UserError) as e:
            getattr(filelist, name + part)(size=16)
        message = str(e.value)
        assert name + part in message and str(root / "data") in message and "data.params.root=FOLDER" in message


def test_named_sets_read_their_list_or_else_their_folder(root):
    fill(root / "data" / "ffhq", 30)
    sizes = [len(c(size=16)) for c in (filelist.FFHQTrain, filelist.FFHQValidation)]
    assert sum(sizes) == 30 and sizes[1] >= 1
    listed(root / "data" / "ffhqtrain.txt", ["0001.png", "0002.png"])
    assert len(filelist.FFHQTrain(size=16)) == 2
    # the rest of the folder is not taken for validation: the list may be meant to leave it out, or hold all of it
    with pytest.raises(UserError, match="ffhqvalidation.txt"):
        filelist.FFHQValidation(size=16)


def test_celebahq_in_numpy_files(root):
    folder = root / "data" / "celebahq"
    folder.mkdir(parents=True)
    np.save(folder / "a.npy", np.full((1, 3, 20, 20), 255, np.uint8))
    listed(root / "data" / "celebahqtrain.txt", ["a.npy"])
    assert (filelist.CelebAHQTrain(size=16)[0]["image"] == 1).all()


def test_coordinates(root):
    data = filelist.FacesHQTrain(["0000.png"], str(root / "pictures"), size=24, crop_size=16, coord=True)
    coord = data.get_batch([0], 3)["coord"][0, ..., 0]
    assert coord.shape == (16, 16) and coord.dtype == torch.float32
    step = coord[0, 1] - coord[0, 0]
    assert torch.allclose(coord[1, 0] - coord[0, 0], 24 * step, atol=1e-6) or torch.allclose(
        coord[1, 0] - coord[0, 0], 32 * step, atol=1e-6
    )
    assert coord.min() >= 0 and coord.max() < 1


def test_segmentation_maps_are_cut_like_their_images(root):
    maps = root / "maps"
    maps.mkdir()
    for i in range(6):  # the label is the position of the column
        labels = np.repeat(np.arange(40, dtype=np.uint8)[None], 30, 0)
        Image.fromarray(labels).save(maps / f"{i:04d}.png")
    options = {"data_root": str(root / "pictures"), "segmentation_root": str(maps), "n_labels": 40}
    data = filelist.RFWTrain([f"{i:04d}.png" for i in range(6)], size=30, crop_size=20, flip_p=0.5, **options)
    batch = data.get_batch(range(6), stream=9)
    hot = batch["segmentation"]
    assert hot.shape == (6, 20, 20, 40) and hot.dtype == torch.float32 and (hot.sum(-1) == 1).all()
    red = (batch["image"][..., 0] + 1) / 2 * 39  # so is the red of the pictures
    assert (hot.argmax(-1) - red).abs().max() < 1.01
    with pytest.raises(UserError, match="label 34 of a segmentation map is out of range: n_labels is 10"):
        filelist.RFWTrain(["0000.png"], size=30, **{**options, "n_labels": 10})[0]
    shifted = filelist.RFWTrain(["0000.png"], size=30, shift_segmentation=True, **{**options, "n_labels": 41})
    assert shifted.get_batch([0])["segmentation"].argmax(-1).min() >= 1
    (maps / "0004.png").unlink()
    with pytest.raises(UserError, match="1 of 6 label maps are missing, e.g. .*0004.png"):
        filelist.RFWTrain([f"{i:04d}.png" for i in range(6)], size=30, **options)


def test_taming_custom_lists(root):
    paths = listed(root / "l.txt", [str(p) for p in sorted((root / "pictures").iterdir())])
    assert len(filelist.CustomTrain(size=16, training_images_list_file=paths)) == 6
    assert len(filelist.CustomTest(size=16, test_images_list_file=paths)) == 6
    with pytest.raises(UserError, match="the list of images some/training.txt cannot be read"):
        filelist.CustomTrain(size=16, training_images_list_file="some/training.txt")


def test_list_without_its_files(root):
    with pytest.raises(UserError, match="nothing.png does not exist"):
        FileList(["nothing.png"], str(root), size=16)
    with pytest.raises(UserError, match="the list of paths is empty"):
        FileList([], str(root), size=16)
    with pytest.raises(UserError, match="FileList needs paths"):
        FileList(size=16)


def test_coco(root):
    base = root / "data" / "coco"
    for part in ("train", "val"):
        fill(base / f"{part}2017", 3, "jpg", (30, 40))
        info = {
            "images": [{"id": 10 + i, "file_name": f"{i:04d}.jpg"} for i in range(3)],
            "annotations": [{"image_id": 10 + i % 2, "caption": f"no {i}"} for i in range(4)],
        }
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(info))
        maps = base / "stuffthingmaps" / f"{part}2017"
        maps.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((30, 40), 255 if i else 3, np.uint8)).save(maps / f"{i:04d}.png")
    train = filelist.CocoImagesAndCaptionsTrain(size=24, crop_size=16, onehot_segmentation=True, use_stuffthing=True)
    assert len(train) == 2, "images without a caption are left out"
    batch = train.get_batch([0, 1], 1)
    assert batch["caption"][0] in ("no 0", "no 2") and batch["segmentation"].shape == (2, 16, 16, 183)
    assert batch["segmentation"].argmax(-1).flatten(1).float().mean(1).tolist() == [4.0, 0.0]
    held = filelist.CocoImagesAndCaptionsValidation(size=24, crop_size=16)
    assert "segmentation" not in held[0] and Path(held.get_batch([1])["file_path_"][0]).parent.name == "val2017"
