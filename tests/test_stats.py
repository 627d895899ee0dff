"""Statistics of seeds: the test of the contest's records, its margin, its minimum n, and its readers."""

import json
import math

import numpy as np
import pytest
from fixtures_runs import ORIGIN, make_log, write_run

from common import UserError, parse_json
from eval import stats

OLD = [1.11922988, 1.12002032, 1.11888882]  # the contest's rows #549 and #1019
NEW = [1.11508120, 1.11437394, 1.11475014]
FIVE, FOUR = [1.0570, 1.0581, 1.0575, 1.0569, 1.0583], [1.0591, 1.0586, 1.0602, 1.0588]


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


SCIPY = [  # scipy 1.17.1: ttest_ind(equal_var=False), ttest_1samp, ttest_rel, all alternative="less"
    ("welch", stats.welch(NEW, OLD), (-11.833877628547999, 3.306299432702501, 0.0004033883507704035)),
    ("welch", stats.welch(NEW, OLD, 0.002), (-6.738098191635746, 3.3062994327025024, 0.002437719902562318)),
    ("welch", stats.welch(FIVE, FOUR), (-3.5505941040848352, 6.127927363257527, 0.005822799184375177)),
    ("one", stats.one_sample(NEW, 1.1194), (-22.832834957857553, 2.0, 0.0009563193969895386)),
    ("one", stats.one_sample(FIVE, 1.0576), (-0.14177624100180045, 4.0, 0.44705537975860793)),
    (
        "paired",
        stats.paired(dict(enumerate(NEW)), dict(enumerate(OLD))),
        (-9.272315572326397, 2.0, 0.0057160520320959345),
    ),
]


@pytest.mark.parametrize(("name", "found", "expected"), SCIPY)
def test_tests_agree_with_scipy(name, found, expected):
    """Our own tail must not differ from the reference that reviewers use."""
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("t", "df", "expected"),
    [  # scipy 1.17.1: t.sf(t, df)
        (2.5, 3.31, 0.039911034020409304),
        (-0.7, 2, 0.7218034876835673),
        (12, 5.2, 2.7384638174027513e-05),
        (0.01, 250, 0.4960146313027219),
    ],
)
def test_tail_agrees_with_scipy(t, df, expected):
    """Fractional degrees of freedom have no printed table."""
    assert stats.t_tail(t, df) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("alpha", "df", "expected"),
    [(0.01, 4, 3.747), (0.005, 2, 9.925), (0.05, 10, 1.812), (0.25, 2, 0.816), (0.025, 30, 2.042)],
)
def test_critical_values_are_those_of_the_printed_tables(alpha, df, expected):
    """The one-sided table that every textbook prints, to its three decimals."""
    assert round(stats.critical_t(alpha, df), 3) == expected


@pytest.mark.parametrize(
    ("std", "gain", "alpha", "power", "expected"),
    [  # the least n with scipy 1.17.1's nct.sf(t.isf(alpha, df), df, shift) >= power
        (0.0006, 0.002, 0.01, 0.9, 5),
        (0.0006, 0.003, 0.01, 0.95, 4),
        (0.0006, 0.001, 0.05, 0.5, 3),
        (0.0006, 0.001, 0.25, 0.8, 2),
        (0.0006, 0.0005, 0.05, 0.95, 32),
        (0.001, 0.0003, 0.05, 0.9, 191),
    ],
)
def test_minimum_seeds_agree_with_the_noncentral_t_of_scipy(std, gain, alpha, power, expected):
    """One seed too few is a wasted run on eight GPUs."""
    assert stats.minimum_seeds(std, gain, alpha, power) == expected


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


