"""Scores of targets from what shims.py recorded of F.cross_entropy: for programs that offer no scorer.

A recorded call holds targets and costs in windows of any layout. A run of RUN_TOKENS equal to the validation
text says where in the text it is, so that costs can be compared between runs whose texts begin alike.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit.checks import Finding
from common import parse_json

RUN_TOKENS = 12  # with two nats a token, nowhere else in 2048 tokens
MAX_FILE = 200_000_000  # bytes
ROUNDED = 1e4  # of the recorded logarithms
NATS_TOLERANCE, MEAN_TOLERANCE = 2e-2, 1e-3  # bfloat16 depends on the shape of a batch
TAIL_TOLERANCE = 5e-3  # nats a token: the contest's first scripts score the last targets of a text again


class Losses(NamedTuple):
    """What a run charged the targets of its validation text, by place."""

    costs: list[list[float]]  # in the order in which they were charged, of each target
    rows: list[list[list[int]]]  # log probabilities of the whole vocabulary, in ten thousandths
    num_learned: int  # targets of the text that a gradient was taken on

    @property
    def is_complete(self) -> bool:
        return all(self.costs)


def read_losses(folder: Path, tokens: np.ndarray) -> Losses:
    """Read a run's record; lines that are none are passed over (the program can write there)."""
    path, targets = folder / "recorded.jsonl", tokens[1:].tolist()
    places = {tuple(targets[i : i + RUN_TOKENS]): i for i in range(len(targets) - RUN_TOKENS + 1)}
    costs: list[list[float]] = [[] for _ in targets]
    rows: list[list] = [[] for _ in targets]
    num_learned = 0
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_FILE:
        return Losses(costs, rows, 0)
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
                learns, called, charged, logs = parse_json(line, path, strict=False)
                for index, place in locate(called, targets, places):
                    if learns:
                        num_learned += 1
                    else:
                        costs[place].append(float(charged[index]))
                        rows[place].append([int(value) for value in logs[index]])
    return Losses(costs, rows, num_learned)


def locate(called: list[int], targets: list[int], places: dict[tuple, int]) -> list[tuple[int, int]]:
    """Return (index in a call, place in the text) of the targets that belong to the text.

    Windows follow each other in a call: where a run that lies elsewhere begins, the window before it ends.
    """
    found, place = [], -1
    for index, target in enumerate(called):
        begins = places.get(tuple(called[index : index + RUN_TOKENS]))
        place = begins if begins is not None else place + 1 if place >= 0 else -1
        if not 0 <= place < len(targets) or target != targets[place]:
            place = -1
        else:
            found.append((index, place))
    return found


def explains(losses: Losses, printed: float) -> bool:
    """Whether some one of the costs of each target, the same in turn for all, has the printed mean."""
    depth = max(len(row) for row in losses.costs)
    turns = [*range(min(depth, 64)), *range(-1, -min(depth, 64) - 1, -1)]
    chosen = [[row[i] if -len(row) <= i < len(row) else row[-1] for row in losses.costs] for i in turns]
    return bool(np.abs(np.mean(chosen, axis=1) - printed).min() <= TAIL_TOLERANCE)


def compare(before: Losses, after: Losses, num_targets: int, text: str) -> Finding:
    """K13, K14: the first targets of two runs are charged alike, each time they are charged."""
    pairs = [pair for a, b in zip(before.costs[:num_targets], after.costs) for pair in zip(a, b)]
    if not pairs:
        return Finding("NOT RUN", ["no recorded cost to compare"])
    change = np.abs(np.array(pairs).T[0] - np.array(pairs).T[1])
    evidence = f"{text}: {len(pairs)} costs before move by {change.mean():.1e} nats in the mean"
    evidence += f", at most {change.max():.1e}; allowed {MEAN_TOLERANCE:.0e} and {NATS_TOLERANCE:.0e}"
    is_same = change.mean() <= MEAN_TOLERANCE and change.max() <= NATS_TOLERANCE
    return Finding("PASS" if is_same else "FAIL", [evidence])


def compare_rows(before: Losses, after: Losses, place: int) -> Finding:
    """K12: the distribution for a target is the same whatever the target is, and sums to one."""
    pairs = [pair for pair in zip(before.rows[place], after.rows[place]) if len(pair[0]) == len(pair[1]) > 0]
    if not pairs:
        return Finding("NOT RUN", [f"no recorded distribution for target {place}"])
    change = max(np.abs(np.array(a) - np.array(b)).max() / ROUNDED for a, b in pairs)
    total = max(abs(np.exp(np.array(row) / ROUNDED).sum() - 1) for pair in pairs for row in pair)
    text = f"the distribution of target {place} moves by {change:.1e} nats with it; sums to 1 +- {total:.1e}"
    is_fixed = change <= NATS_TOLERANCE and total <= 1e-2
    return Finding("PASS" if is_fixed else "FAIL", [text])
