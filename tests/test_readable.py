"""The readable single file: what a recipe runs and no more, in the words of the source, and it runs alike."""

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fixtures_model import RECIPES, ROOT, run_python
from run_unchanged import shrink

import train_gpt
from formats.recipe import format_toml
from pack.layout import Layout, first_line, place, printed
from pack.names import Definition, bound_names, walk
from pack.program import Statement, read_sections
from pack.readable import arrange, for_readers, make_readable, write_readable

TRACK = ROOT / "records" / "track_10min_16mb"
NAIVE = TRACK / "2026-03-17_NaiveBaseline"
RICH = TRACK / "2026-04-30_ContextGrowth_3072"  # of all the recipes the one with the longest file
MOST_LINES = {NAIVE: 4370, RICH: 6430}


class Made(NamedTuple):
    """A recipe at the size of a test, what is left of the program, and the readable file."""

    recipe: Path
    statements: list[Statement]
    file: Path


def small_recipe(folder: Path, out: Path) -> Path:
    """Write the recipe of a folder at the size of a test."""
    recipe = shrink(read_sections(folder / "recipe.toml"))
    if not {"tilt_online", "running_lengths"} & recipe["eval"].keys():  # they exclude warm lanes
        recipe["eval"]["lora_warm_lanes"] = 2
    out.mkdir(exist_ok=True)
    (out / "recipe.toml").write_text(format_toml(recipe))
    return out / "recipe.toml"


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> Made:
    """Make the file of a recipe at the size of a test."""
    folder = tmp_path_factory.mktemp("readable")
    recipe = small_recipe(NAIVE, folder / NAIVE.name)
    statements = for_readers(recipe)
    (folder / "readable.py").write_text(arrange(statements, recipe))
    return Made(recipe, statements, folder / "readable.py")


def test_every_name_is_defined_once_and_sections_stand_in_order(readable):
    """Else the later one would win, and a reader would read the wrong one."""
    text = readable.file.read_text()
    tree = ast.parse(text)
    names = Counter(name for node in tree.body for name, _ in bound_names(node))
    names.pop("_", None)  # registered with a kernel
    assert [name for name, count in names.items() if count > 1] == []
    numbers = [int(found) for found in re.findall(r"^# (\d+) ", text, re.MULTILINE)]
    assert numbers == sorted(set(numbers)) and {1, 2, 3, 4, 5, 6, 7, 10, 11, 12} <= set(numbers)


def test_what_a_recipe_switches_off_is_not_there(readable):
    """A reader need not ask whether a class matters."""
    defined = {
        node.name for node in ast.parse(readable.file.read_text()).body if isinstance(node, Definition)
    }
    assert not defined & {"SmearGate", "BigramHash", "Swa", "Ema", "NgramTable", "LoraScorer"}
    assert {"GPT", "Muon", "train", "main"} <= defined


def test_the_file_is_formatted_and_not_too_long(readable):
    lines = readable.file.read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) <= MOST_LINES[NAIVE]


CHANGED = """
def f(
    x: Tensor,  # (B, T)
    unread,  # gone
):
    # why it is done
    if KNOWN:
        y = g(  # all of it
            x,
            # the first row
            first=1,
        )
        # the second row
        second(KNOWN)  # of two
    elif x:
        y = 0
    try:
        y = h(x, [1,
            2])  # as it is
    except ValueError:  # when it fails
        y = KNOWN
    return y  # (B, D)
"""
PRINTED = """
def f(x: Tensor  # (B, T)
):
    # why it is done
    y = g(x)  # all of it
    # the second row
    second(3)  # of two
    try:
        y = h(x, [1,
            2])  # as it is
    except ValueError:  # when it fails
        y = 3
    return y  # (B, D)
"""


def test_a_changed_function_keeps_the_words_and_comments_of_what_stays():
    """An unread parameter, a decided branch, a dropped argument and constants, with the comments of each."""
    tree = ast.parse(CHANGED)
    function = tree.body[0]
    del function.args.args[1]
    first, second = function.body[0].body
    del first.value.keywords[0]
    second.value.args = [ast.Constant(3)]
    function.body[1].handlers[0].body[0].value = ast.Constant(3)
    function.body[:1] = [first, second]
    assert "\n".join(Layout(CHANGED).statement(function, 0)).strip() == PRINTED.strip()


