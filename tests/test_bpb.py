"""Bits per byte and the ledgers."""

import math

import numpy as np
import pytest

from common import UserError
from eval.logs import RunLog, ScoreLine
from scoring.bpb import BpbMeter
from scoring.budget import BYTES, SCORING, TRAINING, Ledger, overruns


def test_a_uniform_byte_model_costs_exactly_eight_bits_a_byte():
    """The definition, on the one model whose cost is known without a computation."""
    meter = BpbMeter()
    meter.add(np.full(1000, math.log(256.0)), np.ones(1000, dtype=np.int32))
    assert meter.val_bpb == pytest.approx(8.0, abs=1e-12)
    assert meter.val_loss == pytest.approx(math.log(256.0), abs=1e-12)


def test_bits_per_byte_is_a_ratio_of_sums_not_a_mean_of_ratios():
    """Batches of unlike size must weigh by their bytes."""
    meter = BpbMeter()
    meter.add(np.array([math.log(2.0)]), np.array([1]))
    meter.add(np.array([math.log(2.0)] * 3), np.array([2, 3, 4]))
    assert meter.val_bpb == pytest.approx(4 / 10)
    assert (meter.num_tokens, meter.num_bytes) == (4, 10)


@pytest.mark.parametrize(
    ("val_loss", "val_bpb", "num_tokens", "tokens_per_byte", "num_bytes"),
    [
        pytest.param(
            1.61403749, 1.18169806, 74_582_016, 0.507479, 146_965_620, marks=pytest.mark.reference("B14")
        ),
        pytest.param(
            1.95838065, 1.15986333, 62_021_632, 0.410521, 151_080_360, marks=pytest.mark.reference("C9")
        ),
    ],
)
def test_the_bytes_that_a_published_score_divides_by(
    val_loss, val_bpb, num_tokens, tokens_per_byte, num_bytes
):
    """Two printed numbers betray the denominator: what systems B and C scored, against our arithmetic."""
    line = ScoreLine("final", val_loss, val_bpb, True, None)
    log = RunLog("log", [line], {"val_tokens": num_tokens}, {}, "")
    assert 1 / line.bytes_per_token == pytest.approx(tokens_per_byte, abs=5e-7)
    assert log.implied_bytes(line) == pytest.approx(num_bytes, abs=10)


def test_a_nan_is_named_with_its_position():
    """A score with a NaN in it is no score."""
    with pytest.raises(UserError, match="found nan for target 2"):
        BpbMeter().add(np.array([1.0, 1.0, np.nan]), np.ones(3))


def test_what_is_over_a_limit_is_said_with_the_way_out():
    """At the limit is within it; a limit of 0 is none."""
    code = [("code", 1), ("weights: codes", 1000)]
    clock = [("training", 170.0), ("calibration and n-grams", 21.84)]
    assert overruns([Ledger(BYTES, code, 1001, "bytes"), Ledger(TRAINING, clock, 0, "s")]) == {}
    assert overruns([Ledger(SCORING, [("scoring", 600.0)], 600.0, "s")]) == {}
    broken = overruns(
        [
            Ledger(BYTES, code, 1000, "bytes"),
            Ledger(TRAINING, clock, 180.0, "s"),
            Ledger(SCORING, [("scoring", 601.5)], 600.0, "s"),
        ]
    )
    assert list(broken) == [
        "bytes of the submission 1,001 bytes of 1,000",
        "training 191.8 s of 180",
        "scoring 601.5 s of 600",
    ]
    for advice, knob in zip(broken.values(), ("matrix_bits", "reserve_seconds", "eval.stride"), strict=True):
        assert knob in advice


def test_the_ledger_shows_total_limit_and_what_is_left():
    """The three figures a reader looks for."""
    text = Ledger(BYTES, [("code", 400), ("weights", 500)], 1000, "bytes").format()
    assert [line.split()[-2] for line in text.splitlines()[1:]] == ["400", "500", "900", "1,000", "100"]
