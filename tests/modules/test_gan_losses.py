"""Each formula against a case whose answer is known."""

import functools
import math

import pytest
import torch
from torch import nn

from ldm.modules import gan_losses as L


def critic(slope):
    """D(x) = slope . x, whose gradient is `slope` everywhere."""
    slope = torch.as_tensor(slope, dtype=torch.float32)
    return lambda images: (images.flatten(1) * slope).sum(1, keepdim=True)


def images(n=6, shift=0.0):
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + shift


UNIT = [0.5, 0.5, -0.5, 0.5]  # norm 1


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_of_known_logits():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[-2.0], [0.5]])
    zero, log2 = torch.zeros(3, 1), math.log(2)
    for name, d, g in (
        ("vanilla", log2, log2),
        ("minimax", log2, -log2),
        ("softplus", 2 * log2, log2),
        ("lsgan", 0.5, 0.5),
        ("wgan", 0.0, 0.0),
        ("hinge", 2.0, 0.0),
        ("relativistic", log2, log2),
    ):
        loss = L.LOSSES[name]
        assert loss.discriminator(zero, zero).item() == pytest.approx(d), name
        assert loss.generator(zero, zero).item() == pytest.approx(g), name
        assert loss.relativistic == (name == "relativistic")
    assert L.hinge_d(real, fake) == (1 + 0) / 2 + (0 + 1.5) / 2
    assert L.wgan_d(real, fake) == -0.75 - 1.0 and L.wgan_g(fake) == 0.75
    assert L.lsgan_d(real, fake) == 0.5 * ((1 + 1) / 2 + (4 + 0.25) / 2)
    assert L.lsgan_g(fake) == 0.5 * (9 + 0.25) / 2
    assert L.accuracy(real, fake) == 0.5 * (0.5 + 0.5)


def test_vanilla_is_binary_cross_entropy():
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    targets = torch.cat([torch.ones(5, 1), torch.zeros(5, 1)])
    want = nn.functional.binary_cross_entropy_with_logits(torch.cat([real, fake]), targets)
    torch.testing.assert_close(L.vanilla_d(real, fake), want)
    torch.testing.assert_close(L.logistic_d(real, fake), 2 * want)
    want = nn.functional.binary_cross_entropy_with_logits(fake, torch.ones(5, 1))
    torch.testing.assert_close(L.non_saturating_g(fake), want)


def test_the_generator_that_loses_learns_only_without_saturation():
    for name, weak in (("vanilla", False), ("softplus", False), ("minimax", True)):
        fake = torch.tensor([[-20.0]], requires_grad=True)  # D is sure
        L.LOSSES[name].generator(fake, None).backward()
        assert fake.grad < 0 and (abs(fake.grad) < 1e-6) == weak, name


