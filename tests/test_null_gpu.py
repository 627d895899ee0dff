"""The null GPU's own parts without a CUDA build, and once the real thing where there is one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures_model import ROOT

from common import UserError
from dev.null_gpu import __main__ as command
from dev.null_gpu import environment as environment_module
from dev.null_gpu import report
from dev.null_gpu.cases import CASES, largest_attention
from dev.null_gpu.counters import Counts, KernelCount, read_dump
from dev.null_gpu.environment import (
    DEFAULT_ENVIRONMENT,
    SOURCE,
    TORCH,
    CudaEnvironment,
    build_library,
    check_machine,
    open_environment,
    variables,
)
from dev.null_gpu.stand_ins import GeneratedKernel, TritonBytes, count_blocks, parameter_names
from dev.null_gpu.stubs import answered_names, driver_names, write_stubs
from dev.pages import MARKS, with_block

# In the form of generated code: tensors read and written, read, written; a size; a constant.
KERNEL_SOURCE = """
import triton
@triton.jit
def triton_poi_fused_add_0(in_out_ptr0, in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tl.store(out_ptr0 + (x0), tmp2, None)
"""
STORED = {
    "after": {"torch": "2.11.0", "cases": {"a": {"launches": 100.0, "peak_gb": 10.0, "loop_syncs": 2.0}}}
}


def test_parameters_are_read_from_generated_source():
    """Types of constants are left out; another kernel's source is refused."""
    names = parameter_names("triton_poi_fused_add_0", KERNEL_SOURCE)
    assert names == ["in_out_ptr0", "in_ptr0", "out_ptr0", "xnumel", "XBLOCK"]
    with pytest.raises(ValueError, match="expected its definition"):
        parameter_names("triton_poi_fused_add", KERNEL_SOURCE)


def test_generated_kernels_count_the_bytes_of_their_tensors():
    """In and out once, both at once twice, by the size of what a view shows; numbers are none."""
    launches = []
    moved = TritonBytes(lambda name, blocks: launches.append((name, blocks)))
    kernel = GeneratedKernel("triton_poi_fused_add_0", KERNEL_SOURCE, moved)
    both, read = torch.zeros(10, dtype=torch.float32), torch.zeros(7, 4, dtype=torch.bfloat16)[:5]
    kernel.run(both, read, torch.zeros(3, dtype=torch.int64), 10, stream=0)
    assert moved.total() == 2 * 10 * 4 + 5 * 4 * 2 + 3 * 8
    kernel.run(both, read, torch.zeros(3, dtype=torch.int64), 10, stream=0)
    assert moved.by_kernel == {"triton_poi_fused_add_0": 2 * 144}
    assert launches == [("triton_poi_fused_add_0", 0)] * 2


def test_blocks_of_a_grid():
    """A grid is extents, or a function of the arguments."""
    assert count_blocks((3, 4), {}) == 12
    assert count_blocks(lambda meta: (meta["n"] // meta["BLOCK"],), {"n": 64, "BLOCK": 16}) == 4


def test_counts_are_those_of_the_c_source():
    """counters.py reads by position: the orders must agree."""
    order = re.search(r"enum \{\s*(KERNELS.*?), NUM_COUNTERS", SOURCE.read_text(), re.DOTALL)[1]
    assert [name.strip().lower() for name in order.split(",")] == list(Counts._fields)


def test_counts_of_a_step_come_from_two_lengths():
    """What starting and stopping costs cancels."""
    short, long = Counts(*[18.0] * 13), Counts(*[50.0] * 13)
    assert long.minus(short).per(16).syncs == 2.0
    assert short.launches == 36.0


def test_the_dump_is_read_by_frequency():
    """A C++ name may hold anything but a line end."""
    rows = read_dump("2\t7\tf(int,\tchar)\n30\t1\tg\n")
    assert rows == [KernelCount(30, 1, "g"), KernelCount(2, 7, "f(int,\tchar)")]


def test_the_largest_grid_of_attention_is_found():
    """Elementwise kernels launch many blocks, too; those are sound."""
    rows = [
        KernelCount(9, 786_432, "elementwise"),
        KernelCount(1, 64, "x::flash_bwd_dq"),
        KernelCount(1, 98, "fmha_c"),
    ]
    assert largest_attention(rows) == 98
    assert largest_attention(rows[:1]) == 0


def test_stubs_leave_out_what_is_answered():
    """Two definitions of one name would not link; cuDNN and NCCL stay real."""
    source = (
        "cudaError_t cudaMalloc(void **p) {}\nint cuInit(unsigned f) {}\nvoid __cudaRegisterFunction(int a)"
    )
    assert {"cudaMalloc", "cuInit", "__cudaRegisterFunction"} <= answered_names(source)
    names = ["cudaMalloc", "cuInit", "cudaGraphLaunch", "cublasCherk_v2", "cublasCreate_v2", "cudnnCreate"]
    names += ["ncclSend", "cublasZgemm_v2", "cudaGetErrorString", "cusolverGetErrorString", "cufftExecC2C"]
    lines = write_stubs(names, source).splitlines()[2:]
    assert [re.search(r"(cu\w+)\(", line)[1] for line in lines] == sorted(
        ["cudaGraphLaunch", "cublasCherk_v2", "cublasCreate_v2", "cublasZgemm_v2", "cusolverGetErrorString"]
    )
    text = "\n".join(lines)
    assert 'cublasZgemm_v2() { null_launch("cublasZgemm_v2", 0);' in text
    assert "cublasCreate_v2(void **handle)" in text and "const char *cusolverGetErrorString" in text


def test_names_of_the_driver_include_renamed_ones():
    """Programs link to cuMemAlloc_v2, whatever they write."""
    header = "#define cuMemAlloc cuMemAlloc_v2\nCUresult CUDAAPI cuInit(unsigned int Flags);\n"
    assert driver_names(header) == {"cuMemAlloc_v2", "cuInit"}


def test_figures_within_their_tolerance_did_not_move():
    """Memory and bytes by a hundredth; counts must be the same; times are never compared."""
    same = {"launches": 100.0, "peak_gb": 10.09, "loop_syncs": 2.0, "cpu_ms_update": 7.0, "compile_s": 9.0}
    report.check(STORED, TORCH, {"a": same})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"launches": 101.0}, r"a launches: expected 100, found 101"),
        ({"peak_gb": 10.11}, r"a peak_gb: expected 10 \(\+- 1%\), found 10\.11"),
        ({"loop_syncs": 1.9}, r"a loop_syncs: expected 2, found 1\.9"),
        ({"recompiles": 1.0}, r"a recompiles: expected none, found 1"),
    ],
)
def test_what_moved_is_named(change, message):
    """Case, figure, both values and what to do."""
    with pytest.raises(UserError, match=rf"1 figures moved(.|\n)*{message}(.|\n)*--store"):
        report.check(STORED, TORCH, {"a": STORED["after"]["cases"]["a"] | change})


