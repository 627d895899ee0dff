"""Prefix-only n-gram tilt of next-token logits, in closed form.

A hint is a guess at a target that reads earlier tokens alone. The tilt raises its logit by a strength d:
p'(v) = p(v) e^(d [v = h]) / Z, Z = 1 + p(h) (e^d - 1); several hints of one target add up. The result sums
to one, and whether and how strongly a hint speaks never depends on the target (contest pull request 1514).
Hints come from a static table of training n-grams, shipped in the artifact, or from the text scored so far.
"""

from typing import NamedTuple

import numpy as np
import torch

from common import UserError
from kernels.machine import copy_to_device

NO_HINT = -1
HASH_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
KEY_DTYPE, NEXT_DTYPE = np.dtype("<u4"), np.dtype("<u2")  # of a table's keys and continuations
TAG_BITS = 4  # by which a table's keys are longer than its numbers of entries need
LEGACY_ALIGNMENT = "static hints are misaligned as in system B: they guess the token just seen"


class NgramTable(NamedTuple):
    """The likely continuations of frequent prefixes, found by the first bits of the prefix's hash.

    A prefix that is not in it finds another's hint once in about 2^TAG_BITS: legal, because it reads the
    prefix alone, and cheap, because an unlikely token that gets likelier takes little from the others.
    """

    lengths: tuple[int, ...]  # tokens of its prefixes
    key_bits: int
    keys: np.ndarray  # (M,) KEY_DTYPE, ascending
    tokens: np.ndarray  # (M,) NEXT_DTYPE: the continuation of each key


class OnlineRule(NamedTuple):
    """When a context of the text scored so far may speak."""

    order: int  # tokens of context
    min_share: float  # of the context's occurrences that the likeliest continuation must have
    min_count: int  # occurrences of the context


ONLINE_RULES = (
    OnlineRule(16, 0.5, 2),
    OnlineRule(14, 0.5, 2),
    OnlineRule(12, 0.6, 2),
    OnlineRule(10, 0.7, 3),
    OnlineRule(8, 0.7, 3),
)


class Tilt(NamedTuple):
    """Hints of N targets, up to K each; a cost for the scorers."""

    hints: np.ndarray  # (N, K) int32, NO_HINT where there is none
    strengths: np.ndarray  # (N, K) float32

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Charge (R,) targets at `positions` under tilted (R, V) logits; returns nats (R,)."""
        hints = copy_to_device(self.hints[positions.numpy()].astype(np.int64), logits.device)
        strengths = copy_to_device(self.strengths[positions.numpy()], logits.device)
        return tilted_nats(logits, targets, hints, strengths)


def tilted_nats(
    logits: torch.Tensor, targets: torch.Tensor, hints: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """Charge (R,) targets under (R, V) logits tilted to (R, K) hints: nats' = nats + ln Z - d [y = h]."""
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    present = hints != NO_HINT
    strengths = strengths * present
    same = hints[:, :, None] == hints[:, None, :]  # (R, K, K)
    total = (same * strengths[:, None, :]).sum(-1)  # (R, K) joint strength of a hint's token
    counted = present & ~same.tril(-1).any(-1)  # a token that two hints name enters Z once
    logs = logits.gather(-1, hints.clamp_min(0)) - logits.logsumexp(-1, keepdim=True)
    raised = (counted * logs.exp() * total.expm1()).sum(-1)  # Z - 1
    return nats + raised.log1p() - (strengths * (hints == targets[:, None])).sum(-1)


def join_tilts(*tilts: Tilt) -> Tilt:
    """Let several sources of hints speak about the same targets; their strengths add up."""
    return Tilt(*(np.concatenate(columns, axis=1) for columns in zip(*tilts)))


