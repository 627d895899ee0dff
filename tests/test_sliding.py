"""Window plans and scoring against the slow reference."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures_model import bigram_logits
from fixtures_numbers import assert_close_at_scale
from fixtures_reference import score_reference, visible_start
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.recipe import with_values
from scoring.adaptive import Callbacks, ScoringRun, WindowSettings, weights_digest
from scoring.config import EVAL_MODES
from scoring.modes import SCORERS, Scoring, score_session, warm_up_scorer
from scoring.sliding import (
    CompiledWindows,
    Pace,
    ProgressLines,
    ScoreOptions,
    plan_batches,
    plan_windows,
    score_windows,
)
from train_gpt import EvalConfig, load_validation, score_model

pytestmark = pytest.mark.numeric

BOS = 1


@given(st.integers(1, 400), st.integers(1, 64), st.integers(0, 64), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_target_is_scored_exactly_once(num_targets, context_len, stride, keep_tail):
    """The rule that makes a sum of nats a score (contest rule C4), tail included."""
    stride = min(stride, context_len)
    windows = plan_windows(num_targets, context_len, stride, keep_tail)
    kept = num_targets if keep_tail else num_targets // context_len * context_len
    times = np.zeros(num_targets, dtype=int)
    for start, end, first in windows:
        assert 0 <= start <= start + first < end <= kept
        assert end - start <= context_len
        times[start + first : end] += 1
    assert (times[:kept] == 1).all() and (times[kept:] == 0).all()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_windows_begin_where_the_definition_says(num_targets, context_len, stride):
    """The vectorised plan against a loop written straight from the definition."""
    stride = min(stride, context_len)
    for start, end, first in plan_windows(num_targets, context_len, stride):
        for target in range(start + first, end):
            assert start == visible_start(target, num_targets, context_len, stride)


@pytest.mark.parametrize("stride", [0, 1, 5, 16])
@pytest.mark.parametrize("batch_tokens", [16, 100])
def test_scores_of_a_model_equal_the_float64_reference(tiny_model, stride, batch_tokens):
    """Batching, windowing and `first` must not change a single target's cost."""
    tokens = np.random.default_rng(0).integers(0, 300, 83).astype(np.uint16)
    tokens[[0, 30]] = BOS
    windows = plan_windows(82, 16, stride)
    nats = score_windows(tiny_model, tokens, windows, ScoreOptions(BOS, batch_tokens))
    expected = score_reference(tiny_model, tokens, 16, stride, BOS)
    assert_close_at_scale(nats, expected, units=16)  # costs of 12 nats


def test_a_uniform_scorer_costs_log_vocabulary_a_token():
    """The one score that is known without a computation."""
    tokens = np.random.default_rng(0).integers(0, 64, 200).astype(np.uint16)
    nats = score_windows(
        lambda tokens, starts_doc, first: torch.zeros(*tokens[:, first:].shape, 64),
        tokens,
        plan_windows(199, 32, 8),
        ScoreOptions(BOS, 64),
    )
    # One logarithm, which vector units round one way or the other.
    assert_close_at_scale(nats, torch.full((199,), np.log(64.0)), units=2)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_add_up_to_one_rank_bitwise(world_size):
    """Each rank leaves zeros where others score, so the sum is exact for any number of ranks."""
    tokens = np.random.default_rng(0).integers(0, 11, 157).astype(np.uint16)
    windows = plan_windows(156, 16, 4)
    options = ScoreOptions(BOS, 48)
    alone = score_windows(bigram_logits(), tokens, windows, options)
    parts = [
        score_windows(bigram_logits(), tokens, windows, options._replace(rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert torch.equal(sum(parts), alone)


def test_batches_hold_windows_of_one_shape_only():
    """A batch is one call of fixed shape; no window may be padded or cut."""
    windows = plan_windows(1000, 64, 16)
    batches = plan_batches(windows, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(windows)))
    for rows in batches:
        assert len({(int(end - start), int(first)) for start, end, first in windows[rows]}) == 1
        assert len(rows) * (windows[rows[0], 1] - windows[rows[0], 0]) <= 256 or len(rows) == 1


@pytest.mark.parametrize("position", [1, 15, 16, 40, 81])
def test_future_tokens_never_move_earlier_scores(tiny_model, position):
    """A score is legal only if it depends on earlier tokens alone (contest rule C1)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, 83).astype(np.uint16)
    changed = tokens.copy()
    changed[position + 1 :] = rng.integers(2, 300, len(tokens) - position - 1)
    windows = plan_windows(82, 16, 4)
    before, after = (
        score_windows(tiny_model, text, windows, ScoreOptions(BOS, 64)) for text in (tokens, changed)
    )
    assert torch.equal(before[:position], after[:position])


def scored_settings(mode):
    """What the scorers read of a recipe's [eval] section, small."""
    return dataclasses.replace(
        EvalConfig(), mode=mode, stride=4, lora_sites="q,head", lora_rank=2, lora_chunk_tokens=8, phase_docs=2
    )


def session_of(tokens, events):
    return ScoringRun(tokens, WindowSettings(16, 4), ScoreOptions(BOS, 64), None, Callbacks(events.append))


def test_every_mode_of_a_recipe_has_its_scorer():
    """A row or a description that is forgotten would be a choice that fails when it is used."""
    assert list(SCORERS) == list(EVAL_MODES), "SCORERS (scoring/modes.py), EVAL_MODES (scoring/config.py)"


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_rehearsing_leaves_weights_and_text_alone(tiny_model, alone, mode):
    """Warm-up before the clock is legal: it reads random tokens and moves nothing (pull request 1530)."""
    tokens, events, read = np.full(200, 299, dtype=np.uint16), [], []
    session = session_of(tokens, events)
    session.ranks = alone
    before = weights_digest(tiny_model)
    hook = tiny_model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].clone()))
    warm_up_scorer(tiny_model, tiny_model, session, scored_settings(mode), vocab_size=299)
    hook.remove()
    assert read and max(int(part.max()) for part in read) < 299  # the text's only token was never read
    assert weights_digest(tiny_model) == before and not session.checker.scored.any()
    assert [event["kind"] for event in events] == ["load"]


