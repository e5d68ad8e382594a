"""The StyleGAN2 recipe: regularisers, mixing, knobs of drawing, weights of other projects."""

import pytest
import torch
import torch.nn.functional as F

from ldm import checkpoint, editing, inversion
from ldm.generate import split_knobs
from ldm.models.stylegan2 import StyleGAN2
from ldm.modules import gan_losses
from ldm.modules.stylegan2_layers import Block
from ldm.optim import HiddenAndRest
from ldm.util import ConfigError, SeededNoise, UserError
from tests.models.gans import ADAM, Blobs, loader, scaled_trainer, small_stylegan, spoil_loss, stylegan_config, trainer

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


def test_each_player_has_an_optimiser_of_its_own_and_filters_learn_apart(tmp_path):
    """Muon takes what lies between pictures, styles and logits; the discriminator keeps `optimizer_config`."""
    muon = {"target": "timm.optim.Muon", "params": {"lr": 0.05, "momentum": 0.5}}
    own = {"target": "ldm.optim.HiddenAndRest", "params": {"hidden": muon, "rest": ADAM}}
    classes = {**CLASSES, "num_classes": 6}
    model = small_stylegan(**classes, generator_optimizer_config=own, lr_g_factor=2.0, reconstruction_weight=1.0)
    (generator, discriminator), _ = model.configure_optimizers()
    assert type(discriminator) is torch.optim.Adam and type(generator) is HiddenAndRest
    hidden, rest = generator.param_groups
    assert hidden["lr"] == pytest.approx(0.1) and rest["lr"] == pytest.approx(2 * model.learning_rate)
    names = {id(p): n for n, p in model.generator.named_parameters()}
    kept = {names.pop(id(p)).rpartition(".")[2] for p in hidden["params"]}
    assert kept == {"weight"}
    others = {names.pop(id(p)) for p in rest["params"]}
    assert not names, "each parameter has one place"
    assert {n for n in others if n.endswith("weight")} == {f"synthesis.b{r}.torgb.weight" for r in (4, 8, 16)}
    before = [p.detach().clone() for p in model.generator.parameters()]
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.generator.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved) and all(torch.isfinite(p).all() for p in model.parameters())


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


def test_the_average_ramps_up_as_in_stylegan2_ada(tmp_path):
    """Half-life = min(its own, 0.05 of the images seen): the first updates copy the generator."""
    model = small_stylegan(ema_decay=0.999, ema_rampup=0.05)
    assert model.model_ema.rampup == 0.05 and small_stylegan().model_ema.rampup is None
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    expected = model.generator.synthesis.b4.const  # 0.5 ** (1 / 0.05) of the weights before is not to be seen
    assert torch.allclose(model.model_ema.synthesisb4const, expected, atol=1e-7)


def test_the_average_is_of_the_generator_and_moves_fast_at_first(tmp_path):
    model = small_stylegan(ema_decay=0.999)
    start = model.generator.synthesis.b4.const.detach().clone()
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    end = model.generator.synthesis.b4.const.detach()
    average = model.model_ema.synthesisb4const
    assert (average - start).norm() > 0.5 * (end - start).norm()  # with 0.999 from the start it would be 0.002
    assert not any(k.startswith("discriminator") for k in dict(model.model_ema.named_buffers()))


