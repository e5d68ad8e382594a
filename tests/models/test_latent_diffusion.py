"""LatentDiffusion: official numbers and keys, every kind of condition, first stages, the latent scale, sampling."""

import csv
import json
import random
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from ldm import checkpoint
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion, Layout2ImgDiffusion
from ldm.util import UserError, instantiate_from_config
from tests.reference import FIXTURES, compare, filler

OFFICIAL = json.loads((FIXTURES.parent / "official_configs.json").read_text())
KEYS = {
    path.stem: fx
    for path in sorted(FIXTURES.glob("keys_*.json"))
    if (fx := compare.load(path))["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
}
DD = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
IDENTITY = {"target": "torch.nn.Identity"}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": DD, "lossconfig": IDENTITY},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 4, "n_embed": 16, "ddconfig": {**DD, "double_z": False}, "lossconfig": IDENTITY},
}
CLASS = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 32, "key": "class_label", "n_classes": 11},
}
CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "clip_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    },
}
TEXT = {"cond_stage_key": "caption", "cond_stage_config": CLIP}


def unet(in_channels=4, **options):
    options = {"use_spatial_transformer": True, "context_dim": 32, "legacy": False, **options}
    if not options["use_spatial_transformer"]:
        options.pop("context_dim")
    params = {
        "image_size": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_heads": 2,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**params, **options}}


def plain_unet(in_channels=4, **options):
    return unet(in_channels, use_spatial_transformer=False, **options)


def tiny(seed=0, **options):
    """A class-conditional model of 16x16 pictures, latents 4x8x8, no weight of which is zero."""
    options = {
        "first_stage_config": KL,
        "cond_stage_config": CLASS,
        "cond_stage_key": "class_label",
        "conditioning_key": "crossattn",
        "unet_config": unet(),
        "timesteps": 20,
        "linear_start": 0.01,
        "linear_end": 0.3,
        "image_size": 8,
        "channels": 4,
        "use_ema": False,
        **options,
    }
    return filler.fill(LatentDiffusion(**options), seed).eval()


def batch_of(n=3, size=16, device=None):
    pictures = {k: torch.rand(n, size, size, 3, device=device) * 2 - 1 for k in ("image", "masked_image", "LR_image")}
    mask = (torch.rand(n, size, size, 1, device=device) > 0.5).float()
    labels = torch.arange(n, device=device) % 10
    return {**pictures, "mask": mask, "class_label": labels, "caption": [f"picture {i}" for i in range(n)]}


CONDITIONS = {
    "none": {"cond_stage_config": "__is_unconditional__", "conditioning_key": None, "unet_config": plain_unet()},
    "class": {},
    "trained class": {"cond_stage_trainable": True, "cond_dropout": 0.2},
    "text": {**TEXT, "cond_dropout": 0.2},
    "concat": {
        "cond_stage_key": "LR_image",
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.SpatialRescaler",
            "params": {"n_stages": 1, "out_channels": 2},
        },
        "cond_stage_trainable": True,
        "conditioning_key": None,
        "unet_config": plain_unet(6),
    },
    "first stage": {
        "cond_stage_key": "masked_image",
        "cond_stage_config": "__is_first_stage__",
        "conditioning_key": "concat",
        "concat_keys": ["mask"],
        "unet_config": plain_unet(9),
    },
    "hybrid": {
        **TEXT,
        "conditioning_key": "hybrid",
        "concat_keys": ["mask", "masked_image"],
        "unet_config": unet(9),
        "cond_dropout": 0.2,
    },
    "trained hybrid": {
        "cond_stage_trainable": True,
        "conditioning_key": "hybrid",
        "concat_keys": ["mask", "masked_image"],
        "unet_config": unet(9),
    },
    "adm": {
        "cond_stage_config": IDENTITY,
        "conditioning_key": "adm",
        "num_classes": 10,
        "cond_dropout": 0.2,
        "unet_config": plain_unet(),
    },
}


