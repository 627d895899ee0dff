"""Processes of a case: started with a mark, read as they write, found by the mark, judged by their output."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dev.soak.child import PLACE_VARIABLE, Fault

ROOT = Path(__file__).resolve().parent.parent.parent
MARK_VARIABLE = "SOAK_MARK"
TIMEOUT_SECONDS = 60  # of silence: more is a hang
MOST_SECONDS = 300  # of one process, however much it says
GRACE_SECONDS = 10  # in which what a process started has to end after it
POLL_SECONDS = 0.02
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
TRACEBACK = re.compile(
    r"^(?:\[rank\d+\]:)? *Traceback \(most recent call last\):\n(?:(?:\[rank\d+\]:)?[ \t]+.*\n|\n)*.*",
    re.MULTILINE,
)
LAUNCHER = ("torch.distributed.elastic", "torch/distributed/elastic", "torch/distributed/run.py")


class Miss(Exception):
    """Something that must hold did not; the text is the sentence of the report."""


def make_environment(mark: str, faults: Sequence[Fault], temporary: Path) -> dict[str, str]:
    """Return a child's environment: nothing of the contest's names, one thread, its mark and its faults."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    own = {MARK_VARIABLE: mark, PLACE_VARIABLE: json.dumps(faults), "TMPDIR": str(temporary)}
    return kept | own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


class Job:
    """A process of its own group and the lines that it has written so far."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.lines: list[str] = []
        self.started = self.heard = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collect the lines."""
        for line in self.process.stdout:
            self.lines.append(line)
            self.heard = time.monotonic()

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self.lines)

    def wait_for(self, words: str, count: int = 1) -> str:
        """Wait for the count-th line with the words; returns it, or "" where the process ended before."""
        while True:
            ended = self.process.poll() is not None
            if ended:
                self.reader.join(timeout=1)
            found = [line for line in self.lines if words in line]
            if len(found) >= count:
                return found[count - 1]
            if ended:
                return ""
            self.check_time(f"waiting for {words!r}")
            time.sleep(POLL_SECONDS)

    def check_time(self, what: str) -> None:
        """Raise when the process has been silent for too long, or has had its time."""
        now = time.monotonic()
        if now - self.heard > TIMEOUT_SECONDS or now - self.started > MOST_SECONDS:
            raise Miss(f"hung: {now - self.started:.0f} s {what}; its last line: {self.last_line()}")

    def last_line(self) -> str:
        """What it wrote last."""
        return next((line.strip() for line in reversed(self.lines) if line.strip("=- \n")), "none")

    def why(self) -> str:
        """Return the sentence that it ended with, or what it wrote last."""
        errors = [line.strip() for line in self.lines if line.startswith("error: ")]
        return errors[0] if errors else self.last_line()

    def end(self) -> int:
        """Wait for the end; returns the status, -n for signal n."""
        while self.process.poll() is None:
            self.check_time("to its end")
            time.sleep(POLL_SECONDS)
        self.reader.join(timeout=1)  # it may go on where children hold the pipe
        return self.process.returncode

    def send(self, number: int, pid: int = 0) -> None:
        """Send a signal to the process, or to another one of it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid or self.process.pid, number)


def python(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def launcher(ranks: int, restarts: int) -> list[str]:
    """The command that starts so many ranks of a module."""
    options = ["--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", "-m"]
    return python("-m", "torch.distributed.run", *options)


def marked(mark: str) -> dict[int, str]:
    """Find the living processes that carry a mark: {pid: command}; none where there is no /proc."""
    found = {}
    word = f"{MARK_VARIABLE}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state not in "ZX":
            found[int(folder.name)] = command.strip()
    return found


def wait_until_gone(mark: str, seconds: float) -> dict[int, str]:
    """Wait for the end of all marked processes; returns those that are left."""
    end = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(5 * POLL_SECONDS)
    return left


def kill_marked(mark: str, jobs: Sequence[Job]) -> None:
    """End whatever a case has left."""
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def split_tracebacks(text: str) -> tuple[list[str], int]:
    """Return the last lines of our tracebacks, and how many the launcher printed of its own."""
    own, walls = [], 0
    for block in TRACEBACK.findall(text):
        if any(word in block for word in LAUNCHER):
            walls += 1
        else:
            own.append(block.strip().splitlines()[-1])
    return own, walls