@pytest.mark.parametrize("player", ["generator", "discriminator"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_loss_that_is_nan_names_its_player(tmp_path, monkeypatch, player, precision):
    model = small_stylegan()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    spoil_loss(monkeypatch, model, player)
    with pytest.raises(UserError, match=f"^the loss is not finite at step 0, batch 0: the {player}'s; the last good"):
        scaled_trainer(tmp_path, precision).fit(model, loader(size=16))
    # the one whose turn it was has not moved
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith(player))


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_nan_stops_and_says_where(tmp_path, player):
    model = small_stylegan()
    next(getattr(model, player).parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(UserError, match=f"the {player}'s gradient is not finite"):
        trainer(tmp_path, max_steps=2).fit(model, loader(size=16))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightnings_mixed_precision_trains(tmp_path, precision):
    """Autocast makes w half; its running mean and that of the path lengths stay in float32."""
    model = small_stylegan(path_length_interval=1, penalty_interval=1)
    scaled_trainer(tmp_path, precision).fit(model, loader(size=16))
    assert model.updates == 3
    for mean in (model.generator.mapping.w_avg, model.path_length.mean):
        assert mean.dtype == torch.float32 and torch.isfinite(mean).all() and mean.abs().max() > 0


def test_low_precision_blocks_train(tmp_path):
    low = {"num_fp16_res": 2, "fp16_dtype": "bfloat16"}
    config = stylegan_config(**low)
    config["discriminator_config"]["params"] |= {"num_fp16_res": 2, "block_kwargs": {"fp16_dtype": "bfloat16"}}
    model = StyleGAN2(**config)
    model.learning_rate = 1e-3
    trainer(tmp_path, max_steps=2).fit(model, loader(size=16))
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("fp16_dtype", ["bfloat16", "float16"])
def test_low_precision_is_for_training_only(fp16_dtype, monkeypatch):
    """Blocks train as configured; sampling, walking, dragging and inverting run in float32, on GPUs too."""
    torch.manual_seed(0)
    model = StyleGAN2(**stylegan_config(num_fp16_res=2, fp16_dtype=fp16_dtype)).eval()
    plain = small_stylegan().eval()
    plain.generator.load_state_dict(model.generator.state_dict())
    g, ws = model.generator, model.latents(None, SeededNoise([3]))
    used, dtype_on = [], Block.dtype_on

    def as_on_a_gpu(self, device, force_fp32):
        used.append(dtype_on(self, torch.device("cuda"), force_fp32))
        return torch.float32  # the CPU has no fast float16

    handles, targets = torch.tensor([[4.0, 4.0]]), torch.tensor([[12.0, 4.0]])
    draws = {
        "sample": lambda m: m.sample(seeds=[3]),
        "interpolate": lambda m: next(m.interpolate(seeds=[3, 4])),
        "features": lambda m: editing.features_at(m.generator, ws, 16)[0],
        "picture": lambda m: editing.picture(*editing.start(m.generator, ws, handles, targets)),
        "render": lambda m: inversion.render(m.generator, ws),
    }
    for name, draw in draws.items():
        assert torch.equal(draw(model), draw(plain)), name  # bfloat16 would run, and differ, on the CPU
        with monkeypatch.context() as patch:
            patch.setattr(Block, "dtype_on", as_on_a_gpu)
            draw(model)
        assert used and set(used) == {torch.float32}, name
        used.clear()
    monkeypatch.setattr(Block, "dtype_on", as_on_a_gpu)
    model.train().fake(2, None)
    low = getattr(torch, fp16_dtype)
    assert used == [torch.float32, low, low] and g.synthesis.b16.use_fp16  # 4, 8 and 16 pixels


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


@pytest.mark.parametrize("key", ["optimizer_config", "generator_optimizer_config", "scheduler_config"])
@pytest.mark.parametrize("value", [7, {"params": {"lr": 1.0}}])
def test_an_optimiser_without_a_target_is_named_by_its_key(key, value):
    model = small_stylegan(**{key: value})
    with pytest.raises(ConfigError, match=rf"^model\.params\.{key}: expected a mapping with the key target, got "):
        model.configure_optimizers()


@pytest.mark.parametrize("key", ["generator_config", "discriminator_config"])
def test_a_network_without_a_target_is_named_by_its_key(key):
    with pytest.raises(ConfigError, match=rf"^model\.params\.{key}: expected a mapping with the key target, got 7"):
        StyleGAN2(**{**stylegan_config(), key: 7})
