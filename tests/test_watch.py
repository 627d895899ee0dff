"""dev.watch: what each run is doing, in words that are true, whatever its folder holds."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures_live import finish_run, grow_run, leave_run

import train_gpt
from common import UserError, parse_json, write_json
from dev import watch
from dev.desk.runs import read_run
from dev.watch import (
    SPARKS,
    Watcher,
    facts_of,
    fit,
    main,
    plain_table,
    spark,
    spell_seconds,
    status_of,
)
from durable.lock import HOLDER_NAME, describe_process
from durable.seals import append_event
from train_gpt import Environment

ROOT = Path(__file__).resolve().parent.parent
NARROW = 40


def held(folder: Path, **facts) -> Path:
    """Note that this process holds a run's folder, as the trainer does."""
    write_json(folder / HOLDER_NAME, describe_process() | facts)
    return folder


def look(folder: Path, later_s: float = 0.0):
    """Return a run's status, so many seconds after it last wrote."""
    now = max(path.stat().st_mtime for path in (folder / "train.log", folder / "metrics.jsonl")) + later_s
    return status_of(read_run(folder), now)


LOGS = {
    "warming up": "",
    "training": "phase: seq_len:8 batch_tokens:1000 passes:1 qat:False step:10 train_time:1000ms\n",
    "validating": "step:20/100 train_loss:1.0 train_time:9ms step_avg:1ms\nsaved:x\nvalidating: x\n",
    "calibrating": "validating: x\nstep:20/100 val_loss:3 val_bpb:2\npeak memory allocated: 1 MiB\n",
    "quantizing": "peak memory allocated: 1 MiB\nquantizing: rows\nquantizing: try:1 bytes:5\n",
    "scoring": "Code size: 5 bytes\nscoring: 3% seconds_left:53\n",
}


@pytest.mark.parametrize("state", LOGS)
def test_a_run_in_progress_says_what_it_does(tmp_path, state):
    assert look(held(leave_run(tmp_path / "a", 20, LOGS[state]))).state == state


def test_a_run_that_has_ended_says_how(tmp_path):
    """Without its lock's note a process has ended by itself; a killed one has left the note."""
    assert look(finish_run(leave_run(tmp_path / "done", 20))).state == "finished"
    assert look(finish_run(leave_run(tmp_path / "over", 20), over_limits=["bytes"])).state == "over limits"
    stopped = leave_run(tmp_path / "stopped", 20, "stopped: SIGTERM. x is kept; go on with --resume runs/x\n")
    assert look(stopped).state == "stopped"
    assert look(leave_run(tmp_path / "failed", 20, LOGS["training"])).state == "failed"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed = held(leave_run(tmp_path / "killed", 20, LOGS["training"]), process=gone.pid)
    assert look(killed).state == "killed"
    elsewhere = held(leave_run(tmp_path / "far", 20, LOGS["training"]), process=gone.pid, host="another")
    assert look(elsewhere).state == "training", "its process cannot be seen from here"


def test_a_run_that_went_on_after_a_stop_trains(tmp_path):
    log = "stopped: SIGTERM. kept\n\nresumed:step 20 from x\nwarming up: 2 steps\nstep:21/100 train_loss:1 \n"
    assert look(held(leave_run(tmp_path / "a", 21, log))).state == "training"


def test_silence_is_said_and_counts_against_the_time_left(tmp_path):
    folder = held(leave_run(tmp_path / "a", 20, "scoring: 3% seconds_left:100\n"))
    assert (look(folder, 20).said, look(folder, 20).seconds_left) == ("scoring", 80)
    assert (look(folder, 90).said, look(folder, 90).seconds_left) == ("scoring, silent 1:30", 10)
    assert look(folder, 500).seconds_left == 0
    assert look(finish_run(folder), 500).said == "finished"


def test_the_rate_counts_the_tokens_of_each_phase(tmp_path):
    """500 tokens a step at first, 1,000 from step 15 on, ten steps a second: the mean of 4 and 5 steps."""
    log = "phase: seq_len:8 batch_tokens:1000 passes:1 qat:False step:15 train_time:1500ms\n"
    folder = held(leave_run(tmp_path / "a", 20, log))
    assert look(folder).tokens_per_second == pytest.approx((14 * 500 + 5 * 1000) / 1.9)
    assert look(finish_run(folder)).tokens_per_second == 5000.0


