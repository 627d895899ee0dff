"""Numbered checkpoints of a run: the best by validation loss and the newest others stay.

checkpoint_step0000500.safetensors and so on lie beside the newest, checkpoint.safetensors; the best one is
best.safetensors too. checkpoints.json keeps the losses, so that a resumed run continues them.
"""

import os
import shutil
from pathlib import Path

from common import read_json, write_json

BEST_NAME, LOSSES_NAME = "best.safetensors", "checkpoints.json"
NUMBERED = "checkpoint_step{:07d}.safetensors"
NUMBERED_GLOB = "checkpoint_step*.safetensors"


def numbered_steps(folder: Path) -> list[int]:
    """List the steps of the numbered checkpoints."""
    names = (path.stem for path in folder.glob(NUMBERED_GLOB))
    return sorted(int(name.removeprefix("checkpoint_step")) for name in names)


def steps_to_keep(steps: list[int], losses: dict[int, float], most: int) -> set[int]:
    """Choose at most so many: the one with the lowest known loss (the first of equals), then the newest."""
    best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))[:1]
    others = [step for step in sorted(steps, reverse=True) if step not in best]
    return {*best, *others[: most - len(best)]}


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def rotate_checkpoints(
    folder: Path, newest: tuple[Path, int] | None, losses: dict[int, float], most: int
) -> None:
    """Number the newest checkpoint (file, step) if there is one, note losses {step: nats}, drop the rest."""
    if newest:
        link_or_copy(newest[0], folder / NUMBERED.format(newest[1]))
    noted = folder / LOSSES_NAME
    known = {int(step): loss for step, loss in read_json(noted).items()} if noted.is_file() else {}
    known |= losses
    write_json(noted, known)
    steps = numbered_steps(folder)
    for step in set(steps) - steps_to_keep(steps, known, most):
        (folder / NUMBERED.format(step)).unlink()
    left = [step for step in numbered_steps(folder) if step in known]
    if left:
        best = min(left, key=lambda step: (known[step], step))
        link_or_copy(folder / NUMBERED.format(best), folder / BEST_NAME)
