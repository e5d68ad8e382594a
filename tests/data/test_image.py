import csv
import io
import json
import logging
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import FileImages, ImageFolder
from ldm.data.sources import Folder, Zip, open_source
from ldm.util import UserError
from tests.data.pictures import fill, metadata, picture, zipped


@pytest.fixture
def classes(tmp_path):
    for i, name in enumerate(("zebra", "ant", "yellow_cat")):
        fill(tmp_path / name, 10, start=100 * i)
    return tmp_path


def shades(batch):
    """The blue of each picture tells which one it is."""
    return (batch["image"][:, 4, 4, -1] * 127.5 + 127.5).round().int().tolist()


# --- layouts ---


def test_flat_folder(tmp_path):
    fill(tmp_path, 6, size=(30, 20))
    data = ImageFolder(tmp_path, size=16)
    batch = data.get_batch(range(6))
    assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert batch["class_label"].tolist() == [0] * 6 and data.num_classes == 1
    assert batch["caption"] == [""] * 6 and batch["relpath"][0] == "0000.png"


def test_class_folders_are_sorted_into_labels(classes):
    data = ImageFolder(classes, size=16)
    assert data.class_names == ["ant", "yellow_cat", "zebra"] and len(data) == 30
    batch = data.get_batch([0, 10, 20])
    assert batch["class_label"].tolist() == [0, 1, 2]
    assert batch["caption"] == ["ant", "yellow cat", "zebra"]
    assert "caption" not in ImageFolder(classes, size=16, captions="none")[0]
    assert ImageFolder(classes, size=16, labels="none").num_classes == 1


def test_labels_are_the_same_in_every_split(classes):
    (classes / "ant" / "0100.png").unlink()
    for split in ("train", "validation"):
        assert ImageFolder(classes, split, size=16).class_names == ["ant", "yellow_cat", "zebra"]


def test_captions_by_text_files(tmp_path):
    for path in fill(tmp_path, 4):
        path.with_suffix(".txt").write_text(f"picture {path.stem}\n", encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a caption")
    assert ImageFolder(tmp_path, size=16).get_batch([2])["caption"] == ["picture 0002"]


def test_one_of_several_captions_is_drawn(tmp_path):
    (path,) = fill(tmp_path, 1)
    path.with_suffix(".txt").write_text("one\ntwo\n\nthree\n")
    data = ImageFolder(tmp_path, size=16)
    assert {data.get_batch([0], stream)["caption"][0] for stream in range(40)} == {"one", "two", "three"}


def test_metadata_jsonl_and_csv(tmp_path):
    for folder, key in ((tmp_path / "a", "text"), (tmp_path / "b", "caption")):
        fill(folder / "images", 4)
        rows = [{"file_name": f"images/{i:04d}.png", key: f"no {i}", "label": "ab"[i % 2]} for i in range(3)]
        if key == "text":
            metadata(folder, rows)
        else:
            with open(folder / "metadata.csv", "w", newline="") as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        data = ImageFolder(folder, size=16)
        batch = data.get_batch(range(len(data)))
        assert batch["caption"] == ["no 0", "no 1", "no 2"]
        assert batch["class_label"].tolist() == [0, 1, 0] and data.class_names == ["a", "b"]


def test_keys_may_be_renamed(tmp_path):
    fill(tmp_path, 2)
    sample = ImageFolder(tmp_path, size=16, image_key="jpg", caption_key="txt")[0]
    assert {"jpg", "txt"} <= set(sample) and "image" not in sample


# --- splits ---


def test_split_folders(tmp_path):
    for part, n in (("train", 5), ("val", 3), ("test", 2)):
        fill(tmp_path / part / "dog", n)
        fill(tmp_path / part / "cat", n)
    sizes = {s: len(ImageFolder(tmp_path, s, size=16)) for s in ("train", "validation", "test", "all")}
    assert sizes == {"train": 10, "validation": 6, "test": 4, "all": 20}
    assert ImageFolder(tmp_path, "validation", size=16).class_names == ["cat", "dog"]


def test_metadata_inside_split_folders(tmp_path):
    for part in ("train", "validation"):
        fill(tmp_path / part, 3)
        metadata(tmp_path / part, [{"file_name": f"{i:04d}.png", "text": f"{part} {i}"} for i in range(3)])
    data = ImageFolder(tmp_path, "validation", size=16)
    assert data.get_batch(range(3))["caption"] == [f"validation {i}" for i in range(3)]


def test_hash_split_is_a_partition_that_stays_when_images_are_added(tmp_path):
    fill(tmp_path, 40)
    train, held = (
        set(ImageFolder(tmp_path, s, size=8, val_fraction=0.25).entries.names) for s in ("train", "validation")
    )
    assert not train & held and len(train | held) == 40 and 4 <= len(held) <= 16
    fill(tmp_path, 20, start=40)
    assert held <= set(ImageFolder(tmp_path, "validation", size=8, val_fraction=0.25).entries.names)


def test_two_images_give_one_each_and_one_image_serves_both(tmp_path, caplog):
    fill(tmp_path, 2)
    assert [len(ImageFolder(tmp_path, s, size=8)) for s in ("train", "validation")] == [1, 1]
    (tmp_path / "0001.png").unlink()
    assert [len(ImageFolder(tmp_path, s, size=8)) for s in ("train", "validation")] == [1, 1]
    assert "one image only" in caplog.text


def test_last_of_each_class_validate(classes):
    names = ImageFolder(classes, "validation", size=8, split_by="last", val_fraction=0.2).entries.names
    assert [n.rpartition("/")[2] for n in names] == [
        "0108.png",
        "0109.png",
        "0208.png",
        "0209.png",
        "0008.png",
        "0009.png",
    ]


# --- zips ---


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "pictures/"])
def test_a_zip_gives_what_the_folder_gives(classes, tmp_path_factory, method, top):
    path = zipped(classes, tmp_path_factory.mktemp("zip") / "x.zip", method, top)
    a, b = ImageFolder(classes, "train", size=16), ImageFolder(path, "train", size=16)
    assert a.entries.names == b.entries.names and a.class_names == b.class_names
    assert torch.equal(a.get_batch(range(9))["image"], b.get_batch(range(9))["image"])


