"""AutoencoderKL and VQModel: official numbers, keys and return values; training; faults."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from ldm import util
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config
from tests.reference import compare, filler

REFERENCE = Path(__file__).parents[1] / "reference"
FIXTURES = REFERENCE / "fixtures"
CONFIGS = json.loads((REFERENCE / "official_configs.json").read_text())

DD = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "attn_type": "none",
}
KL_LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 2, "perceptual_loss": "pixel_gradient", "disc_num_layers": 1, "disc_ndf": 8},
}
VQ_LOSS = {**KL_LOSS, "target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
NO_LOSS = {"target": "torch.nn.Identity"}


def kl(**params):
    return AutoencoderKL(**{"ddconfig": DD, "lossconfig": KL_LOSS, "embed_dim": 4, **params})


def vq(cls=VQModel, **params):
    dd = {**DD, "double_z": False}
    return cls(**{"ddconfig": dd, "lossconfig": VQ_LOSS, "embed_dim": 4, "n_embed": 32, **params})


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return {"image": torch.rand(1, 1, 3, generator=g).expand(16, 16, 3) * 2 - 1, "class_label": i}


def batch(n=2):
    return next(iter(DataLoader(Pictures(), batch_size=n)))


def trainer(tmp_path, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **{**quiet, **kwargs})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- official numbers -------------------------------------------------------------------------------------------------

KL_FIXTURES = sorted(p.stem for p in FIXTURES.glob("autoencoder_kl_*.json"))
VQ_FIXTURES = sorted(p.stem for p in FIXTURES.glob("vqmodel*.json"))
KEY_FIXTURES = sorted(
    p.stem for pattern in ("keys_first_stage_*", "keys_config_autoencoder_*") for p in FIXTURES.glob(f"{pattern}.json")
)


def filled(name):
    fx = compare.load(FIXTURES / f"{name}.json")
    model = instantiate_from_config({"target": fx["target"], "params": fx["params"]})
    compare.check_keys(model, fx)
    filler.fill(model, fx["seed"], fx.get("fill_rules", ()))
    return model.eval(), compare.inputs(fx), fx


def check_norms(model, fx):
    modules = dict(model.named_modules())
    for name, (kind, *values) in fx["norms"].items():
        m = modules[name]
        got = [m.p] if kind == "Dropout" else [m.eps, *([m.num_groups] if kind == "GroupNorm" else [])]
        assert [type(m).__name__, *got] == [kind, *values], name


@pytest.mark.parametrize("name", KL_FIXTURES)
@torch.no_grad()
def test_autoencoder_kl_is_the_official_one(name):
    model, x, fx = filled(name)
    check_norms(model, fx)
    posterior = model.encode(x["x"])
    outs = {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "nll": posterior.nll(x["z"]),
        "mode": posterior.mode(),
        "decode": model.decode(x["z"]),
        "forward_mode": model(x["x"], sample_posterior=False)[0],
    }
    with compare.fixed_noise(fx["seed"]):
        outs["sample"] = posterior.sample()
    with compare.fixed_noise(fx["seed"]):
        outs["forward_sample"] = model(x["x"])[0]
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


@pytest.mark.parametrize("name", VQ_FIXTURES)
@torch.no_grad()
def test_vqmodel_is_the_official_one(name):
    model, x, fx = filled(name)
    check_norms(model, fx)
    quant, emb_loss, (_, _, indices) = model.encode(x["x"])
    rec, diff = model(x["x"])
    outs = {"quant": quant, "emb_loss": emb_loss, "indices": indices, "rec": rec, "diff": diff}
    outs |= {"decode": model.decode(x["z"]), "prequant": model.encode_to_prequant(x["x"])}
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


@pytest.mark.parametrize("name", KEY_FIXTURES)
def test_official_configs_build_with_the_official_keys(name):
    fx = compare.load(FIXTURES / f"{name}.json")
    with torch.device("meta"):
        model = instantiate_from_config(CONFIGS[fx["config"]]["model"])
    compare.check_keys(model, fx)
    check_norms(model, fx)
    state = model.state_dict()
    assert {k: str(v.dtype)[6:] for k, v in state.items() if v.dtype != torch.float32} == fx["dtypes"]
    assert sum(p.numel() for p in model.parameters()) == fx["n_params"]
    assert model.monitor == "val/rec_loss" if "monitor" in CONFIGS[fx["config"]]["model"]["params"] else True


def test_official_training_steps():
    """By hand, as the fixture was made: both losses, both optimisers, two steps."""
    model, x, fx = filled("training_steps_autoencoder_kl")
    model.train()
    model.learning_rate = 1e-3
    optimizers, _ = model.configure_optimizers()
    outs, values = {}, []
    with compare.fixed_noise(102):
        for step in (0, 1):
            for index, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                rec, posterior = model(x[f"x{step}"])
                value, logs = model.loss(
                    x[f"x{step}"], rec, posterior, index, step, last_layer=model.get_last_layer(), split="train"
                )
                value.backward()
                optimizer.step()
                values.append(float(value))
                outs |= {f"{step}.{index}.{k}": v for k, v in logs.items()}
    outs["losses"] = torch.tensor(values)
    outs |= {k: model.state_dict()[k.removeprefix("param:")] for k in fx["outputs"] if k.startswith("param:")}
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


# --- return values ----------------------------------------------------------------------------------------------------


def test_vqmodel_interface():
    model = vq(VQModelInterface, sane_index_shape=True).eval()
    x = batch()["image"].permute(0, 3, 1, 2)
    h = model.encode(x)
    assert torch.equal(h, model.encode_to_prequant(x))
    quant, _, (_, _, indices) = model.quantize(h)
    plain = super(VQModelInterface, model)
    assert torch.equal(model.decode(h), plain.decode(quant))
    assert torch.equal(model.decode(h, force_not_quantize=True), plain.decode(h))
    assert not torch.allclose(model.decode(h), model.decode(h, force_not_quantize=True))
    like = vq(sane_index_shape=True).eval()
    like.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model(x, True), like(x, True), strict=True))


def test_vqmodel_interface_trains_as_vqmodel(tmp_path):
    weights = []
    for cls in (VQModel, VQModelInterface):
        torch.manual_seed(0)
        model = vq(cls)
        trainer(tmp_path / cls.__name__, max_steps=2).fit(model, DataLoader(Pictures(), batch_size=2))
        weights.append(model.state_dict())
        assert set(model.log_images(batch())) >= {"reconstructions", "codebook"}
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_decoding_codes():
    model = vq(sane_index_shape=True).eval()
    x = batch()["image"].permute(0, 3, 1, 2)
    quant, _, (_, _, indices) = model.encode(x)
    expected = model.decode(quant)
    assert torch.allclose(model.decode_code(indices), expected, atol=1e-5)
    assert torch.allclose(model.decode_code(indices.flatten(1)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="got 63 indices"):
        model.decode_code(indices.flatten(1)[:, :63])
    reconstructions, diff, again = model(x, return_pred_indices=True)
    assert torch.equal(again, indices) and diff.ndim == 0


def test_identity_first_stage():
    x = torch.randn(1, 3, 4, 4)
    plain, quantised = IdentityFirstStage(), IdentityFirstStage(vq_interface=True)
    assert all(
        v is x for v in (plain.encode(x), plain.decode(x), plain(x), plain.quantize(x), quantised.quantize(x)[0])
    )


def test_segmentation_maps_are_shown_in_colours():
    model = kl(colorize_nlabels=5)
    assert model.colorize.shape == (3, 5, 1, 1)
    shown = model.to_rgb(torch.rand(2, 5, 8, 8))
    assert shown.shape == (2, 3, 8, 8) and float(shown.min()) == -1 and float(shown.max()) == 1


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kl, vq])
def test_training_logs_what_the_official_code_logs(make, tmp_path):
    model, t = make(), trainer(tmp_path, max_epochs=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    t.fit(model, DataLoader(Pictures(), batch_size=2), DataLoader(Pictures(), batch_size=2))
    assert t.global_step == model.updates == 4
    names = {"total_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss", "disc_loss"}
    names |= {"logits_real", "logits_fake"}
    names |= {"logvar", "kl_loss"} if make is kl else {"quant_loss", "p_loss", "perplexity", "cluster_usage"}
    expected = {f"{split}/{n}" for split in ("train", "val") for n in names} | {"aeloss", "discloss"}
    assert expected <= set(t.callback_metrics)
    assert float(t.callback_metrics["train/disc_factor"]) == 1.0  # the fourth update; disc_start is 2
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    for part in ("encoder.conv_in.weight", "decoder.conv_out.weight", "loss.discriminator.main.0.weight"):
        assert part in moved
    assert "loss.logvar" not in moved  # official: in no optimiser


def test_logvar_is_learned_on_request(tmp_path):
    model = kl(learn_logvar=True)
    trainer(tmp_path, max_steps=2).fit(model, DataLoader(Pictures(), batch_size=2))
    assert float(model.loss.logvar) != 0.0


def test_the_official_trainer_keys_work(tmp_path):
    """accumulate_grad_batches: 2 as in the official files, which Lightning 2 refuses for two optimisers."""
    model, t = kl(), trainer(tmp_path, max_steps=2, accumulate_grad_batches=2)
    t.fit(model, DataLoader(Pictures(), batch_size=2))
    assert (model.accumulate, model.updates, t.global_step) == (2, 2, 2)


@pytest.mark.parametrize("make", [kl, vq])
def test_half_precision(make, tmp_path):
    model, t = make(), trainer(tmp_path, max_steps=3, precision="bf16-mixed")
    t.fit(model, DataLoader(Pictures(), batch_size=2))
    assert all(v.isfinite() for v in t.callback_metrics.values())
    assert float(t.callback_metrics["train/d_weight"]) > 0


def test_reconstructions_get_better(tmp_path):
    model = kl(lossconfig={**KL_LOSS, "params": {**KL_LOSS["params"], "disc_start": 1000, "kl_weight": 1e-6}})
    model.learning_rate = 2e-3
    first = float(model.eval().shared_step(batch(8))[1]["rec_loss"])
    trainer(tmp_path, max_steps=40).fit(model.train(), DataLoader(Pictures(), batch_size=8))
    assert float(model.eval().shared_step(batch(8))[1]["rec_loss"]) < 0.6 * first


def test_learning_rates_of_vqmodel(tmp_path):
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler"}
    schedule["params"] = {
        "warm_up_steps": [10],
        "cycle_lengths": [100],
        "f_start": [0.1],
        "f_max": [1.0],
        "f_min": [1.0],
    }
    model = vq(lr_g_factor=3.0, scheduler_config=schedule)
    model.learning_rate = 1e-2
    t = trainer(tmp_path, max_steps=2)
    t.fit(model, DataLoader(Pictures(), batch_size=2))
    generator, discriminator = (o.param_groups[0]["lr"] for o in t.optimizers)
    assert generator == pytest.approx(3 * discriminator) and discriminator == pytest.approx(1e-2 * (0.1 + 0.9 * 2 / 10))
    assert {id(p) for g in t.optimizers[0].param_groups for p in g["params"]} >= {id(model.quantize.embedding.weight)}


def test_average_of_vqmodel(tmp_path):
    model = vq(use_ema=True)
    t = trainer(tmp_path, max_steps=3)
    t.fit(model, DataLoader(Pictures(), batch_size=2))
    state = model.state_dict()
    assert int(state["model_ema.num_updates"]) == 3
    assert "model_ema.encoderconv_inweight" in state and "model_ema.quantizeembeddingweight" in state
    images = model.log_images(batch())
    assert set(images) == {"inputs", "reconstructions", "reconstructions_ema", "codebook"}
    assert images["codebook"].shape == (1, 3, 6 * 2, 6 * 2)  # 32 codes in rows of six, two pixels wide each


def test_random_training_sizes():
    model = vq(batch_resize_range=(16, 48))
    sizes = []
    for model.updates in range(40):
        sizes.append(model.get_input(batch(), "image").shape[2])
    assert sizes[:5] == [48] * 5 and set(sizes) == {16, 32, 48}
    assert model.eval().get_input(batch(), "image").shape[2] == 16


@pytest.mark.parametrize("collapsed", [True, False])
def test_codebook_collapse_is_said(tmp_path, collapsed):
    model = vq(n_embed=32)
    with torch.no_grad():
        model.quantize.embedding.weight[1:] = 1e3 if collapsed else 0.0
        model.quant_conv.weight.mul_(20.0)
        if not collapsed:
            model.quantize.embedding.weight.normal_()
    t = trainer(tmp_path)
    if collapsed:
        message = "codebook collapse: 3.1% of 32 codes .*quantizer_config to .*EMAVectorQuantizer with restart: 0.05"
        with pytest.warns(UserWarning, match=message):
            t.validate(model, DataLoader(Pictures(), batch_size=2), verbose=False)
    else:
        t.validate(model, DataLoader(Pictures(), batch_size=2), verbose=False)
    usage = float(t.callback_metrics["val/codebook_usage"])
    assert usage == pytest.approx(1 / 32) if collapsed else usage > 0.05


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures():
    model = kl().eval()
    images = model.log_images(batch(4), n=3)
    assert set(images) == {"inputs", "reconstructions", "samples"}
    assert all(v.shape == (3, 3, 16, 16) and v.abs().max() <= 1 for v in images.values())
    # prior samples of a model that hardly knows its prior say nothing
    tiny = kl(lossconfig={**KL_LOSS, "params": {**KL_LOSS["params"], "kl_weight": 1e-6}})
    assert set(tiny.log_images(batch())) == {"inputs", "reconstructions"}
    assert set(tiny.log_images(batch(), only_inputs=True)) == {"inputs"}


def test_a_sample_does_not_depend_on_its_batch():
    model = kl().eval()
    many = model.sample(seeds=[7, 8, 9])
    assert many.shape == (3, 3, 16, 16) and many.abs().max() <= 1
    assert torch.allclose(many[1:2], model.sample(seeds=[8]), atol=1e-5)
    assert not torch.equal(model.sample(seeds=[7], temperature=0.5), many[:1])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_checkpoints_with_and_without_a_loss(tmp_path):
    trained, used = kl(), kl(lossconfig=NO_LOSS)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.ckpt")
    torch.save({"state_dict": used.state_dict()}, tmp_path / "used.ckpt")
    again = kl(lossconfig=NO_LOSS, ckpt_path=str(tmp_path / "trained.ckpt"))
    assert torch.equal(again.encoder.conv_in.weight, trained.encoder.conv_in.weight)
    again = kl(ckpt_path=str(tmp_path / "used.ckpt"))
    assert torch.equal(again.decoder.conv_out.weight, used.decoder.conv_out.weight)
    with pytest.raises(UserError, match="does not fit AutoencoderKL"):
        kl(embed_dim=3, ckpt_path=str(tmp_path / "trained.ckpt"))
    kl(embed_dim=3, ckpt_path=str(tmp_path / "trained.ckpt"), ignore_keys=["quant_conv", "post_quant_conv"])


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_first_stage_without_loss_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="cannot be trained with the loss Identity: set model.params.lossconfig"):
        trainer(tmp_path, max_steps=1).fit(kl(lossconfig=NO_LOSS), DataLoader(Pictures(), batch_size=2))


def test_missing_vgg_weights_are_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loss = {**KL_LOSS, "params": {"disc_start": 1}}
    with pytest.raises(UserError, match="vgg16-397923af.pth"):
        trainer(tmp_path, max_steps=1).fit(kl(lossconfig=loss), DataLoader(Pictures(), batch_size=2))
    # weights that came with a checkpoint are enough, and without a weight none are needed
    model = kl(lossconfig=loss)
    model.load_state_dict(model.state_dict())
    model.on_fit_start()
    kl(lossconfig={**KL_LOSS, "params": {"disc_start": 1, "perceptual_weight": 0.0}}).on_fit_start()


def test_wrong_ddconfig():
    with pytest.raises(util.ConfigError, match="unknown key channels"):
        kl(ddconfig={**DD, "channels": 3})
    with pytest.raises(ValueError, match="double_z: got False"):
        kl(ddconfig={**DD, "double_z": False})


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kl, vq])
def test_nothing_stays_on_the_cpu(make):
    """With fake CUDA tensors a tensor that was left on the CPU raises."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"), torch.no_grad():
        model = make()
        loss, logs = model.shared_step({"image": torch.zeros(2, 16, 16, 3)})
        assert loss.device.type == "cuda" and {v.device.type for v in logs.values()} == {"cuda"}
        if make is kl:
            assert model.sample(seeds=[1, 2]).device.type == "cuda"
        assert isinstance(kl().encode(torch.zeros(2, 3, 16, 16)), DiagonalGaussianDistribution)


