"""Read the counters of the preloaded library, in the process that it is loaded into."""

import ctypes
from pathlib import Path
from typing import NamedTuple


class Counts(NamedTuple):
    """What one piece of work gave the device; the order is null_gpu.c's."""

    kernels: float
    products: float  # calls of cuBLAS
    flop: float  # of them
    to_device: float  # copies
    pageable: float  # of them from memory that is not pinned: the host waits
    to_host: float
    on_device: float  # copies within the device
    fills: float
    syncs: float  # the host waits for all that it gave
    allocations: float
    to_device_bytes: float
    to_host_bytes: float
    on_device_bytes: float

    @property
    def launches(self) -> float:
        """Kernels and products together."""
        return self.kernels + self.products

    def per(self, number: int) -> "Counts":
        """Share it out."""
        return Counts(*(value / number for value in self))

    def minus(self, other: "Counts") -> "Counts":
        """Return what was counted beyond `other`."""
        return Counts(*(a - b for a, b in zip(self, other)))


class KernelCount(NamedTuple):
    """One kernel's launches."""

    launches: int
    blocks: int  # of its largest grid; 0 where it is not known
    name: str  # as the compiler wrote it


def read_dump(text: str) -> list[KernelCount]:
    """Read what null_dump wrote, the most frequent first."""
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return sorted((KernelCount(int(row[0]), int(row[1]), row[2]) for row in rows), reverse=True)


class Counters:
    """The counters of this process."""

    def __init__(self, library: str):
        self.library = ctypes.CDLL(library)
        self.library.null_counters.restype = ctypes.POINTER(ctypes.c_long)
        self.values = self.library.null_counters()

    def reset(self) -> None:
        """Count from zero."""
        self.library.null_reset()

    def read(self) -> Counts:
        """Return what was counted since the reset."""
        return Counts(*(float(self.values[i]) for i in range(len(Counts._fields))))

    def launch(self, name: str, blocks: int = 0) -> None:
        """Count a kernel that Python launches."""
        self.library.null_launch(name.encode(), ctypes.c_long(blocks))

    def kernels(self, scratch: Path) -> list[KernelCount]:
        """Return the launches by kernel since the reset; scratch names a file to write."""
        if self.library.null_dump(str(scratch).encode()):
            raise OSError(f"{scratch}: the list of kernels cannot be written")
        return read_dump(scratch.read_text(errors="replace"))