def test_zip_with_captions_is_read_in_place_by_a_spawned_worker(tmp_path):
    fill(tmp_path / "in", 6, "jpg")
    metadata(tmp_path / "in", [{"file_name": f"{i:04d}.jpg", "text": f"no {i}"} for i in range(6)])
    data = ImageFolder(zipped(tmp_path / "in", tmp_path / "x.zip"), size=16, cache=False)
    data[0]  # its own map is open by now, and must not travel
    loader = torch.utils.data.DataLoader(data, 3, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert [c for b in batches for c in b["caption"]] == [f"no {i}" for i in range(6)]
    assert torch.equal(torch.cat([b["image"] for b in batches]), data.get_batch(range(6))["image"])


def test_bad_zips_are_told(tmp_path):
    bad = tmp_path / "x.zip"
    bad.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="cannot be opened as a zip"):
        ImageFolder(bad)
    fill(tmp_path / "in", 1)
    with pytest.raises(UserError, match="pack the images again with plain zip"):
        ImageFolder(zipped(tmp_path / "in", tmp_path / "y.zip", zipfile.ZIP_LZMA))


# --- formats and options ---


def test_mixed_formats_in_one_folder_and_both_channel_counts(tmp_path):
    fill(tmp_path, 1, "jpg", (20, 30))
    picture(30, 20).convert("L").save(tmp_path / "grey.png")
    picture(25, 25).quantize(16).save(tmp_path / "palette.png")
    picture(25, 25).convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture(25, 25).convert("RGBA").save(tmp_path / "rgba.webp")
    Image.fromarray((np.arange(400).reshape(20, 20) * 160).astype(np.uint16)).save(tmp_path / "deep.png")
    for channels in (1, 3):
        data = ImageFolder(tmp_path, size=[16, 24], channels=channels)
        assert len(data) == 6 and data.get_batch(range(6))["image"].shape == (6, 16, 24, channels)


