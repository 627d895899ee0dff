"""Statistics of seeds: the test of the contest's records, its margin, its minimum n, and its readers."""

import json
import math

import numpy as np
import pytest

from data.errors import UserError
from eval import stats

OLD = [1.11922988, 1.12002032, 1.11888882]  # the contest's rows #549 and #1019
NEW = [1.11508120, 1.11437394, 1.11475014]


def slow_tail(t: float, df: float) -> float:
    """P(T > t) by adding up the density with Simpson's rule over a bounded image of the line."""
    scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    angle = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 200_001)
    values = np.exp(scale) * math.sqrt(df) * np.cos(angle) ** (df - 1)
    weights = np.ones(len(values))
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((values * weights).sum() * (angle[1] - angle[0]) / 3)


@pytest.mark.parametrize("df", [1, 2, 3.31, 4, 17.5, 300])
@pytest.mark.parametrize("t", [-12, -1.5, 0, 0.3, 2.7, 11.83])
def test_t_tail_is_the_integral_of_its_density(t, df):
    """Without scipy the tail is ours to prove."""
    assert stats.t_tail(t, df) == pytest.approx(slow_tail(t, df), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("t", [-3.0, 0.0, 0.5, 40.0])
def test_t_tail_has_its_closed_forms(t):
    """One and two degrees of freedom are elementary."""
    assert stats.t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-12)
    assert stats.t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-10)


def test_welch_gives_the_contests_worked_example():
    """t = -11.83, df = 3.31: the figures of record #1019 over #549."""
    found = stats.welch(NEW, OLD)
    assert (round(found.t, 2), round(found.df, 2)) == (-11.83, 3.31)
    assert found.p == pytest.approx(0.000403, abs=5e-7)


def test_margin_moves_the_hypothesis_not_the_noise():
    """Beating old by a margin is beating a row that is lower by it."""
    moved = stats.welch(NEW, [value - 0.002 for value in OLD])
    assert stats.welch(NEW, OLD, 0.002) == pytest.approx(moved)


def test_paired_test_sees_through_a_shared_seed_effect():
    """Seeds that shift both sides alike cancel."""
    old = {seed: 1.1 + 0.01 * seed for seed in range(4)}
    new = {seed: value - 0.001 - 1e-5 * (seed % 2) for seed, value in old.items()}
    assert stats.paired(new, old).p < 1e-4
    assert stats.welch(list(new.values()), list(old.values())).p > 0.4


def test_no_difference_is_even_odds():
    """Equal sides without spread must not divide by zero."""
    assert stats.welch([1.0, 1.0], [1.0, 1.0]).p == 0.5
    assert stats.one_sample([0.9, 0.9], 1.0).p == 0.0


@pytest.mark.parametrize("call", [lambda: stats.welch([1.0], OLD), lambda: stats.one_sample([1.0], 1.1)])
def test_one_score_is_not_a_sample(call):
    """A deviation from one value would be invented."""
    with pytest.raises(UserError, match="two scores"):
        call()


def test_minimum_seeds_reaches_the_wanted_power():
    """The n it names shows the gain in at least the wanted share of drawn experiments, one fewer does not."""
    gain, std = 0.001, 0.0006
    n = stats.minimum_seeds(std, gain, alpha=0.05, power=0.8)
    draw = np.random.default_rng(1)

    def share(count: int) -> float:
        new, old = draw.normal(0, std, (2, 2000, count))
        spread = np.sqrt((new.var(1, ddof=1) + old.var(1, ddof=1)) / count)
        t = (old.mean(1) - new.mean(1) + gain) / spread
        return float((t > stats.critical_t(0.05, 2 * (count - 1))).mean())

    assert share(n) > 0.77
    assert share(n - 1) < 0.8
    assert stats.minimum_seeds(std, -gain) is None


def test_half_a_percent_of_a_nat_is_0_003_bpb_at_sp1024():
    """The README's margin is in nats a token; submissions confuse it with bits a byte."""
    assert stats.nats_to_bpb(0.005, 2.436) == pytest.approx(0.00296, abs=5e-6)


