"""Peak memory of scripts/txt2img.py with a full-size Stable Diffusion v1 checkpoint: weights, loading, a picture.

python benchmarks/sd_memory.py      (4.3 GB of disk; takes the file that benchmarks/txt2img.py --keep left)

Goals: loading at most 1.15 times the weights; 512x512 in fp32 within 12 GiB, with bf16 weights within 7 GiB. A process
for each; pages of the file count as far as they are resident. --steps is low, since memory does not grow with it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.timing import process  # noqa: E402
from benchmarks.txt2img import WORK, clean, random_checkpoint  # noqa: E402

CONFIG = ROOT / "configs/stable-diffusion/v1-inference.yaml"


def load_alone(file: str, precision: str) -> None:
    """Loads as the scripts do, and prints GiB: of the weights, peak before loading, peak after it."""
    from ldm.models import framework

    framework.sampling_only()
    from ldm import text2image
    from ldm.models.diffusion import ddpm, latent_diffusion  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    model = text2image.load(Path(file), str(CONFIG), str(CONFIG), precision=precision).model
    weights = sum(t.nbytes for t in model.state_dict().values()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"loading, {precision}: weights {weights:.2f} GiB, peak {peak:.2f} GiB with {before:.2f} GiB of libraries "
        f"= {(peak - before) / weights:.2f} x weights"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for weights and pictures ({WORK})")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the weights on the disk")
    parser.add_argument("--load", nargs=2, metavar=("FILE", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load_alone(*args.load)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "model.safetensors"
    if not file.exists():
        random_checkpoint(file)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    for precision, goal in (("fp32", 12), ("bf16", 7)):
        loading = [sys.executable, __file__, "--work", str(args.work), "--load", str(file), precision]
        process(loading, environment, show=True)
        script = [sys.executable, str(ROOT / "scripts/txt2img.py"), "--ckpt", str(file), "--config", str(CONFIG)]
        script += ["--H", str(args.size), "--W", str(args.size), "--steps", str(args.steps), "--precision", precision]
        script += ["--n_iter", "1", "--n_samples", "1", "--skip_grid", "--outdir", str(args.work / "out")]
        seconds, gib = process(script, environment)
        print(f"txt2img {args.size}x{args.size}, {precision}: {gib:.2f} GiB peak (goal {goal}), {seconds:.1f} s")
    if not args.keep:
        clean(args.work)


if __name__ == "__main__":
    main()
