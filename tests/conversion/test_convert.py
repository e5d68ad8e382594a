"""Checkpoints turned into diffusers folders are loaded by diffusers itself, give equal outputs, and come back whole."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.conversion.job import convert
from ldm.conversion.recipe import recipe_of
from ldm.util import UserError
from tests.conversion.models import CONFIGS, PLAIN, UNET, config, modules, official_state, with_average
from tests.reference import filler

FROM_OTHERS = ["sd1", "sd1-inpaint", "sd2-v", "sd2", "sdxl-base", "sdxl-refiner", "ldm-text", "ldm-text-vq"]
FROM_OTHERS += ["ldm-uncond-updown", "ldm-one-head", "kl", "vq-noattn", "pixel-class"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TOWERS = {"sd2": "cond_stage_model.", "sd2-v": "cond_stage_model.", "sdxl-base": "conditioner.embedders.1."}
TOWERS["sdxl-refiner"] = "conditioner.embedders.0."


def write(path, name, state):
    """A .ckpt with its YAML beside it."""
    torch.save({"state_dict": state, "global_step": 7, "epoch": 2}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config(name)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (parts, state dict, diffusers folder, what was said); made once."""
    cache = {}

    def make(name):
        if name not in cache:
            home, parts = tmp_path_factory.mktemp(name), modules(name)
            state = official_state(name, parts)
            said = convert(write(home / "model.ckpt", name, state), "diffusers", home / "folder")
            cache[name] = parts, state, home / "folder", "\n".join(said)
        return cache[name]

    return make


def same(a, b):
    """Bit-equal state dicts."""
    assert sorted(a) == sorted(b)
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


def part(home, folder):
    """A component of a folder, by the class that its config.json names."""
    index = json.loads((home / "model_index.json").read_text()) if (home / "model_index.json").is_file() else {}
    at = home / folder if folder else home
    name = index[folder][1] if folder in index else json.loads((at / "config.json").read_text())["_class_name"]
    if name == "LDMBertModel":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel as cls
    else:
        import transformers

        cls = getattr(transformers if name.startswith("CLIP") else diffusers, name)
    model, report = cls.from_pretrained(at, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("kl", "vq", "vq-noattn")])
