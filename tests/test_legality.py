"""Every mode of the scorer and every legal combination, attacked through `score_model`, as recipes run it.

The tests of single scorers are in test_adaptive.py, test_sliding.py and test_ngram.py.
"""

import copy
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures_numbers import assert_close_at_scale
from fixtures_reference import Slow, score_reference, score_slow_lora, score_slow_plain, score_slow_sgd

from audit.probes import Event, coverage, order_of_events
from common import UserError
from data.validation import ValidationText
from formats.recipe import with_values
from scoring import ngram
from scoring.adaptive import Callbacks, LoraScorer, ScoringRun, WindowSettings, plan_documents
from scoring.config import EVAL_MODES
from scoring.counted import MixedCost, build_counted
from scoring.modes import SCORERS, ScorerState, Scoring, scoring_cost
from scoring.ngram import NO_HINT
from scoring.sliding import ScoreOptions
from train_gpt import (
    CastLinear,
    Config,
    Environment,
    Ranks,
    build_model,
    check_config,
    score_model,
)

pytestmark = pytest.mark.numeric

BOS, VOCAB, CONTEXT, STRIDE, BATCH_TOKENS = 1, 12, 16, 4, 64
SGD = {"sgd_lr": 0.2, "sgd_chunk_tokens": 24, "sgd_batch_seqs": 2, "sgd_epochs": 1}
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "lora_sites": "q,mlp", "lora_lr": 0.02, "lora_chunk_tokens": 6,
        "lora_batch_docs": 2, "lora_seed": 3}  # fmt: skip
TILT = {"tilt_online": 1.5}
COUNTED = {"counted_entries": 40, "counted_prefix": 2, "running_lengths": (1, 2), "running_escape": 2.0}
MODES = {
    "chunked": {},
    "sliding": {},
    "doc": {},
    "sgd-ttt": SGD,
    "lora-ttt": LORA,
    "phased": LORA | SGD | {"phase_docs": 4, "phase_count": 2},
}
assert {*MODES, "legacy_pre_eval"} == set(EVAL_MODES), "a new mode must meet the tests of legality: add it"
CASES = {mode: {"mode": mode} | values for mode, values in MODES.items()}
# Not phased and not warm, where check_config refuses hints and counts.
TILTED = {f"{mode} tilt": CASES[mode] | TILT for mode in MODES if mode != "phased"}
MIXED = {f"{mode} counted": CASES[mode] | COUNTED for mode in MODES if mode != "phased"}
AIDS = TILT | COUNTED | {"tilt_static_entries": 16, "tilt_static_lengths": (2,), "fit_scales": True}
CASES |= TILTED | MIXED | {f"{mode} aids": CASES[mode] | AIDS for mode in ("sliding", "lora-ttt")}
BY_LENGTH = {"lora-ttt warm": CASES["lora-ttt"] | {"lora_warm_lanes": 2}, "phased": CASES["phased"]}
CASES |= BY_LENGTH
CASES["lora-ttt fall"] = CASES["lora-ttt"] | {"lora_lr_fall": 0.5}
NOT_COUNTED = {"counted_entries": 0, "running_lengths": ()}
IN_TEXT_ORDER = [name for name in CASES if name not in BY_LENGTH]
LENGTHS = (20, 5, 1, 25, 1, 10, 2, 18)
ACTS = ("score", "update")  # events that the order concerns
SHAPE = {
    "data.vocab_size": VOCAB,
    "data.micro_batches": 1,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "eval.keep_tail": True,
    "eval.stride": STRIDE,
    "run.val_batch_tokens": BATCH_TOKENS,
}
SHORT_RULES = ((2, 0.4, 1),)


class KeepingRanks(Ranks):
    """Keep the costs of the last scoring."""

    def sum(self, tensor):
        self.nats = super().sum(tensor)
        return self.nats


