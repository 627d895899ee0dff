"""All attention of a model goes through `attend`; which kernel does the work is chosen once, by name.

    backend = resolve_attention("auto", device, dtype, heads, spec).backend     # at start, self-tested
    mask = build_mask(spec, starts_doc, backend, dtype)                          # once per forward
    y = attend(q, k, v, mask)                                                    # in every layer

Attention is causal. A MaskSpec narrows it: a window of W lets position i see i - W .. i (W + 1 keys, as
the flash kernels count), document masks end it at the document's first token. `math` is the oracle.
Shapes: B rows, T positions, H query heads, G kv heads (G divides H), K head dim.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import UserError
from kernels.blocked import blocked_forward
from kernels.flash import flash2, flash3, flash4
from kernels.machine import nvidia_capability
from kernels.selftest import relative_error, why_wrong


class Extent(NamedTuple):
    """Bounds on a batch's documents, cut at rows' ends: what a varlen kernel is launched for.

    Compiled graphs are made for one extent: `extent_of` rounds up, so that few are needed.
    """

    max_docs: int
    max_len: int  # tokens of the longest


class MaskSpec(NamedTuple):
    """Which earlier positions of its row a query may see."""

    window: int = 0  # at most so many positions back; 0: all
    documents: bool = False  # only those of its own document
    extent: Extent | None = None  # of the batch's documents, where the caller knows it

    @property
    def is_plain(self) -> bool:
        """Whether nothing but causality limits it."""
        return self.window == 0 and not self.documents


class AttentionMask(NamedTuple):
    """A MaskSpec in the form that one backend reads; made once per forward, used in every layer."""

    backend: str
    window: int = 0
    segments: Tensor | None = None  # (B, T) int32: number of the document in its row
    bias: Tensor | None = None  # (B or 1, 1, T - first, T) 0 or -inf, added to the scores
    offsets: Tensor | None = None  # (max_docs + 1,) int32: where documents start in B * T, then B * T
    blocks: object | None = None  # FlexAttention's BlockMask
    max_len: int = 0  # tokens of the longest document, rows' ends cut; 0: T


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend causally: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K), scores scaled by K^-1/2.

    q holds the positions that the mask was made for: all, or those from build_mask's `first` on.
    """
    return BACKENDS[mask.backend].run(q, k, v, mask)


def build_mask(
    spec: MaskSpec, starts_doc: Tensor, backend: str, dtype: torch.dtype, first: int = 0
) -> AttentionMask:
    """Put a spec over rows whose documents start at starts_doc (B, T) bool into a backend's form.

    `first` above 0: for the queries of positions from there on alone. No kernel skips what they do not see,
    so they go to sdpa with a bias, whatever the backend.
    """
    backend = "sdpa" if first else backend
    mask = AttentionMask(backend, spec.window)
    form = BACKENDS[backend].form
    if form == "offsets" and spec.documents:
        extent = spec.extent or known_extent(starts_doc)
        return mask._replace(offsets=document_offsets(starts_doc, extent.max_docs), max_len=extent.max_len)
    if form == "offsets" or (form == "bias" and spec.is_plain and not first):
        return mask
    segments = starts_doc.cumsum(1, dtype=torch.int32) if spec.documents else None  # (B, T)
    if form == "segments":
        return mask._replace(segments=segments)
    if form == "blocks":
        return mask._replace(blocks=flex_blocks(segments, spec.window, starts_doc))
    visible = visible_keys(starts_doc.size(1), spec.window, segments, starts_doc.device)[:, :, first:]
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask._replace(bias=bias.masked_fill(~visible, -math.inf))


