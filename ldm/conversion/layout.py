"""The diffusers folder of a recipe: its components with their tables of names, scheduler and model_index.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ldm.conversion import first_stage, unet
from ldm.conversion.recipe import FIRST_STAGE, Recipe
from ldm.conversion.rows import Row
from ldm.conversion.text import Encoder, class_name, encoder_of
from ldm.util import UserError

VERSION = "0.30.0"  # of the diffusers whose layout this is; later ones read it
MODEL, WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
SAME_NAMES = [Row("", "")]
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
SD_PIPELINES = {4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"}  # by input channels
# by the text encoders that there are
XL_PIPELINES = {
    ("text_encoder", "text_encoder_2"): ("StableDiffusionXLPipeline", {"force_zeros_for_empty_prompt": True}),
    ("text_encoder_2",): (
        "StableDiffusionXLImg2ImgPipeline",
        {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
}
NO_LOOP = (
    "diffusers has no pipeline that samples this model: LDMPipeline.from_pretrained loads its parts, "
    "docs/checkpoints.md shows the loop"
)


class Part(NamedTuple):
    """One component.

    Attributes:
        folder: its name; "" = the folder itself.
        prefix: of its tensors in the official file.
        rows: names below the prefix, and diffusers' names.
        config: config.json.
        index: library and class in model_index.json; None = not a component of diffusers.
        file: of the weights.
        unused: official names that have no place there and no effect.
    """

    folder: str
    prefix: str
    rows: list[Row]
    config: dict[str, Any]
    index: tuple[str, str] | None
    file: str = MODEL
    unused: tuple[str, ...] = ()


@dataclass
class Layout:
    """A whole folder.

    Attributes:
        parts: its components with weights.
        tokenizers: encoder by the name of its tokenizer's folder.
        scheduler: scheduler_config.json, if there is a scheduler.
        pipeline: class in model_index.json; None = one component alone, without index.
        extra: further entries of model_index.json.
        note: for the user.
    """

    parts: list[Part] = field(default_factory=list)
    tokenizers: dict[str, Encoder] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    pipeline: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def index(self) -> dict[str, Any] | None:
        """model_index.json."""
        if self.pipeline is None:
            return None
        entries = {part.folder: list(part.index) for part in self.parts if part.index}
        entries |= {name: ["transformers", encoder.tokenizer_cls] for name, encoder in self.tokenizers.items()}
        entries["scheduler"] = ["diffusers", self.scheduler["_class_name"]]
        return {
            "_class_name": self.pipeline,
            "_diffusers_version": VERSION,
            **dict(sorted(entries.items())),
            **self.extra,
        }


def layout_of(recipe: Recipe, places: Mapping[str, str], scale: float) -> Layout:
    """The folder of a recipe.

    Args:
        recipe: of the config.
        places: prefixes of the parts in the official file.
        scale: factor of the latents.

    Raises:
        UserError: diffusers cannot express a part.
    """
    layout = Layout()
    if recipe.kind == "first_stage":
        layout.parts.append(_first_stage(recipe, "", places, scale))
        return layout
    texts = _text_encoders(recipe, places)
    names = tuple(sorted(texts))
    xl = names in XL_PIPELINES
    net = unet.full_params(recipe.unet)
    if (net["num_classes"] == "sequential") != xl:
        raise UserError(f"diffusers cannot express num_classes={net['num_classes']} without SDXL's conditioner")
    upcast = recipe.params["parameterization"] == "v" and bool(net["use_linear_in_transformer"])
    config = unet.to_config(net, _latent_size(recipe, xl), upcast)
    layout.parts.append(Part("unet", places["unet"], unet.rows(net), config, ("diffusers", config["_class_name"])))
    if recipe.kind == "latent":
        folder = "vae" if "text_encoder" in names or xl else "vqvae"
        layout.parts.append(_first_stage(recipe, folder, places, scale, xl))
    for folder, (encoder, prefix) in texts.items():
        index = (encoder.library, encoder.cls)
        layout.parts.append(Part(folder, prefix, encoder.rows, encoder.config, index, WEIGHTS, encoder.unused))
        layout.tokenizers["tokenizer_2" if folder.endswith("_2") else "tokenizer"] = encoder
    _choose_pipeline(layout, recipe, names, net, places)
    layout.scheduler = scheduler_config(recipe, layout.pipeline)
    return layout


def _first_stage(recipe: Recipe, folder: str, places: Mapping[str, str], scale: float, xl: bool = False) -> Part:
    p = first_stage.full_params(recipe.first_stage["params"])
    size = _latent_size(recipe, xl)
    pixels = size * 2 ** (len(p["ch_mult"]) - 1) if isinstance(size, int) else p["resolution"]
    config = first_stage.to_config(p, scale, pixels, force_upcast=xl)
    index = ("diffusers", config["_class_name"])
    return Part(folder, places["first_stage"], first_stage.rows(p), config, index)


def _latent_size(recipe: Recipe, xl: bool) -> Any:
    """Height and width that the U-Net samples by default; generative-models' configs say none."""
    size = recipe.params["image_size"]
    if isinstance(size, (list, tuple)):
        return list(size)
    return None if recipe.kind == "first_stage" else size or (128 if xl else 64)


