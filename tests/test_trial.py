"""Trials from the command line, with a stand-in for training: comparisons, verdicts, refusals."""

import json

import numpy as np
import pytest
from fixtures_model import as_overrides

from common import UserError
from dev.desk.training import Job, Outcome, TrainingFailed, origin_of, split_machine
from dev.trial.__main__ import build_parser, main
from dev.trial.plan import read_seeds
from dev.trial.report import loss_slope
from durable.seals import write_events


class StandIn:
    """Train nothing: a score is a base, the seed's noise, and what `effect` says of the settings."""

    def __init__(self, effect, num_bytes=900, over=lambda cfg: []):
        self.effect, self.num_bytes, self.over = effect, num_bytes, over
        self.jobs: list[Job] = []
        self.batches: list[int] = []

    def outcome(self, job: Job) -> Outcome:
        self.jobs.append(job)
        seed, cfg = job.cfg.run.seed, job.cfg
        bpb = 2.0 + 0.1 * (seed % 7) + self.effect(cfg, seed)
        score = {"num_bytes": 1000, "mode": "chunked"}
        origin = origin_of(job)
        over = self.over(cfg)
        return Outcome(
            job.out / "none", bpb, 1.5 * bpb, 100, 10.0, 30.0, self.num_bytes, 7.0, over, score, origin, False
        )

    def __call__(self, jobs, tell=print):
        self.batches.append(len(jobs))
        return [self.outcome(job) for job in jobs]


def by_lr(size: float):
    """An effect of a doubled learning rate, with a tenth of it as noise that pairs do not share."""
    return lambda cfg, seed: (size * (1 + 0.1 * ((seed * 31 % 5) - 2) / 2)) * (cfg.optim.matrix_lr > 0.05)


@pytest.fixture
def trial(tiny_config, tmp_path, capsys):
    """Run a trial on the tiny data; returns its object."""

    def run(train, *words) -> dict:
        out = ["--out", str(tmp_path / "trials"), "--json"]
        words = ("--name", "tried", *words)
        if not {"--set", "--against"} & set(words):
            words = (*words, "--set", "optim.matrix_lr=0.08")
        assert main([*words, "--both", *as_overrides(tiny_config), *out], train) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_better_setting_is_kept_with_effect_interval_and_costs(trial, tmp_path):
    """Three pairs, in turn, the order swapped from pair to pair; an object and an entry for the journal."""
    train = StandIn(by_lr(-0.5))
    found = trial(train, "--seconds", "40", "--hypothesis", "Faster is better")
    assert found["verdict"] == "keep" and found["n"] == 3
    assert found["effect"] == pytest.approx(-0.5, abs=0.05)
    assert found["interval"][0] < -0.5 < found["interval"][1] < 0
    assert [job.cfg.optim.matrix_lr > 0.05 for job in train.jobs] == [False, True, True, False, False, True]
    assert [job.cfg.run.seed for job in train.jobs] == [1337, 1337, 42, 42, 2025, 2025]
    assert {job.cfg.run.max_wallclock_seconds for job in train.jobs} == {40.0}
    assert found["differences"] == {"optim.matrix_lr": [0.04, 0.08]}
    side = found["sides"]["new"]
    assert (side["n"], side["steps"], side["bytes"], side["ms_per_step"]) == (3, 100, 900, 100.0)
    assert found["origin"]["data"] and found["origin"]["machine"]["torch"]
    entry = (tmp_path / "trials" / "tried.md").read_text()
    assert "Faster is better" in entry and "**keep**" in entry and "| 1337 | " in entry
    assert json.loads((tmp_path / "trials" / "tried.json").read_text()) == found


def test_a_worse_setting_is_dropped_after_two_pairs(trial):
    """The verdict ends the trial: four runs of ten."""
    train = StandIn(by_lr(0.5))
    found = trial(train, "--steps", "9", "--seeds", "5", "--sigma", "0.05")
    assert found["verdict"] == "drop" and len(train.jobs) == 2 * found["n"] < 10
    assert {job.cfg.run.iterations for job in train.jobs} == {9}
    assert {job.cfg.run.max_wallclock_seconds for job in train.jobs} == {0.0}


def test_noise_is_undecided_and_says_what_would_decide(trial):
    """Differences of both signs."""
    found = trial(StandIn(lambda cfg, seed: 0.01 * (seed % 3 - 1) * (cfg.optim.matrix_lr > 0.05)))
    assert found["verdict"] == "undecided" and found["n"] == 3 and "seeds" in found["next"]


