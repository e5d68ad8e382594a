"""What a CPU does badly unless told otherwise: memory of freed tensors, and products in bfloat16."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 2**30, 2**25  # bytes: above it, malloc asks the system for each tensor; older glibc refuses more than 32 MiB


def keep_memory() -> bool:
    """Freed tensors stay with the program, in pages of 2 MiB, instead of being fetched anew from the system each step.

    A step of a small network on Linux takes a tenth to a quarter less. Returns whether the C library could be told;
    settings of the environment (`MALLOC_...`, `THP_MEM_ALLOC_ENABLE`) win.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first large tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None or not mallopt(M_TRIM_THRESHOLD, -1):
        return False
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)


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
