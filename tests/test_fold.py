"""Folding: the packed program computes what the readable one does, with less of it."""

import ast
import json
from pathlib import Path

import pytest
from fixtures_model import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from data.errors import UserError
from dev.fold import fold, fold_tree
from dev.pack import pack, read_recipe, unwrap
from formats.recipe import format_toml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("records/*/*/recipe.toml"))
HEADER = """
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from collections.abc import Callable
def option(default, env="", text="", *, live=False, low=None, high=None, choices=()):
    return field(default=default, metadata={"env": env, "live": live, "low": low, "choices": choices})
PACKED_RECIPE = None
@dataclass(frozen=True)
class ModelConfig:
    width: int = option(8, "WIDTH", "channels", low=1)
    kind: str = option("none", "KIND", "of gate", choices=("none", "dense"))
    layers: tuple = option((), "", "which")
    seed: int = option(3, "SEED", "free", live=True)
@dataclass(frozen=True)
class EvalConfig:
    stride: int = option(4, "", "targets")
@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    eval: EvalConfig = EvalConfig()
"""
RECIPE = {"model": {"width": 12, "kind": "dense", "layers": [1, 2]}}


def folded(code: str, recipe: dict | None = None) -> str:
    """Fold a program that ends in `main(Config())` and check that it gives what it gave; return main's part."""
    source = HEADER + code + "\nRESULT = main(Config())\n"
    made = fold(source, RECIPE if recipe is None else recipe)
    names, expected = {"__name__": "folded"}, {"__name__": "plain"}
    exec(made, names)
    readable = source.replace("int = option(8", "int = option(12").replace(
        'str = option("none"', 'str = option("dense"'
    )
    exec(readable.replace("tuple = option(()", "tuple = option((1, 2)"), expected)
    if recipe is None:
        assert repr(names["RESULT"]) == repr(expected["RESULT"])
    return made[made.index("class EvalConfig") :] if "class EvalConfig" in made else made


MAIN = "def main(cfg: Config):\n    return "


@pytest.mark.parametrize(
    ("code", "gone", "kept"),
    [
        (MAIN + "cfg.model.width * 2 + 1", "width", "return 25"),
        (MAIN + "[1 if cfg.model.kind == 'none' else 2, cfg.model.seed]", "kind", "cfg.model.seed"),
        (MAIN + "{'none': f, 'dense': g}[cfg.model.kind]()\ndef f():\n    return 1\ndef g():\n    return [2]", "f()", "g()"),
        (MAIN + "f'{cfg.model.width:>4}|{cfg.model.kind}|{cfg.model.seed}'", "kind", "|dense|"),
        (MAIN + "sum(i for i in cfg.model.layers) + len(cfg.model.layers)", "layers", "return 5"),
        (MAIN + "count(cfg.model)\ndef count(m):\n    total = []\n    for i in range(m.width):\n        total = total + [i]\n    return len(total)", "count", "return 12"),
        ("def main(cfg: Config):\n    m = cfg.model\n    if m.width > 9 and m.seed:\n        return 1\n    return 0", "width", "m.seed"),
        ("def main(cfg: Config):\n    if cfg.model.kind == 'dense':\n        return [1]\n    return unused()\ndef unused():\n    return 2", "unused", "[1]"),
        ("def main(cfg: Config):\n    assert cfg.model.width\n    x, y = cfg.model.width, cfg.model.seed\n    return x + y", "assert", "12 + y"),
        ("def main(cfg: Config):\n    while cfg.model.kind == 'none':\n        cfg = None\n    return cfg", "gone", "while"),
        ("class A:\n    def __init__(self, cfg: ModelConfig):\n        self.w = cfg.width\n        self.b = B(cfg) if cfg.kind == 'none' else None\n    def get(self, s):\n        return self.w + s if self.b is None else self.b\nclass B:\n    def __init__(self, cfg):\n        pass\ndef main(cfg: Config):\n    return A(cfg.model).get(cfg.model.seed)", "B", "12 + s"),
        ("class Row(NamedTuple):\n    name: str\n    test: Callable[[Config], bool] = lambda cfg: True\nROWS = (Row('a', lambda cfg: cfg.model.kind == 'none'), Row('b'))\ndef main(cfg: Config):\n    return [row.name for row in ROWS if row.test(cfg)]", "'a'", "'b'"),
        ("def main(cfg: Config):\n    rules = [('w', cfg.model.width > 1, 'low'), ('s', cfg.model.seed > 1, 'free')]\n    for name, holds, why in rules:\n        if not holds:\n            raise ValueError(name)\n    return 1", "'low'", "'free'"),
        (MAIN + "half(cfg.model.width, cfg.model.seed)\ndef half(a, b):\n    return [a // 2, b]", "a // 2", "[6, b]"),
        (MAIN + "cfg.eval.stride\ndef other(cfg: Config):\n    return replace(cfg, eval=EvalConfig(stride=2))\nKEEP = other(Config())", "return 4", "cfg.eval.stride"),
    ],
)  # fmt: skip
def test_what_the_recipe_fixes_folds_and_nothing_else_changes(code, gone, kept):
    text = folded(code)
    main = text[text.index("class Config") :]
    assert gone not in main[main.index("\n\n") :]
    assert kept in main


