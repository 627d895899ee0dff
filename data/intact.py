"""Are the training shards those that were written? They are hashed in the background while training runs."""

import hashlib
import os
import sys
import threading
import time
from pathlib import Path

from common import UserError
from data.shards import MANIFEST_NAME, RECORD_NAME, find_shards, hash_fault, stated_hashes

BUFFER_BYTES = 1 << 20  # the interpreter is needed once a buffer, so a thousand times a gigabyte
SHARE_OF_CORE = 0.02  # that hashing takes while nobody waits for it


class ShardVerifier:
    """Hash one process's share of the training shards in a daemon thread, against what is stated of them.

    `share` is (index, count): every count-th file from index on. `fault` is "" while all is well, then the
    sentence that names the first damaged shard. Raises a UserError at once where the statement is malformed.
    """

    def __init__(self, files: list[Path], share: tuple[int, int] = (0, 1)):
        index, count = share
        self.all_files, self.files = files, files[index::count]
        self.hashes = {folder: stated_hashes(folder) for folder in {path.parent for path in files}}
        self.fault, self.num_verified = "", 0
        self.hurry = threading.Event()  # somebody waits
        self.thread = threading.Thread(target=self.run, name="verify shards", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Hash file after file until one is damaged."""
        yield_to_others()
        for path in self.files:
            stated = self.hashes[path.parent]
            if path.name not in stated:
                continue
            try:
                self.fault = hash_fault(path, stated[path.name], sha256_slowly(path, self.hurry))
            except OSError as error:
                self.fault = f"{path}: {error.strerror}. Make the data again."
            if self.fault:
                return
            self.num_verified += 1

    def wait(self) -> None:
        """Wait until all are hashed; raises a UserError where one is not the stated one."""
        self.hurry.set()
        self.thread.join()
        if self.fault:
            raise UserError(self.fault)

    def summary(self, num_verified: int) -> str:
        """Say in a log line how many of all files were verified, on every host again, and by what."""
        num_verified = min(num_verified, len(self.all_files))
        return f"train_shards_verified:{say_verified(num_verified, self.all_files)}"


def say_verified(num_verified: int, files: list[Path]) -> str:
    """Say how many shards were verified, and by what; that nothing could be where no sha256 is stated."""
    folders = {path.parent for path in files}
    names = [name for name in (MANIFEST_NAME, RECORD_NAME) if any((one / name).is_file() for one in folders)]
    if not any(map(stated_hashes, folders)):
        return f"none, neither {MANIFEST_NAME} nor {RECORD_NAME} states their sha256"
    return f"{num_verified} of {len(files)} by {names[0]}"


def val_summary(pattern: str) -> str:
    """Say in a log line which of the validation shards of a pattern were verified as they were read."""
    files = find_shards(pattern)
    stated = {path.parent: stated_hashes(path.parent) for path in files}
    return f"val_shards_verified:{say_verified(sum(p.name in stated[p.parent] for p in files), files)}"


def yield_to_others() -> None:
    """Give this thread the lowest priority, where threads have one of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def sha256_slowly(path: Path, hurry: threading.Event) -> str:
    """Hash a file through one small buffer, at a small share of a core until somebody is in a hurry.

    Both reading and hashing leave the interpreter to others.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        started = time.thread_time()
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            hurry.wait((time.thread_time() - started) * (1 / SHARE_OF_CORE - 1))
            started = time.thread_time()
    return digest.hexdigest()
