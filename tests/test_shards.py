"""The shard format: what is written is read back, what is damaged is refused, nothing is half written."""

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common import UserError, write_json
from data.shards import (
    HEADER_BYTES,
    check_stated_shards,
    check_token_ids,
    digest_of_data,
    find_shards,
    read_manifest,
    read_report,
    read_shard,
    write_shard,
)
from durable.seals import digest_of, write_sealed

SAME_FOLDER = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def shard(tmp_path):
    """A good shard of 100 tokens."""
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, np.arange(100))
    return path


@SAME_FOLDER
@given(tokens=hnp.arrays(np.uint16, st.integers(0, 300)))
def test_tokens_come_back_exactly_and_the_header_is_the_contests(tmp_path, tokens):
    """The contest's own loader reads these files: magic, version, count, then little-endian uint16."""
    path = tmp_path / "shard.bin"
    write_shard(path, tokens)
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:HEADER_BYTES]) == (20240520, 1, tokens.size, *[0] * 253)
    assert raw[HEADER_BYTES:] == b"".join(struct.pack("<H", token) for token in tokens)
    assert np.array_equal(read_shard(path), tokens)


@SAME_FOLDER
@given(num_bytes=st.integers(0, HEADER_BYTES + 199))
def test_every_truncation_is_refused(tmp_path, num_bytes):
    """A full disk or a broken transfer cuts anywhere."""
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match="again"):
        read_shard(path)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 1, "not a token shard"),
        (1, 2, "expected 100 tokens = 1,424 bytes"),
        (1, 3, "version 1 or 2, found 20240520 version 3"),
        (2, 99, "expected 99 tokens"),
        (2, -1, "expected -1 tokens"),
    ],
)
def test_a_wrong_header_is_refused(shard, index, value, message):
    """Files of other formats and versions differ in these three numbers."""
    raw = bytearray(shard.read_bytes())
    raw[4 * index : 4 * index + 4] = struct.pack("<i", value)
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_shard(shard)


def test_a_missing_shard_is_an_error_that_says_how_to_make_one(tmp_path):
    """The first thing that a new user runs into."""
    with pytest.raises(UserError, match="make data"):
        read_shard(tmp_path / "absent.bin")


@pytest.mark.parametrize("tokens", [[-1], [0, 65536]])
def test_ids_that_do_not_fit_are_refused_not_wrapped(tmp_path, tokens):
    """A cast to uint16 would wrap them to other tokens."""
    with pytest.raises(UserError, match="65535"):
        write_shard(tmp_path / "shard.bin", np.array(tokens))
    assert not any(tmp_path.iterdir())


def test_large_vocabularies_are_written_with_four_bytes_a_token(tmp_path):
    """131,072 entries do not fit into uint16; the version follows the tokenizer, not the ids."""
    path = tmp_path / "shard.bin"
    for vocab_size, tokens, version in (
        (65_536, [0, 65_535], 1),
        (65_537, [0, 65_536], 2),
        (131_072, [1, 2, 3], 2),
    ):
        write_shard(path, np.array(tokens), vocab_size)
        assert struct.unpack("<3i", path.read_bytes()[:12]) == (20240520, version, len(tokens))
        assert path.stat().st_size == HEADER_BYTES + 2 * version * len(tokens)
        assert read_shard(path).tolist() == tokens
    with pytest.raises(UserError, match=r"\[0, 131071\].*found \[7, 131072\]"):
        write_shard(path, np.array([7, 131_072]), 131_072)


def test_ids_of_another_vocabulary_are_located():
    """The usual mistake is a shard of sp8192 with a model of 1024 entries."""
    check_token_ids(np.array([0, 1023]), 1024, "shard")
    check_token_ids(np.array([], dtype=np.uint16), 1024, "shard")
    with pytest.raises(UserError, match="token id 1024 at position 1"):
        check_token_ids(np.array([0, 1024]), 1024, "shard")


def test_shards_are_listed_in_order_without_byte_sidecars(tmp_path):
    """Order decides which tokens a run sees; a sidecar holds counts, not tokens."""
    for name in ("fineweb_val_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        (tmp_path / name).touch()
    found = [path.name for path in find_shards(tmp_path / "fineweb_val_*.bin")]
    assert found == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]


def test_no_shards_is_an_error_that_names_the_three_ways_to_make_some(tmp_path):
    """An empty list would fail far from its cause."""
    with pytest.raises(UserError, match=r"make data.*data\.prepare.*data\.download"):
        find_shards(tmp_path / "fineweb_val_*.bin")


