"""The tiny configuration of the tests, and how to run commands."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from formats.recipe import config_fields, config_value
from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
TINY_VOCAB = 300
TINY = {
    "run.compile": "off",
    "run.iterations": 6,
    "run.max_wallclock_seconds": 0,
    "run.warmup_steps": 1,
    "run.val_loss_every": 0,
    "run.val_batch_tokens": 512,
    "data.vocab_size": TINY_VOCAB,
    "data.seq_len": 16,
    "data.batch_tokens": 128,
    "data.micro_batches": 4,
    "model.num_layers": 3,
    "model.model_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.compute_dtype": "float32",
    "schedule.warmdown_iters": 3,
    "eval.stride": 8,
    "quant.float16_numel": 0,
}


def make_documents(count: int, seed: int) -> list[str]:
    """Make short texts of made-up words, different for every seed."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(200)]
    return [" ".join(rng.choice(words, size=rng.integers(20, 60))) + f". {seed}-{i}\n" for i in range(count)]


def as_overrides(cfg: Config) -> list[str]:
    """Write the fields of cfg that differ from the defaults as command-line overrides."""
    return [
        f"{name}={config_value(cfg, name)}"
        for name, item in config_fields(Config).items()
        if config_value(cfg, name) != item.default
    ]


def run_python(*args, cwd=ROOT, env=None, timeout=240) -> subprocess.CompletedProcess:
    """Run `python ARGS` from the repository root (or cwd) and capture its output."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
