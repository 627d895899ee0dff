"""dev/setup.sh finds the machine's GPU; every command that it calls is a stand-in, nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fixtures_model import ROOT

VARIABLES = {"TORCH": "2.13.0", "TORCH_INDEX": "CPU_INDEX", "ROCM_INDEX": "AMD_INDEX", "GPU": "cu130"}
CONSTRAINED = "-r requirements.txt -r requirements/dev.txt -c constraints/"


@pytest.fixture
def set_up(tmp_path):
    """Run the script beside commands that answer as told; returns its process and what pip was asked for."""
    shell = shutil.which("sh")

    def run(system: str = "Linux x86_64", gpu: str = "", kfd: bool = False, refused: str = "none"):
        folder, log = tmp_path / "bin", tmp_path / "pip.log"
        folder.mkdir()
        kernel, machine = system.split()
        python = f'case "$*" in *" install "*) echo "${{*#*version-check }}" >>{log};; esac\n'
        python += f'case "$*" in *{refused}*) exit 1;; esac\n'
        commands = {"python": python, "uname": f'[ "$1" = -s ] && echo {kernel} || echo {machine}\n'}
        commands |= dict.fromkeys(gpu.split(), "exit 0\n")
        for name, body in commands.items():
            write_command(folder / name, shell, body)
        write_command(tmp_path / "venv" / "bin" / "python", shell, python)
        (tmp_path / "kfd").touch() if kfd else None
        places = {"PATH": str(folder), "PYTHON": "python", "VENV": str(tmp_path / "venv")}
        environment = VARIABLES | places | {"KFD": str(tmp_path / "kfd")}
        done = subprocess.run(
            [shell, "dev/setup.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def write_command(path: Path, shell: str, body: str) -> None:
    """Write a program of the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shell}\n{body}")
    os.chmod(path, 0o755)


@pytest.mark.parametrize(
    ("machine", "said", "asked"),
    [({"gpu": "nvidia-smi"}, "NVIDIA GPU found", [f"{CONSTRAINED}cu130.txt"]),
     ({"gpu": "rocminfo"}, "AMD GPU (ROCm) found",
      ["torch>=2.9.1,<2.16 --index-url AMD_INDEX", "-r requirements.txt -r requirements/dev.txt"]),
     ({"kfd": True}, "AMD GPU (ROCm) found",
      ["torch>=2.9.1,<2.16 --index-url AMD_INDEX", "-r requirements.txt -r requirements/dev.txt"]),
     ({"gpu": "nvidia-smi rocminfo"}, "NVIDIA GPU found", [f"{CONSTRAINED}cu130.txt"]),
     ({"system": "Darwin arm64"}, "Mac found",
      ["torch==2.13.0 -c constraints/cpu.txt", f"{CONSTRAINED}cpu.txt"]),
     ({}, "no NVIDIA or AMD GPU",
      ["torch==2.13.0+cpu -c constraints/cpu.txt", f"{CONSTRAINED}cpu.txt"])],
)  # fmt: skip
def test_each_machine_gets_its_torch(set_up, machine, said, asked):
    """An NVIDIA GPU comes before an AMD one, as torch has it."""
    done, found = set_up(**machine)
    assert done.returncode == 0, done.stderr
    assert f"setup: {said}" in done.stdout
    assert found == asked


def test_without_a_cpu_build_any_build_of_the_version_is_taken(set_up):
    """Indexes differ in whether they have builds without CUDA."""
    done, found = set_up(refused="+cpu")
    assert done.returncode == 0
    assert found[1] == "torch==2.13.0 --index-url CPU_INDEX"


def test_a_wrong_rocm_index_is_named(set_up):
    """Each ROCm version has its own."""
    done, _ = set_up(gpu="rocminfo", refused="AMD_INDEX")
    assert done.returncode == 1
    assert "Set ROCM_INDEX=" in done.stderr


def test_an_intel_mac_is_refused_before_anything_is_made(set_up):
    """Torch has no builds for it since 2.3; an Intel Python on an Apple processor looks the same."""
    done, found = set_up(system="Darwin x86_64")
    assert (done.returncode, found) == (1, [])
    assert "an arm64 Python" in done.stderr


def test_make_eval_makes_the_data_of_the_record_first():
    """A fresh clone has none, and `make data` alone makes another vocabulary."""
    record = "records/track_cpu/2026-11-21_NaiveBaseline"
    said = subprocess.check_output(["make", "-n", "eval", f"RECORD={record}"], cwd=ROOT, text=True)
    assert said.index("data.builtin --vocab-size 1024") < said.index(f"-m eval {record}")
    assert "data.builtin" not in subprocess.check_output(["make", "-n", "eval"], cwd=ROOT, text=True)
