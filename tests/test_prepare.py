"""From text files to shards: every format, every bad input, and folders that are whole or unfinished."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard
from fixtures_data import small_texts
from fixtures_model import ROOT

from common import UserError, run_command, sha256_file
from data.codecs import load_codec
from data.prepare import Document, ShardWriter, main, read_documents, write_dataset, write_manifest
from data.selection import difficulty, is_good
from data.shards import find_shards, read_manifest, read_shard, write_shard
from durable.lock import lock_folder

TEXTS = small_texts(70, seed=1)


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def documents(texts: list[str], name: str = "memory") -> list[Document]:
    return [Document(text, f"{name}:{number}") for number, text in enumerate(texts, start=1)]


def texts_of(out: Path, split: str, codec) -> list[str]:
    """Read a split back: documents start at BOS, shards continue each other."""
    ids = np.concatenate([read_shard(path) for path in find_shards(out / f"fineweb_{split}_*.bin")])
    assert ids[0] == codec.bos_id
    return [
        codec.decode(part[1:]).decode() for part in np.split(ids, np.flatnonzero(ids == codec.bos_id))[1:]
    ]


@pytest.fixture
def source(tmp_path):
    """A .jsonl file of 70 documents."""
    path = tmp_path / "source.jsonl"
    path.write_bytes(json_lines(TEXTS))
    return path


@pytest.fixture
def prepare(lossless_model, tmp_path):
    """Run the command in this process; returns the output folder."""
    out = tmp_path / "out"

    def run(*arguments) -> Path:
        paths = ["--tokenizer", str(lossless_model), "--out", str(out)]
        main([*paths, "--num-threads", "1", *map(str, arguments)])
        return out

    return run


# ---- Selection of training documents ----------------------------------------------------------------


GOOD = " ".join(f"word{i}" for i in range(50))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (GOOD, True),
        (GOOD.removesuffix(" word49"), False),  # 49 words
        (" ".join(f"w{i % 20}" for i in range(80)), True),  # 20 / 80 = 0.25
        (" ".join(f"w{i % 19}" for i in range(80)), False),
        (GOOD + " Click here, sign up", True),
        (GOOD + " Click here, sign up, privacy policy", False),
    ],
)
def test_the_quality_filter_has_system_bs_bounds(text, kept):
    """50 words, a quarter of them different, two marks of boilerplate: each bound is inclusive."""
    assert is_good(text) is kept


def test_difficulty_is_system_bs_formula():
    """Six words, five different, 3.5 characters each, two sentences."""
    assert difficulty("The cat sat. The big dogs!") == pytest.approx(0.3 * 3.5 / 10 + 0.4 * 5 / 6 + 0.3 * 0.1)
    assert difficulty(" \n") == 0.0


@pytest.mark.parametrize("val_first", [True, False])
def test_selection_changes_training_documents_alone(prepare, tmp_path, lossless_codec, val_first):
    """A validation set that is filtered or sorted is another one: system B's score compared with none."""
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 60, size)) + "." for size in range(30, 90)]
    source, val = tmp_path / "source.jsonl", tmp_path / "val.jsonl"
    source.write_bytes(json_lines(texts))
    val.write_bytes(json_lines(TEXTS[:3] + ["short"]))
    choice = ["--val-docs", 10] if val_first else ["--val-input", val]
    selected = ["--train-filter", "quality", "--train-order", "difficulty", "--train-docs", 20]
    out = prepare("--input", source, *choice, *selected)
    train = texts[10:] if val_first else texts
    kept = [text for text in train if is_good(text)]
    assert texts_of(out, "train", lossless_codec) == sorted(kept, key=difficulty)[:20] != kept[:20]
    assert texts_of(out, "val", lossless_codec) == (texts[:10] if val_first else [*TEXTS[:3], "short"])
    manifest = read_manifest(out)
    facts = {"filter": "quality", "order": "difficulty", "most": 20, "dropped": len(train) - len(kept)}
    assert manifest["sources"]["train_selection"] == facts and 20 < len(kept) < len(train)
    first, last = manifest["train"]["documents"]
    assert last - first == 20


@pytest.mark.parametrize("option", ["--val-filter", "--val-order"])
def test_selecting_validation_documents_is_refused(prepare, source, option):
    """System B's filter ran over validation too and took 2.7 % of its bytes away."""
    with pytest.raises(UserError, match="scored whole"):
        prepare("--input", source, option, "quality")


# ---- What is written --------------------------------------------------------------------------------


