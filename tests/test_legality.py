"""Every mode of the scorer and every legal combination, attacked through `score_model`, as recipes run it.

The tests of single scorers are in test_adaptive.py, test_sliding.py and test_ngram.py.
"""

import math

import numpy as np
import pytest
import torch

from data.errors import UserError
from data.validation import ValidationText
from eval.adaptive import Reports, plan_documents
from eval.audit.probes import Event, coverage, order_of_events
from eval.modes import Scoring
from eval.reference import score_reference
from formats.recipe import with_values
from train_gpt import Environment, Ranks, build_model, score_model

BOS, VOCAB, CONTEXT, STRIDE = 1, 12, 16, 4
SGD = {"sgd_lr": 0.2, "sgd_chunk_tokens": 24, "sgd_batch_seqs": 2, "sgd_epochs": 1}
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "lora_sites": "q,mlp", "lora_lr": 0.02, "lora_chunk_tokens": 6,
        "lora_batch_docs": 2, "lora_seed": 3}  # fmt: skip
TILT = {"tilt_online": 1.5}
MODES = {
    "chunked": {},
    "sliding": {},
    "doc": {},
    "sgd-ttt": SGD,
    "lora-ttt": LORA,
    "phased": LORA | SGD | {"phase_docs": 4, "phase_count": 2},
}
CASES = {mode: {"mode": mode} | values for mode, values in MODES.items()}
# Not phased: a document's hints read the text before it, which is scored by weights that learned from it.
TILTED = {f"{mode} tilt": CASES[mode] | TILT for mode in MODES if mode != "phased"}
CASES |= TILTED
IN_TEXT_ORDER = [name for name in CASES if name != "phased"]
LENGTHS = (20, 5, 1, 25, 1, 10, 2, 18)
ACTS = ("score", "update")  # events that the order concerns
SHORT_RULES = ((2, 0.4, 1),)


class KeepingRanks(Ranks):
    """Keep the costs of the last scoring."""

    def sum(self, tensor):
        self.nats = super().sum(tensor)
        return self.nats


@pytest.fixture
def attack(tiny_config, monkeypatch):
    """Score a stream as a case says: returns (N,) nats and the events; hints speak after two tokens."""
    from eval import ngram

    rules = tuple(ngram.OnlineRule(*rule) for rule in SHORT_RULES)
    monkeypatch.setattr(ngram.online_tilt, "__defaults__", (2.0, rules))
    shape = {"data.vocab_size": VOCAB, "model.num_layers": 2, "model.model_dim": 16, "eval.keep_tail": True}
    base = with_values(tiny_config, shape | {"eval.stride": STRIDE, "run.val_batch_tokens": 256}, "test")
    torch.manual_seed(0)
    model = build_model(base, torch.device("cpu"))
    model.attention = "sdpa"  # the same rounding with and without a backward pass to come
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.3)

    def score(case: str, tokens: np.ndarray, scale: float = 1.0, **changes) -> tuple[np.ndarray, list[dict]]:
        settings = CASES.get(case, {"mode": case} | SGD) | changes
        cfg = with_values(base, {f"eval.{name}": value for name, value in settings.items()}, "test")
        text = ValidationText(tokens, np.ones(len(tokens) - 1), BOS, "val", "bytes", "", None)
        ranks, events = KeepingRanks(Environment({}), "cpu"), []
        with torch.no_grad():
            model.embed.weight.mul_(scale)
        score_model(model, cfg, text, ranks, Scoring(Reports(events.append)))
        with torch.no_grad():
            model.embed.weight.div_(scale)
        return ranks.nats.double().numpy(), events

    score.model = model
    return score


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


@pytest.mark.parametrize("case", ["lora-ttt", "phased", "sgd-ttt"])
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
    np.testing.assert_allclose(alone[:kept], whole[:kept], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["sgd-ttt", "sgd-ttt tilt"])
def test_a_prefix_alone_is_scored_by_the_same_weights_until_rates_differ(attack, case):
    """The rate falls with the share of the text that is done: lengths are known, as in the contest's form."""
    whole, _ = attack(case, TEXT)
    alone, _ = attack(case, TEXT[:61])
    np.testing.assert_allclose(alone[:48], whole[:48], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_of_all_targets_add_up_to_one(attack, case):
    """Rule C2 over the whole vocabulary.

    Not where a phase learns: a BOS as the target would make two shorter documents of one of the longest,
    which is the price of that order (see test_adaptive.py).
    """
    place = 62 if case == "phased" else 30  # in the document of two tokens, in that of 25
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
    assert [row["kind"] for row in rows].count("precompute") == ("tilt" in case)
    assert (nats > 0).all()


@pytest.mark.parametrize("case", [name for name in CASES if name in ("doc", "lora-ttt")])
def test_documents_in_another_order_score_the_same(attack, case):
    """Independence of documents, which these two modes claim and the others do not."""
    spans = plan_documents(TEXT, BOS)
    order = np.random.default_rng(2).permutation(len(spans))
    shuffled = np.concatenate([*(TEXT[lo:hi] for lo, hi in spans[order]), [BOS]]).astype(np.uint16)
    before, after = attack(case, TEXT)[0], attack(case, shuffled)[0]
    for (lo, hi), (low, high) in zip(spans[order], plan_documents(shuffled, BOS)):
        np.testing.assert_allclose(after[low:high], before[lo:hi], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", TILTED)
def test_hints_speak_in_these_tests(attack, case):
    """A tilt that is silent would pass them all."""
    assert not np.allclose(attack(case, TEXT)[0], attack(case.removesuffix(" tilt"), TEXT)[0])


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
        np.testing.assert_allclose(nats, np.concatenate(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_that_are_no_numbers_are_named(attack, case):
    """A diverged model has no score: not 0, not infinity, not that of the targets before."""
    with torch.no_grad():
        attack.model.embed.weight[5] = float("nan")
    with pytest.raises(UserError, match="expected finite costs, found nan for target"):
        attack(case, TEXT)
