"""DiffusionEngine: what generative-models' YAML files say is what is built, trained and sampled."""

import copy
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm import checkpoint
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import VEPath, VPPath
from ldm.models.diffusion.engine import SGM_NAMES, DiffusionEngine
from ldm.util import SeededNoise, UserError, instantiate_from_config
from tests.reference import FIXTURES, filler

TREES = json.loads((FIXTURES.parent / "official_configs.json").read_text())
SGM, PARTS = "sgm.modules.", "sgm.modules.diffusionmodules."
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OPEN_CLIP = {"embed_dim": 48, "width": 32, "heads": 4, "layers": 3}
TOWER = {
    "target": SGM + "encoders.modules.FrozenOpenCLIPEmbedder2",
    "input_key": "txt",
    "params": {"clip_config": OPEN_CLIP, "layer": "penultimate", "always_return_pooled": True, "legacy": False},
}
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
NETWORK = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
    "transformer_depth": [1, 2],
}
DD = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
LOSS = {
    "target": PARTS + "loss.StandardDiffusionLoss",
    "params": {
        "loss_weighting_config": {"target": PARTS + "loss_weighting.EpsWeighting"},
        "sigma_sampler_config": {
            "target": PARTS + "sigma_sampling.DiscreteSampling",
            "params": {
                "num_idx": 1000,
                "discretization_config": {"target": PARTS + "discretizer.LegacyDDPMDiscretization"},
            },
        },
    },
}
SAMPLER = {
    "target": PARTS + "sampling.EulerEDMSampler",
    "params": {
        "num_steps": 5,
        "discretization_config": {"target": PARTS + "discretizer.LegacyDDPMDiscretization"},
        "guider_config": {"target": PARTS + "guiders.VanillaCFG", "params": {"scale": 3.0}},
    },
}


def small(path, conditioner, network, **options):
    """The official model with small networks and a small first stage: everything else as its YAML says."""
    params = copy.deepcopy(TREES[f"sgm/configs/{path}.yaml"]["model"]["params"])
    params["network_config"]["params"] = {**NETWORK, **network}
    params["conditioner_config"]["params"]["emb_models"] = conditioner
    dd = {**DD, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params["first_stage_config"]["params"]["ddconfig"] = dd
    model = DiffusionEngine(**{**params, "loss_fn_config": LOSS, "image_size": 16, **options})
    return filler.fill(model, 0).eval()


def sizes(keys):
    return [{"target": SGM + "encoders.modules.ConcatTimestepEmbedderND", "input_key": k, "params": {"outdim": 16}}
            for k in keys]  # fmt: skip


def sdxl(**options):
    clip = {
        "target": SGM + "encoders.modules.FrozenCLIPEmbedder",
        "input_key": "txt",
        "params": {"clip_config": CLIP, "layer": "hidden", "layer_idx": 2},
    }
    network = {"context_dim": 64, "num_classes": "sequential", "adm_in_channels": 48 + 6 * 16}
    return small("inference/sd_xl_base", [clip, TOWER, *sizes(SIZES)], network, **options)


def refiner():
    network = {"context_dim": 32, "num_classes": "sequential", "adm_in_channels": 48 + 5 * 16}
    keys = (*SIZES[:2], "aesthetic_score")
    return small("inference/sd_xl_base", [TOWER, *sizes(keys)], network)


def sd2(scaling="EpsScaling", **options):
    params = {"clip_config": OPEN_CLIP, "layer": "penultimate"}
    text = {"target": SGM + "encoders.modules.FrozenOpenCLIPEmbedder", "input_key": "txt", "params": params}
    model = small("inference/sd_2_1", [text], {"context_dim": 32}, **options)
    if scaling != "EpsScaling":
        model.denoiser.scaling = instantiate_from_config({"target": PARTS + f"denoiser_scaling.{scaling}"})
    return model


def mnist(**options):
    params = copy.deepcopy(TREES["sgm/configs/example_training/toy/mnist_cond.yaml"]["model"]["params"])
    params["network_config"]["params"] |= {"num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": 16}
    return filler.fill(DiffusionEngine(**{**params, **options}), 0).eval()


def batch_of(n=3, size=16):
    pictures = torch.rand(n, size, size, 3) * 2 - 1
    return {"jpg": pictures, "txt": [f"picture {i}" for i in range(n)]}


def digits(n=4):
    return {"jpg": torch.rand(n, 16, 16, 1) * 2 - 1, "cls": torch.arange(n) % 10}


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["EpsScaling", "VScaling"])
def test_it_is_latent_diffusion_by_other_names(scaling):
    """eps and v, sampled by the same sampler on the same grid, give the pictures of LatentDiffusion."""
    engine = sd2(scaling)
    own = TREES["sgm/configs/inference/sd_2_1.yaml"]["model"]["params"]
    network = {**NETWORK, "context_dim": 32}
    latent = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.012,
                "channels": 4,
                "image_size": 8,
                "conditioning_key": "crossattn",
                "cond_stage_key": "txt",
                "first_stage_key": "jpg",
                "use_ema": False,
                "scale_factor": own["scale_factor"],
                "parameterization": "v" if scaling == "VScaling" else "eps",
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "ddconfig": {**DD, "num_res_blocks": 1, "attn_resolutions": []},
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                    "params": {"clip_config": OPEN_CLIP, "layer": "penultimate"},
                },
                "unet_config": {"target": PARTS + "openaimodel.UNetModel", "params": network},
            },
        }
    ).eval()
    state = {k.replace("conditioner.embedders.0.", "cond_stage_model."): v for k, v in engine.state_dict().items()}
    state.pop("denoiser.sigmas")
    checkpoint.load(latent, state)
    ask = {"prompts": ["a (red:1.3) cat"], "negative_prompt": "dog"}
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral"):
        knobs = {"seeds": [1, 2], "steps": 4, "scale": 3.0, "sampler": sampler, "grid": "uniform"}
        x = engine.sample(engine.condition([1, 2], **ask), **knobs)
        y = latent.sample(latent.condition([1, 2], **ask), **knobs)
        assert x.shape == (2, 3, 16, 16)
        torch.testing.assert_close(x, y, atol=2e-4, rtol=0)


