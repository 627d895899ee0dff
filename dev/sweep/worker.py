"""A worker of a sweep: claims a trial, trains it for every seed, prunes it on its way, writes its end."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import UserError
from dev.desk.training import (
    Job,
    Outcome,
    Running,
    Share,
    TrainingFailed,
    await_folder,
    find_finished,
    see_through,
    start_training,
    tell_progress,
)
from dev.sweep.board import Board
from dev.sweep.spec import CONSTRAINTS, Spec, spell
from formats.checkpoints import read_result
from train_gpt import Config, draw_ledgers

LOOK_EVERY_S = 0.5  # at a training's events
TELL_EVERY_S = 30.0  # of its progress
WAIT_S = 5.0  # between looks for a trial whose worker was killed
MOST_FAILURES = 5  # in a row: then it is not the settings
RUNS_NAME = "runs"

Tell = Callable[[str], None]
Watch = Callable[[list[dict]], None]
Train = Callable[[Job, Watch, Tell], Outcome]


class Pruned(Exception):
    """A trial is worse than others were at the same progress; last: the step and the loss that it came to."""

    def __init__(self, last: dict):
        super().__init__()
        self.last = last


class Crew(NamedTuple):
    """What a worker works with."""

    board: Board
    root: Path  # the copy of the code that trains
    share: Share | None  # of the machine; None: all of it
    train: Train
    tell: Tell


def now_and_then(tell: Tell, pause_s: float = TELL_EVERY_S) -> Tell:
    """Return a function that tells a line unless it told one a moment ago."""
    told_at = -math.inf

    def tell_some(text: str) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= pause_s:
            told_at = time.monotonic()
            tell(text)

    return tell_some


def train_watched(job: Job, watch: Watch, tell: Tell) -> Outcome:
    """Train a job, or find it finished; `watch` sees new events now and then, and may end it by raising."""
    await_folder(job, tell)
    if found := find_finished(job):
        return found
    tell_some = now_and_then(tell)

    def look(running: Running) -> None:
        watch(running.events())
        tell_progress(running, tell_some)

    return see_through([start_training(job)], look, LOOK_EVERY_S)[0]


class Rungs:
    """Means of a training's losses over equal parts of its budget, for Optuna's pruner."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.losses: dict[int, list[float]] = {}  # rung -> losses on the way to it
        self.told = 0  # the last rung that is over
        self.last: dict = {}  # step and loss

    def add(self, events: list[dict]) -> list[tuple[int, float]]:
        """Return (rung, mean loss) of the rungs that have ended since the last call."""
        on, ended = self.spec.prune["on"], []
        for event in events:
            if f"{event.get('kind')}_loss" != on or not math.isfinite(event.get(on, math.nan)):
                continue
            self.last = {"step": event["step"], "loss": event[on]}
            rung = self.rung_of(event)
            for over in range(self.told + 1, rung):
                losses = self.losses.pop(over, None)
                ended += [(over, sum(losses) / len(losses))] if losses else []
            self.told = max(self.told, rung - 1)
            self.losses.setdefault(rung, []).append(event[on])
        return ended

    def rung_of(self, event: dict) -> int:
        """Return the part of the budget in which an event is, from 1 on."""
        spec, most = self.spec, self.spec.prune["rungs"]
        spent = event["train_ms"] / 1000 / spec.seconds if spec.seconds else event["step"] / spec.steps
        return min(math.ceil(spent * most), most)


def watch_trial(crew: Crew, trial, rungs: Rungs | None, events: list[dict]) -> None:
    """Give a sign of life, report the rungs that have ended, and raise Pruned where Optuna says so."""
    crew.board.beat(trial)
    for rung, loss in rungs.add(events) if rungs else ():
        if crew.board.report(trial, rung, loss):
            raise Pruned(rungs.last)


def excess_of(outcome: Outcome, cfg: Config, spec: Spec) -> dict[str, float]:
    """Return by which share a run is over each of its limits: at most 0 where it is not."""
    if spec.measure != "artifact":
        return {}
    result = read_result(outcome.folder)
    score = result["score"]
    drawn = draw_ledgers(cfg, result, score["seconds"], score["num_bytes"])
    ledgers = {ledger.title: ledger for ledger in drawn}
    wanted = {name: ledgers[CONSTRAINTS[name]] for name in spec.constraints}
    return {name: ledger.total / ledger.limit - 1 for name, ledger in wanted.items() if ledger.limit}


