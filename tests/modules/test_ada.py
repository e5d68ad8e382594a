"""Augmentation: what each transformation does, how often, with what gradients, and how its strength adapts."""

import math

import pytest
import torch

from ldm.modules.ada import PRESETS, SYM2, SYM6, AdaptiveAugment, AugmentPipe, DiffAugment, band_filters
from ldm.modules.ada_ops import reflect_pad, shift, warp
from ldm.modules.stylegan2_ops import setup_filter

GEOM = setup_filter(SYM6)


def smooth(b=1, c=3, n=32):
    y, x = torch.meshgrid(torch.arange(n) / n, torch.arange(n) / n, indexing="ij")
    phase = torch.arange(b * c).view(b, c, 1, 1)
    return 0.5 * torch.sin(4 * x + phase) + 0.5 * torch.cos(5 * y + 2 * phase)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [SYM2, SYM6])
def test_wavelets_are_orthogonal_and_have_their_vanishing_moments(taps):
    h, n = torch.tensor(taps, dtype=torch.float64), len(taps)
    for k in range(n // 2):
        assert (h[2 * k :] * h[: n - 2 * k]).sum().item() == pytest.approx(float(k == 0), abs=1e-10)
    high = h.flip(0) * (-1.0) ** torch.arange(n)
    for moment in range(n // 2):
        assert (high * torch.arange(n, dtype=torch.float64) ** moment).sum().item() == pytest.approx(0, abs=1e-5)


def test_bands_sum_to_the_identity_and_lie_in_order():
    bands = band_filters()
    assert bands.shape == (4, 43)
    torch.testing.assert_close(bands.sum(0), (torch.arange(43) == 21).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(bands, bands.flip(1))
    response = torch.fft.rfft(bands, 256).abs()  # 0 .. pi in 129 steps
    for band, step in enumerate((0, 24, 48, 128)):
        assert response[:, step].argmax() == band and response[band, step] > 0.7


# --- moving pixels ----------------------------------------------------------------------------------------------------


def test_reflect_pad():
    x = noise(2, 3, 5, 7)
    want = torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    assert torch.equal(reflect_pad(x, 4), want)
    far = reflect_pad(torch.arange(3.0).view(1, 1, 1, 3), 5)[0, 0, 0]
    assert far.tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert torch.equal(reflect_pad(torch.ones(1, 1, 1, 1), 2), torch.ones(1, 1, 5, 5))


def test_shift():
    x = torch.arange(9.0).view(1, 1, 3, 3).repeat(2, 1, 1, 1)
    t = torch.tensor([[1, 0], [0, -2]])
    zero, mirrored = shift(x, t, False), shift(x, t, True)
    assert zero[0, 0].tolist() == [[0, 0, 1], [0, 3, 4], [0, 6, 7]]
    assert zero[1, 0].tolist() == [[6, 7, 8], [0, 0, 0], [0, 0, 0]]
    assert mirrored[0, 0].tolist() == [[1, 0, 1], [4, 3, 4], [7, 6, 7]]
    assert mirrored[1, 0].tolist() == [[6, 7, 8], [3, 4, 5], [0, 1, 2]]


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float32)[None]


def test_warp_by_the_identity_changes_nothing():
    x = noise(2, 3, 16, 12)
    torch.testing.assert_close(warp(x, torch.eye(3).expand(2, 3, 3), GEOM), x, atol=1e-4, rtol=0)


def test_warps_with_known_results():
    x = smooth()
    half_turn = warp(x, matrix([[-1, 0, 0], [0, -1, 0], [0, 0, 1]]), GEOM)
    torch.testing.assert_close(half_turn[..., 4:-4, 4:-4], x.flip((2, 3))[..., 4:-4, 4:-4], atol=5e-3, rtol=0)
    quarter = warp(x, matrix([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]), GEOM)
    same = [x.rot90(k, (2, 3))[..., 4:-4, 4:-4] for k in (1, 3)]
    assert min((quarter[..., 4:-4, 4:-4] - s).abs().max() for s in same) < 5e-3
    moved = warp(x, matrix([[1, 0, -3], [0, 1, 2], [0, 0, 1]]), GEOM)  # output pixel reads 3 further left, 2 down
    torch.testing.assert_close(moved[..., 6:-6, 6:-6], x.roll((-2, 3), (2, 3))[..., 6:-6, 6:-6], atol=5e-3, rtol=0)
    angle = math.radians(30)
    there = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    back = [[row[i] for row in there] for i in range(3)]
    again = warp(warp(x, matrix(there), GEOM), matrix(back), GEOM)
    torch.testing.assert_close(again[..., 8:-8, 8:-8], x[..., 8:-8, 8:-8], atol=1e-2, rtol=0)


# --- the pipe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    x = noise(4, 3, 16, 16)
    pipe = AugmentPipe(**PRESETS[name])
    y = pipe(x, torch.Generator().manual_seed(1))
    assert y.shape == x.shape and torch.isfinite(y).all() and not torch.allclose(y, x)
    assert torch.equal(y, pipe(x, torch.Generator().manual_seed(1)))
    pipe.p.zero_()
    assert pipe(x) is x


@pytest.mark.parametrize("name", PRESETS["bgcfnc"])
def test_each_transformation_happens_as_often_as_p_says(name):
    """With p = 0.3 and multiplier 0.5, 15 % of the images change (fewer where the drawn change is none)."""
    x = noise(1, 3, 16, 16).repeat(600, 1, 1, 1)
    pipe = AugmentPipe(**{name: 0.5}, p=0.3)
    y = pipe(x, torch.Generator().manual_seed(2))
    changed = ((y - x).abs().amax((1, 2, 3)) > 2e-4).float().mean().item()
    trivial = {"xflip": 1 / 2, "rotate90": 1 / 4, "xint": 1 / 25, "lumaflip": 1 / 2}.get(name, 0)
    expected = 0.15 * (1 - trivial)
    if name == "imgfilter":
        expected = 1 - 0.85**4  # four bands
    assert changed == pytest.approx(expected, abs=4 * math.sqrt(expected / 600))


def test_blits_only_move_pixels():
    x = noise(64, 3, 8, 8)
    y = AugmentPipe(xflip=1, rotate90=1)(x)
    assert torch.equal(y.flatten(1).sort().values, x.flatten(1).sort().values)
    found = set()
    for a, b in zip(x, y, strict=True):
        for flip in (0, 1):
            base = a.flip(2) if flip else a
            found |= {(flip, k) for k in range(4) if torch.equal(base.rot90(k, (1, 2)), b)}
    assert len(found) == 8
    moved = AugmentPipe(xint=1, xint_max=0.5)(x)
    assert torch.isin(moved, x).all()


def test_colours():
    x = noise(200, 3, 4, 4)
    grey = x.mean(1)
    y = AugmentPipe(brightness=1, brightness_std=0.3)(x)
    offset = (y - x).flatten(1)
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), atol=1e-5, rtol=0)
    assert 0.25 < offset[:, 0].std() < 0.35
    y = AugmentPipe(contrast=1)(x)
    factor = (y / x).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), atol=1e-3, rtol=1e-3)
    assert 0.4 < factor[:, 0].log2().std() < 0.6
    y = AugmentPipe(lumaflip=1)(x)
    flipped = (y - x).abs().amax((1, 2, 3)) > 1e-5
    torch.testing.assert_close(y[flipped].mean(1), -grey[flipped], atol=1e-5, rtol=0)
    for name in ("hue", "saturation"):  # both keep the grey value; hue keeps the distance from it as well
        y = AugmentPipe(**{name: 1})(x)
        torch.testing.assert_close(y.mean(1), grey, atol=1e-5, rtol=0)
        far = [(v - v.mean(1, keepdim=True)).square().sum(1).sqrt() for v in (x, y)]
        ratio = far[1] / far[0]
        torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), atol=1e-3, rtol=1e-2)
        assert (ratio.std() < 1e-3) == (name == "hue")


