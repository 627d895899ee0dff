"""Feed a tracker from a run's folder, while the run goes on or after it.

    python -m dev.track runs/A --to trackio                 a local database; `trackio show` opens it
    python -m dev.track runs/A runs/B --to wandb --offline  files that `wandb sync` sends later
    python -m dev.track runs/A --to tensorboard             an events file in the run folder
    python -m dev.track runs/A --to wandb --follow          until the run ends

The recipe becomes the config, events become train/... and val/..., the result final/.... Run again, it sends
what is new: what was sent stands in .tracked.json in the run folder. To send all again, remove that file and
the run at the tracker.
"""

import hashlib
import json
import os
import re
import sqlite3
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import NamedTuple, Protocol

from filelock import FileLock, Timeout

from common import CommandParser, UserError, read_json, require_utf8_name, run_command, write_json
from dev.desk.extras import require
from dev.desk.runs import RunFacts, read_runs
from dev.watch import ENDED, seconds, status_of
from formats.events import EVENTS_NAME, append_scalars

PROJECT = "parameter-golf"
STATE_NAME = ".tracked.json"
TRACKIO_ELSEWHERE = (
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
)  # variables that send its data off this machine


class Options(NamedTuple):
    """Where to send."""

    project: str
    offline: bool
    is_new: bool  # nothing of the run was sent there yet


class Sink(Protocol):
    """A tracker with one run open."""

    place: str  # where the data go, for people

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""

    def attach(self, path: Path) -> None:
        """Send a file."""

    def close(self) -> None:
        """End well: all that was sent is stored."""


