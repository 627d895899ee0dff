"""Results of batteries on GPUs: entered once, shown from one file, and held against this machine."""

import json
import subprocess

import pytest
import torch
from fixtures_battery import made_up_report
from fixtures_model import ROOT

from common import UserError, read_json
from dev import bench
from dev.gpu_battery import __main__ as battery
from dev.gpu_battery import measurements, short
from dev.gpu_battery.measurements import NOTHING, PAGE, collect_figures, enter, format_page
from dev.pages import with_block
from dev.scaling import read_recipe_work
from formats.hardware import MEASUREMENTS, read_measurements


@pytest.fixture
def places(tmp_path):
    """Return a store that is not there yet and a copy of the page."""
    page = tmp_path / "page.md"
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(with_block(text, measurements.COMMAND, format_page([])))
    return tmp_path / "store.json", page


def enter_report(report: dict, places) -> str:
    """Enter a report; returns the page."""
    enter(places[1], report, *places)
    return places[1].read_text()


def test_the_page_is_made_from_the_store():
    """One source: nobody edits the table."""
    text = PAGE.read_text(encoding="utf-8")
    assert with_block(text, measurements.COMMAND, format_page(read_measurements())) == text
    assert read_json(MEASUREMENTS)["format"] == 1


def test_an_empty_page_says_that_nothing_was_measured(places):
    """Until the first battery of a GPU."""
    assert NOTHING in places[1].read_text()
    assert NOTHING not in enter_report(made_up_report(), places)


def test_the_main_figures_are_entered(places):
    """Whole steps from micro-steps and update, ratios where both sides ran, a dash for what did not."""
    text = enter_report(made_up_report(), places)
    found = read_measurements(places[0])[0]
    assert found["step_1061_ms"] == 8 * 130 + 10 and found["step_1061_low_ms"] == 8 * 90 + 6
    assert found["ratio_1061"] == pytest.approx(1.05)
    assert (found["step_naive_ms"], found["contest_naive_ms"], found["ratio_naive"]) == (400, None, None)
    assert found["calibration_s"] == 2.5  # of half a micro-batch: the whole did not fit
    assert found["not_ok"] == ["contest_naive"]
    assert (found["card"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.1")
    row = next(line for line in text.splitlines() if line.startswith("| NVIDIA"))
    for cell in ("2026-12-01 10:00:00, abc123", "2.11.0, 3.6.0", "1050, 1000, 1.05", "400, -, -", "0.25, 0.2",
                 "41.2, 9.8", "5.5", "lora_300 10,000", "2.5", "plain fa3, documents varlen"):  # fmt: skip
        assert cell in row


def test_a_battery_that_found_little_is_entered_too(places):
    """Whatever part failed: the others count."""
    report = made_up_report()
    report["parts"] = {"machine": {"status": "failed", "measures": "x"}}
    assert "| NVIDIA H100 80GB HBM3 | 2026-12-01 10:00:00, abc123 | -, - | -, -, - |" in enter_report(
        report, places
    )


def test_entries_are_sorted_and_entered_once(places):
    """By card and date, whatever the order in which they come; a second time changes nothing."""
    reports = [made_up_report("NVIDIA H200"), made_up_report(started="2026-12-02 08:00:00"), made_up_report()]
    pages = {enter_report(report, places) for report in reports + reports}
    assert len(pages) == 3
    dates = [(entry["card"], entry["date"]) for entry in read_measurements(places[0])]
    assert dates == sorted(dates) and len(dates) == 3
    changed = made_up_report()
    changed["parts"]["step_naive"]["results"]["loop"]["ms"] = 399.0
    assert "399, -, -" in enter_report(changed, places)
    assert len(read_measurements(places[0])) == 3


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"rehearsal": True}, "a rehearsal"), ({"card": "none"}, "one of a machine without a GPU")],
)
def test_what_no_gpu_ran_is_refused(places, tmp_path, changes, what):
    """Its numbers mean nothing."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up_report() | changes))
    with pytest.raises(UserError, match=f"results.json: expected a battery of a GPU, found {what}"):
        battery.main(["--enter", str(path)])
    assert not places[0].exists()


@pytest.mark.parametrize(
    "change", [{"card": None}, {"commit": 3}, {"started": None}, {"parts": {"machine": {}}}]
)
def test_an_incomplete_file_is_refused(places, tmp_path, change):
    """In one sentence, and nothing is entered."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up_report() | change))
    for action in ("--enter", "--show"):
        with pytest.raises(UserError, match=r"expected the results\.json of a battery, found another"):
            battery.main([action, str(path)])
    assert not places[0].exists()


