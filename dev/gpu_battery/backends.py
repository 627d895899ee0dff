"""Every attention backend on masks of each kind: available or why not, errors against math, milliseconds."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.loader import segment_starts
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size
from dev.gpu_battery.text import BOS_ID, draw_tokens
from dev.gpu_battery.timing import measure_fitting, memory_gib, open_ranks, timed
from kernels.attention import BACKENDS, MaskSpec, build_mask, extent_of, refusal, resolve_attention

HEAD_DIM = 64
MOST_SCORES = 1 << 31  # elements of a (B, T, T) bias that are worth making
CHECKED_TOKENS = 4096  # of a long row that are compared with math, to a document's end
TOLERANCE = 2e-2  # of the largest element, as kernels/attention.py has it for half precision
SHORT_DOC = (60, 100)  # tokens of short documents
LAST = "flex"  # compiled for every case: the first to lack time
FLEX_SECONDS = 15.0  # that one of its cases may take


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> y


class BackendCase(NamedTuple):
    """A mask and the shape of what attends through it."""

    name: str
    heads: tuple[int, int, int]  # (H, G, K)
    starts: np.ndarray  # (B, T) bool
    window: int = 0
    documents: bool = False
    longest: int = 0  # tokens of a document at most, as the caller of the kernels knows it; 0: T


class Inputs(NamedTuple):
    """What one case is computed from."""

    leaves: tuple[Tensor, Tensor, Tensor]  # q, k, v
    dy: Tensor
    starts: Tensor


def run(job: Job) -> None:
    """Measure all cases, the ordinary first: what breaks a device costs the cases after it."""
    device = open_ranks(job.rehearse).device
    dtype = dtype_on(device)
    cases = make_cases(job)
    job.record("what", {"dtype": str(dtype), "head_dim": HEAD_DIM})
    for case in cases[:2]:
        job.measure(f"auto_{case.name}", partial(choose, case, device, dtype))
    names = [name for name in BACKENDS if name != LAST]
    for case in cases:
        for name in names:
            measure_case(job, name, case, device)
    for case in cases:
        if job.seconds_left() < FLEX_SECONDS:
            job.record(f"{case.name}_{LAST}", "no time left")
        else:
            measure_case(job, LAST, case, device)


def dtype_on(device: torch.device) -> torch.dtype:
    """Return what models compute in; a rehearsal does it in float32, which all CPUs have."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_cases(job: Job) -> list[BackendCase]:
    """Lay out the cases."""
    (rows, seq_len), (short_rows, short_len) = get_size(job, "attention_rows"), get_size(job, "short_rows")
    tokens, segment = get_size(job, "packed_tokens"), get_size(job, "packed_segment")
    all_heads, grouped = (8, 8, HEAD_DIM), (8, 4, HEAD_DIM)
    documents = document_starts(rows, seq_len, 3)
    whole = np.zeros_like(documents)
    packed = segment_starts(document_starts(1, tokens, 4), segment)
    rng = np.random.default_rng(5)
    many = np.zeros((1, tokens), dtype=bool)
    many[0, np.cumsum(rng.integers(*SHORT_DOC, tokens // SHORT_DOC[0])) % tokens] = True
    filled = np.arange(short_len) >= rng.integers(short_len // 3, short_len, (short_rows, 1))
    return [
        BackendCase("plain", all_heads, whole),
        BackendCase("documents", all_heads, documents, documents=True),
        BackendCase("window", all_heads, whole, window=get_size(job, "attention_window")),
        BackendCase("grouped", grouped, whole),
        BackendCase("packed", grouped, packed, documents=True, longest=segment),
        BackendCase("packed_unbounded", grouped, packed, documents=True),  # of T tokens each
        BackendCase("short_documents", grouped, segment_starts(many, segment), 0, True, segment),
        BackendCase("fillers", grouped, filled, documents=True),  # each a document, as BOS as filler makes
    ]


def document_starts(rows: int, seq_len: int, seed: int) -> np.ndarray:
    """Draw where documents of usual lengths start, (B, T) bool."""
    return draw_tokens(rows * seq_len, 64, seed).reshape(rows, seq_len) == BOS_ID


def choose(case: BackendCase, device: torch.device, dtype: torch.dtype) -> dict:
    """Ask what auto takes, and why not what it tried before."""
    choice = resolve_attention("auto", device, dtype, case.heads, MaskSpec(case.window, case.documents))
    return {"takes": choice.backend} | choice.refused


def measure_case(job: Job, name: str, case: BackendCase, device: torch.device) -> None:
    """Measure one backend on one case; errors beyond rounding are a fault."""
    dtype, title = dtype_on(device), f"{case.name}_{name}"
    found = measure_fitting(job, title, partial(try_backend, name, case, device, dtype), device)
    errors = [value for key, value in (found or {}).items() if key.endswith("_error")]
    if not all(error <= TOLERANCE for error in errors):  # NaN included
        job.fault(title, f"differs from math by {max(errors):.3g} of the largest element")


def try_backend(name: str, case: BackendCase, device: torch.device, dtype: torch.dtype) -> dict:
    """Say why a backend cannot do a case, or how exactly and how fast it does."""
    rows, seq_len = case.starts.shape
    spec = MaskSpec(case.window, case.documents)
    why = refusal(name, device, dtype, case.heads, spec)
    if why:
        return {"refused": why}
    if BACKENDS[name].form in ("bias", "segments") and rows * seq_len**2 > MOST_SCORES:
        return {"not_tried": f"it makes {rows} x {seq_len:,} x {seq_len:,} scores"}
    inputs = draw_inputs(case, device, dtype)
    if case.documents:
        spec = spec._replace(extent=extent_of(case.starts, case.longest or seq_len))
    attend, facts = make_attend(name, spec, inputs)
    facts |= compare(attend, case, inputs)
    times = timed(lambda: forward_backward(attend, inputs.leaves, inputs.dy), device)
    return {"ms": times["ms"], "ms_least": times["ms_least"]} | facts | memory_gib(device)


def make_attend(name: str, spec: MaskSpec, inputs: Inputs) -> tuple[Attend, dict]:
    """Return what attends with a mask that is made once, and how long the mask takes.

    Block masks are made inside a model's graph, so here too: eagerly they would look at T x T places.
    """
    dtype, run_backend = inputs.dy.dtype, BACKENDS[name].run

    def with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run_backend(q, k, v, build_mask(spec, inputs.starts, name, dtype))

    if BACKENDS[name].form == "blocks":
        return torch.compile(with_mask, dynamic=False), {"mask_ms": "within ms"}
    mask = build_mask(spec, inputs.starts, name, dtype)
    ms = timed(lambda: build_mask(spec, inputs.starts, name, dtype), inputs.dy.device)["ms"]
    return partial(run_backend, mask=mask), {"mask_ms": ms}


def draw_inputs(case: BackendCase, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Draw queries, keys, values and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    heads, groups, dim = case.heads
    q, k, v, dy = (
        torch.randn(*case.starts.shape, count, dim, generator=generator, device=device, dtype=dtype)
        for count in (heads, groups, groups, heads)
    )
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    return Inputs(leaves, dy, torch.from_numpy(case.starts).to(device))


def forward_backward(attend: Attend, leaves: tuple, dy: Tensor) -> tuple[Tensor, ...]:
    """Attend and take the gradients: (y, dq, dk, dv)."""
    y = attend(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def compare(attend: Attend, case: BackendCase, inputs: Inputs) -> dict:
    """Return the largest differences from math in float32, as shares of the largest element.

    Of long rows the first documents are compared: nothing after them reaches back.
    """
    checked = checked_tokens(case)
    wide = tuple(x.detach()[:, :checked].float().requires_grad_() for x in inputs.leaves)
    spec = MaskSpec(case.window, case.documents)
    mask = build_mask(spec, inputs.starts[:, :checked], "math", torch.float32)
    exact = forward_backward(partial(BACKENDS["math"].run, mask=mask), wide, inputs.dy[:, :checked].float())
    found = forward_backward(attend, inputs.leaves, inputs.dy)
    output, *grads = (
        float((a[:, :checked].float() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact)
    )
    return {"output_error": output, "gradient_error": math.nan if any(map(math.isnan, grads)) else max(grads)}


def checked_tokens(case: BackendCase) -> int:
    """Return how many tokens of each row to compare: all of short rows, whole documents of long ones."""
    seq_len = case.starts.shape[1]
    if seq_len <= CHECKED_TOKENS:
        return seq_len
    starts = np.flatnonzero(case.starts.all(axis=0))
    return int(starts[starts <= CHECKED_TOKENS][-1])
