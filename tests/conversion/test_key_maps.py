"""At full size, without memory: names and shapes of released files against diffusers' and transformers' classes."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm.conversion.layout import layout_of
from ldm.conversion.recipe import check, prefixes, recipe_of, skeleton
from ldm.conversion.rows import to_official, to_theirs
from ldm.families import detect, for_recipe
from ldm.util import UserError, instantiate_from_config
from tests.reference import compare

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = json.loads((ROOT / "tests/reference/official_configs.json").read_text())
SD = "configs/stable-diffusion"
# fixture with the keys of the released file -> its config: ours, or the official one
FILES = {
    "sd_v1": "configs/stable-diffusion/v1-inference.yaml",
    "sd_2_1": f"{SD}/v2-inference.yaml",
    "sdxl_base": f"{SD}/sd_xl_base.yaml",
    "config_cin256_v2": "configs/latent-diffusion/cin256-v2.yaml",
    "ldm_cin256": "models/ldm/cin256/config.yaml",
    "ldm_celeba256": "models/ldm/celeba256/config.yaml",
    "ldm_text2img256": "models/ldm/text2img256/config.yaml",
    "ldm_semantic_synthesis512": "models/ldm/semantic_synthesis512/config.yaml",
    "first_stage_kl-f4": "models/first_stage_models/kl-f4/config.yaml",
    "first_stage_kl-f8": "models/first_stage_models/kl-f8/config.yaml",
    "first_stage_kl-f32": "models/first_stage_models/kl-f32/config.yaml",
    "first_stage_vq-f4": "models/first_stage_models/vq-f4/config.yaml",
    "first_stage_vq-f4-noattn": "models/first_stage_models/vq-f4-noattn/config.yaml",
    "first_stage_vq-f8": "models/first_stage_models/vq-f8/config.yaml",
    "first_stage_vq-f16": "models/first_stage_models/vq-f16/config.yaml",
}


def read_config(path):
    if path in OFFICIAL:
        return copy.deepcopy(OFFICIAL[path])
    return OmegaConf.to_container(OmegaConf.load(ROOT / path))


def released(fixture):
    """Meta tensors with the names and shapes of a released file."""
    keys = compare.load(ROOT / f"tests/reference/fixtures/keys_{fixture}.json")["keys"]
    return {k: torch.empty(shape, device="meta") for k, shape in keys.items() if not k.startswith("model_ema.")}


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


def build(part):
    """diffusers' or transformers' class for a component's config.json, without memory."""
    library, name = part.index
    config = {k: v for k, v in part.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        if library == "transformers":
            import transformers

            return getattr(transformers, name)(transformers.CLIPTextConfig(**config))
        if library == "latent_diffusion":
            from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as home

            return home.LDMBertModel(home.LDMBertConfig(**config))
        return getattr(diffusers, name)(**config)


def expected(part):
    found = shapes(build(part).state_dict())
    if part.index[1] == "CLIPTextModel":  # transformers 5 has no text_model level of its own and takes both
        found = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in found.items()}
    return found


@pytest.mark.parametrize("fixture", FILES)
def test_every_key_of_a_released_file_has_its_place(fixture):
    state, recipe = released(fixture), recipe_of(read_config(FILES[fixture]))
    check(recipe, state, fixture)
    layout = layout_of(recipe, prefixes(recipe, state), 1.0)
    for part in layout.parts:
        mapped, left = to_theirs(state, part.rows, part.prefix)
        unknown = [k for k in left if not k.removeprefix(part.prefix).startswith(part.unused or ("loss.",))]
        assert not [k for k in unknown if not k.endswith("position_ids") and not k.startswith("loss.")]
        if part.index:
            assert shapes(mapped) == expected(part), part.folder
        back, left = to_official(mapped, part.rows, part.prefix)
        assert not left and shapes(back).items() <= shapes(state).items()


