"""Devices by torch's accelerator interface; only CPUs are here, so stand-ins say what a GPU would."""

import sys
from types import SimpleNamespace

import pytest
import torch

import quantizers.gptq
import train_gpt
from common import UserError
from formats.recipe import with_values
from kernels import attention, machine
from kernels.attention import MaskSpec, resolve_attention
from kernels.fp8 import Fp8Rule, require_fp8
from quantizers.gptq import CalibrationStats, factorize
from scoring.sliding import newton_step
from train_gpt import Config, Environment, Optimizers, Ranks, next_batch

GPU_KINDS = ("cuda", "xpu", "mps")


@pytest.fixture
def accelerator(monkeypatch):
    """Let torch find accelerators of a kind; returns what is set: the current one, products' precision."""

    def find(kind: str, count: int = 1) -> list[int | str]:
        chosen: list[int | str] = []
        stand_ins = {
            "current_accelerator": lambda check_available=False: torch.device(kind),
            "device_count": lambda: count,
            "set_device_index": chosen.append,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.accelerator, name, stand_in)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
        return chosen

    return find


@pytest.mark.parametrize("kind", GPU_KINDS)
@pytest.mark.parametrize("requested", ["auto", "named"])
def test_auto_and_its_name_take_the_accelerator(accelerator, kind, requested):
    """The process of local rank 1 takes the second one, makes it the current one and lets it use TF32."""
    chosen = accelerator(kind, 2)
    found = machine.resolve_device(kind if requested == "named" else requested, 1)
    assert found == torch.device(kind, 1)
    assert chosen == [1, "high"]
    assert machine.resolve_device("cpu") == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(accelerator):
    """The message names what is there; a kind of accelerator that we do not know is none."""
    for requested in GPU_KINDS:
        with pytest.raises(UserError, match=f"run.device={requested}: expected such a device, found cpu"):
            Ranks(Environment({}), requested)
    accelerator("mps")
    with pytest.raises(UserError, match=r"run\.device=cuda: .* found mps\. Use run\.device=auto or mps"):
        Ranks(Environment({}), "cuda")
    with pytest.raises(UserError, match="a GPU for each process, found 1 for local rank 3"):
        Ranks(Environment({}, 3, 3, 4), "auto")
    accelerator("hpu")
    assert Ranks(Environment({}), "auto").device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", *GPU_KINDS])
def test_every_device_can_be_asked_for(device):
    """run.device takes each, and nothing else."""
    cfg = with_values(Config(), {"run.device": device}, "test")
    train_gpt.check_config(cfg)
    with pytest.raises(UserError, match="must be one of auto, cpu, cuda, xpu, mps"):
        train_gpt.check_config(with_values(Config(), {"run.device": "tpu"}, "test"))


def test_processes_talk_by_what_fits_their_device(accelerator, monkeypatch):
    """nccl for NVIDIA and AMD, xccl for Intel, gloo for CPUs."""
    asked = []
    monkeypatch.setattr(
        train_gpt.dist, "init_process_group", lambda backend, **rest: asked.append((backend, rest))
    )
    monkeypatch.setattr(Ranks, "meet_peers", lambda ranks, environment: {})
    for kind in ("cuda", "xpu"):
        accelerator(kind, 2)
        Ranks(Environment({}, 1, 1, 2), "auto")
    Ranks(Environment({}, 1, 1, 2), "cpu")
    assert [backend for backend, _ in asked] == ["nccl", "xccl", "gloo"]
    assert [rest["device_id"] for _, rest in asked] == [torch.device("cuda:1"), torch.device("xpu:1"), None]


