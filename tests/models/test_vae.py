"""The VAE: bounds against closed forms, observation models, options, pictures."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from ldm.models.vae import VAE
from ldm.modules.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, make_likelihood
from ldm.modules.vae_nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

MLP = {
    "encoder_config": {"target": "ldm.modules.vae_nets.MLPEncoder", "params": {"hidden": [32]}},
    "decoder_config": {"target": "ldm.modules.vae_nets.MLPDecoder", "params": {"hidden": [32]}},
}
CONV = {
    "encoder_config": {"target": "ldm.modules.vae_nets.ConvEncoder", "params": {"ch": 8, "ch_mult": [1, 2]}},
    "decoder_config": {"target": "ldm.modules.vae_nets.ConvDecoder", "params": {"ch": 8, "ch_mult": [1, 2]}},
}
LIKELIHOODS = ["bernoulli", "gaussian", "gaussian_learned", "logistic"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def vae(**params):
    return VAE(**{"size": 8, "channels": 1, "latent_dim": 4, **MLP, **params}).eval()


def batch(n=4, size=(8, 8), channels=1):
    return {"image": torch.rand(n, *size, channels) * 2 - 1}


# --- observation models -----------------------------------------------------------------------------------------------


def test_levels_of_the_discretised_logistic_sum_to_one():
    likelihood = DiscretizedLogistic(scale=0.05, levels=256)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean in (-1.3, -1.0, 0.01, 0.4, 1.0):
        log_p = likelihood.double().log_prob(levels, torch.full_like(levels, mean))
        assert torch.allclose(log_p.exp().sum(), torch.ones((), dtype=torch.float64), atol=1e-9)
    # no cancellation far from the mean, in single precision
    far = likelihood.float().log_prob(torch.tensor([[0.9]]), torch.tensor([[-0.9]]))
    assert float(far) == pytest.approx(-1.8 / 0.05 + math.log(2 / 255 / 0.05), abs=0.1)


def test_gaussian_density():
    x, out = torch.rand(3, 1, 4, 4) * 2 - 1, torch.rand(3, 1, 4, 4) * 2 - 1
    expected = torch.distributions.Normal(out, 0.3).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(Gaussian(0.3).log_prob(x, out), expected, rtol=1e-5)


def test_bernoulli_probability():
    x, logits = (torch.rand(3, 1, 4, 4) > 0.5).float() * 2 - 1, torch.randn(3, 1, 4, 4)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).flatten(1).sum(1)
    assert torch.allclose(Bernoulli().log_prob(x, logits), expected, rtol=1e-5)
    assert torch.allclose(Bernoulli().mean(logits), 2 * torch.sigmoid(logits) - 1)


def test_only_learned_scales_are_trained():
    trained = {name: [p.requires_grad for p in make_likelihood(name).parameters()] for name in LIKELIHOODS}
    assert trained == {"bernoulli": [], "gaussian": [False], "gaussian_learned": [True], "logistic": [True]}
    with pytest.raises(ValueError, match="likelihood: got 'poisson'"):
        make_likelihood("poisson")
    with pytest.raises(ValueError, match="positive"):
        make_likelihood("gaussian", scale=0.0)


def test_a_learned_scale_finds_the_error():
    likelihood = Gaussian(1.0, learned=True)
    error = 0.2 * torch.randn(64, 100)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-likelihood.log_prob(error, torch.zeros_like(error)).mean()).backward()
        optimizer.step()
    assert float(likelihood.log_scale.exp()) == pytest.approx(float(error.pow(2).mean().sqrt()), rel=1e-2)


# --- bounds -----------------------------------------------------------------------------------------------------------


class Moments(nn.Module):
    """The exact posterior of x = W z + n, n ~ N(0, s^2): precision I + W'W / s^2, diagonal for orthogonal columns."""

    def __init__(self, weight, s):
        super().__init__()
        self.register_buffer("weight", weight)
        self.s = s

    def forward(self, x):
        precision = 1 + (self.weight**2).sum(0) / self.s**2
        mean = x.flatten(1) @ self.weight / self.s**2 / precision
        return torch.cat([mean, -precision.log().expand_as(mean)], dim=1)


def linear_gaussian(error=0.0):
    """A VAE whose log p(x) is known: x ~ N(0, W W' + s^2 I); `error` moves its posterior off the exact one."""
    model = vae(size=3, latent_dim=2, likelihood="gaussian", likelihood_scale=0.5).double()
    weight = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])
    model.encoder = Moments(weight * (1 + error), 0.5)
    model.decoder = nn.Sequential(nn.Linear(2, 9, bias=False, dtype=torch.float64), nn.Unflatten(1, (1, 3, 3)))
    model.decoder[0].weight.data = weight
    covariance = weight @ weight.T + 0.25 * torch.eye(9, dtype=torch.float64)
    return model, torch.distributions.MultivariateNormal(torch.zeros(9, dtype=torch.float64), covariance)


def test_bounds_are_tight_for_the_exact_posterior():
    model, truth = linear_gaussian()
    x = truth.sample((5,)).view(5, 1, 3, 3)
    exact = truth.log_prob(x.flatten(1))
    for k in (1, 7):  # every importance weight is p(x) itself
        assert torch.allclose(model.iwae_bound(x, k), exact, atol=1e-4)


