"""DDPM: official numbers, parametrisations, class conditions, sampling by seed, EMA, devices."""

import lightning.pytorch as pl
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from ldm import checkpoint
from ldm.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper
from ldm.util import UserError, get_obj_from_str, instantiate_from_config
from tests.reference import FIXTURES, compare, filler

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_heads": 2,
    },
}
CLASSES = {"cond_stage_key": "class_label", "num_classes": 10, "cond_dropout": 0.2}


def tiny(seed=0, **options):
    """A DDPM on 8x8 pictures with 20 steps, no weight of which is zero."""
    options = {"timesteps": 20, "image_size": 8, "linear_start": 0.01, "linear_end": 0.3, "use_ema": False, **options}
    return filler.fill(DDPM(UNET, **options), seed).eval()


def batch_of(n=4, device=None):
    return {"image": torch.rand(n, 8, 8, 3, device=device) * 2 - 1, "class_label": torch.arange(n, device=device) % 10}


def with_new_average(model):
    """The model with an average of the weights that it has now."""
    model.restart_ema()
    return model


# --- official numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("ddpm_schedule_*.json")), ids=lambda p: p.stem)
def test_schedule_buffers(path):
    fx = compare.load(path)
    model = instantiate_from_config({"target": fx["target"], "params": fx["params"]})
    compare.check_keys(model, fx)
    assert compare.check(fx, {name: getattr(model, name) for name in fx["outputs"]}) == []


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_official_numbers(parameterization):
    fx = compare.load(FIXTURES / "ddpm_pixel.json")
    x, out, p = compare.inputs(fx), {}, parameterization
    for loss_type in ("l1", "l2"):
        model = DDPM(**fx["params"], parameterization=p, loss_type=loss_type)
        compare.check_keys(model, fx)
        filler.fill(model, fx["seed"]).eval()
        with torch.no_grad():
            loss, logs = model.p_losses(x["x_start"], x["t"], x["noise"])
        out |= {f"{p}.{loss_type}.loss": loss, **{f"{p}.{loss_type}.{k}": v for k, v in logs.items()}}
    with torch.no_grad():
        moments = model.p_mean_variance(x["x_t"], x["t"], clip_denoised=True)
        out |= dict(zip((f"{p}.p_mean", f"{p}.p_var", f"{p}.p_logvar"), moments, strict=True))
        out[f"{p}.p_mean_noclip"] = model.p_mean_variance(x["x_t"], x["t"], clip_denoised=False)[0]
    with compare.fixed_noise(70):
        out[f"{p}.p_sample"] = model.p_sample(x["x_t"], x["t"])
    with compare.fixed_noise(70):
        out[f"{p}.p_sample_repeat_noise"] = model.p_sample(x["x_t"], x["t"], repeat_noise=True)
    with compare.fixed_noise(70):
        out[f"{p}.sample_loop"], states = model.sample(2, return_intermediates=True)
    out[f"{p}.sample_loop_intermediates"] = torch.stack(states)
    assert set(out) == {k for k in fx["outputs"] if k.startswith(f"{p}.")}
    assert compare.check(fx, out) == []


def test_official_numbers_of_the_forward_process():
    fx = compare.load(FIXTURES / "ddpm_pixel.json")
    model, x, out = DDPM(**fx["params"]), compare.inputs(fx), {}
    out |= zip(("q_mean", "q_var", "q_logvar"), model.q_mean_variance(x["x_start"], x["t"]), strict=True)
    posterior = model.q_posterior(x["x_start"], x["x_t"], x["t"])
    out |= zip(("q_post_mean", "q_post_var", "q_post_logvar"), posterior, strict=True)
    out["q_sample"] = model.q_sample(x["x_start"], x["t"], x["noise"])
    out["x0_from_noise"] = model.predict_start_from_noise(x["x_t"], x["t"], x["noise"])
    assert compare.check(fx, out) == []


def test_official_names_are_real():
    for name in ("DDPM", "LatentDiffusion", "Layout2ImgDiffusion", "DiffusionWrapper"):
        assert get_obj_from_str(f"ldm.models.diffusion.ddpm.{name}").__name__ == name