def test_documents_come_back_from_the_shards_and_every_byte_is_counted(prepare, source, lossless_codec):
    """A score is bits per byte of exactly this text."""
    out = prepare("--input", source, "--val-docs", 7)
    manifest = read_manifest(out)
    assert texts_of(out, "val", lossless_codec) == TEXTS[:7]
    assert texts_of(out, "train", lossless_codec) == TEXTS[7:]
    for split, texts in (("val", TEXTS[:7]), ("train", TEXTS[7:])):
        num_bytes = sum(len(text.encode()) for text in texts)
        assert manifest[split]["raw_bytes"] == manifest[split]["token_bytes"] == num_bytes
    assert manifest["val"]["expected_token_bytes"] == manifest["val"]["token_bytes"]
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == ([0, 7], [7, 70])
    assert (manifest["format"], manifest["split"]) == (1, "first_documents")


def test_the_manifest_describes_files_and_tokenizer(prepare, source, lossless_codec):
    """Others check a dataset by its manifest alone."""
    out = prepare("--input", source, "--shard-tokens", 1000)
    manifest = read_manifest(out)
    assert manifest["tokenizer"] == {
        "kind": "sentencepiece",
        "file": "small.model",
        "sha256": lossless_codec.digest,
        "vocab_size": 400,
        "bos_id": 1,
        "lossless": True,
        "by_contest_rule": False,
    }
    for split in ("train", "val"):
        shards = manifest[split]["shards"]
        assert [shard["file"] for shard in shards] == [
            p.name for p in find_shards(out / f"fineweb_{split}_*.bin")
        ]
        assert sum(shard["tokens"] for shard in shards) == manifest[split]["tokens"]
        for shard in shards:
            path = out / shard["file"]
            assert (shard["bytes"], shard["sha256"]) == (path.stat().st_size, sha256_file(path))
            assert shard["tokens"] == read_shard(path).size
    assert manifest["sources"]["input"] == [{"file": source.name, "bytes": source.stat().st_size}]


def test_every_shard_of_a_large_vocabulary_has_four_bytes_a_token(tmp_path):
    """Ids above 65,535 would wrap in two; a shard without such ids is read with the same tokenizer."""
    writer = ShardWriter(tmp_path, "train", shard_tokens=3, vocab_size=100_000)
    writer.add(np.array([1, 2, 3, 4, 99_999], dtype=np.int32))
    writer.flush()
    shards = [read_shard(path) for path in find_shards(tmp_path / "fineweb_train_*.bin")]
    assert [(shard.tolist(), shard.dtype) for shard in shards] == [([1, 2, 3], "<u4"), ([4, 99_999], "<u4")]


def test_shards_are_full_but_for_the_last_and_length_changes_no_token(prepare, source, lossless_codec):
    """Documents may cross shards, as in the contest's; a loader reads them as one stream."""
    out = prepare("--input", source, "--shard-tokens", 1000)
    sizes = [read_shard(path).size for path in find_shards(out / "fineweb_train_*.bin")]
    assert len(sizes) > 2 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert texts_of(out, "train", lossless_codec) == TEXTS[50:]


def test_batches_change_no_token(prepare, source, lossless_codec, monkeypatch):
    """Text streams through in batches; where they end must not show."""
    monkeypatch.setattr("data.documents.BATCH_BYTES", 700)
    assert texts_of(prepare("--input", source), "train", lossless_codec) == TEXTS[50:]


def test_validation_is_fifty_documents_or_one_percent(prepare, tmp_path):
    """Small corpora need documents enough to measure on; large ones need no more than a percent."""
    for num_texts, num_val in ((51, 50), (5200, 52)):
        path = tmp_path / "many.jsonl"
        path.write_bytes(json_lines([f"text {i}" for i in range(num_texts)]))
        assert read_manifest(prepare("--input", path))["val"]["documents"] == [0, num_val]


def test_the_contests_text_has_the_contests_validation_set(prepare, tmp_path, monkeypatch, capsys):
    """Its first 50,000 documents, nothing else without a word: 10,000 were a leak (issue 2127)."""
    monkeypatch.setattr("data.prepare.CONTEST_VAL_DOCS", 30)
    path, zipped = tmp_path / "docs_selected.jsonl", tmp_path / "docs_selected.jsonl.gz"
    path.write_bytes(json_lines(TEXTS))
    zipped.write_bytes(gzip.compress(json_lines(TEXTS)))
    for file in (path, zipped):
        out = prepare("--input", file)
        assert read_manifest(out)["val"]["documents"] == [0, 30]
        assert read_manifest(out)["train"]["documents"] == [30, 70]
        assert "compare with none" not in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_bytes(json_lines(small_texts(20, seed=2)))
    for choice in (["--val-docs", 10], [path.with_name("other.jsonl"), "--val-docs", 30]):
        prepare("--input", *choice[:-2], path, *choice[-2:])
        assert read_manifest(out)["val"]["documents"] == [0, choice[-1]]
        assert "first 30 documents of docs_selected.jsonl; scores on this one" in capsys.readouterr().err


