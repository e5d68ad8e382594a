"""What the scripts share: exit codes, progress bar, file names, and the flags and loop of those that paint."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# --- running ----------------------------------------------------------------------------------------------------------

KNOBS = "lower --batch-size or the size, or use --precision bf16"  # what costs memory


def main(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], knobs: str = KNOBS) -> int:
    """Parses, runs, and turns errors with an exit code into one line; `knobs` is the advice for lack of memory."""
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="let a run's target: name it")
    args = parser.parse_args()
    try:
        from ldm.util import trust

        trust(args.trust)
        action(args)
    except KeyboardInterrupt:
        print("\nstopped; finished pictures stay", file=sys.stderr)
        return 130
    except Exception as e:
        from ldm.util import is_out_of_memory, message_of

        code = getattr(e, "exit_code", None)
        if code is None and is_out_of_memory(e):
            e, code = MemoryError(f"out of memory (peak {peak_memory():.1f} GiB): {knobs}"), 1
        if code is None:
            raise
        print(f"error: {message_of(e)}", file=sys.stderr)
        return code
    return 0


def paint_main(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> int:
    """`main` of the scripts that paint, in a process of its own: without a training framework, it starts sooner."""

    def lean(args: argparse.Namespace) -> None:
        from ldm.models import framework

        framework.sampling_only()
        action(args)

    return main(parser, lean, PAINT_KNOBS)


def peak_memory() -> float:
    """GiB that were in use at most, on the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def parse_settings(items: list[str]) -> dict[str, Any]:
    """["truncation=0.7"] -> {"truncation": 0.7}; values are read as YAML."""
    from omegaconf import OmegaConf

    from ldm.util import UserError

    for item in items:
        if "=" not in item:
            raise UserError(f"--set {item}: expected knob=value")
    return dict(OmegaConf.to_container(OmegaConf.from_dotlist(items)))


def parse_seeds(text: str) -> list[int]:
    """ "0-31" or "3,7,12", or both: "0-3,7".

    Raises:
        UserError: written in another way.
    """
    from ldm.util import UserError

    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UserError(f"--seeds {text}: expected numbers and ranges such as 0-31 or 3,7,12")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


@contextlib.contextmanager
def progress(model: Any, knobs: dict[str, Any], preview: tuple[Path, int] | None = None) -> Iterator[dict[str, Any]]:
    """Gives {"callback": f} that moves a bar with the time per step, or {} if `sample` has no callback.

    Args:
        preview: (folder, every): after so many steps the first picture, as far as it is, goes to preview.png there.
    """
    import inspect

    from tqdm import tqdm

    parameters = inspect.signature(model.sample).parameters
    if "callback" not in parameters:
        yield {}
        return
    total = knobs.get("steps") or getattr(parameters.get("steps"), "default", getattr(model, "sampling_steps", None))
    with tqdm(total=total if isinstance(total, int) else None, desc="sampling", unit="step", leave=False) as bar:

        def step(*args: Any, **kwargs: Any) -> None:  # a true result would stop the sampler
            bar.update()
            if preview and bar.n % preview[1] == 0:
                write_preview(preview[0], unfinished(model, args[-1][:1]))

        yield {"callback": step}


def unfinished(model: Any, x: Any) -> Any:
    """What a sampler's callback gets last -> pictures [B, C, H, W]: tokens so far, latents, or the pictures."""
    import torch

    with torch.no_grad():
        if hasattr(model, "decode_tokens"):
            return model.decode_tokens(x)
        return model.decode_first_stage(x) if hasattr(model, "decode_first_stage") else x


def write_preview(outdir: Path, x: Any) -> None:
    """The first of the pictures [B, C, H, W] in [-1, 1] as <outdir>/preview.png, whole at any time; NaN is black."""
    from ldm import generate

    outdir.mkdir(parents=True, exist_ok=True)
    part = outdir / ".preview.png.part"
    generate.pictures(x[:1].float().nan_to_num(-1.0).clamp(-1, 1).cpu(), "preview")[0].save(part, format="PNG")
    part.replace(outdir / "preview.png")


def free_name(outdir: Path, seed: int | None) -> Path:
    """`<seed>.png` or `grid.png`, with a number behind it if that is taken: nothing is overwritten."""
    stem = "grid" if seed is None else f"{seed:05}"
    path, number = outdir / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = outdir / f"{stem}-{number}.png"
    return path


# --- painting: flags --------------------------------------------------------------------------------------------------

