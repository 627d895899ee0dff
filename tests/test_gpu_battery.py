"""The GPU battery: whatever a part does, results.json is whole and the parts after it run."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_battery import (
    NUMBERS,
    exits,
    fails_in_one_measurement,
    hangs,
    is_killed,
    leaves_a_child,
    prints_garbage,
    raises,
    works,
    writes_half_a_line,
)
from fixtures_model import ROOT, is_alive

import dev.gpu_battery.__main__
import dev.gpu_battery.timing
from common import UserError, read_json
from dev.gpu_battery import contest
from dev.gpu_battery.__main__ import AHEAD, PARTS, choose_parts, main
from dev.gpu_battery.contest import per_step, read_rates, read_times
from dev.gpu_battery.driver import RESULTS_NAME, BatteryPart, BatterySettings, run_battery
from dev.gpu_battery.gpu_tests import sum_up
from dev.gpu_battery.job import Job, plain, read_records
from dev.gpu_battery.measurements import collect_figures
from dev.gpu_battery.report import format_markdown, format_plain
from dev.gpu_battery.sizes import RECIPES
from dev.gpu_battery.text import draw_tokens
from dev.gpu_battery.timing import GPU_CATEGORIES, sum_up_trace, too_fast, unless_out_of_memory, utilization
from dev.gpu_battery.whole_run import SHORT, storage_here
from train_gpt import load_config

ON_GPU_ONLY = ("mfu_1061", "mfu_naive", "peak_gib_1061", "peak_gib_naive")
ON_GPU_ONLY += ("contest_1061_ms", "contest_naive_ms", "ratio_1061", "ratio_naive")  # or not carried


def part(function, seconds: float = 60) -> BatteryPart:
    return BatteryPart(function.__name__, seconds, "a fake", f"{function.__module__}:{function.__name__}")


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """Run fake parts, `works` last; checks what holds whatever they do; returns the report's parts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(*parts: BatteryPart, seconds: float = 300, **more) -> dict:
        out = tmp_path / "out"
        settings = BatterySettings(out, tmp_path / "work", seconds, **more)
        report = run_battery([*parts, part(works)], settings)
        written = json.loads((out / RESULTS_NAME).read_text(), parse_constant=pytest.fail)
        assert written == plain(report)
        assert [path.name for path in out.iterdir()] == [RESULTS_NAME]
        assert format_plain(written)
        assert format_markdown(written)
        return written["parts"]

    return run


def wait_until(holds, seconds: float = 60) -> bool:
    """Wait for something that another process does."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


# One part after the other


@pytest.mark.parametrize(
    ("fake", "status", "reason", "results"),
    [
        (raises, "failed", "exit status 1", {"before": 1}),
        (fails_in_one_measurement, "failed", "exit status 1", {"good": NUMBERS}),
        (is_killed, "failed", "killed by SIGKILL", {"before": 1}),
        (writes_half_a_line, "failed", "killed by SIGKILL", {"before": 1}),
        (exits, "failed", "exit status 3", {}),
    ],
)
def test_a_bad_part_keeps_what_it_measured_and_the_next_runs(run_parts, fake, status, reason, results):
    """GPU time is lent by the minute: one fault may not cost the other measurements."""
    parts = run_parts(part(fake))
    bad = parts[fake.__name__]
    assert (bad["status"], bad["reason"], bad["results"]) == (status, reason, results)
    assert parts["works"]["status"] == "ok"
    assert parts["works"]["results"] == {"speed": NUMBERS}


def test_a_bad_part_says_why(run_parts):
    """The error stays with its measurement; the traceback is in the tail of standard error."""
    parts = run_parts(part(raises), part(fails_in_one_measurement))
    assert parts["raises"]["errors"] == {"part": "RuntimeError: broken part"}
    assert "broken part" in parts["raises"]["stderr"]
    assert parts["fails_in_one_measurement"]["errors"] == {"bad": "ZeroDivisionError: division by zero"}
    assert "errors" not in parts["works"]


def test_a_part_that_hangs_is_killed_and_says_where_it_hung(run_parts):
    """A kernel that never returns must not take the whole battery's time, and leaves its stack."""
    parts = run_parts(part(hangs, seconds=2.5))
    hung = parts["hangs"]
    assert (hung["status"], hung["reason"]) == ("timed out", "killed after 2 s")
    assert (hung["results"], hung["unfinished"]) == ({"before": 1}, "endless")
    assert "in hangs" in hung["stderr"]
    assert parts["works"]["status"] == "ok"