def test_a_status_has_the_numbers_of_the_events(tmp_path):
    status = look(held(leave_run(tmp_path / "a", 20, LOGS["training"])))
    assert (status.step, status.num_steps, status.limit_s) == (20, 100, 60.0)
    assert status.train_loss == pytest.approx((7.81 + 7.80) / 2) and status.val_bpb == 2.0
    assert look(finish_run(tmp_path / "a")).val_bpb == 1.25, "the artifact's score, not the weights'"


def half_event(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')


NO_NUMBER = {"kind": "train", "step": 21, "train_loss": float("nan"), "train_ms": 2100.0}
DAMAGES = {
    "half an event": half_event,
    "an altered event": lambda folder: (folder / "metrics.jsonl").write_text('{"kind": "train"}\n'),
    "no events": lambda folder: (folder / "metrics.jsonl").unlink(),
    "no recipe": lambda folder: (folder / "recipe.toml").unlink(),
    "no log": lambda folder: (folder / "train.log").write_bytes(b"\xff\x00"),
    "a loss that is no number": lambda folder: append_event(folder / "metrics.jsonl", NO_NUMBER),
    "half a holder": lambda folder: (folder / HOLDER_NAME).write_text('{"process": 1'),
    "another holder": lambda folder: (folder / HOLDER_NAME).write_text('{"process": "x", "host": []}'),
    "half a result": lambda folder: (folder / "result.json").write_text('{"score": {"val'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_a_folder_holds_there_is_a_row(tmp_path, damage):
    folder = held(leave_run(tmp_path / "a", 20, LOGS["training"]))
    DAMAGES[damage](folder)
    (status,) = Watcher([str(folder)], 9).statuses()
    assert plain_table([status], 200, SPARKS[1]).count("\n") == 1
    parse_json(json.dumps(facts_of([status])), "facts")  # numbers are finite


def test_runs_are_found_as_they_come(tmp_path):
    """A folder is looked through each time, newest runs first; two runs of one name can be told apart."""
    watcher = Watcher([str(tmp_path)], 2)
    leave_run(tmp_path / "one" / "a", 3)
    os.utime(tmp_path / "one" / "a" / "train.log", (1e9, 1e9))
    os.utime(tmp_path / "one" / "a" / "metrics.jsonl", (1e9, 1e9))
    assert [status.name for status in watcher.statuses()] == ["a"]
    leave_run(tmp_path / "two" / "a", 5)
    assert [(status.name, status.step) for status in watcher.statuses()] == [("two/a", 5), ("one/a", 3)]
    grow_run(tmp_path / "two" / "a", 6)
    assert watcher.statuses()[0].step == 6
    leave_run(tmp_path / "b", 4)
    assert len(watcher.statuses()) == 2, "no more than --most"


def test_a_name_without_runs_is_an_error_and_an_empty_runs_folder_none(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="expected run folders, found none"):
        main([str(tmp_path), "--once"])
    monkeypatch.chdir(tmp_path)
    assert main(["--once"]) == 0 and "no runs in runs/ yet" in capsys.readouterr().out


def test_json_is_one_object(tmp_path, capsys):
    leave_run(tmp_path / "a", 3)
    main([str(tmp_path), "--json"])
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["state"] == "failed" and run["step"] == 3


def test_a_terminal_without_unicode_gets_what_it_can_show(tmp_path):
    """Over ssh the locale is often C."""
    leave_run(tmp_path / "u\u4e2d", 3)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dev.watch", str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert said.isascii() and "u\\u4e2d" in said


def test_waiting_ends_with_the_runs_and_tells_of_a_failure(tmp_path, capsys):
    """A script goes on after it, or does not."""
    finish_run(leave_run(tmp_path / "a", 3))
    assert main([str(tmp_path), "--until-end"]) == 0
    leave_run(tmp_path / "b", 3)
    assert main([str(tmp_path), "--until-end"]) == 1


@pytest.mark.parametrize("width", [200, 100, 80, 60, NARROW])
def test_tables_fit(tmp_path, width):
    long = held(leave_run(tmp_path / ("seed_of_a_long_name_" * 3 + "7"), 20, LOGS["training"]))
    table = plain_table([look(long), look(finish_run(leave_run(tmp_path / "b", 9)))], width, SPARKS[1])
    assert max(map(len, table.splitlines())) <= width
    assert all(word in table for word in ("run", "state", "loss", "val_bpb", "training", "finished"))
    assert table.splitlines()[1].split()[0].endswith("7"), "the end of a name tells seeds apart"


def test_columns_go_one_by_one():
    row = dict.fromkeys(("run", "state", "left", "step", "curve"), "x" * 9)
    assert [*fit([row], 53)[0]] == [*row]
    assert [*fit([row], 52)[0]] == ["run", "state", "left", "step"]


def test_a_curve_falls_with_the_loss_and_bears_what_is_no_number():
    assert spark([8.0, 6.0, 4.0, 2.0], 4, "0123") == "3210"
    assert spark([float("nan"), 2.0, float("inf"), 1.0], 4, "01") == "10"
    assert (spark([], 4, "01"), spark([1.0], 4, "01")) == ("", "0")
    assert len(spark([1.0 * step for step in range(999)], 16, "0123")) == 16


def test_times_are_spelled():
    assert [*map(spell_seconds, (None, 0, 59.6, 61, 3661))] == ["", "0 s", "1:00", "1:01", "1:01:01"]


@pytest.mark.desk
def test_the_live_view_follows_a_run_and_leaves_at_ctrl_c(tmp_path):
    """In a terminal of 70 columns, as over ssh."""
    pytest.importorskip("rich")
    folder = held(
        leave_run(tmp_path / "[bold]a", 20, LOGS["training"])
    )  # a name that rich would read as markup
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "70", "LINES": "24"}
    command = [sys.executable, "-m", "dev.watch", str(folder), "--every", "0.2"]
    viewer = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = read_until(ours, r"\[bold\]a +training +20 ")
    grow_run(folder, 21)
    said += read_until(ours, r"training +21 ")
    finish_run(folder)
    said += read_until(ours, r"\x1b\[32mfinished")
    viewer.send_signal(signal.SIGINT)
    assert viewer.wait(20) == 0
    assert "Traceback" not in said


def read_until(terminal: int, pattern: str) -> str:
    """Read a terminal until it shows a pattern."""
    said, ends_at = "", time.monotonic() + 30
    while not re.search(pattern, said):
        assert time.monotonic() < ends_at, said
        said += os.read(terminal, 4096).decode()
    return said


# How iverbovoy/pgolf-dashboard reads a log, which follows the contest's lines.
DASHBOARD = {
    "model_params": r"\bmodel_params:(\d+)",
    "world_size": r"\bworld_size:(\d+)",
    "seed": r"\bseed:(\d+)",
    "max_wallclock": r"max_wallclock_seconds:([\d.]+)",
    "iterations": r"iterations:(\d+)",
    "train_batch_tokens": r"train_batch_tokens:(\d+)",
    "warmup": r"warmup_step:(\d+)/(\d+)",
    "val": r"step:(\d+)/\d+ val_loss:([\d.]+) val_bpb:([\d.]+)",
    "train": r"step:(\d+)/\d+ train_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms(?: chi:([\d.]+))?",
    "artifact_bytes": r"Serialized model int.+?: (\d+) bytes",
    "done": r"final_(?:int8_zlib_)?roundtrip_exact val_loss:([\d.]+) val_bpb:([\d.]+)",
}


def test_a_dashboard_of_the_contest_reads_our_log(tiny_config, stand_in_program):
    """The naive baseline's lines, whose int8 rows go through zlib, have all that it looks for."""
    train_gpt.run(tiny_config, Environment({}))
    folder = Path(tiny_config.run.out_dir) / "tiny"
    lines = (folder / "train.log").read_text().splitlines()
    found = {name: [match.groups() for line in lines if (match := re.search(pattern, line))]
             for name, pattern in DASHBOARD.items()}  # fmt: skip
    assert {name for name, matches in found.items() if not matches} == set()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {event["step"] for event in events if event["kind"] == "train"}
    assert {int(step) for step, *_ in found["train"]} == steps
    result = read_run(folder)
    assert float(found["done"][-1][1]) == pytest.approx(result.val_bpb, abs=1e-8)
    assert int(found["artifact_bytes"][-1][0]) == (folder / "artifact.bin").stat().st_size
    assert found["seed"][-1] == (str(tiny_config.run.seed),)


def test_an_odd_folder_does_not_end_the_table(tmp_path, capsys):
    """Its row shows what can be read."""
    folder = finish_run(leave_run(tmp_path / "odd", 20))
    odd = {"score": {"val_bpb": 1.5}, "tokens_per_second": "z", "over_limits": 7, "steps": "many"}
    (folder / "result.json").write_text(json.dumps(odd))
    (folder / "recipe.toml").write_text("[run]\nmax_wallclock_seconds = 'NaN'\niterations = 'x'\n")
    watch.main([str(tmp_path), "--once"])
    assert "1.5000" in capsys.readouterr().out
