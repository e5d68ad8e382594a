"""Linear layers through oneDNN: the numbers and gradients of `F.linear`, and where they stay with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules import matmul
from ldm.modules.matmul import Linear, Packed, linear

pytestmark = pytest.mark.smoke
HAS_ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor that MKL is slow on; counts the products that went through oneDNN."""
    calls, product = [], matmul.product

    def counted(*args: Tensor) -> Tensor:
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(matmul, "MKL_IS_SLOW", HAS_ONEDNN)
    monkeypatch.setattr(matmul, "product", counted)
    return calls


def tensors(*shape: int, out: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (shape, (out, shape[-1]), (out,))
    return tuple(torch.randn(s, requires_grad=True) for s in shapes)


def double(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_() for t in given)


@pytest.mark.parametrize("shape", [(8, 40), (2, 9, 40), (2, 3, 5, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(onednn, shape, bias):
    leaves = tensors(*shape)[: 3 if bias else 2]
    exact = double(*leaves)
    y, expected = linear(*leaves), F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)
    for g, e in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)
    assert len(onednn) == (3 if HAS_ONEDNN else 0)
    with torch.inference_mode():
        torch.testing.assert_close(linear(*leaves).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_gradient(onednn):
    def penalty(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(linear(x, w, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().mean(), w)[0]

    leaves = tensors(10, 40)
    torch.testing.assert_close(penalty(*leaves).double(), penalty(*double(*leaves)), rtol=1e-5, atol=1e-5)


def test_any_strides(onednn):
    _, w, b = (t.detach() for t in tensors(10, 40))
    wide = torch.randn(2, 40, 6, 6)
    for x in (wide.permute(0, 2, 3, 1), torch.randn(20, 80)[:, ::2], torch.randn(1, 40).expand(9, 40)):
        torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b), rtol=1e-5, atol=1e-5)
    x, columns = torch.randn(9, 40), torch.randn(40, 24).t()
    torch.testing.assert_close(linear(x, columns, b), F.linear(x, columns, b), rtol=1e-5, atol=1e-5)
    assert len(onednn) == (4 if HAS_ONEDNN else 0)


def test_frozen_weights_get_no_gradient(onednn):
    x, w, b = tensors(10, 40)
    linear(x, w.detach(), b.detach()).sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
    assert len(onednn) == (2 if HAS_ONEDNN else 0)


def test_stays_with_pytorch(onednn):
    """Few rows, other dtypes, autocast, vmap, tracing; and its errors are those of `F.linear`."""
    x, w, b = (t.detach() for t in tensors(10, 40))
    linear(x[:7], w, b), linear(x[0], w, b)
    assert linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    batched = torch.func.vmap(lambda row: linear(row, w, b))(x.expand(3, 10, 40))
    torch.testing.assert_close(batched[0], F.linear(x, w, b))
    layer = Linear(40, 24)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, torch.randn(24, 39))
    assert onednn == []


def test_is_a_linear_layer():
    """Same keys, same initial weights for the same seed."""
    layers = []
    for cls in (Linear, nn.Linear):
        torch.manual_seed(5)
        layers.append(cls(6, 4))
    assert isinstance(layers[0], nn.Linear)
    ours, theirs = (layer.state_dict() for layer in layers)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("capability", "vendor", "slow"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_which_processor(monkeypatch, capability, vendor, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "cpu_vendor", lambda: vendor)
    assert matmul.mkl_is_slow.__wrapped__() is (slow and HAS_ONEDNN)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (3, 1, 40), (2, 9, 40)])
def test_packed_weights_give_the_same(monkeypatch, slow, gelu, shape):
    monkeypatch.setattr(matmul, "MKL_IS_SLOW", slow and HAS_ONEDNN)
    x, w, b = (t.detach() for t in tensors(*shape))
    packed = Packed(w, b, rows=shape[0], gelu=gelu)
    assert (packed.packed is not None) == (slow and HAS_ONEDNN)
    want = F.linear(x.double(), w.double(), b.double())
    want = (F.gelu(want) if gelu else want).float()
    torch.testing.assert_close(packed(x), want, rtol=1e-5, atol=1e-5)
    assert Packed(w, None)(x).shape == want.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    doubled = Packed(w.double(), b.double(), gelu=gelu)
    assert doubled.packed is None and doubled(x.double()).dtype == torch.float64