@pytest.mark.parametrize("options", [{}, {"random_crop": True}, {"fit": "pad"}, {"flip_p": 0.5, "pad_crop": 2}])
def test_cached_and_uncached_give_the_same_pixels(tmp_path, options):
    fill(tmp_path, 8, size=(20, 33))
    kept, read = (ImageFolder(tmp_path, size=16, cache=c, **options) for c in (True, False))
    assert kept.in_memory and not read.in_memory
    for stream in (0, 99):
        a, b = kept.get_batch([5, 1, 1, 7], stream), read.get_batch([5, 1, 1, 7], stream)
        assert torch.equal(a["image"], b["image"]) and a["relpath"] == b["relpath"]
    if options.get("random_crop"):
        assert not torch.equal(kept.get_batch([3], 1)["image"], kept.get_batch([3], 2)["image"])


def test_the_cache_has_a_limit(tmp_path):
    fill(tmp_path, 4)
    assert ImageFolder(tmp_path, size=16).in_memory
    assert not ImageFolder(tmp_path, size=16, cache_gb=4 * 16 * 16 * 3 / 1e9 - 1e-9).in_memory
    assert ImageFolder(tmp_path, size=16, cache_gb=0.0, cache=True).in_memory


def test_it_pickles(tmp_path):
    fill(tmp_path, 3)
    data = ImageFolder(tmp_path, size=16)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["image"], data[1]["image"])


# --- unreadable files ---


def test_unreadable_files_are_listed_and_left_out(tmp_path, caplog):
    fill(tmp_path, 30)
    (tmp_path / "0007.png").write_bytes(b"nothing")
    for cache in (True, False):
        data = ImageFolder(tmp_path, size=16, cache=cache)
        assert len(data) == 29 and "0007.png" not in data.entries.names
        assert shades(data.get_batch([6, 7])) == [round(255 * 7 / 31), round(255 * 9 / 31)]
    assert "1 of 30 images cannot be read and are left out" in caplog.text and "0007.png" in caplog.text


def test_too_many_unreadable_files_stop(tmp_path):
    fill(tmp_path, 10)
    for i in (2, 5):
        (tmp_path / f"000{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 10 images cannot be read, more than .* 0.05 \(max_unreadable\)") as e:
        ImageFolder(tmp_path, size=16)
    assert "0002.png" in str(e.value) and "0005.png" in str(e.value)
    assert len(ImageFolder(tmp_path, size=16, max_unreadable=0.2)) == 8


def test_a_file_that_breaks_later_is_replaced_with_one_warning(tmp_path, caplog):
    fill(tmp_path / "a", 3)
    fill(tmp_path / "b", 3)
    data = ImageFolder(tmp_path, size=16, cache=False)
    (tmp_path / "a" / "0002.png").write_bytes(b"\x89PNG broken")
    batch = data.get_batch([2, 2, 0])
    # label, path and picture are those of the replacement
    assert batch["class_label"].tolist() == [1, 1, 0] and batch["relpath"][0] == "b/0000.png"
    assert shades(batch)[0] == round(255 / 4)
    assert caplog.text.count("another image takes its place") == 1 and "0002.png" in caplog.text


def test_all_files_gone_is_an_error(tmp_path, caplog):
    paths = fill(tmp_path, 30)
    data = ImageFolder(tmp_path, size=16, cache=False)
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="is the disk still there"):
        data[0]
    assert caplog.text.count("another image takes its place") == 10
    assert caplog.text.count("more such files are not named") == 1


def test_what_is_no_picture_is_told_without_places_in_memory(tmp_path, caplog):
    fill(tmp_path, 30)
    (tmp_path / "x.png").write_bytes(b"nothing")
    (tmp_path / "y.png").write_bytes(b"")
    ImageFolder(tmp_path, size=16, max_unreadable=0.2)
    assert "x.png: no picture of a known format" in caplog.text and "y.png: the file is empty" in caplog.text


# --- what the user did wrong ---


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="there is no folder or zip"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(UserError, match="it is empty") as e:
        ImageFolder(tmp_path)
    assert str(tmp_path) in str(e.value) and "*.jpg" in str(e.value) and "ROOT/<class>/*.jpg" in str(e.value)
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match="it holds 1 other files, e.g. a.doc"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="expected a folder of images or a .zip"):
        ImageFolder(tmp_path / "a.doc")


