"""Checkpoints are recognised by the names and shapes of their tensors."""

import json
from pathlib import Path

import pytest
import torch

from ldm.families import RULES, UNKNOWN, detect, for_recipe, mismatch
from tests.reference import compare

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "sd_v1": ("sd1", "configs/stable-diffusion/v1-inference.yaml"),
    "sd_2_1": ("sd2", "configs/stable-diffusion/v2-inference-v.yaml"),
    "sdxl_base": ("sdxl-base", "configs/stable-diffusion/sd_xl_base.yaml"),
    "ldm_cin256": ("ldm-class", "models/ldm/cin256/config.yaml"),
    "config_cin256_v2": ("ldm-class", "configs/latent-diffusion/cin256-v2.yaml"),
    "ldm_text2img256": ("ldm-text-bert", "models/ldm/text2img256/config.yaml"),
    "ldm_celeba256": ("ldm-uncond", "models/ldm/celeba256/config.yaml"),
    "ldm_ffhq256": ("ldm-uncond", "models/ldm/celeba256/config.yaml"),
    "ldm_lsun_churches256": ("ldm-uncond", "models/ldm/lsun_churches256/config.yaml"),
    "ldm_semantic_synthesis512": ("ldm-semantic", "models/ldm/semantic_synthesis512/config.yaml"),
    **{f"first_stage_{n}": (n, f"models/first_stage_models/{n}/config.yaml") for n in ("kl-f4", "kl-f8", "kl-f32")},
    **{f"first_stage_{n}": (n, f"models/first_stage_models/{n}/config.yaml") for n in ("vq-f4", "vq-f8", "vq-f16")},
    "first_stage_vq-f4-noattn": ("vq-f4-noattn", "models/first_stage_models/vq-f4-noattn/config.yaml"),
    "config_autoencoder_kl_16x16x16": ("kl-f16", "models/first_stage_models/kl-f16/config.yaml"),
}


def released(name):
    keys = compare.load(ROOT / f"tests/reference/fixtures/keys_{name}.json")["keys"]
    return {k: torch.empty(shape, device="meta") for k, shape in keys.items()}


def resized(state, key, shape):
    return {**state, key: torch.empty(shape, device="meta")}


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXPECTED)
def test_released_files(name):
    family = detect(released(name))
    assert (family.name, family.config) == EXPECTED[name]
    assert mismatch(released(name), released(name)) is None


def test_the_two_kinds_of_sd_2_are_told_apart_by_the_user():
    family = detect(released("sd_2_1"))
    assert len(family.configs) == 2 and "predict v" in family.note and "*-base" in family.note


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        ("sd_v1", 9, "sd1-inpaint"),
        ("sd_v1", 8, "sd1-pix2pix"),
        ("sd_2_1", 9, "sd2-inpaint"),
        ("sd_2_1", 5, "sd2-depth"),
    ],
)
def test_input_channels_tell_the_siblings_apart(name, channels, expected):
    assert detect(resized(released(name), FIRST, (320, channels, 3, 3))).name == expected


def test_sdxl_refiner():
    unet = "model.diffusion_model."
    shapes = {
        "input_blocks.0.0.weight": (384, 4, 3, 3),
        "out.2.weight": (4, 384, 3, 3),
        "label_emb.0.0.weight": (1536, 2560),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
    }
    state = {unet + k: torch.empty(v, device="meta") for k, v in shapes.items()}
    assert detect(state).config == "configs/stable-diffusion/sd_xl_refiner.yaml"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("synthesis.b4.const", "stylegan2"),
        ("G_ema.synthesis.b4.const", "stylegan2"),
        ("lora_unet_down_blocks_0.lora_up.weight", "lora"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "lora"),
        ("control_model.input_blocks.0.0.weight", "controlnet"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("text_model.embeddings.token_embedding.weight", "clip-text"),
        ("model.conv1.weight", "classifier"),
        ("something.else", "unknown"),
    ],
)
def test_other_files(key, expected):
    assert detect({key: torch.empty(2, 2, device="meta")}).name == expected


def test_nothing_is_unknown():
    assert detect({}) is UNKNOWN


def test_messages():
    v1, v2, xl = (released(n) for n in ("sd_v1", "sd_2_1", "sdxl_base"))
    assert mismatch(v2, v1).startswith(
        "this is an SD 2 file, the config is SD 1: use configs/stable-diffusion/v2-inference-v.yaml (its tensors do not"
    )
    assert mismatch(v1, xl) == (
        "this is an SD 1 file, the config is SDXL base: use configs/stable-diffusion/v1-inference.yaml"
    )
    assert "a LoRA weights" not in mismatch({"lora_a.lora_up": v1["betas"]}, v1)
    assert mismatch({"odd": v1["betas"]}, v1) is None, "an unknown file gets the list of keys instead"


@pytest.mark.parametrize("name", ["sd_2_1", "sdxl_base"])
def test_names_of_generative_models_become_those_of_the_recipe(name):
    state = released(name)
    several = name == "sdxl_base"
    own = ["cond_stage_model.embedders.0.x"] if several else ["cond_stage_model.model.x"]
    found = for_recipe(state, dict.fromkeys(own))
    assert len(found) == len(state) - 1 and "denoiser.sigmas" not in found
    assert not [k for k in found if k.startswith("conditioner.")]
    key = "cond_stage_model.embedders.1.model.ln_final.weight" if several else "cond_stage_model.model.ln_final.weight"
    assert key in found
    assert for_recipe(released("sd_v1"), {}).keys() == released("sd_v1").keys()


def test_every_config_that_a_rule_names_is_official_or_here():
    """The others are written when their weights are: the list says which."""
    official = json.loads((ROOT / "tests/reference/official_configs.json").read_text())
    named = {c for rule in RULES for c in rule.family.configs}
    ours = {c for c in named if (ROOT / c).is_file()} | set(official)
    assert {c for c in named if c.startswith("configs/stable-diffusion/")} <= ours
