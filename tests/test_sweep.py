"""Sweeps: specs checked whole, trials that workers share, killed workers, pruning, limits, results."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from fixtures_model import ROOT, TINY

from common import UserError
from dev.desk.training import Job, Outcome, Share, TrainingFailed
from durable.seals import write_sealed
from formats.recipe import config_value
from train_gpt import load_config

optuna = pytest.importorskip("optuna")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

from dev.sweep import __main__ as command  # noqa: E402 - needs the extra
from dev.sweep import board as boards  # noqa: E402
from dev.sweep import worker as workers  # noqa: E402
from dev.sweep.board import OWNER, SKIPPED, Board, StorageGone, mask  # noqa: E402
from dev.sweep.results import (  # noqa: E402
    collect,
    draw_history,
    end_of,
    format_results,
    new_seeds,
    pareto_front,
    spearman,
    write_results,
)
from dev.sweep.spec import Dimension, combinations, read_spec, why_refused  # noqa: E402
from dev.sweep.worker import Crew, Rungs, work  # noqa: E402
from dev.trial.__main__ import build_parser as trial_parser  # noqa: E402

pytestmark = pytest.mark.desk

LR, DIM, GATE = "optim.matrix_lr", "model.model_dim", "model.attn_gate"
SPACE = """
optim.matrix_lr = {low = 0.001, high = 1.0, log = true}
model.model_dim = {low = 16, high = 64, step = 16}
"""
BEST_LR = 0.1
SPECS = sorted(ROOT.glob("records/*/*/sweep.toml"))


@pytest.fixture
def write_spec(tiny_data, tmp_path):
    """A function that writes a spec of the tiny recipe; what it does not vary is fixed."""

    def write(space: str = SPACE, top: str = "steps = 100\ntrials = 12", tables: str = "") -> Path:
        fixed = TINY | {"data.data_path": str(tiny_data)}
        left_out = (
            "run.iterations",
            "run.max_wallclock_seconds",
            *re.findall(r"^([\w.]+) = ", space, re.MULTILINE),
        )
        lines = [f"{name} = {json.dumps(value)}" for name, value in fixed.items() if name not in left_out]
        tables = tables or "[sampler]\nseed = 1"
        (tmp_path / "recipe.toml").write_text("[model]\nmodel_dim = 32\n")
        path = tmp_path / "sweep.toml"
        head = f'name = "tiny"\nrecipe = "recipe.toml"\n{top}\n{tables}\n'
        path.write_text(f"{head}[set]\n" + "\n".join(lines) + f"\n[space]\n{space}")
        return path

    return write


class StandIn:
    """A trainer that trains nothing: the nearer the learning rate is to BEST_LR, the better."""

    def __init__(self, fail: str = "", limit: int = 0, seconds: float = 0.0):
        self.fail, self.limit, self.seconds = fail, limit, seconds
        self.jobs: list[Job] = []
        self.pruned = 0

    def __call__(self, job: Job, watch, tell) -> Outcome:
        self.jobs.append(job)
        time.sleep(self.seconds)
        if self.fail:
            raise TrainingFailed(job, Path("runs/x"), 1, [self.fail])
        loss = 2 + abs(math.log10(config_value(job.cfg, LR) / BEST_LR))
        steps = job.cfg.run.iterations
        try:
            for step in range(1, steps + 1):
                watch([{"kind": "train", "step": step, "train_loss": loss, "train_ms": step}])
        except BaseException:
            self.pruned += 1
            raise
        return self.outcome(job, loss)

    def outcome(self, job: Job, loss: float) -> Outcome:
        """Leave what a finished run leaves, as far as a sweep reads it."""
        folder = job.out / f"run{len(self.jobs)}"
        num_bytes = 1000 * config_value(job.cfg, DIM)
        score = {"val_bpb": loss, "val_loss": loss, "seconds": 1.0, "num_bytes": 1}
        result = {
            "ledger": [["all", num_bytes]],
            "train_ms": 1.0,
            "calibration_ms": 0.0,
            "score": score,
            "seconds": {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / "result.json", result)
        return Outcome(folder, loss, loss, 5, 1.0, 2.0, num_bytes, 9.0, [], score, {"code": "c"}, False)


def open_board(path: Path, trials: int = 0, storage: str = "", folder: Path | None = None) -> Board:
    """Open a sweep in a folder beside its spec."""
    return Board(read_spec(path, trials), folder or path.parent / "sweep", storage)


def run_worker(board: Board, train=None) -> tuple[StandIn, list[str]]:
    """Be a worker until the sweep is over; returns its trainer and what it told."""
    train, told = train or StandIn(), []
    work(Crew(board, ROOT, None, train, told.append))
    return train, told


# ----------------------------------------------------------------------------------------------------------
# Specs
# ----------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_spec_is_said_at_once(write_spec):
    """With the nearest name: a sweep of a night must not end at its first trial, nor at the third mistake."""
    space = """