def visible_keys(seq_len: int, window: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Say which keys each query sees: (B, 1, T, T) bool, or (1, 1, T, T) without segments (B, T)."""
    position = torch.arange(seq_len, device=device)
    back = position[:, None] - position  # (T, T): how far before the query a key lies
    visible = (back >= 0)[None, None]
    if window:
        visible = visible & (back <= window)
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    return visible


def usual_docs(rows: int, seq_len: int) -> int:
    """Return how many documents a batch is expected to hold at most: one a row, one every 128 tokens."""
    return min(rows + rows * seq_len // 128, rows * seq_len)


def count_docs(starts_doc: np.ndarray | Tensor) -> int:
    """Count the documents of (B, T) starts, cut at rows' ends: a row's first position always starts one."""
    return int(starts_doc[:, 1:].sum()) + len(starts_doc)


def extent_of(starts_doc: np.ndarray, max_len: int) -> Extent:
    """Bound the documents of (B, T) starts, none longer than max_len; counted before they leave the CPU.

    Twice the usual number, four times and so on, so that a few compiled graphs serve all batches.
    """
    return Extent(roomy_docs(count_docs(starts_doc), *starts_doc.shape), min(max_len, starts_doc.shape[1]))


def has_usual_docs(starts_doc: Tensor) -> bool:
    """Whether a graph that was not told an extent has room for the documents of (B, T) starts."""
    return count_docs(starts_doc) <= usual_docs(*starts_doc.shape)


def roomy_docs(num_docs: int, rows: int, seq_len: int) -> int:
    """Round a number of documents up to the usual number times a power of two."""
    room = usual_docs(rows, seq_len)
    while room < num_docs:
        room *= 2
    return min(room, rows * seq_len)


def known_extent(starts_doc: Tensor) -> Extent:
    """Bound the documents of starts on any device: counted, or in a graph, which cannot count, the usual."""
    rows, seq_len = starts_doc.shape
    if torch.compiler.is_compiling():
        return Extent(usual_docs(rows, seq_len), seq_len)
    return Extent(roomy_docs(count_docs(starts_doc), rows, seq_len), seq_len)


def document_offsets(starts_doc: Tensor, max_docs: int) -> Tensor:
    """Return where documents start in the flattened rows, as (max_docs + 1,) int32 padded with B * T.

    A row's first position always starts one. The length is fixed, so that a compiled graph stays valid; more
    documents than max_docs stop the program (on a GPU: at the next synchronisation) instead of being merged.
    """
    rows, seq_len = starts_doc.shape
    total = rows * seq_len
    starts = (starts_doc | (torch.arange(seq_len, device=starts_doc.device) == 0)).flatten()
    torch._assert_async(
        starts.sum() <= max_docs, f"a batch holds more than {max_docs} documents: pass its Extent"
    )
    index = torch.arange(total, dtype=torch.int32, device=starts.device)
    found = torch.where(starts, index, total).sort().values[:max_docs]
    return F.pad(found, (0, 1), value=total)


# The oracle


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute softmax(q k^T / sqrt(K) + mask) v as it is written, in float32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.size(2) // k.size(2)
    wide_q, wide_k, wide_v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, K)
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    visible = visible_keys(q.size(1), mask.window, mask.segments, q.device)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ wide_v).transpose(1, 2).to(q.dtype)


# What is part of torch


# With a bias cuDNN builds a plan for each new shape, and scoring brings a thousand; flash takes no bias.
WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use torch's scaled_dot_product_attention; without a bias it skips what causality hides."""
    bias, group = mask.bias, q.size(2) // k.size(2)
    pinned = bias is not None and q.device.type != "cpu"
    if pinned:  # the efficient kernel takes one key head a query head
        k, v, group = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"attn_mask": bias, "is_causal": bias is None, "enable_gqa": group > 1}
    with sdpa_kernel(WITH_BIAS) if pinned else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The same, asking cuDNN before torch's flash kernel; what it refuses the others take."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(q, k, v, mask)


