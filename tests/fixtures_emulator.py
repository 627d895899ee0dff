"""A GPU without a GPU: a second device, "gpu", whose tensors the CPU computes.

    with emulated_gpu() as gpu:
        run(cfg, Environment({}))  # run.device=auto finds it
    print(gpu.syncs)

    torchrun --nproc_per_node=2 tests/fixtures_emulator.py OVERRIDES

Torch lets Python be a backend (the device type that it keeps for others); a tensor of it holds one of the
CPU. Numbers are right, and what a GPU forbids raises: an operator with tensors of both devices. What a GPU
does not tell is counted: operators that make the CPU wait for it. Kernels themselves, compiled graphs and
memory are not imitated, nor is activation checkpointing: the guard that torch gives devices in Python aborts
where autograd has hooks (2.13).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import fixtures_attention
import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import train_gpt
from kernels import attention, fp8, machine

NAME = "gpu"
MEMORY = 80 << 30  # bytes that it says it has
# Operators that wait for the device to tell the CPU a number or a shape.
SYNCS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount"}
# Operators that make a tensor of a size that their numbers say; all others begin with one of these.
MAKERS = {"empty.memory_format", "empty_strided", "eye", "eye.m", "linspace", "randperm", "tril_indices"}
MAKERS |= {"triu_indices", "arange", "arange.start", "arange.start_step"}
# Operators that take tensors of both devices: copies, and indices that are on the CPU.
BRIDGES = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_"}


class DeviceError(RuntimeError):
    """An operator got tensors of two devices."""


class DeviceTensor(Tensor):
    """A tensor of the emulated device, held by one of the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        return Tensor._make_wrapper_subclass(
            cls, held.size(), dtype=held.dtype, device=f"{NAME}:0", requires_grad=held.requires_grad, **layout
        )

    def __init__(self, held: Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        COUNTS.syncs["tolist"] += 1
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        raise DeviceError(f"numpy: a tensor of {NAME}; copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Counts:
    """What a program asked of the emulated device."""

    def __init__(self):
        self.operators: Counter = Counter()  # name -> calls on the device
        self.syncs: Counter = Counter()  # name -> times that the CPU waited

    def synchronize(self, device=None) -> None:
        """Stand in for torch.accelerator.synchronize."""
        self.syncs["synchronize"] += 1


COUNTS = Counts()  # of the program that runs


def compute(func, args: tuple, kwargs: dict):
    """Run an operator on what its tensors hold; the result is where they are, or where `device` says."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    others = [one for one in tensors if not isinstance(one, DeviceTensor) and one.dim() > 0]
    if others and name not in BRIDGES:
        mine = [one for one in tensors if isinstance(one, DeviceTensor)]
        shapes = " and ".join(str([tuple(one.shape) for one in group]) for group in (mine, others))
        raise DeviceError(f"{name}: tensors of shapes {shapes} on {NAME} and on the CPU")
    device = kwargs.get("device")
    leaves = device is not None and torch.device(device).type != NAME
    COUNTS.operators[name] += 1
    if leaves or waits(name, args):
        COUNTS.syncs[name] += 1
    held_args, held_kwargs = tree_map_only(DeviceTensor, lambda one: one.held, (args, kwargs))
    if device is not None:
        held_kwargs = held_kwargs | {"device": torch.device("cpu")}
    made = func(*held_args, **held_kwargs)
    if leaves:
        return made.clone()
    if isinstance(args[0], Tensor) and not isinstance(args[0], DeviceTensor) and name == "copy_":
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, DeviceTensor, made))


def waits(name: str, args: tuple) -> bool:
    """Whether an operator makes the CPU wait for the device."""
    if name == "copy_":
        leaves, comes = (not isinstance(one, DeviceTensor) for one in args[:2])
        return leaves or (comes and pageable(*args[1:]))
    if name.strip("_").startswith("index"):
        return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1]))
    return name in SYNCS


class Module(backend_registration._DummyBackendModule):
    """What torch.<device> offers."""

    max_memory_allocated = max_memory_reserved = staticmethod(lambda: 0)
    is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    empty_cache = staticmethod(lambda: None)
    get_device_properties = staticmethod(lambda device: SimpleNamespace(total_memory=MEMORY, name="emulated"))


def register() -> None:
    """Make the device known to torch, once in a process, and its tensors out of nothing."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    for name in MAKERS:
        torch.library.impl(f"aten::{name}", "PrivateUse1")(maker(name))
    torch.library.impl("aten::_copy_from", "PrivateUse1")(copy_from)


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy numbers of the CPU to a new tensor: what torch.tensor(values, device=...) ends in."""
    COUNTS.syncs["_copy_from"] += pageable(source, non_blocking)
    target.held.copy_(source)
    return target


def pageable(source: Tensor, non_blocking: bool = False) -> bool:
    """Whether a copy to the device waits for it: of an array that is not locked in the CPU's memory."""
    return source.dim() > 0 and not (non_blocking and hasattr(source, "is_locked"))


def pin_memory(source: Tensor, device=None) -> Tensor:
    """Stand in for Tensor.pin_memory."""
    locked = source.clone()
    locked.is_locked = True
    return locked


def maker(name: str) -> Callable[..., DeviceTensor]:
    """Return the kernel of an operator that makes a tensor out of numbers."""
    packet, _, overload = name.partition(".")
    kernel = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: DeviceTensor(
        kernel(*args, **kwargs | {"device": "cpu", "pin_memory": None})
    )


register()  # now, before autograd counts the devices


@contextmanager
def emulated_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Counts]:
    """Offer the device, with what an NVIDIA GPU of a capability chooses and every attention package.

    Each rank sees one such device, its own; they talk by gloo.
    """
    COUNTS.__init__()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "synchronize", COUNTS.synchronize)
        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(machine, "PINNING", {NAME})
        patch.setattr(train_gpt, "resolve_device", lambda name, rank: machine.resolve_device(name))
        patch.setattr(
            train_gpt.dist, "get_default_backend_for_device", lambda device: f"cpu:gloo,{NAME}:gloo"
        )
        patch.setitem(machine.ACCELERATORS, NAME, machine.ACCELERATORS["cuda"])
        for module in (attention, fp8):
            patch.setattr(module, "nvidia_capability", lambda device: capability)
        for order in (attention.PLAIN_ORDER, attention.NARROW_ORDER):
            patch.setitem(order, NAME, order["cuda"])
        for name, backend in attention.BACKENDS.items():
            if "cuda" in backend.devices:
                patch.setitem(attention.BACKENDS, name, backend._replace(devices=(*backend.devices, NAME)))
        for name in reversed(fixtures_attention.PACKAGES):  # flash_attn holds fa2 and, below it, fa4
            fixtures_attention.install(patch, name)
        patch.setattr(train_gpt, "checkpoint", lambda run, *args, use_reentrant: run(*args))
        yield COUNTS


if __name__ == "__main__":  # the trainer's command line, of one process or under torchrun
    with emulated_gpu():
        train_gpt.main()
