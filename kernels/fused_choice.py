"""Which operations of kernels/fused.py are kernels on this card: self-tested, and raced where auto chooses.

    choice = resolve_fused("auto", device, dtype, FusedShape(), compiled=True)    # at start
    choice.names      # ("qk", "xsa"): pass "qk" in choice.names as norm_rotate's fused, and so on
    choice.refused    # {"mlp": "1.31 ms, plain 1.12"}

A race is a measurement, so processes may disagree: rank 0's names are to hold for all.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError
from kernels.fused import HeadGate, exclude_and_gate, head_loss, norm_rotate, square_mlp
from kernels.fused_loss import MOST_VOCAB
from kernels.fused_mlp import BYTE_SIGNS
from kernels.selftest import relative_error, why_wrong

FUSED_DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = 2e-2  # of the largest element, as kernels/attention.py has it
TESTED_TOKENS = 130  # no multiple of a block
MOST_GATE_WIDTH = 32
CAP = 30.0  # of the logits in a trial
REPEATS = 10
AHEAD_CYCLES = 100_000_000  # that the device sleeps while the host queues what is timed: some 50 ms


class FusedShape(NamedTuple):
    """What trials are run at; the defaults are the 1.0611 recipe on one of eight GPUs."""

    tokens: int = 98_304
    model_dim: int = 512
    heads: tuple[int, int, int] = (8, 4, 64)  # H, G, K
    rope_dims: int = 16
    mlp_dim: int = 2048
    vocab_size: int = 8192
    gate_width: int = 12
    absent: tuple[str, ...] = ()  # operations that the model does not have, or not in a form with a kernel


class FusedChoice(NamedTuple):
    """The operations that are kernels, and why those that were asked for and are not stay plain."""

    names: tuple[str, ...]
    refused: dict[str, str]


class Trial(NamedTuple):
    """An operation on made-up inputs."""

    leaves: list[Tensor]  # what gradients are taken of
    run: Callable[..., Tensor]  # (fused, *leaves)
    plain: Callable[..., Tensor]  # (*leaves): what a kernel must beat


def resolve_fused(
    wanted: str, device: torch.device, dtype: torch.dtype, shape: FusedShape, compiled: bool
) -> FusedChoice:
    """Choose from "off", "auto" or names like "qk,mlp"; raises where one that is named cannot be used.

    auto keeps the kernels that beat the plain form at `shape`, which is compiled where `compiled` says so.
    """
    names = {"off": (), "auto": tuple(TRIALS)}.get(wanted, tuple(dict.fromkeys(wanted.split(","))))
    unknown = [repr(name) for name in names if name not in TRIALS]
    if unknown:
        raise UserError(
            f"model.fused={wanted}: expected off, auto or some of {','.join(TRIALS)}, found "
            f"{', '.join(unknown)}."
        )
    refused = {}
    for name in names:
        why = why_plain(name, device, dtype, shape)
        if wanted == "auto" and not why:
            why = lost_race(race(name, device, dtype, shape, compiled))
        refused |= {name: why} if why else {}
    if refused and wanted != "auto":
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise UserError(
            f"model.fused={wanted}: expected kernels that work on {device.type} in {dtype}, found:{reasons}\n"
            "Use model.fused=auto or off."
        )
    return FusedChoice(tuple(name for name in names if name not in refused), refused)


def why_plain(name: str, device: torch.device, dtype: torch.dtype, shape: FusedShape) -> str:
    """Say why an operation cannot be a kernel; empty when it can."""
    why = why_always_plain(name, device, dtype, shape)
    if why:
        return why
    return why_wrong(lambda: largest_error(name, device, dtype, shape), TOLERANCE, "the plain form")


def why_always_plain(name: str, device: torch.device, dtype: torch.dtype, shape: FusedShape) -> str:
    """Say what rules a kernel out before it is tried."""
    head_dim = shape.heads[2]
    if name in shape.absent:
        return "the recipe has no such operation"
    if device.type != "cuda":
        return f"a {device.type} runs no such kernels"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in FUSED_DTYPES:
        return f"it computes in {', '.join(map(str, FUSED_DTYPES))} only (model.compute_dtype)"
    if name in ("qk", "xsa") and head_dim & (head_dim - 1):
        return f"a head's dimension of {head_dim} is no power of two"
    if name == "xsa" and shape.gate_width > MOST_GATE_WIDTH:
        return f"its gates read {shape.gate_width} channels, at most {MOST_GATE_WIDTH}"
    if name == "mlp" and shape.mlp_dim % BYTE_SIGNS:
        return f"a hidden size of {shape.mlp_dim} is no multiple of {BYTE_SIGNS}"
    if name == "loss" and shape.vocab_size > MOST_VOCAB:
        return f"a vocabulary of {shape.vocab_size:,} is larger than {MOST_VOCAB:,}"
    return ""


# Trials


def draw(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Draw a leaf on the device of `like`, in its dtype unless another is named."""
    return torch.randn(shape, device=like.device, dtype=dtype or like.dtype).requires_grad_()


