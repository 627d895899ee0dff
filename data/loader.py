"""The order in which training tokens are read: four loaders over the same shards.

A loader deals micro-batches to ranks: rank r of W gets the r-th of the next W, so any number of ranks
sees the same tokens in the same order, and each reads only its own. Orders depend on (seed, epoch,
shard) alone; the state is a position. A bad shard stops the run naming the file.

    sequential  the shards as one stream, in consecutive spans
    packed      the same stream, each micro-batch one row of documents cut to a longest segment
    shuffled    a random order of windows of all shards (contest pull request 1394)
    coprime     strides through the windows of each shard (contest pull request 726)

Window loaders divide each shard anew in every epoch, from a random offset (the phase): each window is
read exactly once, and less than two row lengths at a shard's ends are left out, others in each epoch. A
shard without row_len + 1 tokens has no window. Other row lengths need another division: a change of row_len
ends the epoch, so no token is read twice in one.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from data.shards import check_stated_shards, check_token_ids, find_shards, read_shard

EDGE_TOKENS = 1 << 20  # of each shard are checked before work starts, the others when they are read
GOLDEN_FRAC = (5**0.5 - 1) / 2  # steps of this share of a circle spread most evenly over it


class LoaderSettings(NamedTuple):
    """What a loader needs to know beside its shards."""

    kind: str  # a key of LOADERS
    vocab_size: int
    bos_id: int
    seed: int


class Rows(NamedTuple):
    """One rank's micro-batch."""

    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64: the next tokens
    starts_segment: np.ndarray  # (B, T) bool: nothing before this token may be looked at


class TokenLoader:
    """Read training shards for ever; subclasses say in which order."""

    def __init__(self, pattern: str | Path, cfg: LoaderSettings):
        self.pattern, self.cfg = pattern, cfg
        self.files = find_shards(pattern)
        self.shards = [np.asarray(read_shard(path)) for path in self.files]  # mapped: a file handle each
        check_stated_shards(self.files, "train")
        for path, shard in zip(self.files, self.shards):
            check_token_ids(shard[:EDGE_TOKENS], cfg.vocab_size, path)
        if not any((shard[:EDGE_TOKENS] == cfg.bos_id).any() for shard in self.shards):
            print(
                f"warning: {pattern}: no BOS ({cfg.bos_id}) at the starts of its shards: "
                "documents cannot be told apart, so the model sees across their borders. Make the data with "
                "`python -m data.prepare`.",
                file=sys.stderr,
            )
        self.sizes = [shard.size for shard in self.shards]
        self.epoch = self.position = 0
        if sum(self.sizes) == 0:
            raise UserError(f"{pattern}: the training shards hold no tokens. Make the data again.")

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        """Take the next micro-batch of num_tokens for each rank; return this rank's, in rows of row_len."""
        raise NotImplementedError

    def epoch_tokens(self, row_len: int) -> int:
        """Count the tokens that an epoch holds in whole rows."""
        raise NotImplementedError

    def check_step(self, row_len: int, step_tokens: int) -> None:
        """Raise unless an epoch holds the tokens of one step, all ranks together."""
        found = self.epoch_tokens(row_len)
        if found < step_tokens:
            raise UserError(
                f"{self.pattern}: expected at least {step_tokens:,} training tokens, one step in rows of "
                f"{row_len}, found {found:,}. Lower data.batch_tokens or make more data."
            )

    def read(self, shard: int, first: int, count: int) -> np.ndarray:
        """Return up to `count` tokens of a shard, fewer at its end; their ids are checked."""
        part = self.shards[shard][first : first + count]
        check_token_ids(part, self.cfg.vocab_size, self.files[shard])
        return part

    def check_position(self, epoch_len: int) -> None:
        """Raise when a restored position lies outside the epoch."""
        if not 0 <= self.position < epoch_len:
            raise UserError(
                f"{self.pattern}: expected a position below {epoch_len:,}, found {self.position:,}. "
                "The checkpoint was written with other data; set DATA_PATH to them."
            )

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}


class StreamLoader(TokenLoader):
    """Read all shards as one stream: spans of num_tokens + 1, the ends of shards and epochs inside them.

    The one is the last input's target, so every token is read once an epoch. `position` is a token.
    """

    def __init__(self, pattern: str | Path, cfg: LoaderSettings):
        super().__init__(pattern, cfg)
        self.starts = [0, *accumulate(self.sizes)]  # of each shard in the stream; last, its length

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        span = num_tokens + 1
        chunk = self.span_at(self.position + rank * span, span)
        rounds, self.position = divmod(self.position + world_size * span, self.starts[-1])
        self.epoch += rounds
        tokens = chunk[:-1].reshape(-1, row_len)
        return Rows(tokens, chunk[1:].reshape(-1, row_len), tokens == self.cfg.bos_id)

    def span_at(self, first: int, count: int) -> np.ndarray:
        """Copy `count` tokens of the endless stream: (count,) int64."""
        span, filled = np.empty(count, np.int64), 0
        while filled < count:
            place = (first + filled) % self.starts[-1]
            shard = bisect_right(self.starts, place) - 1
            part = self.read(shard, place - self.starts[shard], count - filled)
            span[filled : filled + part.size] = part
            filled += part.size
        return span

    def epoch_tokens(self, row_len: int) -> int:
        return (self.starts[-1] - 1) // row_len * row_len

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.check_position(self.starts[-1])


class PackedLoader(StreamLoader):
    """Return a micro-batch as one row (1, num_tokens) of segments of at most row_len tokens."""

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        rows = super().take(num_tokens, num_tokens, rank, world_size)
        return rows._replace(starts_segment=segment_starts(rows.starts_segment, row_len))


