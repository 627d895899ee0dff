"""Validation text is scored only if its bytes are those that were written."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures_data import small_texts, train_small_tokenizer
from test_intact import flip

from common import UserError, read_json, write_json
from data.codecs import load_codec
from data.prepare import Document, write_dataset
from data.validation import read_validation
from durable.seals import write_sealed


class WithSidecar:
    """A codec whose sizes lie beside the shards, as CaseOps over a model that normalises has it."""

    needs_sidecar = True

    def __init__(self, codec):
        self.codec = codec

    def __getattr__(self, name):
        return getattr(self.codec, name)

    def encode_with_bytes(self, text):
        ids = self.codec.encode(text)
        return ids, self.codec.token_bytes(ids)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dataset with several validation shards, sidecars, tokenizer and manifest."""
    tmp_path = tmp_path_factory.mktemp("written")
    codec = WithSidecar(load_codec(train_small_tokenizer(tmp_path)))
    train, val = ([Document(text, f"{seed}") for text in small_texts(20, seed)] for seed in (1, 2))
    write_dataset(tmp_path / "out", codec, train, val, {}, shard_tokens=1500, num_threads=1)
    return tmp_path / "out"


@pytest.fixture
def out(written, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(written, tmp_path / "out")


def read(out, chosen: str = ""):
    codec = WithSidecar(load_codec(out / "small.model"))
    settings = SimpleNamespace(data_path=str(out), tokenizer_path="small.model", vocab_size=codec.vocab_size)
    return read_validation(settings, codec, chosen, "")


def test_whole_files_are_read(out):
    """Also when they are chosen, and where nothing states what they are."""
    whole = read(out)
    assert len(list(out.glob("fineweb_val_0*.bin"))) > 2
    assert np.array_equal(read(out, str(out / "fineweb_val_*.bin")).tokens, whole.tokens)
    (out / "manifest.json").unlink()
    assert np.array_equal(read(out).target_bytes, whole.target_bytes)


@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("kind", ["fineweb_val_0*.bin", "fineweb_val_bytes_*.bin", "small.model"])
def test_any_flipped_bit_of_what_is_scored_is_refused(out, kind, is_chosen):
    """Another token of as many bytes changes the score and no total."""
    rng = random.Random(0)
    paths = sorted(out.glob(kind))
    for _ in range(40):
        path = rng.choice(paths)
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(UserError):
            read(out, str(out / "fineweb_val_*.bin") if is_chosen else "")
        flip(path, bit)
    read(out)


def test_a_shard_is_held_against_the_record_of_a_download(out):
    """The contest's data have no manifest beside their shards."""
    entries = [
        row for split in ("shards", "sidecars") for row in read_json(out / "manifest.json")["val"][split]
    ]
    (out / "manifest.json").unlink()
    files = {
        f"datasets/out/{row['file']}": {"bytes": row["bytes"], "sha256": row["sha256"]} for row in entries
    }
    write_json(out / "download.json", {"files": files})
    read(out)
    flip(out / "fineweb_val_000001.bin", 8 * 1024 + 3)
    with pytest.raises(UserError, match=r"fineweb_val_000001\.bin: expected sha256"):
        read(out, str(out / "fineweb_val_000001.bin"))
    read(out, str(out / "fineweb_val_000000.bin"))


def test_any_flipped_bit_of_the_manifest_is_refused_or_says_the_same(out):
    """It states what scores are divided by; without a digest of its own a digit more is believed."""
    rng, path = random.Random(0), out / "manifest.json"
    whole, stated = read(out), read_json(path)
    for _ in range(150):
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            found = read(out)
        except UserError:
            pass
        else:
            now = json.loads(path.read_text())
            assert found.raw_bytes == whole.raw_bytes
            assert {**stated, "digest": 0} == {
                key: now.get(key, 0) if key != "digest" else 0 for key in stated
            }
        flip(path, bit)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("val", "shards", 0), {"file": "fineweb_val_000000.bin"}, "does not state every shard once"),
        (("val", "shards", 1), {"sha256": "0" * 64}, "does not state every shard once"),
        (("val", "shards", 1, "file"), "fineweb_val_000000.bin", "does not state every shard once"),
        (("val", "shards", 0, "sha256"), None, "expected sha256 None, found"),
        (("val", "shards", 0), 7, "does not state every shard once"),
        (("train",), [1], "does not state every shard once"),
    ],
)
def test_a_manifest_of_another_form_is_one_sentence(out, path, value, message):
    """Manifests of other programs have no digest, so every entry is looked at."""
    manifest = read_json(out / "manifest.json")
    del manifest["digest"]
    part = manifest
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    write_sealed(out / "manifest.json", manifest)
    with pytest.raises(UserError, match=message):
        read(out)
