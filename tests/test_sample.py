"""Drawing tokens: filters, seeds, ends, and text that grows by whole characters."""

import json

import pytest
import torch

import train_gpt
from common import UserError
from eval.hub import generate, load
from eval.sample import main
from formats.checkpoints import NUMBERED
from formats.recipe import with_values
from scoring.generate import Sampling, draw_tokens, stream_text, token_probs
from train_gpt import Environment

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


@pytest.mark.numeric
@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.79), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(top_p=1e-9), [1, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(temperature=0.5, top_k=1), [1, 0, 0, 0]),
    ],
)
def test_filters_leave_what_they_say(sampling, expected):
    """Against probabilities worked out by hand, whatever the order of the logits."""
    order = torch.tensor([2, 0, 3, 1])
    assert token_probs(LOGITS, sampling).tolist() == pytest.approx(expected, abs=1e-6)
    shuffled = token_probs(LOGITS[order], sampling)
    assert shuffled.tolist() == pytest.approx([expected[i] for i in order], abs=1e-6)


@pytest.mark.numeric
def test_draws_follow_the_probabilities():
    """10,000 draws within four deviations."""
    drawn = list(draw_tokens(lambda tokens: LOGITS, [], Sampling(10_000, seed=3), end_id=-1))
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 10_000
    assert (counts - LOGITS.exp()).abs().max() < 4 * (0.25 / 10_000) ** 0.5


def test_drawing_stops_at_the_end_token_and_at_the_limit():
    """The end token is not part of the text; each draw sees all tokens before it."""
    seen = []

    def script(tokens: list[int]) -> torch.Tensor:
        seen.append(list(tokens))
        return torch.nn.functional.one_hot(torch.tensor(len(tokens)), 9).float() * 100

    assert list(draw_tokens(script, [0, 1], Sampling(9), end_id=5)) == [2, 3, 4]
    assert seen[-1] == [0, 1, 2, 3, 4]
    assert list(draw_tokens(script, [0, 1], Sampling(2), end_id=5)) == [2, 3]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": -1}]
)
def test_settings_out_of_range_are_named(wrong):
    """Before anything is drawn."""
    with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        next(draw_tokens(lambda tokens: LOGITS, [], Sampling()._replace(**wrong), 0))


@pytest.mark.parametrize("kind", ["bytes", "bytelevel", "superbpe", "caseops", "bese"])
def test_streamed_text_is_the_decoded_text(codecs, kind):
    """Token by token, with characters of several bytes; the prompt is left out."""
    codec = codecs[kind]
    prompt, rest = (
        ("the Model reads ", "Caf\u00e9 \u4e2d\u6587 \U0001f600 Text") if kind != "bese" else ("the ", "cat")
    )
    ids = codec.encode(rest).tolist()
    expected = codec.decode(codec.encode(prompt).tolist() + ids)[len(codec.decode(codec.encode(prompt))) :]
    pieces = list(stream_text(codec, prompt, iter(ids)))
    assert "".join(pieces) == expected.decode() and "\ufffd" not in "".join(pieces)


def test_a_character_that_never_ends_is_replaced(codecs):
    """Half of a character at the end must not be lost in silence."""
    ids = codecs["bytes"].encode("\U0001f600").tolist()[:2]
    assert "".join(stream_text(codecs["bytes"], "", iter(ids))) == "\ufffd"


def test_the_command_explains_a_missing_run():
    """One line of what it may be; `run_command` prints it without a traceback."""
    with pytest.raises(UserError, match=r"^runs/none/at_all: expected .* OWNER/NAME, .*$"):
        main(["runs/none/at_all", "--prompt", "x"])


@pytest.mark.numeric
def test_a_run_prints_samples_and_trains_as_without(tiny_config, stand_in_program):
    """At every second step, and the losses do not move; the last sample is that of the checkpoint."""
    losses = []
    for every in (0, 2):
        values = {
            "watch.sample_every": every,
            "watch.sample_tokens": 7,
            "run.save_every": 6,
            "model.dropout": 0.1,
        }
        train_gpt.run(with_values(tiny_config, values, "test"), Environment({}))
        folder = train_gpt.Path(tiny_config.run.out_dir) / "tiny"
        events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([event["train_loss"] for event in events if event["kind"] == "train"])
    assert losses[0] == losses[1] and len(losses[0]) == 6
    lines = [line for line in (folder / "train.log").read_text().splitlines() if line.startswith("sample:")]
    assert [line.split()[1] for line in lines] == ["step:2", "step:4", "step:6"]
    loaded = load(folder / NUMBERED.format(6), tokenizer=tiny_config.data.tokenizer_path)
    assert json.loads(lines[-1].partition("text:")[2]) == generate(loaded, "", Sampling(7, seed=6))
