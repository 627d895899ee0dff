"""A program of this project with faults on order: `python -m dev.soak.child train|prepare|builtin ARGUMENTS`.

SOAK_FAULTS holds rows of Fault as JSON. The process passes points, which have names: "file:manifest.json"
before a file is written, "fsync" and "replace" before those calls, "line:TEXT" before a line goes to a run's
log, "after:TEXT" after it. At the count-th passing of its point a fault acts. So a kill falls into a write,
and a signal into a phase that takes a millisecond, on any machine. A stand-in replaces the packed program.
"""

import builtins
import contextlib
import errno
import fnmatch
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import common

PLACE_VARIABLE = "SOAK_FAULTS"
STALL_LINE = "soak: stalls"  # what a waiting process prints: "soak: stalls pid:123 rank:0 at:POINT"
DEATH_LINE = "soak: dies"
STAND_IN = b"# A stand-in for the packed program.\n"
SLICE_SECONDS = 0.05  # of a stall
BLOCK = 4096


class Fault(NamedTuple):
    """What happens to a process at a point."""

    point: str  # a pattern, as "line:scoring*"
    action: str  # a key of ACTIONS
    count: int = 1  # at which passing
    rank: int = -1  # of torchrun; -1: every one
    restart: int = -1  # how often torchrun has started it again; -1: whatever
    value: float = 0.0  # seconds to stall, bytes to leave free
    folder: str = ""  # on the disk that gets full


def tell(line: str) -> None:
    """Print a line for the process that watches."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def kill_self(fault: Fault, descriptor: int | None) -> None:
    """Die at once."""
    tell(f"{DEATH_LINE} at:{fault.point}")
    os.kill(os.getpid(), signal.SIGKILL)


def tear(fault: Fault, descriptor: int | None) -> None:
    """Die with the file that is being written cut in half, as a machine without power may leave it."""
    if descriptor is not None:
        with contextlib.suppress(OSError):  # a folder
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    kill_self(fault, descriptor)


def kill_parent(fault: Fault, descriptor: int | None) -> None:
    """Kill the launcher and go on."""
    os.kill(os.getppid(), signal.SIGKILL)


def stall(fault: Fault, descriptor: int | None) -> None:
    """Say where this is, then stay there; a handler that raises ends it."""
    rank = read_place()[1]
    tell(f"{STALL_LINE} pid:{os.getpid()} rank:{rank} at:{fault.point}")
    end = time.monotonic() + fault.value
    while time.monotonic() < end:
        time.sleep(SLICE_SECONDS)


def fill(fault: Fault, descriptor: int | None) -> None:
    """Fill the disk of a folder, but for so many bytes."""
    filler = Path(fault.folder) / "filler"
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * BLOCK)
        except OSError:
            left = max(file.tell() - int(fault.value), 0)
        os.ftruncate(file.fileno(), left)


def refuse(fault: Fault, descriptor: int | None) -> None:
    """Let every later write of this process fail as on a full disk."""

    def no_space(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_file(file, mode="r", *arguments, **settings):
        if not isinstance(file, int) and set(mode) & set("wax+") and str(file).startswith(fault.folder):
            no_space()
        return real_open(file, mode, *arguments, **settings)

    real_open = io.open
    builtins.open = io.open = open_file
    os.write = os.fsync = no_space


ACTIONS = {
    "kill": kill_self,
    "tear": tear,
    "kill-parent": kill_parent,
    "stall": stall,
    "fill": fill,
    "refuse": refuse,
}


def read_place() -> tuple[list[Fault], int, int]:
    """Return the faults on order, this process's rank and how often torchrun has started it again."""
    rows = json.loads(os.environ.get(PLACE_VARIABLE, "[]"))
    rank, restart = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    return [Fault(*row) for row in rows], rank, restart


class Points:
    """Counts the points that a process passes."""

    def __init__(self):
        faults, rank, restart = read_place()
        self.faults = [one for one in faults if one.rank in (-1, rank) and one.restart in (-1, restart)]
        self.passed: Counter = Counter()

    def reach(self, point: str, descriptor: int | None = None) -> None:
        """Act where a fault waits for this point."""
        for index, fault in enumerate(self.faults):
            if fnmatch.fnmatchcase(point, fault.point):
                self.passed[index] += 1
                if self.passed[index] == fault.count:
                    ACTIONS[fault.action](fault, descriptor)

    def watch_files(self) -> None:
        """Put points before the calls that make a file whole; before other modules import them."""
        fsync, replace, atomic_file = os.fsync, os.replace, common.atomic_file

        def watched_fsync(descriptor):
            self.reach("fsync", descriptor)
            return fsync(descriptor)

        def watched_replace(*names, **settings):
            self.reach("replace")
            return replace(*names, **settings)

        def watched_file(path, *arguments, **settings):
            self.reach(f"file:{Path(path).name}")
            return atomic_file(path, *arguments, **settings)

        os.fsync, os.replace, common.atomic_file = watched_fsync, watched_replace, watched_file

    def watch_log(self, log: type) -> None:
        """Put points around the lines of a run's log."""
        write = log.line

        def line(this, text, *arguments, **settings):
            self.reach(f"line:{text}")
            write(this, text, *arguments, **settings)
            self.reach(f"after:{text}")

        log.line = line


def leave_stand_in(folder: Path) -> tuple[int, str]:
    """Write a program of a line where a run leaves its packed source."""
    (folder / "train_gpt.py").write_bytes(STAND_IN)
    return len(STAND_IN), ""


def run_train(points: Points) -> None:
    """Run train_gpt.py with the arguments that are left."""
    import train_gpt

    points.watch_log(train_gpt.Log)
    train_gpt.weigh_code = leave_stand_in
    train_gpt.main()


def run_prepare(points: Points) -> None:
    """Run data.prepare with the arguments that are left."""
    from data import prepare

    prepare.main()


def run_builtin(points: Points) -> None:
    """Make the built-in corpus of a part of the standard library, in the folder of the first argument."""
    from data import builtin

    def few_modules() -> list:
        return builtin.find_standard_library()[:60]

    builtin.build(sys.argv[1], 400, few_modules)


PROGRAMS = {"train": run_train, "prepare": run_prepare, "builtin": run_builtin}


def main() -> None:
    """Run the program that the first argument names."""
    points = Points()
    points.watch_files()
    program = PROGRAMS[sys.argv.pop(1)]
    program(points)


if __name__ == "__main__":
    common.run_command(main)