def without_a_list(recipe, conditioner="cond_stage_model."):
    """The config's own modules stand in for a released file whose keys are not at hand."""
    places = {"unet": "model.diffusion_model.", "first_stage": "first_stage_model.", "conditioner": conditioner}
    return {p + k: v for what, p in places.items() for k, v in skeleton(getattr(recipe, what)).items()}


def test_sdxl_refiner():
    recipe = recipe_of(read_config(f"{SD}/sd_xl_refiner.yaml"))
    state = without_a_list(recipe, "conditioner.")
    assert detect(state).config == f"{SD}/sd_xl_refiner.yaml"
    layout = layout_of(recipe, prefixes(recipe, state), 1.0)
    for part in layout.parts:
        assert shapes(to_theirs(state, part.rows, part.prefix)[0]) == expected(part), part.folder
    assert layout.index()["text_encoder"] == [None, None] and layout.index()["requires_aesthetics_score"] is True


def test_text2img_large():
    """The 1.45 B parameter model: 872.30 M U-Net, 581.99 M BERT, 83.65 M autoencoder."""
    v1 = read_config(FILES["sd_v1"])
    params = v1["model"]["params"]
    params["unet_config"]["params"]["context_dim"] = 1280
    target = "ldm.modules.encoders.modules.BERTEmbedder"
    params["cond_stage_config"] = {"target": target, "params": {"n_embed": 1280, "n_layer": 32}}
    recipe = recipe_of(v1)
    state = without_a_list(recipe)
    assert detect(state).config == "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
    layout = layout_of(recipe, prefixes(recipe, state), 1.0)
    counts = {}
    for part in layout.parts:
        mapped = to_theirs(state, part.rows, part.prefix)[0]
        assert shapes(mapped) == expected(part), part.folder
        counts[part.folder] = round(sum(v.numel() for v in mapped.values()) / 1e6, 2)
    assert counts == {"unet": 872.30, "vqvae": 83.65, "bert": 581.99}
    assert layout.pipeline == "LDMTextToImagePipeline"


@pytest.mark.parametrize("path", ["sgm/configs/inference/sd_2_1.yaml", "sgm/configs/inference/sd_xl_base.yaml"])
def test_configs_of_generative_models_say_the_same(path):
    fixture = "sdxl_base" if "xl" in path else "sd_2_1"
    state, theirs, ours = released(fixture), recipe_of(OFFICIAL[path]), recipe_of(read_config(FILES[fixture]))
    check(theirs, state, fixture)
    a, b = (layout_of(r, prefixes(r, state), 1.0) for r in (theirs, ours))
    assert a.index() == b.index() and a.scheduler == b.scheduler
    assert [(p.folder, p.prefix, p.rows, p.config) for p in a.parts] == [
        (p.folder, p.prefix, p.rows, p.config) for p in b.parts
    ]


def test_the_configs_of_the_hub():
    """The folders that the hub's users know: sizes as in their config.json files."""
    v1 = layout_of(*_arguments("sd_v1"), 0.18215)
    unet, vae, text = (p.config for p in v1.parts)
    assert unet["attention_head_dim"] == 8 and unet["cross_attention_dim"] == 768 and unet["sample_size"] == 64
    assert unet["block_out_channels"] == [320, 640, 1280, 1280] and unet["use_linear_projection"] is False
    assert vae["block_out_channels"] == [128, 256, 512, 512] and vae["sample_size"] == 512
    assert (text["hidden_size"], text["num_hidden_layers"], text["hidden_act"]) == (768, 12, "quick_gelu")
    v2 = layout_of(*_arguments("sd_2_1"), 0.18215)
    unet, _, text = (p.config for p in v2.parts)
    assert unet["attention_head_dim"] == [5, 10, 20, 20] and unet["use_linear_projection"] is True
    assert (text["hidden_size"], text["num_hidden_layers"], text["hidden_act"]) == (1024, 23, "gelu")
    xl = layout_of(*_arguments("sdxl_base"), 0.13025)
    unet = xl.parts[0].config
    assert unet["transformer_layers_per_block"] == [1, 2, 10] and unet["attention_head_dim"] == [5, 10, 20]
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["projection_class_embeddings_input_dim"] == 2816 and unet["sample_size"] == 128


