"""Byte, byte-level BPE, BESE and CaseOps codecs: what comes back, what each token counts, vectors."""

import contextlib
import json
import random
import shutil
import sys
from base64 import b64encode
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import SIZES, needs_corpora, shared, shared_texts, small_texts, train_small_kind
from fixtures_model import recipe, shape_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import UserError, write_json
from data.codecs import load_codec
from data.codecs.bese import (
    BESE_BOS,
    GROUPS,
    NUM_BASE,
    SINGLE_LETTERS,
    base_table,
    merge_pair,
    to_base,
)
from data.codecs.caseops import (
    CASE_OPERATORS,
    follows_escape,
    from_case_operators,
    to_case_operators,
)
from data.codecs.ranks import FAMILIES
from data.prepare import Document, write_dataset
from data.shards import read_shard
from data.train_tokenizer import HOSTILE_TEXTS, TRAINERS, train_tokenizer

LOSSLESS_KINDS = ("bytes", "bytelevel", "superbpe", "caseops", "caseops_spaced")
ALPHABET = " \ue000\t\n\0\u2581aAbBzZeE1.,?!'\"\u212a\u0130\u00df\u00e9\u0301\U0001f600" + CASE_OPERATORS
TEXTS = (
    st.text()
    | st.text(alphabet=ALPHABET)
    | st.lists(st.sampled_from(small_texts(4)), max_size=2).map("".join)
)
PROPERTY = settings(deadline=None, max_examples=100)


# ---- Every kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS_KINDS)
@PROPERTY
@given(text=TEXTS)
@example(text="\n".join(HOSTILE_TEXTS))
def test_lossless_kinds_give_every_text_back_and_count_every_byte(codecs, kind, text):
    """Bits per byte are honest only if the bytes of the tokens are the bytes of the text."""
    codec = codecs[kind]
    ids = codec.encode(text)
    assert codec.lossless
    assert codec.decode(ids) == text.encode()
    assert int(codec.token_bytes(ids).sum()) == len(text.encode())


@pytest.mark.parametrize("kind", SIZES)
def test_a_file_of_another_kind_than_expected_is_refused(trained, codecs, kind):
    """A CaseOps model read as a plain one counts its operators: 9 % too many bytes, once a record's."""
    assert load_codec(trained[kind], kind=codecs[kind].kind).digest == codecs[kind].digest
    with pytest.raises(UserError, match="expected a tokenizer of kind sentencepiece, found"):
        load_codec(trained[kind], kind="sentencepiece")


@pytest.mark.parametrize("kind", SIZES)
def test_batches_and_threads_change_no_id(codecs, kind):
    """Batches and threads are for speed only."""
    texts = ["", *small_texts(30, seed=3), *HOSTILE_TEXTS, ""]
    batch = codecs[kind].encode_batch(texts, num_threads=2)
    assert [ids.tolist() for ids in batch] == [codecs[kind].encode(text).tolist() for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


@pytest.mark.parametrize("kind", SIZES)
def test_no_text_makes_a_bos_and_bos_counts_no_bytes(codecs, kind):
    """Documents are told apart by BOS; a text that spells it must not cut its own document."""
    codec = codecs[kind]
    assert codec.bos_id not in codec.encode("<s> <|endoftext|> </s>" + "".join(small_texts(5)))
    assert codec.token_bytes(np.array([codec.bos_id])).tolist() == [0]


@pytest.mark.parametrize("kind", SIZES)
def test_half_a_surrogate_pair_is_refused(codecs, kind):
    """UTF-8 cannot express it: replacing it in silence would score another text."""
    with pytest.raises((UnicodeEncodeError, TypeError)):
        codecs[kind].encode("a\ud800b")


@pytest.mark.parametrize("kind", SIZES)
def test_training_twice_gives_the_same_file(trained, kind, tmp_path):
    """Shards name their tokenizer by its hash."""
    again = train_small_kind(kind, tmp_path)
    assert again.read_bytes() == trained[kind].read_bytes()


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [("bytes", 300, "260"), ("bytelevel", 200, "at least 257"), ("bytelevel", 9000, "more text"),
     ("superbpe", 9000, "more text"), ("bese", 900, "more text"), ("caseops", 200, "--vocab-size")],
)  # fmt: skip
def test_a_size_that_the_text_cannot_give_is_a_user_error(kind, size, message, tmp_path):
    """A smaller vocabulary than the recipe's would fail far from its cause."""
    out = tmp_path / ("x.model" if kind == "caseops" else "x.json")
    with pytest.raises(UserError, match=message):
        train_tokenizer(small_texts(3), size, out, kind)
    assert not out.exists()