# --- official numbers and keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_official_yaml_has_the_official_keys(name):
    fx = KEYS[name]
    with torch.device("meta"):
        model = instantiate_from_config(OFFICIAL[fx["config"]]["model"])
    compare.check_keys(model, fx)
    assert sum(p.numel() for p in model.parameters()) == fx["n_params"]
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in model.state_dict().items() if v.dtype != torch.float32}
    assert dtypes == fx["dtypes"]


LOSSES = {
    "eps": {},
    "x0": {"parameterization": "x0"},
    "l1": {"loss_type": "l1"},
    "elbo": {"original_elbo_weight": 0.01, "l_simple_weight": 0.5},
    "logvar": {"learn_logvar": True, "logvar_init": 0.3},
}


@pytest.mark.parametrize("tag", LOSSES)
def test_official_losses_and_gradients(tag):
    fx = compare.load(FIXTURES / "latent_diffusion_losses.json")
    model = instantiate_from_config({"target": fx["target"], "params": {**fx["params"], **LOSSES[tag]}})
    if tag == "logvar":
        compare.check_keys(model, fx)
    filler.fill(model, fx["seed"]).train()
    x = compare.inputs(fx)
    loss, logs = model.p_losses(x["x_start"], x["c"], x["t"], x["noise"])
    loss.backward()
    out = {f"{tag}.loss": loss, **{f"{tag}.{k}": v for k, v in logs.items()}}
    grads = [p.grad.double() for p in model.model.parameters()]
    out[f"{tag}.grad_norm"] = sum((g**2).sum() for g in grads).sqrt()
    out[f"{tag}.grad:input_blocks.0.0.weight"] = model.model.diffusion_model.input_blocks[0][0].weight.grad
    if tag == "logvar":
        out["logvar.grad:logvar"] = model.logvar.grad
    assert set(out) == {k for k in fx["outputs"] if k.startswith(f"{tag}.")}
    assert compare.check(fx, out) == []


def test_official_pipeline():
    fx = compare.load(FIXTURES / "latent_diffusion_pipeline.json")
    model = instantiate_from_config({"target": fx["target"], "params": fx["params"]})
    compare.check_keys(model, fx)
    filler.fill(model, fx["seed"]).eval()
    x, out, shape = compare.inputs(fx), {}, (2, 4, 8, 8)
    noise = lambda: compare.fixed_noise(72)  # noqa: E731
    batch = {"jpg": x["jpg"], "class_label": x["class_label"]}
    with torch.no_grad():
        with noise():
            found = model.get_input(batch, "jpg", return_first_stage_outputs=True, return_original_cond=True)
        z = found[0]
        out |= dict(zip(("z", "c", "x", "xrec"), found, strict=False)) | {"decode": model.decode_first_stage(z)}
        out["apply_model"] = model.apply_model(x["x_t"], x["t"], x["cond"])
        lists = {"c_crossattn": [x["cond"], x["cond"] * 0.5]}
        out["apply_model_dict"] = model.apply_model(x["x_t"], x["t"], lists)
        for clip in (True, False):
            moments = model.p_mean_variance(x["x_t"], x["cond"], x["t"], clip_denoised=clip, return_x0=True)
            out |= {f"p_mean_variance_clip{clip}.{i}": moment for i, moment in enumerate(moments)}
        with noise():
            out["p_sample"], out["p_sample_x0"] = model.p_sample(
                x["x_t"], x["cond"], x["t"], temperature=0.8, return_x0=True
            )
        out["prior_bpd"] = model._prior_bpd(x["x_t"])
        out["eps_from_xstart"] = model._predict_eps_from_xstart(x["x_t"], x["t"], z)
    with noise():
        out["p_sample_loop_10"], states = model.p_sample_loop(
            x["cond"], shape, return_intermediates=True, timesteps=10, log_every_t=2, verbose=False
        )
    with noise():
        mask = (x["mask"] > 0.5).float()
        out["p_sample_loop_mask"] = model.sample(
            x["cond"], batch_size=2, timesteps=6, mask=mask, x0=z, shape=shape, verbose=False
        )
    with noise():
        out["progressive"], starts = model.progressive_denoising(
            x["cond"], shape[1:], batch_size=2, start_T=8, log_every_t=2, verbose=False
        )
    out |= {"p_sample_loop_10_inter": torch.stack(states), "progressive_x0": torch.stack(starts)}
    assert set(out) == set(fx["outputs"])
    assert compare.check(fx, out) == []


