"""Training shards are verified in the background, and a damaged one is named whichever bit is wrong."""

import random
import threading

import numpy as np
import pytest

from common import UserError, sha256_file, write_json
from data.intact import BUFFER_BYTES, ShardVerifier, sha256_slowly
from data.shards import write_shard
from durable.seals import write_sealed


def flip(path, bit: int) -> None:
    """Turn one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def state(folder, files, stated_by: str, **changes) -> None:
    """State the sha256 of shards as data.prepare or data.download does; changes of entries by file number."""
    entries = [
        {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    ]
    for number, change in changes.items():
        entries[int(number[1:])] |= change
    if stated_by == "manifest.json":
        write_sealed(folder / stated_by, {"train": {"shards": entries}})
    else:
        write_json(folder / stated_by, {"files": {f"datasets/x/{row.pop('file')}": row for row in entries}})


@pytest.fixture
def files(tmp_path):
    """Five small training shards, of which nothing is stated."""
    paths = [tmp_path / f"fineweb_train_{number:06d}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        write_shard(path, np.arange(100 + number))
    return paths


@pytest.mark.parametrize("stated_by", ["manifest.json", "download.json"])
def test_whole_shards_are_verified_and_what_stated_them_is_named(tmp_path, files, stated_by):
    """The log says what a run's data were held against; each process does its share."""
    state(tmp_path, files, stated_by)
    verifier = ShardVerifier(files)
    verifier.wait()
    said = verifier.summary(verifier.num_verified)
    assert (verifier.fault, said) == ("", f"train_shards_verified:5 of 5 by {stated_by}")
    shares = [ShardVerifier(files, (index, 2)) for index in range(2)]
    for share in shares:
        share.wait()
    assert [share.num_verified for share in shares] == [3, 2]
    assert shares[0].summary(5) == said == shares[0].summary(10)  # on a second host all once more
    assert sorted(path for share in shares for path in share.files) == files


@pytest.mark.parametrize("stated_by", ["manifest.json", "download.json"])
def test_any_bit_of_any_training_shard_is_noticed_and_the_shard_is_named(tmp_path, files, stated_by):
    """A flipped token is a valid token: nothing else notices it, and the run learns it."""
    state(tmp_path, files, stated_by)
    rng = random.Random(0)
    for _ in range(60):
        path = rng.choice(files)
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        verifier = ShardVerifier(files)
        with pytest.raises(UserError, match=rf"{path.name}: expected sha256 .* found .*Make the data again"):
            verifier.wait()
        assert path.name in verifier.fault
        flip(path, bit)
    ShardVerifier(files).wait()


def test_a_share_looks_at_its_own_shards_only(tmp_path, files):
    """Eight processes read 16 GB once, not eight times."""
    state(tmp_path, files, "manifest.json")
    flip(files[3], 9000)
    ShardVerifier(files, (0, 2)).wait()
    with pytest.raises(UserError, match=files[3].name):
        ShardVerifier(files, (1, 2)).wait()


def test_without_a_statement_nothing_is_verified_and_the_log_says_so(tmp_path, files):
    """Shards made by another program are fine, but no claim is made about them."""
    verifier = ShardVerifier(files)
    verifier.wait()
    assert verifier.summary(verifier.num_verified) == (
        "train_shards_verified:none, neither manifest.json nor download.json states their sha256"
    )
    state(tmp_path, files[:3], "download.json")
    verifier = ShardVerifier(files)
    verifier.wait()
    assert verifier.summary(verifier.num_verified) == "train_shards_verified:3 of 5 by download.json"


def test_a_shard_that_vanishes_is_a_fault_not_a_dead_thread(tmp_path, files):
    """A thread that ends with a traceback would leave the run as if all were well."""
    state(tmp_path, files, "manifest.json")
    files[2].unlink()
    with pytest.raises(UserError, match=rf"{files[2].name}: No such file"):
        ShardVerifier(files).wait()


@pytest.mark.parametrize("stated_by", ["manifest.json", "download.json"])
@pytest.mark.parametrize("change", [None, 7, [], "0" * 64])
def test_a_statement_of_another_form_is_one_sentence(tmp_path, files, stated_by, change):
    """Whatever stands where a sha256 should."""
    state(tmp_path, files, stated_by, _1={"sha256": change})
    with pytest.raises(UserError, match=r"expected sha256|does not state every shard once"):
        ShardVerifier(files).wait()


def test_hashing_is_the_same_through_a_small_buffer_and_in_the_background(tmp_path, files):
    """The thread ends with the process, and must not keep one alive."""
    hurried = threading.Event()
    hurried.set()
    path = tmp_path / "large.bin"
    for size in (0, 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES - 1):
        path.write_bytes(random.Random(size).randbytes(size))
        assert sha256_slowly(path, hurried) == sha256_file(path)
    verifier = ShardVerifier(files)
    assert verifier.thread.daemon and verifier.thread is not threading.main_thread()


def test_hashing_takes_a_small_share_of_a_core_until_somebody_waits(tmp_path):
    """Steps on two cores would feel a core that hashes gigabytes."""
    path = tmp_path / "shard.bin"
    path.write_bytes(bytes(64 * BUFFER_BYTES))
    entry = {"file": path.name, "sha256": sha256_file(path)}
    write_sealed(tmp_path / "manifest.json", {"train": {"shards": [entry]}})
    verifier = ShardVerifier([path])
    verifier.thread.join(0.2)
    assert verifier.thread.is_alive()  # 64 MiB would be hashed by then
    verifier.wait()
    assert verifier.num_verified == 1
