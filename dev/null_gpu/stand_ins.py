"""What stands in for Triton in a process on the null GPU: kernels are counted with their bytes, not compiled.

Inductor hands each generated kernel's source to AsyncCompile.triton and calls run(*arguments) on what that
returns; a kernel of ours is called through JITFunction.run. Here both only look at their arguments.
"""

import ctypes
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def parameter_names(name: str, source: str) -> list[str]:
    """Return the parameters of a generated kernel by its source."""
    found = re.search(rf"^def {re.escape(name)}\(([^)]*)\)", source, re.MULTILINE)
    if not found:
        raise ValueError(f"{name}: expected its definition in the generated source")
    return [part.partition(":")[0].strip() for part in found[1].split(",")]


def bytes_moved(parameters: Sequence[str], arguments: Sequence) -> int:
    """Sum up the bytes of the tensors that a kernel is given; what is read and written counts twice.

    An upper bound where a kernel reads a part of a tensor, a lower one where it reads something twice.
    """
    total = 0
    for name, value in zip(parameters, arguments):
        if isinstance(value, Tensor):
            times = 2 if name.startswith("in_out_ptr") else 1
            total += times * value.numel() * value.element_size()
    return total


class TritonBytes:
    """Bytes moved by kernels of Triton since the last reset, by kernel."""

    def __init__(self, on_launch: Callable[[str, int], None]):
        self.on_launch = on_launch  # (name, blocks; 0: unknown)
        self.by_kernel: Counter[str] = Counter()

    def add(self, name: str, parameters: Sequence[str], arguments: Sequence, blocks: int = 0) -> None:
        """Note a launch."""
        self.by_kernel[name] += bytes_moved(parameters, arguments)
        self.on_launch(name, blocks)

    def total(self) -> int:
        """Return the bytes of all kernels."""
        return sum(self.by_kernel.values())


class GeneratedKernel:
    """A kernel of Inductor's that is counted instead of compiled."""

    def __init__(self, name: str, source: str, moved: TritonBytes):
        self.name, self.parameters, self.moved = name, parameter_names(name, source), moved

    def run(self, *arguments, **_) -> None:
        """Count a launch."""
        self.moved.add(self.name, self.parameters, arguments)


def count_blocks(grid, arguments: dict) -> int:
    """Multiply the extents of a grid, which may be a function of the arguments."""
    extents = grid(arguments) if callable(grid) else grid
    return math.prod(extents)


def replace_triton(moved: TritonBytes) -> None:
    """Let this process count Triton's kernels: Inductor's, and those that are launched directly."""
    from torch._inductor.async_compile import AsyncCompile
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    def generated(self, kernel_name: str, source_code: str, device_str: str = "cuda") -> GeneratedKernel:
        return GeneratedKernel(kernel_name, source_code, moved)

    def launched(self, *args, grid, warmup=False, **kwargs) -> None:
        defaults = {parameter.name: parameter.default for parameter in self.params if parameter.has_default}
        given = defaults | dict(zip(self.arg_names, args)) | kwargs
        moved.add(self.__name__, list(given), list(given.values()), count_blocks(grid, given))

    def first_config(self, *args, **kwargs) -> None:
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    def with_values(self, *args, **kwargs) -> None:
        given = dict(zip(self.arg_names, args)) | kwargs
        return self.fn.run(*args, **kwargs, **{name: value(given) for name, value in self.values.items()})

    AsyncCompile.triton = generated
    AsyncCompile.wait = lambda self, scope: None
    JITFunction.run, Autotuner.run, Heuristics.run = launched, first_config, with_values


def keep_masks() -> torch.library.Library:
    """Let nonzero, and so x[mask], find what a mask holds that was copied to the device.

    A kernel's result would be zeros: x[mask] would be empty, and what follows it would launch nothing. The
    override holds as long as what this returns.
    """
    real = torch.library.get_kernel("aten::nonzero", "CUDA")
    library = torch.library.Library("aten", "IMPL")

    def nonzero(keys, x: Tensor) -> Tensor:
        real.call_boxed(keys, x)  # its launches and its wait
        copied = (ctypes.c_ubyte * (x.numel() * x.element_size())).from_address(x.data_ptr() or 1)
        found = int(torch.frombuffer(copied, dtype=x.dtype).count_nonzero()) if x.numel() else 0
        return torch.empty_strided((found, x.dim()), (1, max(found, 1)), dtype=torch.int64, device=x.device)

    with warnings.catch_warnings(action="ignore"):  # that it overrides one, which is the point
        library.impl("nonzero", nonzero, "CUDA", with_keyset=True)
    return library