@pytest.mark.parametrize("make", [sd2, mnist], ids=["discrete", "edm"])
def test_sampling_by_seed_is_generative_models_sampler(make):
    model = sd2(sampler_config=SAMPLER) if make is sd2 else mnist(image_size=16)
    model.sampler.num_steps = 5
    cond = model.condition([3, 4])
    shape = (4, 8, 8) if make is sd2 else (1, 16, 16)
    theirs = [{SGM_NAMES[k]: v for k, v in c.items() if k != "uncond"} for c in (cond, cond["uncond"])]
    with torch.no_grad():
        z = model.sampler(
            lambda x, sigma, c: model.denoiser(model.model, x, sigma, c), SeededNoise([3, 4])((2, *shape)), *theirs
        )
    ours = model.sample(cond, seeds=[3, 4])
    torch.testing.assert_close(ours, model.decode_first_stage(z).clamp(-1, 1), atol=2e-4, rtol=0)
    assert type(model.path) is (VPPath if make is sd2 else VEPath)


def test_the_official_call():
    model = sd2(sampler_config=SAMPLER)
    cond = model.condition([0, 0])
    names = {"crossattn": cond["c_crossattn"]}, {"crossattn": cond["uncond"]["c_crossattn"]}
    torch.manual_seed(0)
    z = model.sample(*names, batch_size=2, shape=(4, 8, 8))
    torch.manual_seed(0)
    again = model.sample(cond, cond["uncond"], batch_size=2)
    assert z.shape == (2, 4, 8, 8) and torch.equal(z, again)
    with pytest.raises(UserError, match="sampler_config is missing"):
        sd2().sample(cond)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler):
    for model, channels in ((sd2(), 3), (mnist(), 1)):
        x = model.sample(model.condition([0]), seeds=[0], steps=3, sampler=sampler, scale=2.0, height=16, width=16)
        assert x.isfinite().all() and x.shape == (1, channels, 16, 16)


def test_a_picture_depends_on_its_seed_alone():
    model = sdxl()
    knobs = {"steps": 3, "scale": 2.0, "sampler": "euler_ancestral"}
    together = model.sample(model.condition([5, 6], prompts=["cat", "dog"]), seeds=[5, 6], **knobs)
    alone = model.sample(model.condition([6], prompts=["dog"]), seeds=[6], **knobs)
    assert (together[1] - alone[0]).abs().max() <= 2 / 255


