"""The tiny configuration and the recipes of the tests, small models, and how to run commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from formats.recipe import config_fields, config_value
from train_gpt import GPT, Config, load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("records/*/*/recipe.toml"))
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


def recipe(name: str) -> Config:
    """Load a recipe of records/ by its folders."""
    return load_config(str(ROOT / "records" / name / "recipe.toml"), {}, [])


def shape_of(cfg: Config) -> GPT:
    """Build a model without memory."""
    with torch.device("meta"):
        return GPT(cfg.model, cfg.data.vocab_size)


def build_random(cfg: Config) -> GPT:
    """Build a tiny model whose every weight is a fixed wave, so that no branch is silent."""
    torch.manual_seed(0)
    model = GPT(cfg.model, 300)
    with torch.no_grad():
        for param in model.parameters():
            wave = torch.sin(1.7 * torch.arange(param.numel()).float() + param.ndim + 0.5)
            param.add_(0.3 * wave.view(param.shape))
    return model


def bigram_logits(vocab_size=11, seed=0):
    """A scorer without weights: a random table of next-token logits."""
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))
    return lambda tokens, starts_doc, first: table[tokens[:, first:]]


def as_overrides(cfg: Config) -> list[str]:
    """Write the fields of cfg that differ from the defaults as command-line overrides."""
    return [
        f"{name}={config_value(cfg, name)}"
        for name, item in config_fields(Config).items()
        if config_value(cfg, name) != item.default
    ]


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for yet does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def ends_soon(pid: int, seconds: float = 10.0) -> bool:
    """Wait for the end of a process that has no reason to go on; one that does is killed."""
    until = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def run_python(*args, cwd=ROOT, env=None, timeout=240) -> subprocess.CompletedProcess:
    """Run `python ARGS` from the repository root (or cwd) and capture its output."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
