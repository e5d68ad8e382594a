"""Linear layers by the faster of the two libraries that PyTorch has for float32 products on the CPU.

`nn.Linear` goes to MKL, which uses half of the vector width of other makers' processors with AVX-512. oneDNN, which
PyTorch's convolutions go to, uses all of it: there, and only there, products go through oneDNN, forward and backward.
"""

import functools
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # a product of fewer is bound by reading the weight, whichever library reads it


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this processor has AVX-512 that MKL makes no use of, and oneDNN does."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return cpu_vendor() not in ("", "GenuineIntel") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def cpu_vendor() -> str:
    """GenuineIntel, AuthenticAMD, ...; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: Windows names it in the processor's description
        text = f"vendor_id : {platform.processor().rpartition(' ')[2]}"
    found = re.search(r"^vendor_id\s*:\s*(\w+)", text, re.MULTILINE)
    return found[1] if found else ""


MKL_IS_SLOW = mkl_is_slow()

# torch.compile takes oneDNN's operator itself only with weights that it may copy: to it, ours is opaque
LIBRARY = torch.library.Library("ldm", "DEF")
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(LIBRARY, "linear", "CPU")
def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("ldm::linear", lib=LIBRARY)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product without its gradient."""
    return (torch.ops.ldm.linear if torch.compiler.is_compiling() else _onednn)(x, weight, bias)


class _Product(torch.autograd.Function):
    """x [..., K], weight [N, K], bias [N] or None -> [..., N], with gradients that are such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if for_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if not (MKL_IS_SLOW and _takes(x, weight)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return product(x, weight, bias)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether it is a float32 product on the CPU with enough rows, computed as it is written."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or x.dim() < 2:
        return False
    if x.shape[:-1].numel() < FEW_ROWS or x.shape[-1] != weight.shape[-1] or weight.device != x.device:
        return False  # wrong shapes are F.linear's to refuse
    return is_plain()


def is_plain() -> bool:
    """Whether this call is neither cast, exported nor transformed by `torch.func`."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)


class Packed:
    """`F.linear` of a weight that does not change any more, and GELU of its result if asked for.

    Where MKL is slow the weight is kept in oneDNN's own layout, which pays from the first row on.

    Args:
        weight, bias: [N, K], [N] or None.
        rows: of the inputs that it will be called with most.
        gelu: as torch's, exact.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = 1, gelu: bool = False) -> None:
        self.weight, self.bias, self.gelu, self.packed = weight.detach(), bias, gelu, None
        if MKL_IS_SLOW and weight.dtype == torch.float32 and weight.device.type == "cpu" and is_plain():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], without gradient."""
        if self.packed is not None and x.dtype == torch.float32 and is_plain():
            after = ("gelu", [], "none") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *after)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y
