"""Byte-level BPE of GPT-2's family from local files, through Hugging Face `tokenizers`.

Read are tokenizer.json, and vocab.json with merges.txt beside it. SuperBPE (arXiv 2503.13423) is the same
format with a split rule that lets merges span words.
"""

import hashlib
from pathlib import Path

import numpy as np

from common import UserError
from data.codecs.pieces import UTF8_BYTES, PieceCodec, gives_back, panics_named

MOST_ENTRIES = 1 << 24  # the largest known vocabularies have a sixtieth of it
# The first of these names in the vocabulary separates documents.
BOS_NAMES = ("<|bos|>", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")


def byte_symbols() -> dict[str, int]:
    """Map the 256 characters of byte-level vocabularies to their bytes.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in sorted(printable)} | {
        chr(256 + i): value for i, value in enumerate(others)
    }


class ByteLevelCodec(PieceCodec):
    """One byte-level BPE tokenizer. Special tokens count no bytes and are never made from text.

    A file without a document separator gets one after its last id.
    """

    kind = "bytelevel"

    def __init__(self, path: str | Path):
        self._tokenizer = read_tokenizer(Path(path))
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        largest = max(vocab.values())
        names = dict(zip(vocab.values(), vocab))  # the last of each id
        if len(names) < len(vocab):
            twice = sorted(name for name in vocab if names[vocab[name]] != name)[:4]
            raise UserError(
                f"{path}: expected an id for each entry, found {twice} on ids of others: their text "
                "could not be told apart. Number them anew."
            )
        if largest >= MOST_ENTRIES:
            raise UserError(f"{path}: expected ids below {MOST_ENTRIES:,}, found {largest}. Copy it again.")
        bos_id = next((vocab[name] for name in BOS_NAMES if name in vocab), largest + 1)
        pieces = [b""] * (max(bos_id, largest) + 1)
        added = self._tokenizer.get_added_tokens_decoder()
        symbols = byte_symbols()
        for name, token in vocab.items():
            if token in added:
                pieces[token] = b"" if added[token].special else name.encode()
            elif not set(name) <= symbols.keys():
                raise UserError(
                    f"{path}: entry {token}, {name!r}, is not written in the byte alphabet. Expected "
                    "byte-level BPE, as of GPT-2; tokenizers with other alphabets cannot count bytes."
                )
            else:
                pieces[token] = bytes(symbols[char] for char in name)
        pieces[bos_id] = b""
        super().__init__(path, pieces, bos_id)
        if Path(path).name == "vocab.json":  # the merges are half of the tokenizer
            self.digest = pair_digest(self.path)
        single_bytes = {piece[0] for piece in pieces if len(piece) == 1}
        self.lossless = single_bytes >= UTF8_BYTES and gives_back(self)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode documents, on all cores if num_threads is over 1; each gives (N,) int32 ids."""
        with panics_named(self.path):
            return self._encode_batch(texts, num_threads)

    def _encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        if num_threads == 1:
            encoded = (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)
        else:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]


def pair_digest(path: Path) -> str:
    """Hash vocab.json together with the merges.txt beside it."""
    return hashlib.sha256(path.read_bytes() + find_merges(path).read_bytes()).hexdigest()


def find_merges(path: Path) -> Path:
    """Return the merges.txt beside vocab.json; raise where there is none."""
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise UserError(f"{path}: expected merges.txt beside it, found none. Copy it there.")
    return merges


def read_tokenizer(path: Path):
    """Load a `tokenizers.Tokenizer`; raise UserErrors for a missing library and a broken file."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise UserError(f"{path}: reading this tokenizer needs `pip install tokenizers`.") from error
    merges = find_merges(path) if path.name == "vocab.json" else None
    try:
        with panics_named(path):
            if path.name != "vocab.json":
                tokenizer = Tokenizer.from_file(str(path))
            else:
                tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path}: not a tokenizer that `tokenizers` reads ({error}). Copy it again."
        ) from error
    if not isinstance(tokenizer.model, models.BPE):
        found = type(tokenizer.model).__name__
        raise UserError(f"{path}: expected byte-level BPE, found a model of type {found}.")
    tokenizer.model.dropout = None  # of training: the same text must have the same tokens
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
