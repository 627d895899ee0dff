"""Triton kernels that cost nothing until they are launched: only then Triton is imported, and may be absent.

@jit
def double(x, size, BLOCK: tl.constexpr): ...

double[grid](x, size, BLOCK=256)
"""

import importlib
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace

from torch import Tensor

# What stands for triton.language until a kernel is launched; Triton reads annotations by their text.
tl = SimpleNamespace(constexpr="constexpr")


class Kernel:
    """A function in Triton's language, handed to Triton when it is first launched."""

    def __init__(self, function: Callable):
        self.function = function

    @cached_property
    def jitted(self):
        """Triton's own function; its module's `tl` is triton.language from here on."""
        language = importlib.import_module("triton.language")
        self.function.__globals__["tl"] = language
        return importlib.import_module("triton").jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        """Return what launches so many programs."""
        return self.jitted[grid]


def jit(function: Callable) -> Kernel:
    """Make a kernel."""
    return Kernel(function)


def last_dense(x: Tensor) -> Tensor:
    """Return x with a last stride of 1: kernels take any others."""
    return x if x.stride(-1) == 1 else x.contiguous()
