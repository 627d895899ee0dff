"""Write the C source of the functions that null_gpu.c does not answer: they return 0, and products count."""

import re
from collections.abc import Iterable

# Libraries whose functions must not reach a driver. cuDNN and NCCL are the real ones.
IMITATED = re.compile(r"cu(da|blas|solver|sparse)?[A-Z]\w*")
OWN = re.compile(r"^(?:\w+ )*\*?(__cuda\w+|cu\w+)\(", re.MULTILINE)
MACRO_PRODUCTS = [
    f"cublas{letter}{kind}" for letter in "SD" for kind in ("gemm_v2", "gemmStridedBatched", "gemv_v2")
]
REAL = {"cudaGetErrorString", "cudaGetErrorName", "cudaCreateChannelDesc"}  # they need no device
HANDLE = re.compile(r"Create(_v2|Params)?$")
PRODUCT = re.compile(r"cublas\w*?(gemm|gemv|trsm|syrk|dot)\w*$", re.IGNORECASE)
TEXT = re.compile(r"(ErrorString|StatusString|StatusName)$")


def answered_names(source: str) -> set[str]:
    """Name the CUDA functions that a C source defines."""
    return set(OWN.findall(source)) | set(MACRO_PRODUCTS)


def driver_names(header: str) -> set[str]:
    """Name the driver's functions as cuda.h declares them and as it renames them (_v2 and so on)."""
    declared = re.findall(r"\b(cu[A-Z]\w+)\s*\(", header)
    renamed = re.findall(r"#define\s+cu\w+\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+)", header)
    return set(declared) | set(renamed)


def stub(name: str) -> str:
    """Write one function; C lets callers pass what they like."""
    if TEXT.search(name):
        return f'const char *{name}() {{ return "null GPU"; }}'
    if HANDLE.search(name) and not name.startswith("cuda"):
        return f"int {name}(void **handle) {{ *handle = calloc(1, 1024); return 0; }}"
    if PRODUCT.match(name):
        return f'int {name}() {{ null_launch("{name}", 0); return 0; }}'
    return f"int {name}() {{ return 0; }}"


def write_stubs(names: Iterable[str], source: str) -> str:
    """Write stubs for the imitated names that a C source does not define."""
    wanted = {name for name in names if IMITATED.fullmatch(name)} - answered_names(source) - REAL
    head = ["#include <stdlib.h>", "void null_launch(const char *, long);"]
    return "\n".join(head + [stub(name) for name in sorted(wanted)]) + "\n"
