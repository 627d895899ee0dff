"""Checkpoints of a run folder: which there are, which stay, which one goes on.

checkpoint_step0000500.safetensors and so on; the newest two and the best by validation loss stay, or as many
as watch.keep_checkpoints says. Each is sealed (formats/state.py) and says whose it is.
"""

from pathlib import Path
from typing import NamedTuple

from common import UserError
from durable.seals import last_seal, read_events, read_sealed, split_events, write_events
from formats.state import read_facts, read_state

NUMBERED = "checkpoint_step{:07d}.safetensors"
NUMBERED_GLOB = "checkpoint_step*.safetensors"
METRICS_NAME, RESULT_NAME = "metrics.jsonl", "result.json"
# What a checkpoint must have in common with the run that goes on from it, and what to do where it has not.
IDENTITY = {
    "config_hash": "recipe: resume with the recipe that the run began with",
    "seed": "seed: a run has one, start another run for another seed",
    "data": "training data: set data.data_path to those that the run began with",
    "tokenizer": "tokenizer: set data.tokenizer_path to the one that the run began with",
}


class FoundCheckpoint(NamedTuple):
    """A checkpoint that was read whole."""

    path: Path
    state: dict
    facts: dict[str, str]
    passed_over: tuple[str, ...] = ()  # sentences on newer ones that are damaged


def numbered_steps(folder: Path) -> list[int]:
    """List the steps of the numbered checkpoints in order."""
    found = {path.name for path in folder.glob(NUMBERED_GLOB) if path.is_file()}
    digits = (name.removeprefix("checkpoint_step").partition(".")[0] for name in found)
    return sorted(step for step in map(int, filter(str.isdecimal, digits)) if NUMBERED.format(step) in found)


def newest_checkpoint(folder: Path) -> Path | None:
    """Name a run folder's newest checkpoint, whole or not; None where there is none."""
    steps = numbered_steps(folder)
    return folder / NUMBERED.format(steps[-1]) if steps else None


def read_result(folder: Path) -> dict:
    """Read what a finished run says of itself; raises where it was altered."""
    return read_sealed(folder / RESULT_NAME, "Run it again, or take the file from a copy.")


def read_metrics(folder: Path) -> list[dict]:
    """Read a run's events, none where it keeps none; raises where they are altered, or not all of them."""
    path = folder / METRICS_NAME
    if not path.is_file():  # as in a record
        return []
    events = read_events(path)
    stated = read_result(folder).get("metrics_crc32") if (folder / RESULT_NAME).is_file() else None
    if stated not in (None, last_seal(path)):
        raise UserError(
            f"{path}: expected the events that {RESULT_NAME} beside it counts, found others or a part of "
            "them. Take both files from one copy, or move this one away to do without it."
        )
    return events


def steps_to_keep(steps: list[int], losses: dict[int, float], most: int) -> set[int]:
    """Choose at most so many: the one with the lowest known loss (the first of equals), then the newest."""
    best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))[:1]
    others = [step for step in sorted(steps, reverse=True) if step not in best]
    return {*best, *others[: most - len(best)]}


def drop_checkpoints(folder: Path, most: int) -> None:
    """Remove all checkpoints but the best by the log's validation losses and the newest, `most` in all."""
    events, _ = split_events(folder / METRICS_NAME)
    losses = {event["step"]: event["val_loss"] for event in events if event["kind"] == "val"}
    steps = numbered_steps(folder)
    for step in set(steps) - steps_to_keep(steps, losses, most):
        (folder / NUMBERED.format(step)).unlink()


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step, which were damaged: they count no more."""
    for later in numbered_steps(folder):
        if later > step:
            path = folder / NUMBERED.format(later)
            path.replace(path.with_suffix(".damaged"))


def cut_metrics(folder: Path, step: int) -> str:
    """Take out of metrics.jsonl what came after a step and what a kill cut off: it will be done again.

    So will the validation of the step itself. Of a file that was altered the events before that stay, the
    file itself is set aside, and what is returned says so.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        return ""
    events, fault = split_events(path)
    if fault:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        fault += f" What follows is left out; {aside} is the file as it was."
    write_events(path, [event for event in events if event["step"] < step + (event["kind"] == "train")])
    return fault


def read_newest(place: Path) -> FoundCheckpoint | None:
    """Read a checkpoint file, or of a run folder the newest one that is whole; None where there is none.

    Raises a UserError where all there are are damaged.
    """
    if place.is_file():
        return FoundCheckpoint(place, *read_state(place))
    damaged: list[str] = []
    for step in reversed(numbered_steps(place)):
        path = place / NUMBERED.format(step)
        try:
            return FoundCheckpoint(path, *read_state(path), tuple(damaged))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(" ".join(damaged) + " No whole checkpoint is left; start the run anew.")
    return None


def check_identity(path: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    """Raise unless a checkpoint is of the same recipe, seed, data and tokenizer as the run."""
    for key, advice in IDENTITY.items():
        if found.get(key) != expected[key]:
            raise UserError(
                f"{path}: expected a checkpoint with {key} {expected[key]}, found {found.get(key)}. Another "
                f"{advice}."
            )


def find_unfinished(out_dir: Path, expected: dict[str, str]) -> Path | None:
    """Find the newest run folder without a result whose newest whole checkpoint is of this run."""
    folders = []
    for path in {path.parent for path in out_dir.glob(f"*/{NUMBERED_GLOB}")}:
        if (path / RESULT_NAME).is_file():
            continue
        for step in reversed(numbered_steps(path)):
            newest = path / NUMBERED.format(step)
            facts = read_facts(newest)
            if all(facts.get(key) == expected[key] for key in IDENTITY):
                folders.append((newest.stat().st_mtime, path))
            if facts:  # without any it is damaged: the one before tells
                break
    return max(folders)[1] if folders else None
