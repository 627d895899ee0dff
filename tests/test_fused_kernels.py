"""The Triton kernels themselves, without a GPU: run by Triton's interpreter, and compiled for GPUs elsewhere.

The interpreter is chosen before Triton is imported: these tests run in a process of their own, which
`make gpu-check` and `make test-slow` start.
"""

import importlib.util
import json
import os
import time

import pytest
import torch
from fixtures_fused import FusedCase, compare, gate_case, loss_case, mlp_case, norm_case, write_project
from fixtures_model import run_python
from fixtures_numbers import assert_close_at_scale
from torch.library import opcheck

import train_gpt
from common import read_json
from dev.gpu_battery import fused as battery
from dev.gpu_battery.job import Job, read_records
from dev.gpu_battery.sizes import SIZES
from dev.kernels import TABLE
from formats.recipe import with_values
from kernels import fused_heads, fused_loss, fused_mlp
from kernels.fused_choice import TRIALS, FusedShape, gradients, largest_error
from pack.program import pack
from pack.readable import write_readable

BF16 = torch.bfloat16
FLOAT32 = torch.float32
has_triton = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not has_triton, reason="needs Triton: make gpu-check installs it beside .venv"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
DTYPES = [torch.float32, BF16]


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as integers and multiplies those: give it what they stand for."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        wide = interpreter._convert_float(tensor.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(wide, tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: multiply(self, widened(a), widened(b), *others),
    )


def check(case: FusedCase, dtype: torch.dtype) -> None:
    """Compare a kernel with its formula; the interpreter cuts bfloat16 off where a GPU rounds."""
    for found, expected in compare(case, fused=True):
        assert_close_at_scale(found, expected, 3 if dtype == BF16 else 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "dims", "has_gain"),
    [
        (1, 1, (64, 16), True),
        (37, 3, (32, 32), True),
        (130, 2, (128, 64), True),
        (37, 4, (64, 16), False),
        (130, 1, (32, 6), False),
    ],
)
def test_norm_and_rotation(tokens, heads, dims, has_gain, dtype):
    """Odd lengths, part or all of a head turned, with and without a gain."""
    check(norm_case(tokens, heads, dims, has_gain, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "parts"),
    [
        (1, (2, 2, 64), "value gate"),
        (37, (4, 2, 32), "value gate"),
        (130, (4, 1, 128), "value gate"),
        (37, (4, 2, 64), "value"),
        (37, (3, 3, 32), "gate"),
    ],
)
def test_exclusion_and_gates(tokens, heads, parts, dtype):
    """One to four query heads a value, either part absent."""
    check(gate_case(tokens, heads, parts, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "sizes", "slope"), [(1, (64, 64), 0.5), (37, (96, 136), 0.5), (130, (64, 264), 0.0)]
)
def test_squared_mlp(tokens, sizes, slope, dtype):
    """Tiles that tokens, widths and hidden sizes do not fill."""
    check(mlp_case(tokens, sizes, slope, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "sizes", "cap"), [(1, (64, 32), 30.0), (37, (1000, 96), 30.0), (130, (300, 32), 0.0)]
)
def test_loss(tokens, sizes, cap, dtype, monkeypatch):
    """A vocabulary that is no power of two, chunks of which the last is not full."""
    monkeypatch.setattr(fused_loss, "CHUNK_LOGITS", 50 * sizes[0])
    check(loss_case(tokens, sizes, cap, dtype), dtype)


def strided(*shape: int) -> torch.Tensor:
    """Draw heads as a flash kernel's transposed output or a slice of a joint product has them."""
    rows, tokens, heads, head_dim = shape
    return torch.randn(rows, heads + 1, tokens, head_dim).transpose(1, 2)[:, :, 1:].requires_grad_()


def test_inputs_may_have_any_strides():
    """Copies would cost what the kernels save."""
    head_case, gated = (
        norm_case(7, 3, (32, 8), True, FLOAT32),
        gate_case(7, (4, 2, 32), "value gate", FLOAT32),
    )
    check(head_case._replace(leaves=[strided(2, 7, 3, 32), *head_case.leaves[1:]]), FLOAT32)
    y, v = strided(2, 7, 4, 32), strided(2, 7, 2, 32)
    check(gated._replace(leaves=[y, v, *gated.leaves[2:]]), FLOAT32)