def test_image_to_image_and_masks():
    model = sd2()
    z, cond = torch.randn(1, 4, 8, 8), model.condition([0])
    still = model.sample(cond, seeds=[0], x0=z, strength=0.0)
    torch.testing.assert_close(still, model.decode_first_stage(z).clamp(-1, 1))
    mask = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(model.sample(cond, seeds=[0], x0=z, mask=mask, steps=2), still)


def test_scale_and_steps_come_from_the_sampler_config():
    model, steps = sd2(sampler_config=SAMPLER), []
    cond = model.condition([0])
    x = model.sample(cond, seeds=[0], callback=lambda i, *_: steps.append(i))
    assert steps == [0, 1, 2, 3, 4]
    torch.testing.assert_close(x, model.sample(cond, seeds=[0], scale=3.0, steps=5))
    assert not torch.equal(x, model.sample(cond, seeds=[0], scale=1.0))
    churned = copy.deepcopy(SAMPLER)
    churned["params"]["s_churn"] = 5.0
    assert not torch.equal(x, sd2(sampler_config=churned).sample(cond, seeds=[0]))
    with pytest.raises(UserError, match="at most 1000"):
        model.sample(cond, seeds=[0], steps=1001)


# --- conditions -------------------------------------------------------------------------------------------------------


def test_sdxl_is_told_sizes_and_crop():
    model = sdxl()
    vector = lambda **knobs: model.condition([0], prompts=["cat"], **knobs)["y"][0, 48:].reshape(3, 2, 16)  # noqa: E731
    embed = model.conditioner.embedders[2]
    expected = [embed(torch.tensor([[16.0, 16.0]])), embed(torch.zeros(1, 2)), embed(torch.tensor([[16.0, 16.0]]))]
    torch.testing.assert_close(vector(), torch.cat(expected).reshape(3, 2, 16))
    torch.testing.assert_close(vector(height=32, width=64)[2], embed(torch.tensor([[32.0, 64.0]])).reshape(2, 16))
    told = vector(original_size=[100, 200], crop=[3, 4], target_size=[50, 60])
    for row, numbers in zip(told, ([100.0, 200.0], [3.0, 4.0], [50.0, 60.0]), strict=True):
        torch.testing.assert_close(row, embed(torch.tensor([numbers])).reshape(2, 16))
    for knobs, message in (
        ({"aesthetic_score": 6.0}, "aesthetic_score"),
        ({"crop": [1]}, "crop"),
        ({"classes": [1]}, "class"),
    ):
        with pytest.raises(UserError, match=message):
            model.condition([0], **knobs)
    with pytest.raises(UserError, match="original_size"):
        sd2().condition([0], original_size=[1, 1])


def test_absence_of_text():
    """SDXL base was trained with zeros for it, the others with the empty text."""
    base = sdxl().condition([0], prompts=["cat"])["uncond"]
    assert (base["c_crossattn"] == 0).all() and (base["y"][:, :48] == 0).all() and (base["y"][:, 48:] != 0).any()
    model = sdxl()
    said = model.condition([0], negative_prompt="dog")["uncond"]["c_crossattn"]
    torch.testing.assert_close(said, model.condition([0], prompts=["dog"])["c_crossattn"])
    for model in (sd2(), refiner()):
        cond = model.condition([0, 1], prompts=[""])
        torch.testing.assert_close(cond["uncond"]["c_crossattn"], cond["c_crossattn"])
    cond = refiner().condition([0], aesthetic_score=7.0)
    embed = refiner().conditioner.embedders[-1]
    torch.testing.assert_close(cond["y"][:, -16:], embed(torch.tensor([[7.0]])))
    torch.testing.assert_close(cond["uncond"]["y"][:, -16:], embed(torch.tensor([[2.5]])))


def test_long_prompts_have_one_length_on_both_sides():
    cond = sdxl().condition([0], prompts=["cat " * 200], long_prompt=True)
    assert cond["c_crossattn"].shape == cond["uncond"]["c_crossattn"].shape and cond["c_crossattn"].shape[1] > 77
    with pytest.raises(UserError, match="clip_skip"):
        sdxl().condition([0], clip_skip=9)


