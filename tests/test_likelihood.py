"""Log-likelihoods and continuations against the model asked one position at a time."""

from types import SimpleNamespace

import pytest
import torch

from eval.likelihood import Scorer, batches, plan_pieces, split_pair
from scoring.generate import Sampling

CONTEXT = 7  # tokens; shorter than most texts here
PAIRS = [
    ("", "bead cafe"),
    ("bead", " cafe"),
    ("a bead and a cafe", " or a face"),
    ("be", "ad"),  # one token may cover both
    ("cafe ", "deed and many more words than the context of this model holds"),
    ("bead", ""),
    ("", "\u4e2d \U0001f600\n"),
]


@pytest.fixture
def scorer(tiny_model, tiny_codec) -> Scorer:
    """The tiny model with a short context."""
    return Scorer(tiny_model, tiny_codec, CONTEXT, batch_tokens=3 * CONTEXT)


@pytest.fixture(scope="module")
def tiny_codec(tiny_data):
    from data.codecs import load_codec

    return load_codec(tiny_data / "tokenizer.model")


@torch.no_grad()
def brute_force(scorer: Scorer, context: str, text: str) -> tuple[float, bool]:
    """One window after another as lm-evaluation-harness cuts them, each run alone, without padding."""
    tokens, shared = split_pair(scorer.codec, context, text)
    total, greedy, done = 0.0, True, shared
    while done < len(tokens):
        end = min(done + CONTEXT, len(tokens))
        window = tokens[max(end - 1 - CONTEXT, 0) : end - 1]
        row = torch.tensor([window])
        logits = scorer.model(row, row == scorer.codec.bos_id)[0].double().log_softmax(-1)
        for place in range(done, end):
            found = logits[len(window) - (end - place)]
            total += found[tokens[place]].item()
            greedy &= int(found.argmax()) == tokens[place]
        done = end
    return total, greedy


@pytest.mark.numeric
def test_batches_give_what_each_text_alone_gives(scorer):
    """Padding, order and grouping change nothing."""
    found = scorer.score_pairs(PAIRS)
    for pair, likelihood in zip(PAIRS, found):
        log_prob, is_greedy = brute_force(scorer, *pair)
        assert likelihood.log_prob == pytest.approx(log_prob, rel=1e-5)
        assert likelihood.is_greedy == is_greedy
    assert found[5] == (0.0, True)
    assert all(likelihood.log_prob < 0 for i, likelihood in enumerate(found) if i != 5)


@pytest.mark.numeric
def test_what_the_model_would_write_is_greedy(scorer):
    """Of contexts that another token follows without merging: that token's text, and no other's."""
    agreeing = 0
    for context in ("bead", "a cafe", "deed ", "face a", "gab", "high bed", "c"):
        (text,) = scorer.continue_prompts([context], Sampling(1, 0.0))
        tokens, shared = split_pair(scorer.codec, context, text)
        if len(tokens) == shared + 1 and scorer.codec.decode(tokens[shared:]).decode() == text:
            agreeing += 1
            assert scorer.score_pairs([(context, text)])[0].is_greedy
            assert not scorer.score_pairs([(context, text + text)])[0].is_greedy or text * 2 in context
    assert agreeing


@pytest.mark.parametrize(("context", "text"), PAIRS)
def test_nothing_of_a_text_goes_unpaid(tiny_codec, context, text):
    """Context and text are encoded as one; the tokens that are scored cover every byte of the text."""
    tokens, shared = split_pair(tiny_codec, context, text)
    assert tokens == [tiny_codec.bos_id, *tiny_codec.encode(context + text)]
    paid = tiny_codec.decode(tokens[shared:]).decode()
    assert paid.endswith(text) and (context + text).endswith(paid)


def test_a_token_over_the_boundary_belongs_to_the_text():
    """Counting the context's tokens alone would lose it."""
    ids = {"be": [1, 2], "bead": [1, 3], "": []}
    codec = SimpleNamespace(bos_id=0, encode=lambda text: torch.tensor(ids[text], dtype=torch.int32).numpy())
    assert split_pair(codec, "be", "ad") == ([0, 1, 3], 2)
    assert split_pair(codec, "", "bead") == ([0, 1, 3], 1)
    assert split_pair(codec, "bead", "") == ([0, 1, 3], 3)


def test_windows_score_each_target_once_and_the_last_is_full():
    """As lm-evaluation-harness cuts a long text."""
    pieces = plan_pieces(0, 1, 11, 4)  # targets 0 to 9
    assert [tuple(piece) for piece in pieces] == [(0, 0, 0, 4), (0, 4, 4, 8), (0, 6, 8, 10)]
    assert [tuple(piece) for piece in plan_pieces(0, 9, 11, 4)] == [(0, 6, 8, 10)]
    assert plan_pieces(0, 11, 11, 4) == []
    grouped = list(batches([*pieces, *plan_pieces(1, 1, 3, 4)], 8))
    assert sum(map(len, grouped)) == 4
    assert all(len(batch) * (batch[0].end - batch[0].start) <= 8 for batch in grouped)


@pytest.mark.numeric
def test_a_continuation_does_not_depend_on_its_neighbours(scorer):
    """Prompts of different lengths, longer than the context too, alone and together."""
    prompts = ["", "bead", "a cafe and a face and a deed and a bead and more"]
    for sampling in (Sampling(6, 0.0), Sampling(6, 1.0, seed=3)):
        together = scorer.continue_prompts(prompts, sampling)
        assert together == [scorer.continue_prompts([prompt], sampling)[0] for prompt in prompts]
    assert len(set(scorer.continue_prompts(["bead"] * 3, Sampling(6, 1.0)))) == 1


def test_a_continuation_ends_before_the_first_stop(scorer):
    """At the earliest of them, whichever is named first."""
    (whole,) = scorer.continue_prompts(["bead"], Sampling(12, 1.0, seed=1))
    assert len(set(whole)) > 2
    first, later = whole[1], whole[-1]
    cut = min(whole.find(first), whole.find(later))
    assert scorer.continue_prompts(["bead"], Sampling(12, 1.0, seed=1), [later, first]) == [whole[:cut]]
    assert scorer.continue_prompts(["bead"], Sampling(0)) == [""]
