"""Where the files of a data set lie: a folder, or a zip read in place."""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.util import UserError


class Folder:
    """The files below a folder, as relative paths with `/`.

    Args:
        root: the folder.
        names: the files, if they are known already; otherwise all but hidden ones, sorted.
    """

    def __init__(self, root: str | Path, names: Sequence[str] | None = None) -> None:
        self.root = str(root)
        self.names = sorted(_walk(self.root)) if names is None else list(names)

    def where(self, name: str) -> str:
        """Path to show and to hand out."""
        return name if os.path.isabs(name) else os.path.join(self.root, *name.split("/"))

    def folders(self) -> list[str]:
        """Visible folders at any depth, empty ones too, as relative paths with `/`."""
        inner = (os.path.relpath(os.path.join(f, d), self.root) for f, ds, _ in os.walk(self.root) for d in ds)
        paths = [p.replace(os.sep, "/") for p in inner]
        return [p for p in paths if all(map(_visible, p.split("/")))]

    def read(self, name: str) -> bytes:
        """The file's bytes; OSError if it cannot be read."""
        with open(self.where(name), "rb") as f:
            return f.read()


def _walk(root: str) -> list[str]:
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [d for d in folders if _visible(d)]
        if real in seen:  # a symbolic link that leads back up
            continue
        seen.add(real)
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if below == "." else below + "/"
        found += [prefix + f for f in files if _visible(f)]
    return found


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db", "desktop.ini")


class Zip:
    """The files in a zip, read in place through a memory map (stored or deflated members).

    Pickles as path and index; every process opens its own map. A single top folder that holds everything is left out
    of the names.

    Raises:
        UserError: no zip, or one with encryption or another compression.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            with zipfile.ZipFile(self.path) as z:
                infos = [i for i in z.infolist() if not i.is_dir() and all(map(_visible, i.filename.split("/")))]
        except (zipfile.BadZipFile, OSError) as e:
            raise UserError(f"{self.path} cannot be opened as a zip: {e}") from e
        for i in infos:
            if i.flag_bits & 1 or i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                how = "encrypted" if i.flag_bits & 1 else f"compressed by method {i.compress_type}"
                raise UserError(f"{self.path}: {i.filename} is {how}; pack the images again with plain zip")
        strip = len(os.path.commonprefix([i.filename.partition("/")[0] + "/" for i in infos]))
        if not infos or any("/" not in i.filename for i in infos) or not infos[0].filename[:strip].endswith("/"):
            strip = 0
        self._members = {i.filename[strip:]: (i.header_offset, i.compress_size, i.compress_type) for i in infos}
        self.names = sorted(self._members)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def where(self, name: str) -> str:
        """Path to show."""
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The member's bytes, unpacked; OSError, struct.error or zlib.error if the zip is damaged there."""
        if self._map is None:
            with open(self.path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        offset, length, method = self._members[name]
        # a local header: 30 fixed bytes, the last four of them the lengths of name and extra field, then these two
        header = self._map[offset : offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise OSError(f"{self.path} is damaged at {name}")
        start = offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        data = self._map[start : start + length]
        return data if method == zipfile.ZIP_STORED else zlib.decompress(data, -15)


Source = Folder | Zip


def open_source(root: str | Path) -> Source:
    """A folder or a .zip.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        if zipfile.is_zipfile(path) or path.suffix.lower() == ".zip":
            return Zip(path)
        raise UserError(f"{path} is a file; expected a folder of images or a .zip of one")
    raise UserError(f"there is no folder or zip {path} (seen from {Path.cwd()})")
