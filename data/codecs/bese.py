"""BESE: 40 base symbols (letters folded to lower case) and learned merges; loses text, counts every byte.

Base ids: 0-3 special; 4-14 frequent letters; 15-18 group marks, which open a letter of two ids; 19-22
position in the group; then space, full stop, comma, newline, question mark, quote, OTHER, ten digits.
Every byte of the text is one symbol that counts 1, after a group mark that counts 0 where it is a rare
letter; a byte without a symbol of its own is OTHER. So sizes add up to the UTF-8 bytes of any text
(openai/parameter-golf pull request 1666).
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import UserError, read_json
from data.codecs.pieces import PieceCodec

BESE_TYPE = "bese_bpe"
BESE_LOSES = "the tokenizer (bese) drops case, most signs and all that is not ASCII"
BESE_BOS = 1  # between documents; in no merge
NUM_SPECIAL = 4
FIRST_GROUP, FIRST_PLACE, FIRST_SIGN = 15, 19, 23
OTHER = 29
SIGNS = " .,\n?'\x1a0123456789"  # ids from FIRST_SIGN on, as they decode: OTHER becomes SUBSTITUTE
NUM_BASE = FIRST_SIGN + len(SIGNS)
SINGLE_LETTERS = "etaoinsrhdl"
GROUPS = ("ufbz", "cwvj", "mykx", "gpq")
NO_SYMBOL = 255  # pads the second column of the base table
BLOCK_BYTES = 1 << 18  # text merged at once: its ids stay in the processor's cache


def base_table(single_letters: str, groups: list[str] | tuple[str, ...]) -> np.ndarray:
    """Map each byte to its one or two base ids: (256, 2) uint8, NO_SYMBOL where there is no second."""
    table = np.full((256, 2), NO_SYMBOL, dtype=np.uint8)
    table[:, 0] = OTHER
    for i, char in enumerate(SIGNS):
        table[ord(char), 0] = FIRST_SIGN + i
    table[ord("\x1a"), 0] = OTHER
    table[ord('"'), 0] = table[ord("'"), 0]
    rows = {char: (NUM_SPECIAL + i, NO_SYMBOL) for i, char in enumerate(single_letters)}
    for i, group in enumerate(groups):
        rows |= {char: (FIRST_GROUP + i, FIRST_PLACE + j) for j, char in enumerate(group)}
    for char, row in rows.items():
        table[ord(char)] = table[ord(char.upper())] = row
    return table


def to_base(texts: list[str], table: np.ndarray) -> np.ndarray:
    """Write texts in base symbols, BESE_BOS before each: (N,) uint16."""
    bos = np.array([BESE_BOS], dtype=np.uint16)
    parts = [bos[:0]]
    for text in texts:
        symbols = table[np.frombuffer(text.encode(), np.uint8)].ravel()
        parts += [bos, symbols[symbols != NO_SYMBOL].astype(np.uint16)]
    return np.concatenate(parts)


def merge_pair(ids: np.ndarray, left: int, right: int, new: int) -> np.ndarray:
    """Replace each `left`, `right` by `new`, from the left, in (N,) ids; returns the shorter array."""
    found = np.flatnonzero((ids[:-1] == left) & (ids[1:] == right))
    if not found.size:
        return ids
    if left == right:  # in a run of three the first two merge: keep every second match of each run
        starts = np.concatenate([[True], np.diff(found) > 1])
        first = found[np.flatnonzero(starts)][np.cumsum(starts) - 1]
        found = found[(found - first) % 2 == 0]
    keep = np.ones(ids.size, dtype=bool)
    keep[found + 1] = False
    ids = ids.copy()
    ids[found] = new
    return ids[keep]


class BeseCodec(PieceCodec):
    """One file of system B's format. Text does not come back: case, most signs and non-ASCII are lost."""

    kind = "bese"

    def __init__(self, path: str | Path):
        content = read_json(path)
        check_bese(content, path)
        self._table = base_table(content["single_letters"], content["groups"])
        self._merges = [(left, right, new) for (left, right), new in content["merges"]]
        sizes = [0] * NUM_SPECIAL + [1] * (FIRST_GROUP - NUM_SPECIAL)
        sizes += [0] * (FIRST_PLACE - FIRST_GROUP) + [1] * (NUM_BASE - FIRST_PLACE)
        self._base_ids = [(token,) for token in range(NUM_BASE)]
        for left, right, _ in self._merges:
            sizes.append(sizes[left] + sizes[right])
            self._base_ids.append(self._base_ids[left] + self._base_ids[right])
        super().__init__(path, [bytes(size) for size in sizes], BESE_BOS)
        self.lossless = False
        letters = content["single_letters"] + SIGNS
        self._chars = dict(zip([*range(NUM_SPECIAL, FIRST_GROUP), *range(FIRST_SIGN, NUM_BASE)], letters))
        self._groups = content["groups"]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode documents by canonical BPE; each gives (N,) int32 ids, without BOS.

        A merge makes only pairs of higher rank, so one pass a merge in rank order is canonical BPE.
        """
        with ThreadPoolExecutor(num_threads) as pool:
            blocks = list(pool.map(self._encode_block, text_blocks(texts)))
        return [ids for block in blocks for ids in block]

    def _encode_block(self, texts: list[str]) -> list[np.ndarray]:
        ids = to_base(texts, self._table)
        for merge in self._merges:
            ids = merge_pair(ids, *merge)
        starts = np.flatnonzero(ids == BESE_BOS)
        return [part[1:].astype(np.int32) for part in np.split(ids, starts[1:])]

    def decode(self, ids) -> bytes:
        """Spell the symbols: lower case, one quote sign, the byte 0x1A for OTHER."""
        chars, group = [], None
        for token in np.asarray(ids).tolist():
            for symbol in self._base_ids[token]:
                if FIRST_PLACE <= symbol < FIRST_SIGN and group is not None:
                    chars.append(self._groups[group][symbol - FIRST_PLACE])
                elif symbol in self._chars:
                    chars.append(self._chars[symbol])
                group = symbol - FIRST_GROUP if FIRST_GROUP <= symbol < FIRST_PLACE else None
        return "".join(chars).encode()


def text_blocks(texts: list[str]) -> list[list[str]]:
    """Group texts, in order, until a group holds BLOCK_BYTES characters or more."""
    blocks, size = [[]], 0
    for text in texts:
        if size >= BLOCK_BYTES:
            blocks.append([])
            size = 0
        blocks[-1].append(text)
        size += len(text)
    return [block for block in blocks if block]


def check_bese(content: dict, path: str | Path) -> None:
    """Raise unless the file's fields agree with each other and every merge joins two earlier ids."""
    letters, groups, merges = (content.get(key) for key in ("single_letters", "groups", "merges"))
    stated = [content.get(key) for key in ("version", "base_vocab_size", "num_merges", "vocab_size")]
    is_alphabet = (
        isinstance(letters, str)
        and len(letters) == FIRST_GROUP - NUM_SPECIAL
        and isinstance(groups, list)
        and all(isinstance(group, str) for group in groups)
        and [len(group) for group in groups] == [4, 4, 4, 3]
        and sorted(letters + "".join(groups)) == sorted("abcdefghijklmnopqrstuvwxyz")
    )
    num_merges = len(merges) if isinstance(merges, list) else -1
    if not is_alphabet or stated != [2, NUM_BASE, num_merges, NUM_BASE + num_merges]:
        raise UserError(
            f"{path}: expected BESE version 2: 26 letters in 11 single ones and groups of 4, 4, 4 and 3, "
            f"base_vocab_size {NUM_BASE}, num_merges and vocab_size that agree with the merges; found "
            f"letters {letters!r}, groups {groups!r}, sizes {stated}, {num_merges} merges. Train it again: "
            "`python -m data.tokenizer train --kind bese`."
        )
    for new, merge in enumerate(merges, start=NUM_BASE):
        match merge:
            case [[int(left), int(right)], written] if written == new:
                if min(left, right) >= NUM_SPECIAL and max(left, right) < new:
                    continue
        raise UserError(
            f"{path}: expected merge {new - NUM_BASE} to make id {new} of two earlier ids from "
            f"{NUM_SPECIAL} on, found {merge}. The file is damaged."
        )
