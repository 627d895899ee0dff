"""Parts that misbehave: the driver of the GPU battery runs each in a process of its own, by name."""

import os
import signal
import subprocess
import sys
import time

from dev.gpu_battery.job import Job

NUMBERS = {"ms": 1.5}


def works(job: Job) -> None:
    job.measure("speed", lambda: NUMBERS)


def takes_a_second(job: Job) -> None:
    time.sleep(1)
    job.record("done", 1)


def raises(job: Job) -> None:
    job.record("before", 1)
    raise RuntimeError("broken part")


def fails_in_one_measurement(job: Job) -> None:
    job.measure("bad", lambda: 1 / 0)
    job.measure("good", lambda: NUMBERS)


def hangs(job: Job) -> None:
    job.record("before", 1)
    job.measure("endless", lambda: time.sleep(600))


def ignores_signals(job: Job) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    job.record("pid", os.getpid())
    time.sleep(600)


def is_killed(job: Job) -> None:
    job.record("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def writes_half_a_line(job: Job) -> None:
    job.record("before", 1)
    with open(job.records, "a") as file:
        file.write('{"name": "half", "val')
    os.kill(os.getpid(), signal.SIGKILL)


def prints_garbage(job: Job) -> None:
    garbage = bytes(range(256)) * 1000
    os.write(1, garbage)
    os.write(2, garbage)
    with open(job.records, "ab") as file:
        file.write(garbage + b'\n[1, 2]\n{"name": 5}\n{"name": "nan", "value": NaN}\n"\\ud800"\n')
    job.record("odd", {"inf": float("inf"), "text": "\ud800", ("a", 1): [object]})


def leaves_a_child(job: Job) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job.record("pid", child.pid)


def exits(job: Job) -> None:
    sys.exit(3)