optim.matrix_lrr = {low = 0.1, high = 0.2}
optim.scalar_lr = {low = 2, high = 1}
model.num_heads = {low = 1.5, high = 4}
model.attn_gate = {choices = ["none", "outt"]}
model.mlp = {low = 1, high = 2}
run.seed = {low = 1, high = 2}
run.run_id = {choices = ["a", "b"]}
optim.embed_lr = {low = 1.0, high = 2.0, also = ["model.model_dim"]}
model.q_gain_init = {low = 1.0, high = 2.0, when = {model.xsa_last = [1]}}
"""
    top = """
steps = 3
seconds = 4
trails = 3
measure = "weight"
objectives = ["val_bpb", "size"]
seeds = [1, 1]
"""
    with pytest.raises(UserError) as found:
        read_spec(write_spec(space, top, '[prune]\nkind = "medain"'))
    said = str(found.value)
    for words in (
        "unknown key 'trails': did you mean trials?", "either seconds or steps", "trials: expected",
        "measure: 'weight': did you mean weights?", "seeds: expected whole numbers, each once",
        "objectives: 'size'", "prune.kind: 'medain': did you mean median?",
        "unknown field 'optim.matrix_lrr'. Did you mean optim.matrix_lr?", "optim.scalar_lr: Optuna:",
        "model.num_heads: expected whole numbers", "model.mlp: expected choices",
        "run.seed is said by seconds, steps and seeds", "run.run_id changes no result",
        "model.model_dim is in [set], too", "when names model.xsa_last, which must be above it",
    ):  # fmt: skip
        assert words in said, words


@pytest.mark.parametrize(
    "dimension, words",
    [
        ("{low = 0.1, high = 1, also = 5}", "also: expected a list of other fields"),
        ("{low = 0.1, high = 1, also = [5]}", "also: expected a list of other fields"),
        ('{low = 0.1, high = 1, also = ["optim.scalar_lr"]}', "also: expected a list of other fields"),
        ('{low = 0.1, high = 1, also = ["optim.matrix_lr"]}', "optim.matrix_lr is in [space], too"),
        ('{low = 0.1, high = 1, when = "x"}', "when: expected a table of fields with lists"),
        (
            "{low = 0.1, high = 1, when = {model.model_dim = 3}}",
            "when: expected a table of fields with lists",
        ),
        ("{low = 0.1, high = 1, when = {model.model_dim = [17]}}", "when: model.model_dim is never 17"),
        ('{low = 0.1, high = 1, when = {model.model_dim = ["x"]}}', "when: model.model_dim is never 'x'"),
        ("{choices = [2020-01-01]}", "choices: expected a list of text"),
        ("{choices = [{a = 1}]}", "choices: expected a list of text"),
        ("{choices = 5}", "choices: expected a list of text"),
        ('{low = 0.1, high = 1, log = "yes"}', "log: expected true or false"),
        ("{low = nan, high = 1}", "low: expected a number below 2^53"),
        ("{low = 0.1, high = inf}", "high: expected a number below 2^53"),
        ("{low = 0.1, high = 2020-01-01}", "high: expected a number below 2^53"),
        ('{low = 0.1, high = 1, step = "x"}', "step: expected a number below 2^53"),
        ("5", "expected a table of some of low, high"),
    ],
)
def test_every_key_of_a_dimension_has_a_type(dimension, words, write_spec):
    """What TOML can say and a dimension cannot have is a problem in the list, never a traceback."""
    path = write_spec(SPACE + f"optim.scalar_lr = {dimension}\n", "steps = 9\ntrials = 4\nx = 1")
    with pytest.raises(UserError) as found:
        read_spec(path)
    assert f"[space] optim.scalar_lr: {words}" in str(found.value) and "unknown key 'x'" in str(found.value)


@pytest.mark.parametrize(
    "tables, words",
    [
        ('[sampler]\nn_startup_trials = "q"', "[sampler] n_startup_trials: expected int, found 'q'"),
        ("[sampler]\nn_startup_trial = 3", "did you mean n_startup_trials?"),
        ("[sampler]\ngamma = 3", "[sampler] gamma: expected nothing: a file cannot say it"),
        ("[sampler]\nseed = true", "[sampler] seed: expected int, found True"),
        ("[sampler]\nseed = -1", "[sampler] seed: expected int from 0 on, found -1"),
        ("[sampler]\nseed = 4294967295", "Optuna: "),
        ('[sampler]\nkind = "qmc"\nqmc_type = "sobel"', "Optuna: "),
        ("[sampler]\nkind = [1]", "sampler.kind: [1]"),
        ('[prune]\nkind = "hyperband"\nmin_resource = -4', "min_resource: expected int from 0 on, found -4"),
        ('[prune]\nkind = "hyperband"\nmin_resource = 0', "Optuna: "),
        ('[prune]\nkind = "hyperband"\nreduction_factor = "x"', "reduction_factor: expected int, found 'x'"),
        (
            '[prune]\nkind = "percentile"\npercentile = 2020-01-01',
            "percentile: expected float, found datetime",
        ),
        ('[prune]\nkind = "percentile"', "Optuna: "),
        ("[prune]\nn_warmup_steps = 3", "[prune] n_warmup_steps: no option of NopPruner"),
        ("[prune]\nrungs = [1]", "prune.rungs: expected a whole number"),
    ],
)
def test_options_of_optuna_are_checked_by_type_and_by_use(tables, words, write_spec):
    """Optuna checks some at their first use alone, which were in the middle of a night."""
    with pytest.raises(UserError) as found:
        read_spec(write_spec(tables=tables))
    assert words in str(found.value)


@pytest.mark.parametrize(
    "top, words",
    [
        ("steps = 9\ntrials = 1000001", "trials: expected a number from 1 to 1,000,000"),
        ('steps = 9\ntrials = 4\nobjectives = ["val_bpb", "val_bpb"]', "objectives: expected each once"),
        ('steps = 9\ntrials = 4\nconstraints = ["bytes", "bytes"]', "constraints: expected each once"),
        ("steps = 9\ntrials = 4\nobjectives = [{a = 1}]", "objectives: {'a': 1}"),
        ("steps = -3\nseconds = 5\ntrials = 4", "steps: expected a number below"),
        ("steps = 3\nseconds = nan\ntrials = 4", "seconds: expected a number below"),
        (f"seconds = 1{'0' * 400}\ntrials = 4", "seconds: expected a number"),
        ("seconds = inf\ntrials = 4", "seconds: expected a number"),
        ("steps = 9\ntrials = 4\nseeds = [2020-01-01]", "seeds: expected whole numbers"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(top, words, write_spec):
    """Too much of everything, the same twice, numbers that are none."""
    with pytest.raises(UserError) as found:
        read_spec(write_spec(top=top))
    assert words in str(found.value)


def test_dates_are_no_settings_and_endless_grids_are_counted_no_further(write_spec):
    """A date in [set] would be found when the study is written; a grid of 10^9 would fill the memory."""
    path = write_spec()
    path.write_text(path.read_text().replace("[set]", "[set]\nrun.run_id = 2020-01-01"))
    with pytest.raises(UserError, match=r"\[set\] run.run_id: expected text, a number"):
        read_spec(path)
    space = "optim.warmdown_iters = {low = 0, high = 1000000000}\n"
    space = space.replace("optim.warmdown_iters", "schedule.warmdown_iters")
    with pytest.raises(UserError, match="a grid of more than 10,000 settings"):
        read_spec(write_spec(space, "steps = 9", '[sampler]\nkind = "grid"'))


def test_more_workers_than_cores_are_refused_before_anything_begins(write_spec, tmp_path, monkeypatch):
    """In a dry run, too."""
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="expected a core for each of 9999 runs at a time"):
            command.main([str(write_spec()), "--workers", "9999", *more])
    assert not Path("runs").exists()


def test_values_that_no_setting_can_have_are_refused(write_spec):
    """A value that fits beside some of the others is none of them."""
    with pytest.raises(UserError, match=r"num_kv_heads=3 fits no setting: .*must divide num_heads"):
        read_spec(write_spec(SPACE + "model.num_kv_heads = {choices = [1, 3]}\n"))
    spec = read_spec(
        write_spec("model.model_dim = {choices = [24, 32]}\nmodel.rope_dims = {choices = [0, 8]}\n")
    )
    assert why_refused(spec, {DIM: 24, "model.rope_dims": 8}) and not why_refused(
        spec, {DIM: 32, "model.rope_dims": 8}
    )


def test_one_number_may_set_several_fields_and_depend_on_another(write_spec):
    """Twins take the same value; what is not active is not changed; lists are choices, too."""
    space = """