# --- relatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, params",
    [
        ("EMAVectorQuantizer", {"restart": 0.1}),
        ("FSQ", {"levels": [4, 2, 2, 2]}),
        ("LookupFreeQuantizer", {}),
    ],
)
def test_other_codebooks(name, params, tmp_path):
    config = {"target": f"ldm.modules.quantize.{name}", "params": params}
    model = vq(quantizer_config=config, n_embed=16 if name == "LookupFreeQuantizer" else 32)
    trainer(tmp_path, max_steps=2).fit(model, DataLoader(Pictures(), batch_size=2))
    images = model.eval().log_images(batch())
    assert images["codebook"].isfinite().all()
    x = batch()["image"].permute(0, 3, 1, 2)
    reconstructions, _, indices = model(x, return_pred_indices=True)
    assert torch.allclose(model.decode_code(indices.view(2, 8, 8)), reconstructions, atol=1e-5)


def test_gumbel_codes_sharpen(tmp_path):
    schedule = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler"}  # as in the YAML of gumbel_f8
    schedule["params"] = {"warm_up_steps": 0, "max_decay_steps": 2, "lr_start": 1.0, "lr_max": 1.0, "lr_min": 0.1}
    config = {"target": "taming.models.vqgan.GumbelVQ", "params": {"ddconfig": {**DD, "double_z": False}}}
    config["params"] |= {"lossconfig": VQ_LOSS, "embed_dim": 4, "n_embed": 32, "use_ema": True}
    model = instantiate_from_config(
        {**config, "params": {**config["params"], "temperature_scheduler_config": schedule}}
    )
    t = trainer(tmp_path, max_steps=3)
    t.fit(model, DataLoader(Pictures(), batch_size=2))
    assert float(t.callback_metrics["train/temperature"]) == pytest.approx(0.1)  # of the third update, number 2
    assert {"quantize.proj.weight", "quantize.embed.weight", "model_ema.quantizeprojweight"} <= set(model.state_dict())
    assert "model_ema.quantizeembeddingweight" not in model.state_dict()


def test_segmentation_maps_train_with_one_optimiser(tmp_path):
    params = dict(CONFIGS["taming/configs/coco_cond_stage.yaml"]["model"]["params"])
    with torch.device("meta"):
        full = instantiate_from_config({"target": "taming.models.vqgan.VQSegmentationModel", "params": params})
    assert full.colorize.shape == (3, 183, 1, 1)
    small = {**params, "embed_dim": 4, "n_embed": 8, "n_labels": 5, "lossconfig": params["lossconfig"]}
    small["ddconfig"] = {**DD, "double_z": False, "in_channels": 5, "out_ch": 5}
    model = instantiate_from_config({"target": "taming.models.vqgan.VQSegmentationModel", "params": small})
    maps = [{"segmentation": torch.nn.functional.one_hot(torch.randint(5, (16, 16)), 5)} for _ in range(8)]
    t = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
    t.fit(model, DataLoader(maps, batch_size=2))
    assert t.global_step == model.updates == 2
    assert {"train/bce_loss", "train/quant_loss", "train/total_loss"} <= set(t.callback_metrics)
    images = model.log_images(next(iter(DataLoader(maps, batch_size=2))))
    assert all(v.shape == (2, 3, 16, 16) for v in images.values())
