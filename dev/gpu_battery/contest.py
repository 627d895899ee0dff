"""The contest's own scripts on the same card, tokens and attention kernel: the yardstick of our steps.

They are not part of this project: --carried names a folder that holds train_naive.py and train_1061.py (the
contest's train_gpt.py and that of its 1.0611 record) with sp1024.model and sp8192.model, their tokenizers.
A script that is not there is not measured. Where FlashAttention 3 is missing, a stand-in gives both the
attention of torch that this project takes as well.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from data.shards import write_shard
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import ROOT, load_recipe
from dev.gpu_battery.text import draw_tokens, write_tokens

VAL_TOKENS = 70_000
BYTES_PER_TOKEN = 3
STAND_IN = '''"""Attention of torch under the names of FlashAttention 3."""
import torch.nn.functional as F
from kernels.attention import AttentionMask, torch_varlen

def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, max_seqlen_q, **_):
    mask = AttentionMask("varlen", offsets=cu_seqlens_q, max_len=max_seqlen_q)
    return torch_varlen(q[None], k[None], v[None], mask)[0]

def flash_attn_func(q, k, v, causal=True):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
'''
COMMON = {"MAX_WALLCLOCK_SECONDS": 0, "VAL_LOSS_EVERY": 0, "TRAIN_LOG_EVERY": 1, "RUN_ID": "battery"}
SETTINGS_1061 = {
    "WARMUP_STEPS": 1, "ITERATIONS": 16, "ENABLE_LOOPING_AT": 0.45, "CASEOPS_ENABLED": 1, "VOCAB_SIZE": 8192,
    "SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.5, "SMEAR_GATE_ENABLED": 1, "GATE_WINDOW": 12,
    "GATED_ATTN_QUANT_GATE": 1, "FUSED_CE_ENABLED": 1, "MIN_LR": 0.1, "WARMDOWN_FRAC": 0.85, "BETA2": 0.99,
}  # fmt: skip
SETTINGS_NAIVE = {"WARMUP_STEPS": 3, "ITERATIONS": 24, "VOCAB_SIZE": 1024}
# Its document tables come in four lengths, a graph each; one that holds them all compiles a fourth.
PATCHES_1061 = (("cu_bucket_size=64", "cu_bucket_size=1024"), ("range(1, 5)", "range(1, 2)"))
LOOPING_FROM = 8  # the first step of SETTINGS_1061 with all passes
RATE = re.compile(r"^(\d+)/\d+ train_loss: ([\d.]+) .* tok/s: (\d+)", re.MULTILINE)
TIME = re.compile(r"^step:(\d+)/\d+ train_loss:([\d.]+) train_time:(\d+)ms", re.MULTILINE)
BATCH_1061 = 786_432  # tokens of a step: eight micro-batches on one card
MICRO_BATCHES = 8


class Mark(NamedTuple):
    """Where the clock of a script stood after a step."""

    step: int
    ms: float
    loss: float


def run_1061(job: Job) -> None:
    """The script of the 1.0611 record, before and after its recurrence begins."""
    folder = prepare(job, "1061", PATCHES_1061)
    if folder:
        marks = job.measure("run", lambda: follow(job, folder, "1061", SETTINGS_1061, read_rates))
        if marks:
            job.measure("low", lambda: per_step(marks, 2, LOOPING_FROM))
            job.measure("full", lambda: per_step(marks, LOOPING_FROM + 2, SETTINGS_1061["ITERATIONS"]))


def run_naive(job: Job) -> None:
    """The contest's train_gpt.py."""
    folder = prepare(job, "naive", ())
    if folder:
        marks = job.measure("run", lambda: follow(job, folder, "naive", SETTINGS_NAIVE, read_times))
        if marks:
            job.measure("steps", lambda: per_step(marks, 4, SETTINGS_NAIVE["ITERATIONS"]))


def prepare(job: Job, name: str, patches: tuple) -> Path | None:
    """Lay out a folder with the script, its data and a stand-in; None where the script was not carried."""
    script = Path(job.carried) / f"train_{name}.py"
    if not job.carried or not script.is_file():
        job.record("run", "not carried")
        return None
    folder = Path(job.work) / f"contest_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = script.read_text(encoding="utf-8")
    for old, new in patches:
        job.record(f"patched {old}", text.count(old))
        text = text.replace(old, new)
    (folder / "train.py").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("flash_attn_interface") is None:
        (folder / "flash_attn_interface.py").write_text(STAND_IN, encoding="utf-8")
    cfg = load_recipe(job, name)
    (folder / "fineweb_train_000000.bin").symlink_to(
        Path(write_tokens(job, cfg)) / "fineweb_train_000000.bin"
    )
    write_shard(folder / "fineweb_val_000000.bin", draw_tokens(VAL_TOKENS, cfg.data.vocab_size, seed=3))
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.full(VAL_TOKENS, BYTES_PER_TOKEN))
    return folder


def follow(job: Job, folder: Path, name: str, settings: dict, read: Callable) -> dict:
    """Run a script until it has made its steps; returns its marks as {step: [ms, loss]}."""
    tokenizer = Path(job.carried) / f"sp{settings['VOCAB_SIZE']}.model"
    values = COMMON | settings | {"DATA_PATH": folder, "TOKENIZER_PATH": tokenizer}
    paths = os.pathsep.join(map(str, [folder, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]))
    environment = os.environ | {key: str(value) for key, value in values.items()} | {"PYTHONPATH": paths}
    log, marks = folder / "output.txt", []
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "train.py"], cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        while process.poll() is None and job.seconds_left() > 5:
            marks = read(log.read_text(errors="replace"))
            if marks and marks[-1].step >= settings["ITERATIONS"]:
                break
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        process.wait()
    text = log.read_text(errors="replace")
    marks = read(text)
    if not marks or marks[-1].step < settings["ITERATIONS"]:
        print(text[-3000:], file=sys.stderr)
        raise RuntimeError(f"{name}: expected {settings['ITERATIONS']} steps, found {len(marks)}, see stderr")
    return {str(mark.step): [mark.ms, mark.loss] for mark in marks}


def read_rates(text: str) -> list[Mark]:
    """Read the log of the 1.0611 script, which tells tokens a second since the start."""
    found = [(int(step), float(loss), int(rate)) for step, loss, rate in RATE.findall(text)]
    return [Mark(step, 1000 * step * BATCH_1061 / rate, loss) for step, loss, rate in found if rate]


def read_times(text: str) -> list[Mark]:
    """Read the log of the contest's train_gpt.py."""
    return [Mark(int(step), float(ms), float(loss)) for step, loss, ms in TIME.findall(text)]


def per_step(marks: dict, first: int, last: int) -> dict:
    """Return the milliseconds of the steps after `first` up to `last`: the median, and a micro-batch's."""
    times = [marks[str(step)][0] - marks[str(step - 1)][0] for step in range(first + 1, last + 1)]
    ms = median(times)
    return {"step_ms": ms, "least": min(times), "most": max(times), "micro_batch_ms": ms / MICRO_BATCHES}
