"""The fused kernels against their plain forms, compiled: errors, milliseconds, bytes or operations a second.

A rehearsal has no kernels: it measures the plain forms alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dev.gpu_battery.backends import dtype_on
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size
from dev.gpu_battery.timing import measure_fitting, memory_gib, open_ranks, timed
from kernels import fused_loss, fused_mlp
from kernels.fused_choice import (
    TOLERANCE,
    TRIALS,
    FusedShape,
    Trial,
    gradients,
    largest_error,
    time_form,
    why_always_plain,
)

LEAST_SECONDS = 8.0  # that a variant may take: it is compiled
TILES = {  # of the MLP's products, beside the one that is used
    "wide": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "four_warps": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
}
CHUNKS = (1 << 24, 1 << 25, 1 << 27)  # logits of a chunk, beside the number that is used


def run(job: Job) -> None:
    """Measure every operation, then the variants of two while there is time."""
    device = open_ranks(job.rehearse).device
    shape = FusedShape(*get_size(job, "fused_shape"))
    job.record("what", shape._asdict() | {"dtype": str(dtype_on(device))})
    for name in TRIALS:
        why = why_always_plain(name, device, dtype_on(device), shape)
        measure_fitting(job, f"{name}_plain", partial(measure_form, name, shape, device, "plain"), device)
        if why:
            job.record(f"{name}_kernel", {"refused": why})
            continue
        check(job, name, shape, device)
        measure_fitting(job, f"{name}_kernel", partial(measure_form, name, shape, device, "kernel"), device)
    if device.type == "cuda":
        measure_variants(job, shape, device)


def check(job: Job, name: str, shape: FusedShape, device: torch.device) -> None:
    """Compare a kernel with the plain form in float32; beyond rounding is a fault, and so are other bits."""
    dtype = dtype_on(device)
    found = job.measure(f"{name}_error", lambda: largest_error(name, device, dtype, shape))
    if found is not None and not found <= TOLERANCE:  # NaN included
        job.fault(f"{name}_error", f"differs from the plain form by {found:.3g} of the largest element")
    same = job.measure(
        f"{name}_repeats", lambda: repeats(TRIALS[name](shape, torch.empty(0, device=device, dtype=dtype)))
    )
    if same is False:
        job.fault(f"{name}_repeats", "two calls gave different bits")


def repeats(trial: Trial) -> bool:
    """Whether two calls give the same bits."""
    first, second = (gradients(partial(trial.run, True), trial.leaves) for _ in range(2))
    return all(map(torch.equal, first, second))


def measure_form(name: str, shape: FusedShape, device: torch.device, form: str) -> dict:
    """Time forward and backward of one form of an operation."""
    trial = TRIALS[name](shape, torch.empty(0, device=device, dtype=dtype_on(device)))

    def kernel(*leaves: Tensor) -> Tensor:
        return trial.run(True, *leaves)

    function = trial.plain if form == "plain" else kernel
    if device.type == "cuda":
        ms = time_form(function, trial.leaves, compiled=True)
    else:
        ms = timed(lambda: gradients(function, trial.leaves), device)["ms"]
    return {"ms": ms} | rates(name, shape, ms, trial.leaves[0].element_size()) | memory_gib(device)


def rates(name: str, shape: FusedShape, ms: float, size: int) -> dict:
    """Return what the time means: operations of the products, else the bytes that cannot be avoided."""
    heads, groups, dim = shape.heads
    products = {"mlp": 6 * shape.mlp_dim, "loss": 3 * shape.vocab_size}
    if name in products:
        flops = 2 * shape.tokens * shape.model_dim * products[name]
        return {"tflops": flops / ms / 1e9}
    rows = {"qk": 5 * heads, "xsa": 5 * heads + 3 * groups}[name]  # read or written, forward and backward
    return {"gb_per_s": shape.tokens * rows * dim * size / ms / 1e6}


def measure_variants(job: Job, shape: FusedShape, device: torch.device) -> None:
    """Time other tiles of the MLP and other chunks of the loss."""

    def measure(title: str, name: str, change: Callable[[], None]) -> None:
        if job.seconds_left() < LEAST_SECONDS:
            job.record(title, "no time left")
            return
        change()
        measure_fitting(job, title, partial(measure_form, name, shape, device, "kernel"), device)

    for title, tile in TILES.items():
        measure(f"mlp_{title}", "mlp", partial(setattr, fused_mlp, "TILE", tile))
    for chunk in CHUNKS:
        measure(f"loss_chunk_{chunk}", "loss", partial(setattr, fused_loss, "CHUNK_LOGITS", chunk))
