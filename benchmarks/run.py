"""Runs every benchmark, one after the other: `make bench`. Results belong into RESULTS.md, with the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = (
    ["overhead.py", "classifier"],
    ["overhead.py", "ddpm"],
    ["ddpm_step.py"],
    ["image_data.py"],
    ["classifiers.py", "train"],
    ["classifiers.py", "infer"],
    ["gpt.py"],
    ["stylegan2.py"],
    ["sd_unet.py"],
    ["sd_train_step.py"],
    ["txt2img.py", "--keep"],
    ["sd_memory.py"],
    ["fid.py"],
    ["drawing.py"],
)


def main() -> int:
    failed = 0
    for name, *arguments in COMMANDS:
        if (HERE / name).is_file():
            print("$ python", f"benchmarks/{name}", *arguments, flush=True)
            failed += subprocess.call([sys.executable, str(HERE / name), *arguments]) != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
