"""Run the parts of the battery one after the other, each in a process of its own, and keep what they found.

results.json is rewritten, whole or not at all, whenever something is known, and is valid JSON at any time. A
part that crashes, hangs or is killed costs its own measurements from there on and nothing else.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from common import write_json
from dev.gpu_battery.job import STACK_SIGNAL, Job, plain, read_records

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS_NAME = "results.json"
RECORDS_NAME = "records.jsonl"  # of a part
FORMAT = 1  # of results.json
POLL_SECONDS = 0.1
SAVE_SECONDS = 5.0  # between updates of results.json while a part runs
RESERVE_SECONDS = 3.0  # of the whole, for ending the last part
LEAST_SHARE = 0.5  # of its time without which a part is not started
STACK_SECONDS = 0.3  # for a part to write where it hangs
REHEARSAL_SLACK = 2.0  # a part's time in a rehearsal: other work may keep the cores busy
KILL_SECONDS = 10.0  # that a killed process may take to go: a driver may hold it
TAIL_CHARS = 4000  # of standard error that are kept of a part that failed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BatteryPart(NamedTuple):
    """A row of the table of parts."""

    name: str
    seconds: float  # most that it may take
    measures: str  # what, in a line
    function: str  # "module:function", called with a Job
    beside: bool = False  # runs while compilers fill their caches: its times mean little


class Started(NamedTuple):
    """A process of the battery."""

    process: subprocess.Popen
    folder: Path  # of its records and its output
    began: float
    limit: float

    @property
    def records(self) -> Path:
        """Name the file of its lines."""
        return self.folder / RECORDS_NAME


class BatterySettings(NamedTuple):
    """What holds for all parts."""

    out: Path  # results.json goes here, and nothing else
    work: Path  # shards, runs, caches, the parts' output
    seconds: float  # for all parts together
    rehearse: bool = False
    data: str = ""
    carried: str = ""  # folder of what is measured beside this project (contest.py)
    ahead: tuple[str, ...] = ()  # functions that compile what later parts run, from the start on
    ahead_seconds: float = 150.0  # most that they may take


class Stop:
    """Whether a signal asked the battery to end."""

    def __init__(self):
        self.signal = 0


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note signals instead of dying of them, so that no process and no half result is left behind."""
    stop = Stop()

    def note(number: int, _) -> None:
        stop.signal = number

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not nohup's
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Battery:
    """One run of some parts: the report so far and the time that is left."""

    def __init__(self, parts: Sequence[BatteryPart], settings: BatterySettings, stop: Stop):
        self.parts, self.settings, self.stop = parts, settings, stop
        self.started = time.monotonic()
        self.report = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "rehearsal": settings.rehearse,
            "commit": find_commit(),
            "python": platform.python_version(),
            "card": find_card(),
            "limit_s": settings.seconds,
            "seconds": 0.0,
            "parts": {
                part.name: {"status": "skipped", "reason": "not reached", "measures": part.measures}
                for part in parts
            },
        }

    def seconds_left(self) -> float:
        """Return how long the battery may still take."""
        return self.settings.seconds - (time.monotonic() - self.started)

    def save(self, name: str = "", **facts) -> None:
        """Put facts about a part into the report and rewrite the file."""
        self.report["seconds"] = round(time.monotonic() - self.started, 1)
        if name:
            self.report["parts"][name] = facts | {"measures": self.report["parts"][name]["measures"]}
        write_json(self.settings.out / RESULTS_NAME, plain(self.report))

    def run(self) -> dict:
        """Run all parts; returns the report."""
        self.save()
        ahead = [self.start(f"ahead_{function.rpartition(':')[2]}", function, self.settings.ahead_seconds)
                 for function in self.settings.ahead]  # fmt: skip
        try:
            for part in self.parts:
                if ahead and not part.beside:
                    self.join(ahead)
                    ahead = []
                self.run_if_time(part)
        finally:
            for started in ahead:
                end_group(started.process)
        return self.report

    def join(self, ahead: list[Started]) -> None:
        """Wait for what compiles ahead, and note what it found."""
        for started in ahead:
            facts = self.end(started, lambda: None)
            self.report.setdefault("ahead", {})[started.folder.name] = facts

    def run_if_time(self, part: BatteryPart) -> None:
        """Run a part unless the battery was stopped or too little time is left."""
        left = self.seconds_left() - RESERVE_SECONDS
        if self.stop.signal:
            reason = f"the battery was stopped by {signal.Signals(self.stop.signal).name}"
            self.save(part.name, status="skipped", reason=reason)
        elif left < LEAST_SHARE * part.seconds:
            reason = f"out of time: {max(left, 0):.0f} s left, it may take {part.seconds:g}"
            self.save(part.name, status="skipped", reason=reason)
            say(f"{part.name}: skipped, {reason}")
        else:
            slack = REHEARSAL_SLACK if self.settings.rehearse else 1.0
            self.run_part(part, min(slack * part.seconds, left))

    def start(self, name: str, function: str, limit: float) -> Started:
        """Start a function in a process group of its own."""
        folder = self.settings.work / "parts" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings, began = self.settings, time.monotonic()
        records = folder / RECORDS_NAME
        places = str(records), str(settings.work), settings.data, settings.carried
        job = Job(function, *places, settings.rehearse, limit, time.time())
        with open(folder / "stdout.txt", "wb") as out, open(folder / "stderr.txt", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "dev.gpu_battery.child", json.dumps(job._asdict())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env=child_environment(settings),
                process_group=0,  # not a new session: who ends this session's processes reaches it
            )
        return Started(process, folder, began, limit)

    def run_part(self, part: BatteryPart, limit: float) -> None:
        """Run a part and end its whole process group, however it ends."""
        say(f"{part.name}: {part.measures}; at most {limit:.0f} s, {self.seconds_left():.0f} s left in all")
        started = self.start(part.name, part.function, limit)

        def save_progress() -> None:
            self.save(part.name, status="running", results=read_records(started.records).results)

        self.save(part.name, **self.end(started, save_progress))

    def end(self, started: Started, save_progress: Callable[[], None]) -> dict:
        """Wait for a process, end its group however it ends, and return what it found."""
        process, limit = started.process, started.limit
        try:
            why = self.wait(process.pid, started.began + limit, save_progress)
        finally:
            gone = end_group(process)
        found, seconds = read_records(started.records), round(time.monotonic() - started.began, 1)
        facts = judge(why, process.returncode, limit) | {"seconds": seconds, "limit_s": round(limit, 1)}
        facts |= {"results": found.results} | ({"errors": found.errors} if found.errors else {})
        if facts["status"] != "ok":
            facts |= {"unfinished": found.unfinished, "stderr": tail(started.folder / "stderr.txt")}
        if not gone:
            facts["remark"] = f"process {process.pid} was still there {KILL_SECONDS:.0f} s after SIGKILL"
        reason = f" ({facts['reason']})" if "reason" in facts else ""
        say(f"{started.folder.name}: {facts['status']}{reason} after {facts['seconds']} s")
        return facts

    def wait(self, pid: int, until: float, save_progress: Callable[[], None]) -> str:
        """Wait for a process without reaping it; returns "" at its end, else what ended the wait."""
        saved = time.monotonic()
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self.stop.signal:
                return f"stopped by {signal.Signals(self.stop.signal).name}"
            if time.monotonic() > until:
                os.kill(pid, STACK_SIGNAL)
                time.sleep(STACK_SECONDS)
                return "timed out"
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                save_progress()
            time.sleep(POLL_SECONDS)
        return ""


