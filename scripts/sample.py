"""Draws pictures with any generative run of this project.

python scripts/sample.py -r logs/<run> -n 16
python scripts/sample.py -r logs/<run> -n 4 --class 7 --scale 3 --steps 50 --sampler ddim --seed 1
python scripts/sample.py -r logs/<run> -n 4 --prime picture.png --set top_k=50
python scripts/sample.py -r models/ldm/bsr_sr --cond-from small_pictures
python scripts/sample.py --like outputs/samples/00000.png
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

KNOBS = ("scale", "steps", "sampler", "grid", "eta", "truncation", "noise_mode", "style_mix")  # flags of their own


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-r", "--run", metavar="RUN", help="run directory (logs/<run>) or checkpoint file")
    add("-n", "--n_samples", "--n-samples", type=int, default=None, help="how many pictures (default: 16)")
    add("--class", dest="class_label", default=None, help="class by number or name (default: all in turn)")
    add("--prompt", default=None, help="text, for text-to-image models")
    add("--negative-prompt", default=None, help="what the picture should not show")
    add(
        "--cond-from",
        metavar="FOLDER",
        default=None,
        help="pictures to condition on, for models of super-resolution, label maps or inpainting (x.png with "
        "x_mask.png), or layouts (x.json); `data`: the run's validation data. Picture i goes with file i",
    )
    add("--prime", metavar="PICTURE", default=None, help="for models of tokens: keep its upper half, draw the rest")
    add("--scale", type=float, default=None, help="classifier-free guidance scale (1: off)")
    add("--steps", type=int, default=None, help="sampler steps, 1..1000")
    add("--sampler", default=None, help="ddpm, ddim, plms, euler, heun, dpmpp_2m, unipc, ...")
    add("--grid", default=None, help="time grid: official, trailing, karras, exponential, ...")
    add("--eta", type=float, default=None, help="noise of ddim: 0 none, 1 as DDPM")
    add("--truncation", type=float, default=None, help="StyleGAN2's psi: 1 none, 0.7 fewer odd pictures")
    add("--noise-mode", default=None, help="StyleGAN2's noise: const, random, none")
    add("--style-mix", type=int, metavar="SEED", default=None, help="StyleGAN2: fine styles of this seed's picture")
    add("--interpolate", metavar="FILE", default=None, help=".gif or .mp4 of a walk from seed to seed, for GANs")
    add("--seeds", default=None, help="which pictures: 0-31, or 3,7,12 (in place of --seed and -n)")
    add("--seed", type=int, default=None, help="seed of the first picture; picture i has seed + i (default: 0)")
    add(
        "--weights",
        choices=("ema", "raw"),
        default=None,
        help="averaged or last weights (default: ema where there are)",
    )
    add("--set", nargs="+", default=[], metavar="KNOB=VALUE", help="any other knob of the model's sample()")
    add("--outdir", default="outputs/samples", help="where the PNG files go (default: outputs/samples)")
    common.preview_flag(add)
    add("--batch-size", type=int, default=64, help="pictures per network call")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--like", metavar="PNG", default=None, help="make this picture again; other flags change its settings")
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command line over the settings of `--like`."""
    from ldm.generate import read_settings

    keys = ("run", "class_label", "prompt", "negative_prompt", "cond_from", "prime", "weights", "seed", "n_samples")
    old = read_settings(args.like) if args.like else {}
    if args.like:
        old["n_samples"] = 1
    settings = {k: getattr(args, k) if getattr(args, k) is not None else old.get(k) for k in keys}
    knobs = {k: getattr(args, k) for k in KNOBS}
    knobs |= common.parse_settings(args.set)
    settings["knobs"] = {**old.get("knobs", {}), **{k: v for k, v in knobs.items() if v is not None}}
    settings["sha256"] = old.get("sha256") if not args.run else None
    settings["cond_index"] = old.get("cond_index", 0)
    return settings