def hash_contexts(tokens: np.ndarray, order: int) -> np.ndarray:
    """Hash the `order` tokens that end at positions order - 1, order, ...; uint64, a polynomial mod 2^64."""
    count = max(len(tokens) - order + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(order):
        hashes = hashes * np.uint64(HASH_MULTIPLIER) + tokens[offset : offset + count].astype(np.uint64) + 1
    return hashes


def key_bits_of(max_entries: int) -> int:
    """Return the bits of a key in a table of up to max_entries."""
    return (max_entries - 1).bit_length() + TAG_BITS


def prefix_keys(hashes: np.ndarray, key_bits: int) -> np.ndarray:
    """Shorten (n,) uint64 hashes to keys; the product carries the last token into the first bits."""
    return (hashes * np.uint64(HASH_MULTIPLIER) >> np.uint64(64 - key_bits)).astype(KEY_DTYPE)


def count_of(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Count how often each of (m,) wanted is among (n,) values, which hold all of them; int64."""
    distinct, counts = np.unique(values, return_counts=True)
    return counts[np.searchsorted(distinct, wanted)]


def rank_continuations(
    tokens: np.ndarray, length: int, min_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hash, likeliest continuation and worth of the prefixes of `length` tokens; each (m,).

    worth = n KL(share || s), n the prefix's count, share its continuation's, discounted for what a few
    counts overstate, s that share after the prefix without its first token and elsewhere: the nats that
    a reader of the shorter prefix would save. Prefixes with less than min_count such pairs are left out.
    """
    prefixes, pairs = hash_contexts(tokens[:-1], length), hash_contexts(tokens, length + 1)
    _, first, hits = np.unique(pairs, return_index=True, return_counts=True)
    order = np.lexsort((tokens[first + length], -hits, prefixes[first]))
    leads = np.ones(len(order), dtype=bool)
    leads[1:] = np.diff(prefixes[first][order]) != 0
    best = order[leads & (hits[order] >= min_count)]
    first, hits = first[best], hits[best]
    seen = count_of(prefixes, prefixes[first])
    short_pairs, short = hash_contexts(tokens, length), hash_contexts(tokens[:-1], length - 1)
    other_hits = count_of(short_pairs, short_pairs[first + 1]) - hits
    others = count_of(short, short[first + 1]) - seen
    share, expected = (hits - 0.6) / (seen + 0.5), (other_hits + 0.5) / (others + 50)
    saved = share * np.log(share / expected) + (1 - share) * np.log((1 - share) / (1 - expected))
    worth = np.where(share > expected, seen * saved, 0.0)
    return prefixes[first], tokens[first + length], worth


def build_table(
    tokens: np.ndarray, lengths: tuple[int, ...], max_entries: int, min_count: int = 2
) -> NgramTable:
    """Count training tokens; keep the max_entries prefixes of these lengths that are worth most.

    Equal worth goes to the shorter prefix. Needs about 100 bytes a token.
    """
    ranked = [rank_continuations(tokens, length, min_count) for length in lengths]
    hashes, nexts, worth = (np.concatenate(parts) for parts in zip(*ranked))
    best = np.argsort(-worth, kind="stable")[:max_entries]
    key_bits = key_bits_of(max_entries)
    keys, first = np.unique(prefix_keys(hashes[best], key_bits), return_index=True)
    return NgramTable(lengths, key_bits, keys, nexts[best][first].astype(NEXT_DTYPE))


def write_table(table: NgramTable) -> dict[str, bytes]:
    """Lay a table out as named byte strings for the artifact; keys as differences, which compress."""
    steps = np.diff(table.keys, prepend=KEY_DTYPE.type(0))
    return {"ngram keys": steps.tobytes(), "ngram tokens": table.tokens.tobytes()}


def read_table(
    streams: dict[str, bytes], lengths: tuple[int, ...], max_entries: int, vocab_size: int
) -> NgramTable:
    """Restore what write_table laid out; raises UserError where the bytes are no such table."""
    keys, nexts = streams["ngram keys"], streams["ngram tokens"]
    if KEY_DTYPE.itemsize * len(nexts) != NEXT_DTYPE.itemsize * len(keys) or len(keys) % KEY_DTYPE.itemsize:
        raise UserError(
            f"n-gram table: expected {KEY_DTYPE.itemsize} bytes of keys and {NEXT_DTYPE.itemsize} of tokens "
            f"an entry, found {len(keys)} and {len(nexts)}. The artifact is damaged; write it again."
        )
    steps, tokens = np.frombuffer(keys, KEY_DTYPE).astype(np.int64), np.frombuffer(nexts, NEXT_DTYPE)
    key_bits, rising = key_bits_of(max_entries), steps.cumsum()
    if (steps[1:] <= 0).any() or (rising >= 1 << key_bits).any() or (tokens >= vocab_size).any():
        raise UserError(
            f"n-gram table: expected rising keys of {key_bits} bits and tokens below {vocab_size}, found "
            "others. The table belongs to another recipe; write the artifact again."
        )
    return NgramTable(lengths, key_bits, rising.astype(KEY_DTYPE), tokens)


def static_tilt(
    table: NgramTable, tokens: np.ndarray, strength: float, legacy_alignment: bool = False
) -> Tilt:
    """Look up the table for each of the N targets of N + 1 tokens; a column of hints a prefix length.

    The hint for target i, which is tokens[i + 1], reads a prefix that ends at tokens[i]. legacy_alignment
    reproduces system B (contest pull request 1666): there it reads the prefix that ends one token
    earlier, and so guesses the token just seen.
    """
    hints = np.full((len(tokens) - 1, len(table.lengths)), NO_HINT, dtype=np.int32)
    for column, length in enumerate(table.lengths):
        wanted = prefix_keys(hash_contexts(tokens[:-1], length), table.key_bits)
        if len(table.keys) and len(wanted):
            at = np.searchsorted(table.keys, wanted).clip(max=len(table.keys) - 1)
            found = np.where(table.keys[at] == wanted, table.tokens[at].astype(np.int32), NO_HINT)
            hints[length - 1 :, column] = found
    if legacy_alignment:
        hints = np.concatenate([np.full_like(hints[:1], NO_HINT), hints[:-1]])
    return Tilt(hints, np.full(hints.shape, strength, dtype=np.float32))


def group_starts(values: np.ndarray) -> np.ndarray:
    """Return for each of (M,) sorted values the index at which its run of equal values starts."""
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))