@pytest.mark.parametrize("kind", TRAINERS)
def test_absurd_sizes_are_refused_with_the_advice_that_fits(kind, tmp_path):
    """Libraries end such training with internal errors, or take all memory."""
    out = tmp_path / f"x{TRAINERS[kind].suffix}"
    for size in (1, 10**7, 2**31, 10**12):
        with pytest.raises(UserError, match=f"--vocab-size {size}: ") as caught:
            train_tokenizer(small_texts(3), size, out, kind)
        assert "INTERNAL" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [([], 400, "no document is left to train on"), (["\u2585"], 400, "no document is left"),
     (["abc" * 100], 100_000, "this text gives at most 27\\d entries: lower"),
     (["abc" * 100], 100, "this text needs at least 26\\d entries")],
)  # fmt: skip
def test_sentencepiece_errors_are_explained(texts, size, message, tmp_path):
    """Their own words name lines of its source."""
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, size, tmp_path / "x.model")


def test_documents_that_sentencepiece_drops_are_counted(tmp_path, capsys):
    """It says nothing: a tokenizer of half the text looks like one of all of it."""
    texts = [*small_texts(20), "x\u2585y", "long " * 1000, "long\u2585" * 1000]
    train_tokenizer(texts, 400, tmp_path / "x.model", "contest")
    said = "of 23 documents SentencePiece does not train on 2 of more than 4,192 bytes and 2 that hold U+2585"
    assert said in capsys.readouterr().err
    train_tokenizer(texts, 400, tmp_path / "y.model")
    assert "23 documents SentencePiece does not train on 0 of more" in capsys.readouterr().err
    train_tokenizer(small_texts(20), 400, tmp_path / "z.model")
    assert "does not train" not in capsys.readouterr().err


# ---- Stated digests ---------------------------------------------------------------------------------


def state_in_report(folder: Path, row: dict) -> None:
    write_json(folder / "report.json", {"verify": {"tokenizer": row}})


def state_in_manifest(folder: Path, row: dict) -> None:
    write_json(folder / "manifest.json", {"tokenizer": row})