@pytest.mark.parametrize(
    "body",
    [
        "x = cfg.model.seed\n    x = x + 1\n    return x",
        "for cfg in [cfg.model.seed]:\n        pass\n    return cfg",
        "table = {'dense': 1}\n    table['dense'] = 2\n    return table[cfg.model.kind]",
        "def inner():\n        nonlocal width\n        width = 5\n    width = cfg.model.width\n    inner()\n    return width",
        "if cfg.model.kind == 'none':\n        yield 1",
        "return [width for width in (1, 2)] + [cfg.model.width ** -1, -cfg.model.width, (-cfg.model.width) ** 2]",
        "seen = []\n    note = lambda: seen.append(1) or True\n    note() and cfg.model.kind == 'none'\n    return [seen, bool(note() or 1)]",
        "return getattr(cfg.model, 'wi' + 'dth')",
        "try:\n        return 1 // (cfg.model.width - 12)\n    except ZeroDivisionError as width:\n        return str(width)",
        "a = b = cfg.model.width\n    b += 1\n    return a, b",
        "return (lambda width: width)(5), cfg.model.kind and cfg.model.layers",
        "len = lambda _: 'mine'\n    return len(cfg.model.layers)",
        "return 1.0 if cfg.model.width == 12.0 else 2, True + cfg.model.width, 0.1 * cfg.model.width",
        "match cfg.model.kind:\n        case 'none':\n            return 1\n        case other:\n            return other",
    ],
)
def test_folding_keeps_what_programs_do_with_names(body):
    """Rebinding, closures, generators, effects, shadowed builtins: the classic traps."""
    code = f"def main(cfg: Config):\n    {body}\n"
    if "yield" in body:
        code = (
            code.replace("def main", "def stream") + "def main(cfg: Config):\n    return list(stream(cfg))\n"
        )
    folded(code)


EXPRESSIONS = st.recursive(
    st.sampled_from(["cfg.model.width", "cfg.model.seed", "cfg.model.kind", "cfg.model.layers", "x", "0", "'a'", "None"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or", "==", "is", "!="]), inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("[{}, ({},)][bool({})]".format, inner, inner, inner),
        st.builds("f'<{{{}}}>'".format, st.sampled_from(["x", "cfg.model.width", "cfg.model.layers"])),
        st.builds("note({})".format, inner),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_folding_a_random_function_changes_neither_its_result_nor_its_effects(test, value, other):
    folded(
        "NOTES = []\ndef note(x):\n    NOTES.append(x)\n    return x\n"
        f"def main(cfg: Config):\n    x = cfg.model.seed\n    y = {value}\n    if {test}:\n        y = [y, {other}]\n"
        f"    elif {other}:\n        return NOTES\n    return NOTES, y, {value}\n"
    )


def test_a_value_that_the_program_would_refuse_stays_for_it_to_refuse():
    """Bounds and choices go only where the recipe meets them."""
    text = fold(HEADER + "print(Config, PACKED_RECIPE)\n", {"model": {"width": 0, "kind": "odd", "layers": [1], "wdth": 3}})
    assert "low=1" in text and "choices=('none', 'dense')" in text and "{'model': {'wdth': 3}}" in text


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.parent.name)
def tiny_recipe(request, tmp_path_factory):
    """Write a recipe with its features at the size of a test."""
    recipe = read_recipe(request.param)
    sizes = {name: value for name, value in TINY.items() if not name.startswith("model.num_layers")}
    if (
        "recur_layers" in recipe["model"]
        or "parallel" in recipe["model"]
        or "value_embed_layers" in recipe["model"]
    ):
        sizes |= {"data.batch_tokens": 64}
    for name, value in sizes.items():
        section, key = name.split(".")
        recipe.setdefault(section, {})[key] = value
    if recipe["model"].get("bigram_buckets"):
        recipe["model"]["bigram_buckets"] = 64
    recipe["model"]["rope_dims"] = min(recipe["model"].get("rope_dims", 0), 4)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(format_toml(recipe))
    return path


@pytest.mark.slow
def test_packed_and_readable_programs_train_and_score_alike_to_the_last_bit(
    tiny_recipe, tiny_data, tmp_path, monkeypatch
):
    """The claim of packing, for every recipe in records/."""
    report = pack(tiny_recipe, tmp_path / "packed.py")
    assert report.folded_bytes < report.source_bytes
    packed = {"__name__": "packed", "__file__": report.out}
    exec(compile(unwrap(Path(report.out).read_bytes()), "packed", "exec"), packed)
    monkeypatch.setattr(train_gpt, "weigh_code", lambda folder: (0, ""))
    free = [f"data.data_path={tiny_data}", f"data.tokenizer_path={tiny_data}/tokenizer.model"]
    free += [f"run.out_dir={tmp_path}"]
    packed["main"]([*free, "run.run_id=packed"])
    train_gpt.main(["--recipe", str(tiny_recipe), *free, "run.run_id=readable"])
    losses = [
        [
            json.loads(line).get("train_loss")
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("packed", "readable")
    ]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("packed", "readable")]
    assert losses[0] == losses[1] and len(losses[0]) >= 6
    for key in ("artifact_sha256", "config_hash"):
        assert results[0][key] == results[1][key]
    assert results[0]["score"]["val_loss"] == results[1]["score"]["val_loss"]
    with pytest.raises(UserError, match=r"model\.model_dim is fixed in this packed program"):
        packed["main"]([*free, "model.model_dim=64"])


def test_top_level_statements_keep_their_identity():
    """`make size` tells by it which file a statement of the folded program is from."""
    source = HEADER + MAIN + "cfg.model.width\nmain(Config())\n"
    before = ast.parse(source)
    nodes = list(before.body)
    fold_tree(before, RECIPE)
    assert {id(node) for node in before.body} <= {id(node) for node in nodes}
