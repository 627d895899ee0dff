"""A long text that is encoded in parts has the tokens of the whole, whatever the tokenizer and the text."""

import json
import random
import sys
from base64 import b64encode

import numpy as np
import pytest
from fixtures_data import needs_corpora, shared, small_texts
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from data import prepare, seams
from data.changes import normalizer_rules
from data.codecs import load_codec
from data.codecs.ranks import FAMILIES
from data.documents import Document, batched
from data.seams import beside_spaces, cut, encode_parts, find_seam, find_split_seam
from data.shards import find_shards, read_manifest, read_shard
from dev.bench import peak_memory

KINDS = ["sentencepiece", "caseops", "caseops_spaced", "bytelevel", "superbpe", "bese", "bytes"]
SHARED = [
    "fineweb_1024_bpe.model",
    "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
    "gpt2/vocab.json",
]
SHARED += ["superbpe_t80k/tokenizer.rebuilt.json", "bese_288/tokenizer.json"]
# What normalizers, split rules, operators and merges do something about, in any order beside each other.
ATOMS = [
    *("d", "e", "d e", "class number"),
    *(" ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "a", "b", "The", " the", "of", "OF", "iPhone", "X", "Q"),
    *("'s", "'ll", "LL", "don't", "1", "12", "1234", "12.5", "!", "!!", "...", "--", "//", "_", "A", "aB"),
    *("\u2581", "\u2581a", "a\u2581", "e\u0301", " \u0301", "\u0301", "\ufb01", "\u212a", "\ufdfa", "\u3000"),
    *("\u00a0", "\u200b", "\U0001f600", "\u4e2d", "\u6587", "\u3002", "\u3042", "\u00e9", "\u00df", "\u0130"),
    *("\ufeff", "\0", "\x1c", "\x85", "\u180e", "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\u00bd"),
    *("\u2460", "\u0661", "\u00b2", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "\ufffd", "\ud55c"),
    *(
        "\u0434",
        "\u0414",
        "x\u0308",
        "\u02d8",
        "\u00b4",
        "\u00a8 ",
        "return",
        "class",
        "import",
        "end of text",
    ),
]


def hostile_texts(count: int, seed: int) -> list[str]:
    """Make texts of atoms, and of words that a tokenizer knows."""
    rng, known = random.Random(seed), "".join(small_texts(3, seed))
    texts = []
    for _ in range(count):
        first = rng.randrange(len(known) - 60)
        parts = [rng.choice(ATOMS) for _ in range(rng.randrange(1, 30))] + [
            known[first : first + rng.randrange(60)]
        ]
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


def assert_parts_are_the_whole(codec, texts: list[str]) -> int:
    """Compare ids and sizes of texts with those of their parts; returns the number of cuts."""
    seam, num_cuts = find_seam(codec), 0
    for text in texts:
        parts = list(cut(text, seam))
        assert parts[0] + "".join(part[1:] for part in parts[1:]) == text
        num_cuts += len(parts) - 1
        whole = np.array([codec.bos_id, *codec.encode(text)], dtype=np.int32)
        ids, sizes, counts = encode_parts(codec, 1, False, parts, True)
        assert ids.tolist() == whole.tolist(), (text, parts)
        assert sizes.tolist() == codec.token_bytes(whole).tolist(), (text, parts)
        if codec.needs_sidecar and codec.encode(text).size:
            whole, counted = codec.encode_with_bytes(text)
            if counted.sum() == len(text.encode()):
                ids, sizes, counts = encode_parts(codec, 1, True, parts, True)
                assert counts[:2] == (counted.sum(), counted.sum())
                assert ids[1:].tolist() == whole.tolist() and sizes[1:].tolist() == counted.tolist(), (
                    text,
                    parts,
                )
    return num_cuts


@pytest.fixture
def small_parts(monkeypatch):
    """Cut almost everywhere where it may be cut."""
    monkeypatch.setattr(seams, "PART_CHARS", 3)


@pytest.mark.parametrize("count", [30, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_tokens_of_the_whole(small_parts, trained, lossless_model, kind, count):
    """Also where a model trims spaces, folds characters, splits words or writes capitals as operators."""
    codec = load_codec(lossless_model if kind == "sentencepiece" else trained[kind])
    assert assert_parts_are_the_whole(codec, hostile_texts(count, seed=1)) > count / 2


def test_parts_of_a_normalising_case_ops_model_count_the_bytes_of_the_text(small_parts, normalising_case_ops):
    """Its sizes are those of the original text, which a part's first, repeated character must not change."""
    assert assert_parts_are_the_whole(normalising_case_ops, hostile_texts(40, seed=2)) > 20


@needs_corpora
@pytest.mark.parametrize("name", SHARED)
def test_parts_have_the_tokens_of_the_whole_for_published_tokenizers(small_parts, name):
    """The contest's own, GPT-2's and system B's."""
    codec = load_codec(shared(name))
    assert assert_parts_are_the_whole(codec, hostile_texts(400, seed=3)) > 100


# ---- Models in which a seam is not where it seems ---------------------------------------------------


def train_model(folder, **options) -> str:
    """Train a SentencePiece model with options of its own; returns its file."""
    texts = [text.replace("\n", " ") for text in small_texts(60)]
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2, "bos_id": 1}
    path = str(folder / "own")
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=path, **settings | options)
    return f"{path}.model"


@pytest.mark.parametrize(
    ("options", "has_seam"),
    [
        ({}, True),  # the library's own: a space before the text, spaces merged, NFKC
        ({"add_dummy_prefix": False, "remove_extra_whitespaces": False}, True),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, True),
        ({"normalization_rule_name": "identity", "split_by_whitespace": False}, True),  # spaces within pieces
        ({"user_defined_symbols": ["class number", "d e"], "add_dummy_prefix": False}, True),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"model_type": "unigram", "vocab_size": 300}, False),  # sums of a whole text are rounded otherwise
    ],
    ids=str,
)
def test_models_of_other_options_are_cut_rightly_or_not_at_all(tmp_path, small_parts, options, has_seam):
    """A dummy prefix comes once, at the start of the text, and a piece may hold spaces."""
    codec = load_codec(train_model(tmp_path, **options))
    assert (find_seam(codec) is not None) == has_seam
    assert (assert_parts_are_the_whole(codec, hostile_texts(30, seed=4)) > 0) == has_seam


