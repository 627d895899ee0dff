"""Search settings of a recipe with Optuna: one worker, several on this machine, or several machines.

    python -m dev.sweep SPEC.toml                        # on the whole machine, one training at a time
    python -m dev.sweep SPEC.toml --workers 2            # each on its share of cores or GPUs
    python -m dev.sweep SPEC.toml --results              # what has been found so far
    python -m dev.sweep SPEC.toml --dry-run              # check the spec, print the first trainings' commands

The sweep lies in runs/sweeps/NAME: journal.log is Optuna's study, runs/ has a folder a training. The same
command goes on after a stop, joins a sweep that runs (on another machine by --storage FOLDER on a shared disk,
or the URL of a database), and trains nothing twice. Trials of killed workers are tried again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import CommandParser, UserError, at_least_one, run_command
from dev.desk.child import end_with
from dev.desk.training import split_machine
from dev.sweep.board import Board
from dev.sweep.results import collect, format_results, write_results
from dev.sweep.spec import Spec, count_refused, read_spec, spell
from dev.sweep.worker import Crew, train_watched, work
from durable.stops import Stopped

FOLDER = Path("runs/sweeps")
DRY_TRIALS = 3
END_S = 90.0  # a worker may take to stop its training
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def tell(text: str, label: str = "") -> None:
    """Say a line; standard output is for the results."""
    print(f"{label}{text}", file=sys.stderr, flush=True)


def stop(signum: int, frame) -> None:
    """Handle a signal: end where the program stands, which gives up the trial in work."""
    raise Stopped(signum)
