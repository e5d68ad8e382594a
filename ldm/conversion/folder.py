"""A diffusers folder: its files, and the official config that says the same as its config.json files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import checkpoint
from ldm.conversion import first_stage, text, unet
from ldm.conversion.layout import PREDICTIONS, SCHEDULES, WEIGHTS
from ldm.util import UserError

OWN = "official"  # what diffusers has no place for: config.yaml, extra.safetensors
XL_SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
REFINER_SIZES = ("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score")
HOME = "ldm.models.diffusion.ddpm."


def is_folder(path: Path) -> bool:
    """Whether `path` is a diffusers folder, of a whole model or of one component."""
    return (path / "model_index.json").is_file() or (path / "config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        UserError: missing, or no JSON mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist: the diffusers folder is not whole") from e
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component: one file, shards with an index, or the half-precision variant.

    Raises:
        UserError: there are none.
    """
    stems = [WEIGHTS.removesuffix(".safetensors"), "diffusion_pytorch_model", "pytorch_model"]
    for variant in ("", ".fp16"):
        for end in (".safetensors", ".bin"):
            for stem in stems:
                index = folder / f"{stem}{end}.index{variant}.json"
                file = folder / f"{stem}{variant}{end}"
                if index.is_file():
                    shards = sorted(set(read_json(index)["weight_map"].values()))
                    return {k: v for shard in shards for k, v in checkpoint.read_state(folder / shard).items()}
                if file.is_file():
                    return checkpoint.read_state(file)
    raise UserError(f"{folder} holds no weights: expected {stems[0]}.safetensors or {stems[1]}.safetensors")


def component(folder: Path, kind: str) -> dict[str, Tensor]:
    """Tensors of one component under today's names; `kind` is its class."""
    state = weights(folder)
    if kind in (first_stage.KL, first_stage.VQ):
        return first_stage.modern_names(state)
    if kind.startswith("CLIPText") and not any(k.startswith("text_model.") for k in state):
        return {k if k.startswith("text_projection") else f"text_model.{k}": v for k, v in state.items()}
    return state


# --- the official config ----------------------------------------------------------------------------------------------


