"""Which released model a checkpoint is of, read from the names and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SD, LDM, LDM_MODELS, STAGES = (
    "configs/stable-diffusion",
    "configs/latent-diffusion",
    "models/ldm",
    "models/first_stage_models",
)
UNET, STAGE = "model.diffusion_model.", "first_stage_model."
CONDITIONERS = ("cond_stage_model.", "conditioner.")
SAME_SHAPES = "the tensors of these models have the same names and shapes: choose by where the file comes from"
EPS_OR_V = (
    "its tensors do not tell how it was trained: the 768-pixel files predict v (v2-inference-v.yaml), "
    "the 512-pixel ones (*-base) predict eps (v2-inference.yaml)"
)
IN_THE_RUN = "its config is in its run directory and in the file itself"


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: short and stable, such as sd1 or kl-f8.
        title: for messages, such as SD 2.
        configs: YAML files that fit, the likelier first; empty if this project has none.
        note: what else there is to know.
    """

    name: str
    title: str
    configs: tuple[str, ...] = ()
    note: str = ""

    @property
    def config(self) -> str | None:
        """The likeliest config."""
        return self.configs[0] if self.configs else None


@dataclass(frozen=True)
class _Rule:
    family: Family
    wanted: dict[str, Any] = field(default_factory=dict)  # features that must have these values

    def fits(self, found: Mapping[str, Any]) -> bool:
        return all(found.get(k) == v for k, v in self.wanted.items())


def _rule(name: str, title: str, *configs: str, note: str = "", **wanted: Any) -> _Rule:
    return _Rule(Family(name, title, configs, note), wanted)


