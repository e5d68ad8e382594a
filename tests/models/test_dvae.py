"""DALL-E's discrete VAE."""

import math

import lightning.pytorch as pl
import pytest
import torch

from ldm.models.autoregressive import ImageGPT
from ldm.models.dvae import DVAE
from ldm.modules.likelihoods import LogitLaplace
from ldm.modules.losses import psnr

DD = {"z_channels": 4, "resolution": 16, "in_channels": 1, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
      "attn_resolutions": [], "attn_type": "none"}  # fmt: skip
FALL = {
    "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "max_decay_steps": 10, "lr_start": 1.0, "lr_max": 1.0, "lr_min": 0.0625},
}


def dvae(**options):
    torch.manual_seed(0)
    return DVAE(DD, n_embed=8, embed_dim=4, **options)


def batch(n=4):
    return {"image": torch.rand(n, 16, 16, 1) * 2 - 1}


def test_logit_laplace_is_a_density():
    likelihood = LogitLaplace(eps=0.1).double()
    u = torch.linspace(1e-6, 1 - 1e-6, 400001, dtype=torch.float64)
    x = ((u - 0.1) / 0.8 * 2 - 1)[:, None, None, None]
    for loc, scale in ((0.0, 0.5), (1.3, 0.1), (-2.0, 1.0)):
        out = torch.tensor([loc, math.log(scale)], dtype=torch.float64).view(1, 2, 1, 1).expand(len(u), -1, -1, -1)
        p = likelihood.log_prob(x, out).exp()
        assert float(torch.trapezoid(p, u)) == pytest.approx(1.0, abs=2e-3)
    # pictures come back through the mean, and a scale below a grey level is that of a grey level
    picture = torch.linspace(-1, 1, 7).view(1, 1, 1, 7)
    loc = torch.logit(0.8 * (picture + 1) / 2 + 0.1)
    torch.testing.assert_close(LogitLaplace().mean(torch.cat([loc, loc], 1)), picture, atol=1e-6, rtol=0)
    sharp = [float(LogitLaplace().log_prob(picture, torch.cat([loc, torch.full_like(loc, s)], 1))) for s in (-9, -30)]
    assert sharp[0] == sharp[1]


def test_loss_is_the_elbo_per_number():
    model = dvae(kl_weight=2.0).eval()
    torch.manual_seed(1)
    data = batch()
    loss, logs = model.shared_step(data)
    x = model.get_input(data, "image")
    assert set(logs) == {"loss", "rec", "kl", "temperature", "perplexity", "psnr"}
    torch.testing.assert_close(loss, logs["rec"] + 2.0 * logs["kl"] * 64 / x[0].numel())
    q = torch.distributions.Categorical(logits=model.quantize.proj(model.encode_to_prequant(x)).movedim(1, -1))
    assert q.logits.shape == (4, 8, 8, 8) and logs["kl"] >= 0
    assert model.likelihood.mean(torch.zeros(1, 2, 1, 1)).shape == (1, 1, 1, 1)
    rec, _ = model(x)
    assert rec.shape == x.shape and rec.min() >= -1 and rec.max() <= 1
    assert float(logs["psnr"]) < 20


def test_kl_is_the_distance_from_uniform():
    model, x = dvae().eval(), torch.rand(2, 1, 16, 16)
    logits = model.quantize.proj(model.encode_to_prequant(x)).movedim(1, -1)
    uniform = torch.distributions.Categorical(logits=torch.zeros(2, 8, 8, 8))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform).mean()
    torch.testing.assert_close(model.encode(x)[1], expected, atol=1e-6, rtol=1e-4)


def test_temperature_and_weight_follow_their_schedules(tmp_path):
    model = dvae(temperature_scheduler_config=FALL, kl_weight=3.0, kl_warmup=4, use_ema=True)
    model.learning_rate = 1e-3
    seen = []
    model.on_train_batch_end = lambda *a: seen.append((model.quantize.temperature, model.current_kl_weight()))
    loader = torch.utils.data.DataLoader([{"image": x} for x in batch(20)["image"]], batch_size=2)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=10, default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(model, loader, loader)
    temperatures = [t for t, _ in seen]
    assert temperatures == sorted(temperatures, reverse=True) and temperatures[0] == 1.0 and temperatures[-1] < 0.2
    assert [w for _, w in seen][:5] == [0.75, 1.5, 2.25, 3.0, 3.0]
    assert {"train/rec", "train/temperature", "val/psnr", "val/psnr_ema", "val/codebook_usage"} <= set(
        trainer.callback_metrics
    )
    assert set(model.log_images(batch(2))) == {"inputs", "reconstructions", "reconstructions_ema", "codebook"}


def test_it_is_a_first_stage():
    params = {"ddconfig": DD, "n_embed": 8, "embed_dim": 4}
    stage = {"target": "ldm.models.dvae.DVAE", "params": params}
    model = ImageGPT(stage, {"params": {"n_layer": 1, "n_head": 2, "n_embd": 16}}).eval()
    assert model.grid == (8, 8) and model.image_tokens(batch()).shape == (4, 64)
    x = model.sample(seeds=[0, 1])
    assert x.shape == (2, 1, 16, 16) and x.abs().max() <= 1


def test_psnr_of_known_errors():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([x[0] + 0.2, x[1] - 5.0])  # the second is clipped to -1
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 20 * math.log10(2)]), atol=1e-4, rtol=0)
