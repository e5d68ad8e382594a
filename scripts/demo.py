"""A first model in a few minutes.

python scripts/demo.py          trains text to image on drawings of animals and food, draws eight prompts with it and
                                with the model that comes with the project (make demo does the same after installing)
python scripts/demo.py digits   trains a class-conditional model of handwritten digits (make digits)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIGS = {
    "prompts": "configs/latent-diffusion/openmoji_demo.yaml",
    "digits": "configs/diffusion/ddpm_digits.yaml",
}
SHIPPED = ROOT / "models/ldm/openmoji"
PROMPTS = ("red apple", "tiger face", "banana", "penguin", "hamburger", "octopus", "strawberry", "owl")
KNOBS = {"steps": 20, "sampler": "euler", "scale": 3.0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", nargs="?", default="prompts", help="what to train: prompts (default) or digits")
    add("-l", "--logdir", default="logs", help="folder of the run directory (default: logs)")
    add("--outdir", default=None, help="where the pictures go (default: outputs/demo, outputs/digits)")
    add("--config", default=None, help="another config of the same kind")
    add("extra", nargs="*", help="further arguments of main.py: key.path=value")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if "=" in args.what:  # only settings were given
        args.what, args.extra = "prompts", [args.what, *args.extra]
    if args.what not in CONFIGS:
        parser.error(f"got {args.what!r}, expected {' or '.join(CONFIGS)}")
    outdir = Path(args.outdir or {"prompts": "outputs/demo", "digits": "outputs/digits"}[args.what])
    config = args.config or str(ROOT / CONFIGS[args.what])
    before = set(Path(args.logdir).glob("*"))
    if code := call(["main.py", "-t", "-b", config, "-l", args.logdir, *args.extra]):
        return code
    run = max(set(Path(args.logdir).glob("*")) - before, key=lambda p: p.stat().st_mtime)
    return (digits if args.what == "digits" else prompts)(run, outdir)


def digits(run: Path, outdir: Path) -> int:
    """A hundred digits in a grid."""
    if code := call(["scripts/sample.py", "-r", str(run), "-n", "100", "--outdir", str(outdir)]):
        return code
    grid = max(outdir.glob("grid*.png"), key=lambda p: p.stat().st_mtime)
    print(f"\nThe model is in {run}\nThe pictures are in {grid.resolve()} (column = digit asked for)")
    print(f"Draw more:  python scripts/sample.py -r {run} -n 16 --class 7 --scale 3")
    return 0


def prompts(run: Path, outdir: Path) -> int:
    """Eight prompts by the new model and by the shipped one, and how many of all captions the new one draws right."""
    file = outdir / "prompts.png"
    save(run, file)
    result = outdir / "captions.json"
    measure = ["scripts/evaluate_captions.py", "-r", str(run), "--json", str(result), "--quiet"]
    if code := call(measure):
        return code
    right = json.loads(result.read_text(encoding="utf-8"))["fidelity"]
    print(
        f"\nThe model is in {run}: {right['top1_pixels']:.1%} of its {right['n']} captions give the drawing they name"
    )
    print(f"The pictures are in {file.resolve()} (above: this model; below: the one in models/ldm/openmoji)")
    print('Draw more:  python scripts/txt2img.py --prompt "blue apple"   (by the model in models/ldm/openmoji)')
    print("Drawings: OpenMoji, CC BY-SA 4.0")
    return 0


def save(run: Path, file: Path) -> None:
    """Prompts in the first row, then the pictures of both models."""
    import torch

    from ldm import generate
    from ldm.util import image_grid, log_txt_as_img

    rows: list[Any] = [log_txt_as_img((64, 24), PROMPTS, size=9)]
    rows[0] = torch.nn.functional.pad(rows[0], (0, 0, 40, 0), value=1.0)
    for path in (run, SHIPPED):
        model, _ = generate.load_run(path)
        seeds = list(range(len(PROMPTS)))
        scope, _ = generate.weights_scope(model, None)
        with scope:
            rows.append(model.sample(model.condition(seeds, prompts=PROMPTS), seeds=seeds, **KNOBS))
    grid = image_grid(torch.cat(rows), nrow=len(PROMPTS))
    settings = {"run": str(run), "prompts": list(PROMPTS), **KNOBS, **generate.versions()}
    generate.save_png(generate.pictures(grid[None], str(run))[0], file, settings)


def call(argv: list[str]) -> int:
    print("$ python", *argv, flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / argv[0]), *argv[1:]])
    try:
        return process.wait()
    except KeyboardInterrupt:  # Ctrl-C reaches the program too: it saves, and says what to do
        process.wait()
        return 130


if __name__ == "__main__":
    sys.exit(main())
