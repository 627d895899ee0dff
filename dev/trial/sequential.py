"""The test behind a trial: paired differences, looked at after every pair, errors bounded over all looks.

The differences d = bpb(new) - bpb(old) of pairs count as independent draws of N(effect, sigma^2). After each
pair there is a *repeated confidence interval* (Jennison and Turnbull, 1989): mean +- critical value x
standard error, critical values so wide that with chance 1 - alpha the true effect is in the intervals of all
looks at once. Every verdict is read off the interval, so one of the wrong ones comes in at most alpha of
trials, however early a trial stops:

    no difference  the whole interval is within the smallest difference worth having
    keep           else the whole interval is below 0 (never before pair KEEP_FROM)
    drop           else the whole interval is above 0
    undecided      none of them

Until pair n of N a share (n / N)^SPENDING of alpha is spent (Kim and DeMets, 1987), on Student's t without a
known sigma, whose first look is the second pair, on the normal distribution with one, from the first pair on.
The critical values that do so are found by simulation.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from eval.stats import summarize

ALPHA = 0.05  # two-sided: a wrong keep and a wrong drop have half of it each
KEEP_FROM = 3  # pairs
WORTH = 0.0005  # bits a byte: boards show four decimals, and equal seeds tell far smaller differences apart
SPENDING = 1.5
PATHS, DRAWS = 200_000, 1_600_000  # most simulated trials for the critical values, most pairs of all of them
FEW_PATHS = 20_000  # for forecasts
MOST_PAIRS = 64
PAIRS = (*range(KEEP_FROM, 13), 16, 20, 24, 32, 48, MOST_PAIRS)  # that forecasts consider
POWER, MOST_EFFECT = 0.8, 1e6
KEEP, DROP, SAME, UNDECIDED = "keep", "drop", "no difference", "undecided"


class Design(NamedTuple):
    """How a trial decides."""

    max_pairs: int
    alpha: float = ALPHA
    sigma: float | None = None  # of one pair's difference; None: estimated from the pairs
    worth: float = 0.0  # smallest difference worth having, in bits a byte

    @property
    def first_look(self) -> int:
        return 2 if self.sigma is None else 1


class Decision(NamedTuple):
    """What n pairs say. Without an interval (too few pairs) low and high are infinite."""

    word: str
    n: int
    effect: float  # mean difference; below 0: new is better
    low: float
    high: float
    std: float | None  # of the differences


def draw_statistics(
    max_pairs: int, is_known: bool, paths: int, seed: int = 0, effect: float = 0.0
) -> np.ndarray:
    """Simulate trials with an effect of so many deviations, 0 for none.

    Returns (paths, max_pairs) t or z after each pair, NaN before the first look.
    """
    draws = np.random.default_rng(seed).standard_normal((paths, max_pairs)) + effect
    n = np.arange(1, max_pairs + 1)
    means = draws.cumsum(axis=1) / n
    if is_known:
        return means * np.sqrt(n)
    spread = (draws**2).cumsum(axis=1) - n * means**2
    with np.errstate(divide="ignore", invalid="ignore"):
        found = means / np.sqrt(np.maximum(spread, 1e-300) / (n - 1) / n)
    found[:, 0] = np.nan
    return found


@cache
def critical_values(max_pairs: int, is_known: bool, alpha: float) -> tuple[float, ...]:
    """Return the critical value of each look, infinite before the first one."""
    paths = min(PATHS, DRAWS // max_pairs)
    statistics = np.abs(draw_statistics(max_pairs, is_known, paths))
    found, crossed = [], 0
    for look in range(max_pairs):
        due = round(alpha * ((look + 1) / max_pairs) ** SPENDING * paths) - crossed
        if np.isnan(statistics[0, look]) or not due:
            found.append(math.inf)
            continue
        column = statistics[:, look]
        found.append(float(np.partition(column, -due)[-due]))
        statistics = statistics[column < found[-1]]  # a trial that has crossed is over
        crossed += due
    return tuple(found)


def decide(differences: Sequence[float], design: Design) -> Decision:
    """Read the verdict off the interval after these pairs."""
    n, mean, std = summarize(list(differences))
    half = math.inf
    if n >= design.first_look:
        error = (std if design.sigma is None else design.sigma) / math.sqrt(n)
        half = critical_values(design.max_pairs, design.sigma is not None, design.alpha)[n - 1] * error
    low, high = mean - half, mean + half
    word = UNDECIDED
    if max(-low, high) < design.worth or (std == 0.0 and mean == 0.0):
        word = SAME
    elif high < 0 and n >= KEEP_FROM:
        word = KEEP
    elif low > 0:
        word = DROP
    return Decision(word, n, mean, low, high, std)


def chance_to_decide(design: Design, effect: float) -> float:
    """Return the chance of a keep of an effect of so many deviations; of a drop below KEEP_FROM pairs."""
    start = max(design.first_look, KEEP_FROM if design.max_pairs >= KEEP_FROM else 1)
    is_known = design.sigma is not None
    statistics = draw_statistics(design.max_pairs, is_known, FEW_PATHS, seed=1, effect=abs(effect))
    crossed = statistics > critical_values(design.max_pairs, is_known, design.alpha)
    return float(crossed[:, start - 1 :].any(axis=1).mean())


def pairs_needed(design: Design, effect: float, power: float = POWER) -> int | None:
    """Return how many pairs show an effect of so many deviations with this chance; None: over MOST_PAIRS."""

    def chance(n: int) -> float:
        return chance_to_decide(design._replace(max_pairs=n), effect)

    index = bisect_left(PAIRS, power, key=chance)
    return PAIRS[index] if index < len(PAIRS) else None


def smallest_effect(design: Design, power: float = POWER) -> float:
    """Return the effect, in deviations, that these pairs show with this chance; by bisection."""
    low, high = 0.0, 1.0
    while chance_to_decide(design, high) < power and high < MOST_EFFECT:
        high *= 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if chance_to_decide(design, middle) < power else (low, middle)
    return high
