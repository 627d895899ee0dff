"""One writer a folder: `lock_folder`.

The lock is the system's, on FOLDER/.lock: it ends with the process, however that ends. Who holds it is
written beside it, in .lock.json, because a process that asks for a lock may empty the lock's own file.
.lock stays when the lock is released: a process that waits for it may have it open, and would then lock a
file that has no name any more while a third makes and locks a new one. It is empty and belongs in no record.
"""

import atexit
import errno
import os
import shlex
import socket
import sys
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from common import UserError, read_json, write_json

LOCK_NAME, HOLDER_NAME = ".lock", ".lock.json"
MOMENT_S = 0.5  # a holder has written its name by then, and one that was about to end has ended
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
COMMAND_CHARS = 300  # of a command line, in messages


class FolderLock:
    """A folder that is locked until `release`, the end of a `with` block or the end of the process."""

    def __init__(self, folder: Path, lock: FileLock):
        self.folder, self.lock, self.process = folder, lock, os.getpid()
        atexit.register(self.release)  # which also keeps this object, and so the lock, until then

    def release(self) -> None:
        """Let the next one in; calling it again does nothing, nor does a forked child."""
        if os.getpid() == self.process and self.lock.is_locked:
            try:
                (self.folder / HOLDER_NAME).unlink(missing_ok=True)
            finally:
                self.lock.release()
        atexit.unregister(self.release)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def lock_folder(folder: str | Path, wait_s: float = 0.0) -> FolderLock:
    """Lock a folder, which is made if need be, and remove what killed writers of whole files left in it.

    Raises a UserError that names the holder where another process holds the lock for wait_s more seconds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, thread_local=False)  # any thread may release it
    if not acquire(lock, MOMENT_S):
        in_use = f"{folder}: in use by {name_holder(folder)}."
        if wait_s:
            print(f"{in_use} Waiting for it, up to {wait_s:g} s.", file=sys.stderr, flush=True)
        if not wait_s or not acquire(lock, wait_s):
            raise UserError(f"{in_use} Wait until it ends, or name another folder.")
    held = FolderLock(folder, lock)
    try:
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)
        write_json(folder / HOLDER_NAME, describe_process())
    except BaseException:
        held.release()
        raise
    return held


def acquire(lock: FileLock, seconds: float) -> bool:
    """Try to lock for so long; where the file system knows no locks, say so and go on as if alone."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except (NotImplementedError, OSError) as error:  # the former in filelock before 3.21
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        caught = [error]
    if caught:
        print(
            f"warning: {lock.lock_file}: the file system knows no locks; two programs that write here at "
            "once may not notice each other",
            file=sys.stderr,
        )
    return True


def describe_process() -> dict:
    """Describe this process to those that it keeps out."""
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(shlex.join(sys.orig_argv).split())[:COMMAND_CHARS],
    }


def name_holder(folder: Path) -> str:
    """Name the process that holds a folder's lock, as it described itself."""
    try:
        holder = read_json(folder / HOLDER_NAME)
        return "process {process} on {host} since {since} ({command})".format(**holder)
    except (UserError, OSError, KeyError, TypeError):
        return "another process, which has not written its name"
