"""Watch runs while they begin, train, are scored, stop and go on: a live table in a terminal, also over ssh.

    python -m dev.watch                   the newest runs of runs/, new ones as they come
    python -m dev.watch runs/A runs/B     these; a folder of runs stands for all in it
    python -m dev.watch --once            print the table once; so it is where output is no terminal
    python -m dev.watch runs/A --until-end && python -m dev.report runs/A    wait for it

Reads the run folders and changes nothing in them. The live view needs the package rich (make desk); --once
and --json need none.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import CommandParser, UserError, at_least_one, read_json, run_command
from dev.desk.extras import require
from dev.desk.runs import LOG_NAME, METRICS_NAME, RunFacts, find_folders, is_record, read_run, with_names
from durable.lock import HOLDER_NAME
from eval.stats import null_for_nan
from formats.checkpoints import RESULT_NAME

RUNS = Path("runs")  # as in eval/runs.py, which would load torch
SILENT_S = 60.0  # a run that writes nothing for so long is said to be silent
RATE_S = 10.0  # of training that a rate of tokens is taken over
SMOOTHED = 0.1  # of the events, over which a shown loss is averaged
SPARK_WIDTH = 16
SPARKS = "".join(chr(0x2581 + i) for i in range(8)), "_.-=+*#@"  # block elements, and what any terminal has
MOST_RUNS = 12  # of a folder, unless --most says otherwise
NOTHING = f"no runs in {RUNS}/ yet. `make run` trains one."
COLOURS = {"finished": "green", "stopped": "yellow", "over limits": "red", "failed": "red", "killed": "red"}
FAILED = ("failed", "killed", "over limits")
ENDED = ("finished", "stopped", *FAILED)
# What the last line of a log that matches says a run is doing.
PROGRESS = re.compile(r"(training|scoring): (\d+)% seconds_left:(\d+)")
STATES = (
    ("stopped", re.compile(r"stopped: |invalid: training data")),
    ("scoring", re.compile(r"scoring: |eval_mode:|final_int")),
    ("quantizing", re.compile(r"quantizing: |Serialized model|Total submission|Code size")),
    ("calibrating", re.compile(r"calibrating:|calibration_time:|peak memory")),
    ("validating", re.compile(r"validating: |stopping_early:")),
    ("training", re.compile(r"step:\d+/\d+ |training: |phase: |projected_step_seconds:|resumed:")),
    ("warming up", re.compile(r"warming up: |warmup_step:")),
    ("packing", re.compile(r"packing: |Running PyTorch ")),
)
PHASE = re.compile(r"phase: .*\bbatch_tokens:(\d+) .*\bstep:(\d+) ")


class Status(NamedTuple):
    """What a run is doing. What is not known is None."""

    name: str
    state: str  # finished, over limits, stopped, failed, killed, or what it is doing
    step: int
    num_steps: int | None  # that it may do at most
    train_loss: float | None  # nats a token, mean of the last events
    val_bpb: float | None  # the score of a finished run, else that of the last validation
    tokens_per_second: float | None
    train_s: float
    limit_s: float | None  # of training
    seconds_left: float | None  # of the phase that it is in
    silent_s: float | None  # since it last wrote; None once it has ended
    losses: list[float]

    @property
    def said(self) -> str:
        """The state in words, with the silence where it is long."""
        is_silent = self.silent_s is not None and self.silent_s >= SILENT_S
        return f"{self.state}, silent {spell_seconds(self.silent_s)}" if is_silent else self.state


# ----------------------------------------------------------------------------------------------------------
# From a run folder to a status
# ----------------------------------------------------------------------------------------------------------


def status_of(run: RunFacts, now: float) -> Status:
    """Say what a run is doing at a time, time.time()."""
    lines = run.log.text.splitlines() if run.log else []
    state = state_of(run, lines)
    train = [event for event in run.events if event["kind"] == "train" and "train_loss" in event]
    validations = [event["val_bpb"] for event in run.events if event.get("val_bpb") is not None]
    losses = [event["train_loss"] for event in train]
    tail = losses[-max(round(SMOOTHED * len(losses)), 1) :]
    silent_s = None if state in ENDED else max(now - last_write(run.folder), 0.0)
    rate = (run.result or {}).get("tokens_per_second") or tokens_per_second(train, run, lines)
    last = run.events[-1] if run.events else {}
    return Status(
        name=run.name,
        state=state,
        step=last.get("step", 0),
        num_steps=run.recipe.get("run.iterations"),
        train_loss=sum(tail) / len(tail) if tail else None,
        val_bpb=run.val_bpb if run.val_bpb is not None else next(reversed(validations), None),
        tokens_per_second=rate,
        train_s=last.get("train_ms", 0.0) / 1000,
        limit_s=run.recipe.get("run.max_wallclock_seconds") or None,
        seconds_left=None if state in ENDED else time_left(lines, state, silent_s),
        silent_s=silent_s,
        losses=losses,
    )


def state_of(run: RunFacts, lines: list[str]) -> str:
    """Name what a run is doing, or how it ended."""
    if run.result is not None:
        return "over limits" if run.result.get("over_limits") else "finished"
    doing = next((name for line in reversed(lines) for name, sign in STATES if sign.match(line)), "starting")
    return doing if doing == "stopped" else writer_of(run.folder) or doing


def writer_of(folder: Path) -> str:
    """Say how an unfinished run has ended whose process is gone; "" while it may be there.

    A process that ends takes the note of its lock away, unless it was killed. One on another host may be
    there: silence tells.
    """
    if not (folder / HOLDER_NAME).is_file():
        return "failed"
    try:
        holder = read_json(folder / HOLDER_NAME)
        process, host = int(holder["process"]), holder["host"]
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return ""
    return "killed" if host == socket.gethostname() and not is_alive(process) else ""


def is_alive(process: int) -> bool:
    """Tell whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or a number that no process can have
        return True
    return True