def test_the_unet_of_diffusers_gives_the_same(made, name):
    parts, _, home, _ = made(name)
    params = recipe_of(config(name)).unet["params"]
    x = filler.draw(1, "x", (2, params["in_channels"], 8, 8))
    t, kwargs = torch.tensor([3, 871]), {}
    if "context_dim" in params:
        kwargs["context"] = filler.draw(1, "context", (2, 5, params["context_dim"]))
    theirs = {"encoder_hidden_states": kwargs["context"]} if kwargs else {}
    if isinstance(params.get("num_classes"), int):
        kwargs["y"] = theirs["class_labels"] = torch.tensor([0, 10])
    elif "num_classes" in params:
        numbers = (params["adm_in_channels"] - 48) // 256
        pooled, sizes = filler.draw(1, "pooled", (2, 48)), filler.draw(1, "sizes", (2, numbers), "int", 0, 1024)
        from ldm.modules.conditioners import ConcatTimestepEmbedderND

        kwargs["y"] = torch.cat([pooled, ConcatTimestepEmbedderND(256)(sizes.float())], dim=1)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    ours = parts["unet"](x, t, **kwargs)
    assert ours.abs().mean() > 0.05
    torch.testing.assert_close(part(home, "unet")(x, t, **theirs).sample, ours, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl-base", "ldm-uncond", "ldm-uncond-updown", "kl", "vq", "vq-noattn"])
def test_the_first_stage_of_diffusers_gives_the_same(made, name):
    parts, _, home, _ = made(name)
    ours, alone = parts["first_stage"], name in ("kl", "vq", "vq-noattn")
    theirs = part(home, "" if alone else "vae" if (home / "vae").is_dir() else "vqvae")
    x = filler.draw(1, "picture", (2, 3, 16, 16), "uniform", -1, 1)
    if type(theirs).__name__ == "VQModel":
        z, found = ours.encode_to_prequant(x) if hasattr(ours, "encode_to_prequant") else None, theirs.encode(x).latents
    else:
        z, found = ours.encode(x).mean, theirs.encode(x).latent_dist.mean
        torch.testing.assert_close(theirs.encode(x).latent_dist.logvar, ours.encode(x).logvar, **TOLERANCE)
    torch.testing.assert_close(found, z, **TOLERANCE)
    if type(theirs).__name__ == "VQModel":
        decoded = ours.decode(ours.quantize(z)[0]) if alone else ours.decode(z)
        torch.testing.assert_close(theirs.decode(z).sample, decoded, **TOLERANCE)
    else:
        torch.testing.assert_close(theirs.decode(z).sample, ours.decode(z), **TOLERANCE)
    scale = recipe_of(config(name)).params["scale_factor"]
    assert theirs.config.scaling_factor == scale


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "sd2-v"])
def test_the_text_encoder_and_tokenizer_of_transformers_give_the_same(made, name):
    from transformers import CLIPTokenizer

    parts, _, home, _ = made(name)
    texts = ["a photo of a cat, 3D", "", "ünïcode 汉字 🙂 it's", "long " * 100]
    tokens = CLIPTokenizer.from_pretrained(home / "tokenizer")(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens, parts["conditioner"].make_tokenizer()(texts))
    found = part(home, "text_encoder")(tokens).last_hidden_state
    torch.testing.assert_close(found, parts["conditioner"](texts), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl-base", "sdxl-refiner"])
def test_sdxl_reads_both_towers_as_its_pipelines_do(made, name):
    parts, _, home, _ = made(name)
    towers = [m for m in parts["conditioner"].embedders if hasattr(m, "make_tokenizer")]
    folders = [f for f in ("text_encoder", "text_encoder_2") if (home / f).is_dir()]
    assert len(towers) == len(folders) == (1 if name.endswith("refiner") else 2)
    from transformers import CLIPTokenizer

    for tower, folder in zip(towers, folders, strict=True):
        tokenizer = CLIPTokenizer.from_pretrained(home / folder.replace("text_encoder", "tokenizer"))
        texts = ["a photo of a cat", "é"]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(tokens, tower.make_tokenizer()(texts))
        out = part(home, folder)(tokens, output_hidden_states=True)
        ours = tower(texts)
        z, pooled = ours if isinstance(ours, tuple) else (ours, None)
        torch.testing.assert_close(out.hidden_states[-2], z, **TOLERANCE)
        if pooled is not None:
            torch.testing.assert_close(out.text_embeds, pooled, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ldm-text", "ldm-text-vq"])
def test_bert_of_diffusers_gives_the_same(made, name):
    parts, _, home, said = made(name)
    tokens = filler.draw(1, "tokens", (2, 12), "int", 0, 100)
    found = part(home, "bert")(tokens)[0]
    torch.testing.assert_close(found, parts["conditioner"](tokens), **TOLERANCE)
    assert (home / "tokenizer" / "vocab.txt").is_file() or "vocab.txt" in said


@pytest.mark.parametrize(("name", "folder"), [("ldm-class", "embedding"), ("ldm-semantic", "channel_mapper")])
def test_conditioners_that_diffusers_does_not_know_keep_their_names(made, name, folder):
    parts, _, home, said = made(name)
    same(load_file(home / "conditioner" / "model.safetensors"), dict(parts["conditioner"].state_dict()))
    assert "no pipeline" in said


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(made, name, tmp_path):
    _, state, home, _ = made(name)
    convert(home, "safetensors", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), state)
    assert yaml.safe_load((tmp_path / "back.yaml").read_text()) == config(name)


@pytest.mark.parametrize("name", FROM_OTHERS)
def test_a_folder_of_others_comes_back_too(made, name, tmp_path):
    """Without official/ the config is made from the folder, and tables and constants are computed."""
    parts, state, home, _ = made(name)
    shutil.copytree(home, tmp_path / "folder", ignore=shutil.ignore_patterns("official"))
    said = convert(tmp_path / "folder", "official", tmp_path / "model.ckpt")
    back = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert sorted(back) == sorted(state)
    unread = [k for k in state if k.startswith(TOWERS.get(name, "-")) and _unread(k, name)]
    unread += [k for k in state if ".qkv." in k] * (name == "pixel-class")  # comes back in the usual order
    different = [k for k in state if not torch.equal(back[k], state[k]) and k not in unread]
    assert not [k for k in different if not torch.allclose(back[k], state[k], rtol=1e-4)]
    assert not [k for k in different if k.startswith(("model.", "first_stage_model.", "cond"))]
    if name.startswith("sd2"):
        assert "filled with zeros" in "\n".join(said)
    convert(tmp_path / "model.ckpt", "diffusers", tmp_path / "again")
    for file in [*home.glob("*/*.safetensors"), *home.glob("*.safetensors")]:
        if file.parent.name != "official":
            same(load_file(tmp_path / "again" / file.relative_to(home)), load_file(file))


def _unread(key, name):
    return any(s in key for s in ("logit_scale", ".resblocks.2.", "text_projection")[: 3 if name[:3] == "sd2" else 1])


@torch.no_grad()
def test_zeros_behind_the_layer_that_is_read_change_nothing(made, tmp_path):
    from ldm.util import instantiate_from_config

    parts, _, home, _ = made("sd2")
    shutil.copytree(home, tmp_path / "folder", ignore=shutil.ignore_patterns("official"))
    convert(tmp_path / "folder", "safetensors", tmp_path / "model.safetensors")
    recipe = recipe_of(yaml.safe_load((tmp_path / "model.yaml").read_text()))
    tower = instantiate_from_config(recipe.conditioner).eval()
    prefix, state = "cond_stage_model.", load_file(tmp_path / "model.safetensors")
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    assert torch.equal(tower(["a cat"]), parts["conditioner"](["a cat"]))


@torch.no_grad()
def test_the_whole_pipeline_draws_the_same_picture(made):
    from ldm.util import instantiate_from_config

    _, state, home, _ = made("sd1")
    model = instantiate_from_config(config("sd1")["model"]).eval()
    model.load_state_dict(state)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(home)
    pipe.set_progress_bar_config(disable=True)
    x = filler.draw(1, "start", (1, 4, 8, 8))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    picture = pipe("a cat", negative_prompt="a dog", latents=x, **options).images * 2 - 1
    cond = model.condition([0], prompts=["a cat"], negative_prompt="a dog")
    ours = model.sample(cond, seeds=[0], steps=4, sampler="ddim", grid="uniform", scale=3.0, x_T=x)
    assert 0.1 < ours.std() < 0.9
    torch.testing.assert_close(picture, ours, rtol=0, atol=1e-4)


PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "sdxl-base": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "ldm-uncond-updown": "LDMPipeline",
    "ldm-class": "LDMPipeline",
    "ldm-sr": "LDMSuperResolutionPipeline",
    "pixel": "DDPMPipeline",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_folder_is_a_pipeline(made, name):
    _, state, home, _ = made(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(home)
    assert type(pipe).__name__ == PIPELINES[name]
    recipe = recipe_of(config(name)).params
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if name == "sd2-v" else "epsilon")
    if "alphas_cumprod" in state:
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, state["alphas_cumprod"], rtol=1e-4, atol=1e-6)
    assert pipe.scheduler.config.num_train_timesteps == recipe["timesteps"]


