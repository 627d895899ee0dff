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


def made_up_report(card: str = "NVIDIA H100 80GB HBM3", started: str = "2026-12-01 10:00:00") -> dict:
    """Return what a battery on a GPU might have found; every number is made up."""
    found = {
        "machine": {"versions": {"torch": "2.11.0", "triton": "3.6.0"}},
        "step_1061_low": {"micro_step": {"ms": 90.0}, "update": {"ms": 6.0}},
        "step_1061_full": {
            "micro_batch": {"ms": 125.0, "mfu": 0.25, "peak_gib": 41.2},
            "micro_step": {"ms": 130.0},
            "update": {"ms": 10.0},
        },
        "step_naive": {"loop": {"ms": 400.0, "mfu": 0.2, "peak_gib": 9.8}, "bubble": {"ms": 5.5}},
        "backends": {"auto_plain": {"takes": "fa3"}, "auto_documents": {"takes": "varlen"}},
        "scoring": {
            "chunked": {"tokens_per_second": 900_000.0},
            "lora_first": {"tokens_per_second": 10.0},
            "lora_300": {"tokens_per_second": 10_000.0},
            "lora_1000": {"tokens_per_second": 15_000.0},
            "sgd": {"out_of_memory": "words"},
        },
        "calibration": {"batch": {"out_of_memory": "words"}, "batch_1_2": {"seconds": 2.5}},
        "contest_1061": {"full": {"step_ms": 1000.0}},
        "contest_naive": {},
    }
    parts = {name: {"status": "ok", "measures": "x", "results": results} for name, results in found.items()}
    parts["contest_naive"]["status"] = "failed"
    return {
        "format": 1, "started": started, "rehearsal": False, "commit": "abc123", "python": "3.12.0",
        "card": f"{card}, 81559 MiB, 580.1", "limit_s": 480, "seconds": 400.0, "parts": parts,
    }  # fmt: skip