def test_iwae_lies_above_the_elbo_and_grows_with_k():
    model, truth = linear_gaussian(error=0.5)
    x = truth.sample((4000,)).view(-1, 1, 3, 3)
    exact = float(truth.log_prob(x.flatten(1)).mean())
    bounds = [float(model.iwae_bound(x, k).mean()) for k in (1, 4, 16, 64)]
    assert bounds == sorted(bounds) and bounds[-1] < exact + 0.02
    assert exact - bounds[-1] < 0.2 * (exact - bounds[0])
    _, logs = model.float().loss({"image": x.permute(0, 2, 3, 1)})
    assert float(logs["elbo"]) == pytest.approx(bounds[0], abs=0.1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("nets", [MLP, CONV])
def test_terms_add_up(nets, likelihood):
    model = vae(likelihood=likelihood, beta=0.5, iwae_samples=4, **nets)
    loss, logs = model.loss(batch())
    assert loss.isfinite() and set(logs) == {"loss", "rec", "kl", "elbo", "iwae"}
    assert torch.allclose(logs["elbo"], -(logs["rec"] + logs["kl"]))
    assert torch.allclose(loss, logs["rec"] + 0.5 * logs["kl"])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_free_bits():
    model = vae(free_bits=0.5)
    posterior = model.encode(batch()["image"].permute(0, 3, 1, 2))
    each = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean(0)
    assert torch.allclose(model.kl_cost(posterior), torch.maximum(each, torch.tensor(0.5)).sum())
    # a latent number below its allowance gets no gradient from the KL term
    quiet = model.encoder.layers[-1].weight
    model.encoder.layers[-1].weight.data.mul_(1e-3)
    (grad,) = torch.autograd.grad(model.kl_cost(model.encode(batch()["image"].permute(0, 3, 1, 2))), quiet)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.allclose(vae().kl_cost(posterior), posterior.kl().mean())


def test_kl_annealing(tmp_path):
    model = vae(beta=2.0, kl_warmup=10).train()
    assert model.current_beta() == 0.0
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([{"image": torch.zeros(8, 8, 1)}] * 4, batch_size=2))
    assert model.current_beta() == pytest.approx(1.0)
    assert float(trainer.callback_metrics["train/beta"]) == pytest.approx(0.8)  # of the fifth update, number 4


def test_training_raises_the_bound():
    model = vae().train()
    x = {"image": batch(16)["image"].sign()}
    before = float(model.loss(x)[1]["elbo"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x)[0].backward()
        optimizer.step()
    assert float(model.loss(x)[1]["elbo"]) > before + 2.0


# --- shapes and pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoder, decoder", [(ConvEncoder, ConvDecoder), (MLPEncoder, MLPDecoder)], ids=["conv", "mlp"]
)
@pytest.mark.parametrize("size, shape", [(8, (8, 8)), ([8, 12], (8, 12))])
def test_nets_have_mirrored_shapes(encoder, decoder, size, shape):
    x = torch.randn(2, 3, *shape)
    assert encoder(size, 3, 10)(x).shape == (2, 10)
    assert decoder(size, 3, 5)(torch.randn(2, 5)).shape == x.shape


def test_a_size_that_cannot_be_halved():
    with pytest.raises(ValueError, match="size: got 10x10, expected multiples of 4"):
        ConvEncoder(10, 1, 4, ch_mult=(1, 2, 4))


def test_pictures():
    model = vae(size=[8, 16], channels=3, use_ema=True)
    images = model.log_images(batch(6, (8, 16), 3), n=4)
    assert set(images) == {"inputs", "reconstructions", "samples", "interpolation", "traversal"}
    assert all(v.abs().max() <= 1 and v.shape[1] == 3 for v in images.values())
    assert images["samples"].shape == (4, 3, 8, 16)
    assert images["interpolation"].shape == (1, 3, 2 * 9, 8 * 17)  # two pairs, eight steps, lines between
    assert images["traversal"].shape == (1, 3, 4 * 9, 8 * 17)  # four latent numbers
    assert set(model.log_images(batch(1, (8, 16), 3))) == {"inputs", "reconstructions", "samples", "traversal"}


def test_interpolation_and_traversal_pass_through_what_they_should():
    model = vae()
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    path = model.interpolate(a, b, steps=5)
    assert torch.allclose(path[:, 0], model.decode(a), atol=1e-6)
    assert torch.allclose(path[:, 4], model.decode(b), atol=1e-6)
    assert torch.allclose(path[:, 2], model.decode((a + b) / 2), atol=1e-6)
    grid = model.traverse(a[0], [1, 3], steps=3, reach=2.0)
    z = a[0].clone()
    z[3] = 0.0  # the middle of -2 to 2
    assert torch.allclose(grid[1, 1], model.decode(z[None])[0], atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    model = vae(**CONV)
    many = model.sample(seeds=[7, 8, 9])
    assert many.shape == (3, 1, 8, 8) and many.abs().max() <= 1
    assert torch.allclose(many[1:2], model.sample(seeds=[8]), atol=1e-6)
    assert torch.allclose(model.sample(seeds=[1], temperature=0.0), model.decode(torch.zeros(1, 4)), atol=1e-6)


def test_first_stage_interface():
    model = vae()
    x = batch()["image"].permute(0, 3, 1, 2)
    reconstructions, posterior = model(x)
    assert reconstructions.shape == x.shape and posterior.mode().shape == (4, 4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_nothing_stays_on_the_cpu(likelihood):
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"), torch.no_grad():
        model = vae(likelihood=likelihood, iwae_samples=2, free_bits=0.1, kl_warmup=2, **CONV)
        loss, logs = model.loss({"image": torch.zeros(2, 8, 8, 1)})
        assert {loss.device.type, *(v.device.type for v in logs.values())} == {"cuda"}
        assert model.sample(seeds=[1, 2], temperature=0.7).device.type == "cuda"
