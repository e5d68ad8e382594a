"""The methods that downstream code calls: official names, parameters, order, and what they return."""

import inspect

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.distributions import DiagonalGaussianDistribution
from tests.models.test_latent_diffusion import CONDITIONS, IDENTITY, KL, TEXT, VQ, batch_of, tiny

SCHEDULE = "given_betas beta_schedule timesteps linear_start linear_end cosine_s"
LOOP = "x_T verbose callback timesteps quantize_denoised mask x0 img_callback start_T log_every_t"
SHARED = {
    "register_schedule": (SCHEDULE, ""),
    "q_sample": ("x_start t noise", ""),
    "q_mean_variance": ("x_start t", ""),
    "q_posterior": ("x_start x_t t", ""),
    "predict_start_from_noise": ("x_t t noise", ""),
    "get_loss": ("pred target mean", ""),
    "ema_scope": ("context", ""),
    "init_from_ckpt": ("path ignore_keys only_model", ""),
    "shared_step": ("batch", ""),
    "training_step": ("batch batch_idx", ""),
    "validation_step": ("batch batch_idx", ""),
    "configure_optimizers": ("", ""),
}
# class -> method -> (positional parameters in the official order, further official parameters, given by name)
OFFICIAL = {
    DDPM: {
        **SHARED,
        "get_input": ("batch ?", ""),
        "forward": ("x", ""),
        "p_losses": ("x_start t noise", ""),
        "p_mean_variance": ("x t clip_denoised", ""),
        "p_sample": ("x t clip_denoised repeat_noise", ""),
        "p_sample_loop": ("shape return_intermediates", ""),
        "sample": ("? return_intermediates", "batch_size"),
        "log_images": ("batch", "N n_row sample return_keys"),
    },
    LatentDiffusion: {
        **SHARED,
        "get_input": (
            "batch k return_first_stage_outputs force_c_encode cond_key return_original_cond bs", ""
        ),
        "forward": ("x c", ""),
        "apply_model": ("x_noisy t cond return_ids", ""),
        "p_losses": ("x_start cond t noise", ""),
        "get_learned_conditioning": ("c", ""),
        "get_first_stage_encoding": ("encoder_posterior", ""),
        "encode_first_stage": ("x", ""),
        "decode_first_stage": ("z predict_cids force_not_quantize", ""),
        "differentiable_decode_first_stage": ("z predict_cids force_not_quantize", ""),
        "on_train_batch_start": ("batch batch_idx dataloader_idx", ""),
        "p_mean_variance": (
            "x c t clip_denoised", "quantize_denoised return_x0 score_corrector corrector_kwargs"
        ),
        "p_sample": (
            "x c t clip_denoised repeat_noise",
            "quantize_denoised return_x0 temperature noise_dropout score_corrector corrector_kwargs",
        ),
        "p_sample_loop": (f"cond shape return_intermediates {LOOP}", ""),
        "progressive_denoising": (
            "cond shape verbose callback quantize_denoised img_callback mask x0 temperature noise_dropout "
            "score_corrector corrector_kwargs batch_size x_T start_T log_every_t", ""
        ),
        "sample": (
            "cond batch_size return_intermediates x_T verbose timesteps quantize_denoised mask x0 shape", ""
        ),
        "sample_log": ("cond batch_size ddim ddim_steps", "eta"),
        "log_images": (
            "batch",
            "N n_row sample ddim_steps ddim_eta return_keys quantize_denoised inpaint plot_denoise_rows "
            "plot_progressive_rows plot_diffusion_rows",
        ),
        "_prior_bpd": ("x_start", ""),
        "_predict_eps_from_xstart": ("x_t t pred_xstart", ""),
    },
    AutoencoderKL: {
        "encode": ("x", ""),
        "decode": ("z", ""),
        "forward": ("input sample_posterior", ""),
        "get_input": ("batch ?", ""),
        "get_last_layer": ("", ""),
        "log_images": ("batch", "only_inputs"),
        "to_rgb": ("x", ""),
        "init_from_ckpt": ("path ignore_keys", ""),
    },
    VQModel: {
        "encode": ("x", ""),
        "encode_to_prequant": ("x", ""),
        "decode": ("quant", ""),
        "decode_code": ("code_b", ""),
        "forward": ("input return_pred_indices", ""),
        "get_input": ("batch ?", ""),
        "get_last_layer": ("", ""),
        "ema_scope": ("context", ""),
        "log_images": ("batch", "only_inputs plot_ema"),
        "to_rgb": ("x", ""),
        "init_from_ckpt": ("path ignore_keys", ""),
    },
    VQModelInterface: {"encode": ("x", ""), "decode": ("h force_not_quantize", "")},
}  # fmt: skip
CALLS = [(cls, name) for cls, methods in OFFICIAL.items() for name in methods]


@pytest.mark.parametrize(("cls", "name"), CALLS, ids=lambda v: getattr(v, "__name__", v))
def test_official_calls_bind(cls, name):
    """Positional parameters stand in the official order; `?` has another name here."""
    positional, named = (words.split() for words in OFFICIAL[cls][name])
    signature = inspect.signature(getattr(cls, name))
    signature.bind(None, *positional, **dict.fromkeys(named))
    own = [p for p in list(signature.parameters)[1 : len(positional) + 1] if p not in ("args", "kwargs")]
    assert [a for a, b in zip(own, positional, strict=True) if b not in ("?", a)] == []


