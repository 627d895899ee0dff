"""The readable single file: what a recipe runs and no more, in the words of the source, and it runs alike."""

import ast
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from fixtures_model import RECIPES, ROOT, run_python
from run_unchanged import shrink

import train_gpt
from formats.recipe import format_toml
from pack.__main__ import main
from pack.layout import Printer, SourceText, comment_owners
from pack.names import Definition, bound_names, walk
from pack.program import read_sections
from pack.readable import make_readable

TRACK = ROOT / "records" / "track_10min_16mb"
NAIVE, SMEAR = TRACK / "2026-03-17_NaiveBaseline", TRACK / "2026-03-20_Int6_MLP3x_SmearGate_BigramHash"
RICH = TRACK / "2026-04-30_ContextGrowth_3072"  # of all the recipes the one with the longest file
MOST_LINES = {NAIVE: 4050, SMEAR: 4350, RICH: 5760}
ABSENT = {
    NAIVE: "SmearGate BigramHash Swa Ema NgramTable CalibrationStats LoraScorer",
    SMEAR: "NgramTable CalibrationStats LoraScorer",
}


def small_recipe(folder: Path, out: Path) -> Path:
    """Write the recipe of a folder at the size of a test."""
    recipe = shrink(read_sections(folder / "recipe.toml"))
    if not recipe["eval"].get("tilt_online"):  # hints exclude warm lanes
        recipe["eval"]["lora_warm_lanes"] = 2
    out.mkdir(exist_ok=True)
    (out / "recipe.toml").write_text(format_toml(recipe))
    return out / "recipe.toml"


@pytest.fixture(scope="module", params=[NAIVE, SMEAR], ids=["naive", "smear"])
def readable(request, tmp_path_factory):
    """Make the file of a recipe at the size of a test: (folder of the recipe, small recipe, file)."""
    folder = tmp_path_factory.mktemp("readable")
    recipe = small_recipe(request.param, folder / request.param.name)
    main(["--recipe", str(recipe), "--readable", "--out", str(folder / "readable.py")])
    return request.param, recipe, folder / "readable.py"


def test_every_name_is_defined_once_and_sections_stand_in_order(readable):
    """Else the later one would win, and a reader would read the wrong one."""
    text = readable[2].read_text()
    tree = ast.parse(text)
    names = Counter(name for node in tree.body for name, _ in bound_names(node))
    names.pop("_", None)  # registered with a kernel
    assert [name for name, count in names.items() if count > 1] == []
    numbers = [int(found) for found in re.findall(r"^# (\d+) ", text, re.MULTILINE)]
    assert numbers == sorted(set(numbers)) and {1, 2, 3, 4, 5, 6, 7, 10, 11, 12} <= set(numbers)


def test_what_a_recipe_switches_off_is_not_there(readable):
    """A reader need not ask whether a class matters."""
    folder, _, file = readable
    defined = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, Definition)}
    assert not defined & set(ABSENT[folder].split())
    assert "BigramHash" in defined or folder == NAIVE
    assert {"GPT", "Muon", "train", "main"} <= defined


def test_the_file_is_formatted_and_not_too_long(readable):
    folder, _, file = readable
    lines = file.read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) <= MOST_LINES[folder]


CHANGED = """
def f(x, unread):  # (B, T)
    # why it is done
    if KNOWN:
        y = g(  # all of it
            x,
            # the first row
            first=1,
            # the second row
            second=KNOWN,  # of two
        )
    else:
        y = 0  # none
    return y  # (B, D)
"""
PRINTED = """
def f(x):  # (B, T)
    # why it is done
    y = g(  # all of it
        x,
        # the second row
        second=3,  # of two
    )
    return y  # (B, D)
"""


def test_a_changed_function_keeps_the_words_and_comments_of_what_stays():
    """An unread parameter, a decided branch, a dropped argument and a constant, with the comments of each."""
    tree = ast.parse(CHANGED)
    function = tree.body[0]
    del function.args.args[1]
    call = function.body[0].body[0].value
    del call.keywords[0]
    call.keywords[0].value = ast.copy_location(ast.Constant(3), call.keywords[0].value)
    function.body[:1] = function.body[0].body
    lines = Printer(SourceText(CHANGED), tree.body).statement(function, 0)
    assert "\n".join(lines).strip() == PRINTED.strip()


def test_docstrings_comments_and_annotations_stay(readable):
    """What explains a statement that stays, stays with it."""
    text = readable[2].read_text()
    source = (ROOT / "train_gpt.py").read_text()
    trees = [
        {node.name: node for node in ast.parse(one).body if isinstance(node, Definition)}
        for one in (source, text)
    ]
    for name in trees[0].keys() & trees[1].keys():
        assert ast.get_docstring(trees[1][name]) == ast.get_docstring(trees[0][name])
    assert "# (B, T, " in text and ") -> Tensor:" in text
    kept, lost = comments_kept(readable[2])
    assert kept / (kept + lost) > 0.97


def comments_kept(file: Path) -> tuple[int, int]:
    """Count the comments of surviving statements that are in a readable file, and those that are not."""
    text = file.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    left = Counter(token.string for token in tokens if token.type == tokenize.COMMENT)
    found = {ast.unparse(node) for node in walk(ast.parse(text)) if isinstance(node, ast.stmt)}
    labels = re.findall(r"^# (\S+\.py)$", text, re.MULTILINE)
    kept = lost = 0
    for label in {*labels, "train_gpt.py"}:
        for comment, owner in comment_owners(SourceText((ROOT / label).read_text())):
            if re.match(r"# -{20,}$", comment) or ast.unparse(owner) not in found:
                continue
            kept, lost = kept + (left[comment] > 0), lost + (left[comment] == 0)
            left[comment] -= 1
    return kept, lost


def check_runs_alike(recipe: Path, file: Path, data: Path, folder: Path, monkeypatch) -> None:
    """Train and score with the file and with the checkout, and compare to the last bit."""
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (0, ""))
    free = [f"data.data_path={data}", f"data.tokenizer_path={data}/tokenizer.model", f"run.out_dir={folder}"]
    done = run_python(file, *free, "run.run_id=readable", cwd=folder)
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
    readable, tiny_data, tmp_path, monkeypatch
):
    """To the last bit: what is read is what ran."""
    check_runs_alike(*readable[1:], tiny_data, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_has_a_readable_file_that_runs_alike(path, tiny_data, tmp_path, monkeypatch):
    """The same for all recipes in records/; and at full size the file compiles and is not too long."""
    text = make_readable(path)
    assert text.count("\n") <= MOST_LINES.get(path.parent, MOST_LINES[RICH])
    small = small_recipe(path.parent, tmp_path / path.parent.name)
    file = tmp_path / "readable.py"
    file.write_text(make_readable(small))
    check_runs_alike(small, file, tiny_data, tmp_path, monkeypatch)
