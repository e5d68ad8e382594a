"""Parametrisations, training targets and loss weights."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.diffusion.denoiser import SCALINGS, Denoiser, from_x0, loss_weight, to_x0
from ldm.diffusion.guidance import cfg
from ldm.diffusion.schedule import FlowPath, VEPath, make_grid
from tests.diffusion.oracle import PATHS, Mixture, vp_path, zero_snr_path

ALL = [(p, name) for name in PATHS for p in SCALINGS if p != "edm" or name == "ve"]
TIMES = {"vp": [3.0, 400.0, 999.0], "ve": [0.01, 1.0, 70.0], "flow": [0.02, 0.5, 0.97]}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("parameterization", "name"), ALL)
def test_round_trip(parameterization: str, name: str) -> None:
    path, t = PATHS[name], torch.tensor(TIMES[name], dtype=torch.float64)
    x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4).flip(0)
    x, alpha, sigma = path.add_noise(x0, noise, t), *(f(t).view(3, 1, 1, 1) for f in (path.alpha, path.sigma))
    out = from_x0(parameterization, x0, x, alpha, sigma)
    torch.testing.assert_close(to_x0(parameterization, out, x, alpha, sigma), x0)
    # the same through the class: a network that gives its target makes x0
    told: list[Tensor] = []

    def net(x: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return denoiser.target(x0, noise, t)

    denoiser = Denoiser(net, path, parameterization)
    torch.testing.assert_close(denoiser.target(x0, noise, t), out)
    torch.testing.assert_close(denoiser(x, t), x0)
    torch.testing.assert_close(told[0], t.log() / 4 if parameterization == "edm" else t)


def test_formulas_of_the_papers() -> None:
    path, t = PATHS["vp"], torch.tensor(300.0, dtype=torch.float64)
    x0, noise = draw(2, 3), draw(2, 3).flip(0)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = path.add_noise(x0, noise, t)
    torch.testing.assert_close(to_x0("eps", noise, x, alpha, sigma), (x - sigma * noise) / alpha)
    torch.testing.assert_close(to_x0("v", alpha * noise - sigma * x0, x, alpha, sigma), x0)
    flow, u = PATHS["flow"], torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(
        to_x0("flow", noise - x0, flow.add_noise(x0, noise, u), 1 - u, u),
        flow.add_noise(x0, noise, u) - 0.3 * (noise - x0),
    )


def test_edm_preconditioning() -> None:
    """Input, target and effective weight have unit variance (EDM, appendix B.6)."""
    for sigma_data in (0.5, 1.0):
        x0, noise = sigma_data * draw(200_000, 1), draw(200_000, 2)[:, 1:]
        seen: list[Tensor] = []
        denoiser = Denoiser(lambda x, t, seen=seen: seen.append(x) or x, VEPath(), "edm", sigma_data)
        for sigma in (0.01, 0.7, 30.0):
            t = torch.tensor(sigma, dtype=torch.float64)
            denoiser(denoiser.path.add_noise(x0, noise, t), t)
            assert seen[-1].std() == pytest.approx(1, abs=0.01)
            assert denoiser.target(x0, noise, t).std() == pytest.approx(1, abs=0.01)
            assert denoiser.weight("edm", t) == pytest.approx(1)


def test_loss_weights() -> None:
    path = PATHS["vp"]
    t = torch.tensor([1.0, 200.0, 600.0, 999.0], dtype=torch.float64)
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    capped = snr.clamp(max=5)

    def weight(name: str, parameterization: str, gamma: float = 5.0) -> Tensor:
        return Denoiser(lambda x, t: x, path, parameterization).weight(name, t, gamma)

    # Hang et al. 2023, section 3.4: x0, eps and v networks
    torch.testing.assert_close(weight("min_snr", "x0"), capped)
    torch.testing.assert_close(weight("min_snr", "eps"), capped / snr)
    torch.testing.assert_close(weight("min_snr", "v"), capped / (snr + 1))
    torch.testing.assert_close(weight("min_snr", "eps", 1.0), snr.clamp(max=1) / snr)
    for name, parameterization in (("eps", "eps"), ("x0", "x0"), ("v", "v"), ("uniform", "flow")):
        torch.testing.assert_close(weight(name, parameterization), torch.ones_like(t))
    torch.testing.assert_close(weight("eps", "x0"), snr)
    torch.testing.assert_close(weight("x0", "eps"), 1 / snr)


@pytest.mark.parametrize("name", ["uniform", "x0", "eps", "v", "min_snr", "edm"])
def test_one_weight_is_one_loss_whatever_the_network_predicts(name: str) -> None:
    """Named weights say how much an error of x0 counts, so all parametrisations have the same loss."""
    path, t = PATHS["vp"], torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
    x0, noise, wrong = draw(3, 5), draw(3, 5).flip(0), draw(3, 5).flip(1)
    x, alpha, sigma = path.add_noise(x0, noise, t), path.alpha(t)[:, None], path.sigma(t)[:, None]
    losses = []
    for parameterization in ("eps", "x0", "v", "flow"):
        error = from_x0(parameterization, wrong, x, alpha, sigma) - from_x0(parameterization, x0, x, alpha, sigma)
        losses.append(loss_weight(name, parameterization, alpha, sigma) * error**2)
    if name == "uniform":
        assert not torch.allclose(losses[0], losses[1])
    else:
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0])


def test_pure_noise_has_finite_weights() -> None:
    path = zero_snr_path()
    t = torch.tensor([999.0])
    for parameterization in ("eps", "v", "x0"):
        assert torch.isfinite(Denoiser(lambda x, t: x, path, parameterization).weight("min_snr", t)).all()
    assert torch.isfinite(Denoiser(lambda x, t: x, path, "v").target(torch.ones(1, 2), torch.ones(1, 2), t)).all()


def test_scalar_and_batch_times_agree() -> None:
    for name, path in PATHS.items():
        t = torch.tensor(TIMES[name][1])
        x = draw(4, 3).float()
        denoiser = Denoiser(lambda x, t: torch.sin(x + t[:, None]), path, "v")
        assert denoiser(x, t).dtype == torch.float32
        torch.testing.assert_close(denoiser(x, t), denoiser(x, t.expand(4)))
        torch.testing.assert_close(denoiser(x, t.double()), denoiser(x, t))


def test_conditions_and_whole_times_reach_the_network() -> None:
    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (2,)
        return x * y[:, None]

    denoiser = Denoiser(net, PATHS["vp"], "x0")
    x = draw(2, 3).float()
    torch.testing.assert_close(
        denoiser(x, torch.tensor([5, 7]), y=torch.tensor([0.0, 2.0])), x * torch.tensor([[0], [2]])
    )


def test_exact_denoiser_minimises_the_loss() -> None:
    """E[x0 | x_t] of the oracle beats any rescaling of itself, for every path."""
    for name, path in PATHS.items():
        gm = Mixture(path)
        generator = torch.Generator().manual_seed(1)
        k = torch.multinomial(torch.tensor(gm.weights), 50_000, replacement=True, generator=generator)
        noise, spread = (torch.randn(50_000, generator=generator, dtype=torch.float64) for _ in range(2))
        x0 = torch.tensor(gm.means).double()[k] + torch.tensor(gm.stds).double()[k] * spread
        t = torch.tensor(TIMES[name][1], dtype=torch.float64)
        best = gm(path.add_noise(x0, noise, t), t)
        assert all(((best - x0) ** 2).mean() < ((f * best - x0) ** 2).mean() for f in (0.9, 1.1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Denoiser(len, PATHS["vp"], "epsilon"), "got 'epsilon', expected one of eps, x0, v, flow, edm"),
        (lambda: Denoiser(len, PATHS["vp"], "edm"), "got VPPath, expected VEPath"),
        (lambda: Denoiser(len, PATHS["vp"]).weight("snr", torch.tensor(3.0)), "got 'snr', expected uniform"),
        (lambda: to_x0("e", *[torch.ones(1)] * 4), "got 'e'"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "flow"])
def test_devices_without_a_gpu_at_hand(parameterization: str) -> None:
    """Training and guided prediction on fake cuda tensors; a tensor left on the CPU, or a read of a value, raises."""
    with FakeTensorMode(), torch.device("cuda"):
        path = FlowPath() if parameterization == "flow" else vp_path()
        conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        denoiser = Denoiser(lambda x, t, y: conv(x) + y[:, None, None, None] * t[0], path, parameterization)
        x0, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        t = torch.rand(2) if parameterization == "flow" else torch.randint(0, 1000, (2,))
        error = conv(path.add_noise(x0, noise, t)) - denoiser.target(x0, noise, t)
        assert (denoiser.weight("min_snr", t).view(2, 1, 1, 1) * error**2).mean().device.type == "cuda"
        guided = cfg(denoiser, {"y": torch.ones(2)}, {"y": torch.zeros(2)}, 3.0)
        assert guided(x0, make_grid(path.default_grid, path, 4)[0]).device.type == "cuda"
