"""Train tokenizers of every kind: the same documents in the same order give the same file, byte for byte."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import UserError, atomic_file, parse_json
from data.codecs import load_codec
from data.codecs.bese import (
    BESE_TYPE,
    GROUPS,
    NUM_BASE,
    NUM_SPECIAL,
    SINGLE_LETTERS,
    base_table,
    merge_pair,
    to_base,
)
from data.codecs.caseops import CASE_BEFORE_SPACE, CASE_OPERATORS, to_case_operators
from data.codecs.raw import BYTES_FILE

# Merges settle long before this; all training text is held in memory.
MAX_TRAINING_BYTES = 1 << 30
# The contest's ids, digit splitting and byte fallback.
COMMON_OPTIONS = {
    "model_type": "bpe",
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.999,
    "add_dummy_prefix": False,
    "minloglevel": 2,  # errors only; they also raise
}
# The contest normalises and, by SentencePiece's defaults, trims spaces and skips documents over 4,192 bytes.
CONTEST_OPTIONS = COMMON_OPTIONS | {"normalization_rule_name": "nmt_nfkc", "hard_vocab_limit": False}
LOSSLESS_OPTIONS = COMMON_OPTIONS | {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "required_chars": "\u2581\n",  # a space and a newline always have a token of their own
    "max_sentence_length": 1 << 30,  # a "sentence" is a whole document here; longer ones are skipped
}
SENTENCE_BYTES = 4192  # SentencePiece's own max_sentence_length
RESERVED = "\u2585"  # stands for unknown characters while SentencePiece trains
SENTENCEPIECE_SAYS = {  # pattern of a message -> what it means
    r"too high .* <= (\d+)": "this text gives at most {0} entries: lower --vocab-size or give more text.",
    r"smaller than required_chars\. \d+ vs (\d+)": "this text needs at least {0} entries ({needs}).",
    r"insert_id": "this kind needs more: {needs}.",
    r"!sentences_\.empty\(\)": "no document is left to train on. Give text that SentencePiece does not drop.",
}
# Texts that normalising or space-trimming models change, beside the codecs' own probes.
HOSTILE_TEXTS = (
    "  a  ",
    "\ta\n\n\n b\r\n",
    "\u2581 \u2581",
    "\0\x7f\ufeff\ufffd",
    "1234 \u0661",
    "<s></s><unk><0x41>",
    "\u212a \u0130 \u00df \u1e9e \ufb03 e\u0301 \u0345",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "iPhone OpenAI NASA X aB \ue001\ue002\ue003\ue004\ue004A \ue001",
    "\u201cquoted\u201d 'it''s' \"x\" `y`",
    " " * 5000,
    "a" * 5000 + "A" * 5000,
    "\u2581" * 300 + "\ue004" * 301,
)
END_OF_TEXT = "<|endoftext|>"
MOST_BESE = 8192  # entries: pairs are counted in a table of their square, half a gigabyte
BYTE_ENTRIES = 257  # of byte-level BPE before any merge: END_OF_TEXT and the bytes
# What may not be part of a longer token when spaces may (the rule of the shared SuperBPE vocabulary, with
# one digit a token): digits, runs of signs, spaces at the end of a run.
SUPERWORD_SPLIT = r"\p{N}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
FIRST_STAND_IN = 0x10000  # a token of the first stage stands for itself as this character and on
SPARE_MERGES = 64  # asked for beyond the vocabulary: a few spell a token that exists


def training_texts(documents: Iterable[str]) -> Iterator[str]:
    """Pass texts through until MAX_TRAINING_BYTES characters are reached."""
    remaining = MAX_TRAINING_BYTES
    for text in documents:
        if remaining <= 0:
            print(f"note: only the first {MAX_TRAINING_BYTES:,} characters are trained on", file=sys.stderr)
            return
        remaining -= len(text)
        yield text


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    out: str | Path,
    kind: str = "sentencepiece",
    transition: int | None = None,
) -> None:
    """Train a tokenizer of `vocab_size` entries and write it to `out`; a lossless kind only if it is so.

    `transition` is the size at which superbpe lets merges span words.
    """
    trainer = TRAINERS[kind]
    out = Path(out)
    if vocab_size > trainer.most:
        raise UserError(f"--vocab-size {vocab_size}: expected at most {trainer.most:,} for --kind {kind}.")
    if out.suffix != trainer.suffix:
        raise UserError(f"{out}: expected a name that ends in {trainer.suffix}.")
    if transition is not None and not (kind == "superbpe" and BYTE_ENTRIES <= transition <= vocab_size):
        raise UserError(
            f"--transition {transition}: for --kind superbpe only, from {BYTE_ENTRIES} to --vocab-size "
            f"{vocab_size}."
        )
    # A list, not a stream: the libraries would wrap an error of the reader in one of their own.
    texts = list(training_texts(documents))
    content = trainer.train(texts, vocab_size, *([transition] if transition else []))
    if trainer.is_lossless:
        with TemporaryDirectory() as folder:  # before it replaces a tokenizer that may be in use
            candidate = Path(folder) / out.name
            candidate.write_bytes(content)
            check_lossless(candidate)
    with atomic_file(out) as file:
        file.write(content)


def check_lossless(path: Path) -> None:
    """Raise unless the model gives every hostile text back, byte for byte."""
    codec = load_codec(path)
    broken = [text for text in HOSTILE_TEXTS if codec.decode(codec.encode(text)) != text.encode()]
    if not codec.lossless or broken:  # a fault of the options above, not of the text
        raise RuntimeError(f"{path}: the trained model is not lossless, broken: {broken!r}")


def require_size(found: int, vocab_size: int) -> None:
    """Raise when the text did not give the merges that the vocabulary needs."""
    if found < vocab_size:
        advice = f"this text gives {found} entries: lower it to that, or give more text."
        raise UserError(f"--vocab-size {vocab_size}: {advice}")
    if found > vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: this kind has at least {found} entries. Raise it.")


# ---- SentencePiece ----------------------------------------------------------------------------------


def train_sentencepiece(texts: list[str], vocab_size: int, options: dict) -> bytes:
    """Train a SentencePiece model; returns its file."""
    import sentencepiece

    most_bytes = options.get("max_sentence_length", SENTENCE_BYTES)
    note_dropped(texts, most_bytes)
    model = io.BytesIO()
    options = options | {"sentence_iterator": iter(texts), "model_writer": model, "vocab_size": vocab_size}
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"--vocab-size {vocab_size}: {explain(str(error))}") from error
    return model.getvalue()


def note_dropped(texts: list[str], most_bytes: int) -> None:
    """Say which documents SentencePiece leaves out of training without a word."""
    too_long = sum(len(text.encode()) > most_bytes for text in texts)
    reserved = sum(RESERVED in text for text in texts)
    if too_long or reserved:
        print(
            f"note: of {len(texts):,} documents SentencePiece does not train on {too_long:,} of more than "
            f"{most_bytes:,} bytes and {reserved:,} that hold U+2585, which it reserves",
            file=sys.stderr,
        )


def explain(message: str) -> str:
    """Say what a message of SentencePiece's trainer means and what to change."""
    needs = "4 special and 256 byte entries, one for each character and each symbol of the kind"
    for pattern, meaning in SENTENCEPIECE_SAYS.items():
        if found := re.search(pattern, message):
            return meaning.format(*found.groups(), needs=needs)
    return f"SentencePiece cannot train on this text ({message}). Change --vocab-size or the text."


