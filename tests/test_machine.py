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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {}}, "make data"),
        ({"is_busy": True}, "timings will mislead"),
        ({}, "make run"),
        ({"runs_on": "cuda:0"}, "which wheel"),
    ],
)
def test_the_next_step_is_said(changes, words):
    """Whoever asks is told what to do."""
    found = {
        "is_busy": False,
        "data": {"x": ""},
        "runs_on": "cpu",
        "packages": dict.fromkeys(machine.PACKAGES, "missing"),
    }
    assert any(words in step for step in machine.advise(found | changes))
    fine = found | {"runs_on": "cuda:0", "packages": dict.fromkeys(machine.PACKAGES, "1.0")}
    assert machine.advise(fine) == ["nothing: everything is there"]


def test_datasets_are_described_by_their_manifests(tiny_data):
    """Tokens of both parts and the vocabulary."""
    found = machine.find_data(tiny_data.parent)
    assert "vocabulary 300" in found[tiny_data.name]
    assert re.match(r"[1-9][\d,]* and [1-9][\d,]* tokens", found[tiny_data.name])


FAULTS = """
import resource, sys, torch
from kernels.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(30):  # eight tensors of 8 MiB at once, as a step has them
    tensors = [torch.ones(1 << 21) for _ in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_memory_of_a_step_is_kept_for_the_next():
    """Otherwise each large tensor costs a page fault every 4 KiB, every time."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], cwd=ROOT)) for mode in ("keep", "")
    ]
    assert faults[1] - faults[0] > 20_000
