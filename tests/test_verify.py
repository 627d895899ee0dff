"""`python -m data.tokenizer verify` and `report`: sound tokenizers pass, each known fault is found."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import SIZES, corpora, needs_corpora, shared, small_texts

import data.tokenizer
import train_gpt
from common import UserError, write_json
from data.codecs import load_codec
from data.codecs.caseops import CASE_OPERATORS, to_case_operators
from data.prepare import Document
from data.train_tokenizer import CONTEST_OPTIONS, train_sentencepiece, train_tokenizer
from data.verify import compare_codec, verify_codec
from durable.seals import write_sealed
from formats.recipe import with_values

TEXTS = [*small_texts(12, seed=5), "A Title, caf\u00e9! \u201cx\u201d", " a  b "]
DOCUMENTS = [Document(text, f"memory:{i}") for i, text in enumerate(TEXTS, start=1)]
RAW_BYTES = sum(len(text.encode()) for text in TEXTS)
KEYS = {
    "lossless", "documents", "raw_bytes", "token_bytes", "mismatched_documents", "round_trip_failures",
}  # fmt: skip


@pytest.fixture(scope="module")
def contest_codec(tmp_path_factory):
    """A model trained with the contest's options."""
    path = tmp_path_factory.mktemp("contest") / "contest.model"
    train_tokenizer(small_texts(), 400, path, "contest")
    return load_codec(path)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


# ---- Sound tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in SIZES if kind != "bese"])
def test_lossless_kinds_pass(codecs, kind):
    """Every document comes back and every byte is counted."""
    report = verify_codec(codecs[kind], DOCUMENTS)
    assert report["passed"] and report["lossless"]
    assert report["documents"] == len(TEXTS)
    assert report["raw_bytes"] == report["token_bytes"] == RAW_BYTES
    assert report["mismatched_documents"] == report["round_trip_failures"] == report["undeclared_losses"] == 0


def test_bese_passes_with_its_exact_loss(codecs):
    """What is declared lost is lost and no more; the documents that lose most are named."""
    report = verify_codec(codecs["bese"], DOCUMENTS)
    assert report["passed"] and not report["lossless"]
    assert report["raw_bytes"] == report["token_bytes"] == RAW_BYTES
    assert (report["mismatched_documents"], report["undeclared_losses"]) == (0, 0)
    assert report["round_trip_failures"] == len(TEXTS) - 1  # all but " a  b "
    distances = [row["byte_distance"] for row in report["worst_documents"]]
    assert distances == sorted(distances, reverse=True) and len(distances) == 5


def test_the_contests_models_pass_by_the_contests_rule(contest_codec):
    """They drop spaces; the total that the contest divides by stands beside the raw one."""
    report = verify_codec(contest_codec, DOCUMENTS)
    assert report["passed"] and not report["lossless"]
    assert report["token_bytes"] < report["raw_bytes"] == RAW_BYTES
    assert report["mismatched_documents"] == 0


def test_case_ops_over_a_normalising_model_counts_raw_bytes(tmp_path):
    """Its sidecar counts the original text, as the contest demands."""
    options = CONTEST_OPTIONS | {"user_defined_symbols": list(CASE_OPERATORS)}
    path = tmp_path / "case.model"
    path.write_bytes(train_sentencepiece([to_case_operators(text) for text in small_texts()], 400, options))
    report = verify_codec(load_codec(path), DOCUMENTS)
    assert report["passed"] and not report["lossless"]
    assert report["token_bytes"] == report["raw_bytes"] == RAW_BYTES


# ---- Faults -----------------------------------------------------------------------------------------


def broken(codec, **fields):
    """Copy a codec with other fields."""
    changed = copy.copy(codec)
    vars(changed).update(fields)
    return changed


def resized(codec, token: int, size: int):
    sizes = codec._sizes.copy()
    sizes[token] = size
    return broken(codec, _sizes=sizes)


def test_a_byte_counted_as_its_replacement_character_is_found(codecs):
    """Sizes taken from decode() count 3 for half of a character: 4 % too many bytes once won a record."""
    codec = codecs["bytelevel"]
    token = codec._pieces.index(b"\xc3")
    report = verify_codec(resized(codec, token, 3), [DOCUMENTS[0]])
    assert not report["passed"]
    assert report["byte_table_errors"] == [{"id": token, "expected": 1, "counted": 3}]


def test_a_doubled_space_is_found(contest_codec):
    """A table that holds the space already, and a scorer that adds it again, count 17 % too many bytes."""
    base = contest_codec._base_bytes + contest_codec._leading_space
    report = verify_codec(broken(contest_codec, _base_bytes=base), DOCUMENTS)
    assert not report["passed"]
    assert report["mismatched_documents"] == len(TEXTS)
    assert len(report["byte_table_errors"]) == int(contest_codec._leading_space.sum())


def test_a_bos_that_counts_bytes_is_found(codecs):
    """Each document would count bytes that are not in it."""
    report = verify_codec(resized(codecs["bese"], 1, 5), DOCUMENTS)
    assert not report["passed"]
    assert report["bos_bytes"] == 5 and report["mismatched_documents"] == len(TEXTS)


def test_a_missing_space_piece_is_found(tmp_path):
    """A lone space would be spelled by three byte tokens and counted three times."""
    path = tmp_path / "spaceless.model"
    path.write_bytes(train_sentencepiece(["abcdefgh" * 50], 270, CONTEST_OPTIONS))
    report = verify_codec(load_codec(path), [Document("ab", "memory:1")])
    assert not report["space_token"] and not report["passed"]


