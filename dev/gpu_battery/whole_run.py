"""The whole path in a fresh process: train_gpt.py trains, quantizes, packs, reloads and scores."""

import math
import subprocess
import sys
from pathlib import Path

from data.shards import read_json
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import RECIPES, ROOT, size_of
from dev.gpu_battery.text import data_settings, write_text

RUN_ID = "small"
MOST_BITS = 8.0  # a byte, without any model
LOGGED = ("device:", "attention_mode:", "attention_passed_over:", "peak memory", "code_packing:")
LOG_LINES = 30
# The CPU recipe's switches with the budgets of a short run; lzma needs no package.
SHORT = {
    "quant.reserve_seconds": 0,
    "quant.target_bytes": 0,
    "quant.calib_batches": 2,
    "quant.limit_bytes": 16_000_000,
    "quant.code_wrap": "lzma",
    "eval.limit_text_bytes": 0,
    "eval.limit_seconds": 600,
}


def run(job: Job) -> None:
    """Make the data, run the program, read its result."""
    folder = job.measure("data", lambda: prepare(job))
    if folder is None:
        return
    job.measure("run", lambda: train(job, data_settings(Path(folder["folder"]))))


def prepare(job: Job) -> dict:
    """Find or make the dataset."""
    folder = Path(job.data).resolve() if job.data else write_text(job)
    counts = read_json(folder / "manifest.json")
    return {"folder": str(folder)} | {
        f"{split}_{unit}": sum(shard["tokens"] for shard in counts[split]["shards"])
        for split, unit in (("train", "tokens"), ("val", "tokens"))
    }


def train(job: Job, places: dict) -> dict:
    """Run train_gpt.py and return what it says about itself; raises with the end of its output."""
    values = SHORT | places
    values |= {
        "run.device": "cpu" if job.rehearse else "cuda",
        "run.max_wallclock_seconds": size_of(job, "train_seconds"),
        "run.out_dir": str(Path(job.work) / "runs"),
        "run.run_id": RUN_ID,
    }
    command = [sys.executable, "train_gpt.py", "--recipe", RECIPES["small"]]
    command += [f"{name}={value}" for name, value in values.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"train_gpt.py ended with status {done.returncode}: {last}")
    folder = Path(job.work) / "runs" / RUN_ID
    return sum_up(folder, read_json(folder / "result.json"))


def sum_up(folder: Path, result: dict) -> dict:
    """Choose from a run's result and log; raises for a score that no model needs."""
    score = result["score"]
    if not (math.isfinite(score["val_bpb"]) and 0 < score["val_bpb"] < MOST_BITS):
        raise ValueError(f"expected a val_bpb between 0 and {MOST_BITS}, found {score['val_bpb']}")
    log = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in log if line.startswith(LOGGED)][:LOG_LINES]
    return {
        "val_bpb": score["val_bpb"],
        "steps": result["steps"],
        "tokens_per_second": result["tokens_per_second"],
        "artifact_bytes": (folder / "artifact.bin").stat().st_size,
        "code_bytes": result["ledger"][0][1],
        "scored_tokens": score["num_tokens"],
        "scored_tokens_per_second": score["num_tokens"] / max(score["seconds"], 1e-9),
        "seconds": result["seconds"],
        "log": {f"line_{index}": line for index, line in enumerate(chosen)},
    }
