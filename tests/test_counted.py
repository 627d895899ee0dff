"""Counted n-grams: a distribution from prefixes alone, equal to slow dictionaries, whole in the artifact."""

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from data.validation import scored_tokens
from formats.recipe import with_values
from scoring.counted import (
    DISCOUNTS,
    LARGEST_SHARE,
    MOST_HALVINGS,
    STREAMS,
    MixedCost,
    build_counted,
    choose_grams,
    count_grams,
    count_running,
    counted_chances,
    counted_limits,
    pack_numbers,
    read_counted,
    unpack_numbers,
    write_counted,
)
from scoring.modes import ScorerState, scoring_cost
from scoring.sliding import ScoreOptions, plain_cost, plan_windows, score_windows
from train_gpt import (
    Log,
    Training,
    check_config,
    load_artifact,
    load_validation,
    score_model,
    store_model,
)

pytestmark = pytest.mark.numeric


def random_text(count, vocab_size=6, seed=0):
    """Tokens in which some follow others far more often."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocab_size, 0.3), vocab_size)
    tokens = [0]
    for _ in range(count - 1):
        tokens.append(rng.choice(vocab_size, p=table[tokens[-1]]))
    return np.array(tokens, np.uint16)


def slow_grams(tokens, vocab_size, longest):
    """Shares, chances and worths by dictionaries of tuples: {context: {token: (share, chance, worth)}}."""
    single = Counter(tokens)
    chance = {(): {v: (single[v] + 0.5) / (len(tokens) + vocab_size / 2) for v in range(vocab_size)}}
    found = {}
    for length, discount in zip(range(1, longest + 1), DISCOUNTS):
        counts = defaultdict(Counter)
        for i in range(length, len(tokens)):
            counts[tuple(tokens[i - length : i])][tokens[i]] += 1
        for context, after in counts.items():
            share = {v: (n - discount) / after.total() for v, n in after.items() if n > 1}
            left = 1 - sum(share.values())
            below = chance.get(context[1:], {})
            chance[context] = {v: share[v] + left * below[v] for v in share}
            found[context] = {
                v: (
                    share[v],
                    chance[context][v],
                    (after[v] - discount) * math.log(chance[context][v] / below[v]),
                )
                for v in share
            }
    return found


def kept_grams(model):
    """What a model keeps, {context: {token: halvings}}, read from its levels as they are documented."""
    paths = [(int(token),) for token in model.levels[0].tokens]
    found = defaultdict(dict)
    for level in model.levels[1:]:
        for context, token, halvings in zip(*level):
            found[paths[context]][int(token)] = int(halvings)
        paths = [(*paths[context], int(token)) for context, token in zip(level.contexts, level.tokens)]
    return dict(found)


def slow_chance(model, context, token):
    """Back off from the longest context, in fractions."""
    grams = kept_grams(model)
    single = [Fraction(1, 2 ** int(h)) for h in model.levels[0].halvings]
    chance = single[token] / sum(single)
    for length in range(1, len(model.levels)):
        after = grams.get(tuple(context[-length:]), {}) if length <= len(context) else {}
        total = sum(Fraction(1, 2**h) for h in after.values())
        factor = min(Fraction(1), Fraction(LARGEST_SHARE) / total) if total else 1
        share = factor * Fraction(1, 2 ** after[token]) if token in after else 0
        chance = share + (1 - factor * total) * chance
    return float(chance)


@pytest.mark.parametrize("longest", [1, 2, 3, 4])
def test_counts_are_those_of_slow_dictionaries(longest):
    """Shares, chances and worths of every n-gram that came twice, and of no other."""
    tokens = random_text(400)
    expected = slow_grams(tokens.tolist(), 6, longest)
    paths = [(v,) for v in range(6)]
    for length, grams in enumerate(count_grams(tokens, 6, longest), 1):
        found = defaultdict(dict)
        for context, token, *values in zip(*grams):
            found[paths[context]][int(token)] = values
        wanted = {context: after for context, after in expected.items() if len(context) == length and after}
        assert found.keys() == wanted.keys()
        for context, after in wanted.items():
            assert after.keys() == found[context].keys()
            for token, values in after.items():
                assert found[context][token] == pytest.approx(values, rel=1e-9)
        paths = [(*paths[context], int(token)) for context, token in zip(grams.contexts, grams.tokens)]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 4), st.integers(0, 90), st.integers(0, 10**6))
def test_a_model_reads_prefixes_adds_up_to_one_and_survives_its_bytes(count, vocab, longest, entries, seed):
    """At random positions against fractions; sums over the vocabulary; the bytes give it back exactly."""
    tokens = random_text(count, vocab, seed)
    model = build_counted(tokens, vocab, longest, entries)
    assert len(model.levels) == longest + 1
    assert sum(len(level.tokens) for level in model.levels[1:]) <= entries
    text = random_text(40, vocab, seed + 1)
    chances = counted_chances(model, text)
    for at in (1, 2, 5, 20, 39):
        assert chances[at - 1] == pytest.approx(
            slow_chance(model, text[:at].tolist(), int(text[at])), rel=1e-9
        )
        total = 0.0
        for token in range(vocab):
            changed = text[: at + 1].copy()
            changed[at] = token
            found = counted_chances(model, changed)
            total += found[-1]
            np.testing.assert_array_equal(found[:-1], chances[: at - 1])
        assert total == pytest.approx(1, rel=1e-9)
    assert (chances > 0).all()
    streams = write_counted(model)
    assert all(len(streams[name]) <= limit for name, limit in counted_limits(vocab, longest, entries).items())
    again = read_counted(streams, vocab, longest, entries)
    for level, other in zip(model.levels, again.levels, strict=True):
        for column, same in zip(level, other, strict=True):
            np.testing.assert_array_equal(column, same)


def test_what_is_worth_most_is_kept_with_its_contexts():
    """No n-gram left out is worth more than one that is kept for itself; every context is an n-gram too."""
    tokens = random_text(3000, 8)
    model, found = build_counted(tokens, 8, 3, 120), count_grams(tokens, 8, 3)
    kept = [len(level.tokens) for level in model.levels[1:]]
    assert 100 < sum(kept) <= 120 and min(kept) > 0
    worth = np.sort(np.concatenate([grams.worth for grams in found]))
    more = [
        k for k in range(len(worth)) if sum(map(np.count_nonzero, choose_grams(found, worth[-k - 1]))) <= 120
    ]
    assert [np.count_nonzero(keep) for keep in choose_grams(found, worth[-max(more) - 1])] == kept
    for number, level in enumerate(model.levels[1:], 1):
        assert (level.contexts < len(model.levels[number - 1].tokens)).all()
        assert (level.halvings <= MOST_HALVINGS).all()


def test_counted_text_is_predicted_far_better_than_by_single_tokens():
    """And more n-grams never predict the counted text much worse."""
    tokens = random_text(20_000, 30)
    costs = [
        -np.log(counted_chances(build_counted(tokens, 30, 2, entries), tokens)).mean()
        for entries in (0, 30, 100, 300, 3000)
    ]
    assert costs[0] > 1.3 * costs[-1]
    assert all(later < earlier + 0.01 for earlier, later in itertools.pairwise(costs))


@given(st.lists(st.integers(0, 2**31), max_size=60))
def test_numbers_survive_their_bits(numbers):
    numbers = np.array(numbers, np.int64)
    np.testing.assert_array_equal(unpack_numbers(*pack_numbers(numbers)), numbers)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("harm", ["cut", "empty", "longer", "high", "random"])
def test_damaged_bytes_are_refused_or_give_some_model(stream, harm):
    """An error of ours, or a model that still adds up to one; never another exception."""
    model = build_counted(random_text(800, 9), 9, 3, 60)
    good = write_counted(model)
    raw = bytearray(good[stream])
    rng = np.random.default_rng(0)
    for _ in range(20):
        bad = {
            "cut": raw[: len(raw) // 2],
            "empty": b"",
            "longer": raw + b"\x01\x00",
            "high": b"\xff" * len(raw),
            "random": rng.integers(0, 256, len(raw), np.uint8).tobytes(),
        }[harm]
        try:
            found = read_counted(good | {stream: bytes(bad)}, 9, 3, 60)
        except UserError as error:
            assert "damaged" in str(error)
            continue
        text = random_text(12, 9, seed=5)
        total = sum(counted_chances(found, np.append(text, v))[-1] for v in range(9))
        assert total == pytest.approx(1)


def slow_running(tokens, lengths):
    """One pass with dictionaries: look up, then update; {(target, length): (seen, hits, kinds)}."""
    after, found = defaultdict(Counter), {}
    for i in range(1, len(tokens)):
        contexts = {n: tuple(tokens[i - n : i]) for n in lengths if n <= i}
        for length, context in contexts.items():
            known = after[context]
            found[i - 1, length] = known.total(), known[tokens[i]], len(known)
        for context in contexts.values():
            after[context][tokens[i]] += 1
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(0, 10**6))
def test_running_counts_are_those_of_one_pass(count, vocab_size, seed):
    """Each target sees what came before it only."""
    tokens, lengths = random_text(count, vocab_size, seed), (1, 2, 4)
    counts, expected = count_running(tokens, lengths), slow_running(tokens.tolist(), lengths)
    for i in range(count - 1):
        for column, length in enumerate(lengths):
            found = tuple(int(part[i, column]) for part in counts)
            assert found == expected.get((i, length), (0, 0, 0))


def charge(share, chances, escape, running, vocab_size=6):
    """A mixed cost of a fixed table of logits, and the logits."""
    logits = torch.randn(len(running.seen), vocab_size, generator=torch.Generator().manual_seed(3))
    return MixedCost(plain_cost, share, chances, escape, running), logits


def test_the_mixture_is_what_its_two_lines_say():
    """Target by target, in Python's floats."""
    text = random_text(300)
    chances = counted_chances(build_counted(random_text(900), 6, 2, 40), text)
    running = count_running(text, (1, 3))
    cost, logits = charge(0.3, chances, 4.0, running)
    targets = torch.from_numpy(text[1:].astype(np.int64))
    nats = cost(logits, targets, torch.arange(len(targets)))
    network = logits.double().softmax(-1)[torch.arange(len(targets)), targets]
    slow = slow_running(text.tolist(), (1, 3))
    for i, chance in enumerate(network.tolist()):
        chance = 0.7 * chance + 0.3 * chances[i]
        for length in (1, 3):
            seen, hits, kinds = slow.get((i, length), (0, 0, 0))
            if seen:
                chance = (hits + 4.0 * kinds * chance) / (seen + 4.0 * kinds)
        assert nats[i].item() == pytest.approx(-math.log(chance), abs=1e-5)


