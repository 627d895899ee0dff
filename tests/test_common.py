"""What every command does with bad input and with a reader that leaves early; files that are whole."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_model import ROOT

import common
from common import UserError, append_text, atomic_file, parse_json, read_json


@pytest.mark.parametrize("last", ["print('x' * 100_000)", "sys.stdout.write('y' * 10)"])
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(last):
    """`COMMAND | head`: whether the pipe breaks while it prints or when the last lines are flushed."""
    code = (
        "import sys, time\nfrom common import run_command\n"
        f"def main():\n    print('first', flush=True)\n    time.sleep(0.5)\n    {last}\nrun_command(main)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"first\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


# ---- Whole files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    """A run that is stopped must not destroy the dataset that was there."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_writers_of_one_file_both_succeed_and_the_last_wins(tmp_path):
    """With one name for both temporaries the file is a mixture, or the second rename finds nothing."""
    path = tmp_path / "file"
    with atomic_file(path) as first:
        first.write(b"first" * 9)
        first.flush()
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 9
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_is_always_a_new_file(tmp_path, monkeypatch):
    """Writing through what lies there, a link for one, would change a file that was never named."""
    monkeypatch.setattr(os, "urandom", bytes)
    planted = tmp_path / ".file.00000000.part"
    planted.write_bytes(b"of another")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "file"):
        pass
    assert planted.read_bytes() == b"of another"


@pytest.mark.skipif(os.name != "posix", reason="this system opens no folders")
def test_a_file_and_its_name_are_on_the_disk_before_the_block_is_left(tmp_path, monkeypatch):
    """A rename whose folder is not flushed can be lost with the power."""
    synced = []
    monkeypatch.setattr(common.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with atomic_file(tmp_path / "file") as file:
        file.write(b"text")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    """Not a traceback from the middle of an hour of tokenizing; the old file stays."""
    path = tmp_path / "fineweb_train_000000.bin"
    message = r"fineweb_train_000000\.bin: not written, the disk is full"
    with pytest.raises(UserError, match=message), atomic_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError), atomic_file(path):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_error_of_a_device_without_space_is_known(tmp_path):
    """The number is the system's: a write to a full device must give one of those that are told apart."""
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(UserError, match="log: not written, the disk is full"):
        append_text(tmp_path / "log", "line\n")


def test_text_and_bytes_are_appended(tmp_path):
    """The log holds lines, the event file records; neither is translated."""
    for part in ("caf\u00e9\n", b"\0\r\n", ""):
        append_text(tmp_path / "log", part)
    assert (tmp_path / "log").read_bytes() == "caf\u00e9\n\0\r\n".encode()


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "full"), UserError), (EOFError(), EOFError)]
)
def test_an_append_that_fails_half_way_leaves_the_file_as_it_was(tmp_path, monkeypatch, error, raised):
    """Half a line of metrics.jsonl makes the whole file unreadable to its readers."""
    path = tmp_path / "metrics.jsonl"
    append_text(path, '{"step": 1}\n')

    class Filling(io.FileIO):
        """A disk with room for five more bytes, then for none."""

        def write(self, data):
            if len(data) < 12:
                raise error
            return super().write(data[:5])

    monkeypatch.setattr(common, "open", lambda path, mode, buffering: Filling(path, mode), raising=False)
    with pytest.raises(raised):
        append_text(path, '{"step": 2}\n')
    monkeypatch.undo()
    assert path.read_bytes() == b'{"step": 1}\n'
    append_text(path, "next\n")
    assert path.read_bytes() == b'{"step": 1}\nnext\n'


# ---- JSON -------------------------------------------------------------------------------------------

BAD_JSON = {
    "nothing": (b"", "Expecting value"),
    "cut off": (b'{"a": [1, 2', "delimiter"),
    "two values": (b"{} {}", "Extra data"),
    "bytes that are not UTF-8": (b'"\xff"', "can't decode"),
    "UTF-16": ("{}".encode("utf-16"), "can't decode"),
    "deep lists": (b"[" * 100_000, "recursion depth"),
    "deep objects": (b'{"a":' * 100_000, "recursion depth"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    "a key twice": (b'{"text": "a", "text": "b"}', "a key twice"),
    "NaN": (b"[NaN]", "NaN is no finite number"),
    "infinity": (b"[-Infinity]", "-Infinity is no finite"),
    "a number beyond every float": (b"[1e999]", "1e999 is no finite"),
    "half of a surrogate pair": (b'["\\ud800"]', "surrogates not allowed"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_cannot_be_read_names_its_place_and_the_cause(tmp_path, name):
    """The library raises three kinds of errors, and takes numbers and keys that it cannot keep."""
    content, cause = BAD_JSON[name]
    (tmp_path / "a.json").write_bytes(content)
    for read in (read_json, lambda path: parse_json(path.read_bytes(), path)):
        with pytest.raises(UserError, match=cause) as found:
            read(tmp_path / "a.json")
        assert str(found.value).startswith(f"{tmp_path / 'a.json'}: not valid JSON")


def test_strangers_lines_may_hold_what_is_not_used_of_them():
    """Programs write NaN as Python's library does; a key twice or broken syntax loses text."""
    assert parse_json('{"a": Infinity, "b": "\\ud800"}', "x", strict=False)["a"] == float("inf")
    assert parse_json('["\\ud83d\\ude00"]', "x") == ["\U0001f600"]
    for text in ('{"a": 1, "a": 2}', "[" * 100_000, "9" * 5000):
        with pytest.raises(UserError):
            parse_json(text, "x", strict=False)


@pytest.mark.parametrize("name", ["", "none.json", "\0", "x" * 300])
def test_what_is_no_readable_file_is_one_sentence(tmp_path, name):
    """A folder, nothing, and names that no file can have."""
    with pytest.raises(UserError, match=r"no such file|cannot read it"):
        read_json(tmp_path / name)
