"""Signals that end a run: noted while a step is in work, at once elsewhere; a watchdog for what is blocked.

While training `defers`, a signal is a note that the clock's next reading passes to all ranks, so that they
can save the last whole step together. Elsewhere it raises Stopped where the program stands. A signal's
handler runs between two instructions of Python, so a process that waits in a library for a peer, or computes
there for long, never reaches it: the watchdog, a thread, ends it. So it does with a process whose launcher is
gone.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
DAMAGED = 1 << 10  # a reason to stop beside the numbers of signals: training data are not what they should be
REPEAT_SECONDS = 3.0  # a signal again within them is the same: a terminal and a launcher both send it
GRACE_SECONDS = 25.0  # to react in under torchrun, which kills after 30
LONE_GRACE_SECONDS = 55.0  # elsewhere: a micro-batch of a large model on a CPU may take as long
SAVE_SECONDS = 300.0  # to save in, where nobody kills
POLL_SECONDS = 1.0


class Stopped(SystemExit):
    """The end of the process by a signal, with the exit status that shells give it."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class Stops:
    """Why this process is to stop, and what to say of it; inert until `install`."""

    def __init__(self):
        self.signum = 0  # noted, 0 for none
        self.noted_at = 0.0  # time.monotonic(), 0 for not
        self.grace = LONE_GRACE_SECONDS
        self.defers = False  # whether a signal is a note only
        self.deadline = float("inf")  # of the watchdog, time.monotonic()
        self.fault = lambda: ""  # what is wrong with the training data, "" for nothing
        self.kept = ""  # sentence: what a stop here and now leaves
        self.is_silent = False  # another rank speaks

    def reason(self) -> int:
        """Return a signal's number, DAMAGED, or 0."""
        return self.signum or DAMAGED * bool(self.fault())

    def install(self, is_launched: bool) -> None:
        """Take the signals that nobody has chosen to ignore (nohup does), and start the watchdog.

        `is_launched`: torchrun is the parent; without it nobody would end this process.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.note)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        launcher = os.getppid() if is_launched else 0
        self.grace = GRACE_SECONDS if is_launched else LONE_GRACE_SECONDS
        threading.Thread(target=self.watch, args=(ours, theirs, launcher), daemon=True).start()

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if not self.noted_at:
            self.signum, self.noted_at = signum, now
        if not self.defers or now - self.noted_at > REPEAT_SECONDS:
            raise Stopped(self.signum)

    def reached(self) -> None:
        """Say that the process has reacted and saves: the watchdog waits longer."""
        self.deadline = time.monotonic() + SAVE_SECONDS

    def said(self) -> str:
        """Return the line that tells of the stop."""
        return f"stopped: {signal.Signals(self.signum).name}. {self.kept}"

    def watch(self, ours: socket.socket, theirs: socket.socket, launcher: int) -> None:
        """Run the watchdog; `theirs`, where the interpreter writes signals, is only kept open."""
        while True:
            if select.select([ours], [], [], POLL_SECONDS)[0]:
                numbers = [signum for signum in ours.recv(64) if signum in SIGNALS]
                if numbers and self.deadline == float("inf"):
                    self.deadline, self.signum = time.monotonic() + self.grace, self.signum or numbers[0]
            if launcher and os.getppid() != launcher:
                launcher = 0
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > self.deadline:
                line = f"{self.said()} The process did not react and was ended.\n"
                with suppress(OSError):  # its reader may be gone
                    os.write(sys.__stderr__.fileno(), b"" if self.is_silent else line.encode())
                os._exit(128 + self.signum)