def test_classes():
    model = mnist()
    cond = model.condition([3, 14])
    table = model.conditioner.embedders[0].embedding.weight
    assert torch.equal(cond["y"], table[[3, 4]]) and (cond["uncond"]["y"] == 0).all()
    assert torch.equal(model.condition([0], classes=[9])["y"], table[[9]])
    for ask in ({"classes": [10]}, {"prompts": ["a"]}):
        with pytest.raises(UserError):
            model.condition([0], **ask)
    never = copy.deepcopy(TREES["sgm/configs/example_training/toy/mnist_cond.yaml"]["model"]["params"])
    never["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 0.0
    assert "uncond" not in mnist(conditioner_config=never["conditioner_config"]).condition([0])


def test_no_condition():
    network = copy.deepcopy(
        TREES["sgm/configs/example_training/toy/mnist_cond.yaml"]["model"]["params"]["network_config"]
    )
    network["params"] = {**NETWORK, "in_channels": 1, "out_channels": 1, "attention_resolutions": []}
    model = mnist(conditioner_config=None, network_config=network)
    assert model.condition([0]) is None and model.get_cond(digits()) is None
    assert model.train().loss(digits())[0].isfinite()
    assert model.eval().sample(seeds=[0], steps=2).shape == (1, 1, 16, 16)
    with pytest.raises(UserError, match="takes no prompt"):
        model.condition([0], prompts=["a"])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd2, sdxl, mnist])
def test_it_trains(make):
    torch.manual_seed(0)
    model, batch = make(use_ema=True), digits() if make is mnist else batch_of()
    loss, logs = model.train().loss(batch)
    loss.backward()
    assert set(logs) == {"loss"} and loss.isfinite()
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == ({"model", "conditioner"} if make is mnist else {"model"})
    assert not model.first_stage_model.training
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and not any(k.startswith("loss_fn") for k in model.state_dict())
    assert model.model_ema.decay == torch.tensor(0.9999)
    assert set(model.loss(batch)[1]) == {"loss"}


def test_the_loss_is_the_configs():
    """By hand: EDM weighting of squared errors of x0."""
    model, batch = mnist(), digits()
    torch.manual_seed(1)
    loss, _ = model.loss(batch)
    torch.manual_seed(1)
    cond = model.conditioner(batch)
    sigma = (-1.2 + 1.2 * torch.randn(4)).exp()
    x = model.get_input(batch)
    noised = x + torch.randn_like(x) * sigma.reshape(-1, 1, 1, 1)
    x0 = model.denoiser(model.model, noised, sigma, cond)
    weight = (sigma**2 + 1) / sigma**2
    torch.testing.assert_close(loss, (weight * ((x0 - x) ** 2).flatten(1).mean(1)).mean())
    with pytest.raises(UserError, match="loss_fn_config is missing"):
        mnist(loss_fn_config=None).loss(batch)
    with pytest.raises(UserError, match="'cls'"):
        model.loss({"jpg": batch["jpg"]})


def test_pictures_of_either_memory_order():
    model, batch = mnist(), digits()
    torch.testing.assert_close(model.get_input({"jpg": batch["jpg"].permute(0, 3, 1, 2)}), model.get_input(batch))
    assert model.get_input(batch).shape == (4, 1, 16, 16)
    assert mnist(input_key="image").get_input({"image": batch["jpg"]}).shape == (4, 1, 16, 16)


def test_the_size_of_the_training_pictures_is_remembered():
    model = mnist()
    with pytest.raises(UserError, match="which size"):
        model.sample(model.condition([0]), seeds=[0], steps=1)
    model.loss(digits())
    saved = {}
    model.on_save_checkpoint(saved)
    fresh = mnist()
    fresh.on_load_checkpoint(saved)
    assert fresh.sample(fresh.condition([0]), seeds=[0], steps=1).shape == (1, 1, 16, 16)
    assert sdxl(image_size=None).image_size is None