def last_write(folder: Path) -> float:
    """Return when a run last wrote its log or an event, or began."""
    written = max(modified(folder / name) for name in (LOG_NAME, METRICS_NAME))
    return written or modified(folder)


def modified(path: Path) -> float:
    """Return a file's time; 0 where it is not there, or no more: a run may take a folder anew at any time."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def time_left(lines: list[str], state: str, silent_s: float) -> float | None:
    """Return the seconds that the log last said are left of this phase, less those that have gone since."""
    found = next((match for line in reversed(lines) if (match := PROGRESS.match(line))), None)
    return max(int(found[3]) - silent_s, 0.0) if found and found[1] == state else None


def tokens_per_second(train: list[dict], run: RunFacts, lines: list[str]) -> float | None:
    """Return the rate over the last seconds of training; None before two events."""
    recent = [event for event in train if event["train_ms"] >= train[-1]["train_ms"] - 1000 * RATE_S]
    recent = recent if len(recent) > 1 else train[-2:]
    if len(recent) < 2 or recent[-1]["train_ms"] <= recent[0]["train_ms"]:
        return None
    first, last = recent[0], recent[-1]
    sizes = step_tokens(run.recipe, lines)
    if not sizes:
        return None
    num_tokens = sum(
        next(size for begin, size in reversed(sizes) if begin < step)
        for step in range(first["step"] + 1, last["step"] + 1)
    )
    return 1000 * num_tokens / (last["train_ms"] - first["train_ms"])


def step_tokens(recipe: dict, lines: list[str]) -> list[tuple[int, int]]:
    """List (steps done before, tokens a step) of a run's phases so far; empty without a recipe."""
    stages = recipe.get("schedule.stages") or []
    first = stages[0][2] if stages else recipe.get("data.batch_tokens")
    changes = [(int(match[2]), int(match[1])) for line in lines if (match := PHASE.match(line))]
    return [(-1, first), *changes] if first else []


# ----------------------------------------------------------------------------------------------------------
# Which runs
# ----------------------------------------------------------------------------------------------------------


