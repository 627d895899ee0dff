"""A counted model of tokens beside the network: n-grams of training text, and of the text scored so far.

The mixture of two distributions is one, and each of the two reads earlier tokens alone: the score is legal.
Only the target's probability is ever computed: sums over the vocabulary hold by construction.

    p <- (1 - share) p_network + share p_counted                        `CountedModel`, in the artifact
    p <- (hits + e d p) / (seen + e d), one context after another       `RunningCounts`, in no artifact

p_counted backs off: an n-gram that is kept has a share of its context, what the kept ones leave goes to the
context without its first token. The second line is Witten-Bell's rule (1991) with the mixture as what it
backs off to: a context came `seen` times before, with d different tokens next, `hits` times with the target.
"""

from typing import NamedTuple

import numpy as np
import torch

from common import UserError
from kernels.machine import copy_to_device
from scoring.ngram import hash_contexts, sort_runs
from scoring.sliding import Cost

# Of an n-gram's count, by tokens of its context: what a few counts overstate (absolute discounting).
DISCOUNTS = (0.7, 0.8, 0.85, 0.9)
MOST_HALVINGS = 15  # shares are powers of two: 2^-15 to 1
LARGEST_SHARE = 0.97  # that the n-grams of a context may have together: any token can follow
ROW_BLOCK = 256  # contexts whose orders of tokens are drawn up together
STREAMS = ("counted sizes", "counted lengths", "counted numbers", "counted shares")


class Level(NamedTuple):
    """The n-grams of one length, by context and token; what a context is, the level above says."""

    contexts: np.ndarray  # (M,) int64: the entry of the level above, which ends the context
    tokens: np.ndarray  # (M,) int64: what follows it
    halvings: np.ndarray  # (M,) int64: its share of the context is 2^-halvings


def single_tokens(halvings: np.ndarray) -> Level:
    """Return the level above all others, which has one context and every (V,) token."""
    return Level(np.zeros_like(halvings), np.arange(len(halvings)), halvings)


class CountedModel(NamedTuple):
    """levels[k] has contexts of k tokens: levels[0] is every token of the vocabulary, levels[1] has pairs."""

    levels: tuple[Level, ...]


class Grams(NamedTuple):
    """The n-grams of one length that came twice, while a model is made; each (M,)."""

    contexts: np.ndarray  # number among the n-grams one token shorter
    tokens: np.ndarray
    share: np.ndarray  # of the context, discounted
    chance: np.ndarray  # with what the shorter contexts add
    worth: np.ndarray  # nats saved on the counted text


def halve(share: np.ndarray) -> np.ndarray:
    """Round shares to powers of two; returns how often one is halved."""
    return np.clip(np.rint(-np.log2(share)), 0, MOST_HALVINGS).astype(np.int64)


def count_grams(tokens: np.ndarray, vocab_size: int, longest: int) -> list[Grams]:
    """Count the n-grams of (N,) tokens with contexts of 1 to `longest` tokens; some 100 bytes a token.

    worth = (count - discount) log(chance / chance in the shorter context).
    """
    tokens = tokens.astype(np.int64)
    chance = unigram_chances(tokens, vocab_size)
    numbers, found = tokens, []  # of the n-gram that ends at each token, among those that came twice; or -1
    for discount in DISCOUNTS[:longest]:
        at = np.flatnonzero(numbers[:-1] >= 0)
        contexts = numbers[at]
        keys, first, inverse, counts = np.unique(
            contexts * vocab_size + tokens[at + 1], return_index=True, return_inverse=True, return_counts=True
        )
        seen, often = np.bincount(contexts), counts > 1
        shorter = numbers[at[first[often]] + 1]  # the n-gram without its first token came twice too
        contexts, counts = keys[often] // vocab_size, counts[often] - discount
        share = counts / seen[contexts]
        left = 1 - np.bincount(contexts, share, len(seen))[contexts]
        below, chance = chance[shorter], share + left * chance[shorter]
        found.append(
            Grams(contexts, keys[often] % vocab_size, share, chance, counts * np.log(chance / below))
        )
        numbers = np.full(len(tokens), -1)
        numbers[at + 1] = np.where(often, often.cumsum() - 1, -1)[inverse]
    return found


