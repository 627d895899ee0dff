"""One reader of what runs and records left: finished, half-written, altered, of other versions."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_model import ROOT
from fixtures_runs import LEDGER, write_run

from common import UserError, read_json
from dev.desk import extras
from dev.desk.runs import check_page, read_audit, read_record, read_run, read_runs

RECORD = ROOT / "records" / "track_cpu" / "2026-11-21_NaiveBaseline"


def test_a_finished_run_is_read_whole(tmp_path):
    """Every number is the folder's own."""
    run = read_run(write_run(tmp_path / "a", 7, 2.25))
    assert (run.name, run.kind, run.state, run.seed, run.notes) == ("a", "run", "finished", 7, ())
    assert run.val_bpb == 2.25 and run.ledger == dict(LEDGER)
    assert [event["step"] for event in run.events if event["kind"] == "train"] == list(range(1, 41))
    assert run.recipe["model.num_layers"] == 3 and run.origin["machine"]["cpu"] == "one"


def test_an_unfinished_run_with_half_a_line_is_read_up_to_it(tmp_path):
    """A training that goes on, or was killed, is no error."""
    folder = write_run(tmp_path / "a", 7, None)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    run = read_run(folder)
    assert run.state == "unfinished" and run.val_bpb is None and run.seed == 7
    assert len(run.events) == 40 and any("cut off" in note for note in run.notes)


def test_an_altered_event_ends_what_is_read(tmp_path):
    """Its number and all after it are nobody's."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"step": 4', '"step": 5')
    path.write_text("".join(lines))
    run = read_run(folder)
    assert len(run.events) == 3 and any("metrics.jsonl:4" in note for note in run.notes)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"score": 3}', '{"score": {"val_bpb": "1.2"}}', '{"score": {}}', "\xff"],
)
def test_a_broken_result_is_a_note(tmp_path, content):
    """No traceback, and the run counts as unfinished."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "result.json").write_text(content, encoding="latin-1")
    run = read_run(folder)
    assert run.state == "unfinished" and any("result.json" in note for note in run.notes)


def test_an_altered_result_is_shown_and_said_to_be(tmp_path):
    """Who mended a number by hand must see that it was seen."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    path = folder / "result.json"
    path.write_text(path.read_text().replace("2.25", "1.25"))
    run = read_run(folder)
    assert run.val_bpb == 1.25 and any("altered" in note for note in run.notes)


def test_odd_rows_of_a_ledger_are_left_out(tmp_path):
    """Other versions may have written other shapes."""
    changes = {"ledger": [["code", 5], "x", [1, 2, 3], ["odd", "big"]], "seconds": [1, 2]}
    run = read_run(write_run(tmp_path / "a", 7, 2.25, changes=changes))
    assert run.ledger == {"code": 5} and run.result["seconds"] == {}


def test_without_metrics_the_log_tells(tmp_path):
    """A packed program leaves a log and no events."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert [event["step"] for event in run.events] == [1, 8, 15, 22, 29, 36, 40]


def test_a_measurement_of_weights_is_its_own_kind(tmp_path):
    """Its score is not an artifact's."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "result.json").rename(folder / "weights.json")
    run = read_run(folder)
    assert (run.kind, run.state, run.val_bpb) == ("weights", "finished", 2.25)


def test_a_record_gives_a_run_a_seed():
    """With the scores of submission.json, the curves of the logs, and one artifact."""
    runs, facts = read_record(RECORD), read_json(RECORD / "submission.json")
    assert [run.seed for run in runs] == facts["seeds"]
    for run in runs:
        row = facts["seed_results"][str(run.seed)]
        assert run.val_bpb == row["val_bpb"] and sum(run.ledger.values()) == row["artifact_bytes"]
        assert run.result["train_ms"] == pytest.approx(1000 * row["train_time_s"], abs=1)
        assert len(run.events) > 10 and run.kind == "record"
    assert [run.seed for run in runs if run.artifact] == [1337]
    assert {check["verdict"] for check in read_audit(RECORD)} == {"PASS", "NOT RUN"}


def test_a_run_with_a_readme_is_a_run(tmp_path):
    """Somebody may describe a run in its folder."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "README.md").write_text("# my run\n")
    assert read_run(folder).kind == "run"


def test_a_recipe_without_scores_says_so():
    """Most records of the large track were not run here."""
    (run,) = read_record(ROOT / "records" / "track_10min_16mb" / "2026-03-17_NaiveBaseline")
    assert run.state == "unfinished" and run.seed is None and "nobody has run it" in run.notes[-1]


@pytest.mark.parametrize("content", ["[]", "{", '{"seed_results": 3}', '{"seed_results": {"1": 3, "x": {}}}'])
def test_a_broken_submission_is_a_note_or_no_score(tmp_path, content):
    """A record half copied is read as far as it goes."""
    (tmp_path / "submission.json").write_text(content)
    (run,) = read_record(tmp_path)
    assert run.val_bpb is None


