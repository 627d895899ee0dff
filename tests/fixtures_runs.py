"""Run folders as trainings leave them, without a training."""

import math
from pathlib import Path

from fixtures_model import TINY

from durable.seals import last_seal, write_events, write_sealed
from formats.recipe import config_hash, get_recipe, seal_recipe, with_values
from train_gpt import Config

BYTES_A_TOKEN = 2.5
ORIGIN = {"data": "d1", "tokenizer": "t1", "code": "c1", "ranks": 1, "machine": {"cpu": "one", "threads": 2}}
LEDGER = [["code (packed train_gpt.py)", 20_000], ["weights: codes", 400_000], ["weights: floats", 900]]


def loss_at(step: int) -> float:
    """A falling curve with a wave on it."""
    return 3.0 + 4.0 / step + 0.2 * math.sin(step)


def make_events(steps: int, val_bpb: float) -> list[dict]:
    """An event a step of 100 ms, and a validation at the end."""
    train = [
        {"kind": "train", "step": i, "train_loss": loss_at(i), "train_ms": 100.0 * i}
        for i in range(1, steps + 1)
    ]
    return [*train, {"kind": "val", "step": steps, "val_loss": val_bpb * 1.7, "val_bpb": val_bpb}]


def make_log(seed: int, val_bpb: float, steps: int) -> str:
    """The lines of a log that readers look for."""
    loss = val_bpb * math.log(2) * BYTES_A_TOKEN
    lines = [
        f"step:{i}/{steps} train_loss:{loss_at(i):.4f} train_time:{100 * i}ms" for i in range(1, steps, 7)
    ]
    last = (
        f"step:{steps}/{steps} val_loss:{val_bpb * 1.7:.4f} val_bpb:{val_bpb:.4f} train_time:{100 * steps}ms"
    )
    score = f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{val_bpb:.8f}"
    head = ["Running Python 3.11.7", "Running PyTorch 2.13.0", "device:cpu compute_dtype:float32"]
    return "\n".join([*head, f"seed:{seed}", *lines, last, score, ""])


def write_run(
    folder: Path, seed: int, bpb: float | None, steps: int = 40, changes: dict | None = None
) -> Path:
    """Leave a run's folder: finished with this score, or unfinished where there is none.

    changes: fields of the recipe, and of the result those without a point in their name.
    """
    changes = changes or {}
    fields = TINY | {"run.seed": seed} | {key: changes[key] for key in changes if "." in key}
    cfg = with_values(Config(), fields, "test")
    folder.mkdir(parents=True)
    write_events(folder / "metrics.jsonl", make_events(steps, bpb or 2.5))
    (folder / "recipe.toml").write_text(seal_recipe(get_recipe(cfg, live=True)))
    (folder / "train.log").write_text(make_log(seed, bpb or 2.5, steps))
    if bpb is None:
        (folder / "train.log").write_text("Running Python 3.11.7\n")
        return folder
    score = {
        "val_loss": bpb * math.log(2) * BYTES_A_TOKEN,
        "val_bpb": bpb,
        "num_tokens": 4000,
        "num_bytes": 10_000,
    }
    score |= {"seconds": 2.0, "mode": "chunked", "invalid": "", "not_comparable": ""}
    result = {"steps": steps, "train_ms": 100.0 * steps, "tokens_per_second": 1280.0, "score": score}
    result |= {"ledger": LEDGER, "seconds": {"training and validation": 5.0, "scoring": 2.0}, "seed": seed}
    result |= {"calibration_ms": 0.0, "over_limits": [], "origin": ORIGIN, "config_hash": config_hash(cfg)}
    result |= {"metrics_crc32": last_seal(folder / "metrics.jsonl"), "places": {}}
    write_sealed(folder / "result.json", result | {key: changes[key] for key in changes if "." not in key})
    return folder