@pytest.mark.parametrize("state", [state_in_report, state_in_manifest])
@pytest.mark.parametrize("kind", [*SIZES, "sentencepiece", "ranks", "pair"])
def test_a_flipped_file_is_refused_by_what_states_its_digest(trained, lossless_model, tmp_path, kind, state):
    """A flipped tokenizer may load: another one, whose shards look like this one's."""
    if kind == "pair":
        model = json.loads(trained["bytelevel"].read_text())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        path = tmp_path / "vocab.json"
    elif kind == "ranks":
        path = write_ranks(tmp_path / "r50k_tiny.tiktoken", [bytes([value]) for value in range(256)])
    else:
        source = lossless_model if kind == "sentencepiece" else trained[kind]
        path = Path(shutil.copy(source, tmp_path / f"tokenizer{source.suffix}"))
    codec = load_codec(path)
    state(tmp_path, {"file": "another", "sha256": "0"})
    assert load_codec(path).digest == codec.digest
    state(tmp_path, {"file": path.name, "sha256": codec.digest})
    assert load_codec(path).digest == codec.digest
    for flipped in (path, path.with_name("merges.txt")) if kind == "pair" else (path,):
        blob = flipped.read_bytes()
        for at in range(0, len(blob), 1 + len(blob) // 5):
            flipped.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
            with pytest.raises(UserError, match=r"damaged or replaced\. Copy it again"):
                load_codec(path)
        flipped.write_bytes(blob)


def test_what_states_nothing_is_passed_over(trained, tmp_path):
    """Folders hold reports and manifests of others."""
    path = Path(shutil.copy(trained["bytes"], tmp_path / "tokenizer.json"))
    for content in ([], {}, {"verify": 3}, {"verify": {"tokenizer": []}}, {"tokenizer": "x"}):
        write_json(tmp_path / "report.json", content)
        if isinstance(content, dict):
            write_json(tmp_path / "manifest.json", content)
        assert load_codec(path).kind == "bytes"


# ---- Bytes ------------------------------------------------------------------------------------------


def test_byte_ids_are_the_contests(codecs):
    """Its byte260 shards shift each byte by four special ids."""
    assert codecs["bytes"].encode("A\u00e9").tolist() == [0x41 + 4, 0xC3 + 4, 0xA9 + 4]
    assert (codecs["bytes"].vocab_size, codecs["bytes"].bos_id) == (260, 1)


def test_a_byte_file_of_another_layout_is_refused(trained, tmp_path):
    """Ids would point at other bytes."""
    content = json.loads(trained["bytes"].read_text())
    config = content["config"]
    for changed in (config | {"byte_offset": 3}, config | {"bos_id": 4}, config | {"bos_id": "1"}, 7, None):
        (tmp_path / "bytes.json").write_text(json.dumps(content | {"config": changed}))
        with pytest.raises(UserError, match="byte_offset"):
            load_codec(tmp_path / "bytes.json")


# ---- Byte-level BPE ---------------------------------------------------------------------------------


def change_tokenizer(trained, tmp_path, **changes) -> Path:
    """Write the byte-level tokenizer with other top-level fields."""
    content = json.loads(trained["bytelevel"].read_text()) | changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_vocab_and_merges_files_are_the_same_tokenizer(trained, codecs, tmp_path):
    """GPT-2 is distributed as two files; both make its digest."""
    content = json.loads(trained["bytelevel"].read_text())
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    single = change_tokenizer(trained, tmp_path, pre_tokenizer=content["pre_tokenizer"])
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    pair = load_codec(tmp_path / "vocab.json")
    text = "".join(small_texts(3, seed=4))
    assert pair.encode(text).tolist() == load_codec(single).encode(text).tolist()
    assert (pair.vocab_size, pair.bos_id, pair.lossless) == (400, codecs["bytelevel"].bos_id, True)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges[:-1]), encoding="utf-8")
    assert load_codec(tmp_path / "vocab.json").digest != pair.digest
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt beside it"):
        load_codec(tmp_path / "vocab.json")


def test_a_file_without_a_separator_gets_one_behind_its_last_id(trained, tmp_path):
    """Without BOS documents would run into each other."""
    content = json.loads(trained["bytelevel"].read_text())
    model = content["model"] | {"vocab": {n: i - 1 for n, i in content["model"]["vocab"].items() if i}}
    codec = load_codec(change_tokenizer(trained, tmp_path, model=model, added_tokens=[]))
    assert (codec.vocab_size, codec.bos_id, codec.lossless) == (400, 399, True)


def test_a_normaliser_is_told_apart_from_a_lossless_tokenizer(trained, tmp_path):
    """NFC joins what the text keeps apart: the bytes of the tokens are not the text's."""
    codec = load_codec(change_tokenizer(trained, tmp_path, normalizer={"type": "NFC"}))
    assert not codec.lossless
    assert codec.decode(codec.encode("e\u0301")) == "\u00e9".encode()