PAINT_KNOBS = "lower --n_samples or --H and --W, or use --precision bf16"
PROMPT = "a painting of a virus monster playing guitar"
SD_CONFIG, SD_WEIGHTS = "configs/stable-diffusion/v1-inference.yaml", "models/ldm/stable-diffusion-v1/model.ckpt"
SHIPPED = "models/ldm/openmoji"  # draws where there is no Stable Diffusion
# Flags whose value makes the picture, with the official defaults; they are in its PNG, and --like reads them there.
SETTINGS: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": None,
    "sampler": "ddim",
    "steps": 50,
    "grid": None,
    "eta": None,
    "scale": 7.5,
    "seed": 42,
    "precision": "autocast",
    "weights": None,
    "clip_skip": 1,
    "long_prompt": False,
    "config": None,
    "ckpt": None,
    "model_size": None,  # [height, width] where the model draws in one size only
}
COUNTS = {"n_iter": 2, "n_samples": 3}  # one each with --like


def painting_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """The flags that txt2img, img2img and inpaint share. Defaults are filled in by `settle`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for group in (_picture_flags, _sampling_flags, _model_flags, _file_flags):
        group(parser.add_argument)
    return parser


def _picture_flags(add: Any) -> None:
    add("--prompt", nargs="?", help=f'the text (default: "{PROMPT}"); (word:1.3) gives a word weight')
    add("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add("--from-file", metavar="FILE", help="a prompt in each line, `-` = standard input; one picture each")
    add("--clip-skip", type=int, metavar="N", help="leave out the last N - 1 layers of the text encoder (default: 1)")
    add("--long-prompt", action="store_true", default=None, help="encode prompts of any length, in chunks")
    add("--n_iter", "--n-iter", type=int, metavar="N", help="how often to draw n_samples pictures")
    add("--n_samples", "--n-samples", type=int, metavar="N", help="pictures at once (on the CPU: one after another)")
    add("--seed", type=int, help="seed of the first picture; picture i has seed + i (default: 42)")
    add("--fixed_code", "--fixed-code", action="store_true", help="the same seeds in each iteration")
    add("--like", metavar="PNG", help="make this picture again; other flags change its settings")


def _sampling_flags(add: Any) -> None:
    add("--ddim_steps", "--steps", type=int, dest="steps", metavar="N", help="sampler steps, 1..1000")
    add("--sampler", metavar="NAME", help="ddpm, ddim, plms, euler, euler_ancestral, heun, dpmpp_2m, unipc, ...")
    add("--plms", action="store_true", help="the same as --sampler plms")
    add("--grid", metavar="NAME", help="time grid: uniform, trailing, karras, ... (default: the official one)")
    add("--ddim_eta", "--eta", type=float, dest="eta", metavar="E", help="noise of ddim: 0 none (default), 1 as DDPM")
    add("--scale", type=float, help="classifier-free guidance (1: off)")
    add("--C", type=int, help="latent channels; only checked, the model knows them")
    add("--f", type=int, help="downsampling factor; only checked, the model knows it")


def _model_flags(add: Any) -> None:
    add("--config", metavar="YAML", help="config of the model")
    add("--ckpt", metavar="FILE", help="checkpoint (.ckpt or .safetensors) or run directory")
    add("--weights", choices=("ema", "raw"), help="averaged or last weights (default: ema where there are)")
    precisions = ("full", "autocast", "fp32", "bf16", "fp16")
    text = "autocast (default): half precision on CUDA, else full; full = fp32; bf16, fp16: weights too"
    add("--precision", choices=precisions, help=text)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--compile", action="store_true", help="compile the network; pays after some dozen steps")


def preview_flag(add: Any) -> None:
    """--preview, of all scripts that draw step by step."""
    text = "write <outdir>/preview.png every N steps (default of N: 10)"
    add("--preview", nargs="?", type=int, const=10, metavar="N", help=text)


def _file_flags(add: Any) -> None:
    add("--outdir", nargs="?", metavar="DIR", help="where the pictures go")
    add("--skip_grid", "--skip-grid", action="store_true", help="no picture of all pictures")
    add("--skip_save", "--skip-save", action="store_true", help="no single pictures")
    add("--n_rows", "--n-rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (0: n_samples)")
    preview_flag(add)
    add("--safety", choices=("on", "off"), default="off", help="withhold what the safety checker flags (default: off)")
    add("--watermark", choices=("on", "off"), default="off", help="the official invisible watermark (default: off)")


def settle(args: argparse.Namespace, script: str, **defaults: Any) -> dict[str, Any]:
    """The settings: the command line over those of --like over the script's defaults over the official ones."""
    from ldm.generate import read_settings
    from ldm.util import UserError

    if args.plms and args.sampler not in (None, "plms"):
        raise UserError(f"--plms and --sampler {args.sampler}: choose one")
    args.sampler = "plms" if args.plms else args.sampler
    like = read_settings(args.like) if args.like else {}
    if like.get("script", script) != script:
        raise UserError(f"--like {args.like} was made by {like['script']}.py: use that script")
    if args.like and "script" not in like:
        raise UserError(f"--like {args.like} was made from a run: use scripts/sample.py")
    counts = dict.fromkeys(COUNTS, 1) if args.like else {k: defaults.get(k, v) for k, v in COUNTS.items()}
    textless = script == "inpaint" and not (args.prompt or args.from_file)  # its model is another one
    shipped = {} if args.like or textless else shipped_model(args)
    known = {**SETTINGS, **defaults, **counts, **shipped}
    old = {k: v for k, v in like.items() if k in known and k not in COUNTS}
    given = {k: getattr(args, k) for k in known if getattr(args, k, None) is not None}
    settings = {**known, **old, **given}
    for name in (*COUNTS, "steps", "H", "W"):
        if name in settings and settings[name] < 1:
            raise UserError(f"--{name} {settings[name]}: expected at least 1")
    if args.like and not args.ckpt and not args.config:
        settings["like_digest"] = like.get("digest")
    return settings