def test_a_separate_validation_input_counts_from_zero_and_is_all_used(
    prepare, source, tmp_path, lossless_codec
):
    """Each range counts in its own input; the manifest says which kind of split it is."""
    val = tmp_path / "val.txt"
    val.write_text("held out\n")
    manifest = read_manifest(out := prepare("--input", source, "--val-input", val))
    assert texts_of(out, "val", lossless_codec) == ["held out\n"]
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == ([0, 1], [0, 70])
    assert manifest["split"] == "separate_input"


def test_a_normalising_codec_keeps_both_byte_counts(tmp_path, lossless_codec):
    """The contest's own models lose bytes; both numbers are needed to compare scores."""

    class Lossy:
        """Counts one byte a token."""

        lossless = False

        def __getattr__(self, name):
            return getattr(lossless_codec, name)

        def token_bytes(self, ids):
            return (np.asarray(ids) != 1).astype(np.int32)

    manifest = write_dataset(tmp_path, Lossy(), documents(["abc"]), documents(["xyzxyz"]), {}, num_threads=1)
    assert manifest["val"]["raw_bytes"] == 6
    assert manifest["val"]["token_bytes"] == manifest["val"]["tokens"] - 1


def test_a_lossless_codec_that_miscounts_is_stopped(tmp_path, lossless_codec, monkeypatch):
    """A wrong byte count is a wrong score; the document is named."""
    monkeypatch.setattr(
        type(lossless_codec), "token_bytes", lambda self, ids: np.ones(len(ids), dtype=np.int32)
    )
    with pytest.raises(UserError, match=r"memory:1: .* counts 4 bytes of this document of 3"):
        write_dataset(tmp_path, lossless_codec, documents(["a"]), documents(["b b"]), {}, num_threads=1)
    assert read_manifest(tmp_path) is None


# ---- What is read -----------------------------------------------------------------------------------


def write_parquet(path: Path, texts: list, column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)


def test_every_format_gives_the_same_documents(tmp_path):
    """One corpus, five ways to hand it in; each document knows its file and line."""
    lines = json_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines.replace(b"\n", b"\r\n", 3) + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines[:500]) + zstandard.compress(lines[500:]))
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert list(read_documents([tmp_path / name])) == documents(TEXTS, str(tmp_path / name))
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    assert list(read_documents([tmp_path / "a.txt"])) == [Document(TEXTS[0], str(tmp_path / "a.txt"))]


def test_parquet_without_pyarrow_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    """pyarrow is large and only needed here."""
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_documents([tmp_path / "a.parquet"]))


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel", "caseops", "bese", "bytes"])
def test_a_line_of_a_million_characters_is_a_document(kind, trained, lossless_model, tmp_path):
    """Minified code and base64 have no spaces: no kind may take quadratic time or memory for them."""
    line = ("aB1=" * 50 + "\u00e9" * 50) * 4000
    source = tmp_path / "long.jsonl"
    source.write_bytes(json_lines([line, "the other document"]))
    tokenizer = str(trained.get(kind, lossless_model))
    arguments = ["--tokenizer", tokenizer, "--input", str(source), "--val-docs", "1", "--num-threads", "1"]
    main([*arguments, "--out", str(tmp_path / "long")])
    assert read_manifest(tmp_path / "long")["val"]["token_bytes"] == len(line.encode()) == 1_200_000


def test_zstd_files_with_a_long_window_are_read(tmp_path):
    """`zstd --long=31` asks for a window that the decoder refuses by default."""
    path = tmp_path / "long.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(
        window_log=28, strategy=zstandard.STRATEGY_FAST, hash_log=10
    )
    file = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file, closefd=False) as writer:
        writer.write(json_lines(["text"]))  # of unknown size: the frame keeps the long window
    path.write_bytes(file.getvalue())
    assert [document.text for document in read_documents([path])] == ["text"]


