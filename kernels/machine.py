"""What this machine can do: the dtype that it multiplies natively, and whether torch.compile pays."""

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
