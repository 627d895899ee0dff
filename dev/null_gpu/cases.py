"""What is measured on the null GPU, each case in a process of its own: steps, scoring, calibration."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt
from data.validation import ValidationText
from dev.gpu_battery.job import Job
from dev.gpu_battery.scoring import LORA, score_text
from dev.gpu_battery.sizes import load_recipe
from dev.gpu_battery.steps import Bench
from dev.gpu_battery.text import BOS_ID, write_tokens
from dev.gpu_battery.timing import open_ranks
from dev.null_gpu.counters import Counters, Counts, KernelCount
from dev.null_gpu.stand_ins import TritonBytes
from formats.recipe import with_values
from kernels.fused_choice import TRIALS
from scoring.adaptive import choose_chunk_tokens
from train_gpt import Log, Training, build_model, collect_statistics, train

RANKS = 8  # of the contest's machine: a micro-batch is what one of them computes
SHORT_LOOP, LONG_LOOP = 8, 24  # steps: their difference is free of what starting and stopping costs
WARM_STEPS = 3
LORA_LENGTHS = (48, 300, 1000, 2000)  # tokens of a document
LORA_DOCS = 64
ATTENTION = ("flash_fwd", "flash_bwd", "fmha", "attention", "mha_")  # parts of kernels' names
GB = 1e9
FOUND_NAME = "found.json"  # what a case's process writes


class Work(NamedTuple):
    """One piece of work, counted."""

    counts: Counts
    kernels: list[KernelCount]
    ms: float  # of the CPU
    peak_gb: float
    reserved_gb: float
    triton_gb: float


class Bed:
    """A process on the null GPU: counters, and a folder to work in."""

    def __init__(self, counters: Counters, moved: TritonBytes, folder: Path):
        self.counters, self.moved, self.folder = counters, moved, folder
        records = str(folder / "records.jsonl")
        self.job = Job("", records, str(folder), "", "", False, 1e6, time.time())

    def count(self, action: Callable[[], object]) -> Work:
        """Run some work and count it."""
        torch.cuda.reset_peak_memory_stats()
        self.counters.reset()
        self.moved.by_kernel.clear()
        started = time.perf_counter()
        action()
        ms = 1000 * (time.perf_counter() - started)
        counts = self.counters.read()
        kernels = self.counters.kernels(self.folder / "kernels.tsv")
        peaks = torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
        return Work(counts, kernels, ms, *peaks, self.moved.total() / GB)


class Found(NamedTuple):
    """What a case found."""

    figures: dict[str, float]
    kernels: list[KernelCount]  # the most frequent of its main piece of work
    bytes_by_kernel: dict[str, int]  # of generated code


def largest_attention(kernels: list[KernelCount]) -> int:
    """Return the blocks of the largest grid of an attention kernel; 0 where none was launched."""
    return max((row.blocks for row in kernels if any(part in row.name for part in ATTENTION)), default=0)


def open_step(bed: Bed, name: str, attention: str, passes: int, fused: str) -> Bench:
    """Make a recipe ready to step as one of 8 ranks does: one micro-batch, compiled."""
    base = load_recipe(bed.job, name)
    fracs = base.schedule.recur_start_fracs
    changes = {
        "data.data_path": write_tokens(bed.job, base),
        "data.micro_batches": base.data.micro_batches // RANKS,
        "data.batch_tokens": base.data.batch_tokens // RANKS,
        "run.compile": "on",
        "run.attention": attention,
        "model.fused": fused,
        "run.max_wallclock_seconds": 0,
        "run.val_loss_every": -1,
        "run.train_log_every": 0,
        "run.iterations": 10**6,
        # The training loop asks the schedule: recurrence never begins, or is always on.
        "schedule.recur_start_fracs": [1.0] * len(fracs) if passes == 1 else [],
    }
    return Bench(bed.job, load_recipe(bed.job, name, **changes), open_ranks(False), passes)


def run_loop(bed: Bed, training: Training, steps: int) -> None:
    """Run the training loop over so many steps."""
    folder = bed.folder / "loop"
    folder.mkdir(exist_ok=True)
    training.cfg = with_values(training.cfg, {"run.iterations": training.step + steps}, "null GPU")
    train(training, Log(folder, True), lambda: None)


def count_loop(bed: Bed, training: Training) -> Counts:
    """Count a step of the training loop between lines of its log."""
    short, long = (bed.count(partial(run_loop, bed, training, steps)) for steps in (SHORT_LOOP, LONG_LOOP))
    return long.counts.minus(short.counts).per(LONG_LOOP - SHORT_LOOP)


def count_step(bed: Bed, name: str, attention: str, passes: int, fused: str = "off") -> Found:
    """Count a compiled step: forward and backward, the update, and both as the training loop runs them."""
    bench = open_step(bed, name, attention, passes, fused)
    started = time.perf_counter()
    bench.forward_backward()
    compile_s = time.perf_counter() - started
    bench.training.update(0.0)
    for _ in range(WARM_STEPS):
        bench.whole_step()
    both = bed.count(bench.forward_backward)
    by_kernel = dict(bed.moved.by_kernel)
    update = bed.count(partial(bench.training.update, 0.0))
    loop = count_loop(bed, bench.training)
    dynamo = torch._dynamo.utils.counters
    figures = {
        "launches_forward_backward": both.counts.launches,
        "launches_update": update.counts.launches,
        "loop_launches": loop.launches,
        "loop_syncs": loop.syncs,
        "loop_copies_to_device": loop.to_device,
        "loop_pageable_copies": loop.pageable,
        "loop_copies_to_host": loop.to_host,
        "loop_copies_on_device": loop.on_device,
        "peak_gb": both.peak_gb,
        "reserved_gb": both.reserved_gb,
        "triton_gb": both.triton_gb,
        "products_tflop": both.counts.flop / 1e12,
        "attention_blocks": largest_attention(both.kernels),
        "graphs": dynamo["stats"]["unique_graphs"],
        "graph_breaks": sum(dynamo["graph_break"].values()),
        "recompiles": sum(dynamo["recompiles"].values()),
        "cpu_ms_forward_backward": both.ms,
        "cpu_ms_update": update.ms,
        "compile_s": compile_s,
    }
    return Found(figures, both.kernels, by_kernel)


def count_lora_batch(bed: Bed, length: int) -> tuple[int, Work]:
    """Score a batch of documents of one length with random weights, eagerly; returns its chunks."""
    changes = {"run.attention": "varlen", "run.compile": "off", "model.out_init": "depth"}
    cfg, ranks = load_recipe(bed.job, "1061", **(LORA | changes)), open_ranks(False)
    model = build_model(cfg, ranks.device).eval()
    num_docs = max(1, min(LORA_DOCS, cfg.run.val_batch_tokens // RANKS // length))
    tokens = np.full(num_docs * length + 1, BOS_ID + 1, dtype=np.uint16)
    tokens[::length] = BOS_ID
    sizes = np.ones(len(tokens) - 1, dtype=np.int64)
    text = ValidationText(tokens, sizes, BOS_ID, "", "", "", None)
    score = partial(score_text, model, cfg, text, ranks, False)
    score()  # the allocator's first calls
    return -(-length // choose_chunk_tokens(length, cfg.eval)), bed.count(score)


def count_lora(bed: Bed) -> Found:
    """Count LoRA scoring, a chunk: what more a batch of long documents takes than one of a single chunk."""
    (once, first), *longer = (count_lora_batch(bed, length) for length in LORA_LENGTHS)
    figures = {"launches_of_one": first.counts.launches, "syncs_of_one": first.counts.syncs}
    for length, (chunks, work) in zip(LORA_LENGTHS[1:], longer):
        counts = work.counts.minus(first.counts).per(chunks - once)
        figures |= {
            f"launches_{length}": counts.launches,
            f"syncs_{length}": counts.syncs,
            f"peak_gb_{length}": work.peak_gb,
            f"cpu_ms_{length}": (work.ms - first.ms) / (chunks - once),
        }
    return Found(figures, longer[-1][1].kernels, {})


def count_calibration(bed: Bed) -> Found:
    """Count the statistics of one calibration batch, with the optimizer's state in memory: eager."""
    base = load_recipe(bed.job, "1061")
    changes = {
        "data.data_path": write_tokens(bed.job, base),
        "run.attention": "varlen",
        "run.compile": "off",
        "quant.calib_batches": 1,
    }
    training = Training(load_recipe(bed.job, "1061", **changes), open_ranks(False), BOS_ID)
    work = bed.count(partial(collect_statistics, training))
    figures = {
        "launches": work.counts.launches,
        "syncs": work.counts.syncs,
        "copies_to_device": work.counts.to_device,
        "peak_gb": work.peak_gb,
        "reserved_gb": work.reserved_gb,
        "products_tflop": work.counts.flop / 1e12,
        "attention_blocks": largest_attention(work.kernels),
        "cpu_ms": work.ms,
    }
    return Found(figures, work.kernels, {})


