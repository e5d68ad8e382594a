"""From a run to a folder of models/: small files with the weights that are drawn with, and the config beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ldm import generate, text2image
from ldm.util import UserError, accepted_params, get_obj_from_str

WEIGHTS, CONFIG, FIRST_STAGE = "model.safetensors", "config.yaml", "first_stage"
STAGE = "first_stage_model."
TRAINING = ("scheduler_config", "optimizer_config", "ema_decay", "monitor", "cache_latents", "use_ema")
TRAINING += ("discriminator_config", "augment", "augment_params", "augment_config", "label_smoothing", "test_views")


def release(
    run: str | Path, out: str | Path, sampling: Mapping[str, Any] | None = None, half: bool = True
) -> list[str]:
    """Writes `out`/model.safetensors and config.yaml; a latent diffusion model's first stage goes to a folder below.

    The averaged weights take the place of the last ones where there are some; losses, optimisers and schedules stay
    behind.

    Args:
        run: run directory or checkpoint.
        out: folder to write; what it holds besides (a model card) stays.
        sampling: defaults of scripts/txt2img.py for this model: sampler, steps, scale, H, W.
        half: float16 instead of float32.

    Returns:
        One line a file, with its size.

    Raises:
        UserError: `run` is no run of this project.
    """
    model, info = generate.load_run(run)
    config = {k: v for k, v in info["config"].items() if k in ("model", "data")}
    if "target" not in config.get("model", {}):
        raise UserError(f"{run} holds no config of a model")
    if hasattr(model, "model_ema"):
        model.model_ema.copy_to(model._ema_source[0])
        del model.model_ema
    left = ("loss.", *getattr(model, "training_only", ()))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(left) and "." in k}
    if "scale_factor" in dict(model.named_buffers()):
        config["model"]["params"]["scale_factor"] = round(float(model.scale_factor), 6)
    model_config, folder = bare(config["model"]), Path(out)
    written, params = [], model_config["params"]
    if hasattr(model, "first_stage_model"):
        first = {k.removeprefix(STAGE): v for k, v in state.items() if k.startswith(STAGE)}
        state = {k: v for k, v in state.items() if not k.startswith(STAGE)}
        stage = bare(params["first_stage_config"])
        written += write(folder / FIRST_STAGE, first, {"model": stage}, half)
        stage["params"]["ckpt_path"] = (folder / FIRST_STAGE / WEIGHTS).as_posix()
        params["first_stage_config"] = stage
    config["model"] = model_config
    if sampling:
        config["sampling"] = dict(sampling)
    if model.class_names:
        config["class_names"] = list(model.class_names)
    return written + write(folder, state, config, half)


def bare(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model without what only training needs; a vocabulary as one line."""
    params = {k: v for k, v in text2image.bare(dict(config.get("params") or {})).items() if k not in TRAINING}
    if "use_ema" in (accepted_params(get_obj_from_str(config["target"])) or {}):
        params["use_ema"] = False
    text = params.get("cond_stage_config")
    if isinstance(text, dict) and isinstance((text.get("params") or {}).get("words"), list):
        params["cond_stage_config"] = {**text, "params": {**text["params"], "words": " ".join(text["params"]["words"])}}
    return {"target": config["target"], "params": params}


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], half: bool) -> list[str]:
    """The two files of one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in kept.items()}, folder / WEIGHTS)
    OmegaConf.save(OmegaConf.create(dict(config)), folder / CONFIG)
    return [f"{p}: {p.stat().st_size / 1e6:.1f} MB" for p in (folder / WEIGHTS, folder / CONFIG)]
