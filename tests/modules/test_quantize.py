"""Codebooks: official numbers, gradients and inverses."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.modules.quantize import (
    FSQ,
    EMAVectorQuantizer,
    GumbelQuantize,
    LookupFreeQuantizer,
    VectorQuantizer2,
    nearest_code,
)
from ldm.util import get_obj_from_str
from tests.reference import compare, filler

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "tag, params",
    [
        ("legacy", {}),
        ("not_legacy", {"legacy": False}),
        ("sane", {"sane_index_shape": True}),
        ("remap_extra", {"remap": True, "unknown_index": "extra"}),
        ("remap_0_sane", {"remap": True, "unknown_index": 0, "sane_index_shape": True}),
    ],
)
def test_vector_quantizer2_is_the_official_one(tag, params, tmp_path):
    fx = compare.load(FIXTURES / "vector_quantizer2.json")
    if params.get("remap"):
        np.save(tmp_path / "used.npy", np.array(fx["used"]))
        params = {**params, "remap": str(tmp_path / "used.npy")}
    model = get_obj_from_str(fx["target"])(**fx["params"], **params)
    filler.fill(model, fx["seed"])
    x = compare.inputs(fx)
    z = x["z"].clone().requires_grad_(True)
    quant, loss, (_, _, indices) = model(z)
    (loss + (quant**2).mean()).backward()
    outs = {
        "quant": quant,
        "loss": loss,
        "indices": indices,
        "grad_z": z.grad,
        "grad_embedding": model.embedding.weight.grad,
    }
    if f"{tag}.codebook_entry" in fx["outputs"]:
        entry = x["indices"]
        if params.get("unknown_index") == "extra":
            entry = entry.clamp(max=len(fx["used"]))
        outs["codebook_entry"] = model.get_codebook_entry(entry, (2, 6, 6, 4))
    outs = {f"{tag}.{k}": v for k, v in outs.items()}
    assert set(outs) == {k for k in fx["outputs"] if k.startswith(f"{tag}.")}
    assert compare.check(fx, outs) == []


def test_codes_come_back_from_their_indices():
    torch.manual_seed(0)
    model = VectorQuantizer2(16, 4, beta=0.25, sane_index_shape=True)
    quant, _, (_, _, indices) = model(torch.randn(2, 4, 3, 5))
    assert torch.allclose(model.get_codebook_entry(indices, (2, 3, 5, 4)), quant)
    assert indices.shape == (2, 3, 5)


def test_unknown_codes_get_a_random_known_number(tmp_path):
    np.save(tmp_path / "used.npy", np.array([3, 5, 7]))
    model = VectorQuantizer2(16, 4, beta=0.25, remap=str(tmp_path / "used.npy"))
    new = model.remap_to_used(torch.arange(16).reshape(2, 8))
    assert new[0, 3] == 0 and new[0, 5] == 1 and new[0, 7] == 2
    assert set(new.flatten().tolist()) <= {0, 1, 2}
    assert model.unmap_to_all(torch.tensor([[0, 2]])).tolist() == [[3, 7]]


def test_nearest_code_is_exact_under_autocast():
    torch.manual_seed(0)
    codebook = torch.randn(64, 4) * 0.1 + 1.0  # too close together for bfloat16
    z = codebook[torch.randint(64, (32,))]
    exact = torch.cdist(z.double(), codebook.double()).argmin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), exact)


def test_gradient_goes_straight_through():
    model = VectorQuantizer2(8, 2, beta=0.25)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    quant, _, _ = model(z)
    (grad,) = torch.autograd.grad((quant * 3).sum(), z)
    assert torch.equal(grad, torch.full_like(grad, 3.0))


def test_wrong_options():
    with pytest.raises(ValueError, match="expected none of them"):
        VectorQuantizer2(8, 2, beta=0.25)(torch.zeros(1, 2, 2, 2), temp=0.5)


# --- the other codebooks ----------------------------------------------------------------------------------------------


def clusters(n=200):
    """Vectors around four points, and the exact means of the four groups."""
    centres = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]])
    group = torch.arange(n) % 4
    z = centres[group] + 0.1 * torch.randn(n, 2)
    means = torch.stack([z[group == g].mean(0) for g in range(4)])
    return z.t()[None, :, None], centres, means  # [1, 2, 1, n]


def test_ema_codebook_is_the_exact_mean_on_a_fixed_batch():
    torch.manual_seed(0)
    z, centres, means = clusters()
    model = EMAVectorQuantizer(4, 2, decay=0.9)
    model.embedding.weight.copy_(centres + 0.3)
    for _ in range(200):
        model(z)
    assert torch.allclose(model.embedding.weight, means, atol=1e-4)
    # with no memory, after a single batch
    model = EMAVectorQuantizer(4, 2, decay=0.0)
    model.embedding.weight.copy_(centres + 0.3)
    quant, loss, (perplexity, _, indices) = model(z)
    assert torch.allclose(model.embedding.weight, means, atol=1e-5)
    assert float(perplexity) == pytest.approx(4.0, rel=1e-3)
    assert not list(model.parameters())  # no optimiser moves it


def test_ema_codebook_learns_only_in_training_and_with_gradients():
    model = EMAVectorQuantizer(4, 2)
    before = model.embedding.weight.clone()
    with torch.no_grad():
        model(torch.randn(1, 2, 4, 4))
    model.eval()(torch.randn(1, 2, 4, 4))
    assert torch.equal(model.embedding.weight, before)
    model.train()(torch.randn(1, 2, 4, 4))
    assert not torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("restart", [0.0, 0.9])
def test_dead_codes_are_put_on_vectors_of_the_batch(restart):
    torch.manual_seed(0)
    z, _, _ = clusters()
    model = EMAVectorQuantizer(4, 2, decay=0.5, restart=restart)
    model.embedding.weight[1:] = 100.0  # three codes that nothing is near to
    model.embedding.embed_avg[1:] = 100.0
    model(z)  # their running counts fall from 1 to 0.5
    distance = torch.cdist(model.embedding.weight[1:], z[0, :, 0].t()).min(1).values
    assert ((distance == 0) == (restart > 0)).all()
    for _ in range(20):
        _, _, (_, _, indices) = model(z)
    assert len(indices.unique()) == 4 or restart == 0


def test_gumbel_temperature_limits():
    torch.manual_seed(0)
    model = GumbelQuantize(8, 4, n_embed=16, straight_through=False)
    z = torch.randn(2, 8, 3, 3)
    # cold: one code, and over many draws each as often as its probability (the Gumbel-max trick)
    logits = model.proj(z)[:1, :, :1, :1]
    draws = torch.stack([F.gumbel_softmax(logits.flatten(), tau=1e-3, dim=0) for _ in range(4000)])
    assert float(draws.max(1).values.mean()) > 0.99
    assert (draws.mean(0) - logits.flatten().softmax(0)).abs().max() < 0.03
    cold = model(z, temp=1e-4)[0].permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.cdist(cold, model.embed.weight).min(1).values.max() < 1e-2
    # hot: the mean of all codes
    hot = model(z, temp=1e6)[0]
    assert torch.allclose(hot, model.embed.weight.mean(0)[None, :, None, None].expand_as(hot), atol=1e-4)
    # evaluation: the most probable code, twice the same
    quant, _, (_, _, indices) = model.eval()(z)
    assert torch.equal(indices, model.proj(z).argmax(1))
    assert torch.equal(quant, model(z)[0])
    assert torch.allclose(model.get_codebook_entry(indices, (2, 3, 3, 4)), quant, atol=1e-6)


def test_gumbel_loss_is_the_distance_from_uniform():
    model = GumbelQuantize(8, 4, n_embed=16, kl_weight=2.0)
    z = torch.randn(2, 8, 3, 3)
    q = torch.distributions.Categorical(logits=model.proj(z).movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(16))
    expected = 2.0 * torch.distributions.kl_divergence(q, uniform.expand((2, 3, 3))).mean()
    assert torch.allclose(model(z)[1], expected, atol=1e-5)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 2), (4, 4, 7)])
def test_fsq_reaches_all_its_codes_and_no_others(levels):
    torch.manual_seed(0)
    model = FSQ(levels)
    z = (1.5 * torch.randn(1, len(levels), 300, 200)).requires_grad_(True)
    quant, loss, (_, _, indices) = model(z)
    assert quant.abs().max() <= 1 and float(loss) == 0.0
    for c, n in enumerate(levels):
        assert len(quant[:, c].unique()) == n
    assert sorted(indices.unique().tolist()) == list(range(model.n_e))
    assert torch.allclose(model.get_codebook_entry(indices, (1, 300, 200, len(levels))), quant, atol=1e-6)
    quant.sum().backward()
    assert float(z.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="expected 7 of 2"):
        FSQ((3, 2), n_e=7, e_dim=2)


def test_lookup_free_quantizer():
    torch.manual_seed(0)
    model = LookupFreeQuantizer(64, 6)
    z = torch.randn(2, 6, 8, 8, requires_grad=True)
    quant, loss, (_, _, indices) = model(z)
    assert torch.equal(quant, z.sign()) and int(indices.max()) < 64
    assert torch.equal(model.get_codebook_entry(indices, (2, 8, 8, 6)), quant.detach())
    loss.backward()
    assert z.grad.isfinite().all()
    # the factorised entropy against the sum over all codes
    flat = torch.randn(10, 6)
    each, mean = model.entropies(flat)
    p = (-(torch.cdist(flat, model.codes) ** 2)).softmax(1)
    assert torch.allclose(each, -(p * p.log()).sum(1).mean(), rtol=1e-4)
    assert torch.allclose(mean, -(p.mean(0) * p.mean(0).log()).sum(), rtol=1e-4)
    with pytest.raises(ValueError, match="expected 2\\^e_dim = 64"):
        LookupFreeQuantizer(60, 6)