def test_every_token_of_the_vocabulary_together_has_chance_one():
    """Whatever the target is, by the whole chain: model, contexts that came before, escape."""
    text, model = random_text(200), build_counted(random_text(900), 6, 3, 60)
    logits = torch.randn(199, 6, generator=torch.Generator().manual_seed(1))
    for at in (1, 7, 150, 199):
        total = 0.0
        for token in range(6):
            changed = text[: at + 1].copy()
            changed[at] = token
            cost = MixedCost(
                plain_cost, 0.5, counted_chances(model, changed), 10.0, count_running(changed, (2, 3, 4))
            )
            place = torch.tensor([at - 1])
            total += math.exp(-cost(logits[place], torch.tensor([token]), place).item())
        assert total == pytest.approx(1, abs=1e-5)


AIDED = {
    "eval.counted_entries": 80,
    "eval.counted_prefix": 2,
    "eval.running_lengths": (2, 3),
    "eval.running_escape": 3.0,
}


@pytest.fixture
def stored(tiny_config, alone, tmp_path):
    """A trained-looking artifact with counted n-grams; returns its config, model, path and ledger."""
    cfg = with_values(tiny_config, AIDED, "test")
    training = Training(cfg, alone, bos_id=1)
    ledger = store_model(training, Log(tmp_path, is_main=True), "f" * 64, code_bytes=0)
    return cfg, training.model, tmp_path / "artifact.bin", ledger


