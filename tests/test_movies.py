"""Moving pictures as files."""

import numpy as np
import pytest
from PIL import Image

from ldm.picture_files import check_movie, write_movie
from ldm.util import UserError


def frames(n=4, size=15, channels=3):
    return [np.full((size, size, channels), 60 * i, np.uint8) for i in range(n)]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif(tmp_path, channels):
    path = tmp_path / "a/x.gif"
    assert write_movie(frames(channels=channels), path, fps=10) == 4
    with Image.open(path) as movie:
        assert (movie.n_frames, movie.size, movie.info["duration"], movie.info["loop"]) == (4, (15, 15), 100, 0)
        movie.seek(2)
        assert abs(int(np.asarray(movie.convert("L"))[7, 7]) - 120) <= 2
    assert not list(path.parent.glob(".*"))


def test_png_is_the_last_frame(tmp_path):
    write_movie(frames(), tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png"))[0, 0].tolist() == [180, 180, 180]


def test_mp4(tmp_path):
    write_movie(frames(size=33), tmp_path / "x.mp4")
    data = (tmp_path / "x.mp4").read_bytes()
    assert data[4:8] == b"ftyp" and b"moov" in data


def test_other_names(tmp_path):
    with pytest.raises(UserError, match="ends in .gif, .mp4 or .png"):
        check_movie(tmp_path / "x.avi")
