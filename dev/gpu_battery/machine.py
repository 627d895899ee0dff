"""What the machine is and what it can do at best: the ceilings that all other numbers are held against."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size
from dev.gpu_battery.timing import (
    NOT_ON_CPU,
    measure_fitting,
    open_ranks,
    peak_tflops,
    timed,
    utilization,
    wall_seconds,
)
from kernels.fp8 import BACKWARD, FORWARD, Fp8Linear

PACKAGES = (
    "triton", "numpy", "sentencepiece", "zstandard", "brotli", "python-minifier",
    "flash-attn", "flash-attn-3", "flash-attn-4", "pytest", "hypothesis",
)  # fmt: skip
SMI_FIELDS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used,utilization.gpu"


def run(job: Job) -> None:
    """Measure all of it."""
    ranks = open_ranks(job.rehearse)
    device = ranks.device
    job.measure("versions", versions)
    job.measure("card", lambda: card(device))
    job.measure("clocks_idle", clocks)
    measure_fitting(job, "copy", lambda: copies(job, device), device)
    measure_fitting(job, "square", lambda: square(job, device), device)
    job.measure("clocks_busy", clocks)
    for outputs in get_size(job, "product_outputs"):
        shape = (get_size(job, "product_tokens"), get_size(job, "product_width"), outputs)
        forms = {"bf16": bf16_products, "fp8": fp8_products, "fp8_linear": fp8_linear}
        for name, form in forms.items():
            measure_fitting(job, f"{name}_{outputs}", partial(form, shape, device), device)
    job.measure("empty_kernel", lambda: empty_kernel(get_size(job, "empty_blocks"), device))


def versions() -> dict:
    """Name what is installed."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or "none",
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def card(device: torch.device) -> dict | str:
    """Describe the card."""
    if device.type != "cuda":
        return NOT_ON_CPU
    facts = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": total / 2**30,
        "free_gib": free / 2**30,
        "peak_bf16_tflops": peak_tflops(device),
    }


def clocks() -> dict | str:
    """Read clocks, power limit and temperature."""
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        return "no nvidia-smi"
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(SMI_FIELDS.split(","), values))


def copies(job: Job, device: torch.device) -> dict:
    """Copy inside the device, counting bytes read and written, and between host and device."""
    num_bytes = get_size(job, "copy_bytes")
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    facts = {"device_gb_s": 2 * num_bytes / timed(lambda: target.copy_(source), device)["ms"] / 1e6}
    if device.type != "cuda":
        return facts | {"from_pinned_gb_s": NOT_ON_CPU, "from_pageable_gb_s": NOT_ON_CPU}
    small = num_bytes // 16
    for name, pinned in (("from_pinned_gb_s", True), ("from_pageable_gb_s", False)):
        host = torch.zeros(small, dtype=torch.uint8, pin_memory=pinned)
        taken = timed(lambda host=host: target[:small].copy_(host, non_blocking=True), device)
        facts[name] = small / taken["ms"] / 1e6
    return facts


def rated(action: Callable[[], object], flops: float, device: torch.device, peaks: float = 1.0) -> dict:
    """Time a product; `peaks`: how many times the bf16 peak its kind can reach."""
    ms = timed(action, device)["ms"]
    return {"ms": ms, "tflops": flops / ms / 1e9, "of_peak": utilization(flops / peaks, ms, device)}


def square(job: Job, device: torch.device) -> dict:
    """Multiply large square matrices of random bf16: the ceiling in practice. Zeros would be faster."""
    n = get_size(job, "square")
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"n": n} | rated(lambda: a @ b, 2.0 * n**3, device)


def random_operands(shape: tuple[int, int, int], device: torch.device) -> tuple:
    """Draw x (M, K), weight (N, K) and the output's gradient (M, N) in bf16; the operations of a product."""
    m, k, n = shape
    sizes = ((m, k), (n, k), (m, n))
    return *(torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes), 2.0 * m * k * n


def bf16_products(shape: tuple[int, int, int], device: torch.device) -> dict:
    """Time the three products of a Linear."""
    x, weight, dy, flops = random_operands(shape, device)
    actions = {"forward": lambda: x @ weight.t(), "dgrad": lambda: dy @ weight, "wgrad": lambda: dy.t() @ x}
    return {name: rated(action, flops, device) for name, action in actions.items()}


def fp8_products(shape: tuple[int, int, int], device: torch.device) -> dict | str:
    """Time the same with 8-bit operands that lie as the device wants them: the second by columns."""
    if device.type != "cuda":
        return NOT_ON_CPU
    x, weight, dy, flops = random_operands(shape, device)
    one = torch.ones((), device=device)
    x8, w8, dy8 = x.to(FORWARD), weight.to(FORWARD), dy.to(BACKWARD)
    pairs = {
        "forward": (x8, w8.t()),
        "dgrad": (dy8, w8.t().contiguous().t()),
        "wgrad": (dy8.t().contiguous(), x8.t().contiguous().t()),
    }
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    found = {}
    for name, (a, b) in pairs.items():
        for fast in (False, True):  # sums of 14 bits inside a product
            found[f"{name}{'_fast' if fast else ''}"] = rated(
                lambda a=a, b=b, fast=fast: torch._scaled_mm(a, b, **options, use_fast_accum=fast),
                flops, device, peaks=2.0,
            )  # fmt: skip
    return found


def fp8_linear(shape: tuple[int, int, int], device: torch.device) -> dict | str:
    """Time forward and backward of the project's 8-bit Linear, eager, against the bf16 one."""
    if device.type != "cuda":
        return NOT_ON_CPU
    x, weight, dy, _ = random_operands(shape, device)
    x.requires_grad_()
    weight.requires_grad_()
    scales, seen = torch.ones(3, device=device), torch.zeros(3, device=device)
    forms = {
        "bf16": lambda: F.linear(x, weight),
        "fp8": lambda: Fp8Linear.apply(x, weight, scales, seen, "gemm"),
    }
    times = {
        name: timed(lambda form=form: torch.autograd.grad(form(), (x, weight), dy), device)["ms"]
        for name, form in forms.items()
    }
    return {f"{name}_ms": ms for name, ms in times.items()}


def empty_kernel(num_blocks: int, device: torch.device) -> dict | str:
    """Launch a kernel of so many blocks that do nothing: what blocks without work cost."""
    if device.type != "cuda":
        return NOT_ON_CPU
    import triton

    @triton.jit
    def nothing(pointer):
        return

    pointer = torch.zeros(1, device=device)
    first = wall_seconds(lambda: nothing[(1,)](pointer), device)
    return {
        "blocks": num_blocks,
        "compile_s": first,
        "ms": timed(lambda: nothing[(num_blocks,)](pointer), device)["ms"],
        "one_block_ms": timed(lambda: nothing[(1,)](pointer), device)["ms"],
    }