def test_a_manifest_is_read_back_and_a_damaged_one_is_refused(tmp_path):
    """A folder without a manifest is fine: the contest's shards have none beside them."""
    assert read_manifest(tmp_path) is None
    written = write_sealed(tmp_path / "manifest.json", {"format": 1, "text": "caf\u00e9"})
    assert read_manifest(tmp_path) == written and written["text"] == "caf\u00e9"
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1})[:-2])
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_a_folder_that_is_being_replaced_is_not_read(shard):
    """Its shards are whole, but of two datasets."""
    assert find_shards(shard) == [shard]
    shard.with_name(".ready").mkdir()
    with pytest.raises(UserError, match=r"being put in place.*`python -m data\.staging .*` completes it"):
        find_shards(shard)


def test_shards_are_the_manifests_by_name_and_size(shard, tmp_path):
    """A copy that lost or gained a shard trains on other data without a word."""
    check_stated_shards([shard], "train")
    entry = {"file": shard.name, "bytes": shard.stat().st_size}
    write_sealed(tmp_path / "manifest.json", {"train": {"shards": [entry]}})
    check_stated_shards([shard], "train")
    other = shard.with_name("fineweb_train_000009.bin")
    other.write_bytes(b"")
    with pytest.raises(UserError, match=r"000009\.bin: expected bytes: none by the manifest, found: 0"):
        check_stated_shards([shard, other], "train")
    write_sealed(tmp_path / "manifest.json", {"train": {"shards": [entry | {"bytes": 7}]}})
    with pytest.raises(UserError, match="expected bytes: 7, found: 1224"):
        check_stated_shards([shard], "train")
    lost = {"file": "fineweb_train_000005.bin", "bytes": 7}
    write_sealed(tmp_path / "manifest.json", {"train": {"shards": [entry, lost]}})
    with pytest.raises(UserError, match=r"000005\.bin: expected bytes: 7, found: none"):
        check_stated_shards([shard], "train")


def test_a_tokenizer_report_vouches_for_one_tokenizer_and_cannot_be_edited(tmp_path):
    """Runs and records carry its digest."""
    assert read_report(tmp_path, "ab" * 32) == "none"
    report = {"passed": True, "documents": 3, "tokenizer": {"sha256": "ab" * 32}}
    report["digest"] = digest_of(report)
    write_json(tmp_path / "tokenizer_report.json", report)
    assert read_report(tmp_path, "ab" * 32) == report["digest"]
    with pytest.raises(UserError, match="report that passed on tokenizer cdcd"):
        read_report(tmp_path, "cd" * 32)
    for changes in ({"documents": 4}, {"passed": False}):
        write_json(tmp_path / "tokenizer_report.json", report | changes)
        with pytest.raises(UserError, match="altered"):
            read_report(tmp_path, "ab" * 32)
    failed = {"passed": False, "tokenizer": {"sha256": "ab" * 32}}
    write_json(tmp_path / "tokenizer_report.json", failed | {"digest": digest_of(failed)})
    with pytest.raises(UserError, match="failed"):
        read_report(tmp_path, "ab" * 32)


def test_the_digest_of_data_follows_what_is_stated_and_reads_no_shard(tmp_path):
    """A run is continued on the data that it began with, wherever they lie."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        write_shard(folder / "fineweb_train_000000.bin", np.arange(100))
        write_shard(folder / "fineweb_val_000000.bin", np.arange(9))
    first = digest_of_data(folders[0])
    assert digest_of_data(folders[1]) == first
    write_shard(folders[1] / "fineweb_val_000000.bin", np.arange(10))
    (folders[1] / "fineweb_train_000000.bin").write_bytes(b"\0" * (HEADER_BYTES + 200))  # of the same size
    assert digest_of_data(folders[1]) == first
    digests = {first}
    for sha256, tokenizer in (("0" * 64, "1"), ("1" * 64, "1"), ("1" * 64, "2")):
        shards = [{"file": "fineweb_train_000000.bin", "bytes": 1224, "sha256": sha256}]
        write_sealed(tmp_path / "a" / "manifest.json", {"train": {"shards": shards}, "tokenizer": tokenizer})
        digests.add(digest_of_data(folders[0]))
    write_shard(folders[1] / "fineweb_train_000001.bin", np.arange(5))
    assert len({*digests, digest_of_data(folders[1])}) == 5


def test_a_manifest_that_was_altered_is_refused(tmp_path):
    """It states sizes that a score is divided by, and which file is whole."""
    manifest = write_sealed(tmp_path / "manifest.json", {"format": 1, "val": {"raw_bytes": 1000}})
    assert read_manifest(tmp_path) == manifest
    unsealed = {key: manifest[key] for key in ("format", "val")}
    for altered in (
        manifest | {"val": {"raw_bytes": 1001}}, manifest | {"digest": "0"}, [manifest], unsealed
    ):  # fmt: skip
        write_json(tmp_path / "manifest.json", altered)
        with pytest.raises(UserError, match=r"manifest\.json: expected the digest of what it says, found"):
            read_manifest(tmp_path)