def count_fused(bed: Bed) -> Found:
    """Count a step with every fused kernel; here, where nothing is computed, none passes its self-test."""
    train_gpt.choose_fused = lambda *_: (frozenset(TRIALS), {})
    return count_step(bed, "1061", "varlen", 3, fused="auto")


count_1061 = partial(count_step, name="1061", attention="varlen")


class Case(NamedTuple):
    """A row of the table of cases."""

    title: str
    count: Callable[[Bed], Found]


# "low" and "full" are the recurrence off and on; each step has the tokens of one of RANKS GPUs.
CASES = {
    "step_1061_low": Case("a step of the 1.0611 recipe, recurrence off", partial(count_1061, passes=1)),
    "step_1061_full": Case("the same with all passes of the recurrence", partial(count_1061, passes=3)),
    "step_1061_fused": Case(
        "the same with model.fused, whose kernels' products are not cuBLAS's", count_fused
    ),
    "step_naive": Case(
        "a step of the naive recipe", partial(count_step, name="naive", attention="sdpa", passes=1)
    ),
    "lora_chunk": Case("LoRA scoring, by the chunk and the length of documents; eager", count_lora),
    "calibration": Case("one calibration batch; eager", count_calibration),
}


def write_found(found: Found, path: Path) -> None:
    """Write what a case found as JSON."""
    kernels = [row._asdict() for row in found.kernels]
    path.write_text(json.dumps(found._asdict() | {"kernels": kernels}))
