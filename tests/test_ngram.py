"""The n-gram tilt: a distribution, read from prefixes alone, equal to slow obvious tables."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from eval.ngram import (
    NO_HINT,
    ONLINE_RULES,
    NgramTable,
    OnlineRule,
    Tilt,
    build_table,
    join_tilts,
    online_tilt,
    read_table,
    static_tilt,
    tilted_nats,
    write_table,
)
from eval.sliding import ScoreOptions, plan_windows, score_windows

SMALL_RULES = (OnlineRule(3, 0.5, 2), OnlineRule(2, 0.6, 1))


def random_tokens(count, vocab_size=5, seed=0):
    """A stream in which short contexts come back often."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.uint16)


def random_tilt(num_targets, vocab_size, num_hints=3, seed=0):
    """Hints with gaps and with columns that agree."""
    rng = np.random.default_rng(seed)
    hints = rng.integers(NO_HINT, vocab_size, (num_targets, num_hints)).astype(np.int32)
    return Tilt(hints, rng.uniform(0, 2, hints.shape).astype(np.float32))


def slow_online_hints(tokens, rules, boost):
    """One pass with dictionaries: look up, then update."""
    seen, leader = defaultdict(Counter), {}
    found = []
    for i in range(len(tokens) - 1):
        hint, strength = NO_HINT, 0.0
        for rule in rules:
            context = tuple(tokens[max(i + 1 - rule.order, 0) : i + 1])
            if len(context) < rule.order or hint != NO_HINT:
                continue
            count = seen[context].total()
            if count and count >= rule.min_count:
                share = seen[context][leader[context]] / count
                if share >= rule.min_share:
                    hint, strength = leader[context], boost * share
        found.append((hint, strength))
        for rule in rules:
            context, outcome = tuple(tokens[max(i + 1 - rule.order, 0) : i + 1]), tokens[i + 1]
            if len(context) == rule.order:
                seen[context][outcome] += 1
                ahead = leader.setdefault(context, outcome)
                if seen[context][outcome] > seen[context][ahead]:
                    leader[context] = outcome
    return found


@pytest.mark.reference("B15")
def test_closed_form_equals_the_softmax_of_tilted_logits_and_sums_to_one():
    """The closed form is a shortcut for adding d to the hints' logits; only then is it a probability."""
    vocab_size, rows = 7, 40
    scores = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    tilt = random_tilt(rows, vocab_size)
    tilted = scores.double()
    for column in range(tilt.hints.shape[1]):
        for row in np.flatnonzero(tilt.hints[:, column] != NO_HINT):
            tilted[row, tilt.hints[row, column]] += float(tilt.strengths[row, column])
    everything = torch.stack(
        [tilt(scores, torch.full((rows,), v), torch.arange(rows)) for v in range(vocab_size)], dim=1
    )
    torch.testing.assert_close(everything.double(), -F.log_softmax(tilted, -1), atol=2e-6, rtol=0)
    torch.testing.assert_close((-everything).exp().sum(1), torch.ones(rows), atol=2e-6, rtol=0)


@pytest.mark.reference("B15")
def test_a_hit_gains_and_a_miss_costs_what_the_formula_says():
    """p = 0.2, d = 0.15: +0.11815 and -0.03185 nats, the reference system's own numbers."""
    scores = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(2, 1)
    hints, strengths = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 0.15)
    targets = torch.tensor([0, 1])
    gain = F.cross_entropy(scores, targets, reduction="none") - tilted_nats(scores, targets, hints, strengths)
    assert gain.tolist() == pytest.approx([0.11815, -0.03185], abs=5e-6)