def test_a_normalizer_that_replaces_words_and_spaces_is_seen_in_its_rules(tmp_path, small_parts):
    """Rules of two characters around a space cannot be cut between them; here are some of one's own."""
    rows = {"d c": "Q", "a ": "4", " t": "T", "g": "j"}
    spell = " ".join
    table = "".join(
        f"{spell(f'{ord(char):x}' for char in left)}\t{spell(f'{ord(char):x}' for char in right)}\n"
        for left, right in rows.items()
    )
    (tmp_path / "rules.tsv").write_text(table)
    path = train_model(tmp_path, normalization_rule_tsv=str(tmp_path / "rules.tsv"), add_dummy_prefix=False)
    model = SentencePieceProcessor(model_file=path).serialized_model_proto()
    rules = normalizer_rules(model)
    assert beside_spaces(rules) == ({"d", "a"}, {"c", "t"})
    codec = load_codec(path)
    seam = find_seam(codec)
    assert seam.search("e x") and not any(map(seam.search, ("d x", "a x", "e c", "e t", "g x")))
    assert assert_parts_are_the_whole(codec, hostile_texts(60, seed=5)) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_split_rules_of_ranks_end_words_at_seams(tmp_path, small_parts, family):
    """Newlines join signs before them in some, and a sign or space joins the letters after it."""
    longer = [
        b" t",
        b"th",
        b" th",
        b"\n\n",
        b".\n",
        b"!!",
        b"  ",
        b" a",
        b"he",
        b" the",
        b" \n",
        b"12",
        b"'s",
    ]
    pieces = [bytes([value]) for value in range(256)] + longer
    path = tmp_path / f"{family}_toy.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (b64encode(piece), rank) for rank, piece in enumerate(pieces)))
    assert assert_parts_are_the_whole(load_codec(path), hostile_texts(100, seed=6)) > 20


PLAIN = {"normalizer": None, "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"added_tokens": [{"content": "d c", "special": False}]},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "d c"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Punctuation"}, PLAIN["pre_tokenizer"]],
            }
        },
    ],
    ids=str,
)
def test_unknown_rules_of_byte_level_files_have_no_seam(change):
    """What is not known is not cut: never another tokenization."""
    assert find_split_seam(PLAIN)
    assert find_split_seam(PLAIN | change) is None