def test_a_codec_that_loses_more_than_it_declares_is_found(codecs):
    """Folding one more letter makes text easier to predict than it is."""
    codec = codecs["bese"]
    table = codec._table.copy()
    table[ord("u")] = table[ord("v")]
    report = verify_codec(broken(codec, _table=table), DOCUMENTS)
    assert not report["passed"]
    assert report["undeclared_losses"] > 0 and report["mismatched_documents"] == 0


def test_a_lossy_codec_that_calls_itself_lossless_is_found(codecs):
    """The flag decides whether a score may be compared."""
    report = verify_codec(broken(codecs["bese"], lossless=True), DOCUMENTS)
    assert not report["passed"]
    assert report["round_trip_failures"] == len(TEXTS) - 1


def test_a_fault_on_hostile_text_alone_is_found(codecs):
    """Given text may hold no NUL; the next one may."""
    codec = codecs["bytes"]
    pieces = [b" " if piece == b"\0" else piece for piece in codec._pieces]
    report = verify_codec(broken(codec, _pieces=pieces), [Document("clean", "memory:1")])
    assert not report["passed"]
    assert report["round_trip_failures"] == 0
    assert report["hostile_failures"] == ["\0\x7f\ufeff\ufffd"]


# ---- Reports ----------------------------------------------------------------------------------------


def test_a_report_is_the_same_each_time_and_its_digest_is_of_all_it_says(codecs):
    """Records carry it: a changed figure must show."""
    report = verify_codec(codecs["bytelevel"], DOCUMENTS)
    assert verify_codec(codecs["bytelevel"], DOCUMENTS, num_threads=2) == report
    digest = report.pop("digest")
    assert digest == hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
    others = [Document(TEXTS[0] + "x", "memory:1"), *DOCUMENTS[1:]]
    assert verify_codec(codecs["bytelevel"], others)["text_sha256"] != report["text_sha256"]


def test_the_command_prints_one_object_and_exits_with_0_or_1(
    codecs, trained, source, tmp_path, capsys, monkeypatch
):
    """Scripts read standard output and the status."""
    arguments = ["verify", "--tokenizer", str(trained["bese"]), "--input", str(source), "--json"]
    assert data.tokenizer.main([*arguments, "--out", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out).keys() >= KEYS
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(out)
    monkeypatch.setattr(data.tokenizer, "load_codec", lambda path: broken(codecs["bese"], lossless=True))
    assert data.tokenizer.main(arguments) == 1
    assert data.tokenizer.main(arguments[:-1]) == 1
    assert "round_trip_failures" in capsys.readouterr().out


def test_a_comparison_measures_length_entropy_and_size(codecs):
    """On text whose figures are known: 8 tokens with BOS, each a letter or BOS."""
    row = compare_codec(codecs["bytes"], ["aaa", "abc"], model_dim=16, bits=6)
    share = np.array([2, 4, 1, 1]) / 8  # BOS, a, b, c
    assert (row["tokens"], row["bytes_per_token"], row["unused_entries"]) == (8, 6 / 8, 256)
    assert row["entropy_bits_per_token"] == pytest.approx(-(share * np.log2(share)).sum())
    assert row["entropy_bits_per_byte"] == pytest.approx(row["entropy_bits_per_token"] * 8 / 6)
    assert row["embedding_bytes"] == 260 * 16 * 6 / 8


def test_the_report_command_compares_tokenizers_on_one_text(trained, source, capsys):
    """One row each, as a Markdown table for a README or as one object."""
    paths = [str(path) for path in trained.values()]
    arguments = ["report", "--input", str(source), "--tokenizer", *paths]
    assert data.tokenizer.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tokenizers"]
    assert [row["vocab_size"] for row in rows] == list(SIZES.values())
    assert data.tokenizer.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == len(paths) + 2 and {len(line) for line in lines[:1] + lines[2:]} == {len(lines[0])}
    assert [row[3] for row in cells[2:]] == ["yes" if row["lossless"] else "no" for row in rows]
    assert [row[4] for row in cells[2:]] == [f"{row['bytes_per_token']:.4f}" for row in rows]


@needs_corpora
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [("fineweb_1024_bpe.model", 4_245_478), ("fineweb_8192_bpe.model", 4_245_478),
     ("bese_288/tokenizer.json", 4_245_662), ("gpt2/vocab.json", 4_245_662),
     ("superbpe_t80k/tokenizer.rebuilt.json", 4_245_662),
     ("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", 4_245_662)],
)  # fmt: skip
def test_shared_tokenizers_pass_on_shared_text(name, token_bytes, capsys):
    """Every tokenizer of the contest and the reference systems, on 4.2 MB of C4."""
    arguments = ["--tokenizer", str(shared(name)), "--input", str(corpora() / "c4_val.jsonl")]
    assert data.tokenizer.main(["verify", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_bytes"] == token_bytes


def test_a_run_carries_the_digest_of_the_report_beside_its_shards(
    tiny_config, tiny_data, tmp_path, stand_in_program
):
    """A reader of a result must find which proof of its tokenizer it rests on; a false one stops the run."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    report = verify_codec(load_codec(folder / "tokenizer.model"), DOCUMENTS)
    write_sealed(folder / "tokenizer_report.json", report)
    cfg = with_values(tiny_config, {"data.data_path": str(folder), "run.iterations": 1}, "test")
    train_gpt.run(cfg, train_gpt.Environment({}))
    run = Path(cfg.run.out_dir) / cfg.run.run_id
    assert json.loads((run / "result.json").read_text())["tokenizer_report"] == report["digest"]
    assert f"tokenizer_report:{report['digest']}\n" in (run / "train.log").read_text()
    write_json(folder / "tokenizer_report.json", report | {"documents": 1})
    with pytest.raises(UserError, match="altered"):
        train_gpt.run(cfg, train_gpt.Environment({}))