def shipped_model(args: argparse.Namespace) -> dict[str, Any]:
    """Where no model is named and Stable Diffusion is not linked: the checkpoint and settings of the project's own."""
    from ldm import text2image

    named = args.ckpt or args.config or any(getattr(args, name, None) for name in ("run", "ldm", "laion400m"))
    if named or text2image.weights_at(SD_WEIGHTS) or (found := text2image.find(SHIPPED)) is None:
        return {}
    print(
        f"no Stable Diffusion at {SD_WEIGHTS}, so this is drawn by {SHIPPED} (OpenMoji, CC BY-SA 4.0). To use Stable "
        f"Diffusion: ln -s /your/model.ckpt {SD_WEIGHTS}, or --ckpt"
    )
    return {"ckpt": SHIPPED, **text2image.sampling_of(found)}


def at_model_size(settings: dict[str, Any], picture: Any, name: str, fill: int = 255) -> Any:
    """A picture (or mask) [H, W, ...] scaled into the one size that the model draws, where there is such a size.

    What it does not cover is filled; the aspect stays.
    """
    if not settings.get("model_size"):
        return picture
    from ldm.picture_files import fitted

    height, width = settings["model_size"]
    if picture.shape[:2] != (height, width):
        print(f"{name}: scaled from {picture.shape[1]}x{picture.shape[0]} to {width}x{height}, the size of the model")
    return fitted(picture, (height, width), fill)


# --- painting: the loop -----------------------------------------------------------------------------------------------


def open_painter(args: argparse.Namespace, settings: dict[str, Any], config: str, weights: str) -> Any:
    """Loads the model; says what it is, and adds it to `settings`.

    config, weights: where they are unless the command line says otherwise.
    """
    from ldm import generate, text2image
    from ldm.painter import Knobs, Painter
    from ldm.util import UserError

    device = generate.pick_device(args.device)
    file = text2image.find_weights(settings["ckpt"], weights)
    knobs = {k: settings[k] for k in ("sampler", "steps", "scale", "eta", "grid", "clip_skip", "long_prompt")}
    knobs = Knobs(**knobs)
    options = {"weights": settings["weights"], "device": device, "compile": args.compile}

    def load(precision: str) -> Any:
        return text2image.load(file, settings["config"], config, precision=precision, **options)

    loaded = load(settings["precision"])
    print(f"{file}: weights: {loaded.weights}, config: {loaded.config}, {settings['precision']} on {device.type}")
    if settings.pop("like_digest", None) not in (None, loaded.digest):
        print(f"note: {file} has changed since {args.like} was made")
    model = loaded.model
    for name, given, own in (("C", args.C, model.channels), ("f", args.f, model.downsampling)):
        if given not in (None, own):
            raise UserError(f"--{name} {given}: the model has {own}")
    precision = settings["precision"]
    painter = Painter(model, knobs, settings["negative_prompt"], precision, full=lambda: load("fp32").model, say=print)
    settings |= {"ckpt": str(file), "weights": loaded.weights, "digest": loaded.digest}
    settings["config"] = loaded.config if loaded.config.endswith((".yaml", ".yml")) else None  # else it is in the file
    return painter


def draws_tokens(run: str) -> bool:
    """Whether a run is a transformer over tokens."""
    from ldm import token_painter

    return token_painter.draws_tokens(run)