def test_state_dict_has_official_keys_only():
    keys = set(tiny(use_ema=True).state_dict())
    assert "lvlb_weights" not in keys and "logvar" not in keys
    assert {"betas", "model.diffusion_model.time_embed.0.weight", "model_ema.decay"} <= keys
    assert "model_ema.diffusion_modeltime_embed0weight" in keys
    assert "logvar" in set(tiny(learn_logvar=True).state_dict())


# --- parametrisations and losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "flow"])
def test_the_target_is_what_recovers_the_picture(parameterization):
    model = tiny(parameterization=parameterization)
    x, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([2, 7, 12])
    t = t / 20 if parameterization == "flow" else t
    model.apply_model = lambda x_t, t, cond=None: model.denoiser.target(x, noise, t)
    loss, logs = model.p_losses(x, t, noise)
    assert loss < 1e-10
    assert ("val/loss_vlb" in logs) == (parameterization != "flow")
    torch.testing.assert_close(model.denoiser(model.q_sample(x, t, noise), t), x, atol=1e-4, rtol=1e-4)


def test_min_snr_weights_the_optimised_loss_only():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 15])
    noise = torch.randn(2, 3, 8, 8)
    plain, logs = tiny().p_losses(x, t, noise)
    model = tiny(loss_weight="min_snr", min_snr_gamma=0.5)
    weighted, weighted_logs = model.p_losses(x, t, noise)
    snr = model.alphas_cumprod / (1 - model.alphas_cumprod)
    error = ((model.apply_model(model.q_sample(x, t, noise), t) - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted, ((snr.clamp(max=0.5) / snr)[t] * error).mean())
    torch.testing.assert_close(weighted_logs["val/loss_simple"], logs["val/loss_simple"])
    assert weighted < plain


def test_offset_noise_is_constant_over_a_channel():
    torch.manual_seed(0)
    noise = tiny(offset_noise=2.0).training_noise(torch.zeros(400, 3, 8, 8))
    assert abs(float(noise.mean(dim=(2, 3)).std()) - (4 + 1 / 64) ** 0.5) < 0.1


def test_zero_terminal_snr():
    model = tiny(zero_terminal_snr=True, parameterization="v")
    assert model.alphas_cumprod[-1].abs() < 1e-12
    loss, logs = model.p_losses(torch.randn(2, 3, 8, 8), torch.tensor([0, 19]))
    assert loss.isfinite() and logs["val/loss_vlb"].isfinite()
    assert model.sample(seeds=[1], steps=4).isfinite().all()
    with pytest.raises(UserError, match="x0 or v"):
        tiny(zero_terminal_snr=True)


def test_learned_logvar_is_trained():
    model = tiny(learn_logvar=True, logvar_init=0.3)
    assert any(p is model.logvar for p in model.trained_parameters())
    loss, logs = model.loss(batch_of())
    loss.backward()
    assert model.logvar.grad.abs().sum() > 0 and set(logs) >= {"loss_gamma", "logvar"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameterization": "epsilon"}, "expected one of eps"),
        ({"loss_type": "l3"}, "loss_type"),
        ({"loss_weight": "min_snrr"}, "did you mean min_snr"),
        ({"use_positional_encodings": True}, "compute_latent_shifts"),
        ({"parameterization": "flow", "learn_logvar": True}, "flow"),
        ({"cond_dropout": 1.0}, "cond_dropout"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_wrapper_feeds_conditions_by_key():
    seen = {}

    class Net(torch.nn.Module):
        def forward(self, x, t, context=None, y=None):
            seen.update(x=x, context=context, y=y)
            return x

    wrapper = DiffusionWrapper({"target": "torch.nn.Identity"}, "hybrid")
    wrapper.diffusion_model = Net()
    x, t, c = torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.ones(2, 5, 8)
    wrapper(x, t, c_concat=[torch.ones(2, 1, 4, 4), torch.ones(2, 2, 4, 4)], c_crossattn=[c, c])
    assert seen["x"].shape == (2, 6, 4, 4) and seen["context"].shape == (2, 10, 8)
    with pytest.raises(ValueError, match="got no c_concat"):
        wrapper(x, t, c_crossattn=c)
    with pytest.raises(ValueError, match="conditioning_key"):
        DiffusionWrapper({"target": "torch.nn.Identity"}, "cross")


# --- classes ----------------------------------------------------------------------------------------------------------


def test_the_null_class_is_one_more():
    model = tiny(**CLASSES)
    assert model.model.diffusion_model.num_classes == 11 and model.null_class == 10
    same = DDPM(
        {**UNET, "params": {**UNET["params"], "num_classes": 11}}, cond_stage_key="class_label", cond_dropout=0.1
    )
    assert same.num_classes == 10 and same.null_class == 10
    assert tiny(cond_stage_key="class_label", num_classes=10).null_class is None
    with pytest.raises(UserError, match="got 10, expected 11"):
        DDPM({**UNET, "params": {**UNET["params"], "num_classes": 10}}, **CLASSES)


def test_labels_are_dropped_in_training_only():
    torch.manual_seed(0)
    model, batch = tiny(**CLASSES), {"class_label": torch.arange(2000) % 10}
    assert (model.get_cond(batch)["y"] == batch["class_label"]).all()
    dropped = model.train().get_cond(batch)["y"]
    assert abs(float((dropped == 10).float().mean()) - 0.2) < 0.03
    assert ((dropped == 10) | (dropped == batch["class_label"])).all()


def test_condition_of_classes():
    model = tiny(**CLASSES)
    cond = model.condition([3, 14])
    assert cond["y"].tolist() == [3, 4] and cond["uncond"]["y"].tolist() == [10, 10]
    assert model.condition([0, 1], classes=[7])["y"].tolist() == [7, 7]
    for options in ({"classes": [10]}, {"prompts": ["a"]}, {"classes": [1, 2, 3]}):
        with pytest.raises(UserError):
            model.condition([0, 1], **options)
    with pytest.raises(UserError, match="without conditions"):
        tiny().condition([0], classes=[1])
    assert tiny().condition([0]) is None


def test_a_label_out_of_range_is_named_before_it_reaches_the_device():
    model = tiny(**CLASSES)
    model.on_before_batch_transfer(batch_of(), 0)
    with pytest.raises(UserError, match="label 10 .* 10 classes"):
        model.on_before_batch_transfer({"class_label": torch.tensor([1, 10])}, 0)


def test_guidance():
    model = tiny(**CLASSES)
    cond, knobs = model.condition([0], classes=[3]), {"seeds": [0], "steps": 1, "grid": "linspace"}
    model.clip_denoised = False
    x0 = {}

    def keep(name):
        def callback(i, t, x, guess):
            x0[name] = guess

        return callback

    model.sample({"y": cond["y"]}, **knobs, callback=keep("cond"))
    model.sample(cond["uncond"], **knobs, callback=keep("uncond"))
    model.sample(cond, scale=3.0, **knobs, callback=keep("guided"))
    model.sample(cond, **knobs, callback=keep("one"))
    torch.testing.assert_close(x0["guided"], x0["uncond"] + 3 * (x0["cond"] - x0["uncond"]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x0["one"], x0["cond"])
    with pytest.raises(UserError, match="cond_dropout"):
        model.sample({"y": cond["y"]}, scale=3.0, **knobs)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_depends_on_its_seed_alone(name):
    model = tiny(**CLASSES)
    knobs = {"sampler": name, "steps": 3, "scale": 2.0}
    together = model.sample(model.condition([5, 6, 7]), seeds=[5, 6, 7], **knobs)
    alone = model.sample(model.condition([6]), seeds=[6], **knobs)
    assert together.shape == (3, 3, 8, 8) and together.abs().max() <= 1
    assert (together[1] - alone[0]).abs().max() <= 2 / 255  # 1/255 of the range [-1, 1]
    assert torch.equal(alone, model.sample(model.condition([6]), seeds=[6], **knobs))
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 7, 20, 33])
def test_steps_are_exact(steps):
    model, calls = tiny(), []
    model.sample(seeds=[0], steps=steps, callback=lambda i, t, x, x0: calls.append((i, float(x0.abs().max()))))
    assert [i for i, _ in calls] == list(range(steps))
    assert max(limit for _, limit in calls) <= 1  # x0 is clipped in pixel space


def test_all_steps_of_ddpm_are_the_official_loop():
    model = tiny()
    x = torch.randn(2, 3, 8, 8)
    by_name = model.generate(None, [0, 1], (8, 8), 20, "ddim", noise=x)
    loop = x
    for i in reversed(range(20)):  # DDIM with eta 0 on every index, written out
        t = torch.full((2,), i)
        x0 = model.predict_start(loop, t, model.apply_model(loop, t)).clamp(-1, 1)
        eps = (loop - model.sqrt_alphas_cumprod[i] * x0) / model.sqrt_one_minus_alphas_cumprod[i]
        abar = model.alphas_cumprod_prev[i]
        loop = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    torch.testing.assert_close(by_name, loop, atol=1e-4, rtol=1e-4)


def test_flow_samples_and_trains():
    model = tiny(parameterization="flow", **CLASSES)
    loss, logs = model.loss(batch_of())
    assert loss.isfinite() and set(logs) == {"loss_simple", "loss"}
    assert model.sample(model.condition([1]), seeds=[1], steps=4, sampler="heun", scale=2.0).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="seeds"):
        model.sample(2)


def test_logit_normal_times():
    x = torch.zeros(4000, 3, 8, 8)
    torch.manual_seed(0)
    even, normal = (tiny(parameterization="flow", logit_normal_times=v).draw_times(x) for v in (False, True))
    assert all(t.min() > 0 and t.max() < 1 for t in (even, normal))
    share = (normal - 0.5).abs() < (torch.tensor(1.0).sigmoid() - 0.5)  # within one standard deviation of N(0, 1)
    assert abs(float(share.float().mean()) - 0.683) < 0.03
    assert abs(float(((even - 0.5).abs() < 0.25).float().mean()) - 0.5) < 0.03


def test_known_pixels_are_kept():
    model, x0 = tiny(), torch.rand(2, 3, 8, 8) * 2 - 1
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    x = model.sample(seeds=[0, 1], steps=5, mask=mask, x0=x0)
    torch.testing.assert_close(x[..., :4], x0[..., :4])
    assert (x[..., 4:] - x0[..., 4:]).abs().max() > 0.1
    assert torch.equal(model.sample(seeds=[0, 1], x0=x0, strength=0.0), x0)
    with pytest.raises(UserError, match="need x0"):
        model.sample(seeds=[0], strength=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "dim"}, "did you mean ddim"),
        ({"grid": "zigzag"}, "zigzag"),
        ({"steps": 0}, "0"),
        ({"sampler": "heun", "eta": 0.5}, "no eta"),
    ],
)
def test_sampling_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        tiny().sample(seeds=[0], **options)


