"""Cold start to PNG: scripts/txt2img.py and the same job as a diffusers script, full-size random Stable Diffusion v1.

python benchmarks/txt2img.py      (needs: pip install diffusers transformers accelerate; 9 GB of disk)

256x256, 10 DDIM steps, guidance, fp32. Each side is a process of its own and starts from a .safetensors file; both read
the same weights, in the official layout and in diffusers'. --keep leaves the files for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WORK = Path(tempfile.gettempdir()) / "ldm-benchmark"
PROMPT = "a photograph of an astronaut riding a horse"
DIFFUSERS = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, out, prompt, size, steps, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
generator = torch.Generator().manual_seed(42)
options = {"height": int(size), "width": int(size), "num_inference_steps": int(steps), "guidance_scale": 7.5}
pipe(prompt, generator=generator, **options).images[0].save(out)
"""


def random_checkpoint(path: Path) -> None:
    """Random weights in the official layout, written tensor by tensor: small, so that nothing overflows."""
    import torch
    from omegaconf import OmegaConf

    from ldm import checkpoint
    from ldm.config import load_yaml
    from ldm.util import instantiate_from_config

    config = OmegaConf.to_container(load_yaml(ROOT / "configs/stable-diffusion/v1-inference.yaml"))["model"]
    with checkpoint.NoWeights():
        model = instantiate_from_config({k: config[k] for k in ("target", "params")})
    header, end, tensors = {}, 0, model.state_dict()
    types = {torch.float32: "F32", torch.int64: "I64"}
    for name, t in tensors.items():
        header[name] = {"dtype": types[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            if t.is_meta:
                fan = max(1, t[0].numel()) if t.ndim > 1 else 1
                t = torch.randn(t.shape) * fan**-0.5 if t.ndim > 1 else torch.ones(t.shape)
            f.write(t.contiguous().numpy().tobytes())


def diffusers_folder(checkpoint: Path, folder: Path) -> None:
    """The same weights in diffusers' layout."""
    from ldm.conversion.job import convert

    convert(checkpoint, "diffusers", folder, config=ROOT / "configs/stable-diffusion/v1-inference.yaml")


def clean(work: Path) -> None:
    """Removes the weights."""
    (work / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(work / "folder", ignore_errors=True)


def sides(args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """The command of each side."""
    python, size, steps = sys.executable, str(args.size), str(args.steps)
    ours = [python, str(ROOT / "scripts/txt2img.py"), "--prompt", PROMPT, "--ckpt", str(work / "model.safetensors")]
    ours += ["--config", str(ROOT / "configs/stable-diffusion/v1-inference.yaml"), "--H", size, "--W", size]
    ours += ["--steps", steps, "--n_iter", "1", "--n_samples", "1", "--skip_grid", "--precision", args.precision]
    ours += ["--outdir", str(work / "out"), *args.extra.split()]
    theirs = [python, "-c", DIFFUSERS, str(work / "folder"), str(work / "theirs.png"), PROMPT, size, steps]
    return {"ldm": ours, "diffusers": [*theirs, str(args.threads)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for weights and pictures ({WORK})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="full")
    parser.add_argument("--extra", default="", help="more flags for txt2img.py")
    parser.add_argument("--keep", action="store_true", help="leave the weights on the disk")
    args = parser.parse_args()
    from benchmarks.timing import compare, process, report

    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "model.safetensors").exists():
        random_checkpoint(args.work / "model.safetensors")
    if not (args.work / "folder").exists():
        diffusers_folder(args.work / "model.safetensors", args.work / "folder")
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    commands = sides(args, args.work)
    timed = {name: (lambda c=command: process(c, environment)[0]) for name, command in commands.items()}
    title = f"txt2img from cold start, {args.size}x{args.size}, {args.steps} steps, {args.precision}"
    report(title, compare(timed, args.rounds), "ldm")
    if not args.keep:
        clean(args.work)


if __name__ == "__main__":
    main()
