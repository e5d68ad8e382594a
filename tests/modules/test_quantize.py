"""Codebooks: official numbers, gradients and inverses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.modules.quantize import VectorQuantizer2, nearest_code
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