def unigram_chances(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the (V,) chances of single tokens; none is 0."""
    counts = np.bincount(tokens, minlength=vocab_size) + 0.5
    return counts / counts.sum()


def choose_grams(found: list[Grams], least_worth: float) -> list[np.ndarray]:
    """Say which n-grams are worth so much, (M,) bool a level, or are the context of one that is."""
    kept = [grams.worth >= least_worth for grams in found]
    for longer, grams in zip(range(len(found) - 1, 0, -1), found[::-1]):
        kept[longer - 1][grams.contexts[kept[longer]]] = True
    return kept


def build_counted(tokens: np.ndarray, vocab_size: int, longest: int, max_entries: int) -> CountedModel:
    """Count training tokens; keep at most max_entries n-grams, those that are worth most."""
    found = count_grams(tokens, vocab_size, longest)
    worths = np.sort(np.concatenate([grams.worth for grams in found]))[::-1]
    low, high = 0, min(max_entries, len(worths))  # so many by worth alone: their contexts come on top
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(map(np.count_nonzero, choose_grams(found, worths[middle - 1]))) <= max_entries
        low, high = (middle, high) if fits else (low, middle - 1)
    kept = choose_grams(found, worths[low - 1] if low else np.inf)
    levels = [single_tokens(halve(unigram_chances(tokens, vocab_size)))]
    renumber = levels[0].tokens
    for grams, keep in zip(found, kept):
        contexts = renumber[grams.contexts[keep]]
        levels.append(Level(contexts, grams.tokens[keep], halve(grams.share[keep])))
        renumber = keep.cumsum() - 1
    return CountedModel(tuple(levels))


def shares_of(level: Level, num_contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each n-gram, (M,), and of all n-grams of each context, (num_contexts,)."""
    share = 0.5**level.halvings
    total = np.bincount(level.contexts, share, num_contexts)
    shrunk = np.minimum(LARGEST_SHARE / np.maximum(total, LARGEST_SHARE), 1.0)
    return share * shrunk[level.contexts], total * shrunk


def counted_chances(model: CountedModel, tokens: np.ndarray) -> np.ndarray:
    """Return the (N,) chances of the N targets of N + 1 tokens, each from the tokens before it."""
    vocab_size, tokens = len(model.levels[0].tokens), tokens.astype(np.int64)
    single = 0.5 ** model.levels[0].halvings
    chance, entries, num_entries = (single / single.sum())[tokens[1:]], tokens, vocab_size
    for level in model.levels[1:]:
        if not len(level.tokens):
            break
        contexts = entries[:-1]  # the entry that ends at the token before the target
        share, total = shares_of(level, num_entries)
        keys, wanted = level.contexts * vocab_size + level.tokens, contexts * vocab_size + tokens[1:]
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        hit = (keys[at] == wanted) & (contexts >= 0)
        left = np.where(contexts >= 0, 1 - total[contexts], 1.0)
        chance = np.where(hit, share[at], 0.0) + left * chance
        entries, num_entries = np.append(-1, np.where(hit, at, -1)), len(keys)
    return chance


# ----------------------------------------------------------------------------------------------------------
# in the artifact
# ----------------------------------------------------------------------------------------------------------
# A context's tokens are told by their places in an order of the vocabulary: what follows the context's last
# token as a pair comes first, the likeliest before others, then all the rest by how often they come. Places
# rise, so their differences are stored, a number as its length in bits, and the bits.


def order_tokens(levels: tuple[Level, ...] | list[Level], rows: np.ndarray) -> np.ndarray:
    """Return all tokens in the order that is suggested after each of (R,) last tokens, (R, V)."""
    single, pairs = levels[0].halvings, levels[1]
    rank = np.empty_like(single)
    rank[np.argsort(single, kind="stable")] = np.arange(len(rank))
    weight = np.tile(rank + (MOST_HALVINGS + 1) * len(rank), (len(rows), 1))
    at = np.flatnonzero(np.isin(pairs.contexts, rows))
    tokens, row = pairs.tokens[at], np.searchsorted(rows, pairs.contexts[at])
    weight[row, tokens] = pairs.halvings[at] * len(rank) + rank[tokens]
    return np.argsort(weight, axis=1)


def swap_places(levels, contexts: np.ndarray, values: np.ndarray, to_tokens: bool) -> np.ndarray:
    """Turn places in the orders of (M,) contexts of the newest level into tokens, or tokens into places."""
    if len(levels) == 1:  # pairs: the same order everywhere, by how often tokens come
        last, levels = np.zeros_like(contexts), [*levels, Level(*np.zeros((3, 0), np.int64))]
    else:
        last = levels[-1].tokens[contexts]
    rows, which = np.unique(last, return_inverse=True)
    swapped = np.empty_like(values)
    for first in range(0, len(rows), ROW_BLOCK):
        block = order_tokens(levels, rows[first : first + ROW_BLOCK])
        chosen = np.flatnonzero((which >= first) & (which < first + ROW_BLOCK))
        table = block if to_tokens else np.argsort(block, axis=1)
        swapped[chosen] = table[which[chosen] - first, values[chosen]]
    return swapped


def pack_numbers(numbers: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Write (n,) whole numbers as their lengths in bits, (n,) uint8, and what follows their first bits."""
    lengths = np.frexp(numbers.astype(np.float64))[1]
    which, shift = list_bits(lengths)
    return lengths.astype(np.uint8), np.packbits((numbers[which] >> shift & 1).astype(np.uint8)).tobytes()


def list_bits(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the bits after the first of (n,) numbers: whose it is and how far it is shifted."""
    counts = np.maximum(lengths.astype(np.int64) - 1, 0)
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)


def unpack_numbers(lengths: np.ndarray, packed: bytes) -> np.ndarray:
    """Undo pack_numbers."""
    which, shift = list_bits(lengths)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(which)).astype(np.int64)
    numbers = np.where(lengths > 0, 1 << np.maximum(lengths.astype(np.int64) - 1, 0), 0)
    np.add.at(numbers, which, bits << shift)
    return numbers


