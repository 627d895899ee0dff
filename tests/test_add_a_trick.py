"""docs/add-a-trick.md: its patches apply, touch as few places as promised, and a place left out is found."""

import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
from fixtures_model import ROOT, run_python

PAGE = ROOT / "docs" / "add-a-trick.md"
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "runs", "datasets", "logs")


class Example(NamedTuple):
    """A patch: {words of its hunks at one place: what a test says without that place}, and these tests."""

    places: dict[str, str]
    tests: str


EXAMPLES = {
    "gate": Example(
        {
            "value_gate: bool": "unknown field 'model.value_gate'",
            "class ValueGate": "name 'ValueGate' is not defined",
            "self.value_gate": "matches no parameter",
            'Rule("blocks.*.attn.value_gate': "has no row in PARAM_RULES",
            '"model.value_gate": True': "model.value_gate",
            "| value gate |": "model.value_gate: add its row to docs/features.md",
        },
        "test_architecture test_switches test_docs",
    ),
    "optimizer": Example(
        {
            '"lion": "the sign / lion_beta: float': "unknown field 'optim.lion_beta'",
            "class Lion": "name 'Lion' is not defined",
            '"lion": Lion': "test_every_optimizer_of_a_recipe_has_its_row",
            '("muon", "lion")': "optim.lion_beta",
        },
        "test_optim test_switches",
    ),
    "quantizer": Example(
        {
            '"search": "round': "test_every_method_of_a_recipe_has_its_quantizer",
            "def search_matrices / search_matrices, False / import Tensor": "KeyError: 'search'",
            "a_searched_clip / METHODS, QuantConfig": "quant.method=search",
        },
        "test_quantizers test_switches",
    ),
    "scorer": Example(
        {
            '"full": "every target': "test_every_mode_of_a_recipe_has_its_scorer",
            "def plan_full / Scorer(plan_full": "KeyError: 'full'",
            '"full": {} / "full": 1': "eval.mode=full",
        },
        "test_legality test_sliding test_switches",
    ),
}


def read_hunks(name: str) -> list[tuple[str, str]]:
    """Read a patch as (file header, hunk) pairs."""
    hunks = []
    for part in re.split(r"(?m)^(?=diff )", (ROOT / "docs" / "patches" / f"{name}.patch").read_text())[1:]:
        header, *bodies = re.split(r"(?m)^(?=@@ )", part)
        hunks += [(header, body) for body in bodies]
    return hunks


def get_place(hunk: str, places: dict[str, str]) -> str:
    """Say which place a hunk is part of."""
    added = "".join(line for line in hunk.splitlines(keepends=True) if line.startswith("+"))
    found = [place for place in places if any(words in added for words in place.split(" / "))]
    assert len(found) == 1, f"{found} in\n{added}"
    return found[0]


def apply(patch: str, folder, *options: str) -> subprocess.CompletedProcess:
    """Apply a patch to the files of a folder."""
    command = ["git", "apply", *options, "-"]
    return subprocess.run(command, cwd=folder, input=patch, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_touches_the_places_that_the_page_counts(name):
    """One hunk or two a place; the page says how many places and what a test says without each."""
    places = EXAMPLES[name].places
    assert {get_place(hunk, places) for _, hunk in read_hunks(name)} == set(places)
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    section = next(text for text in sections if f"(patches/{name}.patch)" in text)
    assert f": {len(places)} places\n" in section
    for said in places.values():
        assert said in section


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_still_applies(name):
    """Whoever moves the code that it extends makes the patch anew: apply it by hand, `git diff`.

    Slow, because it fails for whoever has applied one or added a trick of their own beside it.
    """
    if shutil.which("git") is None:
        pytest.skip("expected git, which applies patches; found none")
    done = apply("".join(header + hunk for header, hunk in read_hunks(name)), ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left_out"), [(name, place) for name in EXAMPLES for place in ("", *EXAMPLES[name].places)]
)
def test_a_place_left_out_is_found(tmp_path, name, left_out):
    """With all places its tests pass; without one, one of them fails and says what the page says."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=LEFT_BEHIND)
    places, tests = EXAMPLES[name]
    kept = [(header, hunk) for header, hunk in read_hunks(name) if get_place(hunk, places) != left_out]
    for header, hunk in kept:
        done = apply(header + hunk, folder, "--recount")
        assert done.returncode == 0, done.stderr
    files = [f"tests/{test}.py" for test in tests.split()]
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *files, cwd=folder
    )
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (not left_out), said
    assert not left_out or places[left_out] in said
