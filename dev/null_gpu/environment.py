"""Find or make what the null GPU needs: Linux on x86-64, gcc, a CUDA build of torch, the built library."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import UserError
from dev.null_gpu.stubs import driver_names, write_stubs

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("null_gpu.c")
DEFAULT_ENVIRONMENT = ROOT / ".venv-cuda"
SCRATCH = ROOT / "runs" / "null_gpu"  # the library, shards, caches
TORCH = "2.11.0"  # the version of the stored figures
# numpy: Triton's interpreter, for whoever tries kernels there, fails with 2.4.
PACKAGES = (f"torch=={TORCH}", "numpy<2.3", "-r", str(ROOT / "requirements.txt"))
TOOLS = ("gcc", "nm")
LIBRARY_NAME = "libnull_gpu.so"
# -w: most arguments are read by nobody here.
FLAGS = ("-O1", "-shared", "-fPIC", "-w", "-std=gnu17")


class CudaEnvironment(NamedTuple):
    """A virtual environment with the CUDA build of torch."""

    folder: Path

    @property
    def python(self) -> Path:
        """Name its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        """Name the folder of its packages; raises where torch's CUDA build is not there."""
        found = sorted(self.folder.glob("lib/python3*/site-packages/torch/lib/libtorch_cuda.so"))
        if not found:
            raise UserError(
                f"{self.folder}: expected a virtual environment with the CUDA build of torch, found none. "
                "Make one: `python -m dev.null_gpu --make-environment` (4.8 GB from the package index), or "
                "name another with --environment FOLDER."
            )
        return found[0].parent.parent.parent

    def torch_version(self) -> str:
        """Read which torch it has."""
        return next(self.site.glob("torch-*.dist-info")).name.removesuffix(".dist-info").partition("-")[2]

    def headers(self) -> list[Path]:
        """Name the folders of CUDA's headers, the runtime's first."""
        found = sorted(self.site.glob("nvidia/cu13/include/cuda_runtime_api.h"))
        if not found:
            raise UserError(
                f"{self.site}: expected headers of CUDA 13 (nvidia/cu13/include), found none. The null GPU "
                f"is written for torch {TORCH}: `python -m dev.null_gpu --make-environment`."
            )
        return [
            found[0].parent,
            self.site / "triton" / "backends" / "nvidia" / "include",
        ]  # crt/ is the latter's


def check_machine(system: str, machine: str, tools: dict[str, str | None]) -> None:
    """Raise on a machine that cannot run the null GPU; tools maps programs to their paths."""
    if (system, machine) != ("Linux", "x86_64"):
        raise UserError(
            f"the null GPU: expected Linux on x86-64, found {system} on {machine}. It is a C library below "
            "torch's CUDA build for that system alone; elsewhere `make gpu-check` runs on an emulated GPU."
        )
    missing = [name for name, path in tools.items() if not path]
    if missing:
        raise UserError(
            f"the null GPU: expected {' and '.join(tools)} on the PATH, found no {' and no '.join(missing)}. "
            "Install a C compiler: `apt-get install gcc binutils`."
        )


def open_environment(folder: Path) -> CudaEnvironment:
    """Check the machine and return the environment in a folder."""
    check_machine(platform.system(), platform.machine(), {name: shutil.which(name) for name in TOOLS})
    environment = CudaEnvironment(folder.absolute())
    environment.headers()
    return environment


def make_environment(folder: Path) -> None:
    """Make a virtual environment with the CUDA build of torch from the package index."""
    check_machine(platform.system(), platform.machine(), {name: shutil.which(name) for name in TOOLS})
    python = CudaEnvironment(folder).python
    for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", *PACKAGES]):
        if subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL).returncode:
            raise UserError(
                f"{folder}: expected `{' '.join(map(str, command))}` to work. Its message is above; free "
                "5 GB of disk, or name an environment that is there with --environment FOLDER."
            )


def exported(path: Path, which: str) -> list[str]:
    """List a shared library's dynamic symbols without their versions; which is nm's --defined-only or so."""
    done = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in done.stdout.splitlines() if line]


def build_library(environment: CudaEnvironment, scratch: Path = SCRATCH) -> Path:
    """Build the library for an environment unless it is built; returns its path."""
    headers, site = environment.headers(), environment.site
    parts = (SOURCE.read_bytes(), Path(__file__).with_name("stubs.py").read_bytes(), str(site).encode())
    folder = scratch / f"library_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:12]}"
    library = folder / LIBRARY_NAME
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        name for path in (site / "torch" / "lib").glob("*.so") for name in exported(path, "--undefined-only")
    }
    for path in site.glob("nvidia/cu13/lib/libcudart.so*"):
        names |= {name for name in exported(path, "--defined-only") if name.startswith("cuda")}
    names |= driver_names((headers[0] / "cuda.h").read_text())
    stubs = folder / "stubs.c"
    stubs.write_text(write_stubs(names, SOURCE.read_text()))
    places = [f"-I{path}" for path in headers]
    unfinished = folder / f"{LIBRARY_NAME}.part"
    command = ["gcc", *FLAGS, *places, str(SOURCE), str(stubs), "-o", str(unfinished), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{SOURCE}: expected gcc to build it with {headers[0]}, found:\n{done.stderr[:2000]}\n"
            f"Use torch {TORCH}: `python -m dev.null_gpu --make-environment`."
        )
    driver = folder / "libcuda.so.1"  # the same file: one set of counters, whichever name loads it
    driver.unlink(missing_ok=True)
    driver.symlink_to(LIBRARY_NAME)
    unfinished.rename(library)
    return library


def variables(library: Path, caches: Path) -> dict[str, str]:
    """Return the environment variables of a process on the null GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "TORCH_"))}
    return kept | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
