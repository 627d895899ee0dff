"""Numbered checkpoints: which stay, and that the best one is the best one."""

import shutil
from pathlib import Path

import pytest

import train_gpt
from formats.recipe import with_values
from formats.rotation import (
    BEST_NAME,
    LOSSES_NAME,
    NUMBERED,
    numbered_steps,
    rotate_checkpoints,
    steps_to_keep,
)
from formats.state import read_state
from train_gpt import CHECKPOINT_NAME, Environment


@pytest.mark.parametrize(
    "losses, kept",
    [
        ({}, {7, 6, 5}),
        ({2: 1.0, 7: 2.0}, {2, 7, 6}),
        ({7: 1.0}, {7, 6, 5}),
        ({1: 3.0, 2: 3.0}, {1, 7, 6}),
        ({99: 0.1}, {7, 6, 5}),
    ],
)
def test_the_best_and_the_newest_stay(losses, kept):
    """A lost best one, ties and unknown losses too."""
    assert steps_to_keep(list(range(1, 8)), losses, 3) == kept
    assert steps_to_keep([3, 5], losses, 3) == {3, 5}


@pytest.mark.reference("E14")
@pytest.mark.parametrize("best", range(1, 8))
def test_seven_checkpoints_become_the_best_and_two_others(tmp_path, best):
    """Saved, then validated, seven times with at most three kept, whichever is the best."""
    for step in range(1, 8):
        newest = tmp_path / CHECKPOINT_NAME
        newest.unlink(missing_ok=True)  # a checkpoint is written anew, not in place
        newest.write_bytes(f"state {step}".encode())
        rotate_checkpoints(tmp_path, (newest, step), {}, 3)
        rotate_checkpoints(tmp_path, None, {step: abs(step - best) + 1.0}, 3)
    others = [step for step in (7, 6, 5) if step != best][:2]
    assert numbered_steps(tmp_path) == sorted([best, *others])
    assert (tmp_path / BEST_NAME).read_bytes() == (tmp_path / NUMBERED.format(best)).read_bytes()
    assert (tmp_path / BEST_NAME).read_bytes() == f"state {best}".encode()


def test_a_run_keeps_its_best_checkpoint_and_resumes_from_a_numbered_one(
    tiny_config, tmp_path, stand_in_program
):
    """At most two of six; a run that starts anew drops the old ones, a resumed one goes on with them."""
    values = {"run.save_every": 1, "run.val_loss_every": 1, "watch.keep_checkpoints": 2, "run.iterations": 6}
    cfg = with_values(tiny_config, values, "test")
    folder = Path(cfg.run.out_dir) / "tiny"
    train_gpt.run(cfg, Environment({}))
    assert len(numbered_steps(folder)) == 2 and 6 in numbered_steps(folder)
    last = folder / NUMBERED.format(6)
    assert last.read_bytes() == (folder / CHECKPOINT_NAME).read_bytes()
    assert read_state(folder / BEST_NAME)[0]["step"] in numbered_steps(folder)
    kept = Path(shutil.copy(last, tmp_path))
    train_gpt.run(with_values(cfg, {"run.iterations": 8}, "test"), Environment({}), kept)
    assert 8 in numbered_steps(folder) and len(numbered_steps(folder)) == 2
    train_gpt.run(
        with_values(tiny_config, {"run.save_every": 0, "watch.keep_checkpoints": 2}, "test"), Environment({})
    )
    assert (
        numbered_steps(folder) == []
        and not (folder / BEST_NAME).exists()
        and (folder / LOSSES_NAME).is_file()
    )