def test_tokenizers_without_a_byte_alphabet_are_refused(trained, tmp_path):
    """Their pieces do not say which bytes they stand for."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(UserError, match="found a model of type WordLevel"):
        load_codec(change_tokenizer(trained, tmp_path, model=model))
    model = {"type": "BPE", "vocab": {"\u2581a": 0}, "merges": []}
    with pytest.raises(UserError, match="byte alphabet"):
        load_codec(change_tokenizer(trained, tmp_path, model=model, added_tokens=[]))


@pytest.mark.parametrize(("kind", "library"), [("bytelevel", "tokenizers"), ("caseops", "sentencepiece")])
def test_a_missing_library_is_named(trained, monkeypatch, kind, library):
    """The reader of the message knows what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"pip install {library}"):
        load_codec(trained[kind])


def test_super_bpe_merges_span_words_only_after_the_transition(tmp_path):
    """Else the second stage did nothing, or the first one's rule was not kept."""
    texts = ["one of the many and one of the few, 1 of the 12\n"] * 3 + ["other of the words that end"]
    train_tokenizer(texts, 300, tmp_path / "super.json", "superbpe", 275)
    merges = json.loads((tmp_path / "super.json").read_text())["model"]["merges"]
    spans = [i for i, pair in enumerate(merges) if "\u0120" in "".join(pair)[1:]]
    assert spans and min(spans) >= 275 - 257
    codec = load_codec(tmp_path / "super.json")
    pieces = [codec.decode([token]) for token in codec.encode(texts[0])]
    assert pieces == [b"one of the many and one of the few, ", b"1", b" of the ", b"1", b"2", b"\n"]


# ---- Files of ranks ---------------------------------------------------------------------------------


def write_ranks(path: Path, pieces: list[bytes]) -> Path:
    path.write_bytes(b"".join(b"%b %d\n" % (b64encode(piece), rank) for rank, piece in enumerate(pieces)))
    return path


def small_ranks(codecs) -> list[bytes]:
    """The tokens of the small byte-level tokenizer, without its special one, in order of their merges."""
    return [codecs["bytelevel"].decode([token]) for token in range(1, 400)]


@PROPERTY
@given(text=TEXTS)
def test_every_family_gives_every_text_back(ranked, text):
    """A split rule that misses a character would lose it without a word."""
    for codec in ranked.values():
        ids = codec.encode(text)
        assert codec.lossless and codec.decode(ids) == text.encode()
        assert codec.token_bytes(ids).sum() == len(text.encode()) and codec.bos_id not in ids


@pytest.fixture(scope="module")
def ranked(codecs, tmp_path_factory):
    """One small file of each family."""
    folder = tmp_path_factory.mktemp("ranks")
    return {
        name: load_codec(write_ranks(folder / f"{name}_small.tiktoken", small_ranks(codecs)), kind="tiktoken")
        for name in FAMILIES
    }


def test_families_differ_in_split_size_and_digest(ranked, tmp_path):
    """The same ranks under another name are another tokenizer."""
    sizes = [(codec.bos_id, codec.vocab_size) for codec in ranked.values()]
    assert sizes == [(50_256, 50_257), (100_257, 100_277), (199_999, 200_019)]
    assert len({codec.digest for codec in ranked.values()}) == 3
    special = ranked["r50k"].encode("<|endoftext|>")
    assert ranked["r50k"].decode(special) == b"<|endoftext|>" and special.size > 1
    with pytest.raises(UnicodeEncodeError):
        ranked["r50k"].encode("\ud800")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r50k_x", b"YQ== 0\nYg==\n", ":2: expected a base64 token"),
        ("r50k_x", b"YQ== 0\n!! 1\n", ":2: expected a base64 token"),
        ("r50k_x", b"YQ== 0\nYQ== 1\n", ":2: expected a new token of rank 1"),
        ("r50k_x", b"YQ== 0\nYg== 2\n", ":2: expected a new token of rank 1"),
        ("r50k_x", b"", "an empty file"),
        ("mine", b"YQ== 0\n", "r50k, cl100k, o200k"),
    ],
)
def test_damaged_rank_files_are_refused(tmp_path, name, content, message):
    """A lost line would shift every later id."""
    path = tmp_path / f"{name}.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_codec(path)