def test_waiting_for_a_device_is_torchs_interface(accelerator, monkeypatch):
    """A CPU has nothing to wait for."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    accelerator("xpu")
    Ranks(Environment({}), "auto").synchronize()
    Ranks(Environment({}), "cpu").synchronize()
    assert waited == [torch.device("xpu:0")]


@pytest.mark.parametrize(("kind", "asynchronous"), [("cuda", True), ("xpu", False), ("mps", False)])
def test_only_cuda_copies_while_the_program_goes_on(monkeypatch, kind, asynchronous):
    """Apple's GPUs read the source later, when a batch that nobody keeps may be freed: silent garbage."""
    copied = []

    class Source:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            copied.append((device.type, self.pinned, non_blocking))

    monkeypatch.setattr(train_gpt.torch, "from_numpy", lambda part: Source())
    loader = SimpleNamespace(take=lambda *sizes: (0, 1, 2))
    ranks = SimpleNamespace(device=torch.device(kind), rank=0, world_size=1)
    next_batch(loader, train_gpt.Stage(0, 4, 8, 1), ranks)
    assert copied == [(kind, asynchronous, asynchronous)] * 3


# Dtypes


@pytest.mark.parametrize(("capability", "dtype"), [(7, "float32"), (8, "bfloat16")])
def test_old_gpus_compute_in_float32_and_the_log_says_why(monkeypatch, capability, dtype):
    """A T4 (capability 7.5) has no bfloat16; float16 needs a scaled loss. Whoever asks gets what is asked."""
    device = torch.device("cuda", 0)
    properties = SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert machine.resolve_dtype("auto", device) == getattr(torch, dtype)
    assert machine.resolve_dtype("bfloat16", device) == torch.bfloat16
    said = machine.why_float32("auto", device)
    assert said == (" (this cuda has no native bfloat16)" if dtype == "float32" else "")
    assert machine.why_float32(dtype, device) == ""


