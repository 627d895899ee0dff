"""The machine report: what it says is what a run does, and it names nobody's paths."""

import json
import os
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fixtures_model import ROOT

from dev import machine
from formats.recipe import with_values
from train_gpt import Environment, Ranks, build_model


def test_the_report_names_what_a_run_takes(tiny_config, capsys):
    """Device, arithmetic and attention are those of a model that is made here."""
    machine.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    ranks = Ranks(Environment({}), "auto")
    model = build_model(with_values(tiny_config, {"model.compute_dtype": "auto"}, "test"), ranks.device)
    assert torch.device(found["runs_on"]).type == ranks.device.type
    assert found["compute_dtype"] == str(model.compute_dtype).removeprefix("torch.")
    assert found["attention"]["whole rows"]["backend"] == model.attention
    assert found["attention"]["whole rows"]["backend"] not in found["attention"]["whole rows"]["refused"]
    assert found["torch"] == torch.__version__


def test_it_fits_a_terminal_and_names_nobody(capsys):
    """People paste it into an issue: 80 columns, but for names of processors, and no home folder."""
    machine.main([])
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if len(line) > 80 and not line.startswith("next")] == []
    assert os.getcwd() not in said
    assert os.path.expanduser("~") not in said.replace("\n", " ").split()


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_a_gpu_is_described(monkeypatch, hip):
    """A stand-in: no GPU has been seen by this test."""
    about = SimpleNamespace(name="Big GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    found = machine.find_devices()
    kind = "ROCm 6.4" if hip else "CUDA 13.0"
    assert found["cuda:1"] == f"Big GPU, capability 9.0, 80 GiB, {kind}"


def test_intels_and_apples_gpus_are_described(monkeypatch):
    """Stand-ins again, of what their modules say."""
    about = SimpleNamespace(name="Arc", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("15.1", "", ""))
    found = machine.find_devices()
    assert found["xpu:0"] == "Arc, 16 GiB, Intel GPU"
    assert found["mps:0"] == "Apple GPU, 12 GiB for it, macOS 15.1"


@pytest.mark.parametrize(
    ("archs", "capability", "hip", "runs"),
    [
        (["sm_75", "sm_90"], (7, 5), None, True),
        (["sm_80", "sm_90"], (8, 9), None, True),
        (["sm_80", "sm_90"], (7, 5), None, False),
        (["sm_80", "sm_90a"], (6, 1), None, False),
        (["sm_90", "compute_90"], (12, 0), None, True),
        (["gfx90a", "gfx942"], (9, 4), "6.4", True),
        (["gfx1100"], (9, 4), "6.4", False),
        ([], (9, 0), None, True),
    ],
)
def test_a_gpu_without_kernels_is_found(monkeypatch, archs, capability, hip, runs):
    """Torch drops old cards; without this the first step fails with "no kernel image"."""
    major, minor = capability
    about = SimpleNamespace(name="Card", major=major, minor=minor, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert machine.find_gaps() == (
        [] if runs else [f"Card: this torch has kernels for {' '.join(archs)} only"]
    )


def test_the_driver_is_named_by_its_file(monkeypatch, tmp_path):
    """NVIDIA's and AMD's; others have none."""
    monkeypatch.setattr(machine, "DRIVER_FILES", {"NVIDIA": tmp_path / "nvidia", "AMD": tmp_path / "amd"})
    assert machine.find_driver() == machine.NO_DRIVER
    (tmp_path / "amd").write_text("6.12.12\n")
    assert machine.find_driver() == "AMD 6.12.12"
    (tmp_path / "nvidia").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"
    )
    assert machine.find_driver() == "NVIDIA 580.65.06"


def test_torch_says_what_it_was_built_for(monkeypatch):
    """A CPU build is the commonest reason for a GPU that is not used."""
    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, None)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert machine.find_build() == "CPUs alone"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.find_build() == "ROCm 6.4"
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert machine.find_build() == "ROCm 6.4, MPS"


PLAIN = {
    "is_busy": False,
    "data": {"x": ""},
    "runs_on": "cpu",
    "packages": dict.fromkeys(machine.PACKAGES, "missing"),
    "driver": machine.NO_DRIVER,
    "torch": "2.13.0",
    "built_for": "CPUs alone",
    "gaps": [],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {}}, "make data"),
        ({"is_busy": True}, "timings will mislead"),
        ({}, "make run"),
        ({"driver": "NVIDIA 580"}, "finds no GPU: its build, for CPUs alone, must be for this GPU"),
        ({"runs_on": "cuda:0"}, "which wheel"),
        ({"runs_on": "cuda:0"}, "triton-windows"),
        ({"runs_on": "cuda:0", "built_for": "ROCm 6.4"}, "nobody has run this on cuda here"),
        ({"runs_on": "xpu:0"}, "nobody has run this on xpu here"),
        ({"runs_on": "mps:0"}, "nobody has run this on mps here"),
        ({"gaps": ["Card: none"]}, "Card: none: install a torch built for it"),
    ],
)
def test_the_next_step_is_said(changes, words):
    """Whoever asks is told what to do."""
    assert any(words in step for step in machine.advise(PLAIN | changes))
    fine = PLAIN | {"runs_on": "cuda:0", "packages": dict.fromkeys(machine.PACKAGES, "1.0")}
    assert machine.advise(fine) == ["nothing: everything is there"]


def test_datasets_are_described_by_their_manifests(tiny_data):
    """Tokens of both parts and the vocabulary."""
    found = machine.find_data(tiny_data.parent)
    assert "vocabulary 300" in found[tiny_data.name]
    assert re.match(r"[1-9][\d,]* and [1-9][\d,]* tokens", found[tiny_data.name])


HELD = """
import resource, sys, torch
from kernels.machine import keep_freed_memory

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "keep":
    keep_freed_memory()
before = held()
tensors = [torch.ones(1 << 21) for _ in range(8)]  # of 8 MiB, as a step has them
del tensors
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_memory_of_a_step_is_kept_for_the_next():
    """Otherwise it goes back to the system, and each step's tensors come with page faults again.

    What is held after the first step is compared: glibc adapts to tensors of one size by itself.
    """
    kept, usual = (
        int(subprocess.check_output([sys.executable, "-c", HELD, mode], cwd=ROOT)) for mode in ("keep", "")
    )
    assert kept - usual > 40 << 20  # of 64


@pytest.mark.parametrize("program", ["train_gpt", "eval.__main__"])
def test_waiting_threads_give_up_their_core_soon(program):
    """OpenMP reads it when torch is loaded: later would be silent and slow beside another process."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        f"sys.meta_path.insert(0, Watch())\nimport {program}"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert said.splitlines()[0] == "2000"
