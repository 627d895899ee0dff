"""Whether a step fits a device's memory, found out by taking it; packed programs leave this out."""

import ctypes
import gc
import os
from collections.abc import Callable

import torch

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in any spelling


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch (GPU or CPU) or of Python says that memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def fits_memory(step: Callable[[], None], device: torch.device) -> bool:
    """Take a step and say whether its memory sufficed; all that it took is free again."""
    fits = True
    try:
        step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    gc.collect()  # what failed is held by the cycles between a model and its hooks
    torch.compiler.reset()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    return fits


def total_memory(device: torch.device) -> int:
    """Return a device's memory in bytes, or the machine's for a CPU; 0 where the system does not say."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not hasattr(ctypes, "windll"):
        return 0
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size, then the bytes in all
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[1]