def test_the_artifact_holds_what_scores(stored, alone, tiny_config):
    """Weighed, restored, and the score from the file is that of the cost put together by hand."""
    cfg, made, path, ledger = stored
    assert sum(size for name, size in ledger if "counted" in name) > 50
    assert sum(dict(ledger).values()) == path.stat().st_size
    model, cfg, _ = load_artifact(path, cfg, alone.device)
    for level, other in zip(made.scorer_state.counted.levels, model.scorer_state.counted.levels, strict=True):
        np.testing.assert_array_equal(np.stack(level), np.stack(other))
    text = load_validation(tiny_config.data)
    plain = with_values(cfg, {"eval.counted_entries": 0, "eval.running_lengths": ()}, "test")
    tokens = scored_tokens(text, cfg.data.seq_len, keep_tail=False)
    windows, options = plan_windows(len(tokens) - 1, cfg.data.seq_len), ScoreOptions(text.bos_id, 128)
    losses = score_windows(model, tokens, windows, options).double().numpy()
    chance = (0.5 * np.exp(-losses) + 0.5 * counted_chances(model.scorer_state.counted, tokens)).tolist()
    slow = slow_running(tokens.tolist(), (2, 3))
    for i in range(len(chance)):
        for length in (2, 3):
            seen, hits, kinds = slow.get((i, length), (0, 0, 0))
            if seen:
                chance[i] = (hits + 3.0 * kinds * chance[i]) / (seen + 3.0 * kinds)
    score = score_model(model, cfg, text, alone)
    assert score.val_loss == pytest.approx(-np.log(chance).mean(), rel=1e-5) and score.invalid == ""
    assert score_model(model, plain, text, alone).val_loss == pytest.approx(losses.mean(), rel=1e-6)
    assert score.val_loss < losses.mean() - 0.1
    model.scorer_state = ScorerState()
    with pytest.raises(UserError, match=r"eval\.counted_entries"):
        score_model(model, cfg, text, alone)