class Attack:
    """Score a stream as a case says: returns (N,) nats and the events."""

    def __init__(self, base: Config, model: torch.nn.Module):
        self.base, self.model = base, model

    def configure(self, case: str, **changes) -> Config:
        settings = CASES.get(case, {"mode": case} | SGD) | changes
        return with_values(self.base, {f"eval.{name}": value for name, value in settings.items()}, "test")

    def __call__(
        self, case: str, tokens: np.ndarray, scale: float = 1.0, **changes
    ) -> tuple[np.ndarray, list[dict]]:
        text = ValidationText(tokens, np.ones(len(tokens) - 1), BOS, "val", "bytes", "", None)
        ranks, events, self.reports = KeepingRanks(Environment({}), "cpu"), [], []
        told = Callbacks(events.append, lambda done, total: self.reports.append((done, total)))
        with torch.no_grad():
            self.model.embed.weight.mul_(scale)
        score_model(self.model, self.configure(case, **changes), text, ranks, Scoring(told))
        with torch.no_grad():
            self.model.embed.weight.div_(scale)
        return ranks.nats.double().numpy(), events


@pytest.fixture
def attack(tiny_config, monkeypatch):
    """A random model of two layers; hints speak after two tokens."""
    rules = tuple(ngram.OnlineRule(*rule) for rule in SHORT_RULES)
    monkeypatch.setattr(ngram.online_tilt, "__defaults__", (2.0, rules))
    base = with_values(tiny_config, SHAPE, "test")
    torch.manual_seed(0)
    model = build_model(base, torch.device("cpu"))
    model.attention = "sdpa"  # the same rounding with and without a backward pass to come
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.3)
    model.scorer_state = ScorerState(  # for cases that ask for it
        ngram.build_table(TEXT, (2,), 16), (0.9, 1.2), build_counted(make_text(seed=5), VOCAB, 2, 40)
    )
    return Attack(base, model)


def make_text(lengths=LENGTHS, seed=0, vocab_size=VOCAB) -> np.ndarray:
    """Documents of few words, so that hints speak, each after a BOS, and one BOS as the last target."""
    rng = np.random.default_rng(seed)
    words = rng.integers(2, vocab_size, (4, 3))
    parts = [np.concatenate([[BOS], words[rng.integers(0, 4, length)].ravel()[: length - 1]])
             for length in lengths]  # fmt: skip
    return np.concatenate([*parts, [BOS]]).astype(np.uint16)


def other_words(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The same text with other words at `places`; BOS stays where it is."""
    noise = np.random.default_rng(7).integers(2, VOCAB, len(tokens)).astype(np.uint16)
    changed = tokens.copy()
    changed[places] = np.where(tokens[places] == BOS, BOS, noise[places])
    return changed


TEXT = make_text()


class Bigrams(torch.nn.Module):
    """A table of bigrams in two factors, with a place for an adapter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 8)
        self.head = CastLinear(8, VOCAB)

    def forward(self, tokens, starts_doc, first):
        return self.head(self.embed(tokens[:, first:]))


def mix_slowly(nats: np.ndarray, cost: MixedCost, tokens: np.ndarray) -> np.ndarray:
    """Mix counts in, a target after another, with one table of what followed which tokens before."""
    followed, found = defaultdict(Counter), []
    for at, (loss, token) in enumerate(zip(nats, tokens[1:].tolist()), 1):
        chance = (1 - cost.share) * math.exp(-loss) + cost.share * cost.chances[at - 1]
        contexts = [tuple(tokens[at - n : at].tolist()) for n in COUNTED["running_lengths"] if n <= at]
        for after in (followed[context] for context in contexts):
            if after:
                prior = cost.escape * len(after)
                chance = (after[token] + prior * chance) / (after.total() + prior)
        found.append(-math.log(chance))
        for context in contexts:
            followed[context][token] += 1
    return np.array(found)