def test_what_get_input_returns():
    model, batch = tiny(**TEXT), batch_of(3)
    z, c = model.get_input(batch, "image")
    assert z.shape == (3, 4, 8, 8) and c.shape == (3, 77, 32)
    full = model.get_input(batch, "image", return_first_stage_outputs=True, return_original_cond=True, bs=2)
    z, c, x, reconstruction, xc = full
    assert z.shape == (2, 4, 8, 8) and x.shape == reconstruction.shape == (2, 3, 16, 16)
    assert torch.equal(x, batch["image"][:2].permute(0, 3, 1, 2)) and xc == batch["caption"][:2]
    assert len(model.get_input(batch, "image", return_original_cond=True)) == 3
    raw, other = model.get_input({**batch, "text": ["a"] * 3}, "image", cond_key="text"), ["a"] * 3
    torch.testing.assert_close(raw[1], model.get_learned_conditioning(other))


def test_a_trainable_condition_is_embedded_in_forward():
    model, batch = tiny(cond_stage_trainable=True), batch_of(3)
    _, c = model.get_input(batch, "image")
    assert torch.equal(c["class_label"], batch["class_label"])
    _, encoded = model.get_input(batch, "image", force_c_encode=True)
    torch.testing.assert_close(encoded, model.get_learned_conditioning(c))
    loss, logs = model.shared_step(batch)
    assert loss.ndim == 0 and set(logs) == {"val/loss_simple", "val/loss_vlb", "val/loss"}
    assert set(model.train().shared_step(batch)[1]) == {"train/loss_simple", "train/loss_vlb", "train/loss"}
    z = model.get_input(batch, "image")[0]
    assert model(z, c)[0].ndim == 0
    loss, logs = model.p_losses(z, encoded, torch.tensor([1, 5, 9]), noise=torch.zeros_like(z))
    torch.testing.assert_close(logs["train/loss"], loss)


def test_what_the_first_stage_returns():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    model = tiny(first_stage_config=KL, scale_factor=0.5)
    posterior = model.encode_first_stage(x)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    torch.manual_seed(0)
    z = model.get_first_stage_encoding(posterior)
    torch.manual_seed(0)
    torch.testing.assert_close(z, 0.5 * posterior.sample())
    torch.testing.assert_close(model.decode_first_stage(z), model.first_stage_model.decode(z / 0.5))
    z = z.requires_grad_()
    assert not model.decode_first_stage(z).requires_grad and model.differentiable_decode_first_stage(z).requires_grad
    vq = tiny(first_stage_config=VQ, scale_factor=0.5)
    h = vq.encode_first_stage(x)
    assert h.shape == (2, 4, 8, 8)
    torch.testing.assert_close(vq.get_first_stage_encoding(h), 0.5 * h)


def test_what_autoencoders_return():
    from ldm.util import instantiate_from_config

    x, batch = torch.rand(2, 3, 16, 16) * 2 - 1, batch_of(2)
    kl = instantiate_from_config(KL).eval()
    reconstruction, posterior = kl(x, sample_posterior=False)
    torch.testing.assert_close(reconstruction, kl.decode(kl.encode(x).mode()))
    assert posterior.mean.shape == (2, 4, 8, 8) and kl.get_last_layer() is kl.decoder.conv_out.weight
    assert set(kl.log_images(batch, only_inputs=True)) == {"inputs"}
    assert set(kl.log_images(batch)) == {"inputs", "reconstructions", "samples"}
    config = {"target": "ldm.models.autoencoder.VQModel", "params": {**VQ["params"], "lossconfig": IDENTITY}}
    vq = instantiate_from_config(config).eval()
    quant, loss, (_, _, indices) = vq.encode(x)
    assert quant.shape == (2, 4, 8, 8) and loss.ndim == 0 and indices.numel() == 128
    reconstruction, loss, indices = vq(x, return_pred_indices=True)
    torch.testing.assert_close(reconstruction, vq.decode(quant))
    torch.testing.assert_close(vq.decode_code(indices.reshape(2, 64)), reconstruction)
    assert len(vq(x)) == 2 and {"inputs", "reconstructions"} <= set(vq.log_images(batch, plot_ema=False))


def test_a_map_is_shown_as_the_official_code_shows_it():
    """`original_conditioning` of a map with more than three channels, `conditioning` of what can be a picture."""
    config = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": {"in_channels": 7, "out_channels": 2,
                                                                                   "n_stages": 1}}  # fmt: skip
    model = tiny(**{**CONDITIONS["concat"], "cond_stage_key": "segmentation", "cond_stage_config": config})
    batch = {**batch_of(2), "segmentation": torch.rand(2, 16, 16, 7)}
    shown = model.log_images(batch, 2, sample=False)
    assert shown["original_conditioning"].shape == (2, 3, 16, 16) and "conditioning" not in shown


def test_init_from_ckpt(tmp_path):
    other = tiny(seed=3, use_ema=True)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "a.ckpt")
    model = tiny(use_ema=True)
    model.init_from_ckpt(str(tmp_path / "a.ckpt"), ignore_keys=["first_stage_model.encoder"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) == (not key.startswith("first_stage_model.encoder")), key
    network = tiny(use_ema=True)
    network.init_from_ckpt(str(tmp_path / "a.ckpt"), only_model=True)
    for key, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim > 1 and not key.startswith("model_ema."):
            assert torch.equal(value, other.state_dict()[key]) == key.startswith("model."), key


def test_the_logger_draws_what_the_sampling_script_draws():
    """The same seeds, classes and steps give the same pictures."""
    model, batch = tiny(cond_dropout=0.1, use_ema=True), batch_of(3)
    logged = model.log_images(batch, 3, ddim_steps=3, return_keys=["samples"])["samples"]
    cond = model.condition([0, 1, 2], classes=batch["class_label"].tolist())
    with model.ema_scope():
        drawn = model.sample(cond, seeds=[0, 1, 2], steps=3)
    torch.testing.assert_close(logged, drawn)
