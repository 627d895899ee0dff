"""A miniature world for programs: a toy tokenizer, Markov text of known entropy, shards.

Everything about the text is known: the probability of each token, which no legal scorer beats for long, and
the bytes that it stands for, which the printed bits per byte must divide by.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit.probes import Source, text_source
from data.shards import write_shard

BOS_ID = 1
FIRST_WORD = 3  # after the ids of "unknown", BOS and EOS
MAX_WORDS = 61  # ids that the text uses; larger vocabularies hold the rest unused
DOCUMENT_TOKENS = 40  # mean
LETTERS = "etaoinshrdlu"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # types of SentencePiece's pieces


class World(NamedTuple):
    """The text and what is known about it."""

    vocab_size: int
    source: Source  # over symbols 0 (a document's start) and 1.. (words)
    train: np.ndarray
    val: np.ndarray

    def ids(self, symbols: np.ndarray) -> np.ndarray:
        """Turn symbols of the source into token ids."""
        return np.where(symbols == 0, BOS_ID, symbols + FIRST_WORD - 1).astype(np.uint16)

    def draw(self, num_tokens: int, seed: int) -> np.ndarray:
        """Draw text that begins with a document."""
        return self.ids(self.source.draw(num_tokens, seed))

    def noise(self, num_tokens: int, seed: int) -> np.ndarray:
        """Draw words, each as likely as any other, whatever came before."""
        count = len(self.source.first)
        symbols = np.random.default_rng(seed).integers(1, count, num_tokens)
        symbols[0] = 0
        return self.ids(symbols)

    def source_nats(self, tokens: np.ndarray) -> float:
        """What the source itself pays for the targets of a text that it may have drawn."""
        symbols = np.where(tokens == BOS_ID, 0, tokens.astype(int) - FIRST_WORD + 1)
        return float(self.source.nats(symbols).sum())

    def noise_nats(self, tokens: np.ndarray) -> float:
        """What the noise itself pays for its targets."""
        return float(np.log(len(self.source.first) - 1) * (len(tokens) - 1))


def make_source(num_words: int, seed: int = 0) -> Source:
    """Draw a Markov chain over words and document starts; rows are as uneven as those of text."""
    words = text_source(num_words, seed, concentration=0.3)
    step = np.zeros((num_words + 1, num_words + 1))
    step[1:, 0] = 1 / DOCUMENT_TOKENS
    step[1:, 1:] = words.step * (1 - 1 / DOCUMENT_TOKENS)
    step[0, 1:] = words.first
    return Source(np.eye(num_words + 1)[0], step)


def make_world(vocab_size: int, num_train: int, num_val: int, seed: int = 0) -> World:
    """Draw training and validation text."""
    source = make_source(min(vocab_size - FIRST_WORD, MAX_WORDS), seed)
    world = World(vocab_size, source, np.zeros(0), np.zeros(0))
    return world._replace(train=world.draw(num_train, seed + 1), val=world.draw(num_val, seed + 2))


def piece_texts(vocab_size: int) -> list[str]:
    """Name the pieces: two or three letters, every other one with SentencePiece's mark of a space."""
    names = ["<unk>", "<s>", "</s>"]
    for word in range(vocab_size - FIRST_WORD):
        letters, rest = "", word
        for _ in range(2 + word % 2 if vocab_size < 100 else 4):
            rest, letter = divmod(rest, len(LETTERS))
            letters += LETTERS[letter]
        letters += LETTERS[word // 2 % len(LETTERS)] * (word % 3)
        names.append("\u2581" * (word % 2) + letters)
    return names


def target_bytes(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count the bytes that each target stands for, by the contest's rule: (N,)."""
    names = piece_texts(vocab_size)
    size = np.array([len(name.removeprefix("\u2581")) for name in names])
    size[:FIRST_WORD] = 0
    space = np.array([name.startswith("\u2581") for name in names])
    previous, targets = tokens[:-1].astype(int), tokens[1:].astype(int)
    return size[targets] + (space[targets] & (previous >= FIRST_WORD))


def _field(number: int, value: bytes | int | float) -> bytes:
    """Encode a field of a protocol buffer; lengths and integers here are below 2**21."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    head = _varint(number << 3 | (2 if isinstance(value, bytes) else 0))
    return head + (_varint(len(value)) + value if isinstance(value, bytes) else _varint(value))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def tokenizer_file(vocab_size: int) -> bytes:
    """Write a SentencePiece model of exactly these pieces, without its library."""
    kinds = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (vocab_size - FIRST_WORD)
    pieces = b""
    for index, (name, kind) in enumerate(zip(piece_texts(vocab_size), kinds)):
        pieces += _field(1, _field(1, name.encode()) + _field(2, -float(index)) + _field(3, kind))
    trainer = _field(3, 2) + _field(4, vocab_size)  # a BPE model
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def write_world(folder: Path, world: World, val: np.ndarray, train: np.ndarray | None) -> Path:
    """Write a data folder with this validation text; without training text it has no training shards."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer_file(world.vocab_size))
    write_shard(folder / "fineweb_val_000000.bin", val)
    if train is not None:
        for number, part in enumerate(np.array_split(train, 2)):
            write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