def official_config(folder: Path) -> dict[str, Any]:
    """`{"model": {target, params}}` for a folder that this project did not write.

    Raises:
        UserError: a model that has no official counterpart.
    """
    if not (folder / "model_index.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("_class_name") not in (first_stage.KL, first_stage.VQ):
            raise UserError(f"{folder}: {config.get('_class_name')} alone is no model; give the whole folder")
        return {"model": _stage(config, str(folder), alone=True)}
    index = read_json(folder / "model_index.json")
    there = {k for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    net = read_json(folder / "unet" / "config.json") if "unet" in there else {}
    if net.get("_class_name") not in (unet.CONDITION, unet.PLAIN):
        kind = net.get("_class_name", "none")
        raise UserError(f"{folder} is a {index.get('_class_name')} with the network {kind}: expected one with a U-Net")
    network = {"target": "ldm.modules.unet.UNetModel", "params": unet.from_config(net)}
    params = _schedule(read_json(folder / "scheduler" / "scheduler_config.json"))
    params |= {"image_size": net.get("sample_size") or 64, "channels": net["out_channels"], "use_ema": False}
    params["unet_config"] = network
    if "vae" not in there and "vqvae" not in there:
        return {"model": {"target": HOME + "DDPM", "params": params}}
    name = "vae" if "vae" in there else "vqvae"
    stage = read_json(folder / name / "config.json")
    params["scale_factor"] = stage.get("scaling_factor", 1.0 if stage["_class_name"] == first_stage.VQ else 0.18215)
    params["first_stage_config"] = _stage(stage, name)
    params |= _condition(folder, index, there, net)
    return {"model": {"target": HOME + "LatentDiffusion", "params": params}}


def _stage(config: Mapping[str, Any], where: str, alone: bool = False) -> dict[str, Any]:
    quantised = config["_class_name"] == first_stage.VQ
    name = ("VQModel" if alone else "VQModelInterface") if quantised else "AutoencoderKL"
    return {"target": f"ldm.models.autoencoder.{name}", "params": first_stage.from_config(config, where)}


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {v: k for k, v in SCHEDULES.items()}
    kinds = {v: k for k, v in PREDICTIONS.items()}
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if schedule not in names or prediction not in kinds:
        raise UserError(f"scheduler: {schedule}, {prediction} has no counterpart in the official schedules")
    params: dict[str, Any] = {
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_schedule": names[schedule],
        "linear_start": config.get("beta_start", 1e-4),
        "linear_end": config.get("beta_end", 2e-2),
    }
    if config.get("trained_betas") is not None:
        params["given_betas"] = list(config["trained_betas"])
    if kinds[prediction] != "eps":
        params["parameterization"] = kinds[prediction]
    if config.get("rescale_betas_zero_snr"):
        params["zero_terminal_snr"] = True
    return params


def _condition(folder: Path, index: Mapping[str, Any], there: set[str], net: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of LatentDiffusion that say how the model is conditioned."""
    texts = sorted(there & {"text_encoder", "text_encoder_2", "bert"})
    if not texts:
        if net["in_channels"] != net["out_channels"] or net["_class_name"] != unet.PLAIN:
            raise UserError(f"{folder}: the conditioner of this model is not in the folder, give its YAML by --config")
        return {"cond_stage_config": "__is_unconditional__", "concat_mode": False}
    params: dict[str, Any] = {"first_stage_key": "jpg", "cond_stage_key": "txt", "conditioning_key": "crossattn"}
    xl = "text_encoder_2" in texts
    read = {name: text.from_config(read_json(folder / name / "config.json"), xl) for name in texts}
    if xl:
        embedders = [{**config, "input_key": "txt"} for config in read.values()]
        sizes = REFINER_SIZES if index.get("requires_aesthetics_score") else XL_SIZES
        target, home = "ConcatTimestepEmbedderND", "ldm.modules.conditioners."
        embedders += [{"target": home + target, "params": {"outdim": 256}, "input_key": key} for key in sizes]
        conditioner = {"target": home + "GeneralConditioner", "params": {"emb_models": embedders}}
        return params | {"conditioning_key": "crossattn-adm", "cond_stage_config": conditioner}
    if net["in_channels"] == 2 * net["out_channels"] + 1:
        params |= {"conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"]}
    elif net["in_channels"] != net["out_channels"]:
        raise UserError(
            f"{folder}: a U-Net from {net['in_channels']} to {net['out_channels']} channels is not known here"
        )
    return params | {"cond_stage_config": read[texts[0]]}


# --- tensors that only the official layout has ------------------------------------------------------------------------


def tables(params: Mapping[str, Any], engine: bool) -> dict[str, Tensor]:
    """The stored schedule: LatentDiffusion's buffers, or generative-models' noise levels."""
    from ldm.diffusion.schedule import ddpm_buffers, make_beta_schedule, rescale_betas_zero_snr

    names = ("linear_start", "linear_end", "cosine_s")
    betas = params["given_betas"]
    if betas is None:
        betas = make_beta_schedule(params["beta_schedule"], params["timesteps"], **{n: params[n] for n in names})
    if params["zero_terminal_snr"]:
        betas = rescale_betas_zero_snr(betas)
    buffers = ddpm_buffers(betas, params["v_posterior"], params["parameterization"])
    if engine:
        abar = buffers["alphas_cumprod"].double()
        return {"denoiser.sigmas": ((1 - abar) / abar).sqrt().float()}
    buffers.pop("lvlb_weights")  # official files do not hold it
    return buffers


def unused_tensors(encoder: text.Encoder, embedder: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What an official text encoder has beside the folder's.

    Zero for blocks behind the layer that is read: such a block adds nothing to what passes through it.
    """
    found: dict[str, Tensor] = {}
    if encoder.rows is text.CLIP_ROWS:
        length = encoder.config["max_position_embeddings"]
        found["transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    elif encoder.unused:
        from ldm.modules.open_clip_text import OpenCLIPText

        with torch.device("meta"):
            own = OpenCLIPText(**text.open_clip_sizes(text.full_params(embedder))).state_dict()
        names = {f"model.{k}": v for k, v in own.items()}
        zero = {k: torch.zeros(v.shape) for k, v in names.items() if k.startswith(encoder.unused)}
        found = {**zero, "model.logit_scale": torch.tensor(100.0).log()}
    return {prefix + k: v for k, v in found.items()}
