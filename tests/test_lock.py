"""One writer a folder: the second is refused by name, the dead are forgotten, nothing else is touched."""

import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import filelock
import pytest
from fixtures_model import ROOT

from common import UserError, write_json
from durable import lock as lock_module
from durable.lock import lock_folder

HOLD = """
import sys, time
from durable.lock import lock_folder
lock_folder(sys.argv[1])  # nobody keeps the object: it is held for the life of the process
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def start_holder(folder, seconds: float = 60):
    """Start a process that holds a folder's lock; killed at the end."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"held\n"
            yield child
        finally:
            child.kill()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    """Two runs of one name write each other's log; the folder is made for the first."""
    folder = tmp_path / "new" / "folder"
    with lock_folder(folder):
        assert names(folder) == [".lock", ".lock.json"]
        with pytest.raises(
            UserError, match=rf"folder: in use by process {os.getpid()} on .* since 20.*python"
        ):
            lock_folder(folder)
    assert names(folder) == [".lock"]
    held = lock_folder(folder)
    held.release()
    held.release()
    with lock_folder(folder), lock_folder(tmp_path):
        pass


def test_any_thread_may_release(tmp_path):
    """Signals are handled in one thread, the work is done in another."""
    held = lock_folder(tmp_path)
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()
    lock_folder(tmp_path).release()


def test_a_writer_that_may_wait_takes_over_and_says_for_whom_it_waits(tmp_path, capsys):
    """Two `make run` at once: the second uses what the first has built."""
    held = lock_folder(tmp_path)
    threading.Timer(0.8, held.release).start()
    lock_folder(tmp_path, wait_s=30).release()
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    with lock_folder(tmp_path), pytest.raises(UserError, match="Wait until it ends"):
        lock_folder(tmp_path, wait_s=0.1)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    """A temporary has a name of its own, so nobody else overwrites it; files of the user stay."""
    kept = ["notes.txt", ".hidden", "mine.part", "x.safetensors"]
    for name in [*kept, ".log.0a1b2c3d.part", ".x.safetensors.00000000.part"]:
        (tmp_path / name).touch()
    lock_folder(tmp_path).release()
    assert names(tmp_path) == sorted([*kept, ".lock"])


@pytest.mark.parametrize("holder", [None, [], {}, {"process": 7}, 5])
def test_a_holder_that_does_not_name_itself_is_still_obeyed(tmp_path, holder):
    """It may not have written its name yet, or the disk was full."""
    with lock_folder(tmp_path):
        (tmp_path / ".lock.json").unlink()
        if holder is not None:
            write_json(tmp_path / ".lock.json", holder)
        with pytest.raises(UserError, match="in use by another process"):
            lock_folder(tmp_path)


def test_a_lock_whose_holder_cannot_be_named_is_not_kept(tmp_path, monkeypatch):
    """A full disk must not lock a folder for the rest of the process."""

    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(lock_module, "write_json", full)
    with pytest.raises(UserError, match="disk is full"):
        lock_folder(tmp_path)
    monkeypatch.undo()
    lock_folder(tmp_path).release()


class Warned(filelock.FileLock):
    """What a newer filelock does where there are no locks: an own file with a warning."""

    def acquire(self, timeout):
        warnings.warn("flock not supported on this filesystem", stacklevel=2)
        return super().acquire(timeout=timeout)


class Refused(filelock.FileLock):
    """What an older one does."""

    def acquire(self, timeout):
        raise NotImplementedError


class NoLocks(filelock.FileLock):
    """What a network file system may answer."""

    def acquire(self, timeout):
        raise OSError(lock_module.errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("kind", [Warned, Refused, NoLocks])
def test_without_locks_work_goes_on_with_one_line_of_warning(tmp_path, monkeypatch, capsys, kind):
    """Some clusters mount their file systems so; two writers are rare, a refusal would hit every run."""
    monkeypatch.setattr(lock_module, "FileLock", kind)
    with lock_folder(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning:") and "knows no locks" in line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    """The command prints it in one line."""
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError) as error:
        lock_folder(tmp_path)
    assert error.value.filename


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    """Its name still lies there; a file that only says "locked" would have to be removed by hand."""
    with start_holder(tmp_path) as child:
        with pytest.raises(
            UserError, match=rf"process {child.pid} on .*durable\.lock import lock_folder lock_folder"
        ):
            lock_folder(tmp_path)
        child.kill()
        child.wait()
    assert names(tmp_path) == [".lock", ".lock.json"]
    with lock_folder(tmp_path):
        pass
    assert names(tmp_path) == [".lock"]


@pytest.mark.slow
def test_a_process_that_ends_well_takes_its_name_away(tmp_path):
    """The lock lasts to the end of the process, whoever keeps the object."""
    with start_holder(tmp_path, seconds=1) as child:
        with pytest.raises(UserError, match="in use"):
            lock_folder(tmp_path)
        assert child.wait() == 0
    assert names(tmp_path) == [".lock"]