def train_lossless(texts: list[str], vocab_size: int) -> bytes:
    """Train a model that gives every text back."""
    return train_sentencepiece(texts, vocab_size, LOSSLESS_OPTIONS)


def train_contest(texts: list[str], vocab_size: int) -> bytes:
    """Train a model as the contest trains its own."""
    stripped = (text.replace("\0", " ").strip() for text in texts)
    return train_sentencepiece([text for text in stripped if text], vocab_size, CONTEST_OPTIONS)


def train_case_ops(texts: list[str], vocab_size: int) -> bytes:
    """Train a lossless model on transformed text; the operators get the ids after the special ones."""
    options = LOSSLESS_OPTIONS | {"user_defined_symbols": list(CASE_OPERATORS)}
    return train_sentencepiece([to_case_operators(text) for text in texts], vocab_size, options)


def train_spaced_case_ops(texts: list[str], vocab_size: int) -> bytes:
    """Do the same with operators before the space of their word, which the model's last symbol says."""
    options = LOSSLESS_OPTIONS | {"user_defined_symbols": [*CASE_OPERATORS, CASE_BEFORE_SPACE]}
    return train_sentencepiece([to_case_operators(text, True) for text in texts], vocab_size, options)


# ---- Byte-level BPE ---------------------------------------------------------------------------------


def train_byte_level(texts: list[str], vocab_size: int) -> bytes:
    """Train byte-level BPE with the split rule of GPT-2 and one digit a token; returns tokenizer.json."""
    tokenizer = train_byte_merges(texts, vocab_size)
    require_size(tokenizer.get_vocab_size(), vocab_size)
    return tokenizer.to_str().encode()