def test_each_part_is_charged_alone_too(stored, alone):
    """Without counts in the artifact, or without the text scored so far."""
    cfg, model, _, _ = stored
    tokens = random_text(60)
    only_running = with_values(cfg, {"eval.counted_entries": 0}, "test").eval
    for state in (ScorerState(), model.scorer_state):  # what the artifact holds is not mixed in unasked
        cost = scoring_cost(only_running, tokens, state)
        assert cost.share == 0 and len(cost.chances) == 0
    assert isinstance(cost, MixedCost) and cost.share == 0 and cost.running.seen.shape == (59, 2)
    only_counted = with_values(cfg, {"eval.running_lengths": ()}, "test").eval
    cost = scoring_cost(only_counted, tokens, model.scorer_state)
    assert cost.share == 0.5 and len(cost.chances) == 59 and cost.running.seen.shape == (59, 0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"eval.running_lengths": (0,)}, "running_lengths"),
        ({"eval.running_lengths": (2.5,)}, "running_lengths"),
        ({"eval.counted_prefix": 5}, "counted_prefix"),
        ({"eval.counted_share": 1.0}, "counted_share"),
        ({"eval.running_lengths": (2,), "eval.mode": "phased", "eval.lora_rank": 2}, "running_lengths"),
        ({"eval.counted_entries": 10, "data.vocab_size": 70_000}, "counted_entries"),
    ],
)
def test_settings_that_cannot_be_scored_are_refused(tiny_config, changes, field):
    with pytest.raises(UserError, match=rf"eval\.{field}"):
        check_config(with_values(tiny_config, changes, "test"))
