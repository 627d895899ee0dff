"""What native Windows lacks is blocked here: programs must start without it. Nothing has run on Windows."""

import json

from fixtures_model import run_python

# Modules and functions of POSIX systems alone. Python and torch are loaded first: on Windows they are others.
WITHOUT_POSIX = """
import importlib, multiprocessing, os, signal, subprocess, sys, tempfile
import torch, torch.distributed, numpy
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"):
    sys.modules[name] = None
for name in ("fork", "getloadavg", "sysconf", "uname", "getuid", "geteuid", "sched_getaffinity", "mkfifo",
             "setsid", "killpg", "O_NOFOLLOW", "O_DIRECTORY", "wait4", "fchmod", "nice", "getpgid"):
    vars(os).pop(name, None)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "alarm", "pthread_kill"):
    vars(signal).pop(name, None)
"""
ENTRIES = (
    "train_gpt",
    "eval.__main__",
    "data.prepare",
    "data.download",
    "data.builtin",
    "data.doctor",
    "data.tokenizer",
    "pack.__main__",
    "dev.machine",
    "dev.record",
    "dev.bench",
)


def run_without_posix(code: str):
    """Run Python code in a process that has nothing of POSIX alone."""
    return run_python("-c", WITHOUT_POSIX + code)


def test_programs_load_without_posix():
    """An import that only Linux has stops a program before it can say anything."""
    done = run_without_posix(f"for name in {ENTRIES}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_a_recipe_is_described_without_posix():
    """The first command that somebody tries."""
    done = run_without_posix("import train_gpt; train_gpt.main(['--describe', '--json'])")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_params"] > 10**7


def test_the_machine_report_is_made_without_posix():
    """What an issue report should contain; what the system does not say is left out or 0."""
    done = run_without_posix("from dev import machine; machine.main(['--json'])")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs_on"] == "cpu"