def test_a_battery_of_the_cpu_build_is_refused(places, tmp_path):
    """Whatever its card's name has become."""
    report = made_up_report()
    report["parts"]["machine"]["results"]["versions"]["torch"] = "2.13.0+cpu"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(report))
    with pytest.raises(UserError, match="found one of a machine without a GPU"):
        battery.main(["--enter", str(path)])


def test_the_command_enters_a_file(places, tmp_path, monkeypatch, capsys):
    """As a person types it."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made_up_report()))
    monkeypatch.setattr(measurements.enter, "__defaults__", places)
    assert battery.main(["--enter", str(path)]) == 0
    assert "NVIDIA H100 80GB HBM3, 2026-12-01 10:00:00, commit abc123" in capsys.readouterr().out
    assert len(read_measurements(places[0])) == 1


# The short form


def lines_of(cards: int, report: dict | None = None) -> str:
    """Return what is said of a machine of so many cards."""
    return "\n".join(
        short.report_lines(collect_figures(report or made_up_report()), cards, read_recipe_work())
    )


def test_a_machine_is_held_against_the_contest_s():
    """Eight such cards are as fast as the contest's, one takes eight times as long."""
    said = lines_of(8)
    assert "140.0 ms a step, MFU 25.0 %, 41.2 GiB" in said
    assert said.count("as fast as the contest's 8xH100 SXM, 140.8 ms") == 1
    assert "some 4,954 in 596 s" in said
    assert (
        "50.0 ms a step, MFU 20.0 %" in said and "1.1x slower than the contest's 8xH100 SXM, 43.5 ms" in said
    )
    assert "some 498 s for the contest's text" in said
    alone = lines_of(1)
    assert "7.5x slower than the contest's 8xH100 SXM, 140.8 ms" in alone
    assert "some 3,988 s" in alone and "8.3x slower than the contest's 8xH100 SXM, 455 to 509 s" in alone


def test_cards_that_cannot_share_a_step_are_not_counted():
    """Six cards: four of them share eight micro-batches."""
    assert [short.used_cards(count) for count in (1, 2, 3, 4, 6, 7, 8, 16)] == [1, 2, 2, 4, 4, 4, 8, 8]
    assert "6 in this machine, 4 share a step" in lines_of(6)


def test_what_was_not_measured_is_not_made_up():
    """A part that ran out of time costs its lines."""
    report = made_up_report()
    for part in ("step_1061_full", "step_naive", "scoring"):
        report["parts"][part]["results"] = {}
    said = lines_of(1, report)
    assert "not measured" in said and "slower" not in said and "scoring" not in said


def test_a_ratio_is_said_in_words():
    """Slower, faster, or no difference that a second run would not have as well."""
    assert short.compare(160, 100) == "1.6x slower than"
    assert short.compare(50, 100) == "2.0x faster than"
    assert short.compare(104, 100) == "as fast as"


def test_a_card_is_held_against_those_that_were_entered():
    """One card against one card; not against itself."""
    ours, other = collect_figures(made_up_report()), collect_figures(made_up_report("NVIDIA H200"))
    said = short.compare_entries(ours, [ours, other | {"step_1061_ms": 525.0}])
    assert len(said) == 1 and "2.0x slower than NVIDIA H200 of 2026-12-01" in said[0]


def test_without_a_gpu_it_says_what_to_run(monkeypatch):
    """This machine may have one: it is taken away."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"--gpu: expected a GPU.*found none\. Run `make bench`.*`make doctor`"
    ):
        bench.main(["--gpu"])


def test_with_a_gpu_it_runs_the_chosen_parts_in_time(monkeypatch, capsys):
    """A stand-in battery: four parts, under three minutes in all."""
    asked = []

    def run_battery(parts, settings):
        asked.append(([part.name for part in parts], settings.seconds, settings.rehearse))
        return made_up_report()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(short, "run_battery", run_battery)
    bench.main(["--gpu"])
    names, seconds, rehearses = asked[0]
    assert set(names) == set(short.PARTS.split(",")) and seconds < 180 and not rehearses
    assert "8 in this machine, 8 share a step" in capsys.readouterr().out


def test_make_passes_gpu_on_and_needs_no_data():
    """GPU=1 asks for the short form; GPU=cu128 is still the name of constraints."""
    plain, asked, named = (
        subprocess.run(
            ["make", "-n", "bench", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for words in ([], ["GPU=1"], ["GPU=cu128"])
    )
    assert "dev.bench --gpu" in asked and "data.builtin" not in asked
    for said in (plain, named):
        assert "--gpu" not in said and "data.builtin" in said