def test_two_seeds_end_undecided_and_say_that_they_cannot_keep(trial):
    """Better in both pairs."""
    found = trial(StandIn(by_lr(-0.5)), "--seeds", "2", "--sigma", "0.01")
    assert found["verdict"] == "undecided" and found["n"] == 2 and "seeds" in found["next"]
    assert any("2 seeds can drop a change, 3 are needed to keep one" in said for said in found["warnings"])


def test_what_weakens_a_verdict_is_said(trial):
    """A stated deviation that the pairs do not have, an unsteady machine, steps that are all decay."""

    class Uneven(StandIn):
        def outcome(self, job: Job) -> Outcome:
            return super().outcome(job)._replace(train_s=10.0 + len(self.jobs))

    train = Uneven(by_lr(-0.5))
    words = [
        "--steps",
        "9",
        "--sigma",
        "0.001",
        "--set",
        "optim.matrix_lr=0.08",
        "schedule.warmdown_iters=18",
    ]
    said = " ".join(trial(train, *words)["warnings"])
    for part in ("--sigma says 0.001", "the machine was not steady", "begin at 0.50 of the recipe's"):
        assert part in said, said


def test_a_result_says_how_to_get_it_again(trial, tmp_path):
    """What both sides change is in the object, the entry and the command."""
    found = trial(StandIn(by_lr(-0.5)))
    assert "model.num_layers=3" in found["sides"]["old"]["side"] and "optim.matrix_lr" in found["differences"]
    entry = (tmp_path / "trials" / "tried.md").read_text()
    assert "model.num_layers=3" in entry and "Command: `python " in entry


def test_a_dead_switch_is_no_difference(trial):
    """Equal to the last digit."""
    found = trial(StandIn(lambda cfg, seed: 0.0))
    assert found["verdict"] == "no difference" and "does not reach the score" in found["because"]


def test_better_but_over_a_limit_is_dropped(trial):
    """A score that cannot be submitted is none."""
    train = StandIn(by_lr(-0.5), over=lambda cfg: ["bytes"] * (cfg.optim.matrix_lr > 0.05))
    found = trial(train)
    assert found["verdict"] == "drop" and "over its limit of bytes" in found["because"]


def test_a_diverged_new_side_is_dropped_and_an_old_one_is_an_error(trial):
    """No finite loss is a verdict; any other failure is a fault to mend."""

    def fail(breaks, words):
        def train(jobs, tell=print):
            if breaks(jobs[0].cfg):
                raise TrainingFailed(jobs[0], jobs[0].out, 1, [f"error: step 3: {words}, found nan"])
            return StandIn(lambda cfg, seed: 0.0)(jobs)

        return train

    def is_new(cfg) -> bool:
        return cfg.optim.matrix_lr > 0.05

    found = trial(fail(is_new, "expected a finite train_loss"))
    assert found["verdict"] == "drop" and "diverged" in found["because"]
    for breaks, words in (
        (lambda cfg: not is_new(cfg), "expected a finite train_loss"),
        (is_new, "no space"),
    ):
        with pytest.raises(TrainingFailed, match="finished runs are not trained twice"):
            trial(fail(breaks, words))


def test_sides_at_the_same_time_share_the_machine(trial):
    """Half of the cores each."""
    train = StandIn(by_lr(-0.5))
    trial(train, "--parallel")
    assert train.batches == [2, 2, 2]
    shares = [job.share for job in train.jobs[:2]]
    assert shares == split_machine(2) and not set(shares[0].cores) & set(shares[1].cores)


def test_a_side_that_trains_alone_under_a_clock_is_said(trial):
    """Of a pair at the same time one was found: the other has the machine's memory for itself."""

    class Found(StandIn):
        def outcome(self, job: Job) -> Outcome:
            return super().outcome(job)._replace(was_found=job.cfg.optim.matrix_lr < 0.05)

    said = " ".join(trial(Found(by_lr(-0.5)), "--parallel")["warnings"])
    assert "trained alone" in said
    assert "trained alone" not in " ".join(trial(Found(by_lr(-0.5)))["warnings"])


def test_what_a_step_is_worth_is_measured_by_shorter_runs(trial):
    """A fifth fewer steps, 0.02 bits a byte more: 0.001 a step; the effect is 500 steps saved."""

    class Shorter(StandIn):
        def outcome(self, job: Job) -> Outcome:
            found = super().outcome(job)
            steps = job.cfg.run.iterations
            return found._replace(steps=steps, val_bpb=found.val_bpb + 0.001 * (100 - steps))

    found = trial(Shorter(by_lr(-0.5)), "--steps", "100", "--exchange")
    assert found["exchange"]["bpb_per_step"] == pytest.approx(0.001)
    assert found["exchange"]["effect_in_steps"] == pytest.approx(-500, rel=0.1)
    assert found["exchange"]["from"].startswith("3 shorter runs")