# ---- Datasets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel", "caseops", "normalising", "bytes"])
def test_a_dataset_does_not_show_that_its_documents_were_cut(
    tmp_path, trained, lossless_model, normalising_case_ops, monkeypatch, kind
):
    """Shards, sidecars and counts are the same, and long documents are batches of their own."""
    path = {"normalising": normalising_case_ops.path, "sentencepiece": lossless_model}.get(kind) or trained[
        kind
    ]
    texts = ["".join(small_texts(9, seed)) for seed in range(6)] + small_texts(5, 9)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--input", str(source), "--tokenizer", str(path), "--val-docs", "3", "--num-threads", "1"]
    prepare.main([*options, "--out", str(tmp_path / "whole")])
    for module in ("data.documents", "data.prepare"):
        monkeypatch.setattr(f"{module}.LONG_BYTES", 2000)
    monkeypatch.setattr(seams, "PART_CHARS", 50)
    assert [len(batch) for batch in batched(Document(text, "") for text in texts)] == [1] * 6 + [5]
    counted = []
    monkeypatch.setattr(
        prepare, "encode_parts", lambda *job: counted.append(len(job[3])) or encode_parts(*job)
    )
    prepare.main([*options, "--out", str(tmp_path / "parts")])
    assert sum(counted) > 60
    assert read_manifest(tmp_path / "whole") == read_manifest(tmp_path / "parts")
    for shard in find_shards(tmp_path / "whole" / "fineweb_*.bin"):
        assert np.array_equal(read_shard(shard), read_shard(tmp_path / "parts" / shard.name))


def test_a_document_that_cannot_be_cut_is_named(tmp_path, trained, monkeypatch, capsys):
    """It takes much more memory; who runs out of it must know which document to cut."""
    for module in (prepare, seams):
        monkeypatch.setattr(module, "NOTED_BYTES", 1 << 20)
    (tmp_path / "long.txt").write_text("x" * (1 << 20))
    (tmp_path / "other.txt").write_text("other")
    files = ["--input", str(tmp_path / "long.txt"), "--val-input", str(tmp_path / "other.txt")]
    prepare.main([*files, "--tokenizer", str(trained["superbpe"]), "--out", str(tmp_path / "out")])
    assert "long.txt: over 1,048,576 bytes of this document hold no place" in capsys.readouterr().err


FIXED_BYTES = 150_000_000  # of the interpreter and its libraries
MANY = ["sentencepiece", "bytelevel", "caseops", "bese", "bytes"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell a child's memory")
@pytest.mark.parametrize("kind", MANY)
def test_a_document_of_50_mb_takes_at_most_eight_bytes_of_memory_a_byte(
    tmp_path, trained, lossless_model, kind
):
    """Beyond what any takes; one emoji makes every character of a string take four bytes."""
    words, size = "\U0001f600 " + " ".join(small_texts(40)), 50_000_000
    text = (words * (size // len(words.encode()) + 1))[: size - 3]
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"text": text}, ensure_ascii=kind != "bytes") + "\n")
    (tmp_path / "val.txt").write_text("validation")
    tokenizer = lossless_model if kind == "sentencepiece" else trained[kind]
    command = [sys.executable, "-m", "data.prepare", "--input", str(source), "--tokenizer", str(tokenizer)]
    command += [
        "--val-input",
        str(tmp_path / "val.txt"),
        "--out",
        str(tmp_path / "out"),
        "--num-threads",
        "2",
    ]
    assert peak_memory([*map(str, command)]) < 8 * size + FIXED_BYTES


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell a child's memory")
def test_200_mb_of_documents_of_all_lengths_take_less_than_a_gigabyte(tmp_path, lossless_model):
    """Very short ones, usual ones, and one of 25 MB among them."""
    short, usual = small_texts(1)[0][:30], "\U0001f600 " + " ".join(small_texts(6))
    texts = [short] * 2000 + [usual * 8000] + [usual, usual * 3] * 4000
    with open(tmp_path / "mixed.jsonl", "w") as file:
        total = 0
        while total < 200_000_000:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            total += sum(len(text.encode()) for text in texts)
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        "--input",
        str(tmp_path / "mixed.jsonl"),
        "--val-docs",
        "50",
    ]
    command += ["--tokenizer", str(lossless_model), "--out", str(tmp_path / "out"), "--num-threads", "2"]
    assert peak_memory(command) < 1_000_000_000