@pytest.mark.slow
@pytest.mark.reference("D10")
def test_200019_entries_pass_through_wide_shards(codecs, tmp_path):
    """o200k has 200,019 entries: its ids need more than 16 bits, in encoding, shards and reading."""
    pieces = small_ranks(codecs)
    letters = product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=4)
    pieces += [b" " + "".join(name).encode() for name in islice(letters, 199_998 - len(pieces))]
    codec = load_codec(write_ranks(tmp_path / "o200k_synthetic.tiktoken", pieces), 200_019)
    words = [pieces[rank] for rank in (399, 65_535, 65_536, 131_072, 199_997)]
    texts = [small_texts(1)[0], b"".join(words).decode()]
    train = [Document(text, f"train:{i}") for i, text in enumerate(texts)]
    manifest = write_dataset(tmp_path / "out", codec, train, [Document("a b", "val:1")], {}, num_threads=1)
    shard = read_shard(tmp_path / "out" / "fineweb_train_000000.bin")
    assert shard.dtype == np.dtype("<u4") and int(shard.max()) == 199_999
    at = np.flatnonzero(shard == 199_999)
    assert at[0] == 0 and codec.decode(shard[1 : at[1]]).decode() == texts[0]
    assert shard[at[1] + 1 :].tolist() == [399, 65_535, 65_536, 131_072, 199_997]
    assert manifest["train"]["token_bytes"] == sum(len(text.encode()) for text in texts)


@needs_corpora
@pytest.mark.slow
def test_gpt2_from_ranks_is_gpt2_from_merges(tmp_path):
    """Two libraries and two files of one tokenizer give the same ids for 100 documents."""
    merges = load_codec(shared("gpt2/vocab.json"), 50_257)
    pieces = [merges.decode([token]) for token in range(50_256)]
    ranks = load_codec(write_ranks(tmp_path / "r50k_base.tiktoken", pieces), 50_257)
    assert (ranks.bos_id, ranks.lossless) == (merges.bos_id, True)
    texts = [*shared_texts()[:100], *HOSTILE_TEXTS]
    for expected, found in zip(merges.encode_batch(texts), ranks.encode_batch(texts, 2), strict=True):
        assert expected.tolist() == found.tolist()


@needs_corpora
def test_gpt2_gives_the_known_ids():
    """System A's tokenizer: ids 15496, 995 are its "Hello world"."""
    codec = load_codec(shared("gpt2/vocab.json"), 50_257)
    assert (codec.bos_id, codec.lossless) == (50_256, True)
    assert codec.encode("Hello world").tolist() == [15496, 995]


@needs_corpora
@pytest.mark.slow
def test_system_e_tokenizer_has_its_ids(tmp_path):
    """200,000 SuperBPE entries and five added ones; the last of these separates documents."""
    content = json.loads(shared("superbpe_t80k/tokenizer.rebuilt.json").read_text(encoding="utf-8"))
    kinds = ("|||IP_ADDRESS|||", "<|padding|>", "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "<|endoftext|>")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": 200_000 + i, "content": name, "special": True} | flags for i, name in enumerate(kinds)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    codec = load_codec(tmp_path / "tokenizer.json", 200_005)
    assert (codec.bos_id, codec.lossless) == (200_004, True)
    sizes = codec.token_bytes(np.arange(200_005))
    assert sizes[200_000:].tolist() == [0] * 5 and sizes[:200_000].min() == 1