def open_token_painter(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The same for a run of DALL-E or CogView; settings that only diffusion knows are left out."""
    from ldm import generate, token_painter

    device = generate.pick_device(args.device)
    scale = settings["scale"] if args.like else args.scale  # the default is diffusion's
    painter, facts = token_painter.open_run(
        settings["run"], settings["negative_prompt"], scale, settings["weights"], device
    )
    print(f"{settings['run']}: weights: {facts['weights']} on {device.type}")
    if settings.pop("like_digest", None) not in (None, facts["digest"]):
        print(f"note: {settings['run']} has changed since {args.like} was made")
    for name in ("sampler", "grid", "eta", "clip_skip", "long_prompt", "config", "ckpt", "model_size", "H", "W"):
        settings.pop(name, None)
    settings |= {**facts, "steps": painter.steps, "scale": painter.scale}
    return painter


def prompts_of(args: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """One prompt for each picture of an iteration."""
    from ldm.text2image import read_prompts

    return read_prompts(args.from_file) if args.from_file else [settings["prompt"]] * settings["n_samples"]


def gallery(args: argparse.Namespace, settings: dict[str, Any], samples: Any, together: Any, **defaults: Any) -> Any:
    """Where the pictures go, with the extras that were asked for."""
    from ldm import safety
    from ldm.picture_files import Gallery

    check = safety.load_checker() if args.safety == "on" else None
    mark = safety.load_watermark() if args.watermark == "on" else None
    samples, together = None if args.skip_save else samples, None if args.skip_grid else together
    columns = args.n_rows or settings["n_samples"]
    return Gallery(samples, together, columns, check=check, mark=mark, say=print)


def paint(
    args: argparse.Namespace,
    settings: dict[str, Any],
    painter: Any,
    batches: Iterable[Any],
    size: tuple[int, int],
    out: Any,
    *,
    start: Any = None,
    finish: Callable[[Any], Any] = lambda picture: picture,
) -> None:
    """Paints all batches, writing each picture as soon as it is there.

    Args:
        size: (height, width) that the model takes; `finish` crops the uint8 picture to what was asked for.
        out: a Gallery.
        start: a Start, for pictures made from a picture.
    """
    from tqdm import tqdm

    from ldm import generate

    batches = list(batches)
    total, made, began = sum(len(b) for b in batches), 0, time.perf_counter()
    strength = 1.0 if start is None else start.strength
    record = {k: v for k, v in settings.items() if k not in COUNTS} | generate.versions()
    for batch in painter.calls(batches):
        names = f"{made + 1}-{made + len(batch)}" if len(batch) > 1 else f"{made + 1}"
        with tqdm(total=int(strength * settings["steps"]), desc=f"picture {names} of {total}", unit="step") as bar:
            callback = step_callback(bar, painter, Path(args.outdir), args.preview)
            pictures = painter.paint(batch, size, start, callback)
        made += len(batch)
        for (seed, prompt), picture in zip(batch, pictures, strict=True):
            out.add(finish(picture), {**record, "seed": seed, "prompt": prompt, "precision": painter.precision})
    out.close(record)
    seconds, plural = (time.perf_counter() - began) / max(1, total), "s" * (out.count != 1)
    print(f"{out.count} picture{plural} in {args.outdir}, {seconds:.1f} s each, peak memory {peak_memory():.1f} GiB")


def step_callback(bar: Any, painter: Any, outdir: Path, every: int | None) -> Callable[[int, Any], None]:
    """Moves the bar and writes the preview."""

    def step(i: int, x0: Any) -> None:
        bar.update(i + 1 - bar.n)  # a second try starts anew
        if every and (i + 1) % every == 0:
            from PIL import Image

            outdir.mkdir(parents=True, exist_ok=True)
            part = outdir / ".preview.png.part"
            Image.fromarray(painter.decode(x0[:1])[0]).save(part, format="PNG")
            part.replace(outdir / "preview.png")

    return step


def crop_to(size: tuple[int, int], inner: tuple[int, int], corner: bool) -> Callable[[Any], Any]:
    """A function that crops [H, W, C] pictures of `size` (height, width) to `inner`, at the corner or in the middle."""
    top, left = (0, 0) if corner else ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    return lambda picture: picture[top : top + inner[0], left : left + inner[1]]


def fitting_size(painter: Any, size: tuple[int, int], how: str) -> tuple[int, int]:
    """The size that the model takes; says so where it is another one. `how` ends the line."""
    from ldm.picture_files import rounded_up

    fitting = rounded_up(size, painter.multiple)
    if fitting != size:
        print(
            f"size {size[1]}x{size[0]}: the model takes multiples of {painter.multiple}, "
            f"so {fitting[1]}x{fitting[0]} is painted and {how}"
        )
    return fitting
