"""Prefix-only n-gram tilt of next-token logits, in closed form.

A hint is a guess at a target that reads earlier tokens alone. The tilt raises its logit by a strength d:
p'(v) = p(v) e^(d [v = h]) / Z, Z = 1 + p(h) (e^d - 1); several hints of one target add up. The result sums
to one, and whether and how strongly a hint speaks never depends on the target (contest pull request 1514).
Hints come from a static table of training n-grams, shipped in the artifact, or from the text scored so far.
"""

from typing import NamedTuple

import numpy as np
import torch

from data.errors import UserError

NO_HINT = -1
HASH_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
KEY_DTYPE = np.dtype("<u4")
NEXT_DTYPE = np.dtype("<u2")  # of continuations: tables are for vocabularies up to 65,536


class NgramTable(NamedTuple):
    """The likeliest continuation of frequent prefixes of 1, 2, ... tokens; a row of each tuple a length."""

    vocab_size: int
    keys: tuple[np.ndarray, ...]  # (M,) ascending; tokens of the prefix as digits in base vocab_size
    tokens: tuple[np.ndarray, ...]  # (M,) continuation of each key


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

    def __call__(self, scores: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Charge (R,) targets at `places` under tilted (R, V) logits; returns nats (R,)."""
        hints = torch.from_numpy(self.hints[places.numpy()].astype(np.int64)).to(scores.device)
        strengths = torch.from_numpy(self.strengths[places.numpy()]).to(scores.device)
        return tilted_nats(scores, targets, hints, strengths)


def tilted_nats(
    scores: torch.Tensor, targets: torch.Tensor, hints: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """Charge (R,) targets under (R, V) logits tilted to (R, K) hints: nats' = nats + ln Z - d [y = h]."""
    nats = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    present = hints != NO_HINT
    strengths = strengths * present
    same = hints[:, :, None] == hints[:, None, :]  # (R, K, K)
    total = (same * strengths[:, None, :]).sum(-1)  # (R, K) joint strength of a hint's token
    counted = present & ~same.tril(-1).any(-1)  # a token that two hints name enters Z once
    logs = scores.gather(-1, hints.clamp_min(0)) - scores.logsumexp(-1, keepdim=True)
    raised = (counted * logs.exp() * total.expm1()).sum(-1)  # Z - 1
    return nats + raised.log1p() - (strengths * (hints == targets[:, None])).sum(-1)


def join_tilts(*tilts: Tilt) -> Tilt:
    """Let several sources of hints speak about the same targets; their strengths add up."""
    return Tilt(*(np.concatenate(columns, axis=1) for columns in zip(*tilts)))


def prefix_keys(tokens: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """Number the prefixes of `length` tokens that end at positions length - 1, length, ...; int64."""
    count = max(len(tokens) - length + 1, 0)
    keys = np.zeros(count, dtype=np.int64)
    for offset in range(length):
        keys = keys * vocab_size + tokens[offset : offset + count]
    return keys


def build_table(
    tokens: np.ndarray, vocab_size: int, max_entries: tuple[int, ...], min_count: int = 2
) -> NgramTable:
    """Count training tokens; keep for each prefix length the entries seen most often.

    max_entries[n - 1] bounds the prefixes of n tokens. Ties go to the smaller token and the smaller key.
    """
    keys, nexts = [], []
    for length, limit in enumerate(max_entries, start=1):
        prefixes = prefix_keys(tokens[:-1], length, vocab_size)
        pairs, counts = np.unique(prefixes * vocab_size + tokens[length:], return_counts=True)
        by_prefix = np.lexsort((-counts, pairs // vocab_size))
        sorted_keys = pairs[by_prefix] // vocab_size
        best = by_prefix[np.diff(sorted_keys, prepend=-1) != 0]
        best = best[counts[best] >= min_count]
        best = np.sort(best[np.argsort(-counts[best], kind="stable")[:limit]])
        keys.append((pairs[best] // vocab_size).astype(KEY_DTYPE))
        nexts.append((pairs[best] % vocab_size).astype(NEXT_DTYPE))
    return NgramTable(vocab_size, tuple(keys), tuple(nexts))


def write_table(table: NgramTable) -> dict[str, bytes]:
    """Lay a table out as named byte strings for the artifact; keys as differences, which compress."""
    streams = {}
    for length, (keys, nexts) in enumerate(zip(table.keys, table.tokens), start=1):
        streams[f"ngram{length}.keys"] = np.diff(keys, prepend=KEY_DTYPE.type(0)).tobytes()
        streams[f"ngram{length}.tokens"] = nexts.tobytes()
    return streams


def read_table(streams: dict[str, bytes], vocab_size: int) -> NgramTable:
    """Restore what write_table laid out; raises UserError where the bytes are no table of this vocabulary."""
    keys, nexts = [], []
    for length in range(1, len(streams) // 2 + 1):
        names = f"ngram{length}.keys", f"ngram{length}.tokens"
        parts = [streams.get(name, b"?") for name in names]
        if len(parts[0]) != 2 * len(parts[1]) or len(parts[0]) % KEY_DTYPE.itemsize:
            raise UserError(
                f"n-gram table: expected {names[0]} and {names[1]} of matching lengths, found "
                f"{len(parts[0])} and {len(parts[1])} bytes. The artifact is damaged; write it again."
            )
        steps = np.frombuffer(parts[0], KEY_DTYPE).astype(np.int64)
        key, after = steps.cumsum(), np.frombuffer(parts[1], NEXT_DTYPE)
        rising = (steps[1:] > 0).all() and (key < vocab_size**length).all()
        if not rising or (after >= vocab_size).any():
            raise UserError(
                f"n-gram table: expected rising keys and tokens below {vocab_size} in {names[0]}, found "
                "others. The table belongs to another vocabulary; write the artifact again."
            )
        keys.append(key.astype(KEY_DTYPE))
        nexts.append(after)
    return NgramTable(vocab_size, tuple(keys), tuple(nexts))


def static_tilt(
    table: NgramTable, tokens: np.ndarray, strength: float, legacy_alignment: bool = False
) -> Tilt:
    """Look up the table for each of the N targets of N + 1 tokens; a column of hints a prefix length.

    The hint for target i, which is tokens[i + 1], reads a prefix that ends at tokens[i]. legacy_alignment
    reproduces system B (contest pull request 1666): there it reads the prefix that ends one token
    earlier, and so guesses the token just seen.
    """
    hints = np.full((len(tokens) - 1, len(table.keys)), NO_HINT, dtype=np.int32)
    for column, (keys, nexts) in enumerate(zip(table.keys, table.tokens)):
        prefixes = prefix_keys(tokens[:-1], column + 1, table.vocab_size)
        if len(keys) and len(prefixes):
            at = np.searchsorted(keys, prefixes).clip(max=len(keys) - 1)
            hints[column:, column] = np.where(keys[at] == prefixes, nexts[at].astype(np.int32), NO_HINT)
    if legacy_alignment:
        hints = np.concatenate([np.full_like(hints[:1], NO_HINT), hints[:-1]])
    return Tilt(hints, np.full(hints.shape, strength, dtype=np.float32))


def hash_contexts(tokens: np.ndarray, order: int) -> np.ndarray:
    """Hash the `order` tokens that end at positions order - 1, order, ...; uint64, a polynomial mod 2^64."""
    count = max(len(tokens) - order + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(order):
        hashes = hashes * np.uint64(HASH_MULTIPLIER) + tokens[offset : offset + count].astype(np.uint64) + 1
    return hashes


def group_starts(values: np.ndarray) -> np.ndarray:
    """Return for each of (M,) sorted values the index at which its run of equal values starts."""
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))


def running_best(contexts: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the likeliest earlier outcome of each (M,) context, how often it came, and out of how many.

    Position m sees occurrences before m only, as a table that is updated after each look-up; an outcome
    takes the lead when its count exceeds the leader's. All (M,) int64; the counts are 0 at first sight.
    """
    index = np.arange(len(contexts))
    order = np.argsort(contexts, kind="stable")  # runs of one context, each in the order of the text
    starts, outcomes = group_starts(contexts[order]), outcomes[order].astype(np.int64)
    pairs = starts * (outcomes.max(initial=0) + 1) + outcomes
    by_pair = np.argsort(pairs, kind="stable")
    counts = np.empty_like(index)
    counts[by_pair] = index - group_starts(pairs[by_pair]) + 1  # occurrences of the pair up to here
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