def _text_encoders(recipe: Recipe, places: Mapping[str, str]) -> dict[str, tuple[Encoder, str]]:
    """Folder -> encoder and its official prefix."""
    if not recipe.has_conditioner:
        return {}
    config, prefix = recipe.conditioner, places["conditioner"]
    if class_name(config) != "GeneralConditioner":
        encoder = encoder_of(config)
        if encoder is None:
            return {}
        return {"bert" if encoder.cls == "LDMBertModel" else "text_encoder": (encoder, prefix)}
    entries = [{"target": e["target"], "params": e.get("params")} for e in config["params"]["emb_models"]]
    texts, two = {}, len(entries) > 1
    for i, entry in enumerate(entries):
        name = class_name(entry)
        if name == "ConcatTimestepEmbedderND":
            continue
        encoder = encoder_of(entry, two)
        if encoder is None:
            raise UserError(f"diffusers has no counterpart of {name} in GeneralConditioner")
        folder = "text_encoder_2" if encoder.cls == "CLIPTextModelWithProjection" else "text_encoder"
        texts[folder] = (encoder, f"{prefix}embedders.{i}.")
    return texts


def _choose_pipeline(
    layout: Layout, recipe: Recipe, texts: tuple[str, ...], net: Mapping[str, Any], places: Mapping[str, str]
) -> None:
    if texts in XL_PIPELINES:
        layout.pipeline, layout.extra = XL_PIPELINES[texts]
        if len(texts) == 1:
            layout.extra = {**layout.extra, "text_encoder": [None, None], "tokenizer": [None, None]}
        return
    if texts == ("text_encoder",) and net["in_channels"] in SD_PIPELINES:
        layout.pipeline = SD_PIPELINES[net["in_channels"]]
        none = [None, None]
        layout.extra = {"safety_checker": none, "feature_extractor": none, "requires_safety_checker": False}
        return
    if texts == ("bert",):
        layout.pipeline = "LDMTextToImagePipeline"
        return
    if recipe.kind == "pixel":
        layout.pipeline = "DDPMPipeline"
        layout.note = "" if net["num_classes"] is None else NO_LOOP.replace("LDMPipeline", "DDPMPipeline")
        return
    concat = (recipe.params["conditioning_key"] or "concat") == "concat" and recipe.params["concat_mode"]
    super_resolution = concat and not texts and recipe.params["cond_stage_key"] == "LR_image"
    layout.pipeline = "LDMSuperResolutionPipeline" if super_resolution else "LDMPipeline"
    if recipe.has_conditioner and class_name(recipe.conditioner) != "Identity":
        layout.parts.append(_own_conditioner(recipe, places))
    plain = net["in_channels"] == net["out_channels"] and not net["spatial"] and net["num_classes"] is None
    layout.note = "" if super_resolution or plain else NO_LOOP


def _own_conditioner(recipe: Recipe, places: Mapping[str, str]) -> Part:
    """A conditioner that diffusers does not know: its own tensors under their own names."""
    config = {"target": recipe.conditioner["target"], "params": dict(recipe.conditioner.get("params") or {})}
    return Part("conditioner", places["conditioner"], SAME_NAMES, config, None, WEIGHTS)


def scheduler_config(recipe: Recipe, pipeline: str) -> dict[str, Any]:
    """scheduler_config.json: the model's betas, and the grid of the official DDIM sampler.

    Raises:
        UserError: a parameterization that diffusers' samplers of this kind do not have.
    """
    p = recipe.params
    if p["parameterization"] not in PREDICTIONS:
        raise UserError(f"parameterization {p['parameterization']}: no scheduler of diffusers' kind predicts it")
    config = {
        "num_train_timesteps": p["timesteps"],
        "beta_schedule": SCHEDULES.get(p["beta_schedule"], "linear"),
        "beta_start": p["linear_start"],
        "beta_end": p["linear_end"],
        "trained_betas": _own_betas(p),
        "prediction_type": PREDICTIONS[p["parameterization"]],
    }
    if pipeline == "DDPMPipeline":
        return {"_class_name": "DDPMScheduler", **config, "clip_sample": True, "variance_type": "fixed_small"}
    config |= {"steps_offset": 1, "timestep_spacing": "leading"}
    if "XL" in pipeline:
        return {"_class_name": "EulerDiscreteScheduler", **config, "interpolation_type": "linear"}
    config |= {"set_alpha_to_one": False, "clip_sample": False}
    if p["zero_terminal_snr"]:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"_class_name": "DDIMScheduler", **config}


def _own_betas(p: Mapping[str, Any]) -> list[float] | None:
    """The betas themselves where diffusers has no name for their schedule."""
    if p["given_betas"] is not None:
        return [float(b) for b in p["given_betas"]]
    if p["beta_schedule"] in SCHEDULES and (p["beta_schedule"] != "cosine" or p["cosine_s"] == 8e-3):
        return None
    from ldm.diffusion.schedule import make_beta_schedule

    names = ("linear_start", "linear_end", "cosine_s")
    return make_beta_schedule(p["beta_schedule"], p["timesteps"], **{n: p[n] for n in names}).tolist()


def is_first_stage(recipe: Recipe) -> bool:
    """Whether the first stage is the conditioner too, so that official files hold it twice."""
    return recipe.conditioner == FIRST_STAGE