def test_caption_without_image(tmp_path):
    for path in fill(tmp_path, 3):
        path.with_suffix(".txt").write_text("x")
    (tmp_path / "0001.png").unlink()
    with pytest.raises(UserError, match="1 caption without an image: .*0001.txt"):
        ImageFolder(tmp_path, size=16)
    assert len(ImageFolder(tmp_path, size=16, captions="none")) == 2


def test_image_without_caption_is_told(tmp_path, caplog):
    for path in fill(tmp_path, 3)[1:]:
        path.with_suffix(".txt").write_text("x")
    assert ImageFolder(tmp_path, size=16).get_batch(range(3))["caption"] == ["", "x", "x"]
    assert "1 of 3 images have no caption" in caplog.text and "0000.png" in caplog.text


def test_metadata_faults(tmp_path, caplog):
    fill(tmp_path, 3)
    metadata(tmp_path, [{"file_name": "0000.png", "text": "a"}, {"file_name": "9.png", "text": "b"}])
    with pytest.raises(UserError, match="1 metadata line without a file: .*metadata.jsonl line 2 names 9.png"):
        ImageFolder(tmp_path, size=16)
    metadata(tmp_path, [{"file": "0000.png"}])
    with pytest.raises(UserError, match=r"metadata.jsonl line 1 has no file_name \(it has: file\)"):
        ImageFolder(tmp_path, size=16)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0000.png"}\n{oops\n')
    with pytest.raises(UserError, match="metadata.jsonl line 2 is not JSON"):
        ImageFolder(tmp_path, size=16)
    metadata(tmp_path, [{"file_name": "0000.png", "text": "a"}])
    assert len(ImageFolder(tmp_path, size=16)) == 1
    assert "2 of 3 images" in caplog.text and "no metadata line" in caplog.text
    (tmp_path / "metadata.csv").write_text("file_name,text\n0000.png,b\n")
    with pytest.raises(UserError, match="keep one metadata file"):
        ImageFolder(tmp_path, size=16)


@pytest.mark.parametrize("name", ["metadata.json1", "metadata.json", "Metadata.jsonl", "meta-data.csv", "captions.txt"])
def test_names_that_only_look_like_metadata(tmp_path, name):
    fill(tmp_path, 2)
    (tmp_path / name).write_text(json.dumps({"file_name": "0000.png", "text": "a"}))
    with pytest.raises(UserError, match=f"{name} is not read: .* metadata.jsonl or metadata.csv"):
        ImageFolder(tmp_path, size=16)


def test_label_out_of_range(classes, tmp_path_factory):
    with pytest.raises(UserError, match=r"label 2 \(zebra\) of .*png is out of range: num_classes is 2"):
        ImageFolder(classes, size=16, num_classes=2)
    folder = tmp_path_factory.mktemp("numbers")
    fill(folder, 2)
    metadata(folder, [{"file_name": "0000.png", "label": 0}, {"file_name": "0001.png", "label": 7}])
    assert ImageFolder(folder, size=16).num_classes == 8
    with pytest.raises(UserError, match=r"label 7 .*0001.png is out of range"):
        ImageFolder(folder, size=16, num_classes=7)
    metadata(folder, [{"file_name": "0000.png", "label": -1}, {"file_name": "0001.png", "label": 7}])
    with pytest.raises(UserError, match="line 1: label -1 is below 0"):
        ImageFolder(folder, size=16)


def test_images_beside_and_inside_folders(classes):
    picture().save(classes / "loose.png")
    with pytest.raises(UserError, match=r"both beside and inside sub-folders \(e.g. loose.png\)"):
        ImageFolder(classes, size=16)
    assert ImageFolder(classes, size=16, labels="none").num_classes == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split must be one of train, validation, test, all"),
        ({"split": "test"}, "there is no test set here"),
        ({"channels": 4}, "channels must be 1"),
        ({"val_fraction": 1.5}, "val_fraction must be in"),
        ({"split_by": "first"}, "split_by must be hash or last"),
        ({"captions": "yes"}, "captions must be one of auto, none"),
        ({"labels": "x"}, "labels must be one of auto, folder, none"),
        ({"cache": "disk"}, "cache must be auto, true or false"),
        ({"split": "validation", "val_fraction": 0.0}, "no images are left for validation"),
    ],
)
def test_wrong_settings(tmp_path, options, message):
    fill(tmp_path, 3)
    with pytest.raises(UserError, match=message):
        ImageFolder(tmp_path, **{"size": 16, **options})


