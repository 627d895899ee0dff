"""Run folders in progress, as a trainer grows them, made without a training."""

from pathlib import Path

from durable.seals import append_event, last_seal, write_events, write_sealed
from formats.checkpoints import METRICS_NAME, RESULT_NAME
from formats.recipe import seal_recipe

RECIPE = {
    "run": {"seed": 7, "iterations": 100, "max_wallclock_seconds": 60.0},
    "data": {"batch_tokens": 1000},
    "schedule": {"stages": [[0, 8, 500, 1, 1, 1], [0.5, 8, 1000, 1, 1, 1]]},
}
STARTED = """Running PyTorch 2.13.0
seed:7
warming up: 2 steps in each phase, off the clock
warmup_step:1/2
"""
SCORE = {"val_loss": 2.0, "val_bpb": 1.25, "num_tokens": 100, "num_bytes": 230, "mode": "chunked"}


def loss_at(step: int) -> float:
    """Return the loss of a step: a fall that every reader can check."""
    return 8.0 - step / 100


def train_event(step: int) -> dict:
    """Return the event of a training step of 100 ms."""
    return {"kind": "train", "step": step, "train_loss": loss_at(step), "train_ms": 100.0 * step}


def leave_run(folder: Path, num_steps: int, log: str = "", batch_tokens: int = 1000) -> Path:
    """Write an unfinished run of so many steps, validated at the last; `log` follows its first lines."""
    folder.mkdir(parents=True)
    recipe = {**RECIPE, "data": {"batch_tokens": batch_tokens}}
    (folder / "recipe.toml").write_text(seal_recipe(recipe))
    events = [train_event(step) for step in range(1, num_steps + 1)]
    if events:
        events.append({"kind": "val", "step": num_steps, "val_loss": 3.0, "val_bpb": 2.0, "train_ms": 1e2})
    write_events(folder / METRICS_NAME, events)
    (folder / "train.log").write_text(STARTED + log)
    return folder


def grow_run(folder: Path, step: int) -> None:
    """Append a step to a run's events."""
    append_event(folder / METRICS_NAME, train_event(step))


def finish_run(folder: Path, **facts) -> Path:
    """Write the result of a run."""
    result = {"steps": 20, "train_ms": 2000.0, "tokens_per_second": 5000.0, "score": SCORE, "seed": 7}
    result |= {"ledger": [["code", 30_000], ["weights", 900_000]], "over_limits": [], "config_hash": "abc"}
    result |= {
        "metrics_crc32": last_seal(folder / METRICS_NAME),
        "origin": {"data": "d1", "machine": {"cores": 2}},
    }
    write_sealed(folder / RESULT_NAME, result | facts)
    return folder