def slow_nats(model, settings, tokens: np.ndarray) -> np.ndarray:
    """Score as settings say with fixtures_reference.py, on a copy of the model in float64."""
    tilt = scoring_cost(settings, tokens, model.scorer_state)
    tilt = tilt.cost if settings.fit_scales else tilt
    if isinstance(tilt, MixedCost):
        return mix_slowly(slow_nats(model, replace(settings, **NOT_COUNTED), tokens), tilt, tokens)
    hints = [[] for _ in tokens[1:]]
    if settings.tilt_online:
        hints = [[(h, s) for h, s in zip(*row) if h != NO_HINT] for row in zip(tilt.hints, tilt.strengths)]
    scales = model.scorer_state.scales if settings.fit_scales else (1.0, 1.0)
    double = copy.deepcopy(model).double()
    double.compute_dtype = torch.float64
    stride = 0 if settings.mode == "chunked" else STRIDE
    slow = Slow(double, tokens, BOS, CONTEXT, stride, hints, scales)
    if SCORERS[settings.mode].adapt is None:
        whole = np.array([[0, len(tokens) - 1]])
        return score_slow_plain(slow, plan_documents(tokens, BOS) if settings.mode == "doc" else whole)
    if settings.mode == "sgd-ttt":
        return score_slow_sgd(slow, settings)
    assert settings.mode in ("lora-ttt", "phased"), f"add a slow scorer for {settings.mode}"
    options = ScoreOptions(BOS, BATCH_TOKENS)
    session = ScoringRun(tokens, WindowSettings(CONTEXT, STRIDE), options, None, Callbacks())
    scorer = LoraScorer(model, session, settings)
    return score_slow_lora(slow, settings, BATCH_TOKENS, dict(zip(scorer.sites, scorer.starts)))


@pytest.mark.parametrize("bigrams", [False, True], ids=["gpt", "bigrams"])
@pytest.mark.parametrize("case", CASES)
def test_every_scorer_agrees_with_the_slow_float64_one(attack, case, bigrams):
    """Batches, windows, deals and float32 move no score by 1e-4 bits: one target at a time says the same."""
    sites = {"lora_sites": "head"} if bigrams else {}
    fast = Attack(attack.base, Bigrams()) if bigrams else attack
    fast.model.scorer_state = attack.model.scorer_state
    nats, _ = fast(case, TEXT, **sites)
    expected = slow_nats(fast.model, fast.configure(case, **sites).eval, TEXT)
    assert abs(nats.mean() - expected.mean()) / math.log(2) < 1e-4
    np.testing.assert_allclose(nats, expected, rtol=0, atol=2e-3)
    assert not np.allclose(nats, attack("chunked", TEXT)[0], atol=1e-2) or case == "chunked"


@pytest.mark.parametrize("case", MODES)
def test_a_uniform_model_costs_the_log_of_the_vocabulary(attack, case):
    """The one score that is known exactly, to the last digit of float32, as long as nothing is learned."""
    model = Bigrams()
    torch.nn.init.zeros_(model.head.weight)
    model.scorer_state = ScorerState()
    nats, _ = Attack(attack.base, model)(case, TEXT, lora_sites="head", lora_lr=0.0, sgd_lr=0.0)
    assert nats == pytest.approx(math.log(VOCAB), rel=2e-7)


@pytest.mark.parametrize("case", MODES)
def test_progress_is_told_forward_pass_by_forward_pass(attack, case):
    """A scorer that speaks when it is done was silent for ten minutes; the last report is the whole."""
    nats, _ = attack(case, TEXT)
    done = [done for done, _ in attack.reports]
    assert done == sorted(set(done))
    assert done[-1] == len(nats)
    assert {total for _, total in attack.reports} == {len(nats)}
    assert done[0] < len(nats)


@pytest.mark.parametrize("case", IN_TEXT_ORDER)
def test_scores_ignore_the_text_that_follows(attack, case):
    """Rule C1, bitwise in float32, at both sides of windows, chunks and documents."""
    before, _ = attack(case, TEXT)
    cuts = [1, 15, 16, 20, 24, 50, len(TEXT) - 2]
    for cut in cuts:  # targets below `cut` are tokens 1 .. cut
        after, _ = attack(case, other_words(TEXT, np.arange(len(TEXT)) > cut))
        assert np.array_equal(before[:cut], after[:cut]), cut
        if cut < 60:
            assert not np.array_equal(before[cut:], after[cut:])