@pytest.mark.parametrize("name", TRIALS)
def test_they_work_in_a_compiled_graph(name):
    """Fake outputs have the shapes of real ones, gradients too: one graph, the same numbers."""
    torch.compiler.reset()
    trial = TRIALS[name](FusedShape(40, 48, (4, 2, 32), 16, 64, 1000, 12), torch.empty(0))
    compiled = torch.compile(trial.run, fullgraph=True, dynamic=False, backend="aot_eager")
    eager = gradients(lambda *leaves: trial.run(True, *leaves), trial.leaves)
    traced = gradients(lambda *leaves: compiled(True, *leaves), trial.leaves)
    assert all(map(torch.equal, eager, traced))


def test_operators_tell_torch_the_truth():
    """Schemas, fakes and gradients by torch's own check."""
    x, table, gain = torch.randn(1, 5, 4, 32).requires_grad_(), torch.randn(5, 1, 8), torch.randn(4)
    v, seen, weight = torch.randn(1, 5, 2, 32), torch.randn(1, 5, 12), torch.randn(4, 12)
    flat, up = torch.randn(5, 16), torch.randn(8, 16)
    square, signs = fused_mlp.square_up(flat, up, 0.5)
    calls = [
        (fused_heads.norm_rotate_forward, (x, table, table, gain)),
        (fused_heads.norm_rotate_forward, (x, table, table, None)),
        (fused_heads.gate_forward, (x, v, seen, weight, 2.0, 1.0)),
        (fused_heads.gate_forward, (x, v, None, None, 2.0, 1.0)),
        (fused_mlp.square_up, (flat, up, 0.5)),
        (fused_mlp.square_back, (flat, up.mT.contiguous(), square, signs, 0.5)),
        (fused_loss.head_loss_forward, (flat, torch.randn(40, 16), torch.arange(5), 30.0)),
    ]
    for operator, arguments in calls:
        opcheck(operator, arguments)


@pytest.mark.parametrize("name", TRIALS)
def test_the_self_test_passes_and_finds_a_wrong_kernel(name, monkeypatch):
    """At the 1.0611 recipe's heads, in bfloat16; a kernel whose output is cut short is found."""
    shape = FusedShape()._replace(model_dim=128, mlp_dim=256, vocab_size=500)
    assert largest_error(name, torch.device("cpu"), BF16, shape) < 2e-2
    trial = TRIALS[name](shape._replace(tokens=20), torch.empty(0, dtype=BF16))
    monkeypatch.setitem(
        TRIALS, name, lambda *_: trial._replace(run=lambda fused, *x: 1.1**fused * trial.run(fused, *x))
    )
    assert largest_error(name, torch.device("cpu"), BF16, shape) > 2e-2