def test_reproductions_are_pooled_and_shown(rows, capsys):
    """Late rows of the leaderboard rest on reproductions: no run may hide where it comes from."""
    for seed, value in zip((1337, 42), (1.11502, 1.11441)):
        write_log(rows / f"{seed}.log", seed, value)
    write_log(rows / "copy.log", 2025, NEW[2])
    paths = [rows / "new", rows / "1337.log", rows / "42.log", rows / "copy.log"]
    stats.main([*map(str, paths), "--against", str(rows / "old"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["new"]["n"] == 5  # the copied log adds nothing
    assert report["new"]["mean"] == pytest.approx(sum([*NEW, 1.11502, 1.11441]) / 5)
    sources = {name: side["n"] for name, side in report["new"]["sources"].items()}
    assert sources == {str(rows / "new"): 3, str(rows): 2}
    pair = next(row for row in report["tests"] if row["test"] == "paired by seed")
    means = {1337: (NEW[0] + 1.11502) / 2, 42: (NEW[1] + 1.11441) / 2, 2025: NEW[2]}
    assert pair["t"] == pytest.approx(stats.paired(means, dict(zip((1337, 42, 2025), OLD))).t)
    assert report["warnings"] == []
    stats.main([*map(str, paths)])
    assert f"of {rows / 'new'}: n 3" in capsys.readouterr().out


def test_sources_that_disagree_are_named(rows, capsys):
    """Pooling two machines that differ makes neither of them reproducible."""
    stats.main([str(rows / "new"), str(rows / "old"), "--json"])
    assert any("differs from the other" in text for text in json.loads(capsys.readouterr().out)["warnings"])


@pytest.mark.parametrize(
    ("claim", "expected"),
    [(sum(NEW) / 3, ""), (min(NEW), "best 1 of 3"), (sum(sorted(NEW)[:2]) / 2, "best 2 of 3")],
)
def test_a_claim_of_the_best_runs_is_named(rows, capsys, claim, expected):
    """The best of n runs is luck; it is not what the configuration scores."""
    (rows / "new" / "submission.json").write_text(json.dumps({"val_bpb": claim}))
    stats.main([str(rows / "new"), "--json"])
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert (expected in warnings[0]) if expected else warnings == []


def test_one_seed_twice_in_a_folder_is_no_second_sample(rows, capsys):
    """A rerun of a seed on the same machine repeats its luck."""
    write_log(rows / "new" / "again.log", 42, NEW[1] + 1e-6)
    stats.main([str(rows / "new"), "--json"])
    assert any("one seed occurs twice" in text for text in json.loads(capsys.readouterr().out)["warnings"])


def test_run_folders_of_one_place_are_one_source(rows, capsys):
    """This harness leaves a folder a seed; they are not three reproductions."""
    for seed, value in zip((1, 2, 3), NEW):
        folder = rows / f"seed{seed}"
        folder.mkdir()
        (folder / "result.json").write_text("{}")
        write_log(folder / "train.log", seed, value)
    stats.main([*(str(rows / f"seed{seed}") for seed in (1, 2, 3)), "--json"])
    assert list(json.loads(capsys.readouterr().out)["new"]["sources"]) == [str(rows)]


def say_of(capsys, *words) -> str:
    """The warnings of the command, a line each."""
    stats.main([*map(str, words), "--json"])
    return "\n".join(json.loads(capsys.readouterr().out)["warnings"])


def test_runs_that_do_not_count_are_named(tmp_path, capsys):
    """Over a limit, another run's log, another seed's, no result, no score at all."""
    for name, seed, changes in (("a", 1, {}), ("b", 2, {"over_limits": ["bytes 5 of 4"]}), ("c", 3, {})):
        write_run(tmp_path / name, seed, 2.2 + seed / 1000, changes=changes)
    folders = [tmp_path / name for name in "abc"]
    assert f"{folders[1] / 'train.log'}: over its limit of bytes 5 of 4" in say_of(capsys, *folders)
    assert say_of(capsys, folders[0], folders[2]).count("\n") == 0  # two scores: only that they are few
    (folders[2] / "train.log").write_text(make_log(9, 2.9, 40))
    said = say_of(capsys, *folders)
    assert "states val_bpb 2.90000000, result.json beside it 2.20300000" in said
    assert "states seed 9, result.json beside it 3: another run's log" in said
    (folders[2] / "result.json").unlink()
    assert "the run is not finished" in say_of(capsys, *folders)
    write_run(tmp_path / "d", 4, None)
    assert f"{tmp_path / 'd'}: no score in it, left out" in say_of(capsys, *folders, tmp_path / "d")


def test_a_log_that_calls_itself_invalid_is_named(rows, capsys):
    """A record's log has no result beside it."""
    path = min((rows / "new").glob("*.log"))
    path.write_text(path.read_text() + "NOT A VALID RUN: bytes 5 of 4\n")
    assert f"{path}: says NOT A VALID RUN" in say_of(capsys, rows / "new")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"origin": ORIGIN | {"data": "other"}}, "were trained on different data"),
        ({"origin": ORIGIN | {"machine": {"cpu": "other"}}}, "ran on different machines"),
        ({"config_hash": "other"}, "the results state 2 different configurations"),
        ({"steps": 60}, "took from 40 to 60 steps"),
        (
            {"score": {"val_bpb": 2.2, "val_loss": 4.0, "num_bytes": 5}},
            "scored different texts, of 5, 10,000",
        ),
        ({}, ""),
    ],
)
def test_unequal_runs_are_named(tmp_path, capsys, changes, expected):
    """Their mean is that of no configuration."""
    write_run(tmp_path / "a", 1, 2.2)
    write_run(tmp_path / "b", 2, 2.2, changes=changes)
    write_run(tmp_path / "c", 3, 2.2)
    said = say_of(capsys, *(tmp_path / name / "result.json" for name in "abc"))
    assert expected in said and (expected or said == "")


