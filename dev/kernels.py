"""Compile the fused kernels for GPUs that are not here, and say what registers and memory each needs.

PYTHONPATH=.venv/kernels python -m dev.kernels                  a table of the sizes of the 1.0611 recipe
PYTHONPATH=.venv/kernels python -m dev.kernels --write          the same into dev/kernels.json
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import CommandParser, UserError, run_command, write_json
from kernels.fused import HeadGate, exclude_and_gate, head_loss, norm_rotate, square_mlp
from kernels.fused_choice import FusedShape
from kernels.jit import Kernel

TABLE = Path(__file__).with_name("kernels.json")
TARGETS = {  # name -> backend, architecture, threads of a warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
TOKENS = 256  # enough to see a launch: how many there are is no constant of a kernel
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Kernel
    arguments: tuple
    constants: dict


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Note launches instead of launching."""
    launches: list[Launch] = []

    def note(kernel: Kernel, grid: tuple[int, ...]) -> Callable:
        return lambda *arguments, **constants: launches.append(Launch(kernel, arguments, constants))

    original = Kernel.__getitem__
    Kernel.__getitem__ = note
    try:
        yield launches
    finally:
        Kernel.__getitem__ = original


def launches_of(shape: FusedShape, dtype: torch.dtype) -> list[Launch]:
    """List the launches of all operations, forward and backward, of some tokens of a shape."""
    num_heads, num_kv_heads, head_dim = shape.heads

    def make(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype).requires_grad_()

    rope = tuple(torch.zeros(TOKENS, 1, shape.rope_dims // 2, dtype=dtype) for _ in range(2))
    q, k = (make(1, TOKENS, heads, head_dim) for heads in (num_heads, num_kv_heads))
    x = make(1, TOKENS, shape.model_dim)
    gate = HeadGate(x, make(num_heads, 12, dtype=torch.float32), 1.0, 0.5)
    up, down = make(shape.mlp_dim, shape.model_dim), make(shape.model_dim, shape.mlp_dim)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    with record_launches() as launches:
        norm_rotate(q, rope, make(num_heads, dtype=torch.float32), True).sum().backward()
        square_mlp(x, up, down, 0.5, True).sum().backward()
        exclude_and_gate(q, k, gate, True).sum().backward()
        head_loss(x[0], make(shape.vocab_size, shape.model_dim), targets, 30.0, True).backward()
    return launches


def compile_for(launch: Launch, target: str) -> dict:
    """Compile a launch's kernel; returns bytes of shared memory and what an NVIDIA assembler says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = launch.kernel.jitted
    constants = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    options = {name: value for name, value in launch.constants.items() if name in OPTIONS}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[place]
        is_tensor = isinstance(value, Tensor)
        signature[name] = TYPES[value.dtype] if is_tensor else "i32"
        if not is_tensor and value == 1:  # Triton makes it a constant
            signature[name], constants[name] = "constexpr", 1
        elif is_tensor or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    facts = {"shared_bytes": made.metadata.shared} | options
    return facts | (assemble(made.asm["ptx"], target) if "ptx" in made.asm else count_amd(made.asm["amdgcn"]))


def assemble(ptx: str, target: str) -> dict:
    """Return registers a thread and bytes of spills, as the assembler that Triton brings says them."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    newer = tools / "ptxas-blackwell"  # from Triton 3.6 on
    path = newer if target == "sm_100" and newer.is_file() else tools / "ptxas"
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(path), "-v", f"-arch={arch}", str(file), "-o", f"{folder}/out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"registers": registers, "spill_bytes": spilled}


def count_amd(text: str) -> dict:
    """Return the same of an AMD kernel, from the notes in its assembly."""
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
    spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))
    return {"registers": registers, "spill_bytes": 4 * spilled}


def measure(targets: list[str]) -> dict:
    """Compile every launch of the 1.0611 recipe for some targets: {kernel: {target: facts}}."""
    launches = launches_of(FusedShape(), torch.bfloat16)
    return {
        kernel_name(launch): {target: compile_for(launch, target) for target in targets}
        for launch in launches
    }


def kernel_name(launch: Launch) -> str:
    """Name the kernel of a launch, and which half of one that does both."""
    return launch.kernel.function.__name__ + ("_backward" if launch.constants.get("BACKWARD") else "")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = CommandParser(prog="python -m dev.kernels", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.name}")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of %(default)s")
    args = parser.parse_args(argv)
    if find_spec("triton") is None:
        raise UserError(
            "expected the package triton, found none. `make gpu-check` puts it into .venv/kernels: name that "
            "folder in PYTHONPATH."
        )
    unknown = set(args.targets.split(",")) - set(TARGETS)
    if unknown:
        raise UserError(
            f"--targets: expected some of {', '.join(TARGETS)}, found {', '.join(sorted(unknown))}."
        )
    found = measure(args.targets.split(","))
    for name, by_target in found.items():
        for target, facts in by_target.items():
            print(f"{name:28} {target:7}", *(f"{key}:{value}" for key, value in facts.items()))
    if args.write:
        write_json(TABLE, found)
    return 0


if __name__ == "__main__":
    run_command(main)
