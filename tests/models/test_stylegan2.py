"""The StyleGAN2 recipe: regularisers, mixing, knobs of drawing, weights of other projects."""

import pytest
import torch
import torch.nn.functional as F

from ldm import checkpoint
from ldm.generate import split_knobs
from ldm.models.stylegan2 import StyleGAN2
from ldm.modules import gan_losses
from ldm.util import SeededNoise, UserError
from tests.models.gans import Blobs, loader, small_stylegan, stylegan_config, trainer

CLASSES = {"cond_stage_key": "class_label", "num_classes": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batch(n=4):
    data = Blobs(n, size=16)
    return {"image": data.x, "class_label": data.y}


def plain(model, z, **knobs):
    return model.generator(z, None, noise_mode="const", **knobs).clamp(-1, 1)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, CLASSES, {"augment": "ada", "augment_params": {"pipe": "bg"}}])
def test_it_trains(tmp_path, params):
    model = small_stylegan(path_length_interval=2, penalty_interval=2, **params)
    t = trainer(tmp_path, max_steps=3)
    t.fit(model, loader(size=16))
    names = {"g_loss", "d_loss", "penalty", "path_length_penalty", "path_length", "g_norm", "d_norm"}
    assert {f"train/{n}" for n in names} <= set(t.callback_metrics)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.generator.mapping.w_avg.abs().max() > 0
    assert model.path_length.mean > 0


def test_r1_by_hand():
    """gamma / 2 E |grad D(x)|^2 on real images, 16 times as heavy as it is rare."""
    model, data = small_stylegan(penalty_weight=3.0).train(), batch()
    _, logs = model.discriminator_loss(data)
    x = data["image"].permute(0, 3, 1, 2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.discriminator(x).sum(), x)
    assert torch.allclose(logs["penalty"], 0.5 * gradient.square().sum((1, 2, 3)).mean(), rtol=1e-4)
    torch.manual_seed(1)
    loss, logs = model.discriminator_loss(data)
    torch.manual_seed(1)
    model.disc_updates = 1
    rest, none = model.discriminator_loss(data)
    assert "penalty" not in none
    assert torch.allclose(loss - rest, 16 * 3.0 * logs["penalty"], rtol=1e-3)


def test_path_length_is_lazy_and_weighted(monkeypatch):
    model = small_stylegan(path_length_weight=2.0, path_length_interval=4).train()
    monkeypatch.setattr(gan_losses.PathLength, "forward", lambda self, images, ws: images.new_tensor(5.0))
    sizes = []
    synthesis = model.generator.synthesis.forward
    monkeypatch.setattr(model.generator.synthesis, "forward", lambda ws: sizes.append(len(ws)) or synthesis(ws))
    torch.manual_seed(1)
    loss, logs = model.generator_loss(batch())
    assert torch.allclose(loss, logs["g_loss"] + 2.0 * 4 * 5.0) and sizes == [4, 2]  # half the batch
    model.updates = 1
    loss, logs = model.generator_loss(batch())
    assert torch.equal(loss, logs["g_loss"]) and sizes == [4, 2, 4]


def test_styles_mix_in_training_only():
    model = small_stylegan(mixing_prob=1.0)

    def mixed(ws):
        return ((ws - ws[:, :1]).abs().amax((1, 2)) > 1e-6).tolist()

    assert all(mixed(model.train().styles(8, None)))
    assert not any(mixed(model.eval().styles(8, None)))
    model.mixing_prob = 0.0
    assert not any(mixed(model.train().styles(8, None)))


def test_the_average_is_of_the_generator_and_moves_fast_at_first(tmp_path):
    model = small_stylegan(ema_decay=0.999)
    start = model.generator.synthesis.b4.const.detach().clone()
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    end = model.generator.synthesis.b4.const.detach()
    average = model.model_ema.synthesisb4const
    assert (average - start).norm() > 0.5 * (end - start).norm()  # with 0.999 from the start it would be 0.002
    assert not any(k.startswith("discriminator") for k in dict(model.model_ema.named_buffers()))


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_nan_stops_and_says_where(tmp_path, player):
    model = small_stylegan()
    next(getattr(model, player).parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(UserError, match=f"the {player}'s gradient is not finite"):
        trainer(tmp_path, max_steps=2).fit(model, loader(size=16))


def test_low_precision_blocks_train(tmp_path):
    low = {"num_fp16_res": 2, "fp16_dtype": "bfloat16"}
    config = stylegan_config(**low)
    config["discriminator_config"]["params"] |= {"num_fp16_res": 2, "block_kwargs": {"fp16_dtype": "bfloat16"}}
    model = StyleGAN2(**config)
    model.learning_rate = 1e-3
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    model = small_stylegan().eval()
    for name, p in model.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.3)
    model.generator.mapping.w_avg.normal_()
    return model