def test_without_shorter_runs_a_step_is_worth_the_slope_of_the_loss(tmp_path):
    """A line of -0.003 nats a step with noise, at 0.5 bits a byte a nat; too few events say nothing."""
    noise = np.random.default_rng(0).normal(size=300)
    events = [
        {"kind": "train", "step": i, "train_loss": 5 - 0.003 * i + 0.01 * noise[i], "train_ms": 1.0}
        for i in range(300)
    ]
    write_events(tmp_path / "metrics.jsonl", events)
    slope, error = loss_slope(tmp_path, 0.5)
    assert slope == pytest.approx(0.0015, abs=3 * error) and 0 < error < 0.0001
    write_events(tmp_path / "metrics.jsonl", events[:23])
    assert loss_slope(tmp_path, 0.5) is None


def test_two_recipes_are_compared_in_all_they_say(trial, tmp_path):
    """--against names the old side; its differences are listed."""
    recipes = []
    for lr in (0.08, 0.04):
        recipes.append(tmp_path / f"{lr}.toml")
        recipes[-1].write_text(f"[optim]\nmatrix_lr = {lr}\nbeta1 = {0.8 + lr}\n")
    words = ["--recipe", str(recipes[0]), "--against", str(recipes[1])]
    found = trial(StandIn(by_lr(-0.5)), *words)
    assert found["verdict"] == "keep" and set(found["differences"]) == {"optim.matrix_lr", "optim.beta1"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seconds", "4", "--steps", "4"], "expected --seconds or --steps, found both"),
        (["--seconds", "0"], "a training time above 0"),
        (["--seeds", "1"], "expected 2 to 64 seeds"),
        (["--seeds", "7,7"], "different seeds"),
        (["--alpha", "0.7"], r"--alpha 0.7: expected a chance"),
        (["--sigma", "0"], r"--sigma 0.0: expected a deviation above 0"),
        (["--name", "a/b"], "must be a name"),
        (["--steps", "0"], r"--steps 0: expected"),
        (["--worth", "nan"], r"--worth nan: expected"),
        (["--against", "/nope"], r"--against /nope: no such recipe"),
        (["--exchange"], "--seconds or --steps to make smaller"),
        (["--set", "optim.matrix_lr=0.04"], "both sides are the same"),
        (["--set", "optim.matrx_lr=0.04"], "Did you mean optim.matrix_lr"),
        (["--against-code", "nowhere"], "expected a commit"),
    ],
)
def test_what_cannot_tell_anything_is_refused_before_training(words, message, trial):
    """With the next step."""
    train = StandIn(by_lr(0.1))
    with pytest.raises(UserError, match=message):
        trial(train, *words)
    assert not train.jobs


def test_other_data_are_refused_unless_allowed(trial, tiny_data, tmp_path):
    """Another validation text, another training text."""
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_data.iterdir():
        name = path.name.replace("train_000000", "train_000001")
        (other / name).write_bytes(path.read_bytes())
    (other / "manifest.json").unlink()
    words = ["--set", "optim.matrix_lr=0.08", f"data.data_path={other}"]
    with pytest.raises(UserError, match=r"differ in their training data.*--allow data"):
        trial(StandIn(by_lr(-0.5)), *words)
    allowed = [*words, "--allow", "data", "validation"]
    assert trial(StandIn(by_lr(-0.5)), *allowed)["verdict"] == "keep"


def test_different_amounts_of_scored_text_are_refused(trial):
    """Bits a byte of another text."""

    class Longer(StandIn):
        def outcome(self, job: Job) -> Outcome:
            found = super().outcome(job)
            more = 1 if job.cfg.optim.matrix_lr > 0.05 else 0
            return found._replace(score=found.score | {"num_bytes": 1000 + more})

    with pytest.raises(UserError, match="expected one validation text, found 1,000 bytes"):
        trial(Longer(by_lr(-0.5)))


def test_seeds_are_a_number_or_a_list():
    """The standard ones first; 3, with a comma is the seed 3 no number of seeds."""
    assert read_seeds("4") == (1337, 42, 2025, 1) and read_seeds("5,3") == (5, 3)


def test_help_teaches():
    """The command line says what the verdict means and what a rerun costs."""
    said = " ".join(build_parser().format_help().split())
    for words in ("keep, drop, no difference", "not trained again", "--against-code", "--parallel"):
        assert words in said