def test_pictures_of_training():
    model = sdxl(sampler_config=SAMPLER)
    pictures = model.log_images(batch_of(), N=2, n_rows=2)
    assert set(pictures) == {"inputs", "reconstructions", "txt", "samples", *SIZES}
    assert all(x.shape == (2, 3, 16, 16) and x.abs().max() <= 1 for x in pictures.values())
    assert set(sdxl(log_keys=["txt"]).log_images(batch_of(), 1, sample=False)) == {"inputs", "reconstructions", "txt"}
    assert set(sdxl(no_cond_log=True).log_images(batch_of(), 1, sample=False)) == {"inputs", "reconstructions"}
    plain = model.log_images(batch_of(), 1)["samples"]
    assert torch.equal(plain, model.log_images(batch_of(), 1, ucg_keys=["txt", *SIZES])["samples"])
    assert not torch.equal(plain, model.log_images(batch_of(), 1, ucg_keys=["txt"])["samples"])
    averaged = mnist(use_ema=True)
    with torch.no_grad():
        averaged.model.diffusion_model.out[2].bias.add_(1.0)
    knobs = {"n": 1, "batch": digits()}
    a, b = (averaged.log_images(**knobs, use_ema_scope=u)["samples"] for u in (True, False))
    assert not torch.equal(a, b)


# --- first stage, weights, precision ----------------------------------------------------------------------------------


def test_the_first_stage_in_parts():
    whole, parts = sd2(), sd2(en_and_decode_n_samples_a_time=2)
    sizes = []
    decode = parts.first_stage_model.decode
    parts.first_stage_model.decode = lambda z: sizes.append(len(z)) or decode(z)
    z = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(parts.decode_first_stage(z), whole.decode_first_stage(z))
    assert sizes == [2, 2, 1]
    assert parts.encode_first_stage(torch.rand(5, 3, 16, 16)).shape == (5, 4, 8, 8)


def test_the_scale_of_latents():
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    plain = sd2(scale_factor=1.0).encode_first_stage(x)
    torch.manual_seed(0)
    torch.testing.assert_close(sd2().encode_first_stage(x), 0.18215 * plain)
    model = sd2(scale_factor="auto")
    model.measure_scale([batch_of(8)], 8)
    assert 0 < float(model.scale_factor) != 1.0


def test_autocast_of_the_first_stage():
    x, seen = torch.rand(1, 3, 16, 16), []
    for off in (True, False):
        model = sd2(disable_first_stage_autocast=off)
        model.first_stage_model.encoder.conv_out.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.encode_first_stage(x)
    assert seen == [torch.float32, torch.bfloat16]


def test_weights_from_a_file(tmp_path):
    source = sd2(use_ema=True)
    checkpoint.save_atomic({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    model = sd2(ckpt_path=str(tmp_path / "model.ckpt"))
    assert torch.equal(model.denoiser.sigmas, source.denoiser.sigmas)
    fresh = sd2(use_ema=True)
    file = {k: v for k, v in source.state_dict().items() if not k.startswith("model_ema.")}
    file["model.diffusion_model.out.2.bias"] = torch.full((4,), 7.0)
    checkpoint.load(fresh, file)
    with fresh.ema_scope():
        assert (fresh.model.diffusion_model.out[2].bias == 7).all()
    with pytest.raises(UserError, match="missing"):
        checkpoint.load(fresh, {k: v for k, v in file.items() if "conditioner" not in k})


def test_half_precision_keeps_noise_levels():
    model = sdxl().to(torch.bfloat16)
    assert model.denoiser.sigmas.dtype == torch.float32
    x = model.sample(model.condition([0], prompts=["cat"]), seeds=[0], steps=2, scale=2.0)
    assert x.isfinite().all() and x.dtype == torch.float32
    model = sd2()
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    checkpoint.load(model, half, assign=True)
    assert model.denoiser.sigmas.dtype == torch.float32


def test_nothing_is_left_on_the_cpu():
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            params = copy.deepcopy(TREES["sgm/configs/example_training/toy/mnist_cond.yaml"]["model"]["params"])
            model = DiffusionEngine(**params, image_size=16)
        batch = {k: v.to("cuda") for k, v in digits().items()}
        assert model.train().loss(batch)[0].device.type == "cuda"
        assert model.eval().sample(model.condition([0]), seeds=[0], steps=2).device.type == "cuda"


def test_compiled_in_place():
    model = mnist(compile_model=True)
    assert not any("_orig_mod" in k for k in model.state_dict())
    assert model.model.diffusion_model._compiled_call_impl is not None
