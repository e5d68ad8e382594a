"""What an official config describes: the parts of a model, where a checkpoint keeps them, and its noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.conversion.text import class_name
from ldm.families import CONDITIONERS, STAGE, UNET, mismatch
from ldm.util import UserError, instantiate_from_config

UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
LATENT = ("LatentDiffusion", "Layout2ImgDiffusion")
STAGES = ("AutoencoderKL", "VQModel", "VQModelInterface")
# constructor parameters that the folder's scheduler and first stage are written from, and their defaults
DEFAULTS: dict[str, Any] = {
    "timesteps": 1000,
    "beta_schedule": "linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "cosine_s": 8e-3,
    "given_betas": None,
    "parameterization": "eps",
    "v_posterior": 0.0,
    "scale_factor": 1.0,
    "scale_by_std": False,
    "zero_terminal_snr": False,
    "image_size": None,
    "channels": None,
    "conditioning_key": None,
    "concat_mode": True,
    "cond_stage_key": None,
}
NAMES = {"unet": "U-Net", "first_stage": "first stage (VAE)", "conditioner": "conditioner (text encoder)"}
# what checkpoints hold beside the parts: schedule tables, averages, scales, the losses of a first stage
BESIDE = ("betas", "alphas_", "sqrt_", "log_one_", "posterior_", "lvlb_weights", "logvar", "scale_factor", "ddim_")
BESIDE += ("model_ema.", "denoiser.sigmas", "loss.", STAGE + "loss.", STAGE + "model_ema.")


@dataclass(frozen=True)
class Recipe:
    """A config, read.

    Attributes:
        kind: latent, pixel or first_stage.
        unet, first_stage: `{target, params}`, or None.
        conditioner: `{target, params}`, an official marker, or None.
        params: the recipe's own parameters, see DEFAULTS.
        config: the whole `{"model": ...}`.
    """

    kind: str
    unet: Mapping[str, Any] | None
    first_stage: Mapping[str, Any] | None
    conditioner: Mapping[str, Any] | str | None
    params: Mapping[str, Any]
    config: Mapping[str, Any] = field(repr=False)

    @property
    def has_conditioner(self) -> bool:
        """False too where the first stage serves as one."""
        return isinstance(self.conditioner, Mapping)


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a config with the section `model`.

    Raises:
        UserError: a model that diffusers has no layout for.
    """
    if not isinstance(config.get("model"), Mapping) or "target" not in config["model"]:
        raise UserError("the config has no model.target: expected the YAML of the model that the checkpoint is of")
    try:
        recipe = _read(config["model"], config)
    except KeyError as e:
        raise UserError(f"the config has no {e.args[0]} where {config['model']['target']} needs one") from e
    if recipe.first_stage is not None and class_name(recipe.first_stage) not in STAGES:
        raise UserError(f"{recipe.first_stage['target']}: diffusers has no such first stage; use --to safetensors")
    return recipe


def _read(model: Mapping[str, Any], config: Mapping[str, Any]) -> Recipe:
    params = dict(model.get("params") or {})
    name = class_name(model)
    if name == "DiffusionEngine":
        return _of_engine(params, config)
    if name in STAGES:
        return Recipe("first_stage", None, {"target": model["target"], "params": params}, None, dict(DEFAULTS), config)
    own = {**DEFAULTS, **{k: params[k] for k in DEFAULTS if k in params}}
    if name == "DDPM":
        return Recipe("pixel", params["unet_config"], None, None, own, config)
    if name not in LATENT:
        raise UserError(f"{model['target']}: only diffusion models and their first stages have a diffusers layout")
    stage = params["first_stage_config"]
    if not isinstance(stage, Mapping):
        raise UserError(
            f"first_stage_config {stage} is a path: give a config with its {{target, params}} by --config; "
            "the run that it names has them"
        )
    return Recipe("latent", params["unet_config"], stage, params["cond_stage_config"], own, config)


def _of_engine(params: Mapping[str, Any], config: Mapping[str, Any]) -> Recipe:
    """generative-models' DiffusionEngine says the same in other words."""
    denoiser = params["denoiser_config"]["params"]
    scaling = denoiser["scaling_config"]["target"].rpartition(".")[2]
    if scaling not in ("EpsScaling", "VScaling"):
        raise UserError(f"denoiser scaling {scaling}: only EpsScaling and VScaling have a counterpart in diffusers")
    given = denoiser["discretization_config"].get("params") or {}
    own = {
        **DEFAULTS,
        "linear_start": given.get("linear_start", 0.00085),
        "linear_end": given.get("linear_end", 0.012),
        "timesteps": given.get("num_timesteps", 1000),
        "parameterization": "v" if scaling == "VScaling" else "eps",
        "scale_factor": params["scale_factor"],
    }
    unet, stage = params["network_config"], params["first_stage_config"]
    return Recipe("latent", unet, stage, params.get("conditioner_config") or UNCONDITIONAL, own, config)


# --- against the checkpoint -------------------------------------------------------------------------------------------


def prefixes(recipe: Recipe, names: Mapping[str, Tensor]) -> dict[str, str]:
    """Where a state dict keeps unet, first_stage and conditioner."""
    if recipe.kind == "first_stage":
        return {"first_stage": ""}
    engine = any(k.startswith(CONDITIONERS[1]) for k in names)
    found = {"unet": UNET, "first_stage": STAGE, "conditioner": CONDITIONERS[engine]}
    several = recipe.has_conditioner and class_name(recipe.conditioner) == "GeneralConditioner"
    if engine and not several:  # a file of generative-models under a config of LatentDiffusion
        found["conditioner"] += "embedders.0."
    return found


def check(recipe: Recipe, state: Mapping[str, Tensor], source: str) -> None:
    """Compares names and shapes with those of the config's own modules, built without memory.

    Raises:
        UserError: a part is missing or does not fit; the message names the family and its config.
    """
    own: dict[str, Tensor] = {}
    places = prefixes(recipe, state)
    for what in ("unet", "first_stage", "conditioner"):
        config = getattr(recipe, what)
        if isinstance(config, Mapping):
            own |= {places[what] + k: v for k, v in skeleton(config).items()}
    try:
        _raise_problems(own, state, places, source)
    except UserError as e:
        hint = mismatch(state, own)
        raise UserError(f"{source}: {hint}") if hint else e from None


def _raise_problems(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], places: Mapping[str, str], source: str
) -> None:
    for what, prefix in places.items():
        if any(k.startswith(prefix) for k in own) and not any(k.startswith(prefix) for k in state):
            raise UserError(f"{source} holds no {NAMES[what]}: expected tensors named {prefix}...")
    known = (*BESIDE, *CONDITIONERS)  # an unconditional model's file may hold the first stage twice
    problems = {
        "missing": [k for k in own if k not in state and not k.endswith("position_ids")],
        "unexpected": [k for k in state if k not in own and not k.startswith(known)],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} (config: {tuple(own[k].shape)})"
            for k in own
            if k in state and own[k].shape != state[k].shape
        ],
    }
    lines = [f"{len(v)} {what} (first: {', '.join(v[:3])})" for what, v in problems.items() if v]
    if lines:
        raise UserError(f"{source} does not fit the config: {'; '.join(lines)}. Give the right one by --config")


def skeleton(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of `{target, params}` on the meta device; losses and weights files are left out."""
    params = {k: v for k, v in (config.get("params") or {}).items() if k not in ("ckpt_path", "ignore_keys")}
    if "lossconfig" in params:
        params["lossconfig"] = {"target": "torch.nn.Identity"}
    with torch.device("meta"):
        return instantiate_from_config({"target": config["target"], "params": params}).state_dict()