def test_garbage_in_output_and_records_does_no_harm(run_parts):
    """A crash may write anything: results.json stays JSON."""
    parts = run_parts(part(prints_garbage))
    found = parts["prints_garbage"]
    assert found["status"] == "ok"
    assert found["results"]["nan"] == "NaN"
    assert found["results"]["odd"]["inf"] == "inf"
    assert parts["works"]["status"] == "ok"


def test_no_process_outlives_its_part(run_parts):
    """A child left behind would share the card with the next part's timings."""
    parts = run_parts(part(leaves_a_child))
    assert parts["leaves_a_child"]["status"] == "ok"
    assert wait_until(lambda: not is_alive(parts["leaves_a_child"]["results"]["pid"]))


def test_parts_that_no_time_is_left_for_are_skipped_and_shorter_ones_run(run_parts):
    """A part that cannot finish would only take time from one that can."""
    parts = run_parts(part(hangs, seconds=1), part(raises, seconds=100_000), seconds=400)
    assert parts["hangs"]["status"] == "timed out"
    assert parts["raises"]["status"] == "skipped"
    assert parts["raises"]["reason"].startswith("out of time: ")
    assert parts["works"]["status"] == "ok"


def test_the_whole_stays_within_its_time(run_parts):
    """A part gets no more than what is left, and a row that is never reached says so."""
    started = time.monotonic()
    parts = run_parts(part(hangs, seconds=4), part(raises, seconds=4), seconds=6)
    assert time.monotonic() - started < 60
    assert [row["status"] for row in parts.values()] == ["timed out", "skipped", "skipped"]


@pytest.mark.parametrize("row", PARTS, ids=[row.name for row in PARTS])
def test_whichever_part_of_the_table_dies_the_results_are_whole(run_parts, row):
    """Of the real table, not of fakes: no row may be one that the others depend on."""
    found = run_parts(row._replace(function=f"{is_killed.__module__}:is_killed"))
    assert found[row.name]["status"] == "failed"
    assert found["works"]["status"] == "ok"


def test_results_that_cannot_be_reached_do_not_stop_the_battery(run_parts):
    """A module or a function that is not there is one part's failure."""
    missing = [
        BatteryPart(name, 60, "a fake", name) for name in ("no_such_module:run", "fixtures_battery:no_such")
    ]
    found = run_parts(*missing)
    assert [found[row.name]["status"] for row in missing] == ["failed", "failed"]
    assert found["works"]["status"] == "ok"


# What compiles ahead


def test_a_part_that_times_things_waits_for_what_compiles_ahead(run_parts, tmp_path):
    """One that runs beside it does not; a compiler that hangs is killed and costs nobody else anything."""
    ahead = ("fixtures_battery:takes_a_second", "fixtures_battery:hangs")
    found = run_parts(part(works)._replace(name="early", beside=True), ahead=ahead, ahead_seconds=4.0)
    report = read_json(tmp_path / "out" / RESULTS_NAME)
    assert found["early"]["status"] == found["works"]["status"] == "ok"
    assert report["ahead"]["ahead_takes_a_second"]["status"] == "ok"
    assert report["ahead"]["ahead_hangs"]["status"] == "timed out"
    ended = {path.parent.name: path.stat().st_mtime for path in tmp_path.glob("work/parts/*/records.jsonl")}
    assert ended["early"] < ended["ahead_takes_a_second"] < ended["works"]


def test_nothing_that_compiles_ahead_outlives_the_battery(run_parts, tmp_path):
    """Also where no part waited for it."""
    ahead = ("fixtures_battery:ignores_signals",)
    records = tmp_path / "work" / "parts" / "ahead_ignores_signals" / "records.jsonl"
    run_parts(part(works)._replace(name="early", beside=True), ahead=ahead, ahead_seconds=3.0)
    assert not is_alive(read_records(records).results["pid"])