def quantiles(mean, n=4001):
    """A deterministic sample of N(mean, 1)."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.distributions.Normal(mean, 1.0).icdf(u)[:, None]


def fit(loss, model, parameters):
    """Minimise `loss.discriminator` over the parameters of model(x); real N(mu, 1), fake N(-mu, 1), mu = 0.7."""
    real, fake = quantiles(0.7), quantiles(-0.7)
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss.discriminator(model(real), model(fake))
        value.backward()
        return value

    return optimizer.step(closure)


@pytest.mark.parametrize("name", ["vanilla", "softplus"])
def test_the_optimal_discriminator_of_two_gaussians_is_the_log_ratio(name):
    """log p(x) / q(x) = 2 mu x for N(mu, 1) and N(-mu, 1) (Goodfellow et al. 2014, proposition 1)."""
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    fit(L.LOSSES[name], lambda x: a * x + b, [a, b])
    assert a.item() == pytest.approx(1.4, abs=5e-3) and b.item() == pytest.approx(0, abs=1e-6)


def test_the_optimal_least_squares_discriminator_of_two_gaussians():
    """p / (p + q) = sigmoid(2 mu x) (Mao et al. 2017, equation 5 with a = 0, b = 1)."""
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    fit(L.LOSSES["lsgan"], lambda x: torch.sigmoid(a * x + b), [a, b])
    assert a.item() == pytest.approx(1.4, abs=5e-3) and b.item() == pytest.approx(0, abs=1e-6)


def test_equal_distributions_leave_the_discriminator_at_log_4():
    x = quantiles(0.0)
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = L.logistic_d(a * x, a * x)
    assert loss > math.log(4)
    assert L.logistic_d(0 * x, 0 * x).item() == pytest.approx(math.log(4))


def test_the_wasserstein_estimate_of_two_shifted_points():
    """The best critic of slope at most 1 tells |a - b|; one with clipped weights tells c |a - b|."""
    real, fake = torch.full((4, 1, 1, 1), 3.0), torch.full((4, 1, 1, 1), -2.0)
    for slope, want in ((1.0, 5.0), (-1.0, -5.0)):
        assert -L.wgan_d(critic([slope])(real), critic([slope])(fake)) == want
    weight = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        L.wgan_d(weight * real, weight * fake).backward()
        optimizer.step()
        L.clip_weights([weight], 0.01)
    assert -L.wgan_d(weight * real, weight * fake).item() == pytest.approx(0.05)


def test_a_critic_with_gradient_penalty_has_the_known_slope():
    """Maximising s d - lambda (s - 1)^2 over the slope s gives s = 1 + d / (2 lambda)."""
    real, fake = torch.full((4, 1, 1, 1), 3.0), torch.full((4, 1, 1, 1), -2.0)
    slope = nn.Parameter(torch.tensor([0.3]))
    optimizer = torch.optim.SGD([slope], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        d = lambda x: x.flatten(1) * slope  # noqa: E731
        (L.wgan_d(d(real), d(fake)) + 10 * L.gradient_penalty(d, real, fake)).backward()
        optimizer.step()
    assert slope.item() == pytest.approx(1 + 5 / 20, abs=1e-4)


def test_hinge_is_zero_beyond_the_margins():
    assert L.hinge_d(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -3.0])) == 0


def test_relativistic_losses_see_only_differences():
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    for fn in (L.relativistic_d, lambda r, f: L.relativistic_g(f, r)):
        torch.testing.assert_close(fn(real + 3, fake + 3), fn(real, fake))
    torch.testing.assert_close(L.relativistic_d(real, fake), L.relativistic_g(real, fake))  # roles exchanged
    assert L.relativistic_d(torch.tensor([9.0]), torch.tensor([4.0])).item() == pytest.approx(math.log1p(math.exp(-5)))
    with pytest.raises(ValueError, match="no logits of real images"):
        L.relativistic_g(fake)
    with pytest.raises(ValueError, match="expected equal shapes"):
        L.relativistic_d(real[:2], fake)


# --- penalties --------------------------------------------------------------------------------------------------------


def test_gradient_penalty_of_linear_critics():
    real, fake = images(), images(shift=2.0)
    assert L.gradient_penalty(critic(UNIT), real, fake).item() == pytest.approx(0, abs=1e-10)
    for norm in (0.0, 2.0, 3.5):
        d = critic([norm * u for u in UNIT])
        assert L.gradient_penalty(d, real, fake).item() == pytest.approx((norm - 1) ** 2, abs=1e-5)


def test_gradient_penalty_looks_between_the_pairs():
    seen = []

    def d(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    real, fake = torch.zeros(500, 1, 1, 1), torch.full((500, 1, 1, 1), 4.0)
    L.gradient_penalty(d, real, fake, generator=torch.Generator().manual_seed(0))
    assert seen[0].min() >= 0 and seen[0].max() <= 4 and seen[0].mean().item() == pytest.approx(2, abs=0.2)
    with pytest.raises(ValueError, match="expected equal shapes"):
        L.gradient_penalty(d, real[:3], fake)


def test_r1_and_r2_of_linear_and_quadratic_critics():
    real, fake = images(), images(shift=1.0)
    linear = critic([3 * u for u in UNIT])
    assert L.r1(linear, real).item() == pytest.approx(4.5, rel=1e-6)
    assert L.r2(linear, real, fake).item() == pytest.approx(4.5, rel=1e-6)
    quadratic = lambda x: 0.5 * x.square().flatten(1).sum(1)  # noqa: E731  its gradient at x is x
    norms = [0.5 * x.square().flatten(1).sum(1).mean().item() for x in (real, fake)]
    assert L.r1(quadratic, real, fake).item() == pytest.approx(norms[0], rel=1e-6)
    assert L.r2(quadratic, real, fake).item() == pytest.approx(norms[1], rel=1e-6)
    assert L.r1_r2(quadratic, real, fake).item() == pytest.approx(sum(norms), rel=1e-6)
    assert set(L.PENALTIES) == {"gp", "r1", "r2", "r1_r2"}


def test_penalties_teach_the_discriminator_and_nobody_else():
    real, fake = images().requires_grad_(), images(shift=1.0).requires_grad_()
    d = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for name, penalty in L.PENALTIES.items():
        d.zero_grad(set_to_none=True)
        with torch.no_grad():  # as in a validation loop
            assert penalty(d, real, fake) >= 0
        penalty(d, real, fake).backward()
        assert d[1].weight.grad.abs().sum() > 0, name
        assert real.grad is None and fake.grad is None
    with pytest.raises(ValueError, match="without requires_grad"):
        L.squared_gradient(d(real.detach()), real.detach())


def dirac_gan(loss, penalty=None, weight=1.0, steps=600, lr=0.1):
    """Mescheder et al. 2018, definition 2.1: real data at 0, the generator is a point theta, D(x) = psi x."""
    theta, psi = (torch.tensor([1.0], requires_grad=True) for _ in range(2))
    zero = torch.zeros(1, 1)
    for _ in range(steps):
        d = functools.partial(torch.mul, psi)
        value = loss.discriminator(d(zero), d(theta.detach().view(1, 1)))
        value = value if penalty is None else value + weight * L.PENALTIES[penalty](d, zero, theta.view(1, 1))
        (g_psi,) = torch.autograd.grad(value, psi)
        (g_theta,) = torch.autograd.grad(loss.generator(d(theta.view(1, 1)), d(zero)), theta)
        with torch.no_grad():
            psi -= lr * g_psi
            theta -= lr * g_theta
    return math.hypot(theta.item(), psi.item())


@pytest.mark.parametrize("name", ["softplus", "relativistic", "wgan"])
def test_the_game_at_one_point_converges_only_with_the_right_penalty(name):
    loss = L.LOSSES[name]
    assert dirac_gan(loss) > 0.1
    for penalty in ("r1", "r2", "r1_r2"):
        assert dirac_gan(loss, penalty) < 1e-3
    assert dirac_gan(loss, "gp") > 0.1


def test_clip_weights():
    layer = nn.Linear(4, 4)
    nn.init.uniform_(layer.weight, -1, 1)
    before = layer.weight.detach().clone()
    L.clip_weights(layer.parameters(), 0.1)
    assert torch.equal(layer.weight, before.clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match="limit 0"):
        L.clip_weights(layer.parameters(), 0)


def test_path_length_of_a_linear_generator():
    """images = w A: J^T y = A y, whatever w is."""
    torch.manual_seed(0)
    a = torch.randn(3, 16)
    ws = torch.randn(5, 1, 3, requires_grad=True)
    generated = (ws[:, 0] @ a).view(5, 1, 4, 4)
    y = torch.randn(5, 1, 4, 4)
    lengths = (y.flatten(1) / 4 @ a.t()).norm(dim=1)
    penalty = L.PathLength(decay=0.25)
    value = penalty(generated, ws, noise=y)
    assert penalty.mean.item() == pytest.approx(0.25 * lengths.mean().item(), rel=1e-5)
    assert value.item() == pytest.approx((lengths - penalty.mean).square().mean().item(), rel=1e-5)
    assert not penalty.mean.requires_grad and "mean" in penalty.state_dict()


def test_path_length_of_a_picture_that_w_does_not_change():
    """A generator whose tanh is saturated has Jacobian 0: nothing to learn from, and nothing that is not finite."""
    w = torch.full((4, 1, 3), 90.0, requires_grad=True)
    gain = torch.ones(3, requires_grad=True)
    images = torch.tanh((w[:, 0] * gain)[:, :, None, None].expand(4, 3, 4, 4))
    assert images.min() == 1
    value = L.PathLength()(images, w)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and torch.equal(gain.grad, torch.zeros(3))


def test_path_length_of_a_rotation_is_its_length_and_vanishes():
    """Rows of equal length at right angles, one y: every |J^T y| is the same, and the mean comes to it."""
    a = torch.eye(16) * 3
    ws = torch.randn(5, 2, 16, requires_grad=True)
    y = torch.ones(5, 1, 4, 4)
    penalty = L.PathLength(decay=0.5)
    for _ in range(30):
        value = penalty((ws.mean(1) @ a).view(5, 1, 4, 4), ws, noise=y)
    assert penalty.mean.item() == pytest.approx(3 * 4 / 4 / 2, rel=1e-4)  # each of two ws moves the image by half
    assert value.item() < 1e-6


def test_path_length_trains_the_generator():
    a = nn.Parameter(torch.randn(3, 16))
    ws = torch.randn(5, 1, 3, requires_grad=True)
    L.PathLength()(torch.tanh(ws[:, 0] @ a).view(5, 1, 4, 4), ws).backward()
    assert a.grad.abs().sum() > 0
