"""What a run's events and recipe say over time: losses, tokens, rates, phases, speed."""

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common import UserError
from dev.desk.runs import RunFacts
from formats.curves import Point, finite_points
from formats.recipe import config_fields, with_values
from train_gpt import Config, Phase, StepRates, phase_at, run_progress, step_rates

RESERVE = re.compile(r"\breserve:(\d+)ms")  # of a log: what the clock keeps for the work after training
MOST_GROUPS = 1500  # that a run's steps are put into
SPEED_BINS = 50
PHASE_TITLES = ("from step", "at second", "tokens a row", "tokens a step", "passes", "fake quantization")


class Schedule(NamedTuple):
    """What a recipe's schedule said at some steps of a run."""

    steps: list[int]
    rates: list[StepRates]
    phases: list[tuple]  # a row of PHASE_TITLES for every change


class Series(NamedTuple):
    """Columns over the training events of a run, all (N,); empty arrays where it has none."""

    steps: np.ndarray
    seconds: np.ndarray  # of the training clock, when a step had ended
    loss: np.ndarray  # nats a token
    tokens: np.ndarray  # trained so far; empty without a recipe that this version reads
    schedule: Schedule
    validations: list[Point]  # (step, bits a byte)


def read_config(run: RunFacts) -> tuple[Config | None, str]:
    """Resolve a run's recipe as this version reads it; None and a sentence where it cannot."""
    known = config_fields(Config)
    places = (run.result or {}).get("places", {})
    stated = run.recipe | {key: value for key, value in places.items() if key.startswith("data.")}
    strange = sorted(set(stated) - set(known))
    note = f"{run.name}: fields that this version does not know: {', '.join(strange)}." if strange else ""
    try:
        cfg = with_values(Config(), {key: stated[key] for key in stated if key in known}, run.name)
        return (cfg if run.recipe else None), note
    except UserError as error:
        return None, str(error)


def read_series(run: RunFacts, cfg: Config | None) -> Series:
    """Collect what a run's events say; long runs in groups of steps, with the mean loss of each."""
    train = [event for event in run.events if event["kind"] == "train" and "train_loss" in event]
    bpb = [(e["step"], e["val_bpb"]) for e in run.events if e["kind"] == "val" and "val_bpb" in e]
    ends = np.unique(np.linspace(0, len(train), MOST_GROUPS + 1).astype(int))[1:] if train else []
    lasts = [train[end - 1] for end in ends]
    steps = np.array([event["step"] for event in lasts], float)
    ms = np.array([event["train_ms"] for event in lasts], float)
    groups = pairwise([0, *ends])
    loss = np.array([np.mean([event["train_loss"] for event in train[i:j]]) for i, j in groups])
    series = Series(steps, ms / 1000, loss, np.zeros(0), Schedule([], [], []), finite_points(bpb))
    return add_schedule(series, cfg, reserve_ms(run)) if cfg and lasts else series


def add_schedule(series: Series, cfg: Config, reserve: float) -> Series:
    """Follow a recipe's schedule over the steps of a run, at the times that its events tell."""
    steps = np.unique(np.linspace(1, series.steps[-1], MOST_GROUPS).astype(int))
    ends = np.append(0, series.steps), 1000 * np.append(0, series.seconds)
    before = np.interp(steps - 1, *ends)
    rates = [step_rates(cfg, int(step) - 1, ms, reserve) for step, ms in zip(steps, before)]
    plan = [
        phase_at(cfg, int(step) - 1, run_progress(cfg, int(step) - 1, ms, reserve))
        for step, ms in zip(steps, before)
    ]
    trained = np.cumsum(np.diff(steps, prepend=0) * [phase.stage.batch_tokens for phase in plan])
    tokens = np.interp(series.steps, np.append(0, steps), np.append(0, trained))
    return series._replace(
        tokens=tokens, schedule=Schedule(steps.tolist(), rates, list_phases(plan, steps, before))
    )


def reserve_ms(run: RunFacts) -> float:
    """Return what a run's log says that its clock kept for the work after training."""
    found = RESERVE.findall(run.log.text) if run.log else []
    return float(found[-1]) if found else 0.0


def list_phases(plan: list[Phase], steps: np.ndarray, ms: np.ndarray) -> list[tuple]:
    """List the changes of a schedule: rows of PHASE_TITLES."""
    changes = [i for i, phase in enumerate(plan) if i == 0 or phase != plan[i - 1]]
    rows = ((int(steps[i]), float(ms[i] / 1000), plan[i]) for i in changes)
    return [(*at, row.stage.seq_len, row.stage.batch_tokens, row.passes, row.qat) for *at, row in rows]


def find_speed(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens a second over the run: the middles of equal spans of time, and the speed in each."""
    if len(series.tokens) < 2:
        return np.zeros(0), np.zeros(0)
    count = min(SPEED_BINS, len(series.tokens) - 1)
    edges = np.linspace(0, series.seconds[-1], count + 1)
    tokens = np.interp(edges, np.append(0, series.seconds), np.append(0, series.tokens))
    return (edges[1:] + edges[:-1]) / 2, np.diff(tokens) / np.maximum(np.diff(edges), 1e-9)


def decile_speeds(series: Series) -> tuple[float, float] | None:
    """Return tokens a second in the first and in the last tenth of the training time."""
    if len(series.tokens) < 2 or series.seconds[-1] <= 0:
        return None
    end = series.seconds[-1]
    at = np.interp([0, 0.1 * end, 0.9 * end, end], np.append(0, series.seconds), np.append(0, series.tokens))
    return float((at[1] - at[0]) / (0.1 * end)), float((at[3] - at[2]) / (0.1 * end))