def test_a_check_without_stored_figures_says_so():
    """Not that everything is fine."""
    with pytest.raises(UserError, match=r"found none\. Run with --store"):
        report.check({}, TORCH, {})


def test_figures_of_another_torch_are_not_compared():
    """Its kernels are others."""
    with pytest.raises(UserError, match=r"expected torch 2\.11\.0, whose figures are stored, found 2\.12\.0"):
        report.check(STORED, "2.12.0", STORED["after"]["cases"])


def test_the_last_column_that_is_stored_is_compared():
    """Figures from before a change are for reading."""
    stored = STORED | {"before": {"torch": "2.11.0", "cases": {"a": {"launches": 1.0}}}}
    report.check(stored, TORCH, STORED["after"]["cases"])
    with pytest.raises(UserError, match="stored as 'before'"):
        report.check({"before": stored["before"]}, TORCH, STORED["after"]["cases"])


def test_storing_fills_one_column_and_keeps_the_rest(tmp_path):
    """Other cases, the other column and the page around the tables stay; times are not kept."""
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    first, last = (mark.format(command=report.COMMAND) for mark in MARKS)
    page.write_text(f"# A\n{first}\nold\n{last}\n\n## B\n")
    naive = {"launches_update": 126.0, "peak_gb": 10.539447808, "cpu_ms_update": 1.25}
    report.store("before", "2.11.0", {"step_naive": naive}, figures, page)
    report.store("after", "2.11.0", {"step_naive": naive | {"launches_update": 90.0}}, figures, page)
    report.store("after", "2.11.0", {"calibration": {"launches": 4434.0}}, figures, page)
    stored = json.loads(figures.read_text())
    assert stored["before"]["cases"] == {"step_naive": {"launches_update": 126.0, "peak_gb": 10.5394}}
    assert set(stored["after"]["cases"]) == {"step_naive", "calibration"}
    text = page.read_text()
    assert text.startswith("# A\n<!--") and text.endswith("-->\n\n## B\n") and "old" not in text
    assert "| launches, update |  |  |  |  |  |  | 126 | 90 |" in text
    assert "| launches |  | 4,434 |" in text
    chunk = {"lora_chunk": {"launches_2000": 4465.463414634147}}
    report.store("after", "2.11.0", chunk, figures, page)
    report.check(report.read_figures(figures), "2.11.0", chunk)  # kept in six digits, compared in six
    page.write_text("nothing")
    with pytest.raises(UserError, match="expected the lines"):
        report.store("after", "2.11.0", {}, figures, page)