def segment_starts(starts_doc: np.ndarray, longest: int) -> np.ndarray:
    """Mark where segments start: at 0, at documents, and every `longest` tokens in them; (B, T) bool."""
    at = np.arange(starts_doc.shape[-1])
    first = np.maximum.accumulate(np.where(starts_doc, at, 0), axis=-1)
    return (at - first) % longest == 0


class WindowLoader(TokenLoader):
    """Read windows of row_len tokens, and the token after each as its last target, in a Division's order.

    `position` is a row of the epoch.
    """

    def __init__(self, pattern: str | Path, cfg: LoaderSettings):
        super().__init__(pattern, cfg)
        self.row_len = 0  # nothing is divided yet

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        if row_len != self.row_len:
            self.epoch += self.position > 0
            self.position, self.row_len = 0, row_len
            self.divide()
        num_rows = num_tokens // row_len
        chunk = np.empty((num_rows, row_len + 1), np.int64)
        self.skip(rank * num_rows)
        for row in chunk:
            row[:] = self.read(*self.division.place(self.position), row_len + 1)
            self.skip(1)
        self.skip((world_size - rank - 1) * num_rows)
        tokens = chunk[:, :-1]
        return Rows(tokens, chunk[:, 1:], tokens == self.cfg.bos_id)

    def divide(self) -> None:
        """Lay out the rows of the epoch."""
        if max(self.sizes) <= self.row_len:
            raise UserError(
                f"{self.pattern}: expected a shard of at least {self.row_len + 1:,} tokens, one row and a "
                f"target, found at most {max(self.sizes):,}. Lower data.seq_len or make longer shards."
            )
        self.division = Division(self.sizes, self.row_len, self.cfg, self.epoch)

    def skip(self, num_rows: int) -> None:
        """Go on by some rows, into later epochs if need be."""
        self.position += num_rows
        while self.position >= self.division.num_rows:
            self.position -= self.division.num_rows
            self.epoch += 1
            self.divide()

    def epoch_tokens(self, row_len: int) -> int:
        return sum(max(size - 1, 0) // row_len * row_len for size in self.sizes)

    def state_dict(self) -> dict:
        return super().state_dict() | {"row_len": self.row_len}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position, self.row_len = state["epoch"], state["position"], state["row_len"]
        if self.row_len > 0:
            self.divide()
            self.check_position(self.division.num_rows)


class ShardPart(NamedTuple):
    """A shard's share of a division: `count` windows from token `phase` on."""

    shard: int
    phase: int
    count: int
    order: Callable[[int], int]  # of the windows


class Division:
    """One epoch's rows: which window of which shard the i-th row is."""

    def __init__(self, sizes: list[int], row_len: int, cfg: LoaderSettings, epoch: int):
        across, within = ORDERS[cfg.kind]
        self.row_len = row_len
        self.parts = []
        for shard, size in enumerate(sizes):
            if size > row_len:
                rng = generator(cfg.seed, epoch, shard)
                phase = int(rng.integers(min(row_len, size - row_len)))  # keeps one window at least
                count = (size - 1 - phase) // row_len
                self.parts.append(ShardPart(shard, phase, count, within(rng, count)))
        self.starts = [0, *accumulate(part.count for part in self.parts)]
        self.num_rows = self.starts[-1]
        self.order = across(generator(cfg.seed, epoch, len(sizes)), self.num_rows)

    def place(self, row: int) -> tuple[int, int]:
        """Return the shard and the first token of a row."""
        slot = int(self.order(row))
        index = bisect_right(self.starts, slot) - 1
        part = self.parts[index]
        return part.shard, part.phase + part.order(slot - self.starts[index]) * self.row_len


def generator(seed: int, epoch: int, shard: int) -> np.random.Generator:
    """Make the random numbers of a shard in an epoch; a negative seed counts from 2^64 down."""
    return np.random.default_rng((seed % 2**64, epoch, shard))


class CoprimeWalk(NamedTuple):
    """Visit each of `num` places once: the stride has no factor in common with their number."""

    start: int
    stride: int
    num: int

    def __call__(self, i: int) -> int:
        return (self.start + i * self.stride) % self.num


def coprime_walk(rng: np.random.Generator, num: int, stride: int) -> CoprimeWalk:
    """Walk from a random start with the first coprime stride that is not below `stride`."""
    while gcd(stride, num) != 1:
        stride += 1
    return CoprimeWalk(int(rng.integers(num)), stride, num)


def random_walk(rng: np.random.Generator, num: int) -> CoprimeWalk:
    return coprime_walk(rng, num, int(rng.integers(num)))


def even_walk(rng: np.random.Generator, num: int) -> CoprimeWalk:
    """Spread any run of places over all, so that every batch mixes the shards by their sizes."""
    return coprime_walk(rng, num, round(num * GOLDEN_FRAC))


def permuted(rng: np.random.Generator, num: int) -> Callable[[int], int]:
    """Visit the places in random order; holds 8 bytes for each."""
    return rng.permutation(num).__getitem__


def unchanged(rng: np.random.Generator, num: int) -> Callable[[int], int]:
    return int


# Loader -> order of the windows of all shards together, then inside each shard.
ORDERS = {"shuffled": (permuted, unchanged), "coprime": (even_walk, random_walk)}

LOADERS = {
    "sequential": StreamLoader,
    "packed": PackedLoader,
    "shuffled": WindowLoader,
    "coprime": WindowLoader,
}


def make_loader(pattern: str | Path, cfg: LoaderSettings) -> TokenLoader:
    """Open the shards of a glob pattern with the loader of cfg.kind."""
    return LOADERS[cfg.kind](pattern, cfg)
