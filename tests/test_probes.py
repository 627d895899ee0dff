"""The probes on toy scorers: every cheat is caught by the check that should, every honest scorer passes."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from fixtures_artifact import write_artifact

from audit import probes
from audit.__main__ import main
from audit.artifact import probe_scorer
from audit.probes import Event
from scoring.sliding import plan_windows
from train_gpt import build_model, quantize_model

pytestmark = pytest.mark.numeric

VOCAB = 12
BOS = 0
CONTEXT, STRIDE = 16, 8
SOURCE = probes.text_source(VOCAB, seed=3)
NOISE = probes.Source(np.full(VOCAB, 1 / VOCAB), np.full((VOCAB, VOCAB), 1 / VOCAB))
STREAM = SOURCE.draw(49, seed=5)
TABLE = torch.log(torch.tensor(0.9 * SOURCE.step + 0.1 / VOCAB, dtype=torch.float32))


def bigram(tokens, starts_doc, first=0):
    """Honest: the row of the current token."""
    return TABLE[tokens][:, first:]


def blend(tokens, starts_doc, first=0):
    """Honest, with a long memory inside its window: adds the mean of the rows so far."""
    rows = TABLE[tokens]
    seen = torch.arange(1, tokens.shape[1] + 1)[:, None]
    return (rows + rows.cumsum(dim=1) / seen)[:, first:]


def peek(tokens, starts_doc, first=0):
    """Cheat: raises the logit of the next token of its window."""
    following = torch.nn.functional.one_hot(tokens.roll(-1, 1), VOCAB).float()
    following[:, -1] = 0
    return (TABLE[tokens] + 2 * following)[:, first:]


def peek_far(tokens, starts_doc, first=0):
    """Cheat: the rows depend on the token after the target, which the target itself does not betray."""
    return (TABLE[tokens] + TABLE[tokens.roll(-2, 1)])[:, first:]


def bidirectional(tokens, starts_doc, first=0):
    """Cheat: attention without a mask, the mean row of the whole window."""
    rows = TABLE[tokens]
    return (rows + rows.mean(dim=1, keepdim=True))[:, first:]


def honest_nats(stream):
    return probes.windowed(bigram, CONTEXT, STRIDE, BOS)(stream)


def score_first(stream):
    """Honest and adaptive: counts of scored tokens, mixed with the table, updated after each score."""
    counts = np.ones((VOCAB, VOCAB))
    nats = np.zeros(len(stream) - 1)
    for i, (last, token) in enumerate(pairwise(stream)):
        nats[i] = -np.log(counts[last, token] / counts[last].sum())
        counts[last, token] += 1
    return nats


def update_first(stream):
    """Cheat: counts the target before it is scored."""
    counts = np.ones((VOCAB, VOCAB))
    nats = np.zeros(len(stream) - 1)
    for i, (last, token) in enumerate(pairwise(stream)):
        counts[last, token] += 1
        nats[i] = -np.log(counts[last, token] / counts[last].sum())
    return nats


def two_pass(stream):
    """Cheat: trains on the whole stream, then scores it."""
    counts = np.ones((VOCAB, VOCAB))
    np.add.at(counts, (stream[:-1], stream[1:]), 4)
    return -np.log(counts[stream[:-1], stream[1:]] / counts[stream[:-1]].sum(axis=1))


def hashed_cache(stream):
    """Cheat: only the true token is looked up, and one bucket serves several contexts."""
    tokens = stream.astype(int)
    nats = np.zeros(len(stream) - 1)
    full, context = np.zeros(4), np.zeros(2)
    for i, (last, token) in enumerate(pairwise(tokens)):
        key, hashed = (last * 7 ^ token * 5) % 4, last % 2
        share = (full[key] + 1) / (context[hashed] + VOCAB)
        nats[i] = -np.log(min(share, 1.0))
        full[key] += 1
        context[hashed] += 1
    return nats


def outcome_gate(stream):
    """Cheat: takes the better of two experts, which only the outcome tells."""
    return np.minimum(honest_nats(stream), score_first(stream))


def total_length(stream):
    """Cheat: the temperature depends on how long the stream is."""
    return honest_nats(stream) * (1 + 1 / len(stream))


HONEST = {
    "bigram table": honest_nats,
    "long memory in windows": probes.windowed(blend, CONTEXT, STRIDE, BOS),
    "chunked": probes.windowed(blend, CONTEXT, 0, BOS),
    "score-first adaptation": score_first,
}
# name -> (scorer, the checks that must fail it, K22 on text-like streams among them)
CHEATS = {
    "peeks at the next token": (probes.windowed(peek, CONTEXT, STRIDE, BOS), {"K12", "K22"}),
    "peeks at the one after it": (probes.windowed(peek_far, CONTEXT, STRIDE, BOS), {"K13"}),
    "no causal mask": (probes.windowed(bidirectional, CONTEXT, STRIDE, BOS), {"K13"}),
    "update before score": (update_first, {"K12"}),
    "two passes": (two_pass, {"K12", "K13", "K14", "K22"}),
    "hashed cache": (hashed_cache, {"K12"}),
    "outcome gate": (outcome_gate, {"K12"}),
    "depends on the length": (total_length, {"K12", "K14"}),
}


def verdicts(score):
    """Every probe of a scorer: id -> verdict."""
    cuts = probes.cut_points(len(STREAM), (CONTEXT, CONTEXT + STRIDE))
    found = {
        "K12": probes.sums_to_one(score, STREAM, [1, CONTEXT - 3, CONTEXT + 2, len(STREAM) - 4], VOCAB),
        "K13": probes.future_flip(score, STREAM, cuts),
        "K14": probes.prefix_truncation(score, STREAM, cuts, tail=CONTEXT),
        "K20": probes.memory_of_a_copy(score, STREAM[: 1 + 2 * CONTEXT]),
        "K22": probes.entropy_floor(score, SOURCE, 400),
        "K22 noise": probes.entropy_floor(score, NOISE, 400),
    }
    return {check: finding.verdict for check, finding in found.items()}


@pytest.mark.parametrize("name", HONEST)
def test_honest_scorers_pass_every_probe(name):
    """Score-first adaptation and sliding windows are legal and must not be accused."""
    found = verdicts(HONEST[name])
    if name == "long memory in windows":
        found.pop("K20")  # the last window of the stream alone lies otherwise than within its double
    assert set(found.values()) == {"PASS"}, found


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail_the_probe_that_should_catch_them(name):
    """One miniature for each way of lying that the contest saw."""
    score, expected = CHEATS[name]
    failed = {check.partition(" ")[0] for check, verdict in verdicts(score).items() if verdict == "FAIL"}
    assert expected <= failed


def test_source_pays_its_own_entropy():
    """The floor is right: the source itself sits on it, and rows are probabilities."""
    stream = SOURCE.draw(20_000, seed=1)
    rows = np.bincount(stream[:-1], minlength=VOCAB) / (len(stream) - 1)
    entropy = -(rows[:, None] * SOURCE.step * np.log(SOURCE.step)).sum()
    assert SOURCE.nats(stream).mean() == pytest.approx(entropy, rel=0.02)
    assert SOURCE.step.sum(axis=1) == pytest.approx(np.ones(VOCAB))
    assert probes.entropy_floor(SOURCE.nats, SOURCE, 2000).verdict == "PASS"


def test_update_with_an_unscored_target_fails():
    """Score the chunk, then learn from it; never the other way round."""
    legal = [Event("score", 0, 4), Event("update", 0, 4), Event("score", 4, 8), Event("update", 0, 8)]
    assert probes.order_of_events(legal, 8).verdict == "PASS"
    assert probes.order_of_events([legal[1], *legal], 8).verdict == "FAIL"
    assert probes.order_of_events([legal[0], Event("update", 3, 5)], 8).evidence == [
        "event 1 updates with target 4 before it is scored"
    ]


@pytest.mark.parametrize(("stride", "keep_tail"), [(0, True), (8, True), (5, False)])
def test_our_windows_score_every_target_once(stride, keep_tail):
    """The project's own plan passes K16; a dropped or repeated window does not."""
    windows = plan_windows(77, CONTEXT, stride, keep_tail)
    events, n = probes.window_events(windows), int(windows[-1, 1])
    assert probes.coverage(events, n).verdict == "PASS"
    assert probes.coverage(events[:-1], n).verdict == "FAIL"
    assert probes.coverage([*events, events[0]], n).verdict == "FAIL"


