"""Runs of the desk: what counts as the same, processes that end with their command, failures that say why."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_model import ROOT, ends_soon

import train_gpt
from dev.desk import training
from dev.desk.training import (
    Job,
    TrainingFailed,
    find_finished,
    run_id,
    snapshot,
    split_machine,
    start_training,
    train,
    train_all,
    whole_machine,
)
from durable.seals import read_sealed, write_sealed
from formats.recipe import with_values
from train_gpt import Environment, code_digest


@pytest.fixture
def finished(tiny_config, stand_in_program) -> Job:
    """A job whose run was made by hand, in a folder of another name."""
    cfg = with_values(tiny_config, {"run.run_id": "by_hand", "run.iterations": 3}, "test")
    train_gpt.run(cfg, Environment({}))
    return Job(cfg, out=Path(cfg.run.out_dir) / "trials")


def changed(job: Job, **values) -> Job:
    """Return the job with settings changed; `_` stands for the dot."""
    values = {name.replace("__", "."): value for name, value in values.items()}
    return job._replace(cfg=with_values(job.cfg, values, "test"))


def test_a_run_made_by_hand_is_found_whatever_it_is_called(finished):
    """By what its result depends on; what is logged, kept and named changes nothing."""
    found = find_finished(finished)
    assert found.was_found and found.folder.name == "by_hand" and found.steps == 3
    assert found.num_bytes > 0 and found.origin["data"]
    alike = changed(finished, run__train_log_every=1, watch__tensorboard=True, run__save_every=2)
    assert find_finished(alike).folder == found.folder
    assert train(finished, tell=[].append) == found


@pytest.mark.parametrize(
    "values",
    [
        {"run__seed": 2},
        {"run__iterations": 4},
        {"optim__matrix_lr": 0.01},
        {"run__max_wallclock_seconds": 9.0},
    ],
    ids=str,
)
def test_another_seed_budget_or_setting_is_another_run(values, finished):
    """And has another name."""
    other = changed(finished, **values)
    assert find_finished(other) is None and run_id(other) != run_id(finished)


def test_other_code_data_machine_or_measure_is_another_run(finished, monkeypatch, tmp_path):
    """A finished run of another machine is taken where that is allowed."""
    other = finished._replace(share=whole_machine()._replace(threads=7))
    assert find_finished(other) is None and find_finished(other._replace(any_machine=True))
    assert find_finished(finished._replace(measure="weights")) is None
    folder = tmp_path / "data"
    folder.mkdir()
    for path in Path(finished.cfg.data.data_path).glob("[!m]*"):  # all but the manifest
        (folder / path.name).write_bytes(path.read_bytes())
    assert find_finished(changed(finished, data__data_path=str(folder))) is None
    monkeypatch.setattr(training, "hash_of_code", lambda root: "other")
    assert find_finished(finished) is None


def test_damaged_and_older_results_are_passed_over(finished):
    """They are no finished runs; nothing of them is lost."""
    path = find_finished(finished).folder / "result.json"
    facts = read_sealed(path, "")
    write_sealed(path, {name: value for name, value in facts.items() if name not in ("origin", "digest")})
    assert find_finished(finished) is None
    for text in (path.read_text().replace("3", "4", 1), "{", "[]", ""):
        path.write_text(text)
        assert find_finished(finished) is None


def test_the_machine_is_divided(monkeypatch):
    """Every core once; visible GPUs as they are named."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        halves = split_machine(2)
        assert sorted(sum((share.cores for share in halves), ())) == cores
        assert sum(share.threads for share in halves) == len(cores)
    with pytest.raises(training.UserError, match="expected a core for each of 9999 runs"):
        split_machine(9999)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(training.torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [share.gpus for share in split_machine(2)] == [("4", "5"), ("6", "7")]


def test_runs_train_from_a_copy_of_the_code(tmp_path, monkeypatch):
    """Made once for one state of the source; without git the checkout itself, and an edit is noticed."""
    copy = snapshot(tmp_path / "code")
    assert copy.parent == tmp_path / "code" and snapshot(tmp_path / "code") == copy
    assert code_digest(copy) == code_digest(ROOT) and (copy / "pack" / "__main__.py").is_file()
    assert not (copy / "tests").exists() and [path.name for path in copy.parent.iterdir()] == [copy.name]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError):
        subprocess.run(["git"], check=False)
    assert snapshot(tmp_path / "code") == ROOT


def test_a_child_ends_with_its_command(tmp_path):
    """Killed so that it can tell nobody, the command leaves no training behind."""
    sleeper, starter = tmp_path / "sleeper.py", tmp_path / "starter.py"
    sleeper.write_text(
        "import pathlib, os, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    child = str(ROOT / "dev" / "desk" / "child.py")
    starter.write_text(
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, {child!r}, str(os.getpid()), 'all', {str(sleeper)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, str(starter)], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    assert ends_soon(pid), "the child outlived its command"


@pytest.mark.slow
def test_weights_and_artifacts_are_trained_once_with_the_same_steps(tiny_config, tmp_path):
    """The float weights of both are scored alike; the second call trains nothing."""
    cfg = with_values(tiny_config, {"run.iterations": 5, "run.val_loss_every": 0}, "test")
    said: list[str] = []
    jobs = [Job(cfg, measure, tmp_path / "out") for measure in ("weights", "artifact")]
    weights, artifact = (train(job, said.append) for job in jobs)
    assert not weights.was_found and weights.num_bytes == 0 < artifact.num_bytes
    last = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "val" and last["val_bpb"] == weights.val_bpb and weights.steps == 5
    assert [train(job, said.append).was_found for job in jobs] == [True, True]
    assert not list((tmp_path / "out").glob("*.output")) and not list((tmp_path / "out").glob("*.toml"))


@pytest.mark.slow
def test_two_commands_that_want_one_run_train_it_once(tiny_config, tmp_path):
    """The second waits for the first, then finds its run."""
    cfg = with_values(tiny_config, {"run.iterations": 30}, "test")
    job = Job(cfg, "weights", tmp_path / "out")
    first = start_training(job)
    while not (first.folder / ".lock.json").exists():
        time.sleep(0.05)
    said: list[str] = []
    second = train(job, said.append)
    assert second.was_found and "waiting for it" in said[0] and first.outcome().val_bpb == second.val_bpb


@pytest.mark.slow
def test_a_training_that_fails_says_why_and_stops_the_other(tiny_config, tmp_path):
    """A rate that no model survives."""
    bad = replace(tiny_config.optim, matrix_lr=1e30, tied_embed_lr=1e30, scalar_lr=1e30)
    cfg = with_values(tiny_config, {"run.iterations": 20}, "test")
    good = Job(with_values(cfg, {"run.iterations": 3}, "test"), "weights", tmp_path / "out")
    jobs = [good, Job(replace(cfg, optim=bad), "weights", tmp_path / "out")]
    with pytest.raises(TrainingFailed) as caught:
        train_all(jobs, [].append)
    assert "finite" in str(caught.value) and caught.value.job == jobs[1]
    assert find_finished(good)
