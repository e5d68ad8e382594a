"""ldm.modules.classifiers.packed: convolutions of images side by side."""

import pytest
import torch
from torch import nn

from ldm.modules.classifiers import packed


@pytest.mark.parametrize("batch, kernel, size", [(6, 3, 4), (7, 3, 2), (4, 5, 3), (3, 1, 3)])
def test_gradients_are_those_of_the_convolution(batch, kernel, size):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size + 1, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed.Packed.apply, (x, weight))
    out = packed.Packed.apply(x, weight)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, weight, padding=kernel // 2))


def test_as_many_images_in_a_row_as_fit_and_divide_the_batch():
    assert packed.together(torch.Size([500, 8, 7, 7]), 1) == 4
    assert packed.together(torch.Size([500, 8, 3, 3]), 1) == 20
    assert packed.together(torch.Size([7, 8, 3, 3]), 1) == 7
    assert packed.together(torch.Size([131, 8, 7, 7]), 1) == 1
    x = torch.arange(1, 9.0).view(2, 1, 2, 2)
    assert packed.packed(x, 2, 1).tolist() == [[[[1, 2, 0, 5, 6, 0], [3, 4, 0, 7, 8, 0]]]]
    x = torch.randn(6, 4, 3, 2)
    assert torch.equal(packed.unpacked(packed.packed(x, 3, 2), 3, 2), x)


@pytest.fixture
def calls(monkeypatch):
    """Each packing, on a processor that is said to have AMX."""
    seen, function = [], packed.packed
    monkeypatch.setattr(packed, "AMX", True)
    monkeypatch.setattr(packed, "packed", lambda *args: seen.append(args) or function(*args))
    return seen


def gradients(conv, x, enabled=True):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        (conv(x).float() ** 2).mean().backward()
    return x.grad, conv.weight.grad


def test_small_maps_in_bfloat16_are_packed(calls):
    torch.manual_seed(0)
    conv = packed.PackedConv2d(16, 8)
    plain = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(8, 16, 7, 7)
    ours, theirs = gradients(conv, x), gradients(plain, x)
    assert len(calls) == 2 and ours[1].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01 * float(b.abs().max()))


def test_nothing_else_is_packed(calls, monkeypatch):
    conv = packed.PackedConv2d(4, 4)
    gradients(conv, torch.randn(4, 4, 9, 9))  # large
    gradients(conv, torch.randn(5, 4, 7, 7))  # five images make no rows of two to four
    gradients(conv, torch.randn(4, 4, 7, 7), enabled=False)  # float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        conv(torch.randn(4, 4, 7, 7))
    monkeypatch.setattr(packed, "AMX", False)
    gradients(conv, torch.randn(4, 4, 7, 7))
    conv.bias = nn.Parameter(torch.ones(4))  # a batch norm was folded into it
    monkeypatch.setattr(packed, "AMX", True)
    with torch.autocast("cpu", torch.bfloat16):
        difference = conv(torch.zeros(4, 4, 7, 7))
    assert not calls and difference.min() == 1