def cudnn_only(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The same without the others: what the self-test calls."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, mask)


@torch._dynamo.assume_constant_result
def varlen_takes(name: str) -> bool:
    """Whether this torch's varlen_attn has a parameter: each version brought others."""
    from torch.nn.attention.varlen import varlen_attn

    return name in inspect.signature(varlen_attn).parameters


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use torch's own flash kernel for rows of any length: documents, windows from torch 2.11 on."""
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if varlen_takes("window_size"):
        options["window_size"] = (mask.window or -1, 0)
    elif mask.window:
        raise RuntimeError(f"varlen_attn of torch {torch.__version__} has no window_size, 2.11 has")
    else:
        options["is_causal"] = True
    rows, seq_len, num_heads, _ = q.shape
    offsets, max_len = mask.offsets, mask.max_len or seq_len
    if offsets is None:
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * seq_len
    if varlen_takes("enable_gqa"):
        options["enable_gqa"] = num_heads != k.size(2)
    else:  # before 2.12 keys and values are repeated for each query head
        k, v = (x.repeat_interleave(num_heads // k.size(2), dim=2) for x in (k, v))
    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, K)
    return varlen_attn(q_flat, k_flat, v_flat, offsets, offsets, max_len, max_len, **options).view_as(q)


def flex_blocks(segments: Tensor | None, window: int, starts_doc: Tensor) -> object:
    """Make FlexAttention's block mask: blocks that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, seq_len = starts_doc.shape

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = i >= j
        if window:
            visible = visible & (i - j <= window)
        return visible if segments is None else visible & (segments[b, i] == segments[b, j])

    return create_block_mask(
        sees, None if segments is None else rows, None, seq_len, seq_len, device=starts_doc.device
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlexAttention, which torch.compile turns into a kernel for this mask."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compiler.is_compiling()
    kernel = flex_attention if compiled else torch.compile(flex_attention, dynamic=False)
    grouped = q.size(2) != k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return kernel(q, k, v, block_mask=mask.blocks, enable_gqa=grouped).transpose(1, 2)


# What the neighbouring modules hold


KEPT_BYTES = 1 << 28  # most bytes of softmax weights that a layer keeps for its backward pass


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend block by block of queries; sdpa where no backward pass follows, or too much is to be kept."""
    weight_bytes = q.size(0) * q.size(2) * q.size(1) ** 2 // 2 * q.element_size()
    if not torch.is_grad_enabled() or weight_bytes > KEPT_BYTES:
        return sdpa(q, k, v, mask)
    return blocked_forward(q, k, v, mask.bias, mask.window)[0]


def fa2(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use flash-attn 2."""
    return flash2((q, k, v), mask.offsets, mask.window, mask.max_len)


def fa3(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlashAttention 3."""
    return flash3((q, k, v), mask.offsets, mask.window, mask.max_len)


def fa4(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlashAttention 4."""
    return flash4((q, k, v), mask.offsets, mask.window, mask.max_len)


# The choice


HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)


class Backend(NamedTuple):
    """One way to compute attention: what it needs, and in which form it reads a mask."""

    run: Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
    form: str  # of its mask: bias, offsets, segments or blocks
    devices: tuple[str, ...] = ("cpu", "cuda", "mps", "xpu")
    dtypes: tuple[torch.dtype, ...] = HALF + FULL
    probe: Callable | None = None  # what the self-test calls instead of run


BACKENDS = {
    "fa3": Backend(fa3, "offsets", ("cuda",), HALF),
    "fa4": Backend(fa4, "offsets", ("cuda",), HALF),
    "fa2": Backend(fa2, "offsets", ("cuda",), HALF),
    "cudnn": Backend(cudnn_first, "bias", ("cuda",), HALF, cudnn_only),
    "varlen": Backend(torch_varlen, "offsets", ("cuda",), HALF),
    "flex": Backend(flex, "blocks", ("cuda",)),  # on a CPU it has no backward pass
    "blocked": Backend(blocked, "bias", ("cpu",)),
    "sdpa": Backend(sdpa, "bias"),
    "math": Backend(math_attention, "segments"),
}
# What auto tries, best first, by device; on others what torch itself has everywhere.
PLAIN_ORDER = {
    "cpu": ("blocked", "sdpa"),
    "hopper": ("fa3", "fa4", "cudnn", "sdpa"),
    "cuda": ("fa4", "fa2", "sdpa"),
}
# The same where windows or documents narrow what is seen: a bias costs memory traffic of B * T * T, so
# kernels that skip what is hidden come before those that add one.
NARROW_ORDER = {
    "cpu": ("blocked", "sdpa"),
    "hopper": ("fa3", "fa4", "varlen", "flex", "sdpa"),
    "cuda": ("fa4", "fa2", "varlen", "flex", "sdpa"),
}


class Choice(NamedTuple):
    """The backend that computes attention, and why those that auto tried before it do not."""

    backend: str
    refused: dict[str, str]  # name -> reason


def resolve_attention(
    requested: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], spec: MaskSpec
) -> Choice:
    """Choose and self-test a backend for heads (H, G, K); raise when the one asked for cannot do it."""
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"attention={requested}: expected auto or one of {', '.join(BACKENDS)}.")
    orders = PLAIN_ORDER if spec.is_plain else NARROW_ORDER
    kind = "hopper" if nvidia_capability(device)[0] == 9 else device.type
    order = orders.get(kind, ("sdpa", "math"))
    refused = {}
    for name in order if requested == "auto" else [requested]:
        refused[name] = refusal(name, device, dtype, heads, spec)
        if not refused[name]:
            return Choice(name, {other: reason for other, reason in refused.items() if reason})
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    raise UserError(
        f"attention={requested}: expected a backend that works on {device.type} in {dtype}, found:{reasons}\n"
        "Use attention=auto, or install what is missing (requirements/flash.txt, requirements/flash4.txt)."
    )


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], spec: MaskSpec
) -> str:
    """Say why a backend cannot be used; empty when it can."""
    backend = BACKENDS[name]
    if device.type not in backend.devices:
        return f"it trains on {' and '.join(backend.devices)} only"
    if dtype not in backend.dtypes:
        return f"it computes in {', '.join(map(str, backend.dtypes))} only (model.compute_dtype)"
    rounded = dtype in HALF or device.type != "cpu"  # a GPU multiplies float32 in TF32: 10 bits
    tolerance = 2e-2 if rounded else 1e-3  # of the largest element
    return why_wrong(lambda: self_test(name, device, dtype, heads, spec), tolerance, "math")


def self_test(
    name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], spec: MaskSpec
) -> float:
    """Compare outputs and gradients with `math` in float32; returns the largest relative difference."""
    num_heads, num_kv_heads, head_dim = heads
    rows, seq_len = 2, 128
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (rows, seq_len, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    *inputs, dy = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    starts_doc = (torch.arange(seq_len, device=device) == 50).expand(rows, -1)
    small = spec._replace(window=min(spec.window, 20), extent=None)
    results = []
    with torch.enable_grad():
        for tested, computed in ((name, dtype), ("math", torch.promote_types(dtype, torch.float32))):
            leaves = [x.detach().to(computed).requires_grad_() for x in inputs]
            kernel = BACKENDS[tested].probe or BACKENDS[tested].run
            y = kernel(*leaves, build_mask(small, starts_doc, tested, computed))
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(computed))])
    return relative_error(*results)
