"""The tests that need a GPU, in a pytest process of their own."""

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import ROOT

MARK = "mark.gpu"
VERDICT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
GOOD = ("PASSED", "SKIPPED", "XFAIL")
TAIL_CHARS = 3500
OPTIONS = ("-v", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors")


def run(job: Job) -> None:
    """Run them and keep the verdicts; a test that is not good is a fault."""
    log = Path(job.work) / "gpu_tests.txt"
    found = job.measure("pytest", lambda: run_pytest(job, log))
    if found and (found["bad"] or found["ended"] not in ("with status 0", "with status 5")):  # 5: no tests
        print(log.read_text(errors="replace")[-TAIL_CHARS:], file=sys.stderr)
        job.fault("pytest", f"ended {found['ended']}; bad: {', '.join(found['bad']) or 'none'}")


def run_pytest(job: Job, log: Path) -> dict:
    """Run pytest on the files that have such tests; others may need packages that a bare machine lacks."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *OPTIONS, *map(str, files)]
    limit, ended = job.seconds_for_child(), ""
    with open(log, "wb") as file, suppress(subprocess.TimeoutExpired):
        outputs = {"stdout": file, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=ROOT, timeout=limit, check=False, **outputs)
        ended = f"with status {done.returncode}"
    ended = ended or f"by the clock after {limit:.0f} s"
    return {"files": len(files), "ended": ended} | sum_up(log.read_text(errors="replace"))


def sum_up(output: str) -> dict:
    """Count the verdicts of pytest's lines and name the tests that are not good."""
    verdicts = dict(VERDICT.findall(output))
    counts = {word.lower(): list(verdicts.values()).count(word) for word in ("PASSED", "SKIPPED")}
    return counts | {"bad": [name for name, word in verdicts.items() if word not in GOOD]}