def test_the_official_call_takes_a_condition_too():
    model = tiny(**CLASSES)
    assert model.sample(model.condition([0, 1]), batch_size=2).shape == (2, 3, 8, 8)


def test_height_and_width():
    assert tiny().sample(seeds=[0], steps=1, height=12, width=16).shape == (1, 3, 12, 16)


def test_log_images():
    model = tiny(use_ema=True, **CLASSES)
    batch = batch_of(5)
    pictures = model.log_images(batch, 4, ddim_steps=3)
    assert set(pictures) == {"inputs", "conditioning", "diffusion_row", "samples", "denoise_row"}
    for name, x in pictures.items():
        assert x.ndim == 4 and x.shape[1] == 3 and x.abs().max() <= 1, name
        assert len(x) == (1 if name.endswith("row") else 4)
    assert set(model.log_images(batch, N=2, split="val", sample=False, return_keys=["inputs"])) == {"inputs"}


# --- training, weights, precision -------------------------------------------------------------------------------------


def fit(model, tmp_path, **options):
    data = [{k: v[i] for k, v in batch_of(8).items()} for i in range(8)]
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    return trainer


def test_training_logs_and_the_average(tmp_path):
    scheduler = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]},
    }
    model = with_new_average(tiny(use_ema=True, scheduler_config=scheduler, **CLASSES))
    before = model.model.diffusion_model.out[2].weight.clone()
    trainer = fit(model, tmp_path)
    names = {f"{split}/{k}" for split in ("train", "val") for k in ("loss", "loss_simple", "loss_vlb")}
    names |= {f"val/{k}_ema" for k in ("loss", "loss_simple", "loss_vlb")} | {"global_step", "lr_abs"}
    assert names <= set(trainer.callback_metrics)
    assert model.model_ema.num_updates == 3
    assert not torch.equal(model.model.diffusion_model.out[2].weight, before)


