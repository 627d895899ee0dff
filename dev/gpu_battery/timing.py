"""Timing, memory and profiles of device work: events on a GPU, the wall clock on a CPU.

What a CPU cannot tell is the text NOT_ON_CPU, never a made-up number.
"""

import gc
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from dev.gpu_battery.job import Job
from formats.hardware import CARDS, find_card
from train_gpt import Environment, Ranks

NOT_ON_CPU = "not on a CPU"
REPEATS = 5
TOP_KERNELS = 20
KERNEL_NAME_CHARS = 120
ERROR_CHARS = 120  # of what an allocator says before it gives advice
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")  # of a trace's events: what occupies the device
CPU_CATEGORIES = ("cpu_op",)
PEAK_SHARES = ("mfu", "of_peak")  # keys of results


def open_ranks(rehearse: bool) -> Ranks:
    """Open the device as a run does: the GPU, or for a rehearsal the CPU."""
    return Ranks(Environment({}), "cpu" if rehearse else "cuda")


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wall_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Time one call by the wall clock, all that it gave the device included."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def times_ms(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Time calls one by one: on a GPU by events between them, while the host runs ahead."""
    if device.type != "cuda":
        return [1000 * wall_seconds(action, device) for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def timed(action: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> dict:
    """Return the median and the range of milliseconds after two unmeasured calls."""
    for _ in range(2):
        action()
    times = times_ms(action, device, repeats)
    return {"ms": median(times), "ms_least": min(times), "ms_most": max(times), "repeats": repeats}


def peak_tflops(device: torch.device) -> float | None:
    """Look up the card's bf16 peak; None for one that the table does not have, or without bf16."""
    key = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""
    return CARDS[key].tflops if key and CARDS[key].item_bytes == 2 else None


def utilization(flops: float, ms: float, device: torch.device) -> float | str:
    """Return achieved operations over the card's peak."""
    peak = peak_tflops(device)
    if peak is None:
        return NOT_ON_CPU if device.type == "cpu" else "no peak known for this card"
    return flops / (ms / 1000) / (peak * 1e12)


def too_fast(found, name: str = "") -> list[str]:
    """Name the shares of a peak that are above 1: their timing did not wait for the device."""
    if isinstance(found, dict):
        return [text for key, item in found.items() for text in too_fast(item, key)]
    wrong = name in PEAK_SHARES and isinstance(found, float) and not 0 < found <= 1
    return [f"{name} is {found:.3g} of what the card can do"] if wrong else []


def free_memory(device: torch.device) -> None:
    """Give back what is not in use and count peaks from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> dict:
    """Return the most device memory since free_memory, in tensors and as held by the allocator."""
    if device.type != "cuda":
        return {"peak_gib": NOT_ON_CPU}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def unless_out_of_memory(action: Callable[[], dict], device: torch.device) -> dict:
    """Run a measurement from freed memory; that it does not fit is a result."""
    free_memory(device)
    try:
        return action()
    except torch.OutOfMemoryError as error:
        text = str(error).partition("\n")[0][:ERROR_CHARS]
    facts = {"out_of_memory": text} | memory_gib(device)
    free_memory(device)  # only here are the frames gone that held the tensors
    return facts


def measure_fitting(job: Job, name: str, action: Callable[[], dict], device: torch.device):
    """Measure what may need more memory than there is; what is too fast to be true is a fault."""
    found = job.measure(name, lambda: unless_out_of_memory(action, device))
    for text in too_fast(found):
        job.fault(name, text)
    return found


def profile(action: Callable[[], object], device: torch.device, folder: Path, steps: int = 2) -> dict:
    """Profile some calls: launches, idle share and the kernels that take most, a step each."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            action()
        synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))  # its form is older and steadier than the tables' columns
    try:
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    finally:
        path.unlink(missing_ok=True)
    facts = sum_up_trace(events, GPU_CATEGORIES if on_gpu else CPU_CATEGORIES, steps)
    return facts if on_gpu else facts | dict.fromkeys(("launches", "busy_ms", "idle_share"), NOT_ON_CPU)


def sum_up_trace(events: list[dict], categories: tuple[str, ...], steps: int) -> dict:
    """Sum up the events of some categories, a step each: launches, time, idle share, longest kernels."""
    chosen = [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]
    if not chosen:
        raise ValueError(f"the trace holds no event of {', '.join(categories)}")
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in chosen)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:  # streams overlap: count each moment once
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    span = end - spans[0][0]
    by_name: dict[str, list[float]] = {}
    for event in chosen:
        by_name.setdefault(event["name"], []).append(float(event["dur"]))
    total = sum(map(sum, by_name.values()))
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]
    return {
        "launches": len(chosen) / steps,
        "busy_ms": busy / 1000 / steps,
        "span_ms": span / 1000 / steps,
        "idle_share": 1 - busy / span if span else 0.0,
        "kernels": [
            {"kernel": name[:KERNEL_NAME_CHARS], "ms": sum(times) / 1000 / steps, "calls": len(times) / steps}
            | {"share": sum(times) / total if total else 0.0}
            for name, times in longest
        ],
    }