# The first row whose features are all there wins; rows without a config are the general cases at the end.
RULES: tuple[_Rule, ...] = (
    _rule("lora", "LoRA weights", note="they are added to a model and are none themselves", kind="lora"),
    _rule("controlnet", "ControlNet", note="it steers a model and is none itself", kind="controlnet"),
    _rule("stylegan2", "StyleGAN2", note=IN_THE_RUN, kind="stylegan2"),
    _rule(
        "diffusers",
        "part of a diffusers folder",
        note="scripts/convert.py --to official turns the whole folder into one file",
        kind="diffusers",
    ),
    _rule("sd1", "SD 1", f"{SD}/v1-inference.yaml", width=320, context=768, inputs=4),
    _rule("sd1-inpaint", "SD 1 inpainting", f"{SD}/v1-inpainting-inference.yaml", width=320, context=768, inputs=9),
    _rule("sd1-pix2pix", "SD 1 InstructPix2Pix", width=320, context=768, inputs=8),
    _rule(
        "sd2",
        "SD 2",
        f"{SD}/v2-inference-v.yaml",
        f"{SD}/v2-inference.yaml",
        note=EPS_OR_V,
        width=320,
        context=1024,
        inputs=4,
        adm=None,
    ),
    _rule("sd2-inpaint", "SD 2 inpainting", width=320, context=1024, inputs=9, adm=None),
    _rule("sd2-depth", "SD 2 depth", width=320, context=1024, inputs=5, adm=None),
    _rule("sd2-unclip", "SD 2 unCLIP", width=320, context=1024, inputs=4),
    _rule("sd2-upscaler", "SD 2 x4 upscaler", width=256, context=1024, inputs=7),
    _rule("sdxl-base", "SDXL base", f"{SD}/sd_xl_base.yaml", width=320, context=2048, inputs=4, adm=2816),
    _rule("sdxl-refiner", "SDXL refiner", f"{SD}/sd_xl_refiner.yaml", width=384, context=1280, inputs=4, adm=2560),
    _rule(
        "ldm-text-bert",
        "LDM text2img-large",
        f"{LDM}/txt2img-1p4B-eval.yaml",
        width=320,
        context=1280,
        conditioner="bert",
    ),
    _rule(
        "ldm-text-bert",
        "LDM text2img256",
        f"{LDM_MODELS}/text2img256/config.yaml",
        width=192,
        context=640,
        conditioner="bert",
    ),
    _rule(
        "ldm-layout",
        "LDM layout2img",
        f"{LDM_MODELS}/layout2img-openimages256/config.yaml",
        conditioner="bert",
        vocabulary=8192,
    ),
    _rule(
        "ldm-class",
        "LDM cin256-v2",
        f"{LDM}/cin256-v2.yaml",
        width=192,
        context=512,
        conditioner="class",
        vocabulary=1001,
    ),
    _rule(
        "ldm-class",
        "LDM cin256",
        f"{LDM_MODELS}/cin256/config.yaml",
        f"{LDM}/cin-ldm-vq-f8.yaml",
        width=256,
        context=512,
        conditioner="class",
        vocabulary=1000,
    ),
    _rule(
        "ldm-retrieval",
        "retrieval-augmented LDM",
        "configs/retrieval-augmented-diffusion/768x768.yaml",
        width=448,
        context=768,
    ),
    _rule(
        "ldm-semantic",
        "LDM semantic_synthesis",
        f"{LDM_MODELS}/semantic_synthesis512/config.yaml",
        f"{LDM_MODELS}/semantic_synthesis256/config.yaml",
        note=SAME_SHAPES,
        width=128,
        inputs=6,
        conditioner="map",
    ),
    _rule(
        "ldm-inpaint", "LDM inpainting_big", f"{LDM_MODELS}/inpainting_big/config.yaml", width=256, inputs=7, outputs=3
    ),
    _rule(
        "ldm-sr",
        "LDM super-resolution",
        f"{LDM_MODELS}/bsr_sr/config.yaml",
        width=160,
        inputs=6,
        outputs=3,
        context=None,
    ),
    _rule(
        "ldm-uncond",
        "unconditional LDM",
        f"{LDM_MODELS}/celeba256/config.yaml",
        f"{LDM_MODELS}/ffhq256/config.yaml",
        f"{LDM_MODELS}/lsun_beds256/config.yaml",
        note=SAME_SHAPES,
        width=224,
        inputs=3,
        stage="vq",
        conditioner=None,
    ),
    _rule(
        "ldm-uncond",
        "unconditional LDM",
        f"{LDM_MODELS}/lsun_churches256/config.yaml",
        width=192,
        inputs=4,
        stage="kl",
        conditioner=None,
        context=None,
    ),
    *(
        _rule(f"kl-f{f}", f"KL-f{f} autoencoder", f"{STAGES}/kl-f{f}/config.yaml", kind="kl", factor=f, latents=z)
        for f, z in ((4, 3), (8, 4), (16, 16), (32, 64))
    ),
    *(
        _rule(
            name,
            f"VQ{name[2:]} autoencoder",
            f"{STAGES}/{name}/config.yaml",
            kind="vq",
            factor=f,
            latents=z,
            codes=n,
            attention=a,
        )
        for name, f, z, n, a in (
            ("vq-f4", 4, 3, 8192, True),
            ("vq-f4-noattn", 4, 3, 8192, False),
            ("vq-f8", 8, 4, 16384, True),
            ("vq-f8-n256", 8, 4, 256, True),
            ("vq-f16", 16, 8, 16384, True),
        )
    ),
    _rule("kl", "KL autoencoder", note=IN_THE_RUN, kind="kl"),
    _rule("vq", "VQ autoencoder", note=IN_THE_RUN, kind="vq"),
    *(
        _rule(f"ldm-{short}", f"latent diffusion model ({what})", note=IN_THE_RUN, kind="latent", conditioner=kind)
        for kind, short, what in (
            ("sdxl", "sdxl", "two text towers"),
            ("clip", "text-clip", "CLIP text"),
            ("openclip", "text-openclip", "OpenCLIP text"),
            ("bert", "text-bert", "tokens"),
            ("class", "class", "classes"),
            ("map", "map", "maps"),
        )
    ),
    _rule("ldm-uncond", "latent diffusion model (no conditioner)", note=IN_THE_RUN, kind="latent"),
    _rule("ddpm", "pixel diffusion model", note=IN_THE_RUN, kind="pixel"),
    _rule("classifier", "classifier run", note=IN_THE_RUN, kind="run"),
    _rule("clip-text", "CLIP text encoder", note="a whole model has a U-Net and a first stage too", kind="clip"),
)
NO_MODELS = ("lora", "controlnet", "diffusers", "clip-text", "stylegan2")  # never what a diffusion config wants
UNKNOWN = Family("unknown", "model of an unknown kind")


def detect(state: Mapping[str, Tensor]) -> Family:
    """The family of a state dict; `UNKNOWN` if no rule fits. Reads shapes only: meta tensors do."""
    found = features(state)
    return next((rule.family for rule in RULES if rule.fits(found)), UNKNOWN)


