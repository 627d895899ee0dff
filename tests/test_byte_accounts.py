"""Bits per byte are as true as their bytes: every place says the same of a tokenizer."""

import json

import numpy as np
import pytest
from fixtures_accounts import (
    DOCUMENTS,
    EXPANDING,
    HOSTILE,
    MAKERS,
    PLAIN,
    pre_tokenizer,
    rewritten,
    share_ids,
    tk_regex,
)
from fixtures_data import needs_corpora, shared, shared_texts, small_texts
from fixtures_model import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import data.prepare
import train_gpt
from audit.__main__ import audit_data, audit_folder
from common import UserError, read_json
from data.accounts import CONTEST, EXPANDS, LOSES, LOSSLESS, ByteAccount, ByteCounts, open_account
from data.changes import find_changes, follows_contest
from data.codecs import load_codec
from data.documents import Document
from data.prepare import print_table, write_dataset
from data.verify import verify_codec
from eval.__main__ import main as evaluate
from formats.recipe import with_values
from train_gpt import Config, Environment

pytestmark = pytest.mark.numeric

VERDICTS = {
    LOSSLESS: ("post_processor", "added_token", "inverted_split", "symbols", "ranks", "bytes", "lossless"),
    CONTEST: ("contest", "case_ops_nfkc"),
    EXPANDS: ("prepend", "prefix_space", "word_ends", "no_space"),
}
EXPECTED = {name: verdict for verdict, names in VERDICTS.items() for name in names}
WHOLE_WAY = (
    *("nfkc", "replace", "swallow", "prefix_space", "contest", "nmt_nfkc_cf"),
    *("own_rules", "dummy_prefix", "symbols", "no_space", "case_ops_nfkc", "bese"),
)
K9_VERDICTS = {LOSSLESS: "PASS", CONTEST: "PASS", LOSES: "SUSPECT", EXPANDS: "FAIL"}
SPICE = st.sampled_from([*HOSTILE, *EXPANDING, "budget", "the model reads", "a  b", "\t<tag>\n", "\ue001X"])
TEXTS = st.lists(st.text(max_size=8) | SPICE, min_size=1, max_size=6).map("".join)


