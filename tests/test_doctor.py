"""`python -m data.doctor`: each planted fault is found, clean data has none."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError, read_json, sha256_file, write_json
from data import doctor
from data.codecs import load_codec
from data.doctor import WINDOW, examine, window_hashes
from data.prepare import Document, write_dataset, write_manifest
from data.shards import read_shard, write_shard

TRAIN_DOCUMENTS = 10_000
LETTERS = "etaoin shrdlu"


def random_texts(count: int, seed: int) -> list[str]:
    """Make texts of 100 to 200 letters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randrange(100, 200))) for _ in range(count)]


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"memory:{i}") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def clean(trained, tmp_path_factory) -> Path:
    """A dataset of bytes with its tokenizer, written as data.prepare writes it."""
    folder = tmp_path_factory.mktemp("clean")
    train, val = documents(random_texts(TRAIN_DOCUMENTS, 1)), documents(random_texts(200, 2))
    shutil.copy(trained["bytes"], folder)
    codec = load_codec(folder / "bytes.json")
    write_dataset(folder, codec, train, val, {}, shard_tokens=400_000, num_threads=1)
    return folder


@pytest.fixture
def dataset(clean, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(clean, tmp_path / "data"))


def change_shard(folder: Path, name: str, change) -> None:
    """Write a shard with other tokens, and the manifest to match the file."""
    write_shard(folder / name, change(np.array(read_shard(folder / name))))
    manifest = read_json(folder / "manifest.json")
    for entry in (
        manifest["train"]["shards"] + manifest["val"]["shards"] + manifest["val"].get("sidecars", [])
    ):
        entry["sha256"] = sha256_file(folder / entry["file"])
    write_manifest(folder, manifest)


def faults(folder: Path, *arguments) -> dict[str, str]:
    """The checks that fail and what they say."""
    return {row.check: row.detail for row in examine(folder, *arguments) if row.state == "FAIL"}


# ---- Clean data -------------------------------------------------------------------------------------