class Watcher:
    """The runs that a command names, read again only where their files have changed."""

    def __init__(self, paths: list[str], most: int):
        self.paths, self.most = [Path(path) for path in paths] or [RUNS], most
        self.is_chosen = bool(paths)
        self.known: dict[Path, tuple[tuple, RunFacts]] = {}  # by folder: a stamp of its files, what was read

    def folders(self) -> list[Path]:
        """List the run folders, newest first; those that are named stay in their order. Records are none."""
        found = {folder.resolve(): folder for path in self.paths for folder in find_folders(path)}
        folders = [folder for folder in found.values() if not is_record(folder)]
        named = {path.resolve() for path in self.paths}
        if all(folder.resolve() in named for folder in folders):
            return folders
        return sorted(folders, key=last_write, reverse=True)[: self.most]

    def read(self) -> list[RunFacts]:
        """Read the runs; one whose folder goes away meanwhile is left out."""
        runs = []
        for folder in self.folders():
            try:
                stamp = stamp_of(folder)
                if self.known.get(folder, (None,))[0] != stamp:
                    self.known[folder] = stamp, read_run(folder)
            except OSError:
                continue
            runs.append(self.known[folder][1])
        return with_names(runs)

    def statuses(self) -> list[Status]:
        """Say what all runs are doing now; raises where a name on the command line holds none."""
        runs = self.read()
        if self.is_chosen and not runs:
            names = ", ".join(map(str, self.paths))
            raise UserError(f"{names}: expected run folders, found none. `make run` trains one into {RUNS}/.")
        return [status_of(run, time.time()) for run in runs]


def stamp_of(folder: Path) -> tuple:
    """Return what changes when a run writes."""
    names = (LOG_NAME, METRICS_NAME, RESULT_NAME, HOLDER_NAME)
    paths = [folder / name for name in names if (folder / name).is_file()]
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


# ----------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------