def test_official_scale_by_std():
    fx = compare.load(FIXTURES / "latent_diffusion_scale_by_std.json")
    model = instantiate_from_config({"target": fx["target"], "params": fx["params"]})
    compare.check_keys(model, fx)
    filler.fill(model, fx["seed"]).eval()
    batch, out = compare.inputs(fx), {"scale_factor_before": model.scale_factor.clone()}
    with compare.fixed_noise(73):
        model.on_train_batch_start(batch, 0, 0)
    with compare.fixed_noise(74):
        out |= {"scale_factor_after": model.scale_factor, "z": model.get_input(batch, "jpg")[0]}
    assert compare.check(fx, out) == []


@pytest.mark.parametrize("name, cond", [("concat", "c"), ("adm", "y")])
def test_official_conditions(name, cond):
    fx = compare.load(FIXTURES / f"latent_diffusion_{name}.json")
    model = instantiate_from_config({"target": fx["target"], "params": fx["params"]})
    compare.check_keys(model, fx)
    filler.fill(model, fx["seed"]).eval()
    x = compare.inputs(fx)
    assert compare.check(fx, {"out": model.apply_model(x["x_t"], x["t"], x[cond])}) == []


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONDITIONS)
def test_every_condition_trains_and_samples(kind):
    model, batch = tiny(**CONDITIONS[kind]), batch_of()
    loss, logs = model.train().loss(batch)
    loss.backward()
    assert loss.isfinite() and set(logs) == {"loss_simple", "loss_vlb", "loss"}
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not any(n.startswith("first_stage_model.") for n in trained)
    assert any(n.startswith("cond_stage_model.") for n in trained) == model.cond_stage_trainable
    assert not model.first_stage_model.training
    x = model.eval().sample(model.get_cond(batch), seeds=[0, 1, 2], steps=2)
    assert x.shape == (3, 3, 16, 16) and x.abs().max() <= 1
    pictures = model.log_images(batch, 2, ddim_steps=2, inpaint=False)
    wanted = {"inputs", "reconstruction", "diffusion_row", "samples", "progressive_row"}
    assert wanted <= set(pictures) <= wanted | {"conditioning"}
    assert ("conditioning" in pictures) == (kind != "none")
    for name, picture in pictures.items():
        assert picture.ndim == 4 and picture.shape[1] == 3 and picture.abs().max() <= 1, name


@pytest.mark.parametrize("kind", ["none", "class", "trained class", "text", "hybrid", "adm"])
def test_a_picture_depends_on_its_seed_alone(kind):
    model, batch = tiny(**CONDITIONS[kind]), batch_of()
    scale = 2.0 if model.cond_dropout else 1.0
    if kind == "hybrid":
        null = model.condition([0])["uncond"]["c_crossattn"]
        cond = model.get_cond(batch)
        one = {**{k: v[1:2] for k, v in cond.items()}, "uncond": {"c_crossattn": null}}
        cond["uncond"] = {"c_crossattn": null.expand(3, -1, -1)}
    else:
        cond, one = model.condition([5, 6, 7]), model.condition([6])
    together = model.sample(cond, seeds=[5, 6, 7], steps=3, scale=scale, sampler="euler_ancestral")
    alone = model.sample(one, seeds=[6], steps=3, scale=scale, sampler="euler_ancestral")
    assert (together[1] - alone[0]).abs().max() <= 2 / 255  # 1/255 of the range [-1, 1]