# The contest's scripts

LOG_1061 = """warmup_step: 1/1
1/16 train_loss: 9.0131 train_time: 0.0m tok/s: 786432
2/16 train_loss: 8.9 train_time: 0.0m tok/s: 524288
"""
LOG_NAIVE = """warmup_step:3/3
step:1/24 train_loss:6.9379 train_time:352ms step_avg:352.00ms
step:2/24 train_loss:6.8 train_time:702ms step_avg:351.00ms
step:3/24 train_loss:6.7 train_time:1062ms step_avg:354.00ms
"""


def test_steps_of_the_contest_s_scripts_are_timed_by_their_own_logs():
    """One tells tokens a second since its start, the other milliseconds."""
    assert read_rates(LOG_1061) == [(1, 1000.0, 9.0131), (2, 3000.0, 8.9)]
    marks = {str(mark.step): [mark.ms, mark.loss] for mark in read_times(LOG_NAIVE)}
    assert per_step(marks, 1, 3) == {"step_ms": 355, "least": 350, "most": 360, "micro_batch_ms": 355 / 8}


@pytest.fixture
def contest_job(tmp_path):
    """Make a job whose carried folder holds a stand-in for the contest's script; returns (job, folder)."""
    carried = tmp_path / "carried"
    carried.mkdir()
    records, work = str(tmp_path / "records.jsonl"), str(tmp_path)
    return Job("", records, work, "", str(carried), True, 60, time.time()), carried


def test_a_script_of_the_contest_is_followed_until_its_last_step_and_ended(contest_job):
    """It gets our shards and a stand-in for FlashAttention; nobody waits for what it does after its steps."""
    job, carried = contest_job
    script = (
        "import os, sys, time, flash_attn_interface\n"
        "assert all(os.path.getsize(f'fineweb_{split}_000000.bin') > 1024 for split in ('train', 'val'))\n"
        "for i in range(1, 25): print(f'step:{i}/24 train_loss:6.5 train_time:{100 * i}ms x', flush=True)\n"
        "time.sleep(600)\n"
    )
    (carried / "train_naive.py").write_text(script)
    contest.run_naive(job)
    found = read_records(Path(job.records))
    assert found.errors == {}
    assert found.results["steps"]["step_ms"] == 100
    contest.run_1061(job)  # whose script is not there
    assert read_records(Path(job.records)).results["run"] == "not carried"


def test_a_script_of_the_contest_that_breaks_says_so(contest_job, capsys):
    """With the end of its output."""
    job, carried = contest_job
    (carried / "train_naive.py").write_text("raise SystemExit('no such card')")
    contest.run_naive(job)
    assert "expected 24 steps, found 0" in read_records(Path(job.records)).errors["run"]
    assert "no such card" in capsys.readouterr().err


# The command


def test_parts_are_chosen_by_name_in_the_order_of_the_table():
    """One order for every run, however they are asked for: results can be laid side by side."""
    assert choose_parts("") == list(PARTS)
    assert [row.name for row in choose_parts("scoring,machine")] == ["machine", "scoring"]
    with pytest.raises(UserError, match=r"expected some of train_small, .*, found speed\."):
        choose_parts("machine,speed")