model.attn_gate = {choices = ["none", "out"]}
schedule.stages = {choices = [[], [[0, 16, 128, 4, 1, 1]]]}
optim.matrix_weight_decay = {low = 0.0, high = 1.0, when = {model.attn_gate = ["out"]}, ALSO}
""".replace("ALSO", 'also = ["optim.embed_weight_decay"]')
    decay, stages = "optim.matrix_weight_decay", "[[0,16,128,4,1,1]]"
    spec = read_spec(write_spec(space, 'steps = 9\ntrials = 4\nmeasure = "weights"'))
    cfg = spec.config({GATE: "out", decay: 0.5, "schedule.stages": stages}, 7)
    assert (
        cfg.optim.matrix_weight_decay == cfg.optim.embed_weight_decay == 0.5 != cfg.optim.scalar_weight_decay
    )
    assert cfg.schedule.stages == ((0, 16, 128, 4, 1, 1),)
    assert cfg.run.seed == 7 and cfg.run.iterations == 9 and cfg.run.max_wallclock_seconds == 0
    study = optuna.create_study()
    settings = [spec.suggest(study.ask()) for _ in range(20)]
    assert {(one[GATE], decay in one) for one in settings} == {("out", True), ("none", False)}


def test_a_grid_trains_every_setting_once(write_spec):
    """It has as many trials as settings; ranges without steps have none."""
    space = """
