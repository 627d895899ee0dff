"""The other ranks of a run: who they are, whether they live, and which of them says what went wrong.

Ranks tell each other through the store of their launcher (set, get, check), which works while collectives do
not. Every rank beats: a thread counts up a key. Who does not beat is gone or stopped, whatever its
connections say; who beats is alive, however long it computes.
"""

import atexit
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Protocol

from common import UserError

BEAT_S = 1.0
ANSWER_S = 5.0  # in which a living rank beats, be its interpreter ever so busy
SPEAK_S = 2.0  # that a rank waits for a lower one with an error of its own
MEET_S = 3600.0  # that ranks wait for one that works alone
OWN, LOST = "own", "lost"  # kinds of error: a rank's own, and that it cannot reach the others
# The trainer's functions that a stack shows, in words.
PHASES = {
    "warm_up": "warming up",
    "train": "training",
    "store_model": "calibrating and quantizing",
    "score_model": "scoring",
}


class Store(Protocol):
    """What is needed of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


# What torchrun tells its processes in whole numbers, and the least of each.
LAUNCH_NUMBERS = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 1,
    "TORCHELASTIC_RESTART_COUNT": 0,
}
MEETING_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_MEET_S, PATIENCE_S = 600.0, 5.0  # that ranks wait for each other at first, and without a word


class PeerError(RuntimeError):
    """Another rank did not come to where all meet, or ended."""


def check_launch(environ: Mapping[str, str]) -> None:
    """Raise where a launcher's variables make no sense: nobody should wait for ranks that do not exist."""
    for name, least in LAUNCH_NUMBERS.items():
        text = environ.get(name, str(least))
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise launch_error(f"{name}={text!s:.40}", f"a whole number from {least} on")
    numbers = {name: int(environ[name]) for name in LAUNCH_NUMBERS if name in environ}
    world_size, port = numbers.get("WORLD_SIZE", 1), numbers.get("MASTER_PORT", 1)
    if numbers.get("RANK", 0) >= world_size:
        raise launch_error(f"RANK={numbers['RANK']}", f"a rank below WORLD_SIZE={world_size}")
    local_size = numbers.get("LOCAL_WORLD_SIZE")
    if local_size and numbers.get("LOCAL_RANK", 0) >= local_size:
        raise launch_error(
            f"LOCAL_RANK={numbers['LOCAL_RANK']}", f"a rank below LOCAL_WORLD_SIZE={local_size}"
        )
    if port > 65_535:
        raise launch_error(f"MASTER_PORT={port}", "a port up to 65535")
    signs = [
        name
        for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        if environ.get(name, "0") != "0"
    ]
    signs += ["WORLD_SIZE"] if world_size > 1 else []
    missing = [name for name in MEETING_PLACE if not environ.get(name)]
    if signs and missing:
        raise launch_error(
            f"{signs[-1]}={environ[signs[-1]]:.40} alone", f"{' and '.join(missing)} beside it"
        )


def launch_error(found: str, expected: str) -> UserError:
    """Say what of the launcher's variables makes no sense."""
    return UserError(
        f"environment: {found}: expected {expected}, as torchrun sets it. Start with `torchrun --standalone "
        "--nproc_per_node=N train_gpt.py`, or for one process `unset RANK WORLD_SIZE LOCAL_RANK "
        "LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT`."
    )