def test_grey_images_stay_as_they_would_in_colour():
    x = noise(50, 1, 4, 4)
    kinds = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
    y = AugmentPipe(**kinds)(x, torch.Generator().manual_seed(3))
    colour = AugmentPipe(**kinds)(x.repeat(1, 3, 1, 1), torch.Generator().manual_seed(3))
    torch.testing.assert_close(colour, y.repeat(1, 3, 1, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="got 2 channels, expected 1 or 3"):
        AugmentPipe(hue=1)(noise(1, 2, 4, 4))


def test_image_filter_keeps_constants_in_proportion_and_the_power_of_its_model():
    flat = torch.ones(300, 1, 8, 8)
    y = AugmentPipe(imgfilter=1)(flat)
    spread = y.amax((1, 2, 3)) - y.amin((1, 2, 3))
    assert spread.max() < 1e-3 * y.abs().max()  # the bands above see nothing of a constant
    only = AugmentPipe(imgfilter=1, imgfilter_bands=(0, 0, 0, 1))(flat)
    assert (only <= math.sqrt(13 / 10) ** 2 + 1e-4).all() and only.std() > 0.01
    with pytest.raises(ValueError, match="imgfilter_bands: got 3 numbers"):
        AugmentPipe(imgfilter_bands=(1, 1, 1))


def test_noise_and_cutout():
    x = torch.ones(500, 1, 16, 16)
    y = AugmentPipe(noise=1, noise_std=0.2)(x)
    assert (y - x).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)
    y = AugmentPipe(cutout=1, cutout_size=0.5)(x)
    share = (y == 0).float().mean((1, 2, 3))
    # the square's centre is anywhere, so its sides are cut at the border: E = (0.5 - 0.5^2 / 4)^2
    assert share.max() == 0.25 and share.mean().item() == pytest.approx((0.5 - 0.0625) ** 2, abs=0.01)
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_gradients_of_first_and_second_order():
    x = noise(2, 3, 6, 6).double().requires_grad_()
    pipe, g = AugmentPipe(**PRESETS["bgcfnc"]), torch.Generator()
    fn = lambda x: pipe(x, g.manual_seed(5))  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, (x,), fast_mode=True)
    cubed = fn(x).pow(3).sum()
    (first,) = torch.autograd.grad(cubed, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().sum() > 0  # what R1 of augmented images needs


def test_the_pipe_checks_its_input():
    with pytest.raises(ValueError, match="scale: got -1"):
        AugmentPipe(scale=-1)
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\]"):
        AugmentPipe(xflip=1)(noise(3, 4, 4))
    with pytest.raises(ValueError, match="rotate90: got 4x6 images"):
        AugmentPipe(rotate90=1)(noise(1, 3, 4, 6))
    assert set(AugmentPipe().state_dict()) == {"p", "Hz_geom", "Hz_fbank"}


