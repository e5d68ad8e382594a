"""What txt2img, img2img and inpaint share before they paint: finding and loading a model, prompts, seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm import checkpoint, families
from ldm.config import load_yaml
from ldm.generate import digest, with_first_stage
from ldm.util import UserError, instantiate_from_config

PARTS = {
    "model.diffusion_model.": "U-Net",
    "first_stage_model.": "first stage (VAE)",
    "cond_stage_model.": "text encoder",
}
PRECISIONS = {  # name: dtype of the weights
    "fp32": torch.float32,
    "full": torch.float32,
    "autocast": torch.float32,  # float16 products on CUDA, as the official script; full precision elsewhere
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


# --- finding ----------------------------------------------------------------------------------------------------------


def find(path: str | Path) -> Path | None:
    """`path` from here, or else from the project's folder."""
    found = checkpoint.in_project(path)
    return found if found.exists() else None


def find_weights(given: str | None, default: str) -> Path:
    """The checkpoint that was given (a file or a run directory), or the one at its official place.

    Raises:
        UserError: there is none; says which file to put where.
    """
    if given is not None:
        found = find(given)
        if found is None:
            raise UserError(f"--ckpt {given} does not exist: expected a .ckpt or .safetensors file or a run directory")
        return checkpoint.find_run(found)[1]
    if (found := weights_at(default)) is not None:
        return found
    folder = Path(default).parent
    raise UserError(
        f"no weights at {default}: put the checkpoint there (mkdir -p {folder} && ln -s /your/model.ckpt {default}; "
        f"a .safetensors file may be called {Path(default).stem}.safetensors), or name it by --ckpt"
    )


def weights_at(default: str) -> Path | None:
    """The checkpoint at its official place, or the .safetensors file beside that place."""
    places = (default, str(Path(default).with_suffix(".safetensors")))
    return next((found for p in places if (found := find(p)) is not None), None)


def sampling_of(folder: Path) -> dict[str, Any]:
    """How a model of this project wants to be sampled: the settings under `sampling` in its config.yaml."""
    return OmegaConf.to_container(load_yaml(folder / "config.yaml"), resolve=True).get("sampling") or {}


def config_of(content: dict[str, Any], state: dict[str, Tensor], file: Path, given: str | None, default: str) -> Any:
    """(config, where it is from): given, in the file, beside it, the only one of the file's family, or the default."""
    if given is not None:
        return load_yaml(find(given) or given), given
    if isinstance(content.get("config"), str):
        return OmegaConf.create(content["config"]), "in the file"
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    beside = [file.with_suffix(".yaml"), *sorted((run / "configs").glob("*-project.yaml"))[-1:], run / "config.yaml"]
    if (found := next((p for p in beside if p.is_file()), None)) is not None:
        return load_yaml(found), str(found)
    configs = [c for c in families.detect(state).configs if find(c)]
    where = configs[0] if len(configs) == 1 else default
    return load_yaml(find(where) or where), where


def bare(node: Any) -> Any:
    """A config without what only training needs: weights to start from, averages, losses, learning rates."""
    if isinstance(node, list):
        return [bare(v) for v in node]
    if not isinstance(node, dict):
        return node
    out = {k: bare(v) for k, v in node.items() if k not in ("ckpt_path", "ignore_keys", "scheduler_config")}
    if "use_ema" in out:
        out["use_ema"] = False
    if "lossconfig" in out:
        out["lossconfig"] = {"target": "torch.nn.Identity"}
    return out


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A model and where it is from.

    Attributes:
        model: in eval mode, on its device.
        file, digest: its checkpoint.
        config: where the config is from.
        weights: which set it has, ema or raw.
    """

    model: Any
    file: Path
    digest: str
    config: str
    weights: str


def load(
    file: Path,
    config: str | None,
    default: str,
    *,
    weights: str | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    compile: bool = False,  # noqa: A002  (the field's name for it)
) -> Loaded:
    """Builds a latent diffusion model without memory and hands it the file's memory-mapped tensors.

    Args:
        file: checkpoint.
        config: YAML file; None = see `config_of`, with `default` at the end.
        weights: ema or raw; None = ema where there are averaged weights.
        precision: a row of PRECISIONS; files in another precision are converted tensor by tensor.
        compile: compile the network in place.

    Raises:
        UserError: file and config do not fit; names the part that is missing, or the right config.
    """
    content = checkpoint.read(file)
    state = checkpoint.state_dict_of(content, file)
    tree, where = config_of(content, state, file, config, default)
    tree = OmegaConf.to_container(tree, resolve=True)
    if "model" not in tree:
        raise UserError(f"config {where} has no model: expected the YAML of a latent diffusion model")
    state = with_first_stage(state, tree["model"])
    model = _skeleton(tree["model"], where)
    usable, which = _fitting(model, state, file, weights)
    checkpoint.adopt(model, usable, file, _converter(PRECISIONS[precision]))
    del content, state, usable
    model.eval().requires_grad_(False)
    if compile:
        model.compile_mode = True
        model.configure_model()
    return Loaded(model.to(device), file, digest(file), where, which)


def _skeleton(config: dict[str, Any], where: str) -> Any:
    """The model without weights."""
    config = bare({k: config[k] for k in ("target", "params") if k in config})
    config["params"] = dict(config.get("params") or {})
    if "first_stage_config" not in config["params"]:
        raise UserError(f"config {where} is of a {config.get('target')}, not of a latent diffusion model")
    with checkpoint.NoWeights():
        return instantiate_from_config({**config, "params": {**config["params"], "use_ema": False}})


def _fitting(model: Any, state: dict[str, Tensor], file: Path, weights: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file that the model takes, and which set of weights they are."""
    own = model.state_dict()
    state, which = checkpoint.choose_weights(state, weights, list(own))
    hint = families.mismatch(state, own)
    if hint is not None:
        raise UserError(f"{file}: {hint}")
    state = families.for_recipe(state, own)
    for prefix, name in PARTS.items():
        wanted = [k for k in own if k.startswith(prefix)]
        if wanted and not any(k.startswith(prefix) for k in state):
            raise UserError(
                f"{file} holds no {name}: expected {len(wanted)} tensors named {prefix}... in it "
                "(a whole model in one file; scripts/convert.py makes one of a diffusers folder)"
            )
    return checkpoint.fit(model, state, source=file)[0], which


def _converter(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Weights to `dtype` and convolutions channels-last; the noise schedule (no dot in its names) stays as it is."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        if "." not in name or not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    return convert


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file (with or without BOM, any line ends) that are not blank; `-` is standard input.

    Raises:
        UserError: missing file, no UTF-8, or nothing in it.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = raw.decode("utf-8-sig").splitlines()
    except OSError as e:
        raise UserError(f"--from-file {path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--from-file {path} is not UTF-8 text (byte {e.start}): save it as UTF-8") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file {path} holds no prompt: expected one a line")
    return prompts


Batch = list[tuple[int, str]]  # (seed, prompt) of each picture


def plan(prompts: Sequence[str], n_samples: int, n_iter: int, seed: int, fixed_code: bool) -> Iterator[Batch]:
    """The batches of a run: picture i has seed + i; with fixed_code the seeds start anew in every batch."""
    first = seed
    for _ in range(n_iter):
        for start in range(0, len(prompts), n_samples):
            texts = prompts[start : start + n_samples]
            yield [(first + i, text) for i, text in enumerate(texts)]
            first += 0 if fixed_code else len(texts)