def mismatch(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What to tell a user whose checkpoint `state` does not fit a model with the state dict `own`.

    None if they are of one family, or if the checkpoint is of no released one.
    """
    file, model = detect(state), detect(own)
    released = file.config is not None or file.name in NO_MODELS
    if not released or (file.name, file.configs) == (model.name, model.configs):
        return None
    message = f"this is {_article(file.title)} file, the config is {model.title}"
    if file.config:
        message += f": use {file.config}"
    return message + (f" ({file.note})" if file.note else "")


def _article(title: str) -> str:
    return ("an " if title[0].lower() in "aeio" or title.startswith(("SD ", "SDXL", "LDM", "LoRA")) else "a ") + title


def for_recipe(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a generative-models file (SDXL, SD 2) under the names of LatentDiffusion with the keys `own`.

    There the conditioner is called `conditioner` and holds a list of embedders, and the noise levels are stored.
    Other state dicts come back as they are.
    """
    if not any(k.startswith("conditioner.") for k in state):
        return dict(state)
    several = any(k.startswith("cond_stage_model.embedders.") for k in own)
    old = "conditioner." if several else "conditioner.embedders.0."
    names = {k: "cond_stage_model." + k.removeprefix(old) if k.startswith(old) else k for k in state}
    return {names[k]: v for k, v in state.items() if k != "denoiser.sigmas"}


# --- features ---------------------------------------------------------------------------------------------------------


def features(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the rules ask for: kind, and sizes of the U-Net, first stage and conditioner that are there."""
    found = {**_unet(state), **_conditioner(state)}
    stage = _first_stage(state, STAGE)
    alone = {} if stage or found.get("width") else _first_stage(state, "")
    return {"kind": _kind(state, bool(found.get("width")), stage, alone), **found, **(stage or alone)}


def _kind(state: Mapping[str, Tensor], unet: bool, stage: dict[str, Any], alone: dict[str, Any]) -> str | None:
    if any(".lora_" in k or k.startswith("lora_") for k in state):
        return "lora"
    if any(k.startswith(("control_model.", "controlnet_cond_embedding.")) for k in state):
        return "controlnet"
    if any(k.endswith("synthesis.b4.const") for k in state):
        return "stylegan2"
    if any(k.startswith(("down_blocks.", "encoder.down_blocks.")) for k in state):
        return "diffusers"
    if unet:
        return "latent" if stage else "pixel"
    if alone:
        return alone["stage"]
    if any(k.startswith(("text_model.", "transformer.text_model.", "transformer.resblocks.")) for k in state):
        return "clip"
    return "run" if any(k.startswith("model.") for k in state) else None


def _unet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    first, last = state.get(UNET + "input_blocks.0.0.weight"), state.get(UNET + "out.2.weight")
    if first is None or last is None:
        return {}
    labels = state.get(UNET + "label_emb.0.0.weight")
    context = next((v.shape[1] for k, v in state.items() if k.startswith(UNET) and "attn2.to_k." in k), None)
    return {
        "width": first.shape[0],
        "inputs": first.shape[1],
        "outputs": last.shape[0],
        "context": context,
        "adm": None if labels is None else labels.shape[1],
    }


def _first_stage(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    quantizer, latents = state.get(prefix + "quantize.embedding.weight"), state.get(prefix + "post_quant_conv.weight")
    if latents is None or prefix + "encoder.conv_in.weight" not in state:
        return {}
    steps = sum(k.startswith(prefix + "encoder.down.") and k.endswith(".downsample.conv.weight") for k in state)
    return {
        "stage": "kl" if quantizer is None else "vq",
        "codes": None if quantizer is None else quantizer.shape[0],
        "latents": latents.shape[1],
        "factor": 2**steps,
        "attention": prefix + "encoder.mid.attn_1.q.weight" in state,
    }


def _conditioner(state: Mapping[str, Tensor]) -> dict[str, Any]:
    keys = [k for k in state if k.startswith(CONDITIONERS)]
    tables = {"bert": "transformer.token_emb.weight", "class": ".embedding.weight"}
    for kind, end in tables.items():
        table = next((state[k] for k in keys if k.endswith(end)), None)
        if table is not None:
            return {"conditioner": kind, "vocabulary": table.shape[0]}
    if any(k.endswith("channel_mapper.weight") for k in keys):
        return {"conditioner": "map"}
    clip = any("transformer.text_model." in k for k in keys)
    openclip = any(".transformer.resblocks." in k for k in keys)
    return {"conditioner": "sdxl" if clip and openclip else "clip" if clip else "openclip" if openclip else None}
