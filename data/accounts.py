"""The byte account of a text: the bytes that a score divides by, against those that the text has.

One place words it, for the tokenizer's proof, the dataset, the run's log and result, scoring and the audit.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data.changes import find_changes, follows_contest
from data.codecs import TokenCodec

LOSSLESS, CONTEST, LOSES, EXPANDS = "lossless", "by the contest's rule", "loses text", "expands text"
UNKNOWN = "unknown, no manifest"
# What the contest's rule may count too much before it is no longer the contest's score: its own models count
# 5 bytes more than the 229,945 of 100 pages of C4 (signs that become several letters), 0.004 %
# fewer than all 2,000.
CONTEST_EXCESS = 0.001
OTHER_TOKENIZER = "Take another tokenizer; `python -m data.tokenizer verify` says what one changes."


class ByteCounts(NamedTuple):
    """What is counted over documents; None where nobody states it. Manifests have these names as keys."""

    raw_bytes: int | None  # UTF-8 bytes of the documents
    token_bytes: int  # what their tokens stand for
    documents: int | None = None
    documents_over: int | None = None  # whose tokens count more than their bytes
    documents_under: int | None = None  # fewer


class Encoded(NamedTuple):
    """Documents as tokens."""

    ids: np.ndarray  # (N,), BOS before each document
    sizes: np.ndarray  # (N,) the bytes that each stands for
    counts: ByteCounts


class ByteAccount(NamedTuple):
    """Counts, with what the tokenizer changes; each reader takes the words and numbers from here."""

    counts: ByteCounts
    changes: str  # what of a text does not come back from its tokens; "" for nothing
    by_contest_rule: bool  # whether that is what the contest's own models change and count

    @property
    def verdict(self) -> str:
        """One of LOSSLESS, CONTEST, LOSES, EXPANDS: the last for all documents together."""
        raw, counted = self.counts[:2]
        if raw is not None and counted > raw * (1 + CONTEST_EXCESS * self.by_contest_rule):
            return EXPANDS
        if self.by_contest_rule:
            return CONTEST
        return LOSES if self.changes or counted < (raw or 0) else LOSSLESS

    @property
    def invalid(self) -> str:
        """Say why a score is below the truth; "" where it is not."""
        return f"{self}: scores are below the truth" if self.verdict == EXPANDS else ""

    @property
    def not_comparable(self) -> str:
        """Say why a score compares with none of another tokenizer; "" where it does."""
        return (self.changes or "bytes are missing") + self.numbers if self.verdict == LOSES else ""

    @property
    def numbers(self) -> str:
        """Word the counts, as an ending of a sentence."""
        raw, counted, documents, over, under = self.counts
        said = f"; counts {counted:,} bytes of a text of {UNKNOWN if raw is None else f'{raw:,}'}"
        if over is None:
            return said
        return f"{said}, more than their own in {over:,} of {documents:,} documents, fewer in {under:,}"

    def __str__(self) -> str:
        return self.verdict + (f": {self.changes}" if self.changes else "") + self.numbers

    def facts(self) -> dict:
        """Return what JSON says."""
        return {"verdict": self.verdict, **self.counts._asdict(), "changes": self.changes, "said": str(self)}


def count_documents(raw: list[int], counted: list[int]) -> ByteCounts:
    """Count documents by the bytes that each has, and that its tokens stand for."""
    over = sum(tokens > size for size, tokens in zip(raw, counted))
    under = sum(tokens < size for size, tokens in zip(raw, counted))
    return ByteCounts(sum(raw), sum(counted), len(raw), over, under)


def add_counts(parts: Iterable[ByteCounts]) -> ByteCounts:
    """Add the counts of parts of a text."""
    return ByteCounts(*map(sum, zip(*parts)))


def open_account(codec: TokenCodec, counts: ByteCounts) -> ByteAccount:
    """Draw up the account of documents whose tokens a codec made."""
    return ByteAccount(counts, find_changes(codec), follows_contest(codec))


def stated_counts(split: dict, counted: int) -> ByteCounts:
    """Take from a split's part of a manifest what it states of tokens that count so many bytes.

    Manifests of older versions do not count documents over and under.
    """
    lo, hi = split.get("documents", (0, 0))
    documents = hi - lo if "documents" in split else None
    keys = ("documents_over", "documents_under")
    return ByteCounts(split.get("raw_bytes"), counted, documents, *(split.get(key) for key in keys))