@pytest.mark.reference("B15")
@pytest.mark.parametrize("silent", ["no strength", "no hint"])
def test_without_strength_or_hint_nothing_changes(silent):
    """The tilt is the identity, bit for bit, where it does not speak."""
    scores = torch.randn(30, 9, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(30) % 9
    tilt = random_tilt(30, 9)
    if silent == "no strength":
        tilt = tilt._replace(strengths=np.zeros_like(tilt.strengths))
    else:
        tilt = tilt._replace(hints=np.full_like(tilt.hints, NO_HINT))
    nats = tilt(scores, targets, torch.arange(30))
    assert torch.equal(nats, F.cross_entropy(scores, targets, reduction="none"))


@pytest.mark.reference("B16")
def test_alignment_shows_in_the_sign_of_the_gain():
    """Where the next token is always the table's guess the tilt must help; system B's may not."""
    successor = np.array([1, 2, 3, 4, 5, 6, 0], dtype=np.uint16)
    table = NgramTable(7, (np.arange(7, dtype=np.uint32),), (successor,))
    tokens = (np.arange(60) % 7).astype(np.uint16)
    windows, options = plan_windows(59, 16), ScoreOptions(0, 64)

    def logits(tokens, starts_doc, first):
        return torch.zeros(*tokens[:, first:].shape, 7)

    plain = score_windows(logits, tokens, windows, options).sum()
    right, legacy = (
        score_windows(
            logits, tokens, windows, options._replace(cost=static_tilt(table, tokens, 0.15, shifted))
        ).sum()
        for shifted in (False, True)
    )
    assert right < plain < legacy


@given(st.integers(2, 120), st.integers(2, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_online_hints_equal_a_table_that_is_updated_after_each_look_up(count, vocab_size, seed):
    """The sorted form sees exactly what a dictionary filled token by token would have seen."""
    tokens = random_tokens(count, vocab_size, seed)
    tilt = online_tilt(tokens, 1.5, SMALL_RULES)
    expected = slow_online_hints(tokens.tolist(), SMALL_RULES, 1.5)
    assert tilt.hints[:, 0].tolist() == [hint for hint, _ in expected]
    np.testing.assert_allclose(tilt.strengths[:, 0], [strength for _, strength in expected], rtol=1e-6)


def test_long_contexts_speak_when_text_comes_back():
    """The default rules: a passage seen three times is hinted throughout, noise never."""
    noise = random_tokens(400, 4000)
    assert (online_tilt(noise).hints == NO_HINT).all()
    tilt = online_tilt(np.tile(noise[:100], 4))
    third = slice(2 * 100 + max(rule.order for rule in ONLINE_RULES), 3 * 100)
    assert (tilt.hints[third, 0] == np.tile(noise[:100], 4)[1:][third]).all()
    assert (tilt.strengths[third] == 2.0).all()


@pytest.mark.parametrize("cut", [1, 2, 5, 50, 199])
def test_hints_and_gates_read_the_prefix_alone(cut):
    """Contest rule C1: neither the target nor what follows may move a hint or its strength."""
    tokens = random_tokens(200, 4)
    table = build_table(random_tokens(500, 4, seed=3), 4, (4, 10))
    changed = tokens.copy()
    changed[cut:] = (changed[cut:] + 1 + random_tokens(200 - cut, 3, seed=9)) % 4
    for make in (
        lambda text: online_tilt(text, 2.0, SMALL_RULES),
        lambda text: static_tilt(table, text, 0.3),
        lambda text: static_tilt(table, text, 0.3, legacy_alignment=True),
    ):
        whole, flipped, short = make(tokens), make(changed), make(tokens[: cut + 1])
        for other in (
            flipped,
            short,
        ):  # hints[: cut] belong to targets 0 .. cut - 1, which read tokens[: cut]
            assert np.array_equal(whole.hints[:cut], other.hints[:cut])
            assert np.array_equal(whole.strengths[:cut], other.strengths[:cut])


def test_table_holds_the_likeliest_continuation_of_each_frequent_prefix():
    """Sorting and counting against a dictionary of counters."""
    tokens = random_tokens(300, 6)
    table = build_table(tokens, 6, (6, 1000), min_count=2)
    for length, (keys, nexts) in enumerate(zip(table.keys, table.tokens), start=1):
        after = defaultdict(Counter)
        for i in range(length, len(tokens)):
            after[tuple(tokens[i - length : i].tolist())][int(tokens[i])] += 1
        expected = {
            sum(token * 6**power for power, token in enumerate(reversed(prefix))): min(
                token for token, count in counts.items() if count == max(counts.values())
            )
            for prefix, counts in after.items()
            if max(counts.values()) >= 2
        }
        assert dict(zip(keys.tolist(), nexts.tolist())) == expected
    assert [len(keys) for keys in build_table(tokens, 6, (3, 5)).keys] == [3, 5]


def test_static_hints_come_from_the_tokens_before_the_target():
    """Column n holds the guess from n + 1 tokens of prefix; the start of the text has none."""
    table = NgramTable(
        10, (np.array([3], np.uint32), np.array([34], np.uint32)), (np.array([4], np.uint16),) * 2
    )
    tokens = np.array([3, 4, 3, 4, 9], dtype=np.uint16)
    tilt = static_tilt(table, tokens, 0.5)
    assert tilt.hints.tolist() == [[4, -1], [-1, 4], [4, -1], [-1, 4]]
    legacy = static_tilt(table, tokens, 0.5, legacy_alignment=True)
    assert legacy.hints.tolist() == [[-1, -1], [4, -1], [-1, 4], [4, -1]]
    joined = join_tilts(tilt, legacy)
    assert joined.hints.shape == joined.strengths.shape == (4, 4)


def test_a_table_survives_the_artifact_and_a_damaged_one_is_refused():
    """It travels as plain arrays whose lengths, order and range are checked, because files lie."""
    table = build_table(random_tokens(400, 20), 20, (20, 100))
    streams = write_table(table)
    again = read_table(streams, 20)
    for before, after in zip((*table.keys, *table.tokens), (*again.keys, *again.tokens)):
        assert np.array_equal(before, after)
    cut = streams | {"ngram2.tokens": streams["ngram2.tokens"][:-2]}
    missing = {name: raw for name, raw in streams.items() if name != "ngram1.keys"} | {"x": b""}
    for bad, vocab_size in ((cut, 20), (missing, 20), (streams, 5)):
        with pytest.raises(UserError, match="n-gram table"):
            read_table(bad, vocab_size)


def test_random_text_costs_at_least_its_entropy():
    """The universal lie detector: no distribution beats log2 V on noise, tilted or not."""
    tokens = random_tokens(20_001, 16)
    cost = join_tilts(
        online_tilt(tokens, 2.0, SMALL_RULES),
        static_tilt(build_table(tokens[:5000], 16, (16, 256)), tokens, 0.3),
    )
    windows = plan_windows(20_000, 100)[50:]  # past what the table was counted on
    options = ScoreOptions(0, 4000, cost=cost)
    nats = score_windows(lambda t, s, first: torch.zeros(*t[:, first:].shape, 16), tokens, windows, options)
    assert nats[5000:].mean() > math.log(16.0) - 4 * float(nats[5000:].std()) / math.sqrt(15_000)
    assert nats[5000:].mean() > math.log(16.0)
