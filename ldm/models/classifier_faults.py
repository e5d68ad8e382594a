"""Images that do not fit a network of torchvision or timm, or the statistics of their pixels, in words for the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ldm.util import UserError

# torch's convolutions and pools; torchvision's and timm's Vision Transformers
WRONG_SIZE = re.compile(
    r"output size is too small|kernel size can't be greater than actual input|non-zero size for (input|output)"
    r"|wrong image (height|width)|input (height|width|size) .*(doesn't match|should be divisible)",
    re.IGNORECASE,
)
ONE_VALUE = "Expected more than 1 value per channel"


def explained(error: Exception, shape: Sequence[int], network: str) -> UserError | None:
    """The user's fault behind an error inside a network, or None where it is something else.

    Args:
        error: what the network raised.
        shape: of the images, [B, C, H, W].
        network: its name.
    """
    text, size = str(error), f"{shape[2]}x{shape[3]}"
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "")[:150]
    if ONE_VALUE in text and shape[0] == 1:
        return UserError(
            f"{network}: got a batch of 1 image of {size}, of which batch norm in training sees one value a channel, "
            "expected 2 images or more: set data.params.drop_last=true, or a data.params.batch_size that leaves no "
            "single image in the last batch"
        )
    if ONE_VALUE in text or WRONG_SIZE.search(text):
        return UserError(
            f"{network}: got images of {size}, expected a size that the network takes ({reason}); "
            "see data.params.size and model.params.network_config"
        )
    return None


def check_data(data: Any, num_classes: int) -> None:
    """What the classes of the data sets have to be, where these tell their names.

    Args:
        data: the data module, or None.
        num_classes: of the model.

    Raises:
        UserError: a class folder is empty, training and validation (or test) set number the classes differently, or one
            has more than the model.
    """
    sets = getattr(data, "datasets", {})
    empty = next((e for d in sets.values() if (e := getattr(d, "empty_classes", None))), None)
    if empty:
        raise UserError(
            f"no pictures in {_listed(empty)}, a folder beside those of the classes: fill it if it is a class, else "
            "remove it"
        )
    named = {s: d.class_names for s, d in sets.items() if s != "predict" and getattr(d, "class_names", None)}
    train = named.get("train", [])
    for split, names in named.items():
        surplus = [n for n in names[len(train) :] if not n.isdecimal()] if train else []
        if surplus or any(a != b for a, b in zip(names, train, strict=False)):
            raise UserError(
                f"the class folders differ: data.params.train has {_listed(train)}, data.params.{split} has "
                f"{_listed(names)}; give both the same ones, or one folder that holds train/ and val/"
            )
        if len(names) > num_classes:
            raise UserError(
                f"label out of range: data.params.{split} has {len(names)} classes ({_listed(names)}), expected at "
                f"most {num_classes} (model.params.num_classes: {num_classes}; auto takes it from the data)"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def checked_statistics(normalize: Any) -> tuple[list[float], list[float]]:
    """`model.params.normalize` as (means, deviations).

    Raises:
        UserError: something else.
    """
    try:
        mean, std = ([float(v) for v in values] for values in normalize)
        if len(mean) == len(std) > 0 and min(std) > 0:
            return mean, std
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"model.params.normalize: got {normalize!r}, expected imagenet, none, or [means, deviations] of pixels in "
        "[0, 1], each a list with a number for every channel, deviations above 0: [[0.5], [0.25]] for grey pictures"
    )


def other_channels(statistics: int, images: int) -> UserError:
    """The fault of statistics of so many channels for images of another number."""
    return UserError(
        f"model.params.normalize: got means and deviations of {statistics} channels for images of {images}, expected "
        f"{images} of each: set model.params.normalize=none, or to [means, deviations] of {images}; or "
        f"data.params.channels={statistics} and model.params.network_config.params.in_channels={statistics}"
    )
