"""Attack a scorer: does each score depend on the strict past alone, is it a probability, is it given once?

A scorer is a callable on a token stream (N + 1,) that returns the nats of its N targets, in order; what it
does inside (windows, caches, adaptation) is its own business. `windowed` makes one from a `logits` callable.
The probes know nothing else, so they judge a table of counts, a model and a cheat alike.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from audit.checks import Finding

Scorer = Callable[[np.ndarray], np.ndarray]
NATS_TOLERANCE = 1e-4  # float32; 2e-2 where bfloat16 kernels depend on the batch's shape
SUM_TOLERANCE = 1e-4
LUCK = 1e-6  # chance at which a legal scorer may fail K22


class Event(NamedTuple):
    """What a scorer did, in order: it scored targets [lo, hi), or it changed its state with them."""

    kind: str  # score or update
    lo: int
    hi: int


class Source(NamedTuple):
    """A Markov chain over token ids whose true probabilities are known."""

    first: np.ndarray  # (V,)
    step: np.ndarray  # (V, V), rows sum to one

    def draw(self, num_tokens: int, seed: int) -> np.ndarray:
        """Draw a stream of uint16 ids."""
        random = np.random.default_rng(seed)
        rows = np.cumsum(self.step, axis=1)
        stream = np.zeros(num_tokens, dtype=np.uint16)
        stream[0] = random.choice(len(self.first), p=self.first)
        for i, uniform in enumerate(random.random(num_tokens - 1), start=1):
            stream[i] = min(int(np.searchsorted(rows[stream[i - 1]], uniform)), len(self.first) - 1)
        return stream

    def nats(self, stream: np.ndarray) -> np.ndarray:
        """Return the nats that the source itself pays for each target: no legal scorer pays less for long."""
        return -np.log(self.step[stream[:-1], stream[1:]])


def text_source(vocab_size: int, seed: int = 0, concentration: float = 0.1) -> Source:
    """Draw a source with rows as uneven as those of text."""
    random = np.random.default_rng(seed)
    step = random.dirichlet(np.full(vocab_size, concentration), size=vocab_size) + 1e-6
    return Source(np.full(vocab_size, 1 / vocab_size), step / step.sum(axis=1, keepdims=True))


def windowed(logits, context_len: int, stride: int, bos_id: int) -> Scorer:
    """Make a scorer from `logits(tokens, starts_doc, first) -> (B, T - first, V)` by our own windows."""
    from scoring.sliding import ScoreOptions, plan_windows, score_windows

    def score(stream: np.ndarray) -> np.ndarray:
        windows = plan_windows(len(stream) - 1, context_len, stride)
        options = ScoreOptions(bos_id, batch_tokens=4 * context_len)
        return score_windows(logits, stream, windows, options).double().numpy()

    return score


def cut_points(num_tokens: int, edges: tuple[int, ...] = ()) -> list[int]:
    """Return token positions where cheats differ: both ends, the middle, and around each edge of a window."""
    wanted = {2, num_tokens // 2, num_tokens - 1} | {edge + d for edge in edges for d in (-1, 0, 1)}
    return sorted(cut for cut in wanted if 2 <= cut < num_tokens)


def _judge_difference(differences: dict[str, float], tolerance: float) -> Finding:
    """FAIL when the largest difference is over the tolerance; names where."""
    where, worst = max(differences.items(), key=lambda row: row[1])
    text = f"{len(differences)} comparisons, at most {worst:.2e} nats ({where}); allowed {tolerance:.0e}"
    return Finding("FAIL" if not worst <= tolerance else "PASS", [text])


def sums_to_one(score: Scorer, stream: np.ndarray, positions: list[int], vocab_size: int) -> Finding:
    """K12: put every token of the vocabulary at a position; their probabilities must sum to one.

    Needs no hook: a gate or cache that looks at the target favours each candidate, and the sum shows it.
    """
    worst, text = 0.0, ""
    for position in positions:
        total = 0.0
        for token in range(vocab_size):
            changed = stream.copy()
            changed[position] = token
            total += math.exp(-float(score(changed)[position - 1]))
        if not abs(total - 1) <= worst:
            worst, text = abs(total - 1), f"the probabilities at position {position} sum to {total:.6f}"
    text = text or "the probabilities sum to 1.000000"
    evidence = f"{text}; {len(positions)} positions, {vocab_size} candidates each"
    return Finding("FAIL" if not worst <= SUM_TOLERANCE else "PASS", [evidence])


def totals_are_consistent(
    total: Callable[[np.ndarray], float], prefix: np.ndarray, vocab_size: int, error: float
) -> Finding:
    """K12 from printed totals alone: a prefix's probability is the sum of those of all its continuations.

    exp(-total) of a legal scorer is the probability of a text. One that learns from what it scores, looks
    ahead or looks up the target gives the continuations more than there is. `error` is that of a total.
    """
    alone = total(prefix)
    totals = [total(np.append(prefix, token).astype(prefix.dtype)) for token in range(vocab_size)]
    if max(totals) - min(totals) <= 4 * error:
        return Finding("NOT RUN", ["the printed loss does not depend on the last token: it is not scored"])
    share = sum(math.exp(alone - value) for value in totals)
    allowed = SUM_TOLERANCE + 4 * error
    text = f"the {vocab_size} continuations of {len(prefix)} tokens have {share:.6f} of their probability"
    return Finding("FAIL" if not abs(share - 1) <= allowed else "PASS", [f"{text}; from printed totals"])


def future_flip(
    score: Scorer, stream: np.ndarray, cuts: list[int], tolerance: float = NATS_TOLERANCE
) -> Finding:
    """K13: replace everything from a cut on; scores before it must stay."""
    before = score(stream)
    ids, counts = np.unique(stream, return_counts=True)
    random = np.random.default_rng(0)
    differences = {}
    for cut in cuts:
        suffix = stream[cut:]
        others = {
            "random": random.choice(ids, size=len(suffix)),
            "constant": np.full_like(suffix, ids[counts.argmax()]),
            "reversed": suffix[::-1],
        }
        for name, other in others.items():
            after = score(np.concatenate([stream[:cut], other]).astype(stream.dtype))
            change = np.abs(after[: cut - 1] - before[: cut - 1])
            differences[f"{name} from {cut} on"] = float(change.max(initial=0.0))
    return _judge_difference(differences, tolerance)


def prefix_truncation(
    score: Scorer, stream: np.ndarray, cuts: list[int], tail: int = 0, tolerance: float = NATS_TOLERANCE
) -> Finding:
    """K14: a prefix alone scores as within the whole stream.

    The last `tail` targets of the prefix are left out: a sliding scorer may lay its final window otherwise.
    """
    whole = score(stream)
    differences = {}
    for cut in cuts:
        last = max(cut - 1 - tail, 0)
        change = np.abs(score(stream[:cut])[:last] - whole[:last])
        differences[f"prefix of {cut}"] = float(change.max(initial=0.0))
    return _judge_difference(differences, tolerance)


def order_of_events(events: list[Event], num_targets: int) -> Finding:
    """K15: state changes only with targets whose score is already given."""
    scored = np.zeros(num_targets, dtype=bool)
    for number, (kind, lo, hi) in enumerate(events):
        if kind == "update" and not scored[lo:hi].all():
            early = lo + int(np.argmin(scored[lo:hi]))
            return Finding("FAIL", [f"event {number} updates with target {early} before it is scored"])
        if kind == "score":
            scored[lo:hi] = True
    updates = sum(event.kind == "update" for event in events)
    return Finding("PASS", [f"{updates} updates, each with scored targets only"])


def coverage(events: list[Event], num_targets: int) -> Finding:
    """K16: every target has exactly one score."""
    times = np.zeros(num_targets, dtype=int)
    for kind, lo, hi in events:
        if kind == "score":
            times[lo:hi] += 1
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        first = f"target {wrong[0]}: {times[wrong[0]]} times"
        return Finding("FAIL", [f"{len(wrong)} of {num_targets} targets are not scored once; {first}"])
    return Finding("PASS", [f"{num_targets} targets, one score each"])


def window_events(windows: np.ndarray) -> list[Event]:
    """Return the score events of rows (start, end, first) as `plan_windows` lays them."""
    return [Event("score", int(start + first), int(end)) for start, end, first in windows]


def document_order(score: Scorer, documents: list[np.ndarray], tolerance: float = NATS_TOLERANCE) -> Finding:
    """K19: documents (each beginning with its BOS) in reversed order; equal sums where they are independent.

    Expected to differ for scorers that see or learn from earlier documents, so a difference is no FAIL.
    """

    def sums(order: list[int]) -> dict[int, float]:
        scores = np.concatenate([[0.0], score(np.concatenate([documents[i] for i in order]))])
        ends = np.cumsum([len(documents[i]) for i in order])
        # A BOS is predicted from the document before it: only what follows it belongs to a document.
        return {i: float(scores[end - len(documents[i]) + 1 : end].sum()) for i, end in zip(order, ends)}

    forward = sums(list(range(len(documents))))
    backward = sums(list(range(len(documents)))[::-1])
    worst = max(abs(forward[i] - backward[i]) for i in forward)
    is_same = worst <= tolerance * max(len(document) for document in documents)
    text = f"the nats of a document move by at most {worst:.2e} when the order is reversed"
    carries = "" if is_same else ": the scorer carries something from one to the next"
    return Finding("PASS", [text + carries])


def memory_of_a_copy(
    score: Scorer, stream: np.ndarray, tail: int = 0, tolerance: float = NATS_TOLERANCE
) -> Finding:
    """K20: append the stream to itself; the first half must not change, the second shows memory.

    `tail` targets at the end of the first half are left out, as in `prefix_truncation`.
    """
    alone, doubled = score(stream), score(np.concatenate([stream, stream[1:]]))
    half = len(stream) - 1
    change = float(np.abs(doubled[: half - tail] - alone[: half - tail]).max(initial=0.0))
    gain = float(alone.mean() - doubled[half:].mean())
    text = f"first half moves by {change:.2e} nats; the copy costs {gain:+.4f} nats a token less"
    return Finding("FAIL" if not change <= tolerance else "PASS", [text])


def entropy_floor(score: Scorer, source: Source, num_tokens: int, seed: int = 0) -> Finding:
    """K22: on text from a known source no predictor beats the source itself.

    The likelihood ratio of any legal scorer, adaptive ones included, to the source is a martingale of mean
    one at most, so that (Ville) its logarithm passes ln(1 / LUCK) with a chance of at most LUCK.
    """
    stream = source.draw(num_tokens, seed)
    paid, owed = float(score(stream).sum()), float(source.nats(stream).sum())
    allowed = math.log(1 / LUCK)
    n = num_tokens - 1
    text = f"{paid / n:.4f} nats a token; the source pays {owed / n:.4f}; {n} targets"
    return Finding("FAIL" if not owed - paid <= allowed else "PASS", [text])