def describe_run(outcome: Outcome, seed: int) -> dict:
    """Return what the study keeps of a training."""
    facts = outcome._asdict() | {"seed": seed, "folder": str(outcome.folder)}
    return {name: value for name, value in facts.items() if name != "score"}


def train_trial(crew: Crew, trial) -> str:
    """Train a trial for every seed, of which the first may be pruned; returns what is told of it."""
    board, spec = crew.board, crew.board.spec
    runs: list[dict] = []
    excess: dict[str, float] = {}
    for seed in spec.seeds:
        cfg = spec.config(trial.params, seed)
        label = f"trial {trial.number}" + (f" seed {seed}" if len(spec.seeds) > 1 else "")
        job = Job(cfg, spec.measure, board.folder / RUNS_NAME, crew.root, crew.share, label=label)
        rungs = Rungs(spec) if spec.prune["kind"] != "none" and not runs else None
        outcome = crew.train(job, partial(watch_trial, crew, trial, rungs), crew.tell)
        runs.append(describe_run(outcome, seed))
        for name, share in excess_of(outcome, cfg, spec).items():
            excess[name] = max(share, excess.get(name, share))
    bpb = sum(run["val_bpb"] for run in runs) / len(runs)
    num_bytes = max(run["num_bytes"] for run in runs)
    if not math.isfinite(bpb):
        board.write(trial, partial(board.fail, trial, f"expected a finite val_bpb, found {bpb}"), crew.tell)
        return f"failed: val_bpb {bpb}"
    values = [{"val_bpb": bpb, "bytes": num_bytes}[name] for name in spec.objectives]
    board.write(trial, partial(board.finish, trial, values, runs, excess), crew.tell)
    over = ", ".join(name for name, share in excess.items() if share > 0)
    found = ", found again" if all(run["was_found"] for run in runs) else ""
    size = f", {num_bytes:,} bytes" if num_bytes else ""
    return f"val_bpb {bpb:.4f}{size}{f', OVER: {over}' if over else ''}{found}"


def end_trial(crew: Crew, trial) -> bool:
    """Train a trial and write its end; returns whether it failed. Whatever else happens gives it up."""
    board, tell = crew.board, crew.tell
    try:
        tell(f"trial {trial.number}: {train_trial(crew, trial)}")
    except Pruned as pruned:
        board.write(trial, partial(board.prune, trial, pruned.last), tell)
        tell(f"trial {trial.number}: pruned at step {pruned.last['step']}, loss {pruned.last['loss']:.4f}")
    except TrainingFailed as error:
        board.write(trial, partial(board.fail, trial, str(error), error.has_diverged), tell)
        said = error.output[-1] if error.output else str(error)
        tell(f"trial {trial.number}: {'diverged' if error.has_diverged else 'failed'}: {said}")
        return not error.has_diverged
    except BaseException:
        board.release(trial)
        raise
    return False


def claim_or_wait(board: Board, tell: Tell):
    """Claim a trial; while other workers of this machine have the last ones, wait for one to be freed."""
    told = False
    while (trial := board.claim()) is None and board.in_work_here():
        if not told:
            tell("no trial is left to begin; waiting for those in work, in case that their worker is killed")
            told = True
        time.sleep(WAIT_S)
    return trial


def work(crew: Crew) -> None:
    """Train trials until the sweep has as many as it should; raises where nothing can be trained."""
    board, tell, failures = crew.board, crew.tell, 0
    board.enroll()
    try:
        while (trial := claim_or_wait(board, tell)) is not None:
            setting = " ".join(spell(trial.params))
            tell(f"trial {trial.number}: {setting}")
            failures = failures + 1 if end_trial(crew, trial) else 0
            if failures == MOST_FAILURES:
                raise UserError(
                    f"{board.folder}: the last {failures} trials of this worker have failed, as told above. "
                    "Mend what they say and run this again with --retry-failed."
                )
        if not board.is_full():
            tell("no further setting was found that can be trained and was not: the space is used up")
    finally:
        board.leave()