def draw(args: argparse.Namespace) -> None:
    from ldm import generate
    from ldm.util import UserError, image_grid

    settings = settings_of(args)
    if not settings["run"]:
        raise UserError("which run? give -r logs/<run> (or --like picture.png)")
    model, info = generate.load_run(settings["run"])
    maps = Maps(model, info, settings) if settings["cond_from"] else None
    numbers = seeds_of(args, settings, len(maps) if maps else 16)
    first, count = numbers[0], len(numbers)
    if settings["sha256"] not in (None, info["sha256"]):
        print(f"note: {info['checkpoint']} has changed since {args.like} was made")
    model.to(generate.pick_device(args.device))
    knobs, options = generate.split_knobs(model, settings["knobs"])
    scope, weights = generate.weights_scope(model, settings["weights"])
    print(f"{info['checkpoint']}, weights: {weights}")
    record = {**settings, "weights": weights, "sha256": info["sha256"], **generate.versions()}
    outdir, images = Path(args.outdir), []
    preview = (outdir, args.preview) if args.preview else None
    if args.interpolate:
        with scope:
            walk(model, condition(model, settings, numbers, options, maps), numbers, knobs, args.interpolate)
        return
    with scope:
        for seeds in generate.batches(numbers, 1 if maps else args.batch_size):
            cond = condition(model, settings, seeds, options, maps)
            with common.progress(model, knobs, preview) as callback:
                x = model.sample(cond, seeds=seeds, **knobs, **callback)
            images.append(x.float().cpu())
            for seed, picture in zip(seeds, generate.pictures(x, info["checkpoint"]), strict=True):
                path = common.free_name(outdir, seed)
                more = {"cond_index": maps.index(seed)} if maps else {}
                generate.save_png(picture, path, {**record, "seed": seed, "n_samples": 1, **more})
    import torch

    if len({x.shape[1:] for x in images}) > 1:
        print(f"{count} pictures in {outdir}")
        return
    grid = image_grid(torch.cat(images), nrow=max(1, round(count**0.5)))
    path = common.free_name(outdir, None)
    generate.save_png(
        generate.pictures(grid[None], info["checkpoint"])[0], path, {**record, "seed": first, "n_samples": count}
    )
    print(f"{count} pictures in {outdir}, together in {path}")


def seeds_of(args: argparse.Namespace, settings: dict[str, Any], count: int) -> list[int]:
    """The seeds of --seeds, or n from --seed on; `count` is the default of n."""
    from ldm.util import UserError

    if args.seeds is not None:
        if settings["n_samples"] is not None or args.seed is not None:
            raise UserError("--seeds says which pictures: leave --seed and -n out")
        return common.parse_seeds(args.seeds)
    count = count if settings["n_samples"] is None else settings["n_samples"]
    if count < 1:
        raise UserError(f"-n {count}: expected at least 1")
    first = settings["seed"] or 0
    return list(range(first, first + count))


def walk(model: Any, cond: Any, seeds: list[int], knobs: dict[str, Any], file: str) -> None:
    """Writes the way from each seed's picture to the next one's, and back to the first."""
    from tqdm import tqdm

    from ldm.picture_files import check_movie, write_movie
    from ldm.util import UserError, to_uint8

    check_movie(file)
    if not hasattr(model, "interpolate"):
        raise UserError(f"--interpolate: {type(model).__name__} has no way from picture to picture")
    if len(seeds) < 2:
        raise UserError("--interpolate needs two pictures or more: -n 8, or --seeds 3,7,12")
    unknown = set(knobs) - set(inspect.signature(model.interpolate).parameters)
    if unknown:
        raise UserError(f"--{min(unknown).replace('_', '-')} and --interpolate do not go together")
    bar = tqdm(model.interpolate(cond, seeds=seeds, **knobs), desc="drawing", unit="frame", leave=False)
    print(f"{write_movie((to_uint8(frame[None])[0] for frame in bar), file)} frames in {file}")


def condition(
    model: Any, settings: dict[str, Any], seeds: list[int], options: dict[str, Any], maps: Maps | None
) -> Any:
    from ldm.generate import class_index

    label, prompt = settings["class_label"], settings["prompt"]
    request = {
        "classes": None if label is None else [class_index(model, str(label))] * len(seeds),
        "prompts": None if prompt is None else [prompt] * len(seeds),
        "negative_prompt": settings["negative_prompt"],
        **options,
    }
    if settings["prime"]:
        from ldm.token_painter import read_pictures

        return model.prime(model.condition(seeds, **request), read_pictures(model, [settings["prime"]]))
    return model.condition(seeds, **request) if maps is None else maps.condition(model, seeds, request)


class Maps:
    """The pictures of `--cond-from`: picture i goes with file i, and after the last file with the first one again."""

    def __init__(self, model: Any, info: dict[str, Any], settings: dict[str, Any]) -> None:
        from ldm import conditions

        self.count, self.get = conditions.samples_of(model, info["config"], settings["cond_from"])
        self.first, self.start = settings["seed"] or 0, settings["cond_index"]

    def __len__(self) -> int:
        return self.count

    def index(self, seed: int) -> int:
        return (self.start + seed - self.first) % self.count

    def condition(self, model: Any, seeds: list[int], request: dict[str, Any]) -> Any:
        from ldm import conditions

        return conditions.condition_from(model, [self.get(self.index(s)) for s in seeds], seeds, request)


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), draw))
