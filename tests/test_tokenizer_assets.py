"""The tokenizers of tokenizers/: what their folders say is true, and a folder's name is enough everywhere."""

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from fixtures_data import corpora, needs_corpora
from fixtures_model import ROOT

import data.prepare
import data.tokenizer
from common import UserError, read_json, sha256_file
from data.assets import ASSETS, LICENCES, build_assets
from data.builtin import PACKAGES, find_package
from data.codecs import load_codec
from data.documents import Document, read_documents
from data.shards import read_manifest
from data.train_tokenizer import TRAINERS
from data.verify import verify_codec
from durable.seals import digest_of

HOME = ROOT / "tokenizers"
# Emoji with joiners, tabs, CRLF, decomposed letters, control characters, words longer than any piece.
ODD_TEXTS = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\ufe0f \U0001f1e9\U0001f1ea",
    "\tif x:\r\n\t\treturn  y\r\n\r\n",
    unicodedata.normalize("NFD", "r\u00e9sum\u00e9 na\u00efve \u00c5ngstr\u00f6m"),
    "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff\ufffd",
    "Donaudampfschiff" * 400 + " " + "X" * 3000,
    "iPhone HTTPServer \u0130stanbul \u1e9e \u212a \ue001\ue004 \u2581",
    " lead  two   three trail ",
)


@pytest.fixture(scope="module", params=ASSETS)
def asset(request) -> Path:
    """The folder of each tokenizer in turn."""
    return HOME / request.param


def facts_of(page: str) -> dict[str, str]:
    """Return the rows of a folder's README."""
    return dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", page, re.MULTILINE))


def test_the_folders_are_those_of_the_table():
    """Assets only: no Python, no text."""
    assert {path.name for path in HOME.iterdir() if not path.name.startswith(".")} == set(ASSETS)
    assert len(ASSETS) >= 5
    assert {"sentencepiece", "caseops", "superbpe"} <= {asset.kind for asset in ASSETS.values()}
    assert set(LICENCES) == {"python", *PACKAGES}


def test_a_folder_says_what_its_file_is(asset):
    """Digest, size, entries and bytes a token in README and report are the file's own."""
    wanted, codec = ASSETS[asset.name], load_codec(asset)
    suffix = TRAINERS[wanted.kind].suffix
    assert {path.name for path in asset.iterdir()} == {f"tokenizer{suffix}", "report.json", "README.md"}
    assert codec.path == asset / f"tokenizer{suffix}"
    page, report = (asset / "README.md").read_text(encoding="ascii"), read_json(asset / "report.json")
    assert report["verify"]["passed"] and report["verify"]["lossless"]
    assert report["verify"]["digest"] == digest_of(report["verify"])
    assert report["verify"]["raw_bytes"] == report["verify"]["token_bytes"]
    assert report["verify"]["tokenizer"]["sha256"] == codec.digest == sha256_file(codec.path)
    assert report["report"]["vocab_size"] == codec.vocab_size == wanted.vocab_size
    rows = facts_of(page)
    assert codec.digest in rows["file"]
    assert rows["bytes a token"].startswith(f"{report['report']['bytes_per_token']:.4f} on the ")
    assert f"{report['verify']['raw_bytes']:,} bytes" in rows["bytes a token"]
    assert f"{codec.vocab_size:,} entries in {codec.path.stat().st_size:,} bytes" in page
    assert rows["made by"] == f"`python -m data.tokenizer build {asset.name}`"
    assert all(licence in page for licence in LICENCES.values())


def test_all_were_trained_on_one_text():
    """Their figures compare."""
    pages = [(HOME / name / "README.md").read_text(encoding="ascii") for name in ASSETS]
    assert len({facts_of(page)["trained on"] for page in pages}) == 1
    reports = [read_json(HOME / name / "report.json")["verify"] for name in ASSETS]
    assert len({report["text_sha256"] for report in reports}) == 1


def test_odd_text_comes_back_byte_for_byte(asset, tmp_path):
    """By the command, as a user proves it."""
    lines = [json.dumps({"text": text}) for text in ODD_TEXTS]
    source = tmp_path / "odd.jsonl"
    source.write_text("\n".join(lines), encoding="ascii")
    arguments = ["verify", "--tokenizer", str(asset), "--input", str(source), "--num-threads", "1"]
    assert data.tokenizer.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    report = read_json(tmp_path / "out.json")
    assert report["documents"] == len(ODD_TEXTS)
    assert report["token_bytes"] == sum(len(text.encode()) for text in ODD_TEXTS)


@needs_corpora
@pytest.mark.slow
def test_web_text_comes_back_byte_for_byte(asset):
    """On all of the shared C4 validation text."""
    assert verify_codec(load_codec(asset), read_documents([corpora() / "c4_val.jsonl"]))["passed"]


def test_prepare_takes_a_folder(asset, tmp_path):
    """The manifest names the file and its kind, so that scoring refuses any other."""
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in ODD_TEXTS), encoding="ascii")
    out = tmp_path / "out"
    options = ["--val-docs", "2", "--num-threads", "1", "--out", str(out)]
    data.prepare.main(["--input", str(source), "--tokenizer", str(asset), *options])
    stated, codec = read_manifest(out), load_codec(asset)
    assert stated["tokenizer"]["sha256"] == codec.digest
    assert stated["tokenizer"]["kind"] == codec.kind
    assert stated["val"]["token_bytes"] == sum(len(text.encode()) for text in ODD_TEXTS[:2])


def test_a_kind_that_contradicts_the_folder_is_refused():
    """A CaseOps model read as a plain one counts its operators as bytes."""
    with pytest.raises(UserError, match="expected a tokenizer of kind sentencepiece, found caseops"):
        load_codec(HOME / "caseops2048", 2048, "sentencepiece")
    with pytest.raises(UserError, match=r"expected a tokenizer of kind sentencepiece, found a \.json file"):
        load_codec(HOME / "superbpe2048", 2048, "sentencepiece")
    assert load_codec(HOME / "caseops2048", 2048, "caseops").kind == "caseops"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """Its name is in the message, and what it should hold."""
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"no such tokenizer file.*folder with tokenizer\.model"):
        load_codec(tmp_path)


def test_the_folder_does_not_hide_the_package():
    """Without an __init__.py it is a namespace, which loses to an installed package on any later path."""
    code = "import tokenizers; print(tokenizers.__file__); from tokenizers import Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(HOME)
    assert not list(HOME.rglob("*.py"))


def test_the_same_corpus_gives_the_same_folder(tmp_path, monkeypatch):
    """Every file of it, byte for byte; here from one small package instead of the corpus."""
    monkeypatch.setitem(ASSETS, "small", ASSETS["sp1024"]._replace(vocab_size=400))
    monkeypatch.setattr("data.assets.collect_documents", lambda modules: (made[:20], made[20:]))
    files = [module.path for module in find_package("mpmath")]
    made = [Document(path.read_text(encoding="utf-8"), path.name) for path in files]
    folders = []
    for name in ("first", "second"):
        rows = build_assets(["small"], tmp_path / name, tmp_path / f"{name}_text", list_modules=list)
        assert rows[0]["lossless"]
        folders.append(tmp_path / name / "small")
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"tokenizer.model", "report.json", "README.md"}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    texts = [document.text for document in read_documents([tmp_path / "first_text" / "train.jsonl"])]
    assert texts == [document.text for document in made[:20]]


def test_an_unknown_name_is_refused():
    """The error lists those that there are."""
    with pytest.raises(UserError, match="sp8192: expected some of sp1024, "):
        data.tokenizer.main(["build", "sp8192"])