model.attn_gate = {choices = ["none", "out"]}
optim.matrix_lr = {low = 0.1, high = 0.3, step = 0.1}
"""
    path = write_spec(space, "steps = 9", '[sampler]\nkind = "grid"')
    spec = read_spec(path)
    assert spec.trials == 6 and [one[LR] for one in combinations(spec.space)] == [0.1, 0.2, 0.3] * 2
    train, _ = run_worker(open_board(path))
    trained = sorted((job.cfg.model.attn_gate, job.cfg.optim.matrix_lr) for job in train.jobs)
    assert trained == [(gate, lr) for gate in ("none", "out") for lr in (0.1, 0.2, 0.3)]
    with pytest.raises(UserError, match=r"a grid needs choices, or low, high and step: optim.matrix_lr"):
        read_spec(write_spec(space.replace(", step = 0.1", ""), "steps = 9", '[sampler]\nkind = "grid"'))


def test_the_example_of_the_page_can_be_run(tmp_path):
    """As it stands, beside a recipe."""
    page = (ROOT / "docs" / "sweeps.md").read_text()
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1]
    recipe = next(ROOT.glob("records/track_cpu/*_NaiveBaseline/recipe.toml"))
    (tmp_path / "recipe.toml").write_text(recipe.read_text())
    (tmp_path / "sweep.toml").write_text(example)
    spec = read_spec(tmp_path / "sweep.toml")
    assert spec.name == "rates" and spec.prune["kind"] == "median" and len(spec.space) == 7


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.parent.name)
def test_specs_of_the_repository_fit_their_recipes(path, tmp_path, monkeypatch, capsys):
    """They hold the recipe's own setting, and a dry run shows trainings that the trainer takes."""
    monkeypatch.chdir(tmp_path)
    Path("data/datasets/builtin_contest1024").mkdir(parents=True)
    spec = read_spec(path)
    assert spec.own_values() is not None or spec.sampler["kind"] == "grid"
    command.main([str(path), "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials"] == spec.trials and len(plan["first"]) == 3
    for line in plan["first"]:
        assert line.startswith(f"python train_gpt.py --recipe {spec.recipe} ")
        load_config(str(spec.recipe), {}, shlex.split(line)[4:])


@pytest.mark.parametrize(
    "text", ["", "name = 1\n", "[space\n", "name = 'a/b'\nrecipe = 'recipe.toml'\n", "\0"]
)
def test_files_that_are_no_specs_are_refused(text, tmp_path):
    """In one sentence or one list."""
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.toml: (expected a sweep that can run|not valid TOML)"):
        read_spec(tmp_path / "sweep.toml")


# ----------------------------------------------------------------------------------------------------------
# Trials
# ----------------------------------------------------------------------------------------------------------


def test_a_sweep_finds_what_is_good_and_trains_nothing_twice(write_spec):
    """The recipe's own setting comes first; a rerun adds nothing; more trials go on where it was."""
    path = write_spec()
    train, told = run_worker(open_board(path))
    assert len(train.jobs) == 12 and config_value(train.jobs[0].cfg, LR) == 0.04
    settings = {(job.cfg.optim.matrix_lr, job.cfg.model.model_dim) for job in train.jobs}
    assert len(settings) == 12 and told[0] == "trial 0: optim.matrix_lr=0.04 model.model_dim=32"
    board = open_board(path)
    assert not run_worker(board)[0].jobs and board.is_over()
    assert len(run_worker(open_board(path, trials=20))[0].jobs) == 8
    found = collect(open_board(path, trials=20))
    assert found["states"] == {"complete": 20} and found["best"]["trial"] == found["trials"][0]["trial"]
    assert abs(math.log10(found["best"]["params"][LR] / BEST_LR)) < 0.3
    assert found["importance"][LR] > 0.8
    own = next(row for row in found["trials"] if row["trial"] == 0)
    assert own["val_bpb"] == pytest.approx(2 + math.log10(2.5)) and own["bytes"] == 32000


def test_workers_at_the_same_time_share_the_trials(write_spec):
    """As many as wanted, each setting once, whoever is faster."""
    path = write_spec(top="steps = 3\ntrials = 9")
    found = [StandIn(seconds=0.01), StandIn(seconds=0.02), StandIn(seconds=0.03)]
    threads = [threading.Thread(target=run_worker, args=(open_board(path), train)) for train in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(train.jobs) for train in found) == 9 and all(train.jobs for train in found)
    rows = collect(open_board(path))["trials"]
    assert len({json.dumps(row["params"]) for row in rows}) == len(rows) == 9


def test_a_space_that_is_used_up_ends_the_sweep(write_spec):
    """Settings that were trained, and those that cannot be, are passed over and count nowhere."""
    space = "model.model_dim = {choices = [24, 32]}\nmodel.rope_dims = {choices = [0, 8]}\n"
    board = open_board(write_spec(space + "optim.matrix_lr = {low = 0.1, high = 0.1}\n"))
    train, told = run_worker(board)
    assert len(train.jobs) == 3 and "the space is used up" in told[-1] and not board.is_over()
    skipped = [trial.user_attrs.get(SKIPPED, "") for trial in board.study.trials]
    assert any(said.startswith("the same as trial") for said in skipped)
    assert any("model.rope_dims" in said for said in skipped)


def test_the_trial_of_a_killed_worker_is_tried_again(write_spec):
    """With its number and setting, by the next worker; one whose worker lives is left to it."""
    path = write_spec()
    killed, other = open_board(path), open_board(path)
    killed.enroll()
    trial = killed.claim()
    other.enroll()
    assert other.claim().number == 1
    killed.lock.release()  # as the system does, whatever the process came to
    again = other.claim()
    assert (again.number, again.params) == (trial.number, trial.params)
    other.leave()
    train, _ = run_worker(open_board(path))
    board = open_board(path)
    assert len(train.jobs) == 12 and board.is_over() and len(board.study.trials) == 12


def test_a_worker_elsewhere_is_gone_when_it_is_silent(write_spec, monkeypatch):
    """Its machine's locks say nothing here: a sign of life does, by this machine's clock alone."""
    path, now = write_spec(), [0.0]
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    far, near = open_board(path), open_board(path)
    near.enroll()
    trial = far.claim()
    trial.set_user_attr(OWNER, {"worker": "far-1", "host": "far", "process": 1})
    assert near.claim().number == 1
    now[0] += boards.SILENCE_S + 1
    far.beat(trial)  # it was silent as long as this one has not looked
    assert near.claim().number == 2
    now[0] += boards.SILENCE_S + 1
    assert near.claim().number == 0


def test_a_trial_that_kills_its_workers_is_given_up(write_spec):
    """It may need more memory than there is: three workers are enough."""
    path = write_spec()
    for _ in range(boards.MOST_TRIES):
        board = open_board(path)
        board.enroll()
        assert board.claim().number == 0
        board.lock.release()
    board = open_board(path)
    assert (
        board.claim().number == 1
        and "its worker was killed or lost 3 times" in board.trials()[0].user_attrs["reason"]
    )


def test_an_interrupted_trial_waits_for_the_next_worker(write_spec):
    """Nothing is lost but the training in work."""
    path = write_spec()

    def interrupt(job, watch, tell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(open_board(path), interrupt)
    assert [trial.state.name for trial in open_board(path).trials()] == ["WAITING"]
    assert len(run_worker(open_board(path))[0].jobs) == 12
    assert not list((path.parent / "sweep" / "workers").iterdir())


def test_failures_keep_their_reason_and_can_be_tried_again(write_spec):
    """Five in a row are no matter of settings; what diverged is one, and teaches the sampler."""
    path = write_spec()
    with pytest.raises(UserError, match=r"the last 5 trials of this worker have failed.*--retry-failed"):
        run_worker(open_board(path), StandIn(fail="no space left"))
    board = open_board(path)
    rows = collect(board)["trials"]
    assert [row["state"] for row in rows] == ["failed"] * 5 and "no space left" in rows[0]["reason"]
    assert board.retry_failed() == 5
    train, _ = run_worker(board)
    assert len(train.jobs) == 12 and board.is_over() and collect(board)["states"] == {"complete": 12}
    assert {row["trial"] for row in collect(board)["trials"]} == set(range(5, 17))
    diverged = open_board(path, folder=path.parent / "other")
    run_worker(diverged, StandIn(fail="error: step 3: expected a finite train_loss, found nan"))
    assert collect(diverged)["states"] == {"diverged": 12}


def test_bad_trials_are_pruned_on_their_way(write_spec):
    """By the mean loss of equal parts of the budget; the best is not, and every one counts."""
    path = write_spec(tables='[sampler]\nseed = 1\n[prune]\nkind = "median"\nrungs = 4\nn_startup_trials = 3')
    board = open_board(path)
    train, _ = run_worker(board)
    found = collect(board)
    assert len(train.jobs) == 12 and train.pruned == found["states"]["pruned"] > 2
    best = min(abs(math.log10(job.cfg.optim.matrix_lr / BEST_LR)) for job in train.jobs)
    assert found["best"]["val_bpb"] == pytest.approx(2 + best)
    pruned = [row for row in found["trials"] if row["state"] == "pruned"]
    text = format_results(found, board.spec)
    for row in pruned:
        assert 0 < row["rungs"] < 4 and 25 < row["steps"] < 100 and row["last_loss"] > 2
        assert re.search(rf"^ +{row['trial']} +pruned +{row['steps']} +{row['last_loss']:.4f} ", text, re.M)
    assert f"crosses for {len(pruned)} pruned ones" in draw_history(found)
    assert train.jobs[0].cfg.run.train_log_every == 3  # losses enough for a mean: 100 steps / 4 / 8


def test_rungs_are_means_over_equal_parts_of_steps_or_seconds(write_spec):
    """A part ends with the first loss after it; losses that are none are left out."""
    prune = '[prune]\nkind = "median"\nrungs = 2'
    rungs = Rungs(read_spec(write_spec(top="steps = 4\ntrials = 2", tables=prune)))
    event = {"kind": "train", "train_ms": 1.0}
    assert rungs.add([event | {"step": 1, "train_loss": 4.0}, event | {"step": 2, "train_loss": 2.0}]) == []
    assert rungs.add([event | {"step": 3, "train_loss": math.nan}, {"kind": "val", "step": 3}]) == []
    assert rungs.add([event | {"step": 3, "train_loss": 1.0}]) == [(1, 3.0)]
    rungs = Rungs(read_spec(write_spec(top="seconds = 10\ntrials = 2", tables=prune)))
    event = {"kind": "train", "step": 9}
    assert rungs.add(
        [event | {"train_ms": 4000, "train_loss": 4.0}, event | {"train_ms": 9000, "train_loss": 1.0}]
    ) == [(1, 4.0)]


def test_a_trial_is_the_mean_of_its_seeds(write_spec):
    """Pruning looks at the first alone: the others are trained only for what is worth it."""
    tables = '[sampler]\nseed = 1\n[prune]\nkind = "median"\nrungs = 4\nn_startup_trials = 3'
    board = open_board(write_spec(top="steps = 20\ntrials = 8\nseeds = [3, 4]", tables=tables))
    train, _ = run_worker(board)
    found = collect(board)
    seeds = [job.cfg.run.seed for job in train.jobs]
    assert train.pruned > 0 and seeds.count(3) == 8 and seeds.count(4) == 8 - train.pruned
    assert [run["seed"] for run in found["best"]["runs"]] == [3, 4]
    assert any("the mean of 2 seeds" in note for note in found["notes"])


def test_what_is_over_a_limit_is_no_best_but_teaches(write_spec):
    """The limits are the ledgers of a run: more bytes than quant.limit_bytes."""
    path = write_spec()
    path.write_text(path.read_text().replace("[set]", "[set]\nquant.limit_bytes = 33000"))
    board = open_board(path)
    run_worker(board)
    found = collect(board)
    rows = {row["params"][DIM]: row for row in found["trials"]}
    assert found["best"]["params"][DIM] <= 32 and rows[64]["over"] == ["bytes"]
    assert all((row["state"] == "over a limit") == (row["params"][DIM] > 32) for row in found["trials"])
    trial = next(t for t in board.trials() if t.params[DIM] == 64)
    assert trial.constraints["bytes"] == pytest.approx(64 / 33 - 1)


def test_two_objectives_have_a_front(write_spec):
    """No trial of it is beaten in both; the winner by bits is what is to be verified."""
    board = open_board(write_spec(top='steps = 9\ntrials = 15\nobjectives = ["val_bpb", "bytes"]'))
    run_worker(board)
    found = collect(board)
    rows = {row["trial"]: row for row in found["trials"]}
    front = [rows[number] for number in found["front"]]
    for row in rows.values():
        assert any(one["val_bpb"] <= row["val_bpb"] and one["bytes"] <= row["bytes"] for one in front)
    assert found["best"]["val_bpb"] == min(row["val_bpb"] for row in rows.values())
    assert pareto_front([{"a": 1, "b": 2}, {"a": 2, "b": 2}, {"a": 0, "b": 3}], ["a", "b"]) == [
        {"a": 0, "b": 3},
        {"a": 1, "b": 2},
    ]


# ----------------------------------------------------------------------------------------------------------
# Storages
# ----------------------------------------------------------------------------------------------------------


def test_a_database_keeps_a_sweep_as_the_journal_does(write_spec, tmp_path):
    """SQLite here; killed workers' trials are freed there, too."""
    path, url = write_spec(top="steps = 3\ntrials = 3"), f"sqlite:///{tmp_path}/sweep.db"
    killed = open_board(path, storage=url)
    killed.enroll()
    assert killed.claim().number == 0
    killed.lock.release()
    train, _ = run_worker(open_board(path, storage=url))
    board = open_board(path, storage=url)
    assert len(train.jobs) == 3 and board.is_over() and len(board.study.trials) == 3


def test_another_spec_may_not_go_on_with_a_sweep(write_spec):
    """Its trials could not be compared; how many, how drawn and how pruned may change."""
    path = write_spec()
    run_worker(open_board(path, trials=2))
    path.write_text(path.read_text().replace("seed = 1\n", "seed = 2\nn_startup_trials = 3\n"))
    run_worker(open_board(path, trials=3))
    path.write_text(path.read_text().replace("steps = 100", "steps = 50").replace("high = 1.0", "high = 2.0"))
    with pytest.raises(UserError, match="the sweep tiny was begun with another budget, space than"):
        open_board(path)


def test_a_journal_that_goes_away_is_a_sentence_and_loses_nothing(write_spec, monkeypatch):
    """It is waited for when a result is to be written; where it stays away the trial is tried again."""
    path = write_spec(top="steps = 3\ntrials = 4")
    journal, away = path.parent / "sweep" / "journal.log", path.parent / "away"
    board, train = open_board(path), StandIn()
    pauses = []

    def move_away(job, watch, tell):
        outcome = train(job, watch, tell)
        if journal.exists():
            journal.rename(away)
        return outcome

    monkeypatch.setattr(boards.time, "sleep", pauses.append)
    with pytest.raises(StorageGone, match=r"journal\.log: the sweep's storage cannot be read or written"):
        run_worker(board, move_away)
    assert [pause for pause in pauses if pause] == list(boards.PATIENCE_S) and not journal.exists()
    away.rename(journal)
    monkeypatch.setattr(boards.time, "sleep", lambda seconds: away.exists() and away.rename(journal))
    train, told = run_worker(open_board(path), move_away)
    assert any("Trying again" in line for line in told) and open_board(path).is_over()


def test_half_a_line_at_the_end_of_a_journal_is_cut_off(write_spec):
    """A power cut leaves one; more damage is told, and where."""
    path = write_spec(top="steps = 3\ntrials = 4")
    run_worker(open_board(path, trials=2))
    journal = path.parent / "sweep" / "journal.log"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "study')
    board = open_board(path)
    assert "half a line at its end, 21 bytes, was cut off" in board.mended
    assert len(run_worker(board)[0].jobs) == 2 and open_board(path).is_over() and not open_board(path).mended
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    with pytest.raises(StorageGone, match=r"damaged at line 1 of .* Copy it back .* start another name"):
        open_board(path)


@pytest.mark.parametrize("line", [1, 6])
def test_a_damaged_journal_is_told_by_its_line(line, write_spec):
    """Zeros of a bad disk, JSON that is no entry, an entry of a trial that was never begun; a lost head."""
    path = write_spec(top="steps = 3\ntrials = 2")
    run_worker(open_board(path))
    journal = path.parent / "sweep" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    for damage in (b"\0\0\0\n", b"[]\n", b'{"op_code": 8, "trial_id": 99}\n', b'{"op_code": "x"}\n'):
        changed = b"".join([*lines[: line - 1], damage, *lines[line:]])
        journal.write_bytes(changed)
        with pytest.raises(StorageGone, match=rf"is damaged at line {line} of {len(lines)} "):
            open_board(path)
        assert journal.read_bytes() == changed
    journal.write_bytes(b"".join(lines[line:]))
    with pytest.raises(StorageGone, match="is damaged at line 1 of"):
        open_board(path)
    journal.write_bytes(b"".join([*lines, b'{"op_code": 77}\n']))  # which Optuna alone refuses
    with pytest.raises(StorageGone, match=r"is damaged \(\w+Error: .*start another name"):
        open_board(path)


def test_workers_are_announced_before_they_start(monkeypatch, capsys):
    """How many, and on what each trains."""

    shares = [Share(3), Share(1, (), ("1",))]
    monkeypatch.setattr(command, "split_machine", lambda parts: shares[:parts])
    monkeypatch.setattr(command.sys, "executable", "true")  # a worker that ends at once
    command.run_workers(Namespace(spec="s.toml", storage="", trials=0, workers=2), Path("sweep"))
    assert capsys.readouterr().err == "2 workers start, each with its trials: 3 cores; 1 core, GPU 1\n"


def test_results_of_an_emptied_journal_are_none(write_spec):
    """They would begin a new study, as if nothing had been."""
    path = write_spec(top="steps = 3\ntrials = 2")
    run_worker(open_board(path))
    journal = path.parent / "sweep" / "journal.log"
    for content in (b"", b'{"op_code": 0, "wor'):
        journal.write_bytes(content)
        with pytest.raises(UserError, match="no sweep has begun there"):
            command.main([str(path), "--storage", str(journal.parent), "--results"])
        assert journal.read_bytes() == content


def test_storages_that_cannot_be_are_sentences_without_passwords(write_spec):
    """A URL without a driver, a file, nonsense."""
    path = write_spec()
    for url in (
        "nonsense://user:secret@host/db",
        "sqlite:////no/such/folder/x.db",
        "postgresql+nodriver://u:secret@h/d",
    ):
        with pytest.raises(StorageGone) as found:
            open_board(path, storage=url)
        assert "secret" not in str(found.value)
    assert mask("mysql://me:pw@host/db") == "mysql://me:***@host/db"
    with pytest.raises(UserError, match="expected the folder of a journal, or the URL"):
        command.main([str(path), "--storage", str(path)])
    with pytest.raises(UserError, match="no sweep has begun there"):
        command.main([str(path), "--storage", str(path.parent / "none"), "--results"])


# ----------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------


def test_results_are_a_table_an_object_and_a_page_of_its_own(write_spec, tmp_path):
    """Names of the spec are text on the page; nothing is fetched; what to do next is spelled out."""
    space = SPACE + 'run.attention = {choices = ["auto", "<b>"]}\n'.replace("<b>", "math")
    path = write_spec(space, "steps = 100\ntrials = 13")  # as many as importance needs
    board = open_board(path)
    assert "tiny: 1 waiting; 13 wanted" in format_results(collect(board), board.spec)
    write_results(collect(board), board.spec, board.folder)
    run_worker(board)
    found = collect(board)
    text = format_results(found, board.spec)
    assert re.search(r"^ +\d+ \* +complete +2\.", text, re.MULTILINE) and "13 complete; 13 wanted" in text
    assert re.search(
        r"^verify on new seeds: python -m dev.trial --recipe \S+ --set optim.matrix_lr=\S+ ",
        text,
        re.MULTILINE,
    )
    verify = trial_parser().parse_args(shlex.split(found["verify"])[3:])
    assert (verify.seeds, verify.steps, verify.measure, len(verify.set)) == ("42,2025,1", 100, "artifact", 3)
    page = write_results(found, board.spec, board.folder).read_text()
    assert json.loads((board.folder / "results.json").read_text()) == json.loads(json.dumps(found))
    assert page.count("<svg") == 3 + 3 and not re.search(r"<script|<link|(src|href)=.https?:", page)
    assert {p.name for p in board.folder.glob("*.svg")} >= {"history.svg", "importance.svg", "pareto.svg"}


def test_what_few_trials_cannot_say_is_left_out_with_the_reason(write_spec):
    """Importance from 3 trials a field and 4 more on, ranks from 5 trials with both losses."""
    path = write_spec(top="steps = 40\ntrials = 9", tables='[prune]\nkind = "median"\nn_startup_trials = 99')
    board = open_board(path, trials=4)
    run_worker(board)
    found = collect(board)
    assert not found["importance"] and found["rank_correlation"] is None
    text = format_results(found, board.spec)
    assert "note: no importance: 4 trials are finished, 2 fields need 10" in text
    assert "note: no rank correlation" in text and "have both, found 4" in text
    board = open_board(path, trials=10)
    run_worker(board)
    found = collect(board)
    assert found["importance_trials"] == 10 and found["rank_correlation"]["trials"] == 10
    assert "importance for val_bpb, from 10 trials: " in format_results(found, board.spec)
    assert not any("no importance" in note or "no rank" in note for note in found["notes"])


def test_a_best_value_at_an_end_of_its_range_is_told(write_spec):
    """Better ones may lie behind it; of a logarithmic range, ends are measured in powers."""
    log = Dimension(LR, "float", {"low": 0.001, "high": 1.0, "log": True}, (), {})
    assert [end_of(log, value) for value in (0.00141, 0.00142, 0.7, 0.71)] == ["lower", "", "", "upper"]
    assert end_of(Dimension(LR, "float", {"low": 0.0, "high": 1.0}, (), {}), 0.96) == "upper"
    assert end_of(Dimension(LR, "float", {"low": 1.0, "high": 1.0}, (), {}), 1.0) == ""
    assert end_of(Dimension(GATE, "categorical", {"choices": ["none"]}, (), {}), "none") == ""
    board = open_board(write_spec(SPACE.replace("high = 1.0", "high = 0.04")))
    run_worker(board)
    notes = " ".join(collect(board)["notes"])
    assert (
        "the best optim.matrix_lr, 0.04, is at the upper end of its range, 0.001 to 0.04: widen it?" in notes
    )


def test_the_best_is_verified_by_seeds_that_did_not_choose_it():
    """The trial's first ones that the sweep did not use, however many it used."""
    assert new_seeds([1337]) == [42, 2025, 1] and new_seeds([7]) == [1337, 42, 2025]
    used = [1337, 42, 2025, *range(200)]
    assert not set(new_seeds(used)) & set(used) and len(set(new_seeds(used))) == 3


def test_progress_is_told_now_and_then(monkeypatch, tmp_path):
    """With the time left, the first at once; then not again for a while."""
    lines = iter([["training: 10% seconds_left:90"], ["training: 20% seconds_left:80"], [], []])

    class Stage:  # a training in work
        name, output, told_at = "trial 3", tmp_path, -math.inf
        events, outcome, stop = list, lambda self: "done", lambda self: None
        alive = iter([True, True, True, False])

        def is_alive(self):
            return next(self.alive)

        def new_lines(self, path):
            self.told_at = -math.inf  # as if time had passed for it
            return next(lines)

    for name, stand_in in (
        ("start_training", lambda job: Stage()),
        ("await_folder", lambda job, tell: None),
        ("find_finished", lambda job: None),
    ):
        monkeypatch.setattr(workers, name, stand_in)
    monkeypatch.setattr(workers, "LOOK_EVERY_S", 0.0)
    told = []
    assert workers.train_watched(None, lambda events: None, told.append) == "done"
    assert told == ["  trial 3: training 10 %, 90 s left of it"]
    tell = workers.now_and_then(told.append, 0.0)
    tell("a"), tell("b")
    assert told[1:] == ["a", "b"]


def test_ranks_of_a_rung_say_whether_pruning_can_be_trusted():
    """Spearman's correlation."""
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_finish_every_trial(write_spec, tmp_path):
    """Real trainings: kill -9 of a worker, the same command once more, and no trial is lost or double."""
    path = write_spec(top='steps = 3\ntrials = 3\nmeasure = "weights"')
    folder = tmp_path / "sweep"
    words = [sys.executable, "-m", "dev.sweep", str(path), "--storage", str(folder), "--json"]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    both = subprocess.Popen([*words, "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE)
    board = open_board(path, folder=folder)
    while not (running := [t.user_attrs[OWNER] for t in board.trials() if OWNER in t.user_attrs]):
        assert both.poll() is None
        time.sleep(0.2)
    os.kill(running[0]["process"], signal.SIGKILL)
    once_more = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=280)
    assert json.loads(both.communicate()[0])["sweep"] == "tiny" and both.returncode == 0
    found = json.loads(once_more.stdout)
    assert once_more.returncode == 0 and found["states"] == {"complete": 3}, once_more.stderr
    assert len({json.dumps(row["params"]) for row in found["trials"]}) == 3
    assert len(list((folder / "runs").glob("*/weights.json"))) == 3 and not list(
        (folder / "workers").iterdir()
    )
