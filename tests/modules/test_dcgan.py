"""The first GANs' networks: shapes, sizes stated by others, conditions, normalisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.dcgan import (
    ClassEmbedding,
    ConditionalBatchNorm2d,
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
)

GENERATORS = {
    "mlp": lambda **k: MLPGenerator(z_dim=6, img_resolution=8, img_channels=1, hidden=(8, 16), **k),
    "dcgan": lambda **k: DCGANGenerator(z_dim=6, img_resolution=16, img_channels=3, channels=4, **k),
    "dcgan-bn": lambda **k: DCGANGenerator(
        z_dim=6, img_resolution=16, img_channels=3, channels=4, conditioning="batchnorm", **k
    ),
}
DISCRIMINATORS = {
    "mlp": lambda **k: MLPDiscriminator(img_resolution=16, img_channels=3, hidden=(16, 8), **k),
    "concat": lambda **k: DCGANDiscriminator(img_resolution=16, channels=4, norm="none", **k),
    "projection": lambda **k: DCGANDiscriminator(
        img_resolution=16, channels=4, norm="none", conditioning="projection", **k
    ),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_mlp_gan_has_the_size_of_the_classic():
    assert count(MLPGenerator()) == 1_510_032 and count(MLPDiscriminator()) == 533_505


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_generators(name, c_dim):
    torch.manual_seed(0)
    g = GENERATORS[name](c_dim=c_dim)
    z, c = torch.randn(1, 6).repeat(4, 1), torch.tensor([0, 1, 2, 2])
    img = g(z, c).detach()
    assert img.shape == (4, g.img_channels, g.img_resolution, g.img_resolution) and img.abs().max() <= 1
    assert (g.z_dim, g.c_dim) == (6, c_dim)
    g.eval()
    for m in g.modules():  # so that the classes differ before any training
        if isinstance(m, ConditionalBatchNorm2d):
            nn.init.normal_(m.gain.weight)
    img = g(z, c)
    alone = [g(z[i : i + 1], c[i : i + 1]) for i in range(4)]  # some kernels round by the row of the batch
    assert torch.equal(alone[2], alone[3]) and (torch.equal(alone[0], alone[1]) == (c_dim == 0))
    if c_dim:
        torch.testing.assert_close(g(z, F.one_hot(c, 3).float()), img)
        for bad in (None, torch.zeros(4, 2), torch.zeros(4, 1, 1)):
            with pytest.raises(ValueError, match=r"expected classes \[B\] or one-hot \[B, 3\]"):
                g(z, bad)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_discriminators(name, c_dim):
    torch.manual_seed(0)
    d = DISCRIMINATORS[name](c_dim=c_dim)
    img, c = torch.randn(1, 3, 16, 16).repeat(4, 1, 1, 1), torch.tensor([0, 1, 2, 2])
    logits = d(img, c)
    assert logits.shape == (4, 1)
    torch.testing.assert_close(logits[2], logits[3])
    assert torch.allclose(logits[0], logits[1], atol=1e-6) == (c_dim == 0)
    if c_dim:
        torch.testing.assert_close(d(img, F.one_hot(c, 3).float()), logits)


def test_projection_is_an_inner_product_with_the_features():
    d = DISCRIMINATORS["projection"](c_dim=3)
    img = torch.randn(2, 3, 16, 16)
    h = d.features(img)
    a, b = (d(img, torch.full((2,), c)) for c in (0, 2))
    want = h.sum((2, 3)) @ (d.embed.weight[0] - d.embed.weight[2]) / h.shape[1] ** 0.5
    torch.testing.assert_close((a - b)[:, 0], want)


def test_auxiliary_classifier():
    d = DCGANDiscriminator(img_resolution=16, channels=4, c_dim=3, conditioning="auxiliary", norm="none")
    img = torch.randn(4, 3, 16, 16)
    logits, classes = d.with_classes(img)
    assert classes.shape == (4, 3)
    torch.testing.assert_close(d(img), logits)
    torch.testing.assert_close(d(img, torch.zeros(4, dtype=torch.long)), logits)
    with pytest.raises(ValueError, match="expected 'auxiliary'"):
        DISCRIMINATORS["concat"](c_dim=3).with_classes(img)


@pytest.mark.parametrize("make", ["mlp", "dcgan", "projection"])
def test_spectral_normalisation_makes_every_layer_one_lipschitz(make):
    torch.manual_seed(0)
    if make == "mlp":
        d = MLPDiscriminator(img_resolution=8, img_channels=1, hidden=(16, 8), spectral=True)
    else:
        kind = "concat" if make == "dcgan" else make
        d = DCGANDiscriminator(img_resolution=16, channels=4, c_dim=3, norm="spectral", conditioning=kind)
    img = torch.randn(2, d.img_channels, d.img_resolution, d.img_resolution)
    for _ in range(50):  # one step of power iteration each
        d(img, torch.tensor([0, 1]))
    d.eval()
    normed = [m for m in d.modules() if hasattr(m, "parametrizations")]
    assert len(normed) == {"mlp": 3, "dcgan": 3, "projection": 4}[make]
    for m in normed:
        assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.01)
    if make == "mlp":  # and so is the whole
        other = torch.randn_like(img)
        assert (d(img) - d(other)).abs().max() <= 1.05 * (img - other).flatten(1).norm(dim=1).max()


@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "none", "spectral"])
def test_norms(norm):
    torch.manual_seed(0)
    d = DCGANDiscriminator(img_resolution=16, channels=4, norm=norm)
    img = torch.randn(4, 3, 16, 16)
    other = torch.cat([img[:1], torch.randn(3, 3, 16, 16)])
    d(img)  # settles spectral norm's first iteration
    coupled = not torch.allclose(d(img)[0], d(other)[0], atol=1e-3 if norm == "spectral" else 1e-5)
    assert coupled == (norm == "batch")
    kinds = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "layer": nn.GroupNorm}
    assert [type(m) for m in d.modules() if isinstance(m, tuple(kinds.values()))] == (
        [kinds[norm]] if norm in kinds else []
    )


def test_dcgan_layers_are_those_of_the_paper():
    g, d = DCGANGenerator(img_resolution=64), DCGANDiscriminator(img_resolution=64)
    assert [c.out_channels for c in g.convs] == [512, 256, 128, 64] and g.out.out_channels == 3
    assert [m.out_channels for m in d.features if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512]
    assert max(c.out_channels for c in DCGANGenerator(img_resolution=64, max_channels=100).convs) == 100
    assert 0.019 < g.convs[1].weight.std() < 0.021 and 0.019 < d.features[2].weight.std() < 0.021


def test_one_step_of_the_game():
    torch.manual_seed(0)
    g, d = DCGANGenerator(z_dim=6, img_resolution=8, channels=4), DCGANDiscriminator(8, channels=4, dropout=0.2)
    F.softplus(-d(g(torch.randn(4, 6)))).mean().backward()
    assert all(p.grad is not None for p in [*g.parameters(), *d.parameters()])
    assert any(isinstance(m, nn.Dropout2d) for m in d.modules())
    assert any(isinstance(m, nn.Dropout) for m in MLPDiscriminator(dropout=0.3).modules())


def test_faults():
    with pytest.raises(ValueError, match="img_resolution: got 28, expected a power of two"):
        DCGANGenerator(img_resolution=28)
    with pytest.raises(ValueError, match="conditioning: got 'add'"):
        DCGANDiscriminator(c_dim=3, conditioning="add")
    with pytest.raises(ValueError, match="conditioning: got 'projection', expected one of concat, batchnorm"):
        DCGANGenerator(c_dim=3, conditioning="projection")
    with pytest.raises(ValueError, match="norm: got 'group'"):
        DCGANDiscriminator(norm="group")
    assert ClassEmbedding(3, 5)(torch.tensor([0, 2])).shape == (2, 5)