@pytest.mark.parametrize(
    ("name", "inside", "total"),
    [("E_yxanul270_mem9", 119_562_240, 273_284_480), ("E_yxanul197_ultra10", 170_655_744, 196_398_464)],
)
@pytest.mark.reference("E5")
@pytest.mark.reference("E6")
def test_system_es_vocabulary_alone_is_not_aligned_to_16(name, inside, total):
    """Eight-bit products need widths that 16 divides: all of the blocks' have them, 200,005 ids leave 5.

    The blocks hold the matrices of the seven products that system E runs in eight bits.
    """
    cfg = recipe(f"reference_systems/{name}")
    named = {key: param for key, param in shape_of(cfg).named_parameters() if param.ndim == 2}
    blocks = [param for key, param in named.items() if key.startswith("blocks.")]
    assert len(blocks) == 28 * 6  # gate and up of the mlp are one matrix here
    assert sum(param.numel() for param in blocks) == inside
    assert sum(param.numel() for param in shape_of(cfg).parameters()) == total
    assert round(100 * inside / total, 2) == {119_562_240: 43.75, 170_655_744: 86.89}[inside]
    widths = {width for param in named.values() for width in param.shape}
    assert {width for width in widths if width % 16} == {200_005} and 200_005 % 16 == 5


# ---- BESE -------------------------------------------------------------------------------------------


def slow_bese(codec, text: str) -> list[int]:
    """Encode as the definition says: character by character, then the lowest merge, leftmost, until none."""
    ids = []
    for char in text:
        low = char.lower()
        if not char.isascii():
            ids += [29] * len(char.encode())
        elif low in SINGLE_LETTERS:
            ids.append(4 + SINGLE_LETTERS.index(low))
        elif low.isalpha():
            group = next(i for i, letters in enumerate(GROUPS) if low in letters)
            ids += [15 + group, 19 + GROUPS[group].index(low)]
        elif low.isdigit():
            ids.append(30 + int(low))
        else:
            ids.append({" ": 23, ".": 24, ",": 25, "\n": 26, "?": 27, "'": 28, '"': 28}.get(char, 29))
    ranks = {pair: new for *pair, new in codec._merges for pair in [tuple(pair)]}
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]:
        new, i = min(pairs)
        ids[i : i + 2] = [new]
    return ids


@pytest.mark.reference("B2")
@settings(PROPERTY, max_examples=60)
@given(text=st.text() | st.text(alphabet=ALPHABET) | st.sampled_from(small_texts(4)))
@example(text="\u0130 \u212a \u00df \U0001f600 \t \u201cx\u201d")
def test_bese_is_canonical_bpe_and_counts_every_byte_of_any_text(codecs, text):
    """Sizes that add up for every string keep the denominator that of the text."""
    ids = codecs["bese"].encode(text)
    assert ids.tolist() == slow_bese(codecs["bese"], text)
    assert int(codecs["bese"].token_bytes(ids).sum()) == len(text.encode())


@PROPERTY
@given(ids=st.lists(st.integers(4, 6), max_size=40), right=st.integers(4, 6))
def test_merging_replaces_from_the_left(ids, right):
    """In a run of three equal symbols the first two merge, not the last."""
    expected, i = [], 0
    while i < len(ids):
        is_pair = ids[i : i + 2] == [4, right]
        expected.append(9 if is_pair else ids[i])
        i += 1 + is_pair
    assert merge_pair(np.array(ids, np.uint16), 4, right, 9).tolist() == expected


@pytest.mark.reference("B3")
def test_bese_says_that_it_loses_text(codecs):
    """Its score is not comparable with that of lossless tokenizers."""
    codec = codecs["bese"]
    assert not codec.lossless
    assert codec.decode(codec.encode("The")) == b"the"
    assert codec.decode(codec.encode("the cat.")) == b"the cat."
    assert codec.decode(codec.encode('"A!" \u00e9')) == b"'a\x1a' \x1a\x1a"