def test_the_page_shows_the_stored_figures():
    """Whoever edits one of them by hand has two truths."""
    text, stored = report.PAGE.read_text(), report.read_figures(report.FIGURES)
    assert set(stored["after"]["cases"]) == set(CASES)
    assert with_block(text, report.COMMAND, report.format_docs(stored)) == text


def test_lists_of_kernels_are_short_and_readable():
    """Names in C++ fill lines."""
    rows = [
        {"launches": 5, "blocks": 98_432, "name": "_Z1fv"},
        {"launches": 1, "blocks": 0, "name": "g" * 300},
    ]
    lines = report.format_kernels(rows, {"_Z1fv": "f()"}).splitlines()
    assert lines[1].split() == ["5", "98,432", "f()"]
    assert len(lines) == 3 and max(map(len, lines)) < 130
    assert report.format_bytes({"a": 10**9, "b": 3 * 10**9}).splitlines()[1].split() == ["3.00", "b"]
    assert report.format_bytes({}) == ""


@pytest.mark.parametrize(
    "system, machine, tools, message",
    [
        ("Darwin", "arm64", {"gcc": "x"}, "expected Linux on x86-64, found Darwin on arm64"),
        ("Linux", "aarch64", {"gcc": "x"}, "found Linux on aarch64(.|\n)*make gpu-check"),
        ("Linux", "x86_64", {"gcc": None, "nm": "x"}, "found no gcc(.|\n)*apt-get install gcc"),
    ],
)
def test_what_a_machine_lacks_is_named(system, machine, tools, message):
    """Before anything is built."""
    with pytest.raises(UserError, match=message):
        check_machine(system, machine, tools)


def test_an_environment_without_the_cuda_build_is_refused(tmp_path):
    """A CPU build has no libtorch_cuda; one of CUDA 12 has other headers."""
    with pytest.raises(
        UserError, match=r"found none\. Make one: `python -m dev.null_gpu --make-environment`"
    ):
        CudaEnvironment(tmp_path).headers()
    library = tmp_path / "lib/python3.12/site-packages/torch/lib/libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    with pytest.raises(UserError, match="expected headers of CUDA 13"):
        CudaEnvironment(tmp_path).headers()
    (tmp_path / "lib/python3.12/site-packages/torch-2.11.0+cu130.dist-info").mkdir()
    assert CudaEnvironment(tmp_path).torch_version() == "2.11.0+cu130"


