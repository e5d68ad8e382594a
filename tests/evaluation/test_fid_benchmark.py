"""benchmarks/fid.py on sets that are there: folders and zip files, of one size, evenly chosen."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import fid


def put(folder, n, seed, size=32, suffix=".png"):
    """n pictures in two sub-folders."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / ("cat", "dog")[i * 2 // n] / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def packed(folder):
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return file


def test_a_folder_against_a_zip(tmp_path, capsys):
    """Both sides read the same files: equal figures, whatever form the sets have."""
    real, drawn = put(tmp_path / "real", 24, 0), packed(put(tmp_path / "drawn", 30, 1, suffix=".jpg"))
    found = fid.main(["--real", str(real), "--drawn", str(drawn), "--rounds", "1"])
    said = capsys.readouterr().out
    assert "FID of 30 and 24 pictures (drawn.zip against real), features digits" in said
    assert found["ldm"] == pytest.approx(found["torch-fidelity"], rel=1e-3) and found["ldm"] > 0.1


def test_pictures_are_chosen_evenly_and_one_place_gives_two_sets(tmp_path):
    place = packed(put(tmp_path / "all", 40, 0, size=8))
    names = []
    for half in (0, 1):
        folder = tmp_path / f"half{half}"
        assert fid.take(str(place), folder, 10, half) == (8, 8)
        names.append(sorted(p.name for p in folder.iterdir()))
        for path in folder.iterdir():
            with zipfile.ZipFile(place) as archive:
                assert path.read_bytes() == archive.read(archive.namelist()[int(path.stem)])
    assert [int(n[:7]) for n in names[0]] == list(range(0, 40, 4)) and not set(names[0]) & set(names[1])


def test_what_cannot_be_compared(tmp_path, capsys):
    real, other = put(tmp_path / "real", 4, 0), put(tmp_path / "other", 4, 1, size=16)
    with pytest.raises(SystemExit):
        fid.main(["--real", str(real)])
    assert "give both, or none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fid.main(["--real", str(real), "--drawn", str(other), "--rounds", "1"])
    assert "expected one size" in capsys.readouterr().err
    put(real / "more", 2, 2, size=16)
    with pytest.raises(SystemExit, match="several sizes"):
        fid.main(["--real", str(real), "--drawn", str(real), "--rounds", "1"])
