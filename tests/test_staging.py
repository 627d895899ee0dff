"""A dataset is replaced as a whole: wherever its writer is cut off, the old one or the new one is there."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from data.doctor import examine
from data.shards import TRAIN_GLOB, find_shards, read_manifest, write_shard
from data.staging import main, staged
from durable.lock import lock_folder
from durable.seals import write_sealed

OLD = {
    "fineweb_train_000000.bin": 10,
    "fineweb_train_000001.bin": 11,
    "fineweb_val_000000.bin": 12,
    "fineweb_val_bytes_000000.bin": 13,
    "tokenizer_report.json": 14,
    "small.model": 15,
}
NEW = {"fineweb_train_000000.bin": 20, "fineweb_val_000000.bin": 21, "small.model": 22}
OWN = {"notes.txt": b"of the user", "sub/fineweb_train_000000.bin": b"of another dataset"}


class Cut(BaseException):
    """The process ends here."""


def fill(folder: Path, sizes: dict) -> None:
    for name, size in sizes.items():
        write_shard(folder / name, np.arange(size))
    write_sealed(folder / "manifest.json", sizes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock's."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def out(tmp_path):
    """A folder with a dataset and files of the user."""
    out = tmp_path / "out"
    with staged(out) as staging:
        fill(staging, OLD)
    (out / "sub").mkdir()
    for name, text in OWN.items():
        (out / name).write_bytes(text)
    return out


@pytest.fixture
def wanted(tmp_path):
    """What the folder must hold once the new dataset is in place."""
    fill(tmp_path / "wanted", NEW)
    return contents(tmp_path / "wanted") | OWN


def cut_off(monkeypatch, after: int) -> list[str]:
    """Let so many changes of names happen, then none: returns the list that they are entered in."""
    done = []

    def limited(act, *arguments, **options):
        if len(done) >= after:
            raise Cut
        done.append(act)
        return act(*arguments, **options)

    for owner, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, partial(limited, getattr(owner, name)))
    unlink = Path.unlink  # found by its class: a partial would lose the path
    monkeypatch.setattr(Path, "unlink", lambda path, **options: limited(unlink, path, **options))
    return done


def test_a_dataset_replaces_another_and_files_of_the_user_stay(out, wanted):
    """Shards of a longer one and a report of another tokenizer would be taken for its own."""
    assert contents(out).keys() == {*OLD, *OWN, "manifest.json"}
    with staged(out) as staging:
        fill(staging, NEW)
    assert contents(out) == wanted
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == {".lock"}


def test_wherever_the_writer_is_cut_off_one_dataset_is_whole(out, wanted, tmp_path, monkeypatch):
    """Every change of a name, in turn, is the last that happens; then comes a writer or the command."""
    old, states = contents(out), set()
    for number in range(99):
        folder = tmp_path / f"cut_{number}"
        shutil.copytree(out, folder)
        with monkeypatch.context() as patches:
            done = cut_off(patches, number)
            try:
                with staged(folder) as staging:
                    fill(staging, NEW)
            except Cut:
                pass
        if (folder / ".ready").is_dir():
            states.add("moving")
            with pytest.raises(UserError, match=r"being put in place.*`python -m data\.staging .*cut_"):
                find_shards(folder / TRAIN_GLOB)
            assert "data.staging" in {row.check: row.detail for row in examine(folder)}["files"]
            if number % 2:
                main([str(folder)])
            else:
                with pytest.raises(RuntimeError), staged(folder) as staging:
                    raise RuntimeError("the next writer fails")
        in_place = {name: text for name, text in contents(folder).items() if not name.startswith(".staging")}
        assert in_place == (wanted if read_manifest(folder).items() >= NEW.items() else old)
        states.add("new" if in_place == wanted else "old")
        main([str(folder)])
        assert contents(folder) == in_place and find_shards(folder / TRAIN_GLOB)
        if len(done) < number:
            break
    assert states == {"old", "moving", "new"} and number > len(NEW)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_or_finds_nothing_to_do_changes_nothing(out, error):
    """The former dataset may have taken hours, and may be in use."""
    before = contents(out)
    if error is None:
        with staged(out) as staging:
            (staging / "fineweb_train_000000.bin").write_bytes(b"half")
    else:
        with pytest.raises(error), staged(out) as staging:
            fill(staging, NEW)
            raise error
    assert contents(out) == before
    assert find_shards(out / TRAIN_GLOB)


def test_a_second_writer_is_refused_while_the_first_builds(out, wanted):
    """Two of them would write each other's shards; readers go on with the old dataset meanwhile."""
    with staged(out) as staging:
        fill(staging, NEW)
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()}"), staged(out):
            pass
        assert read_manifest(out).items() >= OLD.items() and len(find_shards(out / TRAIN_GLOB)) == 2
    assert contents(out) == wanted


def test_a_file_that_another_program_holds_is_named_and_the_move_can_be_completed(out, wanted, monkeypatch):
    """Windows replaces no file that is mapped."""

    def replace(source, target):
        if ".ready" in str(source):
            raise PermissionError(errno.EACCES, "Access is denied")
        os.rename(source, target)

    message = r"fineweb_train_000000\.bin: not replaced \(Access is denied\)"
    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=message), staged(out) as staging:
            fill(staging, NEW)
    main([str(out)])
    assert contents(out) == wanted


def test_the_command_says_what_it_did_and_waits_for_no_one(out, capsys):
    """It is named by errors, so it is run by people who have never seen it."""
    main([str(out)])
    assert "nothing to put in place" in capsys.readouterr().out
    os.rename(out / "sub", out / ".ready")
    main([str(out)])
    assert "finished files are in place" in capsys.readouterr().out
    with lock_folder(out), pytest.raises(UserError, match="in use by"):
        main([str(out)])
    with pytest.raises(UserError, match="no such folder"):
        main([str(out / "none")])
    assert not (out / "none").exists()