def test_folders_are_searched_and_nothing_is_read_twice(tmp_path):
    """runs/ and a run in it are one run; names that repeat get their folders."""
    for name in ("x/seed1", "y/seed1", "y/seed2"):
        write_run(tmp_path / name, 1, 2.25)
    runs = read_runs([tmp_path / "x", tmp_path, tmp_path / "y" / "seed2" / "result.json"])
    assert [run.name for run in runs] == ["x/seed1", "y/seed1", "seed2"]


def test_a_copy_of_a_run_is_the_run(tmp_path):
    """One artifact and seed is one training, wherever it is filed."""
    write_run(tmp_path / "a", 1, 2.25, changes={"artifact_sha256": "ab"})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert len(read_runs([tmp_path])) == 1


def test_strange_names_are_names(tmp_path):
    """Spaces, letters beyond ASCII, line ends, markup."""
    write_run(tmp_path / "a b\u00e9/x\n<y>", 1, 2.25)
    (run,) = read_runs([tmp_path])
    assert run.name == "x\n<y>"


def test_a_name_that_holds_no_run_is_an_error(tmp_path):
    """A typo must not give an empty report."""
    with pytest.raises(UserError, match="expected a run"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="no such file"):
        read_runs([tmp_path / "nothing"])


def test_the_reader_needs_no_torch():
    """A live view must start at once."""
    code = "import sys, dev.desk.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    """The sentence is what there is to do."""
    assert extras.require("json") is json
    with pytest.raises(UserError, match=r"package no_such_thing.*make desk, or pip install '\.\[desk\]'"):
        extras.require("no_such_thing.inner")
    (tmp_path / "half_there.py").write_text("import not_here_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"found one without not_here_at_all.*make gpu"):
        extras.require("half_there", "gpu")


def test_unreadable_places_are_notes(tmp_path):
    """A folder where a file should be."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "train.log").unlink()
    (folder / "recipe.toml").write_text("[model\n")
    run = read_run(folder)
    assert run.log is None and run.recipe == {} and len(run.notes) == 2
    assert Path(run.folder).is_dir() and run.state == "finished"


ODD = {
    "score": {"val_bpb": 1.5, "val_loss": "y", "seconds": "x", "num_bytes": -1, "invalid": 4},
    "ledger": {"a": "b"}, "seconds": 3, "train_ms": "q", "steps": "many", "origin": 5, "over_limits": 7,
    "places": [1], "tokens_per_second": "z", "seed": [1], "resumed_at": 2, "calibration_ms": math.nan,
}  # fmt: skip


def test_fields_of_another_kind_are_left_out_and_noted(tmp_path):
    """What remains can be counted with; null is not told."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    (folder / "result.json").write_text(json.dumps(ODD | {"config_hash": None}))
    recipe = "[run]\nmax_wallclock_seconds = 'NaN'\niterations = nan\n[schedule]\nstages = [[1]]\n"
    (folder / "recipe.toml").write_text(recipe + "warp = 1\n")
    run = read_run(folder)
    assert run.score == {"val_bpb": 1.5} and run.ledger == {} and run.recipe == {"schedule.warp": 1}
    assert run.result["seconds"] == {} and "steps" not in run.result and "origin" not in run.result
    said = [note for note in run.notes if "something else" in note]
    assert len(said) == 3 and "over_limits" in said[0] and "config_hash" not in said[0]
    (folder / "result.json").write_text(json.dumps({"score": {"val_bpb": 1.5}, "origin": {"machine": 3}}))
    assert read_run(folder).origin == {}


def test_a_records_log_tells_of_its_limits(tmp_path):
    """Over, kept, or not told."""
    rows = {seed: {"val_bpb": 1.5, "val_loss": "x"} for seed in "123"}
    (tmp_path / "submission.json").write_text(json.dumps({"seed_results": rows}))
    ledger = "bytes of the submission\n  code           900 bytes\n  total       900 bytes\n"
    (tmp_path / "train_seed3.log").write_text(ledger)  # of a version that drew up no clock
    ledger += "training clock\n  training          9.0 s\n  total       9.0 s\n"
    (tmp_path / "train_seed1.log").write_text(ledger)
    (tmp_path / "train_seed2.log").write_text(ledger + "NOT A VALID RUN: bytes 9 of 5; training 7 s of 6\n")
    found = [run.result.get("over_limits") for run in read_record(tmp_path)]
    assert found == [[], ["bytes 9 of 5", "training 7 s of 6"], None]


@pytest.mark.parametrize("name", ["", ".", "metrics.jsonl", "/dev/stdout", "page.html", "a.html", "x.HTM"])
def test_a_page_replaces_nothing_but_a_page(tmp_path, monkeypatch, name):
    """Neither what runs are made of, nor a text that is read, a folder or a device."""
    monkeypatch.chdir(tmp_path)
    Path("page.html").mkdir()
    Path("a.html").write_text("text to read")
    with pytest.raises(UserError, match="--out"):
        check_page(Path(name), [Path("a.html")])
    with pytest.raises(UserError, match="a file that is read"):
        check_page(ROOT / "dev" / "report" / "page.html")
    check_page(Path("b.html"), [Path("a.html")])