def test_amd_and_apple_gpus_compute_in_bfloat16(monkeypatch):
    """ROCm calls them cuda and has bfloat16 on all; torch takes Macs from macOS 14 on, which has it."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert machine.resolve_dtype("auto", torch.device("mps")) == torch.bfloat16


def test_float64_is_refused_where_there_is_none(monkeypatch):
    """Apple's GPUs and some of Intel's; sums that want it are then of float32."""
    cfg = with_values(Config(), {"model.compute_dtype": "float64"}, "test")
    machine.check_device(cfg, torch.device("cpu"))
    for has_fp64 in (False, True):
        facts = SimpleNamespace(has_fp64=has_fp64)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, facts=facts: facts)
        widest = torch.float64 if has_fp64 else torch.float32
        assert machine.wide_dtype(torch.device("xpu")) == widest
    machine.check_device(cfg, torch.device("xpu"))
    assert machine.wide_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(UserError, match=r"compute_dtype=float64: .* this mps has\. Use float32"):
        machine.check_device(cfg, torch.device("mps"))


def test_a_model_is_made_only_where_it_can_be_computed(tiny_config, monkeypatch):
    """The check stands before the first tensor on the device."""
    cfg = with_values(tiny_config, {"model.compute_dtype": "float64"}, "test")
    with pytest.raises(UserError, match="Use float32"):
        train_gpt.make_gpt(cfg, torch.device("mps"))


def test_clipping_and_calibration_work_without_float64(tiny_config, alone, monkeypatch):
    """Norms, Gram matrices and factors come out as with it, to float32's precision."""
    cfg = with_values(tiny_config, {"optim.grad_clip_norm": 0.5}, "test")
    model = train_gpt.build_model(cfg, alone.device)
    results = []
    for wide in (torch.float64, torch.float32):
        for module in (train_gpt, quantizers.gptq):
            monkeypatch.setattr(module, "wide_dtype", lambda device, wide=wide: wide)
        grads = [torch.full((4, 4), 3.0), torch.ones(5)]
        Optimizers(model, cfg, alone).clip(grads[1:], grads[:1], 0.5)
        stats = CalibrationStats()
        stats.add_gram(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        stats.add_squares(torch.ones(64, 3))
        factor = factorize(stats.hessian)
        assert stats.hessian.dtype == stats.row_weights.dtype == wide
        assert factor.upper.dtype == torch.float32
        results.append([*grads, factor.upper, stats.row_weights.float()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4)


def test_fitted_scales_stay_on_their_device():
    """The eigenvalues of the 2 x 2 system are the CPU's business."""
    scales, sums = torch.ones(2), torch.tensor([1.0, 2.0, 2.0, 0.0, 0.0, 4.0])
    assert newton_step(scales, sums).tolist() == [0.5, 0.5]
    assert newton_step(scales.double(), sums.double()).dtype == torch.float64


# Kernels


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_gpus_attend_by_what_torch_has_everywhere(monkeypatch, kind):
    """sdpa, and math where its self-test fails; the others say which devices they are for."""
    device, tried = torch.device(kind), []
    monkeypatch.setattr(
        attention, "self_test", lambda name, *_: tried.append(name) or (1.0 if name == "sdpa" else 0.0)
    )
    for spec in (MaskSpec(), MaskSpec(8)):
        choice = resolve_attention("auto", device, torch.bfloat16, (4, 2, 16), spec)
        assert choice.backend == "math" and "differs from math" in choice.refused["sdpa"]
    assert tried == ["sdpa", "math"] * 2
    for name in set(attention.BACKENDS) - {"sdpa", "math"}:
        assert "only" in attention.refusal(name, device, torch.bfloat16, (4, 2, 16), MaskSpec())


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_amds_capabilities_are_no_nvidia_capabilities(monkeypatch, hip):
    """An MI250 reports 9.0, as a Hopper does: it takes neither its order of backends nor 8-bit products."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "" if name == "sdpa" else "no")
    device = torch.device("cuda")
    choice = resolve_attention("auto", device, torch.bfloat16, (4, 2, 16), MaskSpec())
    assert ("fa3" in choice.refused) == (hip is None)
    assert machine.nvidia_capability(device) == ((0, 0) if hip else (9, 0))
    if hip:
        with pytest.raises(UserError, match="an NVIDIA GPU of capability"):
            require_fp8(Fp8Rule("gemm"), {}, device)
    else:
        require_fp8(Fp8Rule("gemm"), {}, device)


@pytest.mark.parametrize("triton", [True, False])
def test_gpus_compile_where_triton_is(monkeypatch, triton):
    """Windows has none, Macs neither, nor cards below capability 7; a CPU compiles when it is asked to."""
    monkeypatch.setattr(machine, "has_triton", lambda: triton)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert machine.resolve_compile("auto", gpu) is triton
    assert [machine.resolve_compile(how, cpu) for how in ("auto", "on", "off")] == [False, True, False]
    assert not machine.resolve_compile("off", gpu)
    cfg = with_values(Config(), {"run.compile": "on"}, "test")
    machine.check_device(cfg, cpu)
    if triton:
        machine.check_device(cfg, gpu)
    else:
        with pytest.raises(UserError, match=r"run.compile=on: .* Use run.compile=auto or off"):
            machine.check_device(cfg, gpu)


# Memory


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_memory_is_read_from_the_devices_own_module(monkeypatch, kind):
    """torch.accelerator's functions of memory stop with an assertion on Macs before torch 2.15."""
    names = machine.ACCELERATORS[kind]
    module = SimpleNamespace(**{name: lambda size=size: size for size, name in enumerate(names, 5)})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert machine.peak_memory(torch.device(kind)) == (5, 6)


def test_the_functions_of_memory_exist():
    """They are named in strings, which nothing else checks."""
    for kind, names in machine.ACCELERATORS.items():
        assert all(callable(getattr(getattr(torch, kind), name)) for name in names)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_a_processs_memory_is_in_bytes(monkeypatch, platform, unit):
    """Linux counts KiB; Windows has no module `resource`, and nothing is said."""
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.peak_memory(torch.device("cpu")) == (7 * unit, 7 * unit)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory(torch.device("cpu")) == (0, 0)
