"""Lists of files, and the data sets that official configs name but whose code or lists were never released."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.base import CAPTION, CROP_X, CROP_Y, Size, check_channels, data_dir, parse_size
from ldm.data.entries import Entries, choose_split, find_entries
from ldm.data.image import FileImages, pick
from ldm.data.pixels import Fit
from ldm.data.sources import Folder
from ldm.util import UserError


def locate(
    name: str,
    split: str,
    paths: str | Sequence[str] | None,
    data_root: str | None,
    lists: Mapping[str, str],
    folder: str,
) -> tuple[Folder, Entries]:
    """The files of a list, of a data set's own list in the data folder, or all below its folder.

    Args:
        name: of the data set, for messages.
        split: train, validation or all.
        paths: text file or list of paths, if given.
        data_root: folder that the paths start from, if given.
        lists: {split: default list}, relative to the data folder.
        folder: default folder, relative to the data folder.

    Raises:
        UserError: nothing there; the message says what to put where.
    """
    root = Path(data_root).expanduser() if data_root else data_dir() / folder if folder else Path()
    if paths is None and split in lists and (data_dir() / lists[split]).is_file():
        paths = str(data_dir() / lists[split])
    if paths is None:
        # not beside the other split's list: the two would share images
        if not (data_root or folder) or not root.is_dir() or any((data_dir() / f).is_file() for f in lists.values()):
            raise UserError(_missing(name, lists.get(split), root))
        source = Folder(root)
        return source, choose_split(*find_entries(source), split)
    lines = _read_list(paths) if isinstance(paths, str) else [str(p) for p in paths]
    rows = [line.partition("\t") for line in lines if line.strip()]
    names = [path.strip().replace("\\", "/") for path, _, _ in rows]
    captions = [[c.strip()] for _, _, c in rows]
    source = Folder(root, names)
    if not names or not any(Path(source.where(n)).is_file() for n in names[:20]):
        first = f"{source.where(names[0])} does not exist" if names else "the list of paths is empty"
        raise UserError(f"{first}. {_missing(name, lists.get(split), root)}")
    labels = np.zeros(len(names), np.int64)
    return source, Entries(names, labels, ["all"], captions if any(c[0] for c in captions) else None)


def _read_list(path: str) -> list[str]:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"the list of images {path} cannot be read ({e}); expected one path a line") from e


def _missing(name: str, list_file: str | None, root: Path) -> str:
    own = "for your own pictures: data.params.root=FOLDER"
    if not list_file:
        return f"{name} needs paths (a text file with one image path a line) and data_root; {own}"
    return (
        f"{name} needs its images in {root} and the paths of this split from there, one a line, in "
        f"{data_dir() / list_file} (neither was ever released with the official code; data_root and paths set other "
        f"places, LDM_DATA another data folder); {own}"
    )


class FileList(FileImages):
    """Pictures named by a text file.

    Batches hold `image` float32 [B, H, W, C] in [-1, 1], `class_label`, `relpath`, `file_path_`, `caption` where there
    are captions, `segmentation` float32 [B, H, W, n_labels] and `coord` float32 [B, H, W, 1] where asked for.

    Args:
        paths: a text file with one path a line (and, if you wish, a tab and a caption), or a list of paths. Without it,
            all images below `data_root`, a fixed tenth of them for validation.
        data_root: folder that the paths start from.
        size: pixels the shorter side is scaled to (or [height, width]); None keeps the images' own size.
        crop_size: cut this out of the scaled image; default: all of `size`.
        random_crop: cut at a random place; default: if `crop_size` is given, in training.
        flip_p: probability of a left-right flip.
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
        channels: 1 or 3.
        keys: hand out only these keys.
        coord: adds each pixel's place in the uncut image, in [0, 1).
        segmentation_root: folder of label maps, named like the images with .png.
        n_labels: labels of the maps, for the one-hot channels.
        shift_segmentation: add 1 to each label first, so that 255 (none) becomes 0.
        segmentation_to_float32: float32 one-hot channels; otherwise uint8.
        cache, cache_gb, max_unreadable, verify: see FileImages.

    Raises:
        UserError: the list or its files are missing; the message says what to put where.
    """

    # What the named data sets below fill in; lists and folder are looked for in the data folder.
    lists: dict[str, str] = {}
    folder, split = "", "all"

    def __init__(
        self,
        paths: str | Sequence[str] | None = None,
        data_root: str | None = None,
        size: Size | None = 256,
        crop_size: Size | None = None,
        random_crop: bool | None = None,
        flip_p: float = 0.0,
        interpolation: str = "bicubic",
        channels: int = 3,
        keys: Sequence[str] | None = None,
        coord: bool = False,
        segmentation_root: str | None = None,
        n_labels: int = 182,
        shift_segmentation: bool = False,
        segmentation_to_float32: bool = True,
        cache: str | bool = "auto",
        cache_gb: float = 2.0,
        max_unreadable: float = 0.05,
        verify: int = 1000,
    ) -> None:
        if random_crop is None:
            random_crop = crop_size is not None and self.split == "train"
        outer, inner = parse_size(size), parse_size(crop_size)
        fit = Fit(
            inner or outer, check_channels(channels), "crop", random_crop, interpolation, outer if inner else None
        )
        self.keys, self.coord = keys, coord
        self.segmentation = None if segmentation_root is None else Folder(Path(segmentation_root).expanduser(), [])
        self.n_labels, self.shift, self.as_float = n_labels, shift_segmentation, segmentation_to_float32
        source, entries = locate(type(self).__name__, self.split, paths, data_root, self.lists, self.folder)
        super().__init__(source, entries, fit, flip_p, 0, cache, cache_gb, max_unreadable, verify)
        if self.segmentation is not None:
            maps = [self.segmentation.where(self._map_name(i)) for i in range(len(self))]
            missing = [m for m in maps if not Path(m).is_file()]
            if missing:
                raise UserError(f"{len(missing)} of {len(maps)} label maps are missing, e.g. {', '.join(missing[:3])}")

    # -- samples --

    @property
    def cacheable(self) -> bool:
        return self.size is not None and self.segmentation is None and not self.coord

    def sample(self, index: int, draws: np.ndarray, stream: int) -> dict[str, np.ndarray]:
        if self._ready is not None or (self.segmentation is None and not self.coord):
            return super().sample(index, draws, stream)
        place = draws[CROP_Y], draws[CROP_X]
        scaled = self.fit.scaled(self.read(index))
        sample = {"image": self.fit.cut(scaled, *place)}
        if self.coord:
            h, w = scaled.shape[:2]
            sample["coord"] = self.fit.cut((np.arange(h * w, dtype=np.float32) / (h * w)).reshape(h, w, 1), *place)
        if self.segmentation is not None:
            sample["segmentation"] = self.fit.cut(self._label_map(index, scaled.shape[:2]), *place)
        return sample

    def _map_name(self, index: int) -> str:
        return Path(self.entries.names[index]).with_suffix(".png").as_posix()

    def _label_map(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 [h, w, 1] of label numbers (palettes are not resolved: their indices are the labels)."""
        assert self.segmentation is not None
        name = self._map_name(index)
        labels = np.asarray(Image.open(io.BytesIO(self.segmentation.read(name))))
        if labels.ndim != 2 or labels.max(initial=0) > 255:
            raise ValueError(f"label map {name} must hold one number below 256 for each pixel, got {labels.shape}")
        covering = Fit(size, 1, interpolation="nearest")
        buffer = io.BytesIO()
        Image.fromarray(labels.astype(np.uint8)).save(buffer, "BMP")
        return covering(buffer.getvalue())

    def finish(self, key: str, x: Tensor) -> Tensor:
        if key != "segmentation":
            return x
        labels = x[..., 0] + 1 if self.shift else x[..., 0]  # uint8: 255 + 1 is 0
        if int(labels.max()) >= self.n_labels:
            raise UserError(
                f"label {int(labels.max())} of a segmentation map is out of range: n_labels is {self.n_labels}"
                " (shift_segmentation: true turns 255 into 0)"
            )
        hot = torch.nn.functional.one_hot(labels.long(), self.n_labels)
        return hot.float() if self.as_float else hot.byte()

    def fields(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
        fields = super().fields(indices, draws)
        fields["file_path_"] = [self.source.where(n) for n in fields["relpath"]]
        if self.entries.captions is not None:
            fields["caption"] = [
                pick(self.entries.captions[i], u) for i, u in zip(indices, draws[:, CAPTION], strict=True)
            ]
        return fields

    def get_batch(self, indices: Sequence[int], stream: int = 0) -> dict[str, Any]:
        batch = super().get_batch(indices, stream)
        return batch if self.keys is None else {k: v for k, v in batch.items() if k in self.keys}


# --- the named sets: ldm.data.* and taming.data.* ---------------------------------------------------------------------


class CelebAHQTrain(FileList):
    lists, folder = {"train": "celebahqtrain.txt", "validation": "celebahqvalidation.txt"}, "celebahq"
    split = "train"


class CelebAHQValidation(CelebAHQTrain):
    split = "validation"


class FFHQTrain(FileList):
    lists, folder = {"train": "ffhqtrain.txt", "validation": "ffhqvalidation.txt"}, "ffhq"
    split = "train"


class FFHQValidation(FFHQTrain):
    split = "validation"


class FacesHQTrain(FileList):
    lists, folder = {"train": "faceshqtrain.txt", "validation": "faceshqvalidation.txt"}, "faceshq"
    split = "train"


class FacesHQValidation(FacesHQTrain):
    split = "validation"


class FullOpenImagesTrain(FileList):
    lists, folder = {"train": "openimages_train.txt", "validation": "openimages_validation.txt"}, "openimages"
    split = "train"


class FullOpenImagesValidation(FullOpenImagesTrain):
    split = "validation"


class OpenImagesBBoxTrain(FullOpenImagesTrain):
    """The images alone: `coordinates_bbox` needs annotations."""


class OpenImagesBBoxValidation(OpenImagesBBoxTrain):
    split = "validation"


class RFWTrain(FileList):
    lists, folder = {"train": "landscapes_train.txt", "validation": "landscapes_validation.txt"}, "landscapes"
    split = "train"


class RFWValidation(RFWTrain):
    split = "validation"


class PreviewsTrain(FileList):
    lists, folder = {"train": "previews_train.txt", "validation": "previews_validation.txt"}, "previews"
    split = "train"


class PreviewsValidation(PreviewsTrain):
    split = "validation"


class CustomTrain(FileList):
    """taming's own-data set: a list of paths, absolute or from the working directory.

    Args:
        size: pixels the shorter side is scaled to.
        training_images_list_file: the list.
    """

    split = "train"

    def __init__(self, size: Size, training_images_list_file: str, channels: int = 3) -> None:
        super().__init__(training_images_list_file, None, size, channels=channels)


class CustomTest(FileList):
    """The same for validation.

    Args:
        size: pixels the shorter side is scaled to.
        test_images_list_file: the list.
    """

    split = "validation"

    def __init__(self, size: Size, test_images_list_file: str, channels: int = 3) -> None:
        super().__init__(test_images_list_file, None, size, channels=channels)


class CocoImagesAndCaptionsTrain(FileList):
    """COCO 2017 with captions, and label maps if asked for (keys `image`, `caption`, `segmentation`).

    Args:
        size: pixels the shorter side is scaled to.
        crop_size: cut this out; at a random place in training.
        onehot_segmentation: adds `segmentation` [B, H, W, 183]: the label plus 1, 0 where there is none.
        use_stuffthing: label maps of things and stuff (stuffthingmaps/), else of stuff alone (stuffmaps/).
        channels: 1 or 3.
        data_root: folder of annotations/, train2017/, val2017/ and the label maps; default `coco/` in the data folder.
    """

    split = "train"

    def __init__(
        self,
        size: Size,
        crop_size: Size | None = None,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        channels: int = 3,
        data_root: str | None = None,
    ) -> None:
        root = Path(data_root).expanduser() if data_root else data_dir() / "coco"
        part = "train2017" if self.split == "train" else "val2017"
        names, captions = self._captions(root, part)
        maps = str(root / ("stuffthingmaps" if use_stuffthing else "stuffmaps") / part) if onehot_segmentation else None
        super().__init__(
            names,
            str(root / part),
            size,
            crop_size,
            channels=channels,
            segmentation_root=maps,
            n_labels=183,
            shift_segmentation=True,
        )
        # by name: unreadable files may have been left out
        self.entries.captions = [captions[n] for n in self.entries.names]

    def _captions(self, root: Path, part: str) -> tuple[list[str], dict[str, list[str]]]:
        file = root / "annotations" / f"captions_{part}.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
            files = {i["id"]: i["file_name"] for i in info["images"]}
            captions: dict[str, list[str]] = {}
            for note in info["annotations"]:
                captions.setdefault(files[note["image_id"]], []).append(note["caption"].strip())
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{type(self).__name__} needs {file} (here: {type(e).__name__} {e}) and the images in {root / part}: "
                "get annotations_trainval2017.zip, train2017.zip and val2017.zip from https://cocodataset.org; "
                "for your own pictures: data.params.root=FOLDER"
            ) from e
        return sorted(captions), captions


class CocoImagesAndCaptionsValidation(CocoImagesAndCaptionsTrain):
    split = "validation"
