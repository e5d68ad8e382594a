"""From a run directory or checkpoint to pictures: loading, seeds, batches, files that say how they were made."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm import checkpoint
from ldm.config import load_yaml
from ldm.util import UserError, instantiate_from_config, suggest, to_pil

CHUNK = "ldm"  # name of the PNG text chunk
LARGE = 2**28  # bytes, see `digest`


# --- loading ----------------------------------------------------------------------------------------------------------


def run_config(run: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The merged config of a run: from the checkpoint itself, else from the files beside it.

    Raises:
        UserError: there is none.
    """
    if isinstance(content.get("config"), str):
        return OmegaConf.to_container(OmegaConf.create(content["config"]), resolve=True)
    files = sorted((run / "configs").glob("*-project.yaml")) or sorted(run.glob("config.yaml"))
    if not files:
        raise UserError(f"{run} holds no config: expected {run}/configs/*-project.yaml or {run}/config.yaml")
    return OmegaConf.to_container(OmegaConf.merge(*map(load_yaml, files)), resolve=True)


def without_weights(node: Any) -> Any:
    """The config with every `ckpt_path`, and a classifier's `weights`, removed: the checkpoint holds them already."""
    if isinstance(node, dict):
        if node.get("weights") and "network_config" in node:
            from ldm.models.pretrained import without_source

            node = without_source(node)
        return {k: without_weights(v) for k, v in node.items() if k not in ("ckpt_path", "ignore_keys")}
    return [without_weights(v) for v in node] if isinstance(node, list) else node


