"""Run a program as the child of a desk command: it ends when the command is gone, however that ended.

    python dev/desk/child.py PARENT CORES FILE.py ARGUMENT...
    python dev/desk/child.py PARENT CORES -m MODULE ARGUMENT...

PARENT is the command's process id; CORES are numbers with commas between, or "all". Imports nothing of the
project, because FILE may be another checkout's. Linux sends the signal when the thread that started this
process ends: start it from one that lasts.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # prctl of Linux
LOOK_EVERY_S = 2.0  # elsewhere


def end_with(parent: int) -> None:
    """Let this process have SIGTERM when its parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it went in the meantime
        os.kill(os.getpid(), signal.SIGTERM)


def watch(parent: int) -> None:
    """End this process once its parent is another one: an orphan is adopted."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Become the program."""
    parent, cores, *words = sys.argv[1:]
    end_with(int(parent))
    if cores != "all":
        os.sched_setaffinity(0, map(int, cores.split(",")))
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