def test_pictures_are_those_of_the_generator(model):
    z = SeededNoise([3, 4])((2, 8))
    assert torch.allclose(model.sample(seeds=[3, 4]), plain(model, z), atol=1e-5)
    assert torch.allclose(model.sample(seeds=[3, 4], truncation=0.5), plain(model, z, truncation_psi=0.5), atol=1e-5)
    cut = model.sample(seeds=[3, 4], truncation=0.5, truncation_cutoff=2)
    assert torch.allclose(cut, plain(model, z, truncation_psi=0.5, truncation_cutoff=2), atol=1e-5)
    zero = model.sample(seeds=[3, 4], truncation=0.0)
    assert torch.allclose(zero[0], zero[1], atol=1e-6)


def test_noise_modes(model):
    one, two = model.sample(seeds=[3, 4], noise_mode="random"), model.sample(seeds=[4], noise_mode="random")
    assert torch.allclose(one[1:], two, atol=1e-5)  # the noise is the seed's own
    pictures = {m: model.sample(seeds=[4], noise_mode=m) for m in ("const", "random", "none")}
    assert all((pictures[a] - pictures[b]).abs().max() > 1e-3 for a, b in (("const", "random"), ("const", "none")))
    with pytest.raises(UserError, match="noise_mode 'rand': expected one of random, const, none"):
        model.sample(seeds=[0], noise_mode="rand")


def test_style_mixing(model):
    same = model.sample(seeds=[3], style_mix=3)
    assert torch.allclose(same, model.sample(seeds=[3]), atol=1e-6)
    ws = model.generator.mapping(SeededNoise([3, 9])((2, 8)), None)
    by_hand = torch.cat([ws[:1, :2], ws[1:, 2:]], 1)
    expected = model.generator.synthesis(by_hand, noise_mode="const").clamp(-1, 1)
    assert torch.allclose(model.sample(seeds=[3], style_mix=9, mix_layer=2), expected, atol=1e-5)
    for layer in (0, model.generator.num_ws):
        with pytest.raises(UserError, match=f"mix_layer {layer}: expected 1 to {model.generator.num_ws - 1}"):
            model.sample(seeds=[3], style_mix=9, mix_layer=layer)
    with pytest.raises(UserError, match="which styles"):
        model.sample(seeds=[3], mix_layer=2)


def test_interpolation_is_straight_in_w(model):
    frames = torch.stack(list(model.interpolate(seeds=[3, 4], frames=4)))
    assert torch.allclose(frames[[0, 4]], model.sample(seeds=[3, 4]), atol=1e-5)
    ws = model.generator.mapping(SeededNoise([3, 4])((2, 8)), None)
    half = model.generator.synthesis(ws.mean(0, keepdim=True), noise_mode="const").clamp(-1, 1)
    assert torch.allclose(frames[2:3], half, atol=1e-5)


def test_classes_are_one_hot_and_checked():
    model = small_stylegan(**CLASSES).eval()
    assert model.generator.c_dim == model.discriminator.c_dim == 2
    x = model.sample(model.condition([5, 5], classes=[0, 1]), seeds=[5, 5])
    assert (x[0] - x[1]).abs().max() > 1e-4
    one_hot = F.one_hot(torch.tensor([1]), 2).float()
    expected = model.generator(SeededNoise([5])((1, 8)), one_hot, noise_mode="const").clamp(-1, 1)
    assert torch.allclose(x[1:], expected, atol=1e-5)
    with pytest.raises(UserError, match="class 2 does not exist"):
        model.condition([0], classes=[2])


def test_its_knobs_are_those_of_the_script(model):
    given = {"truncation": 0.7, "noise_mode": "none", "style_mix": 3, "scale": None}
    assert split_knobs(model, given)[0] == {"truncation": 0.7, "noise_mode": "none", "style_mix": 3}
    with pytest.raises(UserError, match="--steps: StyleGAN2 has truncation"):
        split_knobs(model, {"steps": 5})


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_bare_generator_fills_the_model_and_its_average():
    source, model = small_stylegan(), StyleGAN2(**stylegan_config(discriminator=False))
    state = {k.removeprefix("generator."): v for k, v in source.state_dict().items() if k.startswith("generator.")}
    checkpoint.load(model, state, source="x.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(model.generator.parameters(), source.generator.parameters(), strict=True)
    )
    with model.ema_scope():
        assert torch.equal(model.generator.synthesis.b4.const, source.generator.synthesis.b4.const)


def test_another_generator_is_refused():
    state = small_stylegan(size=32).state_dict()
    with pytest.raises(UserError, match="does not fit StyleGAN2"):
        checkpoint.load(small_stylegan(), state, source="x.ckpt")


def test_non_square_data_says_how_to_crop():
    with pytest.raises(
        ValueError, match=r"got \[64, 96\], expected one number.*data.params.size=64 pictures are cropped"
    ):
        StyleGAN2(**stylegan_config(size=[64, 96]))
    with pytest.raises(UserError, match="pictures that are not square are cropped to their middle"):
        small_stylegan().discriminator_loss({"image": torch.zeros(2, 16, 24, 1)})
