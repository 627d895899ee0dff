"""The bytes that a score divides by: every kind of tokenizer, manifests, sidecars, hostile texts."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from fixtures_data import SIZES, small_texts

from common import UserError, read_json
from data.codecs import load_codec
from data.codecs.spm import SPACE_SYMBOL
from data.prepare import Document, write_dataset, write_manifest
from data.shards import read_shard, write_shard
from data.train_tokenizer import CONTEST_OPTIONS, train_sentencepiece
from data.validation import ValidationText
from eval.__main__ import warn_about_bytes
from train_gpt import DataConfig, load_validation

TEXTS = [*small_texts(6, seed=5), "", "x", "\ue001 caf\u00e9 \U0001f600\n\n  y " * 40]
KINDS = [*SIZES, "sentencepiece", "normalising caseops"]


@pytest.fixture
def dataset(trained, lossless_model, normalising_case_ops, tmp_path):
    """Write TEXTS with a tokenizer of a kind; returns where they lie, as the trainer is told."""

    def make(kind: str) -> DataConfig:
        others = {"sentencepiece": lossless_model, "normalising caseops": normalising_case_ops.path}
        codec = load_codec({**trained, **others}[kind])
        documents = [
            Document(text, f"{i}") for i, text in enumerate(TEXTS) if text or not codec.needs_sidecar
        ]
        folder = tmp_path / "data"
        write_dataset(folder, codec, [Document("to train on", "0")], documents, {}, num_threads=1,
                      shard_tokens=700)  # fmt: skip
        return DataConfig(str(folder), str(codec.path), codec.kind, codec.vocab_size)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_counts_the_bytes_of_the_text(dataset, kind):
    """Whatever the tokens are, their bytes are those of the documents; boundaries between shards too."""
    text = load_validation(dataset(kind))
    expected = sum(len(document.encode()) for document in TEXTS)
    assert int(text.target_bytes.sum()) == text.raw_bytes == expected
    assert (text.target_bytes[text.tokens[1:] == text.bos_id] == 0).all()


def test_a_normalising_model_counts_by_the_contests_rule(tmp_path):
    """A leading space is one byte unless a boundary is before it: written out over the whole stream."""
    path = tmp_path / "contest.model"
    path.write_bytes(train_sentencepiece(small_texts(), 400, CONTEST_OPTIONS))
    codec = load_codec(path)
    documents = [Document(text, f"{i}") for i, text in enumerate(TEXTS)]
    write_dataset(tmp_path, codec, [Document("to train on", "0")], documents, {}, num_threads=1)
    text = load_validation(DataConfig(str(tmp_path), str(path), "sentencepiece", 400))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    expected = []
    for last, token in pairwise(text.tokens.tolist()):
        piece = model.id_to_piece(token)
        space = piece.startswith(SPACE_SYMBOL) and not (model.is_control(last) or model.is_unknown(last))
        written = 1 if model.is_byte(token) else len(piece.removeprefix(SPACE_SYMBOL).encode()) + space
        expected.append(0 if model.is_control(token) or model.is_unknown(token) else written)
    assert not codec.lossless and text.target_bytes.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_another_sum_than_the_manifest_states_is_refused(dataset, kind):
    """One byte too many would lower every score by its share, unseen."""
    cfg = dataset(kind)
    path = Path(cfg.data_path) / "manifest.json"
    manifest = read_json(path)
    manifest["val"]["expected_token_bytes"] += 1
    write_manifest(path.parent, manifest)
    with pytest.raises(UserError, match=r"the manifest expects .* bytes, the tokens have"):
        load_validation(cfg)


def sidecars_of(cfg: DataConfig) -> list[Path]:
    """The files with the bytes of each token, in order."""
    return sorted(Path(cfg.data_path).glob("fineweb_val_bytes_*.bin"))


def test_a_sidecar_must_fit_its_shard(dataset):
    """A sidecar of another length, of another text or none at all cannot tell the bytes of these tokens."""
    cfg = dataset("normalising caseops")
    first, second = sidecars_of(cfg)[:2]
    sizes = np.array(read_shard(first))
    write_shard(first, sizes[:-1])
    manifest = Path(cfg.data_path) / "manifest.json"
    manifest.rename(manifest.with_name("aside"))  # it would refuse the file by its sha256
    with pytest.raises(
        UserError, match=r"val_bytes_000000\.bin: expected the bytes of 700 tokens, found 699"
    ):
        load_validation(cfg)
    manifest.with_name("aside").rename(manifest)
    write_shard(first, sizes + 1)
    with pytest.raises(UserError, match=r"val_bytes_000000\.bin: expected sha256"):
        load_validation(cfg)
    write_shard(first, sizes)
    assert load_validation(cfg).raw_bytes
    second.unlink()
    with pytest.raises(UserError, match=r"val_bytes_000001\.bin: no such shard"):
        load_validation(cfg)


def test_shards_that_the_manifest_does_not_name_are_refused_unless_chosen(dataset):
    """A lost shard leaves an easier or a harder text under the same name."""
    cfg = dataset("bytes")
    folder = Path(cfg.data_path)
    (folder / "fineweb_val_000001.bin").unlink()
    with pytest.raises(UserError, match=r"shards, found .*; fineweb_val_000001\.bin is in one"):
        load_validation(cfg)
    chosen = load_validation(cfg, str(folder / "fineweb_val_000000.bin"))
    assert chosen.raw_bytes is None and len(chosen.tokens) == 700


def test_data_without_a_manifest_is_scored_with_a_warning(dataset, capsys):
    """The contest's shards have none; the count is the same, and the user is told that nobody checked it."""
    cfg = dataset("bytelevel")
    expected = load_validation(cfg)
    capsys.readouterr()
    warn_about_bytes(expected)
    assert capsys.readouterr().err == ""
    (Path(cfg.data_path) / "manifest.json").unlink()
    text = load_validation(cfg)
    assert np.array_equal(text.target_bytes, expected.target_bytes) and text.raw_bytes is None
    warn_about_bytes(text)
    printed = capsys.readouterr().err
    assert "no manifest states these shards" in printed and "contest" not in printed


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (151_080_000, "is right for the contest's 50,000 documents"),
        (155_770_000, "the export at launch"),
        (176_330_000, "warning: 176,330,000 bytes are wrong .* leading space counted twice"),
        (157_320_000, "warning: .* byte-fallback tokens counted as three bytes"),
        (164_590_000, "warning: .* case sentinels counted as text"),
        (32_760_000, "warning: .* 10,000 documents instead of 50,000"),
    ],
)
def test_known_wrong_byte_counts_are_named(num_bytes, message, capsys):
    """Each stands for a way in which submissions of the contest were wrong."""
    warn_about_bytes(ValidationText(np.array([1, 5]), np.array([num_bytes]), 1, "val", "bytes", "", None))
    assert re.search(message, capsys.readouterr().err)


