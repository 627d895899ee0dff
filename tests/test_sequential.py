"""The sequential test of trials: its error rates by simulation, its power, what it never does."""

import math

import numpy as np
import pytest

from dev.trial.sequential import (
    DROP,
    KEEP,
    KEEP_FROM,
    SAME,
    UNDECIDED,
    Decision,
    Design,
    chance_to_decide,
    critical_values,
    decide,
    pairs_needed,
    smallest_effect,
)

TRIALS = 2000
DESIGNS = [Design(3), Design(8), Design(3, sigma=1.0), Design(8, sigma=1.0), Design(5, alpha=0.2)]


def run_to_verdict(differences: list[float], design: Design) -> Decision:
    """Look after each pair and stop at the first verdict, as a trial does."""
    for n in range(1, design.max_pairs + 1):
        decision = decide(differences[:n], design)
        if decision.word != UNDECIDED:
            break
    return decision


def words(design: Design, effect: float, seed: int = 7) -> dict[str, float]:
    """Simulate trials whose pairs differ by the effect with deviation 1; returns their verdicts' shares."""
    draws = np.random.default_rng(seed).standard_normal((TRIALS, design.max_pairs)) + effect
    found = [run_to_verdict(list(row), design).word for row in draws]
    return {word: found.count(word) / TRIALS for word in (KEEP, DROP, SAME, UNDECIDED)}


def at_most(rate: float) -> float:
    """Return a share that 2,000 trials exceed in one of 2,000 cases when the true one is `rate`."""
    return rate + 3.3 * math.sqrt(rate * (1 - rate) / TRIALS)


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_wrong_verdicts_are_as_rare_as_stated(design):
    """Without an effect: no more than alpha of both kinds; drops, which may come at any look, near half."""
    found = words(design, 0.0)
    assert found[KEEP] + found[DROP] <= at_most(design.alpha)
    assert found[KEEP] <= at_most(design.alpha / 2)
    assert design.alpha / 4 <= found[DROP] <= at_most(design.alpha / 2)


@pytest.mark.parametrize("effect", [-0.9, 0.9])
def test_a_difference_worth_having_is_rarely_called_none(effect):
    """Effects as large as the one that counts."""
    design = Design(8, sigma=1.0, worth=0.9)
    assert words(design, effect)[SAME] <= at_most(design.alpha / 2)
    assert words(design._replace(max_pairs=32), 0.0)[SAME] > 0.5


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_large_effects_are_found_on_their_side(design):
    """Ten deviations: 2,000 of 2,000, with the sign."""
    assert words(design, -10.0)[KEEP] > 0.995 and words(design, 10.0)[DROP] > 0.995


def test_one_look_is_the_textbook_test():
    """The normal quantile of 0.975, and Student's with one degree of freedom."""
    assert critical_values(1, True, 0.05)[0] == pytest.approx(1.960, abs=0.02)
    first, second = critical_values(2, False, 0.05)
    assert first == math.inf and second == pytest.approx(12.706, rel=0.05)


def test_looks_spend_alpha_little_by_little():
    """Later looks are easier, none is as easy as a single one."""
    found = critical_values(6, True, 0.05)
    assert list(found) == sorted(found, reverse=True) and found[-1] > 1.96


def test_a_keep_takes_three_pairs_a_drop_fewer():
    """However clear the first two are."""
    design = Design(5, sigma=0.001)
    assert decide([-1.0, -1.0], design).word == UNDECIDED and decide([1.0, 1.0], design).word == DROP
    assert decide([-1.0] * KEEP_FROM, design).word == KEEP
    assert run_to_verdict([-1.0] * 5, design).n == KEEP_FROM


def test_one_pair_without_a_known_deviation_says_nothing():
    """No interval, no verdict."""
    found = decide([5.0], Design(3))
    assert found.word == UNDECIDED and found.high == math.inf and found.std is None


def test_equal_scores_are_no_difference():
    """A switch that is dead: every pair equal to the last digit."""
    assert decide([0.0, 0.0], Design(3)).word == SAME


def test_an_interval_within_what_is_worth_having_is_no_difference_whatever_its_sign():
    """Equal seeds tell differences of 1e-7 apart: true, and nothing to keep."""
    tiny = [-6e-8, -7e-8, -6.5e-8]
    assert decide(tiny, Design(3, worth=0.0005)).word == SAME and decide(tiny, Design(3)).word == KEEP


def test_forecasts_agree_with_simulated_trials():
    """Chances, the smallest effect that is seen, the pairs that an effect needs."""
    for design, effect in ((Design(3), 4.0), (Design(8, sigma=1.0), 1.2)):
        assert chance_to_decide(design, effect) == pytest.approx(words(design, -effect)[KEEP], abs=0.035)
    design = Design(5)
    assert words(design, -smallest_effect(design))[KEEP] == pytest.approx(0.8, abs=0.04)
    needed = pairs_needed(design, 1.5)
    assert words(design._replace(max_pairs=needed), -1.5)[KEEP] > 0.76
    assert words(design._replace(max_pairs=needed - 2), -1.5)[KEEP] < 0.8
    assert pairs_needed(design, 0.1) is None
    two = Design(2)  # which cannot keep: the forecast is of a drop
    assert smallest_effect(two) > 5 and smallest_effect(Design(2, sigma=1.0)) < 4