class TrackioSink:
    """A run in trackio's local database, or where TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say."""

    def __init__(self, run: RunFacts, name: str, options: Options):
        if options.offline:
            for variable in TRACKIO_ELSEWHERE:
                os.environ.pop(variable, None)
        self.trackio = require("trackio")
        settings = {"resume": "allow", "embed": False}
        settings |= {"auto_log_gpu": False, "auto_log_cpu": False}  # of this machine, not the run's
        try:
            self.run = self.trackio.init(options.project, name, config=config_of(run), **settings)
        except (ValueError, OSError, sqlite3.Error) as error:  # a name that it does not take, a full disk
            advice = "Change --project or TRACKIO_DIR."
            raise UserError(f"--to trackio: not opened ({error!s:.300}). {advice}") from error
        away = [os.environ[variable] for variable in TRACKIO_ELSEWHERE if variable in os.environ]
        self.place = (
            away[0] if away else f"{self.trackio.TRACKIO_DIR} (trackio show --project {options.project})"
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def attach(self, path: Path) -> None:
        self.trackio.log_artifact(path, name=path.name, type="model")

    def close(self) -> None:
        self.trackio.finish()


class WandbSink:
    """A run of Weights & Biases, or offline a folder that `wandb sync` sends."""

    def __init__(self, run: RunFacts, name: str, options: Options):
        self.wandb = require("wandb")
        quiet = {"silent": True, "console": "off", "disable_git": True, "save_code": False}
        settings = self.wandb.Settings(**quiet, x_disable_stats=True, x_disable_meta=True)
        mode = "offline" if options.offline else os.environ.get("WANDB_MODE", "online")
        try:
            self.run = self.wandb.init(
                project=options.project, id=name, name=run.name, config=config_of(run), dir=str(run.folder),
                resume="allow", mode=mode, settings=settings,
            )  # fmt: skip
        except (self.wandb.errors.Error, OSError) as error:
            advice = "Log in by `wandb login`, or use --offline and `wandb sync` later."
            raise UserError(
                f"--to wandb: not opened ({' '.join(str(error).split()):.300}). {advice}"
            ) from error
        # An axis of our own: W&B's own steps only grow; a later call may bring the score of an old one.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        here = f"wandb sync {Path(self.run.dir).parent}"
        self.place = here if mode == "offline" else self.run.url or here

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def attach(self, path: Path) -> None:
        self.run.log_artifact(path, name=f"{self.run.id}-{path.stem}", type="model")

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """An events file beside the run's other files. Needs no package."""

    def __init__(self, run: RunFacts, name: str, options: Options):
        if run.recipe.get("watch.tensorboard"):
            raise UserError(f"{run.folder}: the run writes TensorBoard events itself (watch.tensorboard=1).")
        self.path = run.folder / EVENTS_NAME
        if options.is_new:
            self.path.unlink(missing_ok=True)
        self.place = f"{self.path} (tensorboard --logdir {run.folder})"
        recipe = run.folder / "recipe.toml"
        self.began = recipe.stat().st_mtime if recipe.is_file() else time.time()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for kind in {name.partition("/")[0] for name in numbers}:
            own = {
                name.partition("/")[2]: number
                for name, number in numbers.items()
                if name.startswith(f"{kind}/")
            }
            when = self.began + own.get("train_ms", 0.0) / 1000
            append_scalars(self.path, when, {"kind": kind, "step": step, **own})

    def attach(self, path: Path) -> None:
        """Do nothing: TensorBoard takes no files, and `main` refuses --artifact."""

    def close(self) -> None:
        pass


SINKS: dict[str, type[Sink]] = {"trackio": TrackioSink, "wandb": WandbSink, "tensorboard": TensorBoardSink}


# ----------------------------------------------------------------------------------------------------------
# What is sent
# ----------------------------------------------------------------------------------------------------------


def config_of(run: RunFacts) -> dict:
    """Word the recipe, and what else the result depends on, as a tracker's config."""
    machine = {f"machine.{name}": value for name, value in run.origin.get("machine", {}).items()}
    others = {f"origin.{name}": value for name, value in run.origin.items() if name != "machine"}
    return {**run.recipe, "run.seed": run.seed, **others, **machine}


def name_of(run: RunFacts) -> str:
    """Name a run for a tracker: alike wherever its folder is copied, another for another training.

    Letters, digits, dots, dashes and underscores, below 64: what W&B takes.
    """
    begin = json.dumps([sorted(run.recipe.items()), run.events[0]], default=repr)
    plain = re.sub(r"[^\w.-]", "_", run.folder.resolve().name, flags=re.ASCII)
    return f"{plain[-50:]}-{hashlib.sha256(begin.encode()).hexdigest()[:8]}"


def numbers_of(facts: dict, kind: str) -> dict[str, float]:
    """Take what is a number of an event or a result, named kind/...."""
    skipped = ("kind", "step", "crc32")
    return {
        f"{kind}/{name}": value
        for name, value in facts.items()
        if name not in skipped and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def summary_of(run: RunFacts) -> dict[str, float]:
    """Word the result of a finished run as numbers."""
    result = run.result or {}
    facts = {name: result.get(name) for name in ("steps", "train_ms", "tokens_per_second")}
    facts |= {name: run.score.get(name) for name in ("val_bpb", "val_loss")}
    facts["bytes"] = sum(run.ledger.values()) or None
    facts["over_limits"] = len(result.get("over_limits", []))
    return numbers_of(facts, "final")


class Row(NamedTuple):
    """One thing to send."""

    kind: str  # train, val, final or artifact
    step: int
    numbers: dict[str, float]


class Tracked:
    """What of a run has been sent to one place, kept in the run's folder."""

    def __init__(self, folder: Path, key: str):
        self.path, self.key = folder / STATE_NAME, key
        stored = read_json(self.path) if self.path.is_file() else {}
        if not isinstance(stored, dict) or not isinstance(stored.get(key, {}), dict):
            raise UserError(
                f"{self.path}: expected what was sent, found something else. Remove it to send all."
            )
        self.stored, known = stored, stored.get(key, {})
        self.name = str(known.get("name", ""))  # by which the place knows the run
        self.steps = {kind: step for kind, step in known.items() if isinstance(step, int)}

    def news(self, run: RunFacts, with_artifact: bool) -> list[Row]:
        """List what was not sent yet; all, where another run has taken the folder or this one became longer.

        A run that went on has done steps again, to the same numbers: they were sent.
        """
        name = name_of(run) if run.events else self.name
        if name != self.name:
            self.name, self.steps = name, {}
        rows = [Row(event["kind"], event["step"], numbers_of(event, event["kind"])) for event in run.events]
        if run.result is not None and rows:
            rows.append(Row("final", rows[-1].step, summary_of(run)))
            rows += [Row("artifact", rows[-1].step, {})] if with_artifact and run.artifact else []
        return [row for row in rows if row.step > self.steps.get(row.kind, -1)]

    def save(self, rows: list[Row]) -> None:
        """Note what was sent."""
        if rows:
            self.steps |= {row.kind: max(row.step, self.steps.get(row.kind, -1)) for row in rows}
            self.stored[self.key] = {"name": self.name, **self.steps}
            write_json(self.path, self.stored)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


class Feed:
    """A run and the sink that it is sent to."""

    def __init__(self, run: RunFacts, args, held: ExitStack):
        if run.kind == "record":
            raise UserError(f"{run.folder}: expected a run folder, found a record. Name runs.")
        require_utf8_name(run.folder)
        lock = FileLock(run.folder / f"{STATE_NAME}.lock")
        try:
            held.enter_context(lock.acquire(timeout=0))
        except Timeout as error:
            raise UserError(f"{run.folder}: another sender is at work here. Wait until that ends.") from error
        self.run, self.args, self.sent = run, args, 0
        mode = "/offline" if args.offline else ""
        self.tracked = Tracked(run.folder, f"{args.to}/{args.project}{mode}")
        self.sink: Sink | None = None
        self.unsaved: list[Row] = []

    def send(self) -> None:
        """Send what is new; what was sent by the call before counts as stored."""
        self.tracked.save(self.unsaved)
        name = self.tracked.name
        rows, self.unsaved = self.tracked.news(self.run, self.args.artifact), []
        if self.sink and name != self.tracked.name:
            self.close()
        if rows and self.sink is None:
            options = Options(self.args.project, self.args.offline, not self.tracked.steps)
            self.sink = SINKS[self.args.to](self.run, self.tracked.name, options)
        for row in rows:
            if row.kind == "artifact":
                self.sink.attach(self.run.artifact)
            else:
                self.sink.log(row.step, row.numbers)
            self.unsaved.append(row)
        self.sent += len(rows)

    def close(self) -> None:
        """Let the sink store all."""
        if self.sink is not None:
            self.sink.close()
            self.sink = None

    def end(self) -> None:
        """Let the sink store all, and note it."""
        if self.sink is not None:
            self.close()
            self.tracked.save(self.unsaved)

    def facts(self, place: str) -> dict:
        """Word what was done, for programs."""
        return {"run": str(self.run.folder), "state": self.run.state, "sent": self.sent, "place": place}


def track(run: RunFacts, args, held: ExitStack) -> dict:
    """Send a run, with --follow until it ends; returns what was done."""
    feed, place = Feed(run, args, held), ""
    try:
        while True:
            feed.send()
            place = feed.sink.place if feed.sink else place
            if not args.follow or status_of(feed.run, time.time()).state in ENDED:
                break
            time.sleep(args.every)
            (feed.run,) = read_runs([run.folder])
    finally:
        feed.end()
    return feed.facts(place)


def main(argv: list[str] | None = None) -> None:
    """Send runs to a tracker."""
    parser = CommandParser(prog="python -m dev.track", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    parser.add_argument("--to", required=True, choices=SINKS, help="the tracker")
    parser.add_argument("--project", default=PROJECT, help=f"default: {PROJECT}")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends; one run")
    parser.add_argument("--offline", action="store_true", help="keep all on this machine, without network")
    parser.add_argument("--artifact", action="store_true", help="send the artifact of a finished run, too")
    about = "seconds between looks with --follow (default: 5)"
    parser.add_argument("--every", type=seconds, default=5.0, metavar="S", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    if args.artifact and args.to == "tensorboard":
        parser.error("--artifact: TensorBoard takes no files; leave it out or use another --to")
    runs = read_runs(args.runs)
    if args.follow and len(runs) > 1:
        raise UserError(f"--follow: expected one run, found {len(runs)}. Start a command a run.")
    with ExitStack() as held, redirect_stdout(sys.stderr):  # trackers talk on standard output
        done = [track(run, args, held) for run in runs]
    for facts in [] if args.json else done:
        where = f" to {facts['place']}" if facts["sent"] else ", none is new"
        print(f"{facts['run']}: {facts['sent']} events{where}")
    if args.json:
        print(json.dumps({"to": args.to, "project": args.project, "runs": done}))


if __name__ == "__main__":
    run_command(main)