# --- sources ---


def test_hidden_files_and_loops_are_left_out(tmp_path):
    fill(tmp_path, 2)
    fill(tmp_path / ".thumbnails", 2)
    fill(tmp_path / "__MACOSX", 2)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert Folder(tmp_path).names == ["0000.png", "0001.png"]


def test_a_damaged_zip_is_an_oserror_at_the_image(tmp_path):
    fill(tmp_path / "in", 2)
    path = zipped(tmp_path / "in", tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    data[:4] = b"oops"
    path.write_bytes(data)
    source = Zip(path)
    with pytest.raises(OSError, match="damaged at 0000.png"):
        source.read("0000.png")
    assert Image.open(io.BytesIO(source.read("0001.png"))).size == (24, 24)


def test_open_source_takes_home_and_strings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p").mkdir()
    assert open_source("~/p").names == []


def test_different_sizes_need_a_size(tmp_path):
    fill(tmp_path, 1)
    fill(tmp_path, 1, size=(30, 30), start=1)
    from ldm.data.filelist import FileList

    data = FileList(["0000.png", "0001.png"], str(tmp_path), size=None)
    assert data[1]["image"].shape == (30, 30, 3)
    with pytest.raises(UserError, match="images of different sizes"):
        data.get_batch([0, 1])
    assert isinstance(data, FileImages)


def test_no_warning_without_a_reason(tmp_path, caplog):
    fill(tmp_path, 4)
    ImageFolder(tmp_path, "train", size=16)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# --- classes that do not fit -----------------------------------------------------------------------------------------


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_class_folders_that_differ_between_the_splits(tmp_path, caplog):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
        put(tmp_path / name)
    assert ImageFolder(tmp_path, split="validation", size=8).class_names == ["cat", "dog"]
    assert "no pictures of dog in validation" in caplog.text
    put(tmp_path / "val/bird/2.png")
    with pytest.raises(
        UserError, match=r"class folders differ: bird in validation but not in train \(train has cat, dog"
    ):
        ImageFolder(tmp_path, split="train", size=8)
    assert len(ImageFolder(tmp_path, split="train", size=8, labels="none")) == 2


def test_an_empty_class_folder_is_said_and_is_no_class(tmp_path, caplog):
    for name in ("cat/1.png", "dog/1.png"):
        put(tmp_path / name)
    (tmp_path / "bird").mkdir()
    assert ImageFolder(tmp_path, size=8).class_names == ["cat", "dog"]
    assert "no pictures in the class folder" in caplog.text and "bird" in caplog.text
    both = [ImageFolder(tmp_path, split=s, size=8) for s in ("train", "validation")]
    assert caplog.text.count("no pictures in the class folder") == 2  # not for every split
    assert [b.empty_classes for b in both] == [[str(tmp_path / "bird")]] * 2
    caplog.clear()
    put(tmp_path / "split/train/cat/1.png")
    put(tmp_path / "split/train/dog/1.png")
    put(tmp_path / "split/val/cat/1.png")
    (tmp_path / "split/val/dog").mkdir()
    assert ImageFolder(tmp_path / "split", split="train", size=8).empty_classes == []
    assert "not counted" not in caplog.text and "no pictures of dog in validation" in caplog.text
    (tmp_path / "split/val/dog").rmdir()
    (tmp_path / "one/bird").mkdir(parents=True)
    put(tmp_path / "one/cat/1.png")
    assert len(ImageFolder(tmp_path / "one", size=8).empty_classes) == 1
    assert ImageFolder(tmp_path / "one", size=8, labels="none").empty_classes == []