def test_condition_of_classes():
    model = tiny(cond_dropout=0.1)
    assert model.num_classes == 10 and model.null_class == 10
    cond = model.condition([3, 14])
    table = model.cond_stage_model.embedding.weight
    assert torch.equal(cond["c_crossattn"][:, 0], table[[3, 4]])
    assert torch.equal(cond["uncond"]["c_crossattn"][:, 0], table[[10, 10]])
    assert "uncond" not in tiny().condition([0]) and tiny().num_classes == 11
    with pytest.raises(UserError, match="no prompt"):
        model.condition([0], prompts=["a"])
    with pytest.raises(UserError, match="class 10"):
        model.condition([0], classes=[10])
    auto = tiny(
        cond_dropout=0.1, num_classes=5, cond_stage_config={**CLASS, "params": {"embed_dim": 32, "key": "class_label"}}
    )
    assert auto.cond_stage_model.embedding.num_embeddings == 6


def test_the_last_of_imagenets_1001_classes_is_null():
    model = tiny(cond_stage_config={**CLASS, "params": {**CLASS["params"], "n_classes": 1001}})
    assert model.num_classes == 1000
    assert torch.equal(
        model.condition([0])["uncond"]["c_crossattn"][0, 0], model.cond_stage_model.embedding.weight[1000]
    )


def test_condition_of_texts():
    model = tiny(**TEXT)
    cond = model.condition([0, 1], prompts=["a (red:1.5) cat"], negative_prompt="blue")
    embed = model.cond_stage_model
    torch.testing.assert_close(cond["c_crossattn"], embed.encode(["a (red:1.5) cat"] * 2))
    torch.testing.assert_close(cond["uncond"]["c_crossattn"], embed.encode(["blue"] * 2))
    literal = model.get_learned_conditioning(["a (red:1.5) cat"])
    assert not torch.allclose(literal, cond["c_crossattn"][:1])
    long = model.condition([0], prompts=["cat " * 200], long_prompt=True)
    assert long["c_crossattn"].shape == long["uncond"]["c_crossattn"].shape and long["c_crossattn"].shape[1] > 77
    for options in ({"classes": [1]}, {"prompts": ["a", "b", "c"]}, {"prompts": ["a"], "clip_skip": 9}):
        with pytest.raises(UserError):
            model.condition([0, 1], **options)
    with pytest.raises(UserError, match="from files"):
        tiny(**CONDITIONS["concat"]).condition([0])


def test_conditions_are_dropped_in_training_only():
    torch.manual_seed(0)
    random.seed(0)
    model = tiny(**TEXT, cond_dropout=0.3)
    texts = ["cat"] * 1000
    assert model.drop_texts(texts) == texts
    dropped = model.train().drop_texts(texts)
    assert abs(dropped.count("") - 300) < 60 and dropped.count("cat") == 1000 - dropped.count("")
    model = tiny(cond_dropout=0.3).train()
    batch = {"class_label": torch.zeros(1000, dtype=torch.long)}
    labels = model.condition_input(batch, None, "class_label")["class_label"]
    assert abs(int((labels == 10).sum()) - 300) < 60 and batch["class_label"].sum() == 0