@pytest.mark.parametrize("case", ["lora-ttt", *BY_LENGTH, "sgd-ttt"])
def test_scores_ignore_the_text_that_is_scored_later(attack, case):
    """Rule C3 in the order of the event log, which is not that of the text where long documents go first."""
    before, events = attack(case, TEXT)
    scored = [event for event in events if event["kind"] == "score"]
    for at in {scored[len(scored) * part // 4]["seq"] for part in range(4)}:
        later = np.zeros(len(before) + 1, dtype=bool)  # by token
        for event in scored:
            later[event["lo"] + 1 : event["hi"] + 1] |= event["seq"] > at
        after, _ = attack(case, other_words(TEXT, later))
        for event in scored:  # documents of a batch are scored side by side, one event each
            if event["seq"] <= at - LORA["lora_batch_docs"]:
                assert np.array_equal(*(nats[event["lo"] : event["hi"]] for nats in (before, after))), event
        assert not np.array_equal(before[later[1:]], after[later[1:]])


@pytest.mark.parametrize("case", [name for name in IN_TEXT_ORDER if "sgd" not in name])
@pytest.mark.parametrize("cut", [21, 60])
def test_a_prefix_alone_scores_as_within_the_text(attack, case, cut):
    """Nothing is known of what comes, not even how long it is. The last window may lie otherwise: tail."""
    whole, _ = attack(case, TEXT)
    alone, _ = attack(case, TEXT[: cut + 1])
    kept = cut // CONTEXT * CONTEXT if "chunked" in case or "sliding" in case else cut - STRIDE
    if "lora" in case or "doc" in case:  # whole documents
        kept = int(plan_documents(TEXT[: cut + 1], BOS)[-1, 0])
    assert_close_at_scale(alone[:kept], whole[:kept], units=16)  # costs of 7 nats; batches of other shapes


@pytest.mark.parametrize("case", ["sgd-ttt", "sgd-ttt tilt"])
def test_a_prefix_alone_is_scored_by_the_same_weights_until_rates_differ(attack, case):
    """The rate falls with the share of the text that is done: lengths are known, as in the contest's form."""
    whole, _ = attack(case, TEXT)
    alone, _ = attack(case, TEXT[:61])
    assert_close_at_scale(alone[:48], whole[:48], units=16)  # costs of 6 nats


@pytest.mark.parametrize("case", CASES)
def test_probabilities_of_all_targets_add_up_to_one(attack, case):
    """Rule C2 over the whole vocabulary.

    Not where others learn from a document: a BOS as the target would make two shorter ones of one of the
    longest, which is the price of an order by length (see test_adaptive.py).
    """
    place = 62 if case in BY_LENGTH else 30  # in the document of two tokens, in that of 25
    total = 0.0
    for token in range(VOCAB):
        changed = TEXT.copy()
        changed[place + 1] = token
        total += math.exp(-attack(case, changed)[0][place])
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_noise_costs_its_entropy(attack, case):
    """No legal scorer beats log V on uniform tokens; the illegal one, here as the control, does."""
    rng = np.random.default_rng(5)
    stream = rng.integers(0, VOCAB, 401).astype(np.uint16)
    nats, _ = attack(case, stream, scale=0.05)
    assert nats.mean() > math.log(VOCAB) - 4 * nats.std() / math.sqrt(400)
    if case == "sgd-ttt":
        eager, _ = attack("legacy_pre_eval", stream, scale=0.05, sgd_epochs=12, sgd_lr=0.4)
        assert eager.mean() < math.log(VOCAB) - 0.01 < nats.mean()


@pytest.mark.parametrize("case", CASES)
def test_every_target_is_scored_once_and_before_an_update_reads_it(attack, case):
    """Rules C3 and C4 from the event log alone, judged by the audit's own checks; updates are not missing."""
    nats, rows = attack(case, TEXT)
    events = [Event(row["kind"], row["lo"], row["hi"]) for row in rows if row["kind"] in ACTS]
    assert coverage(events, len(nats)).verdict == order_of_events(events, len(nats)).verdict == "PASS"
    assert ("update" in {event.kind for event in events}) == (
        case.split()[0] in ("sgd-ttt", "lora-ttt", "phased")
    )
    assert [row["kind"] for row in rows].count("precompute") == (
        case.split()[-1] in ("tilt", "aids", "counted")
    )
    assert (nats > 0).all()


@pytest.mark.parametrize("case", [name for name in CASES if name in ("doc", "lora-ttt")])
def test_documents_in_another_order_score_the_same(attack, case):
    """Independence of documents, which these two modes claim and the others do not."""
    spans = plan_documents(TEXT, BOS)
    order = np.random.default_rng(2).permutation(len(spans))
    shuffled = np.concatenate([*(TEXT[lo:hi] for lo, hi in spans[order]), [BOS]]).astype(np.uint16)
    before, after = attack(case, TEXT)[0], attack(case, shuffled)[0]
    for (lo, hi), (low, high) in zip(spans[order], plan_documents(shuffled, BOS)):
        # Costs of 6 nats; other neighbours in a batch, and adapters amplify the rounding.
        assert_close_at_scale(after[low:high], before[lo:hi], units=64)


@pytest.mark.parametrize("case", TILTED | MIXED)
def test_hints_and_counts_speak_in_these_tests(attack, case):
    """What is silent would pass them all."""
    assert not np.allclose(attack(case, TEXT)[0], attack(case.rsplit(" ", 1)[0], TEXT)[0])


@pytest.mark.parametrize("values", [MODES["phased"] | {"mode": "phased"}, BY_LENGTH["lora-ttt warm"]])
def test_hints_are_refused_where_they_go_in_circles(attack, values):
    """A long document's hints read text that is scored later, by weights that learned from the document."""
    cfg = attack.configure("chunked", **values)
    check_config(cfg)
    for name, aid in (("tilt_online", TILT), ("running_lengths", COUNTED)):
        with pytest.raises(UserError, match=rf"eval\.{name}"):
            check_config(attack.configure("chunked", **values, **aid))


# ---- Hostile texts -----------------------------------------------------------------------------------

HOSTILE = {
    "empty documents": np.full(40, BOS),
    "documents of one token": np.tile([BOS, 5], 20),
    "one document longer than any context": make_text((90,)),
    "no BOS": np.tile([2, 3, 5, 7, 11], 12),
    "text before the first BOS": np.concatenate([[5, 6, 7], make_text((20, 9))]),
    "one target": np.array([BOS, 5]),
}


@pytest.mark.parametrize("case", MODES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_scored_in_full(attack, case, name):
    """No target is lost, repeated or charged nothing; plain modes equal the slow float64 scorer."""
    tokens = HOSTILE[name].astype(np.uint16)
    nats, rows = attack(case, tokens)
    events = [Event(row["kind"], row["lo"], row["hi"]) for row in rows if row["kind"] in ACTS]
    assert (
        coverage(events, len(tokens) - 1).verdict
        == order_of_events(events, len(tokens) - 1).verdict
        == "PASS"
    )
    assert np.isfinite(nats).all() and (nats > 0).all()
    spans = plan_documents(tokens, BOS) if case == "doc" else [(0, len(tokens) - 1)]
    if case in ("chunked", "sliding", "doc"):
        stride = 0 if case == "chunked" else STRIDE
        expected = [
            score_reference(attack.model, tokens[lo : hi + 1], CONTEXT, stride, BOS) for lo, hi in spans
        ]
        assert_close_at_scale(nats, np.concatenate(expected), units=24)  # costs of 7 nats


@pytest.mark.parametrize("case", CASES)
def test_logits_that_are_no_numbers_are_named(attack, case):
    """A diverged model has no score: not 0, not infinity, not that of the targets before."""
    with torch.no_grad():
        attack.model.embed.weight[5] = float("nan")
    with pytest.raises(UserError, match="expected finite costs, found nan for target"):
        attack(case, TEXT)