TRAIN = [Document(text, "train") for text in small_texts(8, seed=1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return path and codec of a hostile file, made once."""
    made = {}

    def find(name: str):
        if name not in made:
            path = MAKERS[name](tmp_path_factory.mktemp(name))
            made[name] = path, load_codec(path)
        return made[name]

    return find


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"memory:{i}") for i, text in enumerate(texts, start=1)]


def count(codec, text: str) -> int:
    """Count the bytes of one document by its tokens, or by its sidecar."""
    if codec.needs_sidecar:
        return int(codec.encode_with_bytes(text)[1].sum())
    return int(codec.token_bytes(np.array([codec.bos_id, *codec.encode(text)])).sum())


# ---- What a file changes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "few_ranks"])
def test_every_byte_is_counted_or_the_file_is_labelled(files, name):
    """A tokenizer without a label gives every text back, byte for byte, and counts each byte once."""
    _, codec = files(name)

    @settings(deadline=None, max_examples=30)
    @given(text=TEXTS)
    def holds(text):
        assert codec.decode(codec.encode(text)) == text.encode() and count(codec, text) == len(text.encode())

    if not find_changes(codec):
        holds()
    else:
        kept = [
            text for text in [*DOCUMENTS, *EXPANDING] if codec.decode(codec.encode(text)) == text.encode()
        ]
        assert len(kept) < len(DOCUMENTS) + len(EXPANDING)


@pytest.mark.parametrize(
    ("name", "said"),
    [("nfkc", "compatibility characters, combining marks, what its normalizer NFKC does"),
     ("lowercase", "changes case,"), ("replace", "what its normalizer Replace does"),
     ("swallow", "its own added tokens"), ("removed", "what its pre-tokenizer Split does"),
     ("nmt_nfkc_cf", "changes case, spaces"), ("trimmed", "changes spaces"),
     ("dummy_prefix", "changes the space symbol"), ("own_rules", "what its normalisation rules name"),
     ("case_ops_folded", "changes case"), ("hidden_rules", "what its normalisation rules name"),
     ("bese", "drops case, most signs and all that is not ASCII")],
)  # fmt: skip
def test_what_is_changed_is_named(files, name, said):
    """A reader of a score must know which text it is a score of."""
    assert said in find_changes(files(name)[1])


def test_entries_that_share_an_id_are_refused(tmp_path):
    """The text of one would come back as that of the other, by chance of the order in which they are read."""
    with pytest.raises(UserError, match="expected an id for each entry, found "):
        load_codec(rewritten(share_ids)(tmp_path))


def test_dropout_of_training_is_off(tmp_path):
    """Shards and scores of one text would differ from one run to the next."""
    codec = load_codec(rewritten(lambda model: model.update(dropout=0.5))(tmp_path))
    assert len({tuple(codec.encode(PLAIN[0] * 5)) for _ in range(10)}) == 1


def test_a_panic_of_the_library_is_one_sentence(tmp_path):
    """A rule that runs back and forth; a table of rules that is none; a million spaces."""
    split = pre_tokenizer(
        lambda p: p.Sequence([p.Split(tk_regex("(x+x+)+y"), "isolated"), p.ByteLevel(False)])
    )
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer's library gave up \(.*retry-limit"):
        load_codec(split(tmp_path)).encode("x" * 20_000)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer's library gave up"):
        load_codec(tmp_path / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"r50k_base\.tiktoken: the tokenizer's library gave up .*million spaces"
    ):
        load_codec(MAKERS["ranks"](tmp_path)).encode(" " * 2_000_000 + "x")


def test_a_model_that_drops_a_letter_is_verified(files):
    """Its table is looked at after a letter that it keeps."""
    report = verify_codec(files("dropped_vowels")[1], documents(PLAIN))
    assert report["byte_account"]["verdict"] == LOSES and not report["byte_table_errors"]


def test_a_table_without_all_bytes_is_refused(tmp_path):
    """Its library ends the process's thread without an exception that can be caught."""
    with pytest.raises(UserError, match=r"each of the 243 bytes of UTF-8 text, found none for 115"):
        load_codec(MAKERS["few_ranks"](tmp_path))


def test_only_the_contests_kind_of_model_is_called_so(files):
    """Its scores compare with the contest's; folding case, a prefix, other symbols are other kinds."""
    found = {name for name in MAKERS if name != "few_ranks" and follows_contest(files(name)[1])}
    assert found == set(VERDICTS[CONTEST])


@needs_corpora
@pytest.mark.parametrize(
    ("name", "verdict"),
    [("fineweb_1024_bpe.model", CONTEST), ("fineweb_8192_bpe.model", CONTEST), ("gpt2/vocab.json", LOSSLESS),
     ("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", CONTEST),
     ("superbpe_t80k/tokenizer.rebuilt.json", LOSSLESS), ("bese_288/tokenizer.json", LOSES)],
)  # fmt: skip
def test_shared_tokenizers_have_their_verdicts(name, verdict):
    """Real files of the contest and the reference systems."""
    report = verify_codec(load_codec(shared(name)), documents(shared_texts()[:100]))
    assert report["passed"] and report["byte_account"]["verdict"] == verdict


# ---- Six places -------------------------------------------------------------------------------------


@pytest.fixture
def whole_way(files, tmp_path, monkeypatch, stand_in_program):
    """Take a file from its proof to the audit of a run; returns what each place says."""

    def go(name: str, capsys) -> dict:
        path, codec = files(name)
        found = {"verify": verify_codec(codec, documents(DOCUMENTS))["byte_account"]}
        with monkeypatch.context() as patch:
            if found["verify"]["verdict"] == EXPANDS:
                with pytest.raises(UserError, match="scores are below the truth"):
                    write_dataset(tmp_path / "no", codec, documents(PLAIN), documents(DOCUMENTS), {})
                patch.setattr(ByteAccount, "invalid", "")  # as older versions wrote it
            folder = tmp_path / "data"
            found["manifest"] = write_dataset(folder, codec, TRAIN, documents(DOCUMENTS), {}, num_threads=1)
            print_table(folder, found["manifest"])
            found["table"] = capsys.readouterr().out
        values = TINY | {
            "data.data_path": str(folder), "data.tokenizer_path": str(path), "run.run_id": "mini",
            "data.tokenizer_kind": codec.kind, "data.vocab_size": codec.vocab_size, "run.iterations": 1,
            "run.out_dir": str(tmp_path / "runs"), "model.num_layers": 1, "run.warmup_steps": 0,
        }  # fmt: skip
        cfg = with_values(Config(), values, "test")
        allowed = ["--set", "data.allow_extra_bytes=1"]
        if found["verify"]["verdict"] == EXPANDS:
            with pytest.raises(UserError, match=r"counts .* bytes of a text of .* below the truth"):
                train_gpt.run(cfg, Environment({}))
            cfg = with_values(cfg, {"data.allow_extra_bytes": True}, "test")
        train_gpt.run(cfg, Environment({}))
        run = tmp_path / "runs" / "mini"
        found["log"], found["result"] = (run / "train.log").read_text(), read_json(run / "result.json")
        capsys.readouterr()
        assert evaluate([str(run), *allowed]) == 0
        found["eval table"] = capsys.readouterr().out
        assert evaluate([str(run), *allowed, "--json"]) == 0
        found["eval"] = json.loads(capsys.readouterr().out)
        source = tmp_path / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
        assert evaluate([str(run), *allowed, "--domains", f"all={source}", "--json"]) == 0
        (found["domain"],) = json.loads(capsys.readouterr().out)
        (run / "README.md").write_text("")
        measured = audit_data(folder, path)
        found["K9"] = {one.id: finding for one, finding in audit_folder(run, None, measured)}["K9"]
        return found

    return go


@pytest.mark.parametrize("name", WHOLE_WAY)
def test_all_places_say_the_same(whole_way, files, name, capsys):
    """Proof, dataset, log and result, scoring, domains and audit: one account, as counted slowly."""
    found = whole_way(name, capsys)
    _, codec = files(name)
    account, said = found["verify"], found["verify"]["said"]
    raw = [len(text.encode()) for text in DOCUMENTS]
    counted = [count(codec, text) for text in DOCUMENTS]
    assert (account["raw_bytes"], account["token_bytes"]) == (sum(raw), sum(counted))
    assert account["documents_over"] == sum(a > b for a, b in zip(counted, raw))
    assert account["documents_under"] == sum(a < b for a, b in zip(counted, raw))
    assert account["verdict"] == EXPECTED.get(name, LOSES)
    assert found["manifest"]["val"]["byte_account"] == said and f"val   {said}\n" in found["table"]
    assert f"\nbyte_account:{said}\n" in found["log"] and f"{said}\n" in found["eval table"]
    for place in ("result", "eval", "domain"):
        assert found[place]["byte_account"] == account, place
    assert found["K9"].verdict == K9_VERDICTS[account["verdict"]]
    assert f"byte account: {said}" in found["K9"].evidence
    labels = {key: bool(found["eval"][key]) for key in ("invalid", "not_comparable")}
    assert labels == {
        "invalid": account["verdict"] == EXPANDS, "not_comparable": account["verdict"] == LOSES,
    }  # fmt: skip
    for key, is_set in labels.items():
        assert bool(found["result"]["score"][key]) == bool(found["domain"][key]) == is_set
        assert (f"\n{key}:" in found["log"]) == is_set
        assert (key.upper().replace("_", " ") in found["eval table"]) == is_set


def test_one_document_that_expands_is_counted_not_refused(files):
    """The contest's own models do that; over a whole text it is an error, in the proof too."""
    _, codec = files("contest")
    report = verify_codec(codec, documents([*EXPANDING, *DOCUMENTS]))
    assert report["passed"] and report["byte_account"]["documents_over"] == len(EXPANDING)
    report = verify_codec(codec, documents(EXPANDING))
    assert report["byte_account"]["verdict"] == EXPANDS and not report["passed"]
    assert "counts 148 bytes of a text of 19" in report["byte_account"]["said"]


def test_a_hair_over_is_still_the_contests_rule(files):
    """Its own models count 5 bytes too many of 100 pages of C4; other kinds have no such allowance."""
    counts = ByteCounts(10_000, 10_005, 9, 1, 0)
    assert open_account(files("contest")[1], counts).verdict == CONTEST
    assert open_account(files("nmt_nfkc_cf")[1], counts).verdict == EXPANDS
    assert open_account(files("contest")[1], counts._replace(token_bytes=10_011)).verdict == EXPANDS


def test_training_text_may_expand(files, tmp_path):
    """No score divides by its bytes; the table says so of it."""
    _, codec = files("contest")
    found = write_dataset(tmp_path, codec, documents(EXPANDING), documents(PLAIN), {}, num_threads=1)
    assert found["train"]["documents_over"] == 3 and found["train"]["byte_account"].startswith(EXPANDS)


def test_an_older_manifest_says_what_it_does_not_know(files, tmp_path):
    """Datasets of older versions load: documents that count more or fewer bytes were not counted then."""
    path, codec = files("contest")
    manifest = write_dataset(tmp_path, codec, TRAIN, documents(DOCUMENTS), {}, num_threads=1)
    for key in ("documents_over", "documents_under", "byte_account"):
        del manifest["val"][key]
    data.prepare.write_manifest(tmp_path, manifest)
    values = {"data.data_path": str(tmp_path), "data.tokenizer_path": str(path), "data.vocab_size": 400}
    cfg = with_values(Config(), values, "test")
    sizes = manifest["val"]["token_bytes"], manifest["val"]["raw_bytes"]
    said = str(train_gpt.load_validation(cfg.data).account)
    assert said.endswith("; counts {:,} bytes of a text of {:,}".format(*sizes))
    (tmp_path / "manifest.json").unlink()
    text = train_gpt.load_validation(cfg.data)
    assert str(text.account).endswith(f"; counts {sizes[0]:,} bytes of a text of unknown, no manifest")
    assert str(text.account).startswith(CONTEST) and not text.not_comparable


@pytest.mark.parametrize("name", ["nmt_nfkc_cf", "own_rules", "lossless", "contest"])
def test_a_packed_program_labels_what_is_not_comparable(files, name, tmp_path, monkeypatch):
    """It says no more than that, so that it stays small; a text that expands it refuses."""
    path, codec = files(name)
    manifest = write_dataset(tmp_path, codec, TRAIN, documents(DOCUMENTS), {}, num_threads=1)
    values = {"data.data_path": str(tmp_path), "data.tokenizer_path": str(path)}
    cfg = with_values(Config(), values | {"data.vocab_size": codec.vocab_size}, "test")
    monkeypatch.setattr(train_gpt, "PACKED_RECIPE", {})
    text = train_gpt.load_validation(cfg.data)
    assert text.account is None
    assert text.not_comparable == ("" if name in EXPECTED else "the tokenizer changes text")
    manifest["val"]["raw_bytes"] = manifest["val"]["token_bytes"] * 99 // 100
    data.prepare.write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match="scores would be below the truth"):
        train_gpt.load_validation(cfg.data)


def test_a_log_that_counts_more_than_its_text_fails_k9(tmp_path):
    """Also a log of an older version, which has no account."""
    folder = tmp_path / "2026-01-01_X"
    folder.mkdir()
    (folder / "train_seed1.log").write_text("val_bpb:enabled\nval_bytes:107 raw_bytes:14\nseed:1\n")
    (finding,) = [found for check, found in audit_folder(folder) if check.id == "K9"]
    assert finding.verdict == "FAIL" and "counts 107 bytes of a text of 14" in finding.evidence[0]
