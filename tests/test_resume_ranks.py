"""A run that is killed and goes on with other numbers of ranks ends as the run that nobody touched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures_model import ROOT, as_overrides, run_python

from common import read_json, sha256_file
from formats.checkpoints import newest_checkpoint, numbered_steps, read_metrics
from formats.recipe import read_recipe, with_values
from formats.state import read_state

CPU_RECIPE = ROOT / "records" / "track_cpu" / "2026-11-21_Sp2048_LoraScoring" / "recipe.toml"
SIZES = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "bigram_buckets", "bigram_dim", "rope_dims")
RECIPES = {
    "naive": {},
    "cpu": {},  # the features of the CPU recipe, filled in below
    "staged": {"schedule.stages": "0:8:64:4:1:0,0.4:16:128:4:1:0"},
    "qat": {"quant.qat_start": 0.3},
    "swa": {"average.swa_every": 2, "average.swa_below": 1.0, "average.ema_decay": 0.0},
}


def cpu_features() -> dict:
    """What the CPU recipe switches on in model, optimizer and averaging; sizes stay those of the test."""
    kept = ("model.", "optim.", "average.", "data.loader")
    stated = read_recipe(CPU_RECIPE).items()
    return {
        name: value for name, value in stated if name.startswith(kept) and name.partition(".")[2] not in SIZES
    }


def command(num_ranks: int, *words: str) -> list[str]:
    """The command line of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return [sys.executable, *(launcher if num_ranks > 1 else []), "train_gpt.py", *words]


def kill_after(step: int, folder: Path, words: list[str], num_ranks: int) -> None:
    """Run until a checkpoint of the step is there, then kill every process at once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(num_ranks, *words),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while max(numbered_steps(folder), default=0) < step and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RECIPES)
def test_one_two_four_and_one_rank_make_the_artifact_of_one(tiny_config, name):
    """Killed in the middle of phases: the artifact is the same byte for byte, weights to 1e-12 in float64."""
    usual = {
        "model.compute_dtype": "float64", "run.iterations": 12, "run.save_every": 1, "run.run_id": "whole",
        "run.val_loss_every": 4, "run.max_wallclock_seconds": 0.0, "data.micro_batches": 4,
        "run.overwrite": False,
    }  # fmt: skip
    features = cpu_features() if name == "cpu" else RECIPES[name]
    cfg = with_values(tiny_config, usual, "test")
    feature_words = [f"{name}={value}" for name, value in features.items()]
    whole, pieces = Path(cfg.run.out_dir, "whole"), Path(cfg.run.out_dir, "pieces")
    done = run_python(*command(1, *as_overrides(cfg), *feature_words)[1:])
    assert done.returncode == 0, done.stderr
    words = as_overrides(with_values(cfg, {"run.run_id": "pieces", "run.resume": "auto"}, "test"))
    words += feature_words
    for num_ranks, step in ((1, 3), (2, 6), (4, 9)):
        kill_after(step, pieces, words, num_ranks)
    done = run_python(*command(1, *words)[1:])
    assert done.returncode == 0, done.stderr
    assert len(read_json(pieces / "result.json")["resumed_at"]) == 3
    assert sha256_file(pieces / "artifact.bin") == sha256_file(whole / "artifact.bin")
    ends = [read_state(newest_checkpoint(folder))[0] for folder in (whole, pieces)]
    for ours, expected in zip(*(state["model"].values() for state in ends), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    assert ends[0]["loader"] == ends[1]["loader"]
    logs = [[(event["kind"], event["step"]) for event in read_metrics(folder)] for folder in (whole, pieces)]
    assert logs[0] == logs[1]
