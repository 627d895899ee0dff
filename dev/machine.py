"""What this machine has, what a run would use of it, and what to do next: `python -m dev.machine`.

Its output is what an issue report should contain: it names no user, host or path outside the checkout.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import textwrap
from pathlib import Path

import torch

from common import CommandParser, UserError, run_command
from data.shards import MANIFEST_NAME, read_manifest
from kernels.attention import BACKENDS, MaskSpec, refusal, resolve_attention
from kernels.machine import resolve_compile, resolve_device, resolve_dtype, why_float32
from kernels.memory import total_memory

PACKAGES = (
    "numpy",
    "sentencepiece",
    "tokenizers",
    "zstandard",
    "brotli",
    "triton",
    "flash-attn",
    "flash-attn-4",
)
HEADS = (8, 4, 64)  # of the contest's baseline: query heads, key heads, width
PAD = "  "
DRIVER_FILES = {"NVIDIA": "/proc/driver/nvidia/version", "AMD": "/sys/module/amdgpu/version"}
NO_DRIVER = "no file of an NVIDIA or AMD driver"
BUSY = 0.5  # load a core above which timings mean little


def find_devices() -> dict[str, str]:
    """Describe the processors that torch can compute on: type -> what it is."""
    found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        size = f"{about.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{about.name}, capability {about.major}.{about.minor}, {size}, {kind}"
    for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        about = torch.xpu.get_device_properties(index)
        found[f"xpu:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, Intel GPU"
    if torch.backends.mps.is_available():
        size = f"{total_memory(torch.device('mps')) / 2**30:.0f} GiB"
        found["mps:0"] = f"Apple GPU, {size} for it, macOS {platform.mac_ver()[0]}"
    return found


def find_driver() -> str:
    """Name the driver's version where it says one: NVIDIA's, AMD's; others say none."""
    for name, path in DRIVER_FILES.items():
        if Path(path).is_file():
            words = Path(path).read_text(encoding="utf-8").split()
            return f"{name} {next((word for word in words if word[0].isdigit()), 'of unknown version')}"
    return NO_DRIVER


def find_build() -> str:
    """Say for which GPUs torch was built."""
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    built = [f"{name} {version}" for name, version in kinds.items() if version]
    built += ["MPS"] if torch.backends.mps.is_built() else []
    return ", ".join(built) or "CPUs alone"


