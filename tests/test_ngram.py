"""The n-gram tilt: a distribution, read from prefixes alone, equal to slow obvious tables."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures_numbers import assert_close_at_scale
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from formats.artifact import ArtifactError, Stream
from formats.recipe import with_values
from scoring.modes import ScorerState, scorer_state_limits, write_scorer_state
from scoring.ngram import (
    NO_HINT,
    ONLINE_RULES,
    TAG_BITS,
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
from scoring.sliding import (
    ScaledCost,
    ScoreOptions,
    newton_step,
    plain_cost,
    plan_windows,
    scale_logits,
    scale_sums,
    score_windows,
)
from train_gpt import (
    Log,
    Training,
    load_artifact,
    load_scorer_state,
    load_validation,
    pack_model,
    quantize_model,
    score_model,
    store_model,
)

pytestmark = pytest.mark.numeric

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
    # Costs of 6.5 nats: a log-softmax, a logarithm and their difference.
    assert_close_at_scale(everything, -F.log_softmax(tilted, -1), units=4)
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
    tokens = (np.arange(60) % 7).astype(np.uint16)
    table = build_table(tokens, (1,), 1 << 16)
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
    table = build_table(random_tokens(500, 4, seed=3), (1, 2), 14)
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


def slow_worth(tokens, length, min_count):
    """Rank prefixes with dictionaries: {prefix: (continuation, worth)}, the formula written out."""
    after, shorter = defaultdict(Counter), defaultdict(Counter)
    for i in range(length, len(tokens)):
        after[tuple(tokens[i - length : i])][tokens[i]] += 1
    for i in range(length - 1, len(tokens)):
        shorter[tuple(tokens[i - length + 1 : i])][tokens[i]] += 1
    found = {}
    for prefix, counts in after.items():
        hits = max(counts.values())
        if hits < min_count:
            continue
        best = min(token for token, count in counts.items() if count == hits)
        seen, short = counts.total(), shorter[prefix[1:]]
        share = (hits - 0.6) / (seen + 0.5)
        other = (short[best] - hits + 0.5) / (short.total() - seen + 50)
        saved = share * math.log(share / other) + (1 - share) * math.log((1 - share) / (1 - other))
        found[prefix] = best, seen * saved if share > other else 0.0
    return found


@pytest.mark.parametrize("length", [1, 2, 3])
def test_table_holds_the_likeliest_continuation_of_each_frequent_prefix(length):
    """Hashing, sorting and counting against a dictionary of counters."""
    tokens = random_tokens(300, 6)
    expected = slow_worth(tokens.tolist(), length, min_count=2)
    table = build_table(tokens, (length,), 1 << 20)  # keys long enough for no two prefixes to share one
    assert len(table.keys) == len(expected)
    hints = static_tilt(table, tokens, 1.0).hints[:, 0]
    for i in range(len(tokens) - 1):
        known = expected.get(tuple(tokens[max(i + 1 - length, 0) : i + 1].tolist()), (NO_HINT,))
        assert hints[i] == (known[0] if i + 1 >= length else NO_HINT)


def test_a_small_table_keeps_what_saves_most():
    """Bytes are dear: what a reader of shorter prefixes knows already has no place in it."""
    rng = np.random.default_rng(0)
    tokens = rng.choice(9, 4000, p=[0.4] + [0.075] * 8).astype(np.uint16)
    tokens[100:3000:50], tokens[101:3000:50], tokens[102:3000:50] = 3, 5, 7  # 5 after 3 foretells 7
    worth = slow_worth(tokens.tolist(), 2, 2)
    table = build_table(tokens, (2,), 8)
    best = sorted(worth, key=lambda prefix: -worth[prefix][1])[:5]  # of eight: two of all may share a key
    text = np.array([token for prefix in best for token in (*prefix, 8)], dtype=np.uint16)
    assert static_tilt(table, text, 1.0).hints[1::3, 0].tolist() == [worth[prefix][0] for prefix in best]
    assert best[0] == (3, 5) and len(table.keys) <= 8


def test_a_stranger_finds_a_hint_as_rarely_as_the_tag_promises():
    """Keys are short because a wrong hint is cheap; how rare it is is their only promise."""
    table = build_table(random_tokens(20_000, 300), (2,), 4096, min_count=1)
    assert 0.9 * 4096 < len(table.keys) <= 4096
    strangers = random_tokens(20_000, 300, seed=1) + np.uint16(300)
    share = float((static_tilt(table, strangers, 1.0).hints >= 0).mean())
    assert share * 2**TAG_BITS == pytest.approx(len(table.keys) / 4096, rel=0.15)


def test_static_hints_come_from_the_tokens_before_the_target():
    """Column n holds the guess from the n-th prefix length; the start of the text has none."""
    tokens = np.array([3, 4, 3, 4, 9], dtype=np.uint16)
    table = build_table(np.array([3, 4, 3, 4, 3, 4], dtype=np.uint16), (1, 2), 1 << 20)
    tilt = static_tilt(table, tokens, 0.5)
    assert tilt.hints.tolist() == [[4, -1], [3, 3], [4, 4], [3, 3]]
    legacy = static_tilt(table, tokens, 0.5, legacy_alignment=True)
    assert legacy.hints.tolist() == [[-1, -1], [4, -1], [3, 3], [4, 4]]
    joined = join_tilts(tilt, legacy)
    assert joined.hints.shape == joined.strengths.shape == (4, 4)


def test_a_table_survives_the_artifact_and_a_damaged_one_is_refused():
    """It travels as plain arrays whose lengths, order and range are checked, because files lie."""
    table = build_table(random_tokens(400, 20), (1, 2), 120)
    streams = write_table(table)
    again = read_table(streams, (1, 2), 120, 20)
    assert (again.lengths, again.key_bits) == (table.lengths, table.key_bits)
    assert np.array_equal(again.keys, table.keys) and np.array_equal(again.tokens, table.tokens)
    cut = streams | {"ngram tokens": streams["ngram tokens"][:-2]}
    odd = {"ngram keys": b"abc", "ngram tokens": b""}
    same = streams | {"ngram keys": bytes(len(streams["ngram keys"]))}
    for bad, entries, vocab_size in ((cut, 120, 20), (odd, 120, 20), (same, 120, 20), (streams, 12, 20)):
        with pytest.raises(UserError, match="n-gram table"):
            read_table(bad, (1, 2), entries, vocab_size)
    with pytest.raises(UserError, match="tokens below 5"):
        read_table(streams, (1, 2), 120, 5)


def test_random_text_costs_at_least_its_entropy():
    """The universal lie detector: no distribution beats log2 V on noise, tilted or not."""
    tokens = random_tokens(20_001, 16)
    cost = join_tilts(
        online_tilt(tokens, 2.0, SMALL_RULES),
        static_tilt(build_table(tokens[:5000], (1, 2), 272), tokens, 0.3),
    )
    windows = plan_windows(20_000, 100)[50:]  # past what the table was counted on
    options = ScoreOptions(0, 4000, cost=cost)
    nats = score_windows(lambda t, s, first: torch.zeros(*t[:, first:].shape, 16), tokens, windows, options)
    assert nats[5000:].mean() > math.log(16.0) - 4 * float(nats[5000:].std()) / math.sqrt(15_000)
    assert nats[5000:].mean() > math.log(16.0)


# In the artifact


AIDED = {
    "eval.tilt_static_entries": 60,
    "eval.tilt_static_lengths": (2, 3),
    "eval.fit_scales": True,
    "eval.keep_tail": True,
    "quant.calib_batches": 2,
}


@pytest.fixture
def aided(tiny_config, tiny_data, alone, tmp_path):
    """A run's end without any validation text in reach: settings, model with aids, artifact, ledger."""
    folder = tmp_path / "training_text_only"
    folder.mkdir()
    for path in tiny_data.glob("fineweb_train_*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    cfg = with_values(tiny_config, AIDED | {"data.data_path": str(folder)}, "test")
    training = Training(cfg, alone, bos_id=1)
    with torch.no_grad():
        for param in training.model.parameters():
            param.add_(0.3 * torch.sin(torch.arange(param.numel()).float()).view(param.shape))
    ledger = store_model(training, Log(tmp_path, is_main=True), "f" * 64, code_bytes=0)
    return cfg, training.model, tmp_path / "artifact.bin", ledger


def test_aids_come_from_training_text_and_travel_in_the_artifact(aided, alone, tmp_path):
    """Made where no validation text exists, weighed byte by byte, restored to the last bit."""
    cfg, model, path, ledger = aided
    parts = dict(ledger)
    assert parts["weights: ngram keys"] > 0 and parts["weights: ngram tokens"] > 0
    assert sum(parts.values()) == path.stat().st_size
    model.scorer_state = ScorerState()
    bare = with_values(cfg, {"eval.tilt_static_entries": 0, "eval.fit_scales": False}, "test")
    blob, _ = pack_model(model, bare, quantize_model(model, cfg, {}, len), "f" * 64)
    assert len(blob) < path.stat().st_size  # what a target of bytes sees
    loaded, loaded_cfg, _ = load_artifact(path, cfg, alone.device)
    table = loaded.scorer_state.table
    assert loaded_cfg.eval == cfg.eval and 50 < len(table.keys) <= 60 and table.lengths == (2, 3)
    assert "calibration_time:" in (tmp_path / "train.log").read_text()
    assert len(loaded.scorer_state.scales) == 2 and loaded.scorer_state.scales != (1.0, 1.0)


def test_the_artifacts_table_and_scales_are_what_scores(aided, alone, tiny_data):
    """The score from the file is that of the cost put together by hand; the legacy form is invalid."""
    cfg, _, path, _ = aided
    model, cfg, _ = load_artifact(path, cfg, alone.device)
    text = load_validation(with_values(cfg, {"data.data_path": str(tiny_data)}, "test").data)
    table, scales, _ = model.scorer_state
    cost = ScaledCost(*scales, static_tilt(table, text.tokens, cfg.eval.tilt_static_strength))
    windows = plan_windows(len(text.tokens) - 1, 16)

    def by_hand(cost):
        return float(
            score_windows(model, text.tokens, windows, ScoreOptions(text.bos_id, 128, cost=cost)).mean()
        )

    score = score_model(model, cfg, text, alone)
    assert score.val_loss == pytest.approx(by_hand(cost), rel=1e-6) and score.invalid == ""
    plain = with_values(cfg, {"eval.tilt_static_entries": 0, "eval.fit_scales": False}, "test")
    assert score_model(model, plain, text, alone).val_loss == pytest.approx(by_hand(plain_cost), rel=1e-6)
    assert by_hand(plain_cost) != pytest.approx(by_hand(cost), rel=1e-6)
    legacy = with_values(cfg, {"eval.tilt_legacy": True}, "test")
    assert "system B" in score_model(model, legacy, text, alone).invalid
    model.scorer_state = ScorerState()
    for name in ("tilt_static_entries", "fit_scales"):
        lacking = with_values(plain, {f"eval.{name}": 1}, "test")
        with pytest.raises(UserError, match=f"eval.{name}"):
            score_model(model, lacking, text, alone)


def test_aids_that_are_too_long_or_missing_are_refused(aided):
    """A stream's stated length is bounded by the recipe before anything is decompressed."""
    cfg, model, _, _ = aided
    good = {name: Stream(b"", len(raw)) for name, raw in write_scorer_state(model.scorer_state).items()}
    assert set(good) == set(scorer_state_limits(cfg.eval, cfg.data.vocab_size))
    for bad in (good | {"ngram keys": Stream(b"", 1 << 30)}, {"ngram keys": good["ngram keys"]}):
        with pytest.raises(ArtifactError, match="at most"):
            load_scorer_state(dict(bad), cfg)


def test_scales_are_fitted_to_the_least_cost():
    """Newton's steps against a fine grid around the optimum; without positive logits that factor stays 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(600, 11, generator=generator) * 2
    targets = torch.multinomial((scores * torch.where(scores > 0, 0.8, 1.3)).softmax(-1), 1).squeeze(-1)
    scales = torch.ones(2, dtype=torch.float64)
    for _ in range(4):
        scales = newton_step(scales, scale_sums(scores, targets, scales))

    def cost(positive, negative):
        return float(F.cross_entropy(scale_logits(scores.double(), positive, negative), targets))

    best = cost(*scales.tolist())
    for move in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert cost(*(scales + torch.tensor(move)).tolist()) > best
    below = scores.clamp_max(0)
    stepped = newton_step(torch.ones(2, dtype=torch.float64), scale_sums(below, targets, torch.ones(2)))
    assert stepped[0] == 1.0 and stepped[1] != 1.0
