"""Classifier-free guidance, clipping and inpainting."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg, clip, inpaint
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import make_grid
from tests.diffusion.oracle import PATHS, Mixture, no_noise


class Net:
    """A small nonlinear function of x, t and conditions that counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, c_concat: list[Tensor] | None = None) -> Tensor:
        self.batches.append(len(x))
        extra = 0 if c_concat is None else c_concat[0]
        return torch.tanh(x + y[:, None] + t[:, None] / 1000 + extra)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
COND, UNCOND = {"y": torch.tensor([1.0, 2.0, 3.0])}, {"y": torch.zeros(3)}


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_formula_in_one_call(parameterization: str, scale: float) -> None:
    net, path = Net(), PATHS["vp"]
    denoise, t = Denoiser(net, path, parameterization), torch.tensor(500.0)
    guided = cfg(denoise, COND, UNCOND, scale)(X, t)
    assert net.batches == [6]
    # the usual form, on the network's output
    u, c = (net(X, t.expand(3), **cond) for cond in (UNCOND, COND))
    direct = Denoiser(lambda x, t: u + scale * (c - u), path, parameterization)(X, t)
    torch.testing.assert_close(guided, direct, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cfg(denoise, COND, UNCOND, scale)(X, t.expand(3)), guided)


@pytest.mark.parametrize(("uncond", "scale"), [(None, 7.5), (UNCOND, 1.0), (UNCOND, 1)])
def test_half_the_cost_without_guidance(uncond: dict | None, scale: float) -> None:
    net = Net()
    denoise = Denoiser(net, PATHS["vp"])
    t = torch.tensor(500.0)
    assert torch.equal(cfg(denoise, COND, uncond, scale)(X, t), denoise(X, t, **COND))
    assert net.batches == [3, 3]


def test_no_condition_at_all() -> None:
    gm = Mixture(PATHS["vp"])
    t = torch.tensor(500.0)
    assert torch.equal(cfg(gm, None)(X, t), gm(X, t))


def test_nested_conditions() -> None:
    net, t = Net(), torch.tensor(500.0)
    parts = [{"y": c["y"], "c_concat": [torch.full((3, 5), v)]} for c, v in ((COND, 0.3), (UNCOND, 0.1))]
    denoise = Denoiser(net, PATHS["vp"], "x0")
    wanted = denoise(X, t, **parts[1]) + 2 * (denoise(X, t, **parts[0]) - denoise(X, t, **parts[1]))
    torch.testing.assert_close(cfg(denoise, *parts, 2.0)(X, t), wanted)


@pytest.mark.parametrize(
    ("uncond", "message"),
    [
        ({"y": torch.zeros(2)}, r"condition\['y'\] \(2,\), expected \(3,\)"),
        ({}, r"got unconditional condition dict with keys \[\], expected dict with keys \['y'\]"),
        ({"y": [torch.zeros(3)]}, r"condition\['y'\] list of 1, expected Tensor"),
    ],
)
def test_conditions_that_do_not_match(uncond: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg(Denoiser(Net(), PATHS["vp"]), COND, uncond, 3.0)


def test_clip() -> None:
    out = clip(lambda x, t: x * 10, 1.0)(X, torch.tensor(0.0))
    assert out.abs().max() == 1 and torch.equal(out, (X * 10).clamp(-1, 1))


def test_inpainting_keeps_the_known_part() -> None:
    path = PATHS["vp"]
    g = torch.Generator().manual_seed(0)
    x0, mask = torch.full((2, 3, 4, 4), 0.7), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    project = inpaint(path, x0, mask, lambda like: torch.randn(like.shape, generator=g))
    grid = make_grid("trailing", path, 20)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return Mixture(path)(x, t)

    x = ddim(denoise, torch.randn(x0.shape, generator=g), grid, path=path, randn=no_noise, project=project)
    # what the network sees of the known part is x0 at the right noise level
    for t, given in zip(grid, seen, strict=False):
        known = given[..., :2]
        assert (known.mean() - path.alpha(t) * 0.7).abs() < 4 * path.sigma(t) / known.numel() ** 0.5
    assert torch.equal(project(x, grid[-1])[..., :2], x0[..., :2])
    assert torch.equal(project(x, grid[-1])[..., 2:], x[..., 2:])
