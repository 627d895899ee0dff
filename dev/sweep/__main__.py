"""Search settings of a recipe with Optuna: one worker, several on this machine, or several machines.

    python -m dev.sweep SPEC.toml                        # on the whole machine, one training at a time
    python -m dev.sweep SPEC.toml --workers 2            # each on its share of cores or GPUs
    python -m dev.sweep SPEC.toml --results              # what has been found so far
    python -m dev.sweep SPEC.toml --dry-run              # check the spec, print the first trainings' commands

The sweep lies in runs/sweeps/NAME: journal.log is Optuna's study, runs/ has a folder a training. The same
command goes on after a stop and trains nothing twice; trials of killed workers are tried again. Given once
more it joins a sweep that runs, on another machine by --storage: a folder on a shared disk, or the URL of a
database.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

from common import CommandParser, UserError, at_least_one, existing, run_command
from dev.desk.child import end_with
from dev.desk.training import Share, snapshot, split_machine
from dev.sweep.board import JOURNAL_NAME, MOST_SKIPS, Board, has_begun
from dev.sweep.results import collect, format_results, try_to_write
from dev.sweep.spec import (
    DRAWS,
    Spec,
    combinations,
    count_refused,
    load_optuna,
    make_sampler,
    read_spec,
    spell,
    why_refused,
)
from dev.sweep.worker import Crew, train_watched, work
from durable.stops import Stopped

FOLDER = Path("runs/sweeps")
CODE_NAME = "code"  # in it: a copy of the code, so that this checkout may be edited meanwhile
DRY_TRIALS = 3
END_S = 90.0  # a worker may take to stop its training
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def tell(text: str, label: str = "") -> None:
    """Say a line; standard output is for the results."""
    print(f"{label}{text}", file=sys.stderr, flush=True)


def stop(signum: int, frame) -> None:
    """Handle a signal, once: end where the program stands, which gives up the trial in work."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signum)


def find_places(spec: Spec, storage: str) -> tuple[Path, str]:
    """Return the sweep's folder, and the URL of a database or "" for the journal in the folder."""
    if "://" in storage:
        return FOLDER / spec.name, storage
    folder = Path(storage) if storage else FOLDER / spec.name
    if folder.is_file():
        raise UserError(
            f"--storage {folder}: expected the folder of a journal, or the URL of a database, found a "
            "file. Name its folder."
        )
    return folder, ""


def plan_commands(spec: Spec, count: int) -> list[str]:
    """Spell out the first trainings of a sweep, without beginning it: of a grid, or as the sampler starts."""
    study = load_optuna().create_study(
        directions=["minimize"] * len(spec.objectives), sampler=make_sampler(spec._asdict())
    )
    own, commands = spec.own_values(), []
    is_grid = spec.sampler["kind"] == "grid"
    for values in islice(combinations(spec.space), count) if is_grid else filter(None, [own]):
        study.enqueue_trial(values)
    for _ in range(MOST_SKIPS):
        values = spec.suggest(study.ask())
        if len(commands) < count and not why_refused(spec, values):
            changes = spec.changes(values) | spec.budget() | {"run.seed": spec.seeds[0]}
            words = ["python", "train_gpt.py", "--recipe", str(spec.recipe), *spell(changes)]
            commands.append(shlex.join(words))
    return commands


def describe_plan(spec: Spec) -> dict:
    """Say what a sweep will do."""
    return {
        "sweep": spec.name,
        "trials": spec.trials,
        "trainings": spec.trials * len(spec.seeds),
        "notes": find_limits(spec),
        "first": plan_commands(spec, min(DRY_TRIALS, spec.trials)),
    }


def find_limits(spec: Spec) -> list[str]:
    """Say what a sweep of this space will pass over or miss."""
    refused, why = count_refused(spec)
    notes = []
    if refused:
        notes.append(f"{refused} of {DRAWS} random settings cannot be trained and are passed over: {why}")
    if spec.own_values() is None:
        notes.append("the recipe's own setting is outside of the space, so it is no trial")
    return notes


def show_plan(spec: Spec, as_json: bool) -> None:
    """Print what a sweep will do."""
    plan = describe_plan(spec)
    if as_json:
        print(json.dumps(plan))
        return
    minutes = plan["trainings"] * spec.seconds / 60
    total = f", {minutes:,.1f} minutes of training clocks" if minutes else ""
    print(f"{spec.name}: {spec.trials} trials, {plan['trainings']} trainings{total}. The first:")
    print("\n".join(plan["first"]))
    print("".join(f"note: {note}\n" for note in plan["notes"]), end="")