@torch.no_grad()
def test_ldm_pipelines_run(made):
    uncond = diffusers.DiffusionPipeline.from_pretrained(made("ldm-uncond")[2])
    uncond.set_progress_bar_config(disable=True)
    assert uncond(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    sr = diffusers.DiffusionPipeline.from_pretrained(made("ldm-sr")[2])
    sr.set_progress_bar_config(disable=True)
    assert sr(torch.zeros(1, 3, 8, 8), num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


# --- weights, precision, metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "expected", "shift"), [(None, "ema", 1), ("ema", "ema", 1), ("raw", "raw", 0)])
def test_averaged_weights_are_taken_and_said(made, tmp_path, weights, expected, shift):
    state = made("ldm-uncond")[1]
    path = write(tmp_path / "model.ckpt", "ldm-uncond", with_average(state))
    said = convert(path, "safetensors", tmp_path / "out.safetensors", weights=weights)
    assert f"weights: {expected}" in said[0]
    found = load_file(tmp_path / "out.safetensors")
    assert not [k for k in found if k.startswith("model_ema.")]
    key = "model.diffusion_model.out.2.bias"
    assert torch.equal(found[key], state[key] + shift)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as f:
        kept = f.metadata()
    assert kept["weights"] == expected and kept["global_step"] == "7" and yaml.safe_load(kept["config"])["model"]


def test_metadata_survive_a_safetensors_file_without_yaml(made, tmp_path):
    path = write(tmp_path / "model.ckpt", "sd1", made("sd1")[1])
    convert(path, "safetensors", tmp_path / "a" / "a.safetensors")
    (tmp_path / "a" / "a.yaml").unlink()
    said = convert(tmp_path / "a" / "a.safetensors", "official", tmp_path / "b.ckpt")
    assert "config in the file" in said[0]
    content = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert content["global_step"] == 7 and content["epoch"] == 2
    same(content["state_dict"], made("sd1")[1])


def test_half_writes_float16_weights_and_keeps_the_tables(made, tmp_path):
    _, state, home, _ = made("sd1")
    convert(home, "safetensors", tmp_path / "half.safetensors", half=True)
    found = load_file(tmp_path / "half.safetensors")
    assert found["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert found["betas"].dtype == torch.float32
    convert(tmp_path / "half.safetensors", "diffusers", tmp_path / "folder")
    for file in (tmp_path / "folder").glob("[!o]*/*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}, file
    assert part(tmp_path / "folder", "text_encoder").dtype == torch.float16


def test_a_run_with_its_config_inside_is_converted(made, tmp_path):
    state = made("ldm-uncond")[1]
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    content = {"state_dict": state, "config": yaml.safe_dump(config("ldm-uncond"))}
    torch.save(content, run / "checkpoints" / "last.ckpt")
    convert(run, "diffusers", tmp_path / "folder")
    assert (tmp_path / "folder" / "unet" / "config.json").is_file()


def test_old_names_shards_and_bare_text_encoders_are_read(made, tmp_path):
    """What folders on the hub look like: old attention names, .bin shards, transformers 5's names."""
    _, state, home, _ = made("sd1")
    folder = tmp_path / "folder"
    shutil.copytree(home, folder)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    renamed = {}
    for k, v in tensors.items():
        for new, before in old.items():
            k = k.replace(new, before)
        renamed[k] = v
    vae.unlink()
    torch.save(renamed, vae.with_suffix(".bin"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    unet.unlink()
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, keys in shards.items():
        from safetensors.torch import save_file

        save_file({k: tensors[k] for k in keys}, folder / "unet" / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    text = folder / "text_encoder" / "model.safetensors"
    bare = {k.removeprefix("text_model."): v for k, v in load_file(text).items()}
    save_file(bare, text)
    convert(folder, "safetensors", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), state)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def without(state, prefix):
    return {k: v for k, v in state.items() if not k.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "cond_stage_model."),
            "holds no conditioner (text encoder): expected tensors named cond_stage_model.",
        ),
        (lambda s: without(s, "first_stage_model."), "holds no first stage"),
        (lambda s: without(s, "model.diffusion_model.out.2"), "2 missing (first: model.diffusion_model.out.2"),
        (lambda s: {**s, "model.diffusion_model.odd": torch.zeros(1)}, "1 unexpected"),
        (
            lambda s: {**s, "model.diffusion_model.time_embed.0.bias": torch.zeros(3)},
            "1 of another shape (first: model.diffusion_model.time_embed.0.bias (3,) (config: (128,)))",
        ),
    ],
)
def test_files_that_do_not_fit_the_config(made, tmp_path, change, message):
    path = write(tmp_path / "model.ckpt", "sd1", change(made("sd1")[1]))
    with pytest.raises(UserError) as e:
        convert(path, "diffusers", tmp_path / "out")
    assert message in str(e.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_is_left_behind(made, tmp_path):
    path = write(tmp_path / "model.ckpt", "sd1", made("sd1")[1])
    with pytest.raises(UserError, match="exists already"):
        convert(path, "official", path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        convert(path, "diffusers", tmp_path / "out")
    with pytest.raises(UserError, match="ends in .ckpt or .safetensors"):
        convert(path, "official", tmp_path / "model.pt")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not be written"):
        convert(path, "diffusers", tmp_path / "file" / "out")


def test_weights_beyond_float16_are_refused(made, tmp_path):
    key = "model.diffusion_model.out.2.bias"
    path = write(tmp_path / "model.ckpt", "sd1", {**made("sd1")[1], key: torch.full((4,), 1e6)})
    with pytest.raises(UserError, match="out.2.bias holds values beyond"):
        convert(path, "safetensors", tmp_path / "out.safetensors", half=True)


def test_averaged_weights_that_are_not_there(made, tmp_path):
    path = write(tmp_path / "model.ckpt", "sd1", made("sd1")[1])
    for source in (path, made("sd1")[2]):
        with pytest.raises(UserError, match="--weights ema"):
            convert(source, "safetensors", tmp_path / "out.safetensors", weights="ema")


INEXPRESSIBLE = {
    "heads of": {"num_heads": 4, "num_head_channels": -1},
    "dims=1": {"dims": 1},
    "conv_resample=False": {"conv_resample": False},
    "channel_mult=[2, 2, 2]": {"channel_mult": [2, 2, 2]},
    "n_embed=40": {"n_embed": 40},
    "num_heads_upsample=2": {"num_heads": 4, "num_heads_upsample": 2},
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_networks_that_diffusers_cannot_express_are_refused(what):
    from ldm.conversion.unet import full_params, to_config

    with pytest.raises(UserError) as e:
        to_config(full_params({"target": UNET, "params": {**PLAIN, **INEXPRESSIBLE[what]}}), 8)
    assert what in str(e.value) and "--to safetensors" in str(e.value)


def test_the_loop_in_the_documentation_runs(made):
    text = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    changes = {'"cin256-v2': f'"{made("ldm-class")[2]}', "[207, 1000]": "[3, 10]", "64, 64": "8, 8", "(50)": "(2)"}
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    found = {}
    exec(code, found)
    assert found["image"].shape == (1, 3, 16, 16) and found["image"].isfinite().all()


def test_a_first_stage_that_diffusers_does_not_know_is_refused():
    unknown = config("ldm-uncond")
    unknown["model"]["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    with pytest.raises(UserError, match="IdentityFirstStage: diffusers has no such first stage"):
        recipe_of(unknown)
    del unknown["model"]["params"]["unet_config"]
    with pytest.raises(UserError, match="no unet_config"):
        recipe_of(unknown)