def test_guidance_is_a_mix_of_both_conditions():
    model = tiny(cond_dropout=0.1)
    cond, guesses = model.condition([0], classes=[3]), []
    keep = lambda i, t, x, x0: guesses.append(x0)  # noqa: E731
    model.sample(cond, seeds=[0], steps=1, callback=keep)
    model.sample(cond["uncond"], seeds=[0], steps=1, callback=keep)
    model.sample(cond, seeds=[0], steps=1, scale=3.0, callback=keep)
    torch.testing.assert_close(guesses[2], guesses[1] + 3 * (guesses[0] - guesses[1]), atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match="guidance"):
        tiny().sample(tiny().condition([0]), seeds=[0], scale=3.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conditioning_key": "hybrid"}, "concat_keys"),
        ({"concat_keys": ["mask"]}, "concat or hybrid"),
        ({"conditioning_key": "concat", "cond_dropout": 0.1}, "cond_dropout"),
        ({"cond_stage_config": "__is_first_stage__", "cond_stage_trainable": True}, "trained"),
        ({"scale_by_std": True, "scale_factor": 0.5}, "scale_by_std"),
        ({"scale_factor": "autoo"}, "auto"),
        ({"num_timesteps_cond": 21}, "num_timesteps_cond"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_a_latent_of_other_channels_is_refused():
    model = tiny(channels=3, unet_config=unet(3, out_channels=3))
    with pytest.raises(UserError, match=r"\[4, 8, 8\], expected \[3, h, w\]"):
        model.loss(batch_of())


def test_noised_conditions():
    model = tiny(num_timesteps_cond=4)
    assert model.cond_ids[:4].tolist() == [0, 6, 13, 19] and (model.cond_ids[4:] == 19).all()
    assert "cond_ids" not in model.state_dict()
    assert model.loss(batch_of())[0].isfinite()
    c = model.get_cond(batch_of(2))["c_crossattn"]
    assert model.sample(c, batch_size=2, timesteps=3, verbose=False).shape == (2, 4, 8, 8)


# --- first stage and scale --------------------------------------------------------------------------------------------


def test_vq_first_stage():
    model = tiny(first_stage_config=VQ)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    h = model.get_first_stage_encoding(model.encode_first_stage(x))
    stage: VQModelInterface = model.first_stage_model
    torch.testing.assert_close(model.decode_first_stage(h), stage.decode(h))
    torch.testing.assert_close(model.decode_first_stage(h, force_not_quantize=True), stage.decode(h, True))
    codes = stage.quantize(h)[2][2].reshape(2, 8, 8)
    torch.testing.assert_close(model.decode_first_stage(codes, predict_cids=True), stage.decode(h))
    pictures = model.log_images(batch_of(), 2, ddim_steps=2, plot_denoise_rows=True)
    assert set(pictures) == {
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "denoise_row", "progressive_row",
        "samples_x0_quantized", "mask", "samples_inpainting", "samples_outpainting",
    }  # fmt: skip


def test_inpainting_and_outpainting_keep_opposite_parts():
    model, batch = tiny(), batch_of()
    made = {}
    decode = model.decode_first_stage
    model.decode_first_stage = lambda z, *args: made.setdefault(len(made), z) is None or decode(z)
    pictures = model.log_images(
        batch, 2, ddim_steps=2, return_keys=["mask", "samples_inpainting", "samples_outpainting"]
    )
    assert set(pictures) == {"mask", "samples_inpainting", "samples_outpainting"}
    keep = pictures["mask"][:1, :1] > 0
    assert not keep[..., 4, 4] and keep[..., 0, 0]
    outpainted, inpainted = made[len(made) - 1], made[len(made) - 2]
    difference = (outpainted - inpainted).abs().amax(dim=1, keepdim=True)
    z = made[0]
    assert ((inpainted - z).abs() * keep).max() < 1e-5
    assert ((outpainted - z).abs() * ~keep).max() < 1e-5
    assert difference.max() > 0.1


def test_quantised_denoising_snaps_to_the_codebook():
    model = tiny(first_stage_config=VQ)
    guesses = []
    model.sample(model.condition([0]), seeds=[0], steps=2, quantize_denoised=True,
                 callback=lambda i, t, x, x0: guesses.append(x0))  # fmt: skip
    for x0 in guesses:
        torch.testing.assert_close(model.quantize(x0), x0)


def test_sizes_other_than_image_size():
    model = tiny()
    x = model.sample(model.condition([0]), seeds=[0], steps=1, height=24, width=32)
    assert x.shape == (1, 3, 24, 32)
    with pytest.raises(UserError, match="multiple of 2"):
        model.sample(model.condition([0]), seeds=[0], steps=1, height=17)


def test_image_to_image_strength():
    model = tiny()
    z, cond = torch.randn(1, 4, 8, 8), model.condition([0])
    still = model.sample(cond, seeds=[0], x0=z, strength=0.0)
    torch.testing.assert_close(still, model.decode_first_stage(z).clamp(-1, 1))
    far, near = (model.sample(cond, seeds=[0], steps=10, x0=z, strength=s) for s in (1.0, 0.2))
    assert (near - still).abs().mean() < (far - still).abs().mean()


def test_a_missing_first_stage_file_is_an_error_only_when_it_is_needed():
    config = {**KL, "params": {**KL["params"], "ckpt_path": "models/first_stage_models/none/model.ckpt"}}
    model = tiny(first_stage_config=config)
    with pytest.raises(UserError, match="models/first_stage_models/none/model.ckpt does not exist"):
        model.loss(batch_of())
    checkpoint.load(model, tiny(seed=3).state_dict())  # a checkpoint of the whole brings the first stage along
    assert model.loss(batch_of())[0].isfinite()


def run_directory(tmp_path, config, seed=0):
    """A run of this project that trained `config`."""
    model = filler.fill(instantiate_from_config(config), seed)
    if hasattr(model, "model_ema"):
        model.init_ema(model)
    content = {"state_dict": model.state_dict(), "config": yaml.safe_dump({"model": config})}
    checkpoint.save_atomic(content, tmp_path / "checkpoints" / "last.ckpt")
    return model


def test_first_stage_of_a_run(tmp_path):
    config = {**VQ, "target": "ldm.models.autoencoder.VQModel", "params": {**VQ["params"], "use_ema": True}}
    trained = run_directory(tmp_path, config, seed=5)
    model = tiny(first_stage_config=str(tmp_path))
    filler.fill(model.model, 0)
    stage = model.first_stage_model
    assert not hasattr(stage, "model_ema") and not any(p.requires_grad for p in stage.parameters())
    assert set(stage.state_dict()) == set(instantiate_from_config(VQ).state_dict())
    model.first_stage_model.load_state_dict({k: v for k, v in trained.state_dict().items() if "model_ema" not in k})
    assert model.train().loss(batch_of())[0].isfinite()
    assert model.eval().sample(model.condition([0]), seeds=[0], steps=1).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="does not exist"):
        tiny(first_stage_config=str(tmp_path / "nowhere"))


def fit(model, tmp_path, steps=2, n=8, **options):
    whole = batch_of(n)
    data = [{k: v[i] for k, v in whole.items()} for i in range(n)]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **{"logger": False, **options},
    )
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4))
    return trainer