@pytest.mark.parametrize(
    "text",
    [
        "f'" + "some words {a['b c']} and {{braces}} " * 4 + "{x!r:>{width}}'",
        "'" + "{no field} " * 12 + "'",
        "f'" + "a line with {fields}\\n" * 8 + "'",
    ],
)
def test_long_strings_are_cut_between_words_and_behind_line_ends(text):
    node = ast.parse("x = " + text.replace("['b c']", '["b c"]')).body[0]
    made = printed(node)
    assert ast.unparse(ast.parse(made)) == ast.unparse(node)
    pieces = re.split(r"(?<=['\"]) (?=f?['\"])", made)
    assert len(pieces) > 1 and max(map(len, pieces)) <= 100


def test_docstrings_comments_and_annotations_stay(readable):
    """What explains a statement that stays, stays with it."""
    text = readable.file.read_text()
    source = (ROOT / "train_gpt.py").read_text()
    trees = [
        {node.name: node for node in ast.parse(one).body if isinstance(node, Definition)}
        for one in (source, text)
    ]
    for name in trees[0].keys() & trees[1].keys():
        assert ast.get_docstring(trees[1][name]) == ast.get_docstring(trees[0][name])
    assert "# (B, T, " in text and ") -> Tensor:" in text
    kept, lost = comments_kept(readable)
    assert kept / (kept + len(lost)) > 0.95, lost


def comments_kept(made: Made) -> tuple[int, list[str]]:
    """Count the comments of statements that are left, changed or not, that the file has; list the others."""
    left = Counter(Layout(made.file.read_text()).comments.values())
    kept, lost = 0, []
    for label in {statement.label for statement in made.statements if statement.label.endswith(".py")}:
        inner = [node for one in made.statements if one.label == label for node in walk(one.node)]
        survivors = {place(node) for node in inner if isinstance(node, ast.stmt)}
        for comment, owner in comment_owners(Layout((ROOT / label).read_text())):
            if place(owner) not in survivors or re.match(r"# -{20,}$", comment):
                continue
            if left[comment]:
                kept += 1
            else:
                lost.append(f"{label}:{owner.lineno}: {comment}")
            left[comment] -= 1
    return kept, lost


def comment_owners(layout: Layout) -> Iterator[tuple[str, ast.stmt]]:
    """Yield each comment and the innermost statement on whose lines, or right above which, it stands."""
    owner: dict[int, ast.stmt] = {}
    statements = [node for node in walk(layout.tree) if isinstance(node, ast.stmt)]
    for node in sorted(statements, key=lambda node: (first_line(node), -node.end_lineno)):
        for number in range(layout.code_above(first_line(node)) + 1, node.end_lineno + 1):
            owner[number] = node
    for number, text in layout.comments.items():
        if number in owner:
            yield text, owner[number]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads for matrices of this size only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_runs_alike(recipe: Path, file: Path, data: Path, folder: Path, monkeypatch) -> None:
    """Train and score with the file and with the checkout, and compare to the last bit."""
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (0, ""))
    free = [f"data.data_path={data}", f"data.tokenizer_path={data}/tokenizer.model", f"run.out_dir={folder}"]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = run_python(file, *free, "run.run_id=readable", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    train_gpt.main(["--recipe", str(recipe), *free, "run.run_id=checkout"])
    folders = [folder / name for name in ("readable", "checkout")]
    texts = [(one / "metrics.jsonl").read_text() for one in folders]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    losses = [[(row.get("train_loss"), row.get("val_loss")) for row in one] for one in rows]
    assert losses[0] == losses[1] and len(losses[0]) >= 6
    results = [json.loads((one / "result.json").read_text()) for one in folders]
    for key in ("artifact_sha256", "config_hash"):
        assert results[0][key] == results[1][key]
    assert results[0]["score"]["val_loss"] == results[1]["score"]["val_loss"]


def test_it_trains_writes_its_artifact_and_scores_as_the_checkout_does(
    readable, tiny_data, tmp_path, monkeypatch, one_thread
):
    """To the last bit: what is read is what ran."""
    check_runs_alike(readable.recipe, readable.file, tiny_data, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_has_a_readable_file_that_runs_alike(path, tiny_data, tmp_path, monkeypatch, one_thread):
    """The same for all recipes in records/."""
    small = small_recipe(path.parent, tmp_path / path.parent.name)
    file = tmp_path / "readable.py"
    file.write_text(make_readable(small))
    check_runs_alike(small, file, tiny_data, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("folder", MOST_LINES, ids=lambda folder: folder.name)
def test_at_full_size_the_file_compiles_and_is_not_too_long(folder, tmp_path):
    report = write_readable(folder / "recipe.toml", tmp_path / "readable.py")
    assert 3000 < report.lines <= MOST_LINES[folder]