def write_counted(model: CountedModel) -> dict[str, bytes]:
    """Lay a model out as named byte strings for the artifact."""
    lengths, numbers, shares = [], [], [model.levels[0].halvings]
    for number, level in enumerate(model.levels[1:], 1):
        above = model.levels[:number]
        places = swap_places(above, level.contexts, level.tokens, to_tokens=False)
        order = np.lexsort((places, level.contexts))
        places, contexts = places[order], level.contexts[order]
        is_first = np.diff(contexts, prepend=-1) > 0
        numbers.append(np.where(is_first, places, np.diff(places, prepend=0) - 1))
        lengths.append(np.bincount(contexts, minlength=len(above[-1].tokens)))
        shares.append(level.halvings[order])
    sizes = np.array([len(level.tokens) for level in model.levels[1:]], "<u4")
    bits, packed = pack_numbers(np.concatenate([*lengths, *numbers]))
    parts = sizes.tobytes(), bits.tobytes(), packed, np.concatenate(shares).astype(np.uint8).tobytes()
    return dict(zip(STREAMS, parts, strict=True))


def counted_limits(vocab_size: int, longest: int, max_entries: int) -> dict[str, int]:
    """Return the most bytes of each of the streams that write_counted makes."""
    numbers = vocab_size + 2 * max_entries
    return dict(zip(STREAMS, (4 * longest, numbers, 4 * numbers, vocab_size + max_entries), strict=True))


