"""Mutated files of every kind that the project reads; `make soak` tries thousands."""

from random import Random

import pytest

from common import UserError
from dev.soak import mutations
from dev.soak.mutations import Sound, judge, mutate
from dev.soak.process import Miss
from dev.soak.readers import READERS, Reader

TRIES = 12  # a kind; from a seed, so that a failure comes again


def refuse(sentence: str):
    """Raise a UserError."""
    raise UserError(sentence)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file of every kind."""
    return Sound(tmp_path_factory.mktemp("mutations") / "sound")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_mutated_file_loads_equal_or_is_refused_in_a_sentence(sound, reader):
    """Bytes and meaning; whatever else it does raises."""
    ended = {sound.try_one(reader, Random(f"{reader.name} {number}")) for number in range(TRIES)}
    assert "refused" in ended


def test_mutations_change_files_and_come_again(sound):
    """Nearly all of them, in another way each."""
    for reader in READERS:
        path = sound.folder / reader.place
        blobs = [mutate(path, Random(number)) for number in range(20)]
        assert blobs == [mutate(path, Random(number)) for number in range(20)]
        assert len(set(blobs) - {path.read_bytes()}) >= 12, reader.name


@pytest.mark.parametrize(
    "read, found",
    [
        (lambda path: {}["key"], "a traceback: KeyError"),
        (lambda path: 2, "other values were accepted"),
        (
            lambda path: refuse("something is wrong with what was read"),
            "names no file",
        ),
        (lambda path: refuse("a.json: bad"), "names no file"),
        (
            lambda path: refuse("a.json: expected an object,\nfound none"),
            "names no file",
        ),
    ],
)
def test_what_may_not_happen_is_a_miss(tmp_path, read, found):
    """A judge that lets it pass finds nothing."""
    with pytest.raises(Miss, match=found):
        judge(Reader("a kind", "a.json", read, True), tmp_path / "a.json", 1)
    assert judge(Reader("a kind", "a.json", lambda path: 2, False), tmp_path / "a.json", 1) == "answered"


def test_what_takes_too_long_or_too_much_is_a_miss(tmp_path, monkeypatch):
    """Ten seconds and a gigabyte."""
    reader = Reader("a kind", "a.json", lambda path: 1, True)
    monkeypatch.setattr(mutations, "SECONDS", -1.0)
    with pytest.raises(Miss, match=r"after \d+ s"):
        judge(reader, tmp_path / "a.json", 1)
    monkeypatch.setattr(mutations, "SECONDS", 10.0)
    peaks = iter([0.0, 2000.0, 2000.0])
    monkeypatch.setattr(mutations, "peak_mib", lambda: next(peaks))
    with pytest.raises(Miss, match="2000 MiB more memory"):
        judge(reader, tmp_path / "a.json", 1)
