"""Products in bfloat16 on processors that are slow at them."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def multiplies_bfloat16() -> bool:
    """False for an x86 processor without AVX-512, on which bfloat16 takes about nine times as long as float32."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Float32(TorchFunctionMode):
    """Within it, tensors that would become bfloat16 become float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)  # a copy, as the callers write into it
        if kwargs.get("dtype") is torch.bfloat16:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)
