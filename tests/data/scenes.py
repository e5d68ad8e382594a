"""A folder of pictures with masks, for tests: coloured boxes on grey."""

import numpy as np
from PIL import Image

COLOURS = ((90, 90, 90), (220, 40, 40), (40, 60, 220))


def make_scenes(root, count=12, size=(40, 48), names=("ground", "red box", "blue box"), folder=""):
    """images/ and masks/ in root/folder; one red and one blue box a picture, a border that does not count."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        labels = np.zeros(size, np.uint8)
        for label in (1, 2):
            y, x = rng.integers(2, size[0] - 20), rng.integers(2, size[1] - 20)
            labels[y : y + 16, x : x + 16] = label
        noise = rng.integers(-25, 25, (*size, 3))
        picture = np.clip(np.array(COLOURS)[labels] + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / folder / "images" / f"{i}.png")
        labels[0] = 255
        Image.fromarray(labels).save(root / folder / "masks" / f"{i}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root