def try_norm_rotate(shape: FusedShape, like: Tensor) -> Trial:
    """Queries of one row."""
    angles = torch.rand(shape.tokens, 1, shape.rope_dims // 2, device=like.device) * math.tau

    def run(fused: bool, x: Tensor, gain: Tensor) -> Tensor:
        return norm_rotate(x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)), gain, fused)

    leaves = [draw((1, shape.tokens, shape.heads[0], shape.heads[2]), like), draw(shape.heads[:1], like)]
    return Trial(leaves, run, lambda *leaves: run(False, *leaves))


def try_square_mlp(shape: FusedShape, like: Tensor) -> Trial:
    """An MLP with slope 0.5."""
    sizes = (
        (shape.tokens, shape.model_dim),
        (shape.mlp_dim, shape.model_dim),
        (shape.model_dim, shape.mlp_dim),
    )

    def run(fused: bool, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return square_mlp(x, up / shape.model_dim**0.5, down / shape.mlp_dim**0.5, 0.5, fused)

    return Trial([draw(size, like) for size in sizes], run, lambda *leaves: run(False, *leaves))


def try_exclude_and_gate(shape: FusedShape, like: Tensor) -> Trial:
    """Outputs of attention, with XSA and gates."""
    num_heads, num_kv_heads, head_dim = shape.heads
    sizes = [(1, shape.tokens, heads, head_dim) for heads in (num_heads, num_kv_heads)]
    sizes += [(1, shape.tokens, shape.model_dim), (num_heads, shape.gate_width)]

    def run(fused: bool, y: Tensor, v: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return exclude_and_gate(y, v, HeadGate(x, weight, 1.0, 0.5), fused)

    return Trial([draw(size, like) for size in sizes], run, lambda *leaves: run(False, *leaves))


def try_head_loss(shape: FusedShape, like: Tensor) -> Trial:
    """A tied head; a trainer's plain form on a GPU makes whole logits."""
    targets = torch.randint(shape.vocab_size, (shape.tokens,), device=like.device)

    def run(fused: bool, x: Tensor, rows: Tensor) -> Tensor:
        return head_loss(x, rows, targets, CAP, fused)

    def plain(x: Tensor, rows: Tensor) -> Tensor:
        logits = F.linear(x, rows.to(x.dtype)).float()
        return F.cross_entropy(CAP * torch.tanh(logits / CAP), targets)

    sizes = (shape.tokens, shape.model_dim), (shape.vocab_size, shape.model_dim)
    return Trial([draw(size, like) for size in sizes], run, plain)


TRIALS = {
    "qk": try_norm_rotate,
    "mlp": try_square_mlp,
    "xsa": try_exclude_and_gate,
    "loss": try_head_loss,
}


def largest_error(name: str, device: torch.device, dtype: torch.dtype, shape: FusedShape) -> float:
    """Compare output and gradients with the plain form in float32; the largest difference, relative."""
    small = shape._replace(tokens=TESTED_TOKENS)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        trial = TRIALS[name](small, torch.empty(0, device=device, dtype=dtype))
        found = gradients(lambda *leaves: trial.run(True, *leaves), trial.leaves)
        wide = [leaf.detach().float().requires_grad_() for leaf in trial.leaves]
        exact = gradients(lambda *leaves: trial.run(False, *leaves), wide)
    return relative_error(found, exact)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return a function's output and its gradients for an incoming one of cosines."""
    y = function(*leaves)
    dy = torch.arange(y.numel(), device=y.device, dtype=torch.float32).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def lost_race(ms: tuple[float, float]) -> str:
    """Say that a kernel was not faster than the plain form; empty where it was."""
    fused, plain = ms
    return "" if fused < plain else f"{fused:.3g} ms, plain {plain:.3g}"


def race(
    name: str, device: torch.device, dtype: torch.dtype, shape: FusedShape, compiled: bool
) -> tuple[float, float]:
    """Return the milliseconds of forward and backward of the kernel and of the plain form at a shape."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        trial = TRIALS[name](shape, torch.empty(0, device=device, dtype=dtype))
        forms = lambda *leaves: trial.run(True, *leaves), trial.plain
        fused, plain = (time_form(form, trial.leaves, compiled) for form in forms)
    torch.get_device_module(device).empty_cache()
    return fused, plain


def time_form(form: Callable[..., Tensor], leaves: list[Tensor], compiled: bool) -> float:
    """Time forward and backward on the device alone; infinite where the memory does not suffice."""
    form = torch.compile(form, fullgraph=True, dynamic=False) if compiled else form
    module = torch.get_device_module(leaves[0].device)
    try:
        dy = torch.ones_like(form(*leaves))
        for _ in range(3):
            torch.autograd.grad(form(*leaves), leaves, dy)
        module.synchronize()
        torch.cuda._sleep(AHEAD_CYCLES)
        events = [module.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        for event in events[:-1]:
            event.record()
            torch.autograd.grad(form(*leaves), leaves, dy)
        events[-1].record()
        module.synchronize()
    except torch.OutOfMemoryError:
        return math.inf
    return median(a.elapsed_time(b) for a, b in pairwise(events))
