"""The whole path in a fresh process: train_gpt.py trains, quantizes, packs, reloads and scores."""

import math
import subprocess
import sys
import time
from pathlib import Path

from common import UserError, read_json
from data.shards import MANIFEST_NAME
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import RECIPES, ROOT, get_size
from dev.gpu_battery.text import data_settings, write_text
from formats.artifact import require_codec
from formats.checkpoints import read_result
from quantizers.storage import frame_codec

RUN_ID = "small"
MOST_BITS = 8.0  # a byte, without any model
LOGGED = ("device:", "attention_mode:", "attention_passed_over:", "peak memory", "code_packing:")
LOG_LINES = 15
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
    found = job.measure("data", lambda: prepare(job))
    if found:
        job.measure("run", lambda: train(job, data_settings(Path(found["folder"]))))


def prepare(job: Job) -> dict:
    """Find or make the dataset."""
    started = time.perf_counter()
    folder = Path(job.data) if job.data else write_text(job)
    seconds, counts = time.perf_counter() - started, read_json(folder / MANIFEST_NAME)
    return {"folder": str(folder), "seconds": seconds} | {
        f"{split}_tokens": sum(shard["tokens"] for shard in counts[split]["shards"])
        for split in ("train", "val")
    }


def storage_here() -> dict:
    """Return nothing where the recipe's codec is installed, else what fits one that needs no package."""
    try:
        require_codec(frame_codec("rans"))
    except UserError:
        return {"quant.codec": "lzma", "quant.method": "gptq"}  # water-filled codes are for rans only
    return {}


def train(job: Job, places: dict) -> dict:
    """Run train_gpt.py and return what it says about itself; raises with the end of its output."""
    values = SHORT | storage_here() | places
    values |= {
        "run.device": "cpu" if job.rehearse else "cuda",
        "run.max_wallclock_seconds": get_size(job, "train_seconds"),
        "run.out_dir": str(Path(job.work) / "runs"),
        "run.run_id": RUN_ID,
        "run.overwrite": True,
    }
    folder = Path(job.work) / "runs" / RUN_ID
    options = [f"{name}={value}" for name, value in values.items()]
    command = [sys.executable, "train_gpt.py", "--recipe", RECIPES["small"], *options]
    try:  # what it says goes to this part's standard error
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=job.seconds_for_child(), check=True)
    except subprocess.SubprocessError as error:
        job.record("log_so_far", numbered(read_log(folder)[-LOG_LINES:]))
        if isinstance(error, subprocess.CalledProcessError):
            raise RuntimeError(f"train_gpt.py ended with status {error.returncode}, see stderr") from None
        raise
    return sum_up(folder, read_result(folder))


def read_log(folder: Path) -> list[str]:
    """Return the lines of a run's log; none where it has not begun."""
    path = folder / "train.log"
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def numbered(lines: list[str]) -> dict[str, str]:
    """Name lines, so that a table shows them."""
    return {f"line_{index}": line for index, line in enumerate(lines)}


def sum_up(folder: Path, result: dict) -> dict:
    """Choose from a run's result and log; raises for a score that no model needs."""
    score = result["score"]
    if not (math.isfinite(score["val_bpb"]) and 0 < score["val_bpb"] < MOST_BITS):
        raise ValueError(f"expected a val_bpb between 0 and {MOST_BITS}, found {score['val_bpb']}")
    chosen = [line for line in read_log(folder) if line.startswith(LOGGED)][:LOG_LINES]
    return {
        "val_bpb": score["val_bpb"],
        "steps": result["steps"],
        "tokens_per_second": result["tokens_per_second"],
        "artifact_bytes": (folder / "artifact.bin").stat().st_size,
        "code_bytes": result["ledger"][0][1],
        "scored_tokens": score["num_tokens"],
        "scored_tokens_per_second": score["num_tokens"] / max(score["seconds"], 1e-9),
        "seconds": result["seconds"],
        "log": numbered(chosen),
    }