def test_the_names_of_the_table_are_different_and_its_functions_exist():
    """Functions are named by text: a typo would show on the GPU only."""
    assert len({row.name for row in PARTS}) == len(PARTS)
    for name in [row.function for row in PARTS] + list(AHEAD):
        module, function = name.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_command_exits_with_1_when_a_part_is_not_ok(monkeypatch, tmp_path, capsys):
    """And with 0 when all are; either way the table is printed and the file can be shown as Markdown."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(dev.gpu_battery.__main__, "PARTS", (part(works), part(raises)))
    monkeypatch.setattr(dev.gpu_battery.__main__, "AHEAD", ())
    assert main(["--out", str(tmp_path / "good"), "--parts", "works"]) == 0
    assert main(["--out", str(tmp_path / "bad")]) == 1
    assert "ERROR RuntimeError: broken part" in capsys.readouterr().out
    assert main(["--show", str(tmp_path / "bad" / RESULTS_NAME)]) == 0
    shown = capsys.readouterr().out
    assert "| works | speed | ms 1.5 |" in shown
    assert "| raises | part | ERROR RuntimeError: broken part |" in shown


def test_lists_are_tables_of_their_own_and_a_bar_ends_no_cell():
    """Names of kernels hold bars, which Markdown takes for the end of a cell."""
    report = {
        "started": "now", "rehearsal": False, "card": "a card", "python": "3", "commit": "c", "seconds": 1,
        "limit_s": 2, "parts": {
            "one": {"status": "ok", "measures": "x", "results": {"profile": {
                "idle_share": 0.25, "kernels": [{"kernel": "a|b", "ms": 12345.6}]}}}},
    }  # fmt: skip
    shown = format_markdown(report)
    assert "| one | profile | idle_share 0.25 |" in shown
    assert "one.profile.kernels\n\n| kernel | ms |\n|---|---|\n| a\\|b | 12,346 |" in shown


# Measurements


def kernel(name: str, start: float, length: float, category: str = "kernel") -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


def test_a_trace_is_summed_up_by_the_device_s_own_events():
    """Streams may overlap; ranges that a program marks and what the host does are no work of the device."""
    events = [
        kernel("a", 0, 1000),
        kernel("a", 1000, 1000),
        kernel("b", 1500, 1500),
        kernel("copy", 5000, 1000, "gpu_memcpy"),
        kernel("range", 0, 9000, "gpu_user_annotation"),
        kernel("aten::mm", 0, 9000, "cpu_op"),
        {"ph": "M", "name": "n"},
    ]
    found = sum_up_trace(events, GPU_CATEGORIES, steps=2)
    rows = {row.pop("kernel"): row for row in found.pop("kernels")}
    assert found == {"launches": 2.0, "busy_ms": 2.0, "span_ms": 3.0, "idle_share": pytest.approx(1 / 3)}
    assert rows["a"] == {"ms": 1.0, "calls": 1.0, "share": pytest.approx(2 / 4.5)}
    with pytest.raises(ValueError, match="no event"):
        sum_up_trace(events[-2:], GPU_CATEGORIES, steps=2)


def test_more_than_the_card_can_do_is_a_fault(monkeypatch):
    """A timing without a wait for the device would show as a share above 1."""
    monkeypatch.setattr(dev.gpu_battery.timing, "peak_tflops", lambda device: 989.0)
    device = torch.device("cuda")
    assert utilization(989e12 * 0.4, 1000.0, device) == pytest.approx(0.4)
    assert too_fast({"forward": {"ms": 1.0, "mfu": 0.4, "of_peak": "not on a CPU"}}) == []
    impossible = {"forward": {"mfu": utilization(989e12, 500.0, device)}}
    assert too_fast(impossible) == ["mfu is 2 of what the card can do"]


def test_out_of_memory_is_a_result():
    """A size that does not fit the card is an answer, not a broken part."""

    def action() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    found = unless_out_of_memory(action, torch.device("cpu"))
    assert found["out_of_memory"] == "CUDA out of memory. Tried to allocate 9 GiB."


def test_verdicts_are_read_from_what_pytest_has_printed_so_far():
    """A run that the clock ends keeps the verdicts of the tests that were done."""
    output = (
        "tests/test_a.py::test_one PASSED                 [ 25%]\n"
        "tests/test_a.py::test_two[x - y] FAILED          [ 50%]\n"
        "tests/test_b.py::test_three SKIPPED (needs a CUDA device) [ 75%]\n"
        "tests/test_b.py::test_four "
    )
    assert sum_up(output) == {"passed": 1, "skipped": 1, "bad": ["tests/test_a.py::test_two[x - y]"]}


def test_a_machine_without_compressors_quantizes_for_the_codec_that_needs_none(monkeypatch):
    """The recipe's own codec stores some streams with zstandard or brotli."""
    recipe = str(ROOT / RECIPES["small"])
    assert storage_here() == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    overrides = [f"{name}={value}" for name, value in (SHORT | storage_here()).items()]
    cfg = load_config(recipe, {}, overrides)
    assert (cfg.quant.codec, cfg.quant.method, cfg.quant.code_wrap) == ("lzma", "gptq", "lzma")