def spell_seconds(seconds: float | None) -> str:
    """Spell a time: 59 s, 12:30, 3:05:00; "" for an unknown one."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def spark(losses: list[float], width: int, levels: str) -> str:
    """Draw losses as a line of characters: means of equal shares of the steps, low to high."""
    losses = [loss for loss in losses if math.isfinite(loss)]
    count = min(width, len(losses))
    cuts = [len(losses) * i // count for i in range(count + 1)] if count else [0]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def cells(status: Status, levels: str) -> dict[str, str]:
    """Spell a status: a text a column, in the order in which they stand."""
    clock = spell_seconds(status.train_s)
    clock += f" of {spell_seconds(status.limit_s)}" if status.limit_s else ""
    return {
        "run": status.name,
        "state": status.said,
        "left": spell_seconds(status.seconds_left),
        "step": f"{status.step:,}" if status.step else "",
        "loss": "" if status.train_loss is None else f"{status.train_loss:.4f}",
        "val_bpb": "" if status.val_bpb is None else f"{status.val_bpb:.4f}",
        "tokens/s": "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        "trained": clock if status.train_s else "",
        "curve": spark(status.losses, SPARK_WIDTH, levels),
    }


TEXT_COLUMNS = ("run", "state", "curve")  # the others are numbers, at the right edge
DROPPED = (
    "curve",
    "tokens/s",
    "trained",
    "step",
    "left",
)  # what a narrow terminal does without, in this order
NAME_WIDTH = 12  # to which a name may be cut, once nothing is left to drop
GAP = 2


def fit(rows: list[dict[str, str]], width: int) -> list[dict[str, str]]:
    """Drop columns and cut names until rows fit into a width."""
    titles, sizes = list(rows[0]), {}
    for dropped in ("", *DROPPED):
        titles = [title for title in titles if title != dropped]
        sizes = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}
        excess = sum(sizes.values()) + GAP * (len(sizes) - 1) - width
        if excess <= 0:
            break
    most = max(sizes["run"] - max(excess, 0), NAME_WIDTH)
    return [{title: row[title] for title in titles} | {"run": cut_name(row["run"], most)} for row in rows]


def cut_name(name: str, most: int) -> str:
    """Keep the end of a name, where those of a series differ."""
    return name if len(name) <= most else "~" + name[len(name) - most + 1 :]


def plain_table(statuses: list[Status], width: int, levels: str) -> str:
    """Lay the statuses out as text."""
    if not statuses:
        return NOTHING
    rows = fit([cells(status, levels) for status in statuses], width)
    rows = [{title: title for title in rows[0]}, *rows]
    columns = []
    for title in rows[0]:
        size = max(len(row[title]) for row in rows)
        columns.append([f"{row[title]:{'<' if title in TEXT_COLUMNS else '>'}{size}}" for row in rows])
    return "\n".join((" " * GAP).join(line).rstrip() for line in zip(*columns))


def rich_table(statuses: list[Status], width: int, levels: str):
    """Lay the statuses out in colours, for rich."""
    table = require("rich.table").Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    if not statuses:
        table.add_column(NOTHING)
        return table
    escape = require("rich.markup").escape
    rows = fit([cells(status, levels) for status in statuses], width)
    for title in rows[0]:
        table.add_column(title, justify="left" if title in TEXT_COLUMNS else "right", no_wrap=True)
    for status, row in zip(statuses, rows):
        colour = COLOURS.get(status.state, "yellow" if "silent" in row["state"] else "")
        row = {title: escape(text) for title, text in row.items()}
        if colour:
            row["state"] = f"[{colour}]{row['state']}[/]"
        table.add_row(*row.values())
    return table


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def watch_live(watcher: Watcher, args: argparse.Namespace, levels: str) -> list[Status]:
    """Show the table until it is interrupted or, with --until-end, all runs have ended; returns the last."""
    live, console = require("rich.live").Live, require("rich.console").Console()
    statuses = watcher.statuses()
    with live(console=console, auto_refresh=False) as view:
        while True:
            view.update(rich_table(statuses, console.width, levels), refresh=True)
            if args.until_end and has_ended(statuses):
                return statuses
            time.sleep(args.every)
            statuses = watcher.statuses()


def wait_silently(watcher: Watcher, args: argparse.Namespace) -> list[Status]:
    """Wait until all runs have ended, where nobody looks."""
    while not has_ended(statuses := watcher.statuses()):
        time.sleep(args.every)
    return statuses


def facts_of(statuses: list[Status]) -> dict:
    """Word the statuses for programs; all losses are in metrics.jsonl."""
    rows = [status._asdict() for status in statuses]
    return null_for_nan({"runs": [{name: row[name] for name in row if name != "losses"} for row in rows]})


def has_ended(statuses: list[Status]) -> bool:
    return bool(statuses) and all(status.state in ENDED for status in statuses)


def seconds(text: str) -> float:
    """Read the value of --every; argparse adds its name to the error."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 3600, found {text[:40]!r}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Show what runs do; returns 1 where --until-end saw one fail."""
    parser = CommandParser(prog="python -m dev.watch", description=__doc__)
    about = f"run folders, or folders of them; default: {RUNS}"
    parser.add_argument("paths", nargs="*", metavar="RUN", help=about)
    parser.add_argument("--once", action="store_true", help="print the table once, without colours")
    about = "end when all have ended; the status is 1 if one failed"
    parser.add_argument("--until-end", action="store_true", help=about)
    about = "seconds between looks (default: 2)"
    parser.add_argument("--every", type=seconds, default=2.0, metavar="S", help=about)
    about = f"of a folder, the newest N runs (default: {MOST_RUNS})"
    parser.add_argument("--most", type=at_least_one, default=MOST_RUNS, metavar="N", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object once")
    args = parser.parse_args(argv)
    watcher = Watcher(args.paths, args.most)
    encoding = sys.stdout.encoding or "ascii"
    levels = SPARKS[not encoding.lower().startswith("utf")]
    if sys.stdout.isatty() and not (args.once or args.json):
        try:
            statuses = watch_live(watcher, args, levels)
        except KeyboardInterrupt:  # how one leaves a live view
            return 0
    else:
        statuses = wait_silently(watcher, args) if args.until_end else watcher.statuses()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
        said = json.dumps(facts_of(statuses)) if args.json else plain_table(statuses, width, levels)
        print(said.encode(encoding, "backslashreplace").decode(encoding))
    return int(args.until_end and any(status.state in FAILED for status in statuses))


if __name__ == "__main__":
    run_command(main)