def find_gaps() -> list[str]:
    """List the NVIDIA and AMD GPUs for which this torch holds no kernels: their first step would fail."""
    archs, gaps = torch.cuda.get_arch_list(), []
    binaries = [int(arch[3:].rstrip("af")) for arch in archs if arch.startswith("sm_")]
    portable = [int(arch[8:].rstrip("af")) for arch in archs if arch.startswith("compute_")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        number = 10 * about.major + about.minor
        runs = any(found // 10 == about.major and found <= number for found in binaries)
        runs |= any(found <= number for found in portable)
        if torch.version.hip:
            runs = about.gcnArchName.partition(":")[0] in archs
        if archs and not runs:
            gaps.append(f"{about.name}: this torch has kernels for {' '.join(archs)} only")
    return gaps


def choose_attention(device: torch.device) -> dict[str, dict]:
    """Say for whole rows and for windows which backend a run would take, and why not the others."""
    dtype, chosen = resolve_dtype("auto", device), {}
    for title, spec in (("whole rows", MaskSpec()), ("windows of 128", MaskSpec(128))):
        backend, refused = resolve_attention("auto", device, dtype, HEADS, spec)
        untried = [name for name in BACKENDS if name not in (backend, *refused)]
        reasons = refused | {name: refusal(name, device, dtype, HEADS, spec) for name in untried}
        chosen[title] = {"backend": backend, "refused": {name: why for name, why in reasons.items() if why}}
    return chosen


def find_packages() -> dict[str, str]:
    """Return the versions of what the project can use; "missing" where there is none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def find_data(root: Path) -> dict[str, str]:
    """Describe the datasets in a folder by their manifests."""
    found = {}
    for path in sorted(root.glob(f"*/{MANIFEST_NAME}")):
        try:
            manifest = read_manifest(path.parent) or {}
        except UserError:
            found[path.parent.name] = f"{MANIFEST_NAME} was altered, or is of an earlier version"
            continue
        train, val = (manifest.get(part, {}).get("tokens", 0) for part in ("train", "val"))
        entries = manifest.get("tokenizer", {}).get("vocab_size", "unknown")
        found[path.parent.name] = f"{train:,} and {val:,} tokens, vocabulary {entries}"
    return found


def look(datasets: Path = Path("data/datasets")) -> dict:
    """Collect everything."""
    devices = find_devices()
    device = resolve_device("auto")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    memory = total_memory(torch.device("cpu"))
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": f"{cores}, load {load:.2f}",
        "is_busy": load > BUSY * cores,
        "memory": f"{memory / 2**30:.0f} GiB" if memory else "unknown",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free",
        "driver": find_driver(),
        "torch": torch.__version__,
        "built_for": find_build(),
        "devices": devices,
        "runs_on": str(device),
        "compute_dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "why_float32": why_float32("auto", device),
        "gaps": find_gaps(),
        "compile": resolve_compile("auto", device),
        "attention": choose_attention(device),
        "packages": find_packages(),
        "data": find_data(datasets),
    }


def advise(found: dict) -> list[str]:
    """Say what to do next."""
    steps = []
    if found["is_busy"]:
        steps.append("other programs are at work: timings will mislead, and runs take fewer steps")
    if not found["data"]:
        steps.append("no data: `make data` writes the built-in corpus, data.prepare your own text")
    for gap in found["gaps"]:
        steps.append(f"{gap}: install a torch built for it, or set run.device=cpu")
    kind = found["runs_on"].partition(":")[0]
    if kind == "cpu" and found["driver"] != NO_DRIVER:
        steps.append(f"a GPU's driver is there, but torch {found['torch']} finds no GPU: its build, for "
                     f"{found['built_for']}, must be for this GPU and no newer than the driver")  # fmt: skip
    elif kind == "cpu":
        steps.append("no GPU that torch knows: `make run` trains the recipe for two CPU cores")
    if kind == "mps" or "ROCm" in found["built_for"] or kind == "xpu":
        steps.append(f"nobody has run this on {kind} here: compare a short run with run.device=cpu first")
    elif kind == "cuda" and all(found["packages"][name] == "missing" for name in PACKAGES if "flash" in name):
        steps.append("no FlashAttention: docs/gpu-and-multi-node.md says which wheel fits this torch")
    if kind in ("cuda", "xpu") and found["packages"]["triton"] == "missing":
        steps.append("no triton, so runs are not compiled: pip install triton, on Windows triton-windows")
    return steps or ["nothing: everything is there"]


def format_report(found: dict) -> str:
    """Lay it out for a terminal of 80 columns."""
    lines = [f"{name:<15}{found[name]}" for name in ("system", "cores", "memory", "disk", "driver")]
    lines.append(f"{'torch':<15}{found['torch']}, built for {found['built_for']}")
    lines += [f"{name:<15}{about}" for name, about in found["devices"].items()]
    lines.append(f"{'a run takes':<15}{found['runs_on']}, {found['compute_dtype']}{found['why_float32']}, "
                 f"torch.compile {'on' if found['compile'] else 'off'}")  # fmt: skip
    for title, choice in found["attention"].items():
        lines.append(f"{'attention':<15}{title}: {choice['backend']}")
        for reason in dict.fromkeys(choice["refused"].values()):
            names = " ".join(name for name, other in choice["refused"].items() if other == reason)
            lines += textwrap.wrap(
                f"not {names}: {reason}", 78, initial_indent=PAD, subsequent_indent=2 * PAD
            )
    lines += [f"{name:<15}{version}" for name, version in found["packages"].items()]
    lines += [f"{'data':<15}{name}: {about}" for name, about in found["data"].items()]
    return "\n".join([*lines, *(f"{'next':<15}{step}" for step in advise(found))])


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    parser = CommandParser(prog="python -m dev.machine", description=__doc__.partition(":")[0] + ".",
                           formatter_class=argparse.HelpFormatter)  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    found = look()
    print(json.dumps(found | {"next": advise(found)}) if options.json else format_report(found))


if __name__ == "__main__":
    run_command(main)
