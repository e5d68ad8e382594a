"""Draws many pictures with an unconditional diffusion model, under the official name, flags and file names.

python scripts/sample_diffusion.py -r models/ldm/celeba256/model.ckpt -n 100 -c 50 -e 0
    writes <run>/samples/<step>/<time>/{img/sample_000000.png, numpy/<shape>-samples.npz, sampling_config.yaml}

scripts/sample.py is for everything else: classes, texts, other samplers, one file per seed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample_diffusion.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--resume", nargs="?", metavar="RUN", help="run directory with config.yaml and model.ckpt, or its file")
    add("-n", "--n_samples", nargs="?", type=int, default=50000, help="how many pictures (default: 50000)")
    add("-e", "--eta", nargs="?", type=float, default=1.0, help="noise of DDIM: 0 none, 1 as DDPM (default)")
    add("-v", "--vanilla_sample", action="store_true", help="all steps of DDPM instead of DDIM")
    add("-l", "--logdir", nargs="?", default="none", help="put the run's samples here (default: into the run)")
    add("-c", "--custom_steps", nargs="?", type=int, default=50, help="steps of DDIM (default: 50)")
    add("--batch_size", "--batch-size", nargs="?", type=int, default=10, help="pictures per network call (default: 10)")
    add("--seed", type=int, default=0, help="seed of the first picture; picture i has seed + i (default: 0)")
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("dotlist", nargs="*", metavar="KEY=VALUE", help="changes of the model's config")
    return parser


def out_folder(args: argparse.Namespace, info: dict[str, Any]) -> Path:
    """A new folder <run>/samples/<global step>/<time>, or with --logdir <logdir>/<run's name>/..."""
    run = Path(info["run"])
    run = run if args.logdir == "none" else Path(args.logdir) / run.resolve().name
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    base, number = run / "samples" / f"{info['global_step']:08}", 1
    path = base / now
    while path.exists():
        number += 1
        path = base / f"{now}-{number}"
    (path / "img").mkdir(parents=True)
    (path / "numpy").mkdir()
    return path


def draw(args: argparse.Namespace) -> None:
    import numpy as np
    import yaml

    from ldm import generate
    from ldm.util import UserError

    if not args.resume:
        raise UserError("which run? give -r models/ldm/<name> or its model.ckpt")
    if args.n_samples < 1 or args.batch_size < 1:
        raise UserError(f"-n {args.n_samples} --batch_size {args.batch_size}: expected at least 1 each")
    model, info = generate.load_run(args.resume, args.dotlist)
    model.to(generate.pick_device(args.device))
    steps = getattr(model, "num_timesteps", None) if args.vanilla_sample else args.custom_steps
    knobs = {"sampler": "ddpm" if args.vanilla_sample else "ddim", "steps": steps}
    knobs = generate.check_knobs(model, knobs if args.vanilla_sample else {**knobs, "eta": args.eta})
    scope, weights = generate.weights_scope(model, args.weights)
    path = out_folder(args, info)
    print(f"{info['checkpoint']}, weights: {weights}; pictures go to {path}")
    record = {"run": info["run"], "knobs": knobs, "weights": weights, "sha256": info["sha256"], **generate.versions()}
    (path / "sampling_config.yaml").write_text(yaml.safe_dump({**vars(args), **record}), encoding="utf-8")
    arrays, made = [], 0
    try:
        with scope:
            for seeds in generate.batches(range(args.seed, args.seed + args.n_samples), args.batch_size):
                with common.progress(model, knobs) as callback:
                    x = model.sample(model.condition(seeds), seeds=seeds, **knobs, **callback)
                for seed, picture in zip(seeds, generate.pictures(x, info["checkpoint"]), strict=True):
                    settings = {**record, "seed": seed, "n_samples": 1}
                    generate.save_png(picture, path / "img" / f"sample_{made:06}.png", settings)
                    arrays.append(np.asarray(picture))
                    made += 1
    finally:  # after Ctrl-C too
        if arrays:
            stack = np.stack(arrays)
            shape = "x".join(str(n) for n in stack.shape)
            np.savez(path / "numpy" / f"{shape}-samples.npz", stack)
    print(f"{made} pictures in {path}")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), draw))