def test_a_rehearsal_that_moves_weights_is_found_out(tiny_model, alone, monkeypatch):
    """The proof by hash must be able to fail."""

    def careless(model, session, settings):
        next(iter(tiny_model.parameters())).data.add_(1e-3)

    monkeypatch.setattr("scoring.modes.score_session", careless)
    session = session_of(np.full(200, 5, dtype=np.uint16), [])
    session.ranks = alone
    with pytest.raises(ValueError, match="moved the model's weights"):
        warm_up_scorer(tiny_model, tiny_model, session, scored_settings("sliding"), 300)


def test_the_deadline_is_in_proportion_to_the_text(tiny_config, tiny_model, alone, monkeypatch):
    """Like the limit: a track that allows seconds for so many bytes allows more for a longer text."""
    text, seen = load_validation(tiny_config.data), []

    def spy(model, session, settings):
        seen.append(session.settings.deadline_s)
        return score_session(model, session, settings)

    monkeypatch.setattr("train_gpt.score_session", spy)
    half = int(text.target_bytes.sum()) // 2
    for changes in (
        {"eval.deadline_s": 60.0},
        {"eval.deadline_s": 60.0, "eval.limit_text_bytes": half},
        {"eval.limit_seconds": 100.0},
        {"eval.limit_seconds": 100.0, "eval.limit_text_bytes": half},
        {"eval.limit_seconds": 0.0},
        {"eval.deadline_s": -1.0, "eval.limit_text_bytes": half},
    ):
        cfg = with_values(tiny_config, {"eval.keep_tail": True} | changes, "test")
        score_model(tiny_model, cfg, text, alone, Scoring(warms_up=False))
    assert seen == pytest.approx([60, 120, 95, 190, 0, 0], rel=1e-3)


def test_a_recipe_without_a_deadline_keeps_its_hash():
    """The default means "in time for the limit": recipes that never named it are what they were."""
    assert EvalConfig().deadline_s == 0.0


def test_the_log_says_early_how_long_scoring_will_take(monkeypatch):
    """After the first percent, each tenth and 5 seconds: who is over the budget can stop in time."""
    lines, now = [], [0.0]
    monkeypatch.setattr("scoring.sliding.time.perf_counter", lambda: now[0])
    progress = ProgressLines(lines.append, "scoring")
    for done in range(1, 1001):
        now[0] += 0.01 if done <= 400 else 0.1
        progress(done, 1000)
    tenths, slow = ["1%", "10%", "20%", "30%", "40%"], [f"{at}%" for at in range(44, 100, 5)]
    shown = [line.split()[1] for line in lines]
    assert shown[:5] == tenths
    assert len(shown[5:]) == pytest.approx(len(slow), abs=6)  # at least each 5 seconds, 50 targets
    assert lines[0] == "scoring: 1% seconds_left:10"  # a hundred targets a second, at first
    assert Pace().seconds_left(30, 1000) is None  # a start of unknown cost tells nothing


@pytest.mark.slow
def test_one_shape_is_compiled_once_and_scores_the_same(tiny_model, alone, monkeypatch):
    """Rehearsal builds the graph of the commonest shape; the text then builds none, whatever its tail."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_model(*a, **k, backend=counting))
    torch.compiler.reset()
    tokens = np.random.default_rng(0).integers(2, 300, 205).astype(np.uint16)
    windows, session = plan_windows(204, 16, 4), session_of(tokens, [])
    session.ranks = alone
    scorer = CompiledWindows(tiny_model, windows, 64)
    assert scorer.shape == (4, 16, 12)
    warm_up_scorer(tiny_model, scorer, session, scored_settings("sliding"), 300)
    assert len(graphs) == 1
    nats = score_windows(scorer, tokens, windows, ScoreOptions(BOS, 64))
    assert len(graphs) == 1
    expected = score_windows(tiny_model, tokens, windows, ScoreOptions(BOS, 64))
    assert_close_at_scale(nats, expected, units=16)  # costs of 12 nats; tails have another shape


def test_the_clock_of_a_score_leaves_the_rehearsal_out(tiny_config, tiny_model, alone):
    """Contest practice: what is built at first use is no part of scoring; precomputing hints is."""
    text = load_validation(tiny_config.data)
    events = []
    cfg = with_values(tiny_config, {"eval.mode": "sliding", "eval.tilt_online": 1.0}, "test")
    score = score_model(tiny_model, cfg, text, alone, Scoring(Callbacks(events.append)))
    assert [event["kind"] for event in events[:3]] == ["load", "precompute", "score"]
    assert events[1]["seconds"] <= events[-1]["seconds"] <= score.seconds
    cold = score_model(tiny_model, cfg, text, alone, Scoring(warms_up=False))
    assert cold.val_bpb == score.val_bpb
