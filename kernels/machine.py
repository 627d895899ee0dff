"""What this machine can do: the dtype that it multiplies natively, whether torch.compile pays, its memory."""

import ctypes
import sys
from pathlib import Path

import torch


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Choose the compute dtype: auto is bfloat16 where the device multiplies it natively."""
    if requested != "auto":
        return getattr(torch, requested)
    cpu_info = Path("/proc/cpuinfo")  # torch names these capabilities differently from version to version
    flags = cpu_info.read_text().split() if cpu_info.is_file() else []
    native = device.type == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


def resolve_compile(requested: str, device: torch.device) -> bool:
    """Decide on torch.compile: auto is a GPU. On a CPU a shape compiles for a minute (dev/LOG.md)."""
    return requested == "on" or (requested == "auto" and device.type == "cuda")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: the next step's tensors then come without page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # musl has none
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