def write_log(path, seed, bpb):
    path.write_text(
        f"seed:{seed}\nmodel_params:1\nnum_layers:9 model_dim:512\n"
        f"final_int8_zlib_roundtrip val_loss:{1.6884 * bpb:.4f} val_bpb:{bpb:.4f} eval_time:10ms\n"
        f"final_int8_zlib_roundtrip_exact val_loss:{1.6884 * bpb:.8f} val_bpb:{bpb:.8f}\n"
    )


@pytest.fixture
def rows(tmp_path):
    """Two folders with the logs of the worked example."""
    for name, values in (("new", NEW), ("old", OLD)):
        (tmp_path / name).mkdir()
        for seed, value in zip((1337, 42, 2025), values):
            write_log(tmp_path / name / f"train_seed{seed}.log", seed, value)
    return tmp_path


def test_command_compares_folders_of_logs(rows, capsys):
    """Unrounded digits of the logs, both margins, the paired line where seeds coincide."""
    assert stats.main([str(rows / "new"), "--against", str(rows / "old"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tests = {(row["test"], row["margin"]): row for row in report["tests"]}
    assert tests["Welch", "0"]["t"] == pytest.approx(stats.welch(NEW, OLD).t, rel=1e-12)
    assert tests["Welch", "0.005 nats"]["margin_bpb"] == pytest.approx(0.005 / 1.6884, rel=1e-6)
    assert ("paired by seed", "0") in tests
    assert report["warnings"] == []


def test_command_takes_a_number_and_warns_of_a_thin_basis(rows, capsys):
    """One seed proves nothing, and two configurations are not one."""
    (rows / "new" / "train_seed42.log").unlink()
    text = (rows / "new" / "train_seed2025.log").read_text().replace("num_layers:9", "num_layers:10")
    (rows / "new" / "train_seed2025.log").write_text(text)
    assert stats.main([str(rows / "new"), "--against", "1.12"]) == 0
    printed = capsys.readouterr().out
    assert "one-sample" in printed
    assert "2 scores" in printed
    assert "2 different configurations" in printed


def test_command_reads_submission_json(tmp_path, capsys):
    """A row may have lost its logs."""
    results = {str(seed): {"val_bpb": value, "val_loss": value * 1.7} for seed, value in enumerate(NEW)}
    (tmp_path / "submission.json").write_text(json.dumps({"seed_results": results}))
    stats.main([str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["val_bpb"] for row in report["scores"]] == NEW


def test_command_names_what_it_misses(tmp_path):
    """A wrong path is the commonest mistake."""
    with pytest.raises(UserError, match="no such file"):
        stats.main([str(tmp_path / "nothing.log")])
    (tmp_path / "empty.log").write_text("hello")
    with pytest.raises(UserError, match="expected scores"):
        stats.main([str(tmp_path / "empty.log")])


def test_a_bootstrap_interval_is_that_of_a_plain_loop():
    """Ratios of sums over documents drawn again, both sides the same documents; p counts the losses."""
    rng = np.random.default_rng(1)
    new, old = (np.stack([rng.uniform(50, 90, 30), np.full(30, 40.0)], axis=1) for _ in range(2))
    interval = stats.bootstrap_difference(new, old, level=0.9, resamples=300, seed=4)
    rng, differences = np.random.default_rng(4), []
    for _ in range(300):
        chosen = rng.integers(0, 30, 30)
        differences.append(
            sum(new[i, 0] for i in chosen) / sum(new[i, 1] for i in chosen)
            - sum(old[i, 0] for i in chosen) / sum(old[i, 1] for i in chosen)
        )
    expected = [*np.quantile(differences, [0.05, 0.95]), np.mean([d >= 0 for d in differences])]
    assert [interval.low, interval.high, interval.p] == pytest.approx(expected)


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    """Pairs of documents whose true difference is known: 95 % intervals hold it in 95 % of 120 samples."""
    held = 0
    for sample in range(120):
        rng = np.random.default_rng(sample)
        size, hard = rng.integers(100, 2000, 80), rng.normal(2.0, 0.4, 80)
        sides = [np.stack([size * (hard + rng.normal(gain, 0.05, 80)), size], axis=1) for gain in (0, 0.02)]
        interval = stats.bootstrap_difference(*sides, resamples=200, seed=sample)
        held += interval.low <= -0.02 <= interval.high
    assert 0.88 <= held / 120 <= 0.99