def end_group(process: subprocess.Popen) -> bool:
    """Kill a process and all of its group, then reap it; False when it does not go."""
    # Not yet reaped, so its id, which is the group's, cannot have gone to another process.
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    return process.returncode is not None


def judge(why: str, status: int | None, limit: float) -> dict:
    """Name a part's status and the reason of a bad one."""
    if why == "timed out":
        return {"status": "timed out", "reason": f"killed after {limit:.0f} s"}
    if status == 0 and not why:
        return {"status": "ok"}
    is_killed = status is not None and status < 0
    ended = f"killed by {signal.Signals(-status).name}" if is_killed else f"exit status {status}"
    return {"status": "failed", "reason": why or ended}


def tail(path: Path) -> str:
    """Return the end of a text, whatever bytes are in it."""
    return path.read_bytes()[-TAIL_CHARS:].decode("utf-8", "replace").strip()


def child_environment(settings: BatterySettings) -> dict[str, str]:
    """Return the environment of the parts: they share the compilers' caches.

    A rehearsal has one thread: two that wait for each other on busy cores take ten times as long.
    """
    caches = settings.work / "cache"
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} if settings.rehearse else {}
    shared = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    shared |= {f"{name}_CACHE_DIR": str(caches / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
    return os.environ | threads | shared | {"PYTHONUNBUFFERED": "1"}


def first_line(*command: str) -> str:
    """Return the first line that a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else ""


def find_commit() -> str:
    """Name the commit that runs; a copy of the tree without its history has none."""
    commit = first_line("git", "rev-parse", "--short=12", "HEAD")
    changed = first_line("git", "status", "--porcelain", "--untracked-files=no")
    return (commit + (" with changes" if changed else "")) or "unknown"


def find_card() -> str:
    """Name the first card, its memory and its driver, without torch."""
    query = "--query-gpu=name,memory.total,driver_version"
    return first_line("nvidia-smi", query, "--format=csv,noheader") or "none"


def say(text: str) -> None:
    """Print a line of progress; whoever reads it may be gone."""
    with suppress(OSError):
        print(text, flush=True)


def run_battery(parts: Sequence[BatteryPart], settings: BatterySettings) -> dict:
    """Run the parts in order within the time; returns the report, which results.json holds as well."""
    settings = settings._replace(out=settings.out.resolve(), work=settings.work.resolve())
    settings.out.mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop:
        return Battery(parts, settings, stop).run()