def train_byte_merges(texts: list[str], vocab_size: int):
    """Train a `tokenizers.Tokenizer`: END_OF_TEXT, the 256 bytes, merges."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("training byte-level BPE needs `pip install tokenizers`.") from error
    if vocab_size < BYTE_ENTRIES:
        raise UserError(f"--vocab-size {vocab_size}: byte-level BPE needs at least {BYTE_ENTRIES} entries.")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_super_bpe(texts: list[str], vocab_size: int, transition: int = 0) -> bytes:
    """Train SuperBPE (arXiv 2503.13423): merges within words to `transition`, then across; tokenizer.json.

    In the second stage each token of the first is one character of a new text, so a common BPE trainer
    learns the merges. `transition` 0 means 0.4 of the vocabulary, as 80,000 of 200,000.
    """
    tokenizer = train_byte_merges(texts, transition or max(BYTE_ENTRIES, vocab_size * 2 // 5))
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    split = pre_tokenizers.Split(Regex(SUPERWORD_SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    second = Tokenizer(models.BPE())
    second.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + SPARE_MERGES,
        initial_alphabet=[chr(FIRST_STAND_IN + token) for token in names],
        show_progress=False,
    )
    second.train_from_iterator(stand_ins(tokenizer, texts), trainer)
    content = parse_json(tokenizer.to_str(), "trained tokenizer")
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    for pair in parse_json(second.to_str(), "trained merges")["model"]["merges"]:
        if len(vocab) == vocab_size:
            break
        left, right = ("".join(names[ord(char) - FIRST_STAND_IN] for char in side) for side in pair)
        vocab.setdefault(left + right, len(vocab))
        merges.append([left, right])
    require_size(len(vocab), vocab_size)
    return json.dumps(content, ensure_ascii=False).encode()


def stand_ins(tokenizer, texts: list[str]) -> Iterator[str]:
    """Write each text with one character a token and a newline where no merge may cross."""
    for text in texts:
        encoding = tokenizer.encode(text)
        ids, words = np.array(encoding.ids), np.array(encoding.word_ids)
        starts = np.flatnonzero(np.diff(words)) + 1
        points = np.insert(ids + FIRST_STAND_IN, starts, ord("\n"))
        yield points.astype("<u4").tobytes().decode("utf-32-le")


# ---- Others -----------------------------------------------------------------------------------------


def write_bytes_file(texts: list[str], vocab_size: int) -> bytes:
    """Write the contest's byte tokenizer; nothing is learned from the texts."""
    require_size(BYTES_FILE["vocab_size"], vocab_size)
    return (json.dumps(BYTES_FILE, indent=2, sort_keys=True) + "\n").encode()


def train_bese(texts: list[str], vocab_size: int) -> bytes:
    """Train BESE merges; returns a file of system B's format."""
    merges = learn_merges(to_base(texts, base_table(SINGLE_LETTERS, GROUPS)), vocab_size - NUM_BASE)
    require_size(NUM_BASE + len(merges), vocab_size)
    content = {
        "tokenizer_type": BESE_TYPE,
        "version": 2,
        "base_vocab_size": NUM_BASE,
        "num_merges": len(merges),
        "vocab_size": NUM_BASE + len(merges),
        "single_letters": SINGLE_LETTERS,
        "groups": list(GROUPS),
        "merges": merges,
    }
    return json.dumps(content, separators=(",", ":")).encode()


def learn_merges(ids: np.ndarray, num_merges: int) -> list[list]:
    """Learn BPE merges on (N,) base ids: [[[left, right], new], ...]; stops where no pair occurs twice.

    The most frequent pair wins, of equals the one with the lowest left id, then the lowest right id.
    Pairs are counted at every place, also where two overlap ("aaa" has two). Special ids never merge.
    """
    size, merges = NUM_BASE + num_merges, []
    for new in tqdm(range(NUM_BASE, size), desc="merges", mininterval=1.0):
        pairs = ids[:-1].astype(np.int64) * size + ids[1:]
        counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
        counts[:NUM_SPECIAL] = counts[:, :NUM_SPECIAL] = 0
        left, right = divmod(int(counts.argmax()), size)
        if counts[left, right] < 2:
            break
        ids = merge_pair(ids, left, right, new)
        merges.append([[left, right], new])
    return merges


class Trainer(NamedTuple):
    """How one kind is trained."""

    train: Callable[..., bytes]
    suffix: str
    vocab_size: int  # the default
    is_lossless: bool
    meaning: str
    most: int = 1 << 20  # entries: four times the largest vocabularies in use


TRAINERS = {
    "sentencepiece": Trainer(train_lossless, ".model", 1024, True, "SentencePiece BPE that keeps every byte"),
    "contest": Trainer(train_contest, ".model", 1024, False, "the contest's options: NFKC, spaces merged"),
    "caseops": Trainer(train_case_ops, ".model", 1024, True, "capitals as operators before lower case"),
    "caseops_spaced": Trainer(
        train_spaced_case_ops, ".model", 1024, True, "the same, operators before the word's space"
    ),
    "bytelevel": Trainer(train_byte_level, ".json", 1024, True, "GPT-2's BPE of bytes, one digit a token"),
    "superbpe": Trainer(train_super_bpe, ".json", 1024, True, "the same, later merges span words"),
    "bese": Trainer(train_bese, ".json", 288, False, "system B's alphabet: no case, few signs", MOST_BESE),
    "bytes": Trainer(write_bytes_file, ".json", 260, True, "the contest's byte260; learns nothing"),
}