BAD_FILES = [
    ("bad.txt", b"good\nline\n\xff", r"bad\.txt:3: not UTF-8"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"bad\.jsonl:2: not valid JSON \(.*codec"),
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": "a"\n', r"bad\.jsonl:3: not valid JSON"),
    ("bad.jsonl", b'{"body": "a"}\n', r"bad\.jsonl:1: expected .* \"text\", found keys \['body'\]"),
    ("bad.jsonl", b'{"text": 7}\n', r"bad\.jsonl:1: expected .* \"text\""),
    ("bad.jsonl", b'["text"]\n', r"bad\.jsonl:1: expected .* found list"),
    ("bad.jsonl", b'{"text": "\\ud800"}\n', r"bad\.jsonl:1: .* surrogate"),
    ("bad.jsonl.gz", b"plain text", r"bad\.jsonl\.gz: not a whole gzip file"),
    ("bad.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-9], r"bad\.jsonl\.gz: not a whole gzip file"),
    ("bad.jsonl.zst", b"plain text", r"bad\.jsonl\.zst: not a zstd file"),
    ("bad.jsonl.zst", zstandard.compress(json_lines(TEXTS))[:-1], r"bad\.jsonl\.zst: .* cut off"),
    ("bad.parquet", b"plain text", r"bad\.parquet: not a parquet file"),
    ("bad.csv", b"a,b\n", r"bad\.csv: unknown suffix '.csv'\. Expected one of \.txt, \.jsonl"),
    ("bad.json", b"{}", r"bad\.json: unknown suffix"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_input_is_an_error_that_names_file_and_line(prepare, source, tmp_path, name, content, message):
    """In a corpus of gigabytes nobody finds a bad line by hand. Nothing that looks finished is left."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("--input", source, tmp_path / name)
    assert read_manifest(tmp_path / "out") is None


def test_empty_files_and_documents_are_left_out_with_a_note(prepare, source, tmp_path, capsys):
    """One among a thousand must not end an hour's work; nothing else in the input is an error."""
    for name, content in {
        "a.txt": b"",
        "b.jsonl": b"\n\n",
        "c.jsonl": b'{"text": ""}\n{"text": "c"}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl")]
    out = prepare("--input", source, *files)
    assert read_manifest(out)["train"]["documents"][1] == len(TEXTS) + 1
    notes = capsys.readouterr().err
    assert all(notes.count(f"{path}: holds no document\n") == 1 for path in files[:2])
    assert notes.count(f"{files[2]}: left out 1 empty documents; the first: {files[2]}:1\n") == 1
    with pytest.raises(UserError, match=r"a\.txt .*b\.jsonl: expected documents, found none"):
        prepare("--input", *files[:2])


def test_bad_parquet_cells_are_errors_that_name_file_and_row(tmp_path):
    """A column of numbers, a missing column and an absent value are the usual mistakes."""
    path = tmp_path / "bad.parquet"
    for texts, column, message in (
        (["a"], "body", r"bad\.parquet: expected a column \"text\", found \['body', 'id'\]"),
        (["a", None], "text", r"bad\.parquet:2: expected a string"),
        ([1, 2], "text", r"bad\.parquet: expected strings in the column \"text\", found int64"),
    ):
        write_parquet(path, texts, column)
        with pytest.raises(UserError, match=message):
            list(read_documents([path]))


def test_a_missing_input_is_an_error_before_any_work(prepare, source, tmp_path):
    """A typing mistake in the last of many files shows at once, not after an hour."""
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        prepare("--input", source, tmp_path / "absent.jsonl")
    assert not (tmp_path / "out").exists()


def test_validation_that_takes_every_document_is_an_error(prepare, source):
    """A dataset without training tokens would fail far from its cause."""
    with pytest.raises(UserError, match="at least one document for train"):
        prepare("--input", source, "--val-docs", 70)


@pytest.mark.parametrize("option", ["--val-docs", "--shard-tokens", "--num-threads"])
def test_counts_below_one_are_errors(prepare, source, option, capsys):
    """Zero would mean "default" to one reader and "none" to another."""
    with pytest.raises(SystemExit) as exit_info:
        prepare("--input", source, option, 0)
    assert exit_info.value.code == 2
    assert f"argument {option}: expected a whole number from 1 on, found '0'" in capsys.readouterr().err


@pytest.mark.parametrize("separate", [True, False])
def test_a_validation_document_is_left_out_of_training_and_said_so(
    prepare, source, tmp_path, separate, lossless_codec, capsys
):
    """A model scores well on text that it has seen; crawls repeat themselves, so it is no error."""
    other = tmp_path / "other.jsonl"
    other.write_bytes(json_lines(["new", TEXTS[4], TEXTS[4]]))
    if separate:
        out = prepare("--input", source, "--val-input", other)
        expected = TEXTS[:4] + TEXTS[5:]
    else:
        out = prepare("--input", source, other, "--val-docs", 5)
        expected = [*TEXTS[5:], "new"]
    assert texts_of(out, "train", lossless_codec) == expected
    left_out = 1 if separate else 2
    assert read_manifest(out)["train"]["left_out"] == left_out
    note = capsys.readouterr().err
    assert f"left out {left_out} training documents that are also in validation" in note
    assert "source.jsonl:5" in note and "other.jsonl:2" in note


# ---- Other tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bytelevel", "superbpe", "caseops"])
def test_lossless_kinds_give_the_documents_back_from_shards(trained, codecs, source, tmp_path, kind):
    """Whatever the tokenizer, a score is bits per byte of exactly this text."""
    paths = ["--tokenizer", str(trained[kind]), "--out", str(tmp_path / kind), "--num-threads", "1"]
    main([*paths, "--input", str(source), "--val-docs", "7"])
    assert texts_of(tmp_path / kind, "val", codecs[kind]) == TEXTS[:7]
    manifest = read_manifest(tmp_path / kind)
    assert manifest["val"]["raw_bytes"] == manifest["val"]["expected_token_bytes"]
    assert manifest["tokenizer"]["kind"] == codecs[kind].kind
    assert not list((tmp_path / kind).glob("*_bytes_*"))


def test_a_normalising_case_ops_model_writes_the_bytes_of_validation_beside_it(
    normalising_case_ops, source, tmp_path
):
    """The contest's layout: same shards, same lengths, BOS 0, and a total that is the text's."""
    out = tmp_path / "case"
    paths = ["--tokenizer", str(normalising_case_ops.path), "--out", str(out), "--shard-tokens", "1000"]
    main([*paths, "--input", str(source), "--val-docs", "7"])
    val = [read_shard(path) for path in find_shards(out / "fineweb_val_*.bin")]
    sizes = [read_shard(path) for path in sorted(out.glob("fineweb_val_bytes_*.bin"))]
    assert [shard.size for shard in sizes] == [shard.size for shard in val] and len(val) > 1
    ids, sizes = np.concatenate(val), np.concatenate(sizes)
    raw_bytes = sum(len(text.encode()) for text in TEXTS[:7])
    assert sizes.sum() == raw_bytes == read_manifest(out)["val"]["expected_token_bytes"]
    assert not sizes[ids == normalising_case_ops.bos_id].any()
    assert [shard["file"] for shard in read_manifest(out)["val"]["sidecars"]] == sorted(
        path.name for path in out.glob("*_bytes_*")
    )


def test_a_document_that_a_normalising_model_drops_is_refused_with_its_place(normalising_case_ops, tmp_path):
    """Its bytes would be counted nowhere."""
    path = tmp_path / "spaces.jsonl"
    path.write_bytes(json_lines(["text", "  "]))
    arguments = ["--tokenizer", str(normalising_case_ops.path), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"spaces\.jsonl:2: the tokenizer keeps nothing"):
        main([*arguments, "--input", str(path), "--val-docs", "2"])


# ---- Folders ----------------------------------------------------------------------------------------


def test_a_shorter_dataset_leaves_no_shard_of_a_longer_one(prepare, source, tmp_path):
    """A loader takes every shard in the folder; a stale one would be trained on, or scored."""
    out = prepare("--input", source, "--shard-tokens", 100)
    (out / "fineweb_val_bytes_000000.bin").touch()  # a stale byte sidecar
    tokenizer = (out / "small.model").read_bytes()
    (out / "small.model").write_bytes(b"of an earlier dataset")
    prepare("--input", source)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
        "small.model",  # DATA_PATH alone finds it
    ]
    assert (out / "small.model").read_bytes() == tokenizer


def test_a_run_that_fails_leaves_the_former_dataset_as_it_was(prepare, source, tmp_path):
    """It may have taken hours, and a run may be reading it."""
    out = prepare("--input", source)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "bad.jsonl").write_bytes(b"bad\n")
    for arguments in (("--shard-tokens", 300), ()):
        with pytest.raises(UserError, match="not valid JSON"):
            prepare("--input", source, tmp_path / "bad.jsonl", "--val-docs", 60, *arguments)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare("--input", source, "--val-docs", 60)
    assert read_manifest(out)["train"]["documents"] == [60, 70]


def test_a_second_run_into_a_folder_is_refused_before_it_reads_anything(prepare, source, tmp_path):
    """Two of them would replace each other's shards; the first is named."""
    with lock_folder(tmp_path / "out"):
        (tmp_path / "bad.jsonl").write_bytes(b"bad\n")
        with pytest.raises(UserError, match=rf"out: in use by process {os.getpid()} on "):
            prepare("--input", tmp_path / "bad.jsonl")
    prepare("--input", source)


STOPS_AT_THE_FIRST_TRAINING_SHARD = """
import sys, time
import data.prepare

write = data.prepare.write_shard

def write_and_stop(path, *rest):
    write(path, *rest)
    if "train" in path.name:
        print("half way", flush=True)
        time.sleep(60)

data.prepare.write_shard = write_and_stop
data.prepare.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_half_way_changes_nothing_and_completes_when_run_again(lossless_model, source, tmp_path):
    """A machine that vanishes leaves half a dataset: it must not take the place of a whole one."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--tokenizer", lossless_model, "--input", source, "--num-threads", 1]
    arguments = list(map(str, arguments))
    main([*arguments, "--out", str(out), "--val-docs", "60"])
    before = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
    arguments += ["--shard-tokens", "500"]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_AT_THE_FIRST_TRAINING_SHARD, *arguments, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    assert list(out.glob(".staging/fineweb_train_*.bin"))
    assert {path.name: path.read_bytes() for path in out.glob("[!.]*")} == before
    assert find_shards(out / "fineweb_train_*.bin")
    for folder in (out, whole):
        main([*arguments, "--out", str(folder)])
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_shards_of_another_tokenizer_are_not_replaced(prepare, source, tmp_path):
    """Token ids of two tokenizers in one folder are noise; an old dataset may still be in use."""
    out = prepare("--input", source)
    changed = read_manifest(out)
    changed["tokenizer"]["sha256"] = "0" * 64
    write_manifest(out, changed)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"another tokenizer .*Choose another --out folder"):
        prepare("--input", source)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shards_that_this_command_did_not_write_are_not_replaced(prepare, source, tmp_path):
    """A downloaded dataset has no manifest beside its shards, and takes hours to fetch again."""
    write_shard(tmp_path / "out" / "fineweb_train_000000.bin", np.arange(10))
    with pytest.raises(UserError, match="did not write"):
        prepare("--input", source)
    assert read_shard(tmp_path / "out" / "fineweb_train_000000.bin").size == 10


