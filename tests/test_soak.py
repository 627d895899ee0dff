"""The campaign notices what it looks for: lost state, orphans, tracebacks, leftovers; its report is true."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

import dev.soak.__main__ as soak
from common import UserError, read_json, write_json
from dev.soak import flips
from dev.soak.child import Fault
from dev.soak.driver import Campaign, Settings, run_campaigns, status_of
from dev.soak.place import Bench, check_dataset, make_dataset
from dev.soak.process import Miss, marked, split_tracebacks
from dev.soak.report import PAGE, enter, format_plain, make_report

OURS = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    1 / 0\nZeroDivisionError: no\n'
TORCHRUNS = (
    "Traceback (most recent call last):\n"
    '  File "/x/torch/distributed/run.py", line 9, in main\n    run(args)\n'
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
)
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="the campaign needs Linux")


def rows_of(*cases, tries=1, seconds=0.0):
    """Run campaigns of these cases; returns the rows of the report."""
    asked = [(Campaign(case.__name__, "it holds", case, tries), tries) for case in cases]
    rows, _ = run_campaigns(asked, Settings(1, seconds, False))
    return [row.as_json() for row in rows]


def holds(rng, bench, place, most):
    return 1


def test_tracebacks_of_the_launcher_are_told_from_ours():
    """torchrun prints its own whenever a rank is lost; ours are bugs."""
    assert split_tracebacks(f"fine\n{TORCHRUNS}\n{OURS}more") == (["ZeroDivisionError: no"], 1)
    ranked = "".join(f"[rank1]: {line}\n" for line in OURS.splitlines())
    assert split_tracebacks(ranked)[0] == ["[rank1]: ZeroDivisionError: no"]
    assert split_tracebacks("all is well\n") == ([], 0)


def test_only_a_campaign_that_tried_all_and_lost_nothing_has_passed():
    """Half a campaign is no campaign."""
    whole = {"campaign": "kills", "asked": 3, "tried": 3, "survived": 3}
    assert status_of([whole]) == "passed"
    assert status_of([whole, whole | {"tried": 2, "survived": 2}]) == "not all was tried: kills 2 of 3"
    assert status_of([whole | {"survived": 2}, whole | {"tried": 2, "survived": 2}]) == "failed"


def test_misses_errors_of_files_and_time_are_counted():
    """A missing file is what should have been written."""

    def misses(rng, bench, place, most):
        raise Miss("it was lost")

    def finds_no_file(rng, bench, place, most):
        (place.folder / "result.json").read_bytes()

    found = rows_of(holds, misses, finds_no_file, tries=2)
    assert [(row["tried"], row["survived"]) for row in found] == [(2, 2), (2, 0), (2, 0)]
    assert found[1]["misses"] == ["it was lost"] * 2
    assert "FileNotFoundError" in found[2]["misses"][0]
    assert rows_of(holds, tries=10**9, seconds=0.2)[0]["tried"] < 10**9


def test_the_manifest_may_change_in_words_alone(tmp_path):
    """A flip in a name of a source decides nothing; one in a hash does, and so does one that breaks JSON."""
    folder = make_dataset(tmp_path / "data")
    check_dataset(folder)
    blob = (folder / "manifest.json").read_bytes()
    sound = flips.what_matters(blob)
    assert flips.what_matters(blob.replace(b"dev.soak", b"dfv.soak")) == sound
    sha256 = read_json(folder / "manifest.json")["val"]["shards"][0]["sha256"].encode()
    assert flips.what_matters(blob.replace(sha256, sha256[::-1])) != sound
    assert flips.what_matters(blob[:-3]) is None
    shard = folder / "fineweb_val_000000.bin"
    shard.write_bytes(flips.flip_bit(random.Random(1), shard.read_bytes()))
    with pytest.raises(Miss, match="the dataset is mixed: fineweb_val_000000"):
        check_dataset(folder)


def test_a_report_is_entered_into_the_page(tmp_path):
    """Date, machine and numbers; another JSON file is refused."""
    page, file = tmp_path / "page.md", tmp_path / "soak.json"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    report = make_report(rows_of(holds, tries=3), 7, {"disks: a mounted tmpfs": "2"})
    write_json(file, report)
    enter(file, page)
    text = page.read_text(encoding="utf-8")
    assert "| holds | it holds | 3 | 3 | 0 |" in text
    assert f"{report['date']}, " in text and "seed 7; passed. disks: a mounted tmpfs: 2." in text
    assert "status: passed, seed 7" in format_plain(report)
    assert os.uname().nodename not in file.read_text(encoding="utf-8")
    write_json(file, {"format": 1})
    with pytest.raises(UserError, match=r"expected what `python -m dev\.soak --json` writes"):
        enter(file, page)


def test_an_unknown_campaign_is_named():
    """With those that there are."""
    with pytest.raises(UserError, match=r"--only: expected some of kills, .*, found kils"):
        soak.main(["--only", "kils"])


@pytest.mark.slow
def test_faults_happen_where_they_are_ordered_and_orphans_are_found(tmp_path):
    """A kill inside a write leaves the temporary and no shard; what outlives its case is seen and ended."""
    bench = Bench(tmp_path / "bench", 1)
    place = bench.open_place("case")
    place.data = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 200)
    words = "prepare", "--input", str(text), "--val-input", str(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("other words\n" * 20)
    words += "--tokenizer", str(bench.data / "tokenizer.model"), "--out", str(place.data)
    job = place.start(*words, faults=[Fault("file:fineweb_val_*", "stall", value=60)])
    assert job.wait_for("soak: stalls")
    assert list(marked(place.mark)) == [job.process.pid]
    job.send(signal.SIGKILL)
    assert job.end() == -signal.SIGKILL
    assert marked(place.mark) == {}
    job = place.start(*words, faults=[Fault("replace", "kill")])
    assert job.end() == -signal.SIGKILL
    with pytest.raises(Miss, match="left behind"):
        place.check_temporaries()

    def leaves_a_process(rng, bench, place, most):
        bench.place = place
        place.start(*words, faults=[Fault("file:*", "stall", value=60)]).wait_for("soak: stalls")
        return 1

    begun = time.monotonic()
    assert "a process is left: " in rows_of(leaves_a_process)[0]["misses"][0]
    assert time.monotonic() - begun < 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_campaign_loses_nothing(tmp_path):
    """All campaigns in two minutes or so; `make soak` is the whole."""
    counts = {"kills": 8, "flips": 110, "signals": 3, "restarts": 1, "disk-full": 3, "writers": 4}
    words = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    file = tmp_path / "soak.json"
    status = soak.main([*words, "--seed", "3", "--json", str(file)])
    report = read_json(file)
    assert [row["misses"] for row in report["rows"]] == [[]] * 6
    assert (status, report["status"]) == (0, "passed")
