"""The tests that need a GPU, in a pytest process of their own."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import ROOT

MARK = "mark.gpu"
MARGIN_SECONDS = 5.0  # before this part's own limit
MOST_NAMED = 20


def run(job: Job) -> None:
    """Run them and keep the counts; a failed test is a fault."""
    report = Path(job.work) / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    found = job.measure("pytest", lambda: run_pytest(job, report))
    if found and found["failed"]:
        job.fault("failed_tests", ", ".join(found["failed"]))


def run_pytest(job: Job, report: Path) -> dict:
    """Run pytest on the files that have such tests; others may need packages that a bare machine lacks."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--no-header"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}"]
    limit = max(job.seconds_left() - MARGIN_SECONDS, 1.0)
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, errors="replace",
        timeout=limit, check=False,
    )  # fmt: skip
    if not report.is_file():
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"pytest ended with status {done.returncode} and no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    if bad:
        print(done.stdout[-4000:], file=sys.stderr)
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}.{case.get('name')}" for case in bad][:MOST_NAMED]
    return {
        "files": len(files),
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": names,
    }
