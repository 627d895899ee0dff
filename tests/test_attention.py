"""One function for all attention: every backend against the oracle, the oracle against loops, the choice."""

import math

import pytest
import torch
from fixtures_attention import PACKAGES, dense_kernel, install, pretend
from fixtures_numbers import assert_close_at_scale

import kernels.attention
from common import UserError
from kernels.attention import (
    BACKENDS,
    AttentionMask,
    Extent,
    MaskSpec,
    attend,
    build_mask,
    document_offsets,
    resolve_attention,
)
from kernels.blocked import blocked_forward

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
ON_CPU = ("blocked", "sdpa")
SPECS = {
    "causal": MaskSpec(),
    "window": MaskSpec(window=9),
    "documents": MaskSpec(documents=True, extent=Extent(20, 70)),
    "both": MaskSpec(window=9, documents=True, extent=Extent(20, 70)),
}


def draw(num_heads: int, num_kv_heads: int, seq_len: int = 70, dtype: torch.dtype = torch.float64) -> list:
    """Random q, k, v with gradients, of two rows and 8 channels a head, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    counts = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    *inputs, dy = (torch.randn(2, seq_len, n, 8, dtype=dtype, generator=generator) for n in counts)
    return [*(x.requires_grad_() for x in inputs), dy]


def draw_starts(seq_len: int = 70) -> torch.Tensor:
    """Document starts of two rows, (2, T) bool: the second begins in the middle of a document."""
    starts_doc = torch.rand(2, seq_len, generator=torch.Generator().manual_seed(1)) < 0.1
    starts_doc[0, 0], starts_doc[1, 0] = True, False
    return starts_doc


def run_attention(q, k, v, starts_doc, spec: MaskSpec, backend: str) -> torch.Tensor:
    return attend(q, k, v, build_mask(spec, starts_doc, backend, q.dtype))


def with_gradients(backend: str, spec: MaskSpec, heads: tuple[int, int], compiled: bool = False) -> list:
    """Output and gradients of a backend, optionally traced as one graph."""
    q, k, v, dy = draw(*heads)
    function = run_attention
    if compiled:
        torch.compiler.reset()
        function = torch.compile(run_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    y = function(q, k, v, draw_starts(), spec, backend)
    return [y, *torch.autograd.grad(y, (q, k, v), dy)]


def once_fast(names: dict) -> list:
    """Tracing takes half a second: the masks of neither and of both fast, those of one alone slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ("window", "documents") else name
            for name in names]  # fmt: skip


# What attention is