def test_validation_restores_the_raw_weights():
    model = with_new_average(tiny(use_ema=True))
    for p in model.model.parameters():
        p.data.mul_(1.5)
    before = [p.clone() for p in model.parameters()]
    raw = model.sample(seeds=[0], steps=2)
    with model.ema_scope("test"):
        assert not torch.equal(model.sample(seeds=[0], steps=2), raw)
        assert not torch.equal(next(iter(model.model.parameters())), before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_file_without_average_restarts_it(tmp_path):
    source, path = tiny(seed=1), tmp_path / "raw.ckpt"
    torch.save({"state_dict": source.state_dict()}, path)
    model = DDPM(UNET, timesteps=20, ckpt_path=str(path))
    assert torch.equal(model.model_ema.diffusion_modelout2weight, source.model.diffusion_model.out[2].weight)
    only = DDPM(UNET, timesteps=30, ckpt_path=str(path), load_only_unet=True, use_ema=False)
    assert torch.equal(only.model.diffusion_model.out[2].weight, source.model.diffusion_model.out[2].weight)
    assert len(only.betas) == 30


def test_the_path_follows_the_schedule_of_a_file():
    source, model = tiny(linear_end=0.2), tiny(linear_end=0.3)
    checkpoint.load(model, source.state_dict())
    t = torch.arange(20)
    torch.testing.assert_close(model.path.alpha(t), source.sqrt_alphas_cumprod, atol=1e-5, rtol=1e-5)


def test_tables_stay_in_full_precision():
    model = tiny(learn_logvar=True).to(torch.bfloat16)
    assert model.betas.dtype == model.lvlb_weights.dtype == torch.float32
    assert next(model.model.parameters()).dtype == torch.bfloat16
    reference = tiny().sample(seeds=[0], steps=3)
    assert (model.sample(seeds=[0], steps=3) - reference).abs().mean() < 0.05
    assert model.loss(batch_of())[0].isfinite()


def test_a_file_in_half_precision_leaves_the_tables_alone():
    model = tiny()
    checkpoint.load(model, {k: v.half() for k, v in tiny(seed=1).state_dict().items()}, assign=True)
    assert next(model.model.parameters()).dtype == torch.float16
    assert torch.equal(model.alphas_cumprod, tiny().alphas_cumprod)
    assert torch.equal(model.path.alpha(torch.arange(20)), tiny().path.alpha(torch.arange(20)))


def test_mixed_precision_trains(tmp_path):
    fit(tiny(**CLASSES), tmp_path, precision="bf16-mixed")


@pytest.mark.parametrize(
    "parameterization, samplers",
    [("eps", ["ddim"]), ("v", list(SAMPLERS)), ("flow", ["heun"])],
    ids=["eps", "v", "flow"],
)
def test_nothing_is_left_on_the_cpu(parameterization, samplers):
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = DDPM(UNET, timesteps=20, image_size=8, parameterization=parameterization, offset_noise=0.1,
                         loss_weight="min_snr", **CLASSES)  # fmt: skip
        loss, logs = model.loss(batch_of(2, device="cuda"))
        assert {v.device.type for v in (loss, *logs.values())} == {"cuda"}
        for name in samplers:
            x = model.sample(model.condition([1, 2]), seeds=[1, 2], steps=2, sampler=name, scale=2.0)
            assert x.device.type == "cuda"
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}


def test_a_training_step_never_waits_for_the_device():
    """FakeTensorMode refuses to read a value: a sync in `loss` would raise."""
    with FakeTensorMode():
        model = DDPM(UNET, timesteps=20, **CLASSES).train()
        loss, _ = model.loss(batch_of(2))
        loss.backward()