@pytest.mark.slow
def test_the_battery_measures_them(tmp_path, monkeypatch):
    """As on a card, but for its clock: errors, repeatability, both forms and the variants."""
    monkeypatch.setattr(battery, "why_always_plain", lambda *_: "")
    monkeypatch.setitem(SIZES, "fused_shape", (None, (20, 32, (2, 1, 16), 8, 64, 100, 4)))
    for module, name in ((fused_mlp, "TILE"), (fused_loss, "CHUNK_LOGITS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    records = tmp_path / "records"
    job = Job("", str(records), str(tmp_path), "", "", True, 300.0, time.time())
    battery.run(job)
    battery.measure_variants(job, FusedShape(*SIZES["fused_shape"][1]), torch.device("cpu"))
    found = read_records(records)
    assert found.errors == {}
    for name in TRIALS:
        assert found.results[f"{name}_repeats"] is True
        assert found.results[f"{name}_error"] < 1e-3
        assert found.results[f"{name}_kernel"]["ms"] > 0
    assert found.results["mlp_wide"]["tflops"] > 0 and "loss_chunk_16777216" in found.results


# Packed and compiled


@pytest.mark.slow
@pytest.mark.parametrize("write", [pack, write_readable])
def test_a_packed_program_runs_its_kernels(tmp_path, write):
    """Renamed, folded, out of a string, or for readers: Triton finds the source, numbers stay."""
    out = tmp_path / "packed.py"
    write(tmp_path / "auto.toml", out, write_project(tmp_path))
    names = ("qk", "xsa", "mlp", "loss")
    plain, kernels = json.loads(run_python(out).stdout), json.loads(run_python(out, *names).stdout)
    assert (plain.pop(), kernels.pop()) == (False, True)
    assert kernels == pytest.approx(plain, rel=1e-5)
    assert kernels != plain


# Kernels of a packed program have other names: each is found by the names of its parameters.
COMPILE_PACKED = """
import inspect, linecache, sys
from pathlib import Path
import torch
from dev.kernels import compile_for, kernel_name, launches_of
from kernels.fused_choice import FusedShape
from pack.program import unwrap

launches = launches_of(FusedShape(), torch.bfloat16)
source, names = unwrap(Path(sys.argv[1]).read_bytes()), {"__name__": "packed"}
linecache.cache["<packed>"] = 0, None, source.splitlines(True), "<packed>"
exec(compile(source, "<packed>", "exec"), names)
kernels = {str(inspect.signature(one.function)): one for one in names.values() if hasattr(one, "function")}
for launch in launches:
    packed = kernels[str(inspect.signature(launch.kernel.function))]
    assert packed.function.__code__.co_filename == "<packed>"
    found = compile_for(launch._replace(kernel=packed), "sm_90")
    print(kernel_name(launch), "spill_bytes", found["spill_bytes"])
"""


@pytest.mark.slow
def test_kernels_compile_for_the_contests_gpu_without_spills(tmp_path):
    """From the source and from a packed program, as many as the table has; with the interpreter off."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python("-m", "dev.kernels", "--targets", "sm_90", env=environment)
    assert done.returncode == 0, done.stderr
    stored = {name: found["sm_90"] for name, found in read_json(TABLE).items()}
    assert len(done.stdout.splitlines()) == len(stored)
    for line, name in zip(done.stdout.splitlines(), stored):
        assert line.split()[:2] == [name, "sm_90"]
        assert "spill_bytes:0" in line
    out = tmp_path / "packed.py"
    pack(tmp_path / "auto.toml", out, write_project(tmp_path), "lzma")
    done = run_python("-c", COMPILE_PACKED, out, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [*(f"{name} spill_bytes 0" for name in stored), ""]


# What each operation of model.fused calls in a step.
OPERATORS = {
    "qk": {"golf::norm_rotate", "golf::norm_rotate_backward"},
    "mlp": {"golf::square_up", "golf::square_back"},
    "xsa": {"golf::exclude_and_gate", "golf::exclude_and_gate_backward"},
    "loss": {"golf::head_loss"},
}


@pytest.mark.parametrize("names", [("qk",), ("mlp",), ("xsa",), ("loss",), tuple(TRIALS)], ids=",".join)
def test_a_model_with_kernels_learns_what_it_learns_without(names, tiny_config, alone):
    """Loss and every gradient of a training step, recurrence, windows of documents and gates included."""
    fields = {
        "model.compute_dtype": "float32",
        "model.mlp_mult": 2,
        "model.leaky_slope": 0.5,
        "model.rope_dims": 8,
        "model.xsa_last": 2,
        "model.attn_gate": "sparse",
        "model.out_init": "depth",
        "model.logit_softcap": 15.0,
        "model.attn_in_document": True,
        "data.loader": "packed",
        "run.device": "cpu",
    }
    found = []
    for fused in (frozenset(), frozenset(names)):
        cfg = with_values(tiny_config, fields | {"model.fused": "auto"}, "test")
        training = train_gpt.Training(cfg, alone, bos_id=1)
        assert training.model.fused == frozenset() and "cpu" in training.not_fused["qk"]
        training.model.fused = fused
        training.loss = train_gpt.mean_loss_in_blocks if "loss" in fused else train_gpt.mean_loss
        training.model.train()
        with torch.profiler.profile() as profile:
            loss = training.micro_step(train_gpt.get_phases(cfg)[0], 0)
        called = {event.key for event in profile.key_averages()} & set().union(*OPERATORS.values())
        assert called == set().union(*(OPERATORS[name] for name in fused))
        found.append([loss, *(param.grad for param in training.model.parameters() if param.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for mine, theirs in zip(*found):
        assert_close_at_scale(theirs, mine, 400)
