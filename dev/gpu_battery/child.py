"""One part of the battery in a process of its own: `python -m dev.gpu_battery.child JOB`, JOB a Job as JSON.

Exits with 0 when every measurement worked. On STACK_SIGNAL it writes where it is to standard error.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from dev.gpu_battery.job import STACK_SIGNAL, Job, read_records

ORPHAN_SECONDS = 30  # after it: the process ends itself where nobody is left to end it


def run_job(job: Job) -> int:
    """Run the part; returns 1 when it or one of its measurements failed."""
    module, _, function = job.function.partition(":")
    try:
        getattr(importlib.import_module(module), function)(job)
    except Exception as error:
        traceback.print_exc()
        job.fault("part", f"{type(error).__name__}: {error}".strip())
    return 1 if read_records(Path(job.records)).errors else 0


def main() -> None:
    """Run the job that the command line holds."""
    job = Job(**json.loads(sys.argv[1]))
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=False)  # stacks of others, as they change, can crash it
    signal.alarm(max(int(job.seconds_left()), 0) + ORPHAN_SECONDS)
    status = run_job(job)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: what a broken device does at a normal exit is not to hide the results


if __name__ == "__main__":
    main()
