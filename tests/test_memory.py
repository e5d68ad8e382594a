"""ldm.memory: freed blocks are given out again instead of being returned to the system."""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource, sys
import torch
from ldm.memory import keep_freed_memory

kept = len(sys.argv) > 1 and keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(16):
    if turn == 6:  # by then the blocks have found their places
        before = faults()
    x, y = torch.ones(2**23), torch.ones(2**22)  # 32 and 16 MiB
    del x, y
print(kept, faults() - before)
"""


def faults(*argv, **env):
    """(whether memory is kept, pages that the system had to give) of ten turns."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | env
    command = [sys.executable, "-c", FAULTS, *argv]
    kept, pages = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return kept == "True", int(pages)


def test_freed_memory_is_used_again():
    kept, pages = faults("keep")
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert faults()[1] > 1000 > 10 * pages


def test_the_environment_is_obeyed():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0] is False