def test_scale_measured_over_training_images(tmp_path):
    torch.manual_seed(0)
    model = tiny(scale_factor="auto", use_ema=True)
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    trainer = fit(model, tmp_path, logger=logger)
    torch.manual_seed(0)
    whole = batch_of(8)
    model.scale_factor.fill_(1.0)
    with torch.no_grad():
        z = torch.cat([model.get_first_stage_encoding(model.encode_first_stage(
            super(LatentDiffusion, model).get_input(whole, "image"))) for _ in range(20)])  # fmt: skip
    measured = float(_logged(tmp_path, "scale_factor"))
    assert abs(measured * float(z.std()) - 1) < 0.05
    assert "scale_factor" in model.state_dict()
    names = {f"val/{k}{e}" for k in ("loss", "loss_simple", "loss_vlb") for e in ("", "_ema")}
    assert names | {"train/loss_simple", "global_step"} <= set(trainer.callback_metrics)


def _logged(path, name):
    with open(path / "metrics.csv") as f:
        return next(row[name] for row in csv.DictReader(f) if row.get(name))


def test_a_scale_that_a_checkpoint_brought_is_kept(tmp_path):
    for options in ({"scale_factor": "auto"}, {"scale_by_std": True}):
        model = tiny(**options)
        checkpoint.load(model, {**tiny(seed=1).state_dict(), "scale_factor": torch.tensor(0.5)})
        fit(model, tmp_path, steps=1)
        assert float(model.scale_factor) == 0.5
        fresh = tiny(**options)
        fit(fresh, tmp_path, steps=1)
        assert float(fresh.scale_factor) != 1.0