class ContextRuns(NamedTuple):
    """Contexts and what followed them, sorted: runs of one context, each in the order of the text."""

    order: np.ndarray  # (M,) int64: the place of each in the text
    starts: np.ndarray  # (M,) int64: where its run starts
    outcomes: np.ndarray  # (M,) int64
    before: np.ndarray  # (M,) int64: how often its run has had this outcome before


def sort_runs(contexts: np.ndarray, outcomes: np.ndarray) -> ContextRuns:
    """Sort (M,) contexts and outcomes."""
    index = np.arange(len(contexts))
    order = np.argsort(contexts, kind="stable")
    starts, outcomes = group_starts(contexts[order]), outcomes[order].astype(np.int64)
    pairs = starts * (outcomes.max(initial=0) + 1) + outcomes
    by_pair = np.argsort(pairs, kind="stable")
    before = np.empty_like(index)
    before[by_pair] = index - group_starts(pairs[by_pair])
    return ContextRuns(order, starts, outcomes, before)


def running_best(contexts: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the likeliest earlier outcome of each (M,) context, how often it came, and out of how many.

    Position m sees occurrences before m only, as a table that is updated after each look-up; an outcome
    takes the lead when its count exceeds the leader's. All (M,) int64; the counts are 0 at first sight.
    """
    order, starts, outcomes, before = sort_runs(contexts, outcomes)
    index, counts = np.arange(len(contexts)), before + 1  # occurrences of the pair up to here
    leads = np.maximum.accumulate(starts * (len(index) + 1) + counts) - starts * (len(index) + 1)
    took_lead = np.ones(len(index), dtype=bool)
    took_lead[1:] = (index == starts)[1:] | (leads[1:] > leads[:-1])
    leaders = outcomes[np.maximum.accumulate(np.where(took_lead, index, 0))]
    seen = index - starts
    found = np.zeros((3, len(index)), dtype=np.int64)
    found[:, order[1:]] = np.where(seen[1:] > 0, (leaders[:-1], leads[:-1], seen[1:]), 0)
    return found[0], found[1], found[2]


def online_tilt(tokens: np.ndarray, boost: float = 2.0, rules: tuple[OnlineRule, ...] = ONLINE_RULES) -> Tilt:
    """Hint each of the N targets of N + 1 tokens at what followed its context earlier in the text.

    The first rule that holds speaks, with strength boost * share of the context's occurrences. Every hint
    equals that of a table filled in one pass, updated after the look-up. Needs about 100 bytes a token.
    """
    hints = np.full(len(tokens) - 1, NO_HINT, dtype=np.int32)
    strengths = np.zeros(len(tokens) - 1, dtype=np.float32)
    for rule in rules:
        contexts = hash_contexts(tokens[:-1], rule.order)
        if not len(contexts):
            continue
        leader, lead, seen = running_best(contexts, tokens[rule.order :])
        share = lead / np.maximum(seen, 1)
        open_hints, open_strengths = hints[rule.order - 1 :], strengths[rule.order - 1 :]
        speaks = (open_hints == NO_HINT) & (seen >= rule.min_count) & (share >= rule.min_share)
        open_hints[speaks] = leader[speaks]
        open_strengths[speaks] = boost * share[speaks]
    return Tilt(hints[:, None], strengths[:, None])