def read_counted(streams: dict[str, bytes], vocab_size: int, longest: int, max_entries: int) -> CountedModel:
    """Restore what write_counted laid out; raises UserError where the bytes are no such model."""
    raw_sizes, raw_lengths, packed, raw_shares = (streams[name] for name in STREAMS)
    lengths, halvings = np.frombuffer(raw_lengths, np.uint8), np.frombuffer(raw_shares, np.uint8)
    sizes = np.frombuffer(raw_sizes, "<u4").astype(np.int64) if len(raw_sizes) == 4 * longest else np.zeros(0)
    above = [vocab_size, *sizes[:-1]]  # contexts of each level
    whole = len(sizes) == longest and sizes.sum() <= max_entries
    whole = whole and len(lengths) == sum(above) + sizes.sum() and len(halvings) == vocab_size + sizes.sum()
    whole = whole and lengths.max(initial=0) <= 32 and halvings.max(initial=0) <= MOST_HALVINGS
    if not whole or 8 * len(packed) < len(list_bits(lengths)[0]):
        raise UserError(
            f"counted model: expected {longest} levels of at most {max_entries:,} n-grams of {vocab_size} "
            f"tokens, found {len(lengths):,} numbers and {len(halvings):,} shares. The artifact is damaged; "
            "write it again."
        )
    pieces = np.split(unpack_numbers(lengths, packed), np.cumsum([*above, *sizes])[:-1])
    shares = np.split(halvings.astype(np.int64), np.cumsum([vocab_size, *sizes])[:-1])
    levels = [single_tokens(shares[0])]
    for counts, steps, halved in zip(pieces[:longest], pieces[longest:], shares[1:]):
        if counts.sum() != len(steps):
            raise UserError(
                f"counted model: expected {len(steps):,} n-grams in a level, found contexts of "
                f"{counts.sum():,}. The artifact is damaged; write it again."
            )
        contexts, ends = np.repeat(np.arange(len(counts)), counts), (steps + 1).cumsum()
        starts = counts.cumsum() - counts
        places = ends - np.append(0, ends)[starts[contexts]] - 1
        if places.max(initial=0) >= vocab_size:
            raise UserError(
                f"counted model: expected places below {vocab_size}, found {places.max()}. The artifact is "
                "damaged; write it again."
            )
        tokens = swap_places(levels, contexts, places, to_tokens=True)
        order = np.lexsort((tokens, contexts))
        levels.append(Level(contexts, tokens[order], halved[order]))
    return CountedModel(tuple(levels))


# ----------------------------------------------------------------------------------------------------------
# the text scored so far
# ----------------------------------------------------------------------------------------------------------


class RunningCounts(NamedTuple):
    """How contexts went on in the text before each of N targets; a column for each of K lengths."""

    seen: np.ndarray  # (N, K) int32: how often the context came
    hits: np.ndarray  # (N, K) int32: how often the target followed
    kinds: np.ndarray  # (N, K) int32: how many different tokens followed


def count_before(contexts: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Count what came before each of (M,) contexts: seen, hits and kinds of RunningCounts, (3, M)."""
    order, starts, _, hits = sort_runs(contexts, outcomes)
    new = np.append(0, (hits == 0).cumsum())  # outcomes that their context had not had, up to here
    found = np.empty((3, len(order)), np.int64)
    found[:, order] = np.arange(len(order)) - starts, hits, new[:-1] - new[starts]
    return found


def count_running(tokens: np.ndarray, lengths: tuple[int, ...]) -> RunningCounts:
    """Count contexts of these lengths for the N targets of N + 1 tokens; some 100 bytes a token."""
    counts = np.zeros((3, len(tokens) - 1, len(lengths)), np.int32)
    for column, length in enumerate(lengths):
        if length < len(tokens):
            counts[:, length - 1 :, column] = count_before(
                hash_contexts(tokens[:-1], length), tokens[length:]
            )
    return RunningCounts(*counts)


class MixedCost(NamedTuple):
    """A cost that charges the mixture of what another one charges for and of counted models."""

    cost: Cost
    share: float  # of the counted chances
    chances: np.ndarray  # (N,) of each target
    escape: float  # what a new continuation weighs in a running count
    running: RunningCounts

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nats, at = self.cost(logits, targets, positions), positions.numpy()
        chance = nats.double().neg().exp()
        if self.share:
            chances = copy_to_device(self.chances[at], logits.device).to(chance)
            chance = torch.lerp(chance, chances, self.share)
        seen, hits, kinds = (copy_to_device(part[at], logits.device).to(chance) for part in self.running)
        for column in range(seen.size(1)):
            prior = self.escape * kinds[:, column]
            counted = (hits[:, column] + prior * chance) / (seen[:, column] + prior)
            chance = torch.where(seen[:, column] > 0, counted, chance)
        return chance.log().neg().to(nats)