@pytest.mark.parametrize("name", SPECS)
def test_math_is_what_the_definition_says(name):
    """The oracle against loops over heads, queries and the keys that each may see."""
    spec, starts_doc = SPECS[name], draw_starts()
    q, k, v, _ = draw(4, 2)
    y = run_attention(q, k, v, starts_doc, spec, "math")
    for row, head, i in [(0, 0, 0), (0, 3, 69), (1, 1, 0), (1, 2, 33), (0, 1, 40), (1, 3, 69)]:
        start = 0
        if spec.documents:
            start = max([0, *(p for p in range(i + 1) if starts_doc[row, p])])
        if spec.window:
            start = max(start, i - spec.window)
        keys, values = k[row, start : i + 1, head // 2], v[row, start : i + 1, head // 2]
        weights = (keys @ q[row, i, head] / math.sqrt(8)).softmax(0)
        torch.testing.assert_close(y[row, i, head], weights @ values)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_cpu_backends_equal_math_in_outputs_and_gradients(backend, name, heads):
    """Fast and obvious form compute one function, for any number of heads that share a key head."""
    for fast, obvious in zip(*(with_gradients(b, SPECS[name], heads) for b in (backend, "math"))):
        torch.testing.assert_close(fast, obvious, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_late_queries_alone_see_what_they_see_among_all(backend, name):
    """Scoring asks the last block for its last positions only; keys and values are all there."""
    q, k, v, dy = draw(4, 2)
    starts_doc, spec = draw_starts(), SPECS[name]
    whole = run_attention(q, k, v, starts_doc, spec, "math")[:, 50:]
    late = attend(q[:, 50:], k, v, build_mask(spec, starts_doc, backend, q.dtype, 50))
    for one, other in zip(*([y, *torch.autograd.grad(y, (q, k, v), dy[:, 50:])] for y in (late, whole))):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seq_len", [1, 31, 32, 33])
def test_blocks_need_no_whole_number(seq_len):
    """Scorers and curricula bring rows of any length."""
    q, k, v, dy = draw(4, 2, seq_len)
    starts_doc = draw_starts(seq_len)
    y, expected = (run_attention(q, k, v, starts_doc, MaskSpec(), name) for name in ("blocked", "math"))
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(out, (q, k, v), dy) for out in (y, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("seq_len", [127, 128, 129, 300])
def test_half_precision_has_blocks_of_its_own_size(seq_len):
    """To rounding of bfloat16, against the oracle on the same numbers in float32."""
    q, k, v, dy = draw(4, 2, seq_len, torch.float32)
    starts_doc = draw_starts(seq_len)
    spec = MaskSpec(window=140, documents=True)
    results = []
    for dtype, name in ((torch.bfloat16, "blocked"), (torch.float32, "math")):
        leaves = [x.detach().bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        y = run_attention(*leaves, starts_doc, spec, name)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for ours, exact in zip(*results):
        assert_close_at_scale(ours.float(), exact, 4, torch.bfloat16)


@pytest.mark.parametrize("name", once_fast(SPECS))
@pytest.mark.parametrize("backend", [*ON_CPU, "math"])
def test_traced_as_one_graph_it_computes_the_same(backend, name):
    """Training compiles with fullgraph=True: a mask that breaks the graph stops the run."""
    eager, traced = (with_gradients(backend, SPECS[name], (4, 2), compiled) for compiled in (False, True))
    torch.testing.assert_close(traced, eager, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", [*ON_CPU, "math"])
def test_the_future_changes_nothing(backend, name):
    """Bitwise: a score is legal only if position t depends on nothing later."""
    q, k, v, _ = draw(4, 2, dtype=torch.float32)
    before = run_attention(q, k, v, draw_starts(), SPECS[name], backend)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, 41:] = 100.0
    after = run_attention(q, k, v, draw_starts(), SPECS[name], backend)
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


@pytest.mark.parametrize("spec", [MaskSpec(documents=True), MaskSpec(9, True)])
@pytest.mark.parametrize("backend", [*ON_CPU, "math"])
def test_a_document_neither_sees_nor_moves_its_neighbours(backend, spec):
    """Bitwise, and in the gradients: exact zeros for every other document."""
    starts_doc = torch.zeros(2, 70, dtype=torch.bool)
    starts_doc[:, [20, 50]] = True
    q, k, v, dy = draw(4, 2, dtype=torch.float32)
    before = run_attention(q, k, v, starts_doc, spec, backend)
    grads = torch.autograd.grad(before[:, 20:50], (q, k, v), dy[:, 20:50])
    for grad in grads:
        assert grad[:, 20:50].abs().sum() > 0
        assert torch.count_nonzero(grad[:, :20]) == torch.count_nonzero(grad[:, 50:]) == 0
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :20] = 100.0
            x[:, 50:] = -100.0
    after = run_attention(q, k, v, starts_doc, spec, backend)
    assert torch.equal(before[:, 20:50], after[:, 20:50])


@pytest.mark.parametrize("backend", [*ON_CPU, "math"])
def test_a_window_of_w_keeps_w_plus_one_keys(backend):
    """The flash kernels count so; an off-by-one would be another model on each machine."""
    q, k, v, dy = draw(2, 2)
    y = run_attention(q, k, v, draw_starts(), MaskSpec(window=9), backend)
    (grad,) = torch.autograd.grad(y[:, 30], v, dy[:, 30])
    assert grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == list(range(21, 31))


def test_blocked_leaves_to_sdpa_what_it_does_no_better(monkeypatch):
    """Without a backward pass, or with too much to keep, sdpa needs less memory."""
    q, k, v, _ = draw(4, 2, dtype=torch.float32)
    mask = AttentionMask("blocked")
    with torch.no_grad():
        assert torch.equal(attend(q, k, v, mask), attend(q, k, v, AttentionMask("sdpa")))
    assert "blocked" in type(attend(q, k, v, mask).grad_fn).__name__
    monkeypatch.setattr(kernels.attention, "KEPT_BYTES", 2 * 4 * 70 * 70 // 2 * 4 - 1)
    assert "blocked" not in type(attend(q, k, v, mask).grad_fn).__name__


def test_the_blocked_operator_keeps_torchs_contract():
    """Schema, traced shapes and strides, and registered gradients are what torch.compile trusts."""
    q, k, v, _ = draw(4, 2, 40)
    torch.library.opcheck(blocked_forward, (q, k, v, None, 0))


# Documents as offsets


def test_offsets_are_the_starts_padded_with_the_end():
    """A row's first position always starts a piece; the length is fixed for the compiled graph."""
    starts_doc = torch.zeros(2, 6, dtype=torch.bool)
    starts_doc[0, 0] = starts_doc[0, 4] = starts_doc[1, 5] = True
    offsets = document_offsets(starts_doc, max_docs=6)
    assert offsets.tolist() == [0, 4, 6, 11, 12, 12, 12]
    assert offsets.dtype == torch.int32
    assert document_offsets(starts_doc, max_docs=4).tolist() == [0, 4, 6, 11, 12]


@pytest.mark.parametrize("compiled", [False, True])
def test_too_many_documents_stop_the_program(compiled):
    """Cut silently, the last documents would see each other."""
    function = document_offsets
    if compiled:
        torch.compiler.reset()
        function = torch.compile(document_offsets, backend="aot_eager", fullgraph=True, dynamic=False)
    assert function(torch.ones(1, 6, dtype=torch.bool), 6).tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="more than 5 documents: pass its Extent"):
        function(torch.ones(1, 6, dtype=torch.bool), 5)


# Kernels from elsewhere


def assert_package_equals_math(monkeypatch, backend: str, name: str, compiled: bool) -> None:
    expected = with_gradients("math", SPECS[name], (4, 2))
    pretend(monkeypatch, backend)
    found = with_gradients(backend, SPECS[name], (4, 2), compiled)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_get_what_they_expect(monkeypatch, backend, name):
    """Argument names, shapes, windows and offsets, against stand-ins with their signatures."""
    assert_package_equals_math(monkeypatch, backend, name, compiled=False)


@pytest.mark.parametrize("name", once_fast(SPECS))
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_are_called_from_one_graph(monkeypatch, backend, name):
    """The same, traced: a wrapper that breaks the graph stops a compiled training."""
    assert_package_equals_math(monkeypatch, backend, name, compiled=True)


def test_torch_varlen_repeats_heads_where_it_must(monkeypatch):
    """Before torch 2.12 its kernel takes one key head a query head."""
    pretend(monkeypatch, "varlen")
    monkeypatch.setattr(kernels.attention, "varlen_takes", lambda name: name == "window_size")
    found, expected = (with_gradients(name, MaskSpec(), (4, 2)) for name in ("varlen", "math"))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_flex_masks_are_traced_into_the_graph(name):
    """Forward only: FlexAttention has no backward pass on a CPU."""
    q, k, v, _ = (x.detach() for x in draw(4, 2, dtype=torch.float32))
    torch.compiler.reset()
    traced = torch.compile(run_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    y, expected = (
        function(q, k, v, draw_starts(), SPECS[name], backend)
        for function, backend in ((traced, "flex"), (run_attention, "math"))
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "device, first, pinned", [("meta", 50, True), ("meta", 0, False), ("cpu", 50, False)]
)
def test_a_bias_off_the_cpu_never_reaches_cudnn(monkeypatch, device, first, pinned):
    """It builds a plan for each new shape, and late queries bring a thousand. Here: on meta tensors."""
    calls = []

    def record(q, k, v, attn_mask, is_causal, enable_gqa):
        flags = torch.backends.cuda
        allowed = (flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled())
        calls.append((allowed, k.size(1), attn_mask is None, is_causal, enable_gqa))
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    q, k = (torch.empty(2, 70, heads, 8, device=device) for heads in (4, 2))
    mask = build_mask(MaskSpec(), torch.zeros(2, 70, dtype=torch.bool, device=device), "sdpa", q.dtype, first)
    assert attend(q[:, first:], k, k, mask).shape == (2, 70 - first, 4, 8)
    usual = (True, True, True)
    assert calls == [
        ((False, False, True), 4, False, False, False) if pinned else (usual, 2, not first, not first, True)
    ]


# The choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_on_a_cpu_takes_the_blocked_form(dtype):
    """It is the faster one in every dtype that a CPU computes in, and passes its own test there."""
    choice = resolve_attention("auto", CPU, dtype, (4, 2, 32), MaskSpec(5, True))
    assert choice == ("blocked", {})


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4"])
def test_a_forced_package_loads_or_raises(monkeypatch, backend):
    """A run that asked for a kernel never trains silently on another."""
    here = BACKENDS[backend]._replace(devices=("cpu",), dtypes=(torch.float32,))
    monkeypatch.setitem(BACKENDS, backend, here)
    ask = (backend, CPU, torch.float32, (4, 2, 8), MaskSpec(3, True))
    with pytest.raises(
        UserError, match=rf"(?s)attention={backend}: expected .*No module named.*requirements"
    ):
        resolve_attention(*ask)
    install(monkeypatch, backend)
    assert resolve_attention(*ask) == (backend, {})


@pytest.mark.parametrize(
    "backend, reason",
    [("flex", "trains on cuda only"), ("fa3", "cuda only"), ("fast", "expected auto or one of")],
)
def test_a_backend_that_cannot_work_here_is_refused_with_the_reason(backend, reason):
    """The message says what was found and what to do."""
    with pytest.raises(UserError, match=reason):
        resolve_attention(backend, CPU, torch.float32, (4, 2, 8), MaskSpec())


def test_auto_goes_past_kernels_that_fail_or_compute_something_else(monkeypatch):
    """A wheel built for another torch may load and return wrong numbers; the self-test sees it."""
    pretend(monkeypatch, "fa3")
    monkeypatch.setitem(kernels.attention.PLAIN_ORDER, "cpu", ("fa4", "fa3", "sdpa"))

    def too_narrow(*inputs, causal, window_size):
        return dense_kernel(*inputs, causal=causal, window_size=(60, 0))

    monkeypatch.setattr("flash_attn_interface.flash_attn_func", too_narrow)
    choice = resolve_attention("auto", CPU, torch.float32, (4, 2, 8), MaskSpec())
    assert choice.backend == "sdpa"
    assert choice.refused["fa4"] == "it trains on cuda only"
    assert choice.refused["fa3"].startswith("it differs from math by")


def test_choosing_draws_no_random_numbers():
    """The initial weights may not depend on which kernels are installed."""
    before = torch.get_rng_state()
    resolve_attention("auto", CPU, torch.float32, (4, 2, 8), MaskSpec(3, True))
    assert torch.equal(before, torch.get_rng_state())


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_that_loads_on_this_gpu_equals_math(backend, name):
    """Compiled, at a training shape in bfloat16; resolve_attention compared it with math outside a graph."""
    device, heads, spec = torch.device("cuda"), (8, 4, 64), SPECS[name]
    try:
        resolve_attention(backend, device, torch.bfloat16, heads, spec)
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    *inputs, dy = (torch.randn(2, 512, n, 64, **options) for n in (8, 4, 4, 8))
    starts_doc = torch.zeros(2, 512, dtype=torch.bool, device=device)
    starts_doc[:, [100, 300]] = True
    torch.compiler.reset()
    traced = torch.compile(run_attention, fullgraph=True, dynamic=False)
    results = []
    for function, kind in ((traced, backend), (run_attention, "math")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves, starts_doc, spec, kind)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for fast, obvious in zip(*results):
        assert (fast - obvious).abs().max() <= 2e-2 * obvious.abs().max()