def test_documents_in_another_order_show_what_is_carried_over():
    """Informative: adaptation carries, a table does not."""
    documents = [np.concatenate([[BOS], SOURCE.draw(15, seed)]).astype(np.uint16) for seed in range(4)]
    assert "carries" not in probes.document_order(honest_nats, documents).evidence[0]
    assert "carries" in probes.document_order(score_first, documents).evidence[0]


@pytest.mark.slow
def test_our_model_passes_every_probe_and_a_leak_in_it_does_not(tiny_config):
    """The same probes on the real forward pass, and on one that sees a token too far."""
    model = build_model(tiny_config, torch.device("cpu")).eval()
    vocab_size = tiny_config.data.vocab_size
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero-initialised outputs would hide every leak
        torch.nn.init.normal_(parameter, std=0.2)
    found = probe_scorer(model, vocab_size)
    assert {check: finding.verdict for check, finding in found.items()} == dict.fromkeys(found, "PASS"), found

    def leaking(tokens, starts_doc, first):
        return model(tokens, starts_doc, first) + model(tokens.roll(-1, 1), starts_doc, first)

    failed = {
        check for check, finding in probe_scorer(leaking, vocab_size).items() if finding.verdict == "FAIL"
    }
    assert "K12" in failed  # a leak of the target itself changes no other score


@pytest.mark.slow
def test_command_probes_an_artifact(tiny_config, tmp_path, capsys):
    """The report names the artifact whose scores were attacked."""
    torch.manual_seed(0)
    model = build_model(tiny_config, torch.device("cpu"))
    quantized = quantize_model(model, tiny_config, {}, len)
    write_artifact(model, tiny_config, quantized, "0" * 64, tmp_path / "a.bin")
    (tmp_path / "README.md").write_text("x")
    main([str(tmp_path), "--artifact", str(tmp_path / "a.bin"), "--json"])
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    measured = ("K12", "K13", "K14", "K16", "K19", "K20", "K22")
    assert {rows[check]["verdict"] for check in measured} == {"PASS"}
    assert all("artifact a.bin, sha256 " in rows[check]["evidence"][-1] for check in measured)
    assert rows["K11"]["verdict"] == "NOT RUN"