# ---- The process ------------------------------------------------------------------------------------


def test_the_command_closes_with_a_table(prepare, source, capsys):
    """What was written is seen without opening the manifest."""
    prepare("--input", source, "--val-docs", 7)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["split", "documents", "bytes", "tokens", "bytes/token", "shards"]
    assert [line.split()[:2] for line in table[2:4]] == [["train", "63"], ["val", "7"]]
    assert [line.split()[:2] for line in table[4:]] == [["train", "lossless;"], ["val", "lossless;"]]


def test_a_user_error_ends_the_process_with_one_message_and_status_1(source, tmp_path):
    """No traceback: the message is for the reader of the command, not of the code."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "data.prepare",
            "--input",
            source,
            "--tokenizer",
            "no.model",
            "--out",
            tmp_path,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: no.model: no such tokenizer file")
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_an_interrupt_ends_the_process_with_status_130():
    """Shells and schedulers tell an interrupt from a failure by it."""

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        run_command(interrupted)
    assert exit_info.value.code == 130


@pytest.mark.slow
@pytest.mark.reference("E11")
def test_system_es_rows_split_without_overlap(trained, tmp_path):
    """637,270 rows: 605,406 train and 31,864 validate, no row on both sides (system E trained on all)."""
    texts = (Document(str(number), f"rows:{number}") for number in range(637_270))
    codec = load_codec(trained["bytes"])
    num_val = 637_270 - int(0.95 * 637_270)
    out = tmp_path / "rows"
    manifest = write_dataset(out, codec, texts, islice(texts, num_val), {}, split="first_documents")
    assert manifest["val"]["documents"] == [0, 31_864]
    assert manifest["train"]["documents"] == [31_864, 637_270]
    rows = [texts_of(out, split, codec) for split in ("val", "train")]
    assert list(map(len, rows)) == [31_864, 605_406]
    assert rows[0] + rows[1] == list(map(str, range(637_270)))
