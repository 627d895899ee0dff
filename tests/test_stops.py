"""Signals as notes and as exceptions; the watchdog of processes that are blocked or orphaned."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fixtures_model import ROOT, ends_soon

from durable import stops as stops_module
from durable.stops import DAMAGED, SIGNALS, Stopped, Stops

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals between processes are POSIX's")
BLOCKED = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in one call of a library


def start(code: str, is_launched: bool = False) -> subprocess.Popen:
    """Start a process with signals and watchdog installed that then runs `code`; wait until it is ready."""
    lines = [
        "import signal, sys, time",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # a background job ignores it
        "from durable import stops as module",
        "module.GRACE_SECONDS = module.LONE_GRACE_SECONDS = 1.0",
        "stops = module.Stops()",
        f"stops.install({is_launched})",
        "stops.kept = 'step7 is kept.'",
        "print('ready', flush=True)",
        code,
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_raises_where_nothing_is_deferred():
    """With the status that shells give."""
    with pytest.raises(Stopped) as stopped:
        Stops().note(signal.SIGTERM, None)
    assert stopped.value.code == 128 + signal.SIGTERM and isinstance(stopped.value, SystemExit)


def test_a_deferred_signal_is_a_note_and_an_insisting_one_is_not(monkeypatch):
    """Terminal and launcher both send one; who sends another seconds later means it."""
    stops, now = Stops(), 50.0
    monkeypatch.setattr(stops_module.time, "monotonic", lambda: now)
    stops.defers = True
    stops.note(signal.SIGINT, None)
    now += 1.0
    stops.note(signal.SIGTERM, None)
    assert stops.reason() == signal.SIGINT and "SIGINT" in stops.said()
    now += 5.0
    with pytest.raises(Stopped):
        stops.note(signal.SIGINT, None)


def test_damaged_data_are_a_reason_that_a_signal_does_not_hide():
    """Ranks agree on the largest reason."""
    stops = Stops()
    assert stops.reason() == 0
    stops.fault = lambda: "shard 3 is damaged"
    assert stops.reason() == DAMAGED > max(SIGNALS)


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_process_ends_by_each_signal_with_its_status(signum):
    """Without a traceback."""
    process = start("time.sleep(60)")
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signum and errors == ""


@pytest.mark.slow
def test_a_blocked_process_is_ended_and_says_so():
    """A peer that is gone, or minutes inside a library: handlers of Python never run there."""
    process = start(BLOCKED)
    time.sleep(1.0)  # it is inside by then
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "stopped: SIGTERM. step7 is kept. The process did not react and was ended.\n"


@pytest.mark.slow
def test_a_process_that_saves_is_given_time():
    """`reached` says that it reacted."""
    wait = "while not stops.signum: time.sleep(0.01)"
    process = start(f"stops.defers = True\n{wait}\nstops.reached(); time.sleep(4); sys.exit(5)")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 5


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored():
    """nohup and background jobs of shells choose that before."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("time.sleep(3); sys.exit(5)")
    finally:
        signal.signal(signal.SIGHUP, old)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 5


@pytest.mark.slow
@pytest.mark.parametrize("code", ["time.sleep(60)", BLOCKED])
def test_a_process_whose_launcher_was_killed_ends(code, tmp_path):
    """Nobody else would end it: torchrun killed with -9 leaves its workers."""
    program = (
        f"import os, time; from durable import stops as module; module.GRACE_SECONDS = 1.0\n"
        f"stops = module.Stops(); stops.install(True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{code}"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    assert ends_soon(worker), "the worker lived on for ten seconds"
