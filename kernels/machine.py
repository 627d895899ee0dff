"""What this machine can do: devices and their memory, dtypes, and whether torch.compile pays."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._triton import has_triton

from common import UserError

# Kinds of GPU, and which functions of torch.<kind> tell the most bytes of tensors and the most bytes held.
# Torch calls AMD's GPUs (ROCm) cuda, too. Apple's keep no peak: theirs are those of the moment.
ACCELERATORS = {
    "cuda": ("max_memory_allocated", "max_memory_reserved"),
    "xpu": ("max_memory_allocated", "max_memory_reserved"),
    "mps": ("current_allocated_memory", "driver_allocated_memory"),
}


def resolve_device(requested: str, index: int = 0) -> torch.device:
    """Choose the device of the process that is number `index` on its machine, and make it the current one.

    auto is the accelerator of this torch, or the CPU without one of a kind that we know.
    """
    found = torch.accelerator.current_accelerator(True)  # one that is there
    kind = found.type if found and found.type in ACCELERATORS else "cpu"
    requested = kind if requested == "auto" else requested
    if requested == "cpu":
        return torch.device("cpu")
    if requested != kind:
        raise UserError(
            f"run.device={requested}: expected such a device, found {kind}. Use run.device=auto or {kind}; "
            "`make doctor` says what this torch can use."
        )
    count = torch.accelerator.device_count()
    if index >= count:
        raise UserError(
            f"expected a GPU for each process, found {count} for local rank {index}. Lower --nproc_per_node."
        )
    torch.accelerator.set_device_index(index)
    torch.set_float32_matmul_precision("high")  # TF32 where products are float32: Gram matrices, heads
    return torch.device(kind, index)


def hidden_gpus(chosen: str) -> list[str]:
    """Say where CUDA_VISIBLE_DEVICES, `chosen`, leaves a torch for GPUs without any."""
    if chosen in ("", "-1") or not torch.version.cuda or torch.cuda.is_available():
        return []
    return [f"CUDA_VISIBLE_DEVICES={chosen:.40} leaves no GPU: what follows computes on the CPU"]


PINNING = {"cuda"}  # devices that copy from locked memory while the CPU goes on


def copy_to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy an array to a device, where it can be without waiting for what the device has to do before."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type in PINNING:
        return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps it until it is copied
    return tensor.to(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively: NVIDIA's do from capability 8 on.

    Apple's do wherever torch takes them: from macOS 14 on.
    """
    if device.type != "cpu":
        return device.type == "mps" or torch.get_device_module(device).is_bf16_supported(False)
    cpu_info = Path("/proc/cpuinfo")  # torch names these capabilities differently from version to version
    flags = cpu_info.read_text().split() if cpu_info.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of exact sums: float64 unless the device has none (Apple's, some of Intel's)."""
    small = device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if small or device.type == "mps" else torch.float64


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Choose the compute dtype: auto is bfloat16 where it is native, else float32.

    Never float16, whose gradients vanish unless the loss is scaled.
    """
    if requested != "auto":
        return getattr(torch, requested)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def resolve_compile(requested: str, device: torch.device) -> bool:
    """Decide on torch.compile: auto is a GPU with Triton; on a CPU a shape takes a minute (dev/LOG.md)."""
    return requested == "on" or (requested == "auto" and device.type != "cpu" and has_triton())


def check_device(cfg, device: torch.device) -> None:
    """Raise where a device cannot do what a recipe asks for."""
    if cfg.model.compute_dtype == "float64" and wide_dtype(device) != torch.float64:
        raise UserError(
            f"model.compute_dtype=float64: expected a dtype that this {device.type} has. Use float32."
        )
    if cfg.run.compile == "on" and device.type != "cpu" and not has_triton():
        raise UserError(
            "run.compile=on: expected a GPU and a package triton that makes kernels for it, found none. "
            "Use run.compile=auto or off."
        )


def why_float32(requested: str, device: torch.device) -> str:
    """Say for the log why auto computes in float32; empty where it does not."""
    slow = requested == "auto" and not has_bfloat16(device)
    return f" (this {device.type} has no native bfloat16)" if slow else ""


def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Return an NVIDIA GPU's compute capability; (0, 0) for others: AMD's count in numbers of their own."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Say what a run computes on, as far as its speed and its rounding depend on it; names no host."""
    cpu_info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpu_info.read_text() if cpu_info.is_file() else "")
    cpu = found[1] if found else platform.processor() or platform.machine()
    name = device.type
    if name in ACCELERATORS and name != "mps":
        name = torch.get_device_module(device).get_device_properties(device).name
    return {
        "device": name,
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Return the most bytes in use and held so far: the device's, or for a CPU twice the process's.

    0 where the system does not say (Windows).
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return tuple(getattr(module, name)() for name in ACCELERATORS[device.type])
    try:
        import resource
    except ImportError:
        return 0, 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak << 10,) * 2  # Linux counts KiB, macOS bytes


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: the next step's tensors then come without page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # musl has none
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