def test_sides_on_different_machines_are_named(tmp_path, capsys):
    """Each is in order by itself."""
    for name, seed, origin in (("a", 1, "x"), ("b", 2, "x"), ("c", 1, "y"), ("d", 2, "y")):
        write_run(tmp_path / name, seed, 2.2, changes={"origin": ORIGIN | {"machine": origin}})
    said = say_of(capsys, tmp_path / "a", tmp_path / "b", "--against", tmp_path / "c", tmp_path / "d")
    assert "new and old: the runs ran on different machines" in said
    assert said.count("different machines") == 1


def test_its_own_json_can_be_compared_again(rows, capsys):
    """A record keeps the scores of the row to beat in one file."""
    stats.main([str(rows / "old"), "--json"])
    (rows / "kept.json").write_text(capsys.readouterr().out)
    assert stats.read_scores([rows / "kept.json"]) == stats.read_scores([rows / "old"])


def test_command_takes_the_power_that_is_wanted(rows, capsys):
    """The default answers for p < 0.01 and four times out of five."""
    command = [
        str(rows / "new"),
        "--against",
        str(rows / "old"),
        "--alpha",
        "0.25",
        "--power",
        "0.5",
        "--json",
    ]
    stats.main(command)
    report = json.loads(capsys.readouterr().out)
    gain = report["old"]["mean"] - report["new"]["mean"]
    assert report["minimum_seeds"]["0"] == stats.minimum_seeds(report["new"]["std"], gain, 0.25, 0.5)
    with pytest.raises(UserError, match="expected chances"):
        stats.main([str(rows / "new"), "--power", "1.5"])


def test_report_shows_both_units(rows, capsys):
    """Nats a token and bits a byte are confused in submissions."""
    stats.main([str(rows / "new"), "--against", str(rows / "old")])
    printed = capsys.readouterr().out
    assert f"mean {sum(NEW) / 3:.8f} bpb = {sum(NEW) / 3 * 1.6884:.4f}"[:-1] in printed
    assert "margin 0.005 nats (0.0029613" in printed


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


def test_odd_fields_of_a_result_are_no_crash_and_json_is_json(tmp_path, capsys):
    """over_limits that is no list is said; a t without spread is infinite, for which JSON has no word."""
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", seed, 2.2, changes={"over_limits": 5})
        write_run(tmp_path / f"b{seed}", seed, 2.3)
    (tmp_path / "odd.json").write_text('{"score": {"val_bpb": 1.5}, "seed": [3]}')
    sides = [[str(tmp_path / f"{side}{seed}") for seed in (1, 2)] for side in "ab"]
    stats.main([*sides[0], "--against", *sides[1], "--json"])
    facts = parse_json(capsys.readouterr().out, "stdout")
    assert any("over its limit of 5" in text for text in facts["warnings"])
    assert facts["tests"][0]["t"] is None
    assert stats.read_scores([tmp_path / "odd.json"])[0].seed is None