def describe_share(share: Share) -> str:
    """Say on what a worker's trainings compute."""
    gpus = f", GPU {' '.join(share.gpus)}" if share.gpus else ""
    return f"{share.threads} {'core' if share.threads == 1 else 'cores'}{gpus}"


def run_workers(options, folder: Path) -> None:
    """Run workers as processes of their own until they end; ends them with this process."""
    storage = options.storage or str(folder)
    each = "; ".join(describe_share(share) for share in split_machine(options.workers))
    tell(f"{options.workers} workers start, each with its trials: {each}")
    words = [sys.executable, "-m", "dev.sweep", str(options.spec), "--storage", storage]
    words += ["--trials", str(options.trials)] if options.trials else []
    workers = [
        subprocess.Popen(
            [*words, "--worker", f"{part}/{options.workers}/{os.getpid()}"], start_new_session=True
        )
        for part in range(options.workers)
    ]  # in sessions of their own: a Ctrl-C is for this process, which stops them once
    try:
        for part, worker in enumerate(workers):
            if worker.wait() < 0:
                tell(f"[{part + 1}] was killed by signal {-worker.returncode}; others try its trial again")
    finally:
        for worker in workers:
            worker.terminate() if worker.poll() is None else None
        for worker in workers:
            try:
                worker.wait(END_S)
            except subprocess.TimeoutExpired:
                worker.kill()


def run_worker(spec: Spec, board: Board, place: str) -> None:
    """Be one of several workers: `place` is its number, how many there are, and who started it."""
    part, count, parent = map(int, place.split("/"))
    end_with(parent)
    label = f"[{part + 1}] "
    crew = Crew(board, snapshot(board.folder / CODE_NAME), split_machine(count)[part], train_watched, tell)
    work(crew._replace(tell=partial(tell, label=label)))


def sweep(options, spec: Spec, board: Board) -> None:
    """Train, in this process or in workers; says what is left where it is stopped."""
    for note in find_limits(spec):
        tell(f"note: {note}")
    if options.retry_failed:
        tell(f"{board.retry_failed()} failed trials are tried again")
    try:
        if options.workers > 1:
            run_workers(options, board.folder)
        else:
            work(Crew(board, snapshot(board.folder / CODE_NAME), None, train_watched, tell))
    except (KeyboardInterrupt, Stopped):
        tell(f"stopped. {board.folder} keeps what is finished: the same command goes on")
        raise


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(prog="python -m dev.sweep", description=__doc__)
    add = parser.add_argument
    add("spec", type=existing, metavar="SPEC.toml", help="what to vary, docs/sweeps.md")
    add("--workers", type=at_least_one, default=1, help="trainings at a time on this machine; default: 1")
    add(
        "--storage",
        default="",
        help="folder on a shared disk, or URL of a database; default: runs/sweeps/NAME",
    )
    add(
        "--trials",
        type=at_least_one,
        default=0,
        help="trials in all, finished ones included; default: SPEC's",
    )
    add("--retry-failed", action="store_true", help="try the settings of failed trials again")
    add("--results", action="store_true", help="print what has been found and draw it, train nothing")
    add("--dry-run", action="store_true", help="check the spec and print the first trainings, begin nothing")
    add("--json", action="store_true", help="print one JSON object")
    add("--worker", default="", help=argparse.SUPPRESS)  # of those that --workers starts
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 1 while trials are missing that were wanted."""
    options = build_parser().parse_args(argv)
    spec = read_spec(options.spec, options.trials)
    split_machine(options.workers)  # raises where there are too few cores
    if options.dry_run:
        show_plan(spec, options.json)
        return 0
    folder, url = find_places(spec, options.storage)
    if options.results and not url and not has_begun(folder / JOURNAL_NAME):
        raise UserError(f"{folder}: no sweep has begun there. Leave out --results to begin it.")
    for signum in STOPS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(signum, stop)
    board = Board(spec, folder, url)
    if board.mended:
        tell(f"note: {board.mended}")
    if options.worker:
        run_worker(spec, board, options.worker)
        return 0
    if not options.results:
        sweep(options, spec, board)
    found = collect(board)
    print(json.dumps(found) if options.json else format_results(found, spec), flush=True)
    try_to_write(found, spec, folder, tell)
    return 0 if options.results or board.is_over() else 1


if __name__ == "__main__":
    run_command(main)