def load_run(path: str | Path, dotlist: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Builds and fills the model of a run directory or checkpoint file.

    Args:
        dotlist: `key.path=value` changes of the config.

    Returns:
        (model in eval mode, {"run", "checkpoint", "sha256", "config", "global_step", "minutes" of training or None,
        "origin": what `ldm.origin` kept of it, empty where there is nothing}).

    Raises:
        UserError: no run, no config, or weights that do not fit.
    """
    run, file = checkpoint.find_run(path)
    content = checkpoint.read(file)
    config = run_config(run, content)
    if dotlist:
        config = OmegaConf.to_container(OmegaConf.merge(config, OmegaConf.from_dotlist(list(dotlist))), resolve=True)
    model = build_model(config["model"], checkpoint.state_dict_of(content, file), file)
    if hasattr(model, "on_load_checkpoint"):  # what the recipe keeps beside its weights
        model.on_load_checkpoint(content)
    model.class_names = content.get("class_names") or config.get("class_names")
    info = {"run": str(run), "checkpoint": str(file), "sha256": digest(file), "config": config}
    info["global_step"] = int(content.get("global_step") or 0)
    info["minutes"], info["origin"] = checkpoint.minutes_of(content), origin_of(content)
    return model, info


def origin_of(content: dict[str, Any]) -> dict[str, Any]:
    """What `ldm.origin.Origin` kept in a checkpoint; empty where there is nothing of it."""
    callbacks = content.get("callbacks")
    state = callbacks.get("Origin") if isinstance(callbacks, dict) else None
    return dict(state) if isinstance(state, dict) else {}


def with_first_stage(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """`state`, and where it came without a first stage, the one in the file that the config names, if that is there."""
    stage = (config.get("params") or {}).get("first_stage_config")
    path = (stage.get("params") or {}).get("ckpt_path") if isinstance(stage, dict) else None
    if path is None or any(k.startswith("first_stage_model.") for k in state):
        return state
    file = checkpoint.in_project(path)
    found = checkpoint.read_state(file) if file.is_file() else {}
    return {**state, **{f"first_stage_model.{k}": v for k, v in found.items() if not k.startswith("loss.")}}


def build_model(config: dict[str, Any], state: dict[str, Tensor], source: str | Path) -> Any:
    """Instantiates `config` and loads `state` strictly; averaged weights may be absent from official files."""
    state = with_first_stage(state, config)
    model = instantiate_from_config(without_weights({k: config[k] for k in ("target", "params") if k in config}))
    if hasattr(model, "model_ema") and not any(k.startswith("model_ema.") for k in state):
        del model.model_ema
    checkpoint.load(model, state, source=source)
    return model.eval().requires_grad_(False)


def digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256.

    Reading gigabytes would take longer than a picture does: of a file above 256 MiB it is the SHA-256 of its size and
    of 256 blocks of 64 KiB, evenly spread from the first bytes to the last.
    """
    size, block, blocks = path.stat().st_size, 2**16, 256
    sha = hashlib.sha256()
    with path.open("rb") as f:
        if size > LARGE:
            sha.update(size.to_bytes(8, "little"))
            for i in range(blocks):
                f.seek((size - block) * i // (blocks - 1))
                sha.update(f.read(block))
        else:
            while data := f.read(2**22):
                sha.update(data)
    return sha.hexdigest()[:16]


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is not there.
    """
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if found[d]))
    if not found.get(name.partition(":")[0], False):
        here = ", ".join(d for d, there in found.items() if there)
        raise UserError(f"--device {name} is not available here; available: {here}")
    return torch.device(name)


def weights_scope(model: Any, weights: str | None) -> tuple[Any, str]:
    """(context in which the model uses these weights, "ema" or "raw").

    Raises:
        UserError: averaged weights were asked for and there are none.
    """
    has_ema = hasattr(model, "model_ema")
    if weights == "ema" and not has_ema:
        raise UserError("--weights ema: this checkpoint holds one set of weights only; leave --weights out or use raw")
    use = weights or ("ema" if has_ema else "raw")
    return (model.ema_scope() if use == "ema" else nullcontext()), use


# --- knobs ------------------------------------------------------------------------------------------------------------


def knobs_of(model: Any) -> dict[str, inspect.Parameter]:
    """The declared knobs of `model.sample`: its keyword-only parameters but for seeds and callback."""
    if not hasattr(model, "sample"):
        raise UserError(f"{type(model).__name__} generates nothing; scripts/sample.py is for generative models")
    parameters = inspect.signature(model.sample).parameters.items()
    return {k: p for k, p in parameters if p.kind is p.KEYWORD_ONLY and k not in ("seeds", "callback")}


def check_knobs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The given knobs of `model.sample` that are not None.

    Raises:
        UserError: a knob this model does not have.
    """
    return split_knobs(model, given, sampling_only=True)[0]


def split_knobs(
    model: Any, given: dict[str, Any], sampling_only: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(knobs for `model.sample`, further arguments for `model.condition`) of those given that are not None.

    Raises:
        UserError: a knob this model does not have.
    """
    known, condition = knobs_of(model), {} if sampling_only else inspect.signature(model.condition).parameters
    options = {k: p for k, p in condition.items() if k not in ("seeds", "classes", "prompts", "negative_prompt")}
    chosen = {k: v for k, v in given.items() if v is not None}
    for name in chosen:
        if name not in known and name not in options:
            has = ", ".join({**known, **options}) or "no knobs"
            hint = suggest(name, {**known, **options})
            raise UserError(f"--{name.replace('_', '-')}: {type(model).__name__} has {has}{hint}")
    return {k: v for k, v in chosen.items() if k in known}, {k: v for k, v in chosen.items() if k in options}


def class_index(model: Any, name: str) -> int:
    """A class given by number or by name.

    Raises:
        UserError: no such class.
    """
    names: Sequence[str] = model.class_names or []
    if name in names:
        return list(names).index(name)
    if name.lstrip("-").isdigit():
        number = int(name)
        if names and not 0 <= number < len(names):
            raise UserError(f"--class {number}: expected 0..{len(names) - 1} or one of {', '.join(names[:20])}")
        return number
    raise UserError(
        f"--class {name!r} is not known{suggest(name, names)}; classes: {', '.join(names[:20]) or 'numbers only'}"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def batches(seeds: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(seeds), size):
        yield list(seeds[start : start + size])


def save_png(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes a PNG whose text chunk `ldm` holds `settings` as JSON; an interrupted one leaves no half file."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write the same picture
    try:
        picture.save(temporary, format="PNG", pnginfo=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """What `save_png` wrote.

    Raises:
        UserError: no picture, or no such chunk in it.
    """
    try:
        with Image.open(path) as picture:
            text = dict(getattr(picture, "text", {}))
    except OSError as e:
        raise UserError(f"--like {path}: cannot be read as a picture ({e})") from e
    if CHUNK not in text:
        raise UserError(f"--like {path}: the PNG holds no settings of this project (text chunk {CHUNK!r})")
    return json.loads(text[CHUNK])


def versions() -> dict[str, str]:
    """What else decides the last bits of a picture."""
    return {"torch": str(torch.__version__), "python": platform.python_version(), "machine": platform.machine()}


def pictures(x: Tensor, source: str) -> list[Image.Image]:
    """[B, C, H, W] in [-1, 1] -> PIL images.

    Raises:
        NonFinite: the values are not finite; a black picture would hide it.
    """
    try:
        return to_pil(x)
    except ValueError as e:
        raise NonFinite(f"{source} gave non-finite values; no picture was written. Try --precision fp32") from e


class NonFinite(Exception):
    """The network gave NaN or infinity."""

    exit_code = 3