@pytest.mark.reference("B4")
def test_bese_merges_of_two_known_documents(tmp_path):
    """The most frequent pair wins, of equals the one with the lowest ids; pairs never cross documents."""
    train_tokenizer(["eee eee", "ee tt tt"], NUM_BASE + 4, tmp_path / "toy.json", "bese")
    content = json.loads((tmp_path / "toy.json").read_text())
    # e e 5 times; then, each twice, t t before space t and ee e; then space tt before ee e.
    assert content["merges"] == [[[4, 4], 40], [[5, 5], 41], [[23, 41], 42], [[40, 4], 43]]
    with pytest.raises(UserError, match=r"gives 44"):
        train_tokenizer(["eee eee", "ee tt tt"], NUM_BASE + 5, tmp_path / "more.json", "bese")


def test_bese_documents_are_apart_in_training():
    """A merge across documents would never be used, and would make one that is used rarer."""
    ids = to_base(["te", "te"], base_table(SINGLE_LETTERS, GROUPS))
    assert ids.tolist() == [BESE_BOS, 5, 4, BESE_BOS, 5, 4]


@pytest.mark.parametrize(
    ("field", "value"),
    [("groups", ["abcd", "efgh", "ijkl", "mno"]), ("vocab_size", 121), ("single_letters", "etaoinsrhd"),
     ("version", 1), ("merges", None), ("groups", [1, 2, 3, 4])],
)  # fmt: skip
def test_a_bese_file_that_contradicts_itself_is_refused(trained, tmp_path, field, value):
    """Other groups give other ids for the same letters."""
    content = json.loads(trained["bese"].read_text()) | {field: value}
    (tmp_path / "bese.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected BESE version 2"):
        load_codec(tmp_path / "bese.json")


