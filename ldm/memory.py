"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Blocks that were freed stay in the process until it ends, to be given out again.

    glibc returns large blocks to the system at once. Every step of a training on a CPU asks for the same ones again,
    and the system has to clear each of their pages first: in a virtual machine up to a sixth of the time of a step.

    Returns:
        False where nothing was changed: another C library, or the environment says how glibc shall allocate
        (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    if any(k.startswith("MALLOC_") or (k == "GLIBC_TUNABLES" and "malloc" in v) for k, v in os.environ.items()):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have no mallopt, Windows no CDLL(None)
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