def test_clean_data_has_no_finding(clean, capsys):
    """A check that cries wolf is switched off."""
    assert {row.state for row in examine(clean)} == {"ok", "skipped"}
    assert doctor.main([str(clean), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["findings"]) == 10
    assert doctor.main([str(clean)]) == 0
    assert capsys.readouterr().out.count("\n") == 10


def test_a_contest_folder_without_a_manifest_is_examined(dataset, trained):
    """Downloaded shards have no manifest of ours."""
    (dataset / "manifest.json").unlink()
    assert faults(dataset, trained["bytes"]) == {}


def test_downloaded_shards_are_compared_with_the_record_of_the_download(dataset):
    """The hub's client checks sizes once; a disk goes bad later."""
    files = sorted(dataset.glob("fineweb_*.bin"))
    record = {f"datasets/{dataset.name}/{path.name}": {"sha256": sha256_file(path)} for path in files}
    write_json(dataset / "download.json", {"files": record | {"tokenizers/a.model": {"sha256": "0"}}})
    (dataset / "manifest.json").unlink()
    assert faults(dataset) == {}
    files[-1].write_bytes(files[-1].read_bytes()[:-2] + b"ab")
    assert faults(dataset) == {"manifest": f"{files[-1].name} is not the file that was written (sha256)"}


# ---- Damaged files ----------------------------------------------------------------------------------


def test_a_flipped_byte_is_found(dataset):
    """It is another token; no size or count shows it."""
    path = dataset / "fineweb_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    found = faults(dataset)
    assert list(found) == ["manifest"] and "fineweb_train_000001.bin is not the file" in found["manifest"]


@pytest.mark.parametrize("size", [0, 700, 2000])
def test_a_truncated_shard_is_found(dataset, size, capsys):
    """A download that stopped, at any place."""
    path = dataset / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:size])
    assert "fineweb_train_000000.bin: expected" in faults(dataset)["files"]
    assert doctor.main([str(dataset)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_missing_and_foreign_shards_are_found(dataset):
    """A loader takes every shard that it finds."""
    (dataset / "fineweb_train_000001.bin").rename(dataset / "fineweb_train_000007.bin")
    assert faults(dataset)["manifest"].split("; ") == [
        "fineweb_train_000001.bin is missing",
        "fineweb_train_000007.bin is not in the manifest",
    ]


# ---- Wrong tokens -----------------------------------------------------------------------------------


def test_a_doubled_bos_is_found(dataset):
    """An empty document costs a token and counts no byte."""
    change_shard(dataset, "fineweb_val_000000.bin", lambda tokens: np.insert(tokens, 0, 1)[:-1])
    found = faults(dataset)
    assert "BOS twice at token 1" in found["val documents"]
    assert "expected 200 documents, found 201 BOS" in found["val documents"]
    assert "bytes, the tokens have" in found["val totals"]


def test_a_last_document_that_is_empty_is_found(dataset):
    """Its BOS has no successor to be twice with."""
    change_shard(dataset, "fineweb_val_000000.bin", lambda tokens: np.append(tokens, 1))
    assert "the last document is empty" in faults(dataset)["val documents"]


def test_a_missing_first_bos_is_found(dataset):
    """Without BOS no document can be told from the next."""
    change_shard(dataset, "fineweb_train_000000.bin", lambda tokens: tokens[1:])
    assert "does not begin with BOS 1" in faults(dataset)["train documents"]


def test_another_tokenizers_ids_are_found(dataset, trained):
    """Too large for this vocabulary, or of another count of bytes, or of another file."""
    change_shard(dataset, "fineweb_val_000000.bin", lambda tokens: np.where(tokens == 105, 300, tokens))
    found = faults(dataset)
    assert found["tokenizer"] == "fineweb_val_000000.bin: id 300 of 260"
    assert "val totals" in found
    assert "expected sha256" in faults(dataset, trained["bese"])["tokenizer"]


def test_the_contests_total_is_known(dataset, monkeypatch):
    """50,000 documents of 151.08 MB: another total is another text or another count."""
    (dataset / "manifest.json").unlink()
    monkeypatch.setattr(doctor, "CONTEST_VAL_DOCS", 200)
    assert "151.06 to 151.10 MB" in faults(dataset, dataset / "bytes.json")["val totals"]


def test_a_wrong_sidecar_is_found(normalising_case_ops, tmp_path):
    """The score divides by its sum."""
    texts = ["The Model Reads", "Bytes  and Tokens"] * 3
    train, val = documents(["one More document"]), documents(texts)
    write_dataset(tmp_path, normalising_case_ops, train, val, {}, num_threads=1)
    tokenizer = normalising_case_ops.path
    assert faults(tmp_path, tokenizer) == {}
    name = "fineweb_val_bytes_000000.bin"
    change_shard(tmp_path, name, lambda sizes: np.concatenate([[1], sizes[1:]]))
    found = faults(tmp_path, tokenizer)["sidecars"]
    assert "BOS counts bytes" in found and "bytes of text" in found
    change_shard(tmp_path, name, lambda sizes: sizes[:-1])
    assert "expected" in faults(tmp_path, tokenizer)["sidecars"]
    (tmp_path / name).unlink()
    assert "none beside" in faults(tmp_path, tokenizer)["sidecars"]


# ---- Overlap ----------------------------------------------------------------------------------------


def plant(folder: Path, change, count: int = 10) -> None:
    """Put changed copies of the first validation documents behind the training documents."""
    codec = load_codec(folder / "bytes.json")
    texts = [change(text) for text in random_texts(count, 2)]
    parts = [np.concatenate([[codec.bos_id], codec.encode(text)]) for text in texts]
    change_shard(folder, "fineweb_train_000003.bin", lambda tokens: np.concatenate([tokens, *parts]))


@pytest.mark.parametrize(
    ("change", "message"),
    [(str, "validation document 9 is training document 10009"),
     (lambda text: "etc " + text, "training holds 100% of validation document 9"),
     (lambda text: text[:-3] + "xyz", "training holds 100% of validation document 9")],
)  # fmt: skip
def test_ten_planted_documents_among_ten_thousand_are_found(dataset, change, message, monkeypatch):
    """The known leak: most of a record's validation text lay in its training shards."""
    monkeypatch.setattr(doctor, "NUM_NAMED", 100)
    plant(dataset, change)
    found = faults(dataset)["overlap"].split("; ")
    assert len(found) == 10 and found[-1] == message


def test_a_shared_passage_is_a_note_and_no_fault(dataset):
    """Licences and menus are in every crawl."""
    codec = load_codec(dataset / "bytes.json")
    common = "a licence that many pages show, word for word, at their very end.."
    long = codec.encode(common + "".join(random_texts(3, 9)))
    for name in ("fineweb_train_000003.bin", "fineweb_val_000000.bin"):
        text = long if "val" in name else codec.encode(common)
        change_shard(dataset, name, lambda tokens, text=text: np.concatenate([tokens, [1], text]))
    states = {row.check: row for row in examine(dataset)}
    assert states["overlap"].state == "ok"
    assert states["natural duplicates"].detail.startswith("1 validation documents share a passage")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 300_000), min_size=WINDOW, max_size=WINDOW + 40))
def test_window_hashes_are_the_polynomial_of_each_window(tokens):
    """Doubling is for speed only."""
    expected = []
    for i in range(len(tokens) - WINDOW + 1):
        value = 0
        for token in tokens[i : i + WINDOW]:
            value = (value * doctor.BASE + (token + 1) * doctor.BASE) % 2**64
        expected.append(value * doctor.BASE % 2**64)
    assert window_hashes(np.array(tokens, np.uint32)).tolist() == expected


def test_documents_that_cross_shards_and_blocks_are_whole(dataset, monkeypatch):
    """A copy cut by a shard's end must be found all the same."""
    monkeypatch.setattr(doctor, "BLOCK_TOKENS", 1000)
    plant(dataset, str)
    assert faults(dataset)["overlap"].count("is training document") == doctor.NUM_NAMED
    data = doctor.Dataset(dataset, load_codec(dataset / "bytes.json"))
    joined = np.concatenate(list(data.documents("train")))
    assert np.array_equal(joined, np.concatenate(list(data.shards["train"].values())))


def test_a_missing_folder_is_a_user_error(tmp_path):
    """A typing mistake is not a clean dataset."""
    with pytest.raises(UserError, match="no such folder"):
        examine(tmp_path / "absent")