def test_a_text_without_bos_is_scored_as_one_document_with_a_warning(capsys):
    """Documents could not be told apart: the score is right, adaptation per document is not what it says."""
    warn_about_bytes(ValidationText(np.array([4, 5, 6]), np.ones(2), 1, "val", "bytes", "", 2))
    assert "no BOS token" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({"vocab_size": 300}, "the tokenizer has 260 entries, the model's vocabulary has 300"),
    ({"tokenizer_kind": "bese"}, "expected a tokenizer of kind bese, found bytes"),
])  # fmt: skip
def test_a_tokenizer_that_is_not_the_models_is_refused(dataset, change, message):
    """Ids beyond the model's vocabulary, or read by another table, would be charged to other tokens."""
    cfg = dataset("bytes")
    with pytest.raises(UserError, match=message):
        load_validation(DataConfig(**(vars(cfg) | change)))


def test_tokens_beyond_the_vocabulary_are_refused(dataset):
    """Shards of a larger vocabulary: the first id that does not fit is named with its place."""
    cfg = dataset("bytes")
    path = Path(cfg.data_path) / "fineweb_val_000000.bin"
    tokens = np.array(read_shard(path))
    tokens[33] = 260
    write_shard(path, tokens)
    (Path(cfg.data_path) / "manifest.json").unlink()  # which would refuse it by its sha256
    with pytest.raises(UserError, match="token id 260 at position 33"):
        load_validation(cfg)
