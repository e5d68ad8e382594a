"""Small models of every family: configs, and checkpoints with the names of the released files."""

import copy

import torch

from ldm.conversion import folder
from ldm.conversion.recipe import DEFAULTS, recipe_of
from ldm.util import instantiate_from_config
from tests.reference import filler

IDENTITY = {"target": "torch.nn.Identity"}
LATENT = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
ENCODERS = "ldm.modules.encoders.modules."
NETWORK = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2],
}
SPATIAL = {**NETWORK, "use_spatial_transformer": True, "context_dim": 32, "legacy": False}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OPEN_CLIP = {"embed_dim": 48, "width": 32, "heads": 4, "layers": 3}


def ddconfig(z=4, **options):
    sizes = {"z_channels": z, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
    return {"double_z": True, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, **sizes, **options}


def kl(**options):
    params = {"embed_dim": 4, "ddconfig": ddconfig(**options), "lossconfig": IDENTITY}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def vq(name="VQModelInterface", z=3, **options):
    params = {"embed_dim": z, "n_embed": 40, "ddconfig": ddconfig(z, double_z=False, **options)}
    return {"target": f"ldm.models.autoencoder.{name}", "params": {**params, "lossconfig": IDENTITY}}


def latent(network, conditioner, stage=None, **options):
    params = {"linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "channels": network["out_channels"]}
    params |= {"scale_factor": 0.18215, "use_ema": False, "first_stage_key": "jpg", "cond_stage_key": "txt"}
    params |= {"unet_config": {"target": UNET, "params": network}, "cond_stage_config": conditioner}
    params |= {"first_stage_config": stage or kl(), "conditioning_key": "crossattn", **options}
    return {"model": {"target": LATENT, "params": params}}


def clip(**options):
    return {"target": ENCODERS + "FrozenCLIPEmbedder", "params": {"clip_config": CLIP, **options}}


def open_clip(name="FrozenOpenCLIPEmbedder", **options):
    return {"target": ENCODERS + name, "params": {"clip_config": OPEN_CLIP, "layer": "penultimate", **options}}


def sdxl(refiner=False):
    two = {"always_return_pooled": True, "legacy": False}
    home = "ldm.modules."
    towers = [{**clip(layer="hidden", layer_idx=2), "input_key": "txt"}][refiner:]
    towers.append({**open_clip(**two), "input_key": "txt", "target": home + "text_embedders.FrozenOpenCLIPEmbedder2"})
    keys = folder.REFINER_SIZES if refiner else folder.XL_SIZES
    size = {"target": home + "conditioners.ConcatTimestepEmbedderND", "params": {"outdim": 256}}
    conditioner = {"emb_models": towers + [{**size, "input_key": key} for key in keys]}
    numbers = 5 if refiner else 6
    network = {
        **SPATIAL,
        "num_head_channels": 16,
        "context_dim": 32 if refiner else 64,
        "transformer_depth": 2 if refiner else [1, 1, 2],
        "attention_resolutions": [2] if refiner else [2, 4],
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 48 + 256 * numbers,
    }
    config = {"target": home + "conditioners.GeneralConditioner", "params": conditioner}
    return latent(network, config, conditioning_key="crossattn-adm", scale_factor=0.13025)


V2 = {**SPATIAL, "num_head_channels": 16, "use_linear_in_transformer": True}
PLAIN = {**NETWORK, "in_channels": 3, "out_channels": 3, "num_head_channels": 16}
UNCONDITIONAL = {"conditioning_key": None, "concat_mode": False, "scale_factor": 1.0}
UPDOWN = {**PLAIN, "use_scale_shift_norm": True, "resblock_updown": True}
NEW_ORDER = {**PLAIN, "num_classes": 11, "use_new_attention_order": True}
BERT = {"n_embed": 32, "n_layer": 2, "vocab_size": 100, "max_seq_len": 12}
CLASSES = {"embed_dim": 32, "n_classes": 11, "key": "class_label"}
TRAINED = {"conditioning_key": None, "concat_mode": True, "cond_stage_key": "segmentation", "scale_factor": 1.0}

CONFIGS = {
    "sd1": latent({**SPATIAL, "num_heads": 4}, clip()),
    "sd1-inpaint": latent(
        {**SPATIAL, "num_heads": 4, "in_channels": 9},
        clip(),
        conditioning_key="hybrid",
        concat_keys=["mask", "masked_image"],
    ),
    "sd2-v": latent(V2, open_clip(), parameterization="v"),
    "sd2": latent({**V2, "num_res_blocks": [1, 2, 1]}, open_clip()),
    "sdxl-base": sdxl(),
    "sdxl-refiner": sdxl(refiner=True),
    "ldm-text": latent({**SPATIAL, "num_heads": 4}, {"target": ENCODERS + "BERTEmbedder", "params": BERT}),
    "ldm-text-vq": latent(
        {**SPATIAL, "num_head_channels": 16, "in_channels": 3, "out_channels": 3, "legacy": True},
        {"target": ENCODERS + "BERTEmbedder", "params": BERT},
        vq(),
        scale_factor=1.0,
    ),
    "ldm-class": latent(
        {**SPATIAL, "num_heads": 1, "in_channels": 3, "out_channels": 3},
        {"target": ENCODERS + "ClassEmbedder", "params": CLASSES},
        vq(),
        scale_factor=1.0,
        cond_stage_key="class_label",
    ),
    "ldm-uncond": latent(PLAIN, "__is_unconditional__", vq(attn_type="none"), **UNCONDITIONAL),
    "ldm-uncond-updown": latent(UPDOWN, "__is_unconditional__", vq(attn_resolutions=[16]), **UNCONDITIONAL),
    "ldm-one-head": latent(
        {**PLAIN, "num_head_channels": -1, "num_heads": 1}, "__is_unconditional__", vq(), **UNCONDITIONAL
    ),
    "ldm-sr": latent({**PLAIN, "in_channels": 6}, IDENTITY, vq(), **{**TRAINED, "cond_stage_key": "LR_image"}),
    "ldm-semantic": latent(
        {**PLAIN, "in_channels": 6},
        {"target": ENCODERS + "SpatialRescaler", "params": {"n_stages": 2, "in_channels": 9, "out_channels": 3}},
        vq(),
        **TRAINED,
    ),
    "ldm-layout": latent(
        {**SPATIAL, "num_heads": 4, "in_channels": 3, "out_channels": 3},
        {"target": ENCODERS + "BERTEmbedder", "params": {**BERT, "use_tokenizer": False}},
        vq(),
        scale_factor=1.0,
    ),
    "kl": {"model": kl(attn_resolutions=[16])},
    "vq": {"model": vq("VQModel", attn_resolutions=[16])},
    "vq-noattn": {"model": vq("VQModel", z=4, attn_type="none")},
    "pixel": {
        "model": {
            "target": "ldm.models.diffusion.ddpm.DDPM",
            "params": {"unet_config": {"target": UNET, "params": PLAIN}, "image_size": 8, "beta_schedule": "cosine"},
        }
    },
    "pixel-class": {
        "model": {
            "target": "ldm.models.diffusion.ddpm.DDPM",
            "params": {"unet_config": {"target": UNET, "params": NEW_ORDER}, "image_size": 8},
        }
    },
}


def config(name):
    return copy.deepcopy(CONFIGS[name])


def modules(name, seed=1):
    """The parts of a model, filled with numbers that depend on names only: {unet, first_stage, conditioner}."""
    recipe = recipe_of(config(name))
    parts = {what: getattr(recipe, what) for what in ("unet", "first_stage", "conditioner")}
    built = {w: instantiate_from_config(c) for w, c in parts.items() if isinstance(c, dict)}
    return {w: filler.fill(m, seed).eval() for w, m in built.items()}


def official_state(name, parts):
    """The state dict of such a model as its released file holds it."""
    recipe = recipe_of(config(name))
    engine = name.startswith("sdxl")
    places = {"unet": "model.diffusion_model.", "first_stage": "first_stage_model."}
    places["conditioner"] = "conditioner." if engine else "cond_stage_model."
    if recipe.kind == "first_stage":
        return {k: v.clone() for k, v in parts["first_stage"].state_dict().items()}
    state = dict(folder.tables({**DEFAULTS, **recipe.params}, engine))
    return state | {places[w] + k: v.clone() for w, m in parts.items() for k, v in m.state_dict().items()}


def with_average(state):
    """The same with averaged weights, as the training code stores them."""
    average = {k: v + 1 for k, v in state.items() if k.startswith("model.")}
    names = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in average}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int)}
    return {**state, **{names[k]: v for k, v in average.items()}, **counters}
