"""Losses, discriminator and LPIPS against the official numbers, and what the official code gets wrong."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ldm.modules import losses
from ldm.modules.discriminator import ActNorm, NLayerDiscriminator
from ldm.modules.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.lpips import LPIPS, PixelGradient
from ldm.util import UserError, get_obj_from_str
from tests.reference import compare, filler

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def fixture(name):
    return compare.load(FIXTURES / f"{name}.json")


LOSSES = [
    "loss_lpips_disc_kl",
    "loss_lpips_disc_kl_no_perceptual",
    "loss_vq_lpips_disc",
    "loss_taming_vq_lpips_disc",
]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_official_ones(name):
    fx = fixture(name)
    loss = get_obj_from_str(fx["target"])(**fx["params"])
    compare.check_keys(loss, fx)
    x = compare.inputs(fx)
    outs = {}
    for step in (0, 5, 100):
        for index in (0, 1):
            filler.fill(loss, fx["seed"], fx.get("fill_rules", ()))
            loss.train()
            loss.zero_grad()
            last = (0.3 * x["last_layer"]).requires_grad_(True)
            rec = F.conv2d(x["h"], last)
            if "vq" in name:
                value, logs = loss(x["codebook_loss"].abs(), x["inputs"], rec, index, step, last_layer=last)
            else:
                posterior = DiagonalGaussianDistribution(x["moments"])
                value, logs = loss(x["inputs"], rec, posterior, index, step, last_layer=last)
            value.backward()
            grad = last.grad if index == 0 else loss.discriminator.main[0].weight.grad
            outs |= {f"{step}.{index}.{k}": v for k, v in {"loss": value, "grad": grad, **logs}.items()}
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


def test_loss_functions():
    fx = fixture("loss_functions")
    x = compare.inputs(fx)
    real, fake = x["logits_real"], x["logits_fake"]
    perplexity, used = losses.measure_perplexity(x["indices"], 20)
    outs = {
        "hinge": losses.hinge_d_loss(real, fake),
        "vanilla": losses.vanilla_d_loss(real, fake),
        "hinge_exemplar": losses.hinge_d_loss_with_exemplar_weights(real, fake, x["weights"]),
        "perplexity": perplexity,
        "cluster_use": used,
        "adopt": torch.tensor([losses.adopt_weight(1.0, step, threshold=5) for step in (0, 4, 5, 6)]),
        "normal_kl": normal_kl(real, fake, 0.2, x["weights"][0]),
    }
    assert set(outs) == set(fx["outputs"])
    assert compare.check(fx, outs) == []


def test_lpips():
    fx = fixture("lpips_random_weights")
    model = LPIPS()
    compare.check_keys(model, fx)
    filler.fill(model, fx["seed"])
    x = compare.inputs(fx)
    assert compare.check(fx, {"d": model(x["a"], x["b"])}) == []


@pytest.mark.parametrize(
    "tag, params",
    [
        ("bn", {}),
        ("bn2", {"n_layers": 2, "ndf": 16}),
        ("actnorm", {"n_layers": 2, "ndf": 16, "use_actnorm": True}),
    ],
)
def test_discriminator(tag, params):
    fx = fixture("nlayer_discriminator")
    model = NLayerDiscriminator(**params)
    compare.check_keys(model, {"keys": fx["keys"][tag]})
    filler.fill(model, fx["seed"])
    for m in model.modules():
        if isinstance(m, ActNorm):
            m.initialized.fill_(1)
    x = compare.inputs(fx)["x"]
    outs = {f"{tag}.eval": model.eval()(x), f"{tag}.train": model.train()(x)}
    assert compare.check(fx, outs) == []


def test_actnorm_starts_from_its_first_batch_and_inverts():
    torch.manual_seed(0)
    layer = ActNorm(3, logdet=True)
    x = 5 + 3 * torch.randn(8, 3, 4, 4)
    h, logdet = layer(x)
    assert torch.allclose(h.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(h.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    # the log-determinant against autograd's Jacobian of one image
    layer.eval()
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x[:1]).reshape(48, 48)
    assert torch.allclose(logdet[0], torch.linalg.slogdet(jacobian)[1], rtol=1e-4)
    assert torch.allclose(layer.reverse(h), x, atol=1e-5)
    # a later batch changes nothing, a loaded state is taken as it is
    before = layer.loc.clone()
    layer.train()(x + 100)
    assert torch.equal(layer.loc, before)
    fresh = ActNorm(3)
    fresh(x)
    fresh.load_state_dict(ActNorm(3).state_dict())
    assert torch.allclose(fresh(x + 100).mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    with pytest.raises(ValueError, match="expected data to initialise from"):
        ActNorm(3).reverse(x)


def test_lpips_stays_in_evaluation_mode():
    parent = torch.nn.ModuleList([LPIPS()]).train()
    assert not any(m.training for m in parent[0].modules())
    assert not any(p.requires_grad for p in parent.parameters())


def test_lpips_weights_are_looked_for_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = LPIPS()
    assert not model.has_weights
    with pytest.raises(UserError, match="vgg16-397923af.pth .*pixel_gradient"):
        model.load_pretrained()
    # torchvision's own names, in torchvision's place
    torch.manual_seed(0)
    import torchvision

    vgg = torchvision.models.vgg16(weights=None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({k: v for k, v in vgg.state_dict().items() if k.startswith("features")}, folder / "vgg16-397923af.pth")
    model.load_pretrained()
    assert model.has_weights
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(model.net(x)[-1], vgg.features[:30](x), atol=1e-6)
    assert float(model.lin0.model[1].weight.detach().min()) >= 0  # trained layers are non-negative
    again = LPIPS()
    again.load_state_dict(model.state_dict())
    assert again.has_weights


def test_pixel_gradient_sees_edges_and_not_brightness():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16)
    distance = PixelGradient()
    assert torch.allclose(distance(x, x + 0.3), torch.zeros(2, 1, 1, 1), atol=1e-6)
    blurred = F.avg_pool2d(x, 3, 1, 1)
    assert (distance(x, blurred) > 0.01).all()
    assert distance(x, blurred).shape == (2, 1, 1, 1)
    assert distance(x[..., :3, :3], blurred[..., :3, :3]).isfinite().all()


@pytest.mark.parametrize("perceptual", ["none", "pixel_gradient"])
def test_offline_perceptual_choices_have_no_weights(perceptual):
    kl = losses.LPIPSWithDiscriminator(0, perceptual_loss=perceptual)
    vq = losses.VQLPIPSWithDiscriminator(0, perceptual_loss=perceptual)
    assert not [k for m in (kl, vq) for k in m.state_dict() if k.startswith("perceptual_loss")]
    x, last = torch.rand(2, 3, 32, 32), torch.rand(3, 3, 1, 1, requires_grad=True)
    rec = F.conv2d(x, last)
    _, with_term = vq(None, x, rec, 0, 0, last_layer=last)
    assert (float(with_term["train/p_loss"]) > 0) == (perceptual == "pixel_gradient")


def test_evaluation_needs_no_gradient():
    loss = losses.LPIPSWithDiscriminator(0, perceptual_loss="none").eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        _, logs = loss(x, x, DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)), 0, 10, split="val")
    assert float(logs["val/d_weight"]) == 0.0
    assert float(logs["val/kl_loss"]) == 0.0


def test_adaptive_weight_balances_the_gradients():
    loss = losses.LPIPSWithDiscriminator(0, disc_weight=0.5, perceptual_loss="none")
    last = torch.randn(3, 4, 1, 1, requires_grad=True)
    h = torch.randn(1, 4, 8, 8)
    a, b = F.conv2d(h, last).pow(2).sum(), F.conv2d(h, last).sum()
    weight = loss.calculate_adaptive_weight(a, b, last)
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (a, b)]
    assert torch.allclose(weight, 0.5 * norms[0] / (norms[1] + 1e-4))
    assert float(loss.calculate_adaptive_weight(a, b * 1e-12, last)) == 0.5e4  # clamped


def test_conditional_discriminator_gets_its_condition():
    loss = losses.VQLPIPSWithDiscriminator(0, disc_conditional=True, disc_in_channels=5, perceptual_loss="none")
    x, cond = torch.rand(1, 3, 32, 32), torch.rand(1, 2, 32, 32)
    value, _ = loss(None, x, x, 1, 0, cond=cond)
    assert value.isfinite()
    with pytest.raises(ValueError, match="cond: got none"):
        loss(None, x, x, 1, 0)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"disc_loss": "wasserstein"}, "disc_loss: got 'wasserstein', expected one of hinge, vanilla"),
        ({"perceptual_loss": "clips"}, "perceptual_loss: got 'clips', expected one of lpips, pixel_gradient, none"),
        ({"pixel_loss": "l3"}, "pixel_loss: got 'l3', expected one of l1, l2"),
    ],
)
def test_unknown_choices(params, message):
    with pytest.raises(ValueError, match=message):
        losses.VQLPIPSWithDiscriminator(0, **params)


def test_an_ineffective_weight_is_said(caplog):
    losses.LPIPSWithDiscriminator(0, pixelloss_weight=0.5, perceptual_loss="none")
    assert "pixelloss_weight 0.5 has no effect" in caplog.text


def test_segmentation_loss():
    loss = losses.BCELossWithQuant(codebook_weight=2.0)
    target = F.one_hot(torch.randint(4, (1, 8, 8)), 4).permute(0, 3, 1, 2).float()
    value, logs = loss(torch.tensor(0.25), target, torch.zeros(1, 4, 8, 8), "train")
    assert torch.allclose(value, torch.log(torch.tensor(2.0)) + 0.5)
    assert set(logs) == {"train/total_loss", "train/bce_loss", "train/quant_loss"}


def test_pixel_kl_is_squared_error_and_kl_with_their_weights():
    from ldm.modules.distributions import DiagonalGaussianDistribution
    from ldm.modules.losses import PixelKL

    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 8, 8, generator=generator)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 2, 2, generator=generator))
    loss, logs = PixelKL(l2_weight=2.0, l1_weight=0.5, kl_weight=0.1)(x, y, posterior)
    expected = 2 * ((x - y) ** 2).mean() + 0.5 * (x - y).abs().mean() + 0.1 * posterior.kl().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["train/psnr"], -10 * torch.log10(((x - y) ** 2).mean() / 4))
    assert PixelKL(kl_weight=0.0)(x, x, posterior)[0] == 0
