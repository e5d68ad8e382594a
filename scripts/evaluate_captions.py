"""Measures a text-to-image model of OpenMoji: does it draw what its captions say, and what no caption of it said?

python scripts/evaluate_captions.py -r models/ldm/openmoji
python scripts/evaluate_captions.py -r logs/<run> --json result.json --picture samples.png
python scripts/evaluate_captions.py -r logs/<run> -n 500 --over-time curve.png    every checkpoint of the run
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common, results  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate_captions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-r", "--run", required=True, metavar="RUN", help="run directory, checkpoint, or folder of models/")
    add("-n", "--n_samples", type=int, default=None, help="captions, evenly from all (default: every caption)")
    add("--steps", type=int, default=20, help="sampler steps (default: 20)")
    add("--sampler", default="euler", help="default: euler")
    add("--scale", type=float, default=3.0, help="classifier-free guidance (default: 3)")
    add(
        "--set", nargs="+", default=[], metavar="KNOB=VALUE", help="knobs of sample(); the only ones of DALL-E, CogView"
    )
    add("--seed", type=int, default=0, help="seed of the first picture")
    add(
        "--caption-rerank",
        type=int,
        default=1,
        metavar="N",
        help="captions that CogView reads from each drawing; the best one is kept (default: 1)",
    )
    add("--weights", choices=("ema", "raw"), default=None, help="default: ema where there are")
    add("--batch-size", type=int, default=128)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--json", metavar="FILE", help="write the result here too")
    add(
        "--row",
        nargs="+",
        default=[],
        metavar=("FILE", "KEY=VALUE"),
        help="as in evaluate.py, of the fidelity by pixels",
    )
    add("--quiet", action="store_true", help="print nothing but progress bars")
    add("--picture", metavar="PNG", help="write 100 of the pictures, evenly chosen, as one")
    add(
        "--over-time",
        metavar="PNG",
        help="fidelity at every checkpoint of the run against minutes of training, as a chart; beside it, in "
        "NAME_samples.png, ten captions as each of them drew them, one row a checkpoint",
    )
    add("--after", type=float, default=0.0, metavar="MINUTES", help="what the first stage took before, for that chart")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.row:
        results.facts(args.row)  # wrong words are said now
    if args.over_time:
        from ldm.util import UserError

        if args.picture:
            raise UserError("--over-time and --picture: give one of the two")
        if args.row:
            raise UserError("--over-time and --row: give one of the two")
        result = over_time(args)
    else:
        result = evaluate(args)
    if not args.quiet:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.row:
        found = result["fidelity"]
        figure = "caption_fidelity", found["top1_pixels"], found["n"]
        written = results.write_row(args.row, *figure, result["training"], result["model"])
        print(f"{written}: written; `make results` puts it into the README", file=sys.stderr)


def opened(args: argparse.Namespace, path: str | Path) -> tuple[Any, dict[str, Any], Any, list[str], dict[str, Any]]:
    """(model, what load_run says of it, its training set, the captions to draw, the knobs of sample())."""
    from ldm import generate
    from ldm.data.openmoji import OpenMoji
    from ldm.util import UserError

    model, info = generate.load_run(path)
    params = trained_on(info["config"])
    if params is None or not hasattr(model, "first_stage_model"):
        raise UserError(f"{path} was not trained on ldm.data.builtin.OpenMoji over a first stage")
    data = OpenMoji(**{**params, "split": "train"})
    prompts = sorted(c for names in data.captions for c in names)
    if args.n_samples is not None:
        prompts = prompts[:: max(1, len(prompts) // max(1, args.n_samples))][: args.n_samples]
    knobs = {"steps": args.steps, "sampler": args.sampler, "scale": args.scale}
    if hasattr(model, "draw_tokens"):
        knobs = {}
    knobs |= common.parse_settings(args.set)
    return model.to(generate.pick_device(args.device)), info, data, prompts, knobs


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from ldm import generate
    from ldm.data.openmoji import OpenMoji
    from ldm.evaluation import captions
    from ldm.util import image_grid

    model, info, data, prompts, knobs = opened(args, args.run)
    params = trained_on(info["config"]) or {}
    began = time.perf_counter()
    scope, weights = generate.weights_scope(model, args.weights)
    with scope:
        drawn = captions.draw(model, prompts, args.batch_size, args.seed, knobs)
        seconds = time.perf_counter() - began
        result: dict[str, Any] = {"first_stage": captions.first_stage(model, captions.images_of(data))}
        result["fidelity"] = captions.fidelity(model, drawn, prompts, data)
        result["fidelity"]["seconds_per_picture"] = seconds / len(prompts)
        if params.get("colors"):
            held_out = OpenMoji(**{**params, "split": "validation"})
            asked = captions.draw(
                model, [c[0] for c in held_out.captions], args.batch_size, args.seed + len(prompts), knobs
            )
            everything = OpenMoji(**{**params, "split": "all"})
            result["composition"] = captions.composition(asked, held_out, everything)
        if hasattr(model, "caption"):
            result["captions"] = captions.captioning(model, data, rerank=args.caption_rerank)
    result["model"] = f"{type(model).__module__}.{type(model).__name__}"
    result["training"] = {"minutes": info["minutes"], **info["origin"]}
    result |= {"run": info["checkpoint"], "sha256": info["sha256"], "weights": weights, "seed": args.seed, **knobs}
    result |= generate.versions()
    if args.picture:
        chosen = drawn[:: max(1, len(drawn) // 100)][:100]
        generate.save_png(generate.pictures(image_grid(chosen, nrow=10)[None], args.run)[0], Path(args.picture), result)
    return result


def over_time(args: argparse.Namespace) -> dict[str, Any]:
    """Fidelity at every checkpoint; the chart and the rows of samples are written."""
    import torch

    from ldm import checkpoint, generate
    from ldm.evaluation import captions
    from ldm.util import UserError, image_grid

    files = checkpoint.in_order_of_steps(args.run)
    if len(files) < 2:
        raise UserError(
            f"{args.run} holds {len(files)} checkpoint, expected several: train with lightning.modelcheckpoint.params."
            "every_n_train_steps=200 lightning.modelcheckpoint.params.save_top_k=-1 "
            "lightning.modelcheckpoint.params.filename=at_{step}"
        )
    rows, samples = [], []
    for file in files:
        model, info, data, prompts, knobs = opened(args, file)
        scope, weights = generate.weights_scope(model, args.weights)
        with scope:
            drawn = captions.draw(model, prompts, args.batch_size, args.seed, knobs)
            found = captions.fidelity(model, drawn, prompts, data)
        minutes = None if info["minutes"] is None else args.after + info["minutes"]
        rows.append({"step": info["global_step"], "minutes": minutes, **found, "weights": weights})
        samples.append(drawn[:: max(1, len(drawn) // 10)][:10])
        print(f"step {rows[-1]['step']}: {found['top1_pixels']:.1%} right, {found['psnr']:.1f} dB", file=sys.stderr)
    result = {"run": str(args.run), "seed": args.seed, **knobs, "checkpoints": rows, **generate.versions()}
    target = Path(args.over_time)
    target.parent.mkdir(parents=True, exist_ok=True)
    captions.chart(rows, target)
    grid = image_grid(torch.cat(samples), nrow=len(samples[0]))
    below = target.with_name(f"{target.stem}_samples.png")
    generate.save_png(generate.pictures(grid[None], str(args.run))[0], below, result)
    return result


def trained_on(config: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters of the training set, size and channels included, if that is OpenMoji."""
    data = (config.get("data") or {}).get("params") or {}
    train = data.get("train") or {}
    if not str(train.get("target", "")).endswith("OpenMoji"):
        return None
    return {**{k: data[k] for k in ("size", "channels") if k in data}, **(train.get("params") or {})}


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), run))