def test_frozen_stages_stay_as_they_are(tmp_path):
    model = tiny(**TEXT, cond_dropout=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, tmp_path)
    for key, value in model.state_dict().items():
        if not key.startswith("model."):
            assert torch.equal(value, before[key]), key
    assert not model.train().cond_stage_model.training


# --- layouts, devices, precision --------------------------------------------------------------------------------------


def test_layout_to_image():
    options = {
        "first_stage_config": KL,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {"n_embed": 32, "n_layer": 1, "vocab_size": 50, "max_seq_len": 9, "use_tokenizer": False},
        },
        "conditioning_key": "crossattn",
        "cond_stage_trainable": True,
        "unet_config": unet(),
        "image_size": 8,
        "channels": 4,
        "timesteps": 20,
    }
    model = Layout2ImgDiffusion(**options)
    batch = {**batch_of(), "coordinates_bbox": torch.randint(0, 50, (3, 9))}
    assert model.loss(batch)[0].isfinite()

    class Boxes:
        def plot(self, tokens, label_of, size):
            assert label_of(3) == "cat 4" and len(tokens) == 9
            return torch.zeros(3, size[1], size[0])

    class Data:
        conditional_builders = {"coordinates_bbox": Boxes()}

        def get_category_id(self, number):
            return number + 1

        def get_textual_label(self, category):
            return f"cat {category}"

    model.eval()
    assert "bbox_image" not in model.log_images(batch, 2, sample=False)
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets={"validation": Data()}))
    assert model.log_images(batch, 2, sample=False)["bbox_image"].shape == (2, 3, 16, 16)
    model._trainer = None
    with pytest.raises(UserError, match="coordinates_bbox"):
        Layout2ImgDiffusion(**options, cond_stage_key="caption")
    with pytest.raises(UserError, match="from files"):
        model.condition([0])


@pytest.mark.parametrize("kind", ["class", "text", "hybrid", "adm"])
def test_nothing_is_left_on_the_cpu(kind):
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = LatentDiffusion(
                **{
                    "first_stage_config": KL,
                    "cond_stage_config": CLASS,
                    "cond_stage_key": "class_label",
                    "conditioning_key": "crossattn",
                    "unet_config": unet(),
                    "timesteps": 20,
                    "image_size": 8,
                    "channels": 4,
                    "scale_factor": "auto",
                    **CONDITIONS[kind],
                }
            )
        batch = batch_of(2, device="cuda")
        loss, logs = model.train().loss(batch)
        assert {v.device.type for v in (loss, *logs.values())} == {"cuda"}
        for cond in [model.eval().get_cond(batch)] + [model.condition([0, 1])] * (kind != "hybrid"):
            assert model.sample(cond, seeds=[0, 1], steps=2).device.type == "cuda"
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}


def test_half_precision_weights():
    model = tiny(scale_factor="auto").to(torch.bfloat16)
    model.scale_factor.fill_(0.18215)
    assert model.scale_factor.dtype == model.betas.dtype == torch.float32
    x = model.sample(model.condition([0]), seeds=[0], steps=2)
    assert x.isfinite().all() and x.dtype == torch.float32


def test_sample_log_is_official_ddim():
    model = tiny()
    cond = model.get_cond(batch_of(2))["c_crossattn"]
    torch.manual_seed(0)
    z, intermediates = model.sample_log(cond, batch_size=2, ddim=True, ddim_steps=5, eta=1.0)
    assert z.shape == (2, 4, 8, 8) and set(intermediates) == {"x_inter", "pred_x0"}
    z, states = model.sample_log(cond, batch_size=2, ddim=False, ddim_steps=0, timesteps=3, verbose=False)
    assert z.shape == states[-1].shape == (2, 4, 8, 8)