def test_a_bese_merge_of_a_later_id_is_refused(trained, tmp_path):
    """Merges in another order would be applied in another order."""
    content = json.loads(trained["bese"].read_text())
    for damaged in ([[4, 50], 43], [[4, 5], 44], [[4], 43], [["e", 5], 43], 43):
        content["merges"][3] = damaged
        (tmp_path / "bese.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="expected merge 3 to make id 43"):
            load_codec(tmp_path / "bese.json")


BESE_VECTORS = [
    ("The cat sat.", [83, 242, 121, 10, 69, 24], 12),
    ("quick", [187, 81, 67], 5),
    ("Hello, World!", [12, 91, 136, 71, 262, 14, 13, 29], 13),
    ("caf\u00e9", [41, 6, 46, 64], 5),
    ("\U0001f600", [85], 4),
    ("1984", [31, 39, 38, 34], 4),
    ("", [], 0),
]


@needs_corpora
@pytest.mark.reference("B1")
def test_system_b_tokenizer_has_its_sizes_and_vectors():
    """The file of pull request 1666: 288 ids, known histogram of sizes, known ids."""
    codec = load_codec(shared("bese_288/tokenizer.json"), 288)
    assert codec.digest.startswith("ae58c2fb") and codec.digest.endswith("d1567a7f")
    sizes = codec.token_bytes(np.arange(288))
    assert np.bincount(sizes).tolist() == [8, 47, 109, 83, 28, 7, 6]
    assert np.flatnonzero(sizes == 0).tolist() == [0, 1, 2, 3, 15, 16, 17, 18]
    for text, ids, size in BESE_VECTORS:
        assert codec.encode(text).tolist() == ids
        assert int(codec.token_bytes(np.array(ids, np.int32)).sum()) == size


# ---- CaseOps ----------------------------------------------------------------------------------------

NAMES = dict(zip(CASE_OPERATORS, "TANE"))
CASE_EXAMPLES = [
    ("word Word WORD X", "word Tword Aword Tx"),
    ("iPhone OpenAI", "iNphone TopenNaNi"),
    ("McDONALD's I'M", "TmcNdNoNnNaNlNd's Ti'Tm"),
    ("\u00c9cole A1B \u212a", "\u00c9cole Ta1Tb \u212a"),
    ("\ue001a\ue004", "ETaEE"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), CASE_EXAMPLES)
def test_capitals_become_operators(text, expected):
    """The contest's definition, word by word."""
    assert "".join(NAMES.get(char, char) for char in to_case_operators(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Word Word WORD  X iPhone", "TwordT wordA word T x iNphone"),
        (" McX'S The\nThe", "T mcNx'TsT the\nTthe"),
        ("\ue001The \ue004 A", "ETTthe EET a"),
    ],
)
def test_operators_may_stand_before_the_space(text, expected):
    """Then " the" is one piece, whether its word has a capital or not."""
    assert "".join(NAMES.get(char, char) for char in to_case_operators(text, True)) == expected


@pytest.mark.parametrize("before_space", [False, True])
@PROPERTY
@given(text=TEXTS)
def test_the_case_transform_is_undone_exactly(before_space, text):
    """Two texts with one transform would score as one."""
    assert from_case_operators(to_case_operators(text, before_space).encode()) == text.encode()


@PROPERTY
@given(st.lists(st.sampled_from([b"a", b"Z", b"\xff", b"\xee\x80", *(op.encode() for op in CASE_OPERATORS)])))
def test_any_bytes_can_be_decoded(parts):
    """A model may sample operators in any order, and bytes that are no UTF-8."""
    assert isinstance(from_case_operators(b"".join(parts)), bytes)


@PROPERTY
@given(st.lists(st.booleans()))
def test_an_escaped_escape_does_not_escape(escapes):
    """Of a run of escapes every second one is text."""
    expected, acts = [], False
    for is_escape in escapes:
        expected.append(acts)
        acts = is_escape and not acts
    assert follows_escape(np.array(escapes, dtype=bool)).tolist() == expected


@PROPERTY
@given(text=TEXTS)
@example(text=" \u2581 x")
@example(text="\ufb01 e\u0301  THE end\n")
def test_the_sidecar_counts_every_byte_where_the_model_normalises(normalising_case_ops, text):
    """The contest scores CaseOps by the bytes of the original text."""
    codec = normalising_case_ops
    ids, sizes = codec.encode_with_bytes(text)
    assert not codec.lossless and ids.tolist() == codec.encode(text).tolist()
    assert ids.size == sizes.size and (sizes >= 0).all()
    assert int(sizes.sum()) == (len(text.encode()) if ids.size else 0)


def test_the_sidecar_of_a_word_is_at_its_letters(normalising_case_ops):
    """Operators count nothing, a ligature its three bytes, dropped spaces at the next token."""
    ids, sizes = normalising_case_ops.encode_with_bytes("The  \ufb01")
    pieces = [normalising_case_ops._sp.id_to_piece(int(token)) for token in ids]
    assert pieces[0] == CASE_OPERATORS[0] and sizes[0] == 0
    assert int(sizes.sum()) == 8


@needs_corpora
@pytest.mark.slow
def test_the_contests_case_ops_model_counts_the_bytes_of_shared_text():
    """The transform gives every document back; the sidecar adds up to the text's own bytes."""
    codec = load_codec(shared("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"), 8192)
    texts = shared_texts()
    assert codec.kind == "caseops"
    assert [from_case_operators(to_case_operators(text).encode()) for text in texts] == [
        text.encode() for text in texts
    ]
    assert sum(int(codec.encode_with_bytes(text)[1].sum()) for text in texts) == 4_245_662


@pytest.mark.parametrize("seed", range(4))
def test_a_tokenizer_with_flipped_bits_is_opened_or_refused_in_a_sentence(tmp_path, tiny_data, seed):
    """A piece that is no text any more, a length of another: never another exception."""
    whole, rng = (tiny_data / "tokenizer.model").read_bytes(), random.Random(seed)
    path = tmp_path / "tokenizer.model"
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            load_codec(path)
