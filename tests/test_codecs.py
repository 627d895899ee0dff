"""Codecs: text comes back byte for byte, and every byte is counted once."""

import numpy as np
import pytest
import sentencepiece
from fixtures_data import needs_corpora, shared, shared_texts, small_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data.tokenizer
import data.train_tokenizer
from common import UserError
from data.codecs import load_codec
from data.codecs.spm import SPACE_SYMBOL
from data.train_tokenizer import HOSTILE_TEXTS, train_tokenizer

# Any text at all, and text dense in what tokenizers get wrong.
HOSTILE_ALPHABET = (
    " \t\r\n\0" + SPACE_SYMBOL + "a1.<>x\u0301\ufb01\u212a\u3000\u00a0\u2047\u2585\ufeff\U0001f600"
)
TEXTS = st.text() | st.text(alphabet=HOSTILE_ALPHABET)
PROPERTY = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def normalising_codec(tmp_path_factory):
    """A model as the contest trains them: NFKC, spaces merged."""
    path = tmp_path_factory.mktemp("normalising") / "nfkc.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(small_texts()),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    return load_codec(path)


@PROPERTY
@given(text=TEXTS)
@example(text="\n".join(HOSTILE_TEXTS))
def test_lossless_text_comes_back_and_every_byte_is_counted(lossless_codec, text):
    """Bits per byte are honest only if the bytes of the tokens are the bytes of the text."""
    ids = lossless_codec.encode(text)
    assert lossless_codec.decode(ids) == text.encode()
    assert int(lossless_codec.token_bytes(ids).sum()) == len(text.encode())


@PROPERTY
@given(texts=st.lists(TEXTS, max_size=5))
def test_a_batch_equals_its_documents_one_by_one(lossless_codec, texts):
    """Batches and threads are for speed only."""
    batch = lossless_codec.encode_batch(texts, num_threads=2)
    assert len(batch) == len(texts)
    for text, ids in zip(texts, batch):
        assert np.array_equal(ids, lossless_codec.encode(text))


def test_ids_of_special_tokens_are_the_contests_and_bos_counts_no_bytes(lossless_codec):
    """Shards are told apart by BOS 1; BOS is no part of the text."""
    assert lossless_codec.bos_id == 1
    ids = np.concatenate([[1], lossless_codec.encode("a b")])
    assert lossless_codec.token_bytes(ids)[0] == 0
    assert int(lossless_codec.token_bytes(ids).sum()) == 3


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>", "<unk>", "<0x41>"])
def test_no_text_encodes_to_a_special_token(lossless_codec, text):
    """Text that spells a special token must not split documents or hide bytes."""
    assert int(lossless_codec.encode(text).min()) > 3


def test_a_space_and_a_newline_have_tokens_of_their_own_and_digits_stay_apart(lossless_codec):
    """Indents, paragraphs and numbers would otherwise cost byte tokens or rare merges."""
    assert [len(lossless_codec.encode(text)) for text in (" ", "\n", "1024")] == [1, 1, 4]


def test_a_normalising_model_is_told_apart_and_counts_by_the_contests_rule(normalising_codec):
    """The contest counts a piece without its space symbol, plus one unless a boundary precedes it."""
    codec = normalising_codec
    model = sentencepiece.SentencePieceProcessor(model_file=str(codec.path))
    assert not codec.lossless
    ids = [
        codec.bos_id,
        *codec.encode("  the model reads caf\u00e9\nbytes"),
        codec.bos_id,
        *codec.encode(" the"),
    ]
    expected = []
    for previous, token in zip([codec.bos_id, *ids], ids):
        piece = model.id_to_piece(token)
        if model.is_control(token):
            size = 0
        elif model.is_byte(token):
            size = 1
        else:
            size = len(piece.lstrip(SPACE_SYMBOL).encode())
            size += piece.startswith(SPACE_SYMBOL) and not model.is_control(previous)
        expected.append(size)
    assert codec.token_bytes(np.array(ids)).tolist() == expected


def test_training_twice_gives_the_same_file(lossless_model, tmp_path):
    """Shards name their tokenizer by hash; the built-in corpus trains it on each machine anew."""
    train_tokenizer(small_texts(), 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == lossless_model.read_bytes()


def test_a_model_that_loses_text_is_not_written_and_replaces_none(tmp_path, monkeypatch):
    """A wrong option would make every later byte count wrong; the former model may be in use."""
    monkeypatch.setitem(data.train_tokenizer.LOSSLESS_OPTIONS, "normalization_rule_name", "nmt_nfkc")
    with pytest.raises(RuntimeError, match="not lossless"):
        train_tokenizer(small_texts(), 400, tmp_path / "lossy.model")
    assert not any(tmp_path.iterdir())
    (tmp_path / "former.model").write_bytes(b"in use")
    with pytest.raises(RuntimeError, match="not lossless"):
        train_tokenizer(small_texts(), 400, tmp_path / "former.model")
    assert (tmp_path / "former.model").read_bytes() == b"in use"


@pytest.mark.parametrize(("texts", "vocab_size"), [(["ab"], 1024), ([], 1024), (small_texts(5), 100)])
def test_a_vocabulary_that_the_text_cannot_fill_is_a_user_error(tmp_path, texts, vocab_size):
    """SentencePiece's own message names a line of its source."""
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer(texts, vocab_size, tmp_path / "small.model")
    assert not any(tmp_path.iterdir())


def test_bad_input_keeps_its_own_message_in_training(tmp_path):
    """The reader's error names file and line; SentencePiece must not wrap it."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(UserError, match=r"^\S*bad.jsonl:2: not valid JSON"):
        data.tokenizer.main(["train", "--input", str(path), "--out", str(tmp_path / "x.model")])


def test_the_command_trains_a_model_that_loads(tmp_path, capsys):
    """The whole path from text file to tokenizer."""
    source, out = tmp_path / "text.txt", tmp_path / "text.model"
    source.write_text("".join(small_texts()))
    data.tokenizer.main(["train", "--input", str(source), "--vocab-size", "350", "--out", str(out)])
    assert load_codec(out, vocab_size=350).digest in capsys.readouterr().out


def test_tokenizer_files_that_cannot_be_used_are_user_errors(lossless_model, tmp_path):
    """Missing, of another format, damaged, or of another size than the model's vocabulary."""
    damaged, other = tmp_path / "damaged.model", tmp_path / "tokenizer.json"
    damaged.write_bytes(lossless_model.read_bytes()[:100])
    other.write_text("{}")
    for path, message in (
        (tmp_path / "no.model", "no such"),
        (other, "not a tokenizer"),
        (damaged, "not a Sentence"),
    ):
        with pytest.raises(UserError, match=message):
            load_codec(path)
    with pytest.raises(UserError, match="VOCAB_SIZE=400"):
        load_codec(lossless_model, vocab_size=1024)


@needs_corpora
def test_the_contests_tokenizer_counts_the_known_bytes_of_shared_text():
    """The contest's rule loses 184 of these bytes to normalisation; another count is another score."""
    codec, texts = load_codec(shared("fineweb_1024_bpe.model"), vocab_size=1024), shared_texts()
    counted = 0
    for ids in codec.encode_batch(texts, num_threads=2):
        counted += int(codec.token_bytes(np.concatenate([[codec.bos_id], ids])).sum())
    assert sum(len(text.encode()) for text in texts) == 4_245_662
    assert counted == 4_245_478