def test_made_up_tokens_have_documents_of_usual_length_and_uneven_frequencies():
    """Without the contest's text, speed must still be that of text: documents decide masks, tokens rows."""
    tokens = draw_tokens(200_000, 1000, seed=0)
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    assert 400 < len(tokens) / len(starts) < 1000
    assert tokens.max() < 1000
    counts = np.bincount(tokens, minlength=1000)
    assert counts[2:12].sum() > 5 * counts[-100:].sum()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_rehearse_on_a_cpu_in_under_five_minutes(tmp_path):
    """What fails here would fail on the GPU, where time is short."""
    started = time.monotonic()
    main(["--out", str(tmp_path / "out"), "--rehearse"])
    report = read_json(tmp_path / "out" / RESULTS_NAME)
    bad = {name: row for name, row in report["parts"].items() if row["status"] != "ok"}
    assert bad == {}
    assert list(report["parts"]) == [row.name for row in PARTS]
    figures = collect_figures(report)  # under the names that the parts give them
    missing = [name for name, value in figures.items() if value in (None, {}) and name not in ON_GPU_ONLY]
    assert missing == [] and figures["attention"]["plain"] == "blocked"
    assert time.monotonic() - started < 300


# Signals


def start_driver(folder: Path) -> subprocess.Popen:
    """Start a driver of two parts in a process of its own."""
    code = (
        "import signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "from dev.gpu_battery.driver import BatterySettings, run_battery\n"
        "from dev.gpu_battery.driver import BatteryPart\n"
        "names = ('works', 'ignores_signals', 'exits')\n"
        "parts = [BatteryPart(name, 60, 'a fake', f'fixtures_battery:{name}') for name in names]\n"
        "run_battery(parts, BatterySettings(Path(sys.argv[1]) / 'out', Path(sys.argv[1]) / 'work', 300))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, cwd=ROOT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_battery_leaves_valid_results_and_no_process(tmp_path, number):
    """Whoever ends it, a scheduler or ^C: what was measured until then is kept."""
    driver = start_driver(tmp_path)
    records = tmp_path / "work" / "parts" / "ignores_signals" / "records.jsonl"
    assert wait_until(lambda: "pid" in read_records(records).results)
    pid = read_records(records).results["pid"]
    driver.send_signal(number)
    assert driver.wait(60) == 0
    parts = read_json(tmp_path / "out" / RESULTS_NAME)["parts"]
    assert parts["ignores_signals"]["reason"] == f"stopped by {number.name}"
    assert parts["ignores_signals"]["results"] == {"pid": pid}
    assert wait_until(lambda: not is_alive(pid))


def test_a_driver_that_is_killed_leaves_valid_results(tmp_path):
    """Nobody can end the part then, but what was known is on the disk; the part ends itself in time."""
    driver = start_driver(tmp_path)
    records = tmp_path / "work" / "parts" / "ignores_signals" / "records.jsonl"
    assert wait_until(lambda: "pid" in read_records(records).results)
    driver.kill()
    driver.wait()
    os.kill(read_records(records).results["pid"], signal.SIGKILL)
    parts = read_json(tmp_path / "out" / RESULTS_NAME)["parts"]
    assert parts["works"]["results"] == {"speed": NUMBERS}


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"parts": 3}', '{"format": 1, "parts": {"machine": 3}}']
)
def test_another_json_file_is_not_shown(tmp_path, text):
    """A sentence instead of a traceback for what is no results.json of a battery."""
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json: expected the results\.json of a battery"):
        dev.gpu_battery.__main__.main(["--show", str(tmp_path / "other.json")])


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    """A file of that name, or none at all."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"expected a folder to write to, found .*File exists"):
        dev.gpu_battery.__main__.main(["--out", str(tmp_path / "file"), "--parts", "machine", "--rehearse"])
    for options in (["--out", ""], ["--seconds", "nan"]):
        with pytest.raises(SystemExit):
            dev.gpu_battery.__main__.main(options)
    with pytest.raises(UserError, match="--parts: expected some of train_small"):
        dev.gpu_battery.__main__.main(["--parts", ","])