def test_making_an_environment_installs_the_version_of_the_figures(tmp_path, monkeypatch):
    """First the folder, then torch; what fails is named."""
    ran = []

    def run(words, stdin):
        ran.append(" ".join(words))
        return subprocess.CompletedProcess(words, returncode=len(ran) // 2)

    monkeypatch.setattr(environment_module.subprocess, "run", run)
    monkeypatch.setattr(environment_module, "check_machine", lambda *_: None)
    with pytest.raises(UserError, match=r"bin/python -m pip install torch==2\.11\.0 .*` to work"):
        environment_module.make_environment(tmp_path)
    assert ran[0].endswith(f"-m venv {tmp_path}") and len(ran) == 2
    assert f"torch=={report.read_figures(report.FIGURES)['before']['torch']}" in ran[1]


def test_unknown_cases_are_named():
    """In the order of the table, or not at all."""
    assert command.choose_cases("calibration,step_naive") == ["step_naive", "calibration"]
    assert command.choose_cases("") == list(CASES)
    with pytest.raises(UserError, match=r"--cases: expected some of step_1061_low, .*found nothing_such"):
        command.choose_cases("nothing_such")


def test_a_case_that_fails_shows_the_end_of_its_log(tmp_path, monkeypatch):
    """Its traceback is the only trace of a missing answer."""
    monkeypatch.setattr(command, "SCRATCH", tmp_path)
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text("#!/bin/sh\necho no answer >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"step_naive: expected exit status 0, found 3(.|\n)*no answer"):
        command.run_case("step_naive", CudaEnvironment(environment), tmp_path / "no_library")


def test_a_process_sees_no_real_device(monkeypatch, tmp_path):
    """Settings for a real GPU must not reach it, and all of it lies below the library."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HOME", "/home/x")
    found = variables(tmp_path / "libnull_gpu.so", tmp_path / "caches")
    assert "CUDA_VISIBLE_DEVICES" not in found and found["HOME"] == "/home/x"
    assert found["LD_PRELOAD"] == str(tmp_path / "libnull_gpu.so")


# The real thing


@pytest.fixture(scope="module")
def environment() -> CudaEnvironment:
    """The CUDA build where it is: CUDA_VENV, else .venv-cuda."""
    try:
        return open_environment(Path(os.environ.get("CUDA_VENV", DEFAULT_ENVIRONMENT)))
    except UserError as error:
        pytest.skip(str(error))


PROGRAM = """
import sys, torch, triton, triton.language as tl
from pathlib import Path
from dev.null_gpu.counters import Counters
from dev.null_gpu.stand_ins import TritonBytes, keep_masks, replace_triton

counters = Counters(sys.argv[1])
moved = TritonBytes(counters.launch)
replace_triton(moved)
masks = keep_masks()

@triton.autotune([triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    pass

torch.cuda.init()
x = torch.zeros(3, 128, 64, device="cuda", dtype=torch.bfloat16)
mask = torch.tensor([True, False, True]).cuda()
counters.reset()
y = x @ x.mT
double[lambda meta: (meta["n"] // meta["BLOCK"],)](x, y, 640)
print(torch.cuda.get_device_name(), counters.read().flop, moved.total(), x[mask].shape[0])
print([row for row in counters.kernels(Path(sys.argv[2])) if row.name == "double"])
pinned = torch.zeros(4).pin_memory()
counters.reset()
pinned.to("cuda", non_blocking=True), torch.zeros(4).to("cuda", non_blocking=True)
print(counters.read().to_device, counters.read().pageable, counters.read().syncs)
y = x.sum().item()
print(counters.read().to_host, counters.read().syncs, y)
try:
    torch.empty(90 * 10**9, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("full")
"""


@pytest.mark.slow
def test_the_library_counts_what_it_is_given(environment, tmp_path):
    """Products, kernels of Triton, masks, copies, waits and the limit of memory, exactly."""
    library = build_library(environment, tmp_path)
    program = tmp_path / "program.py"  # a file: Triton reads its kernels' source
    program.write_text(PROGRAM)
    words = [str(environment.python), str(program), str(library), str(tmp_path / "kernels.tsv")]
    found = variables(library, tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=found, timeout=120)
    assert done.stderr == ""
    moved = 2 * 3 * 128 * 64 + 2 * 3 * 128 * 128
    assert done.stdout.splitlines() == [
        f"NVIDIA H100 80GB HBM3 (null) {2.0 * 3 * 128 * 128 * 64} {moved} 2",
        "[KernelCount(launches=1, blocks=10, name='double')]",
        "2.0 1.0 0.0",
        "1.0 1.0 0.0",
        "full",
    ]


@pytest.mark.slow
def test_a_case_runs_whole(environment, tmp_path):
    """The smallest one, by the command: it fits into the card, and attention launches no million blocks."""
    words = [
        "--cases",
        "calibration",
        "--environment",
        str(environment.folder),
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dev.null_gpu", *words], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "x.json").read_text())["calibration"]["figures"]
    assert figures["launches"] > 500 and figures["products_tflop"] > 20
    assert 5 < figures["peak_gb"] <= figures["reserved_gb"] < 84.9
    assert 0 < figures["attention_blocks"] < 1_000_000