def _arguments(fixture):
    recipe = recipe_of(read_config(FILES[fixture]))
    return recipe, prefixes(recipe, released(fixture))


def test_what_diffusers_cannot_express_is_said():
    """LSUN churches has 8 heads on every level, so heads of 24 to 96 channels: UNet2DModel knows one width."""
    recipe = recipe_of(OFFICIAL["models/ldm/lsun_churches256/config.yaml"])
    with pytest.raises(UserError, match=r"one head width for all levels.*24, 48, 96"):
        layout_of(recipe, prefixes(recipe, {}), 1.0)


@pytest.mark.parametrize(
    ("fixture", "config", "message"),
    [
        (
            "sd_2_1",
            "sd_v1",
            "this is an SD 2 file, the config is SD 1: use configs/stable-diffusion/v2-inference-v.yaml",
        ),
        ("sd_v1", "sd_2_1", "this is an SD 1 file, the config is SD 2: use configs/stable-diffusion/v1-inference.yaml"),
        ("sdxl_base", "sd_v1", "this is an SDXL base file, the config is SD 1: use configs/stable-diffusion/sd_xl_b"),
        ("sd_v1", "ldm_cin256", "this is an SD 1 file, the config is LDM cin256: use configs/stable-diffusion/v1-i"),
        ("first_stage_kl-f8", "first_stage_kl-f4", "this is a KL-f8 autoencoder file, the config is KL-f4 autoencoder"),
    ],
)
def test_a_wrong_family_is_named_with_its_config(fixture, config, message):
    with pytest.raises(UserError) as e:
        check(recipe_of(read_config(FILES[config])), released(fixture), "model.ckpt")
    assert message in str(e.value)


@pytest.mark.parametrize(
    "name", ["v1-inpainting-inference", "v2-inference", "v2-inference-v", "sd_xl_base", "sd_xl_refiner"]
)
def test_configs_of_stable_diffusion_are_whole(name):
    params = yaml.safe_load((ROOT / SD / f"{name}.yaml").read_text())["model"]["params"]
    recipe = recipe_of(read_config(f"{SD}/{name}.yaml"))
    assert params["scale_factor"] == (0.13025 if "xl" in name else 0.18215)
    assert recipe.params["parameterization"] == ("v" if name.endswith("-v") else "eps")
    layout = layout_of(recipe, prefixes(recipe, {}), params["scale_factor"])
    assert layout.parts[0].config["in_channels"] == (9 if "inpainting" in name else 4)


@pytest.mark.parametrize(
    ("name", "fixture", "channels"),
    [
        ("v1-inpainting-inference", "sd_v1", 9),
        ("v2-inference", "sd_2_1", 4),
        ("v2-inference-v", "sd_2_1", 4),
        ("sd_xl_base", "sdxl_base", 4),
        ("sd_xl_refiner", None, 4),
    ],
)
def test_recipes_of_the_configs_take_the_released_files(name, fixture, channels):
    """LatentDiffusion built from the YAML has the released file's keys, whatever project the file is from."""
    with torch.device("meta"):
        model = instantiate_from_config(read_config(f"{SD}/{name}.yaml")["model"])
    own = shapes(model.state_dict())
    tables = {k for k in own if not k.startswith(("model.", "first_stage_model.", "cond_stage_model."))}
    assert "betas" in tables
    if fixture is None:
        return
    state = released(fixture)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.empty(320, channels, 3, 3, device="meta")
    found = shapes(for_recipe(state, own))
    assert {k: v for k, v in found.items() if k not in tables} == {k: v for k, v in own.items() if k not in tables}
