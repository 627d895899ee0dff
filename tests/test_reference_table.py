"""The table of the reference systems: ids sorted by what happened to them, counts, and what is left out."""

import json

import pytest
from run_reference import (
    ARITHMETIC,
    NUM_CHECKS,
    RECIPES,
    Recorder,
    ReferenceCheck,
    count_parameters,
    format_row,
    sort_ids,
    verdict,
)

FACTS = {"twin": "D", "artifact_loss": 5.0, "unigram_entropy": 6.0, "quantization_gap": 0.01}
FACTS |= {"payload_bytes": 9000, "artifact_bytes": 4000, "code_bytes": 1000, "total_bytes": 5000}
FACTS |= {"step_ms": 7.5}
TESTS = """
import pytest

@pytest.mark.reference("D1")
@pytest.mark.reference("D2")
def test_passes(): pass

@pytest.mark.reference("D2")
def test_fails(): assert False

@pytest.mark.reference("D3")
def test_skips(): pytest.skip("no corpora")

@pytest.mark.slow
@pytest.mark.reference("D4")
def test_slow(): assert False

def test_other(): assert False

@pytest.mark.reference("D-twin")
def test_twin(record_property):
    record_property("twin", 'FACTS')

@pytest.mark.reference("D-small-twin")
def test_twin_that_fails(): assert False

@pytest.mark.reference("C1")
def test_of_another_system(): assert False
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Recorder:
    """What a small test file leaves."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "test_checks.py").write_text(TESTS.replace("FACTS", json.dumps(FACTS)))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: s\n    reference(id): r\n")
    found = Recorder(("D",))
    arguments = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    pytest.main([*arguments, "-c", str(folder / "pytest.ini"), str(folder)], plugins=[found])
    return found


def test_ids_are_sorted_by_what_happened_to_their_tests(recorder):
    """One failed test fails its id; reasons stay; tests of no id are not run."""
    rows = sort_ids("D", recorder.outcomes)
    assert (rows["passed"], rows["failed"], rows["arithmetic"]) == (
        ["D1"],
        ["D2", "D-small-twin"],
        ["D8"],
    )
    assert rows["skipped"][0].startswith("D3 (") and "no corpora" in rows["skipped"][0]
    assert rows["skipped"][1:3] == ["D4 (slow: --slow runs it)", "D5 (no test)"]
    assert sum(map(len, rows.values())) == 11 + 1  # the twin that failed


def test_a_row_says_what_was_counted(recorder):
    """Parameters, counts without arithmetic, and the twin's loss."""
    row = format_row("D", sort_ids("D", recorder.outcomes), recorder.twins)
    assert "372,904,960 of 372,904,960 expected" in row and "1 of 10 passed" in row
    assert "D: loss 5.0 nats a token, single tokens 6.0, quantization +0.01" in row
    assert "9,000 bytes of weights -> 4,000 + code 1,000 = 5,000, 7.5 ms a step" in row
    assert "not measured" in row and "C1" not in recorder.outcomes


@pytest.mark.parametrize(
    "outcomes, expected",
    [
        (("passed", "skipped"), "passed"),
        (("passed", "failed"), "failed"),
        (("skipped",), "skipped"),
        ((), "skipped"),
    ],
)
def test_an_id_is_as_good_as_its_worst_test_that_ran(outcomes, expected):
    """A skipped part does not hide a pass, a pass does not hide a failure."""
    assert verdict([ReferenceCheck(outcome) for outcome in outcomes]).outcome == expected


@pytest.mark.parametrize("folder, expected", [pair for rows in RECIPES.values() for pair in rows.items()])
def test_recipes_have_their_published_counts(folder, expected):
    """What the table compares."""
    assert count_parameters(folder) == expected


def test_arithmetic_ids_are_ids():
    """None is listed twice or outside its system."""
    for system, names in ARITHMETIC.items():
        assert set(names) <= {f"{system}{n}" for n in range(1, NUM_CHECKS[system] + 1)}