# --- adaptive strength ------------------------------------------------------------------------------------------------


def test_p_follows_the_signs_of_real_logits():
    ada = AdaptiveAugment(AugmentPipe(xflip=1), target=0.6, interval=4, kimg=1)
    assert ada.pipe.p == 0
    sure, unsure = torch.full((50, 1), 2.0), torch.tensor([[1.0], [-1.0]] * 25)
    for step in range(8):
        ada.observe(sure)
        assert ada.pipe.p.item() == pytest.approx(0.2 * ((step + 1) // 4))  # 200 images of 1,000 per adjustment
    assert ada.r == 1
    for _ in range(4):
        ada.observe(unsure)
    assert ada.r == 0 and ada.pipe.p.item() == pytest.approx(0.2)
    for _ in range(8):
        ada.observe(unsure)
    assert ada.pipe.p == 0  # never below
    for _ in range(40):
        ada.observe(sure)
    assert ada.pipe.p == 1  # nor above
    with pytest.raises(ValueError, match="interval 0"):
        AdaptiveAugment(AugmentPipe(), interval=0)


def test_adaptation_resumes_where_it_was():
    def run(ada, n):
        for i in range(n):
            ada.observe(torch.full((10, 1), 1.0 if i % 3 else -1.0))

    whole, first, second = (AdaptiveAugment(AugmentPipe(xflip=1), interval=4, kimg=0.1, target=0.1) for _ in range(3))
    run(whole, 6)
    run(first, 6)
    second.load_state_dict(first.state_dict())
    run(whole, 5)
    run(second, 5)
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


# --- DiffAugment ------------------------------------------------------------------------------------------------------


def test_diff_augment():
    x = torch.ones(400, 3, 16, 16)
    y = DiffAugment("translation")(x, torch.Generator().manual_seed(0))
    missing = (y == 0).float()
    assert missing.mean() > 0.05
    empty_columns = missing.amin((1, 2)).sum(1)
    assert empty_columns.max() == 2  # an eighth of 16
    y = DiffAugment("cutout")(x)
    assert (y == 0).float().mean((1, 2, 3)).max() == 0.25
    y = DiffAugment("color")(torch.zeros(400, 3, 4, 4))
    assert y.min() >= -0.5 and y.max() <= 0.5 and y.std() > 0.2
    grey = noise(50, 1, 4, 4).repeat(1, 3, 1, 1)
    y = DiffAugment("color")(grey)
    torch.testing.assert_close(y[:, :1].expand_as(y), y, atol=1e-5, rtol=0)  # saturation does nothing to grey
    assert DiffAugment("")(x) is x
    with pytest.raises(ValueError, match="got 'rotation', expected any of color, translation, cutout"):
        DiffAugment("color,rotation")


def test_diff_augment_has_gradients():
    x = noise(2, 3, 8, 8).double().requires_grad_()
    augment, g = DiffAugment(), torch.Generator()
    assert torch.autograd.gradcheck(lambda x: augment(x, g.manual_seed(1)), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, g.manual_seed(1)), (x,), fast_mode=True)