@contextmanager
def waiting_told(what: str):
    """Say what this process waits for when it takes long."""
    timer = threading.Timer(PATIENCE_S, print, (f"waiting for {what}",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Peers:
    """This process among the ranks of a run; errors of the store are raised as it raises them."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.num_meetings = 0
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def tell(self, topic: str, text: str) -> None:
        """Leave a text for the others."""
        self.store.set(f"{topic}/{self.rank}", text)

    def told(self, topic: str, ranks: Iterable[int] | None = None) -> dict[int, str]:
        """Return what ranks (default: all) have told about a topic so far."""
        keys = {rank: f"{topic}/{rank}" for rank in ranks or range(self.world_size)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def names(self, ranks: Iterable[int]) -> str:
        """Name ranks and their places, as in "rank 1 (host:node7 device:cuda:1)"."""
        places = self.told("place")
        return " and ".join(f"rank {rank} ({places.get(rank, 'it never answered')})" for rank in ranks)

    def meet(self, limit_s: float = MEET_S) -> None:
        """Wait until all ranks are here. Raises a PeerError after limit_s, or when one ended by an error."""
        topic, pause_s = f"meeting{self.num_meetings}", 0.001
        self.num_meetings += 1
        self.tell(topic, "here")
        ends_at = time.monotonic() + limit_s
        while not self.store.check([f"{topic}/{rank}" for rank in range(self.world_size)]):
            if time.monotonic() > ends_at:
                late = sorted(set(range(self.world_size)) - set(self.told(topic)))
                raise PeerError(f"waited {limit_s:.0f} s for {self.names(late)}")
            if OWN in self.told("error").values():
                raise PeerError("another rank ended with an error of its own")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.1)

    def missing(self, answer_s: float = ANSWER_S) -> list[int]:
        """Return the ranks that do not beat while this one waits so many seconds."""
        before = self.told("beat")
        time.sleep(answer_s)
        return self._silent_since(before)

    def _silent_since(self, before: dict[int, str]) -> list[int]:
        after = self.told("beat")
        others = set(range(self.world_size)) - {self.rank}
        return sorted(rank for rank in others if before.get(rank) == after.get(rank))

    def start(self, silence_s: float) -> None:
        """Begin to beat, and to watch the next rank: its silence for so long ends this process."""
        args = (int(silence_s / BEAT_S), threading.get_ident())
        self.thread = threading.Thread(target=self._beat, args=args, name="peers", daemon=True)
        self.thread.start()
        atexit.register(self.stop)  # a thread in the store while the interpreter ends would abort it

    def stop(self) -> None:
        """End the thread."""
        self.stopping.set()
        if self.thread and self.thread is not threading.current_thread():
            self.thread.join(ANSWER_S)

    def _beat(self, max_silent: int, watched: int) -> None:
        """Beat and watch the next rank. Its silence is counted in own beats: who was stopped saw nothing.

        watched is the thread whose phase is told.
        """
        following = (self.rank + 1) % self.world_size
        last, num_silent, before = {}, 0, {}
        with suppress(RuntimeError):  # the store is gone with its launcher
            for beat in itertools.count():
                self.tell("beat", str(beat))
                heard = self.told("beat", [following])
                num_silent = num_silent + 1 if heard and heard == last else 0
                last = heard
                if num_silent == 1:
                    before = self.told("beat")
                if num_silent > max_silent:
                    self._end_without(self._silent_since(before), sys._current_frames()[watched])
                if self.stopping.wait(BEAT_S):
                    return

    def _end_without(self, missing: list[int], frame: FrameType) -> NoReturn:
        """End the process; of the ranks that watch a missing one, that of the lowest says so."""
        phase = phase_of(found.f_code.co_name for found, _ in traceback.walk_stack(frame))
        if missing[0] == (self.rank + 1) % self.world_size:
            error = PeerError("timed out")
            print(f"error: {message(error, LOST, self.names(missing), phase)}", file=sys.stderr)
        else:
            time.sleep(SPEAK_S)  # a launcher ends all ranks with the first
        leave()


def phase_of(functions: Iterable[str]) -> str:
    """Say what a rank was doing, from the functions on its stack."""
    return next((PHASES[name] for name in functions if name in PHASES), "setting up")


def message(error: Exception, kind: str, names: str, phase: str) -> str:
    """Say what went wrong; names are those of the missing, or of this rank where the error is its own.

    Bugs keep their traceback.
    """
    go_on = "a training run goes on from its last checkpoint with --resume."
    if kind == LOST and not names:
        return f"all ranks live, yet one could not reach another ({phase}): {error}. Start again; {go_on}"
    if kind == LOST:
        how = "it was silent for too long" if "timed out" in str(error).lower() else "its connection broke"
        return f"{names} no longer answers ({phase}; {how}). Its last lines may say why; {go_on}"
    is_bug = not isinstance(error, UserError) and not getattr(error, "filename", None)  # of an OSError
    said = "".join(traceback.format_exception(error)) if is_bug else str(error)
    return f"{names} ({phase}): {said}"


def speaks(reports: dict[int, str], rank: int) -> bool:
    """Whether a rank says its error: the lowest of those with one of their own, else the lowest of all."""
    own = [other for other, kind in reports.items() if kind == OWN]
    return rank == min(own or reports)


def end_explained(error: Exception, kind: str, rank: int, join: Callable[[], Peers]) -> NoReturn:
    """End this rank with status 1; the one of all ranks that knows best says why, once.

    Where join raises a RuntimeError or a ValueError, the launcher is gone and each rank speaks for itself.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one rank is gone
    speaking, names = True, f"rank {rank}" if kind == OWN else "the launcher on the host of rank 0"
    with suppress(RuntimeError, ValueError):
        peers = join()
        peers.tell("error", kind)
        if speaks(peers.told("error"), rank):
            silent = peers.missing(ANSWER_S if kind == LOST else SPEAK_S)
            names = peers.names([rank] if kind == OWN else silent)
        speaking = speaks(peers.told("error"), rank)
    if speaking:
        phase = phase_of(frame.name for frame in traceback.extract_tb(error.__traceback__))
        print(f"error: {message(error, kind, names, phase)}", file=sys.stderr)
    leave()


def leave() -> NoReturn:
    """End the process as it is: threads of a broken process group would abort an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
