"""The packer: one namespace, nothing lost, nothing unused, bytes that survive being source."""

import ast
import builtins
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from pack import cache, size
from pack import program as packer
from pack.__main__ import main
from pack.program import (
    PackingError,
    Statement,
    bound_names,
    bundle,
    escape,
    minify,
    pack,
    specialize,
    to_source,
    unwrap,
    wrap,
)

ENTRY = Path(__file__).resolve().parent.parent / "train_gpt.py"
RULE = "# " + "-" * 106
PROGRAM = {
    "data/__init__.py": "",
    "data/base.py": '''
"""The bottom module."""
import json
from dataclasses import dataclass

LIMIT = 7
UNUSED_LIMIT = LIMIT + 1


@dataclass
class Shape:
    """A size."""

    width: int = LIMIT


def describe(shape):
    """Say it."""
    return json.dumps({"width": shape.width})


def unused(shape):
    return also_unused(shape)


def also_unused(shape):
    return unused(shape)


def tool_only():
    return describe(Shape())


if __name__ == "__main__":
    tool_only()
''',
    "data/codecs/__init__.py": """
from data.base import describe


def load(shape):
    return describe(shape)
""",
    "eval/__init__.py": "",
    "eval/score.py": """
import json
import os.path

from data.base import LIMIT


def score(values):
    from data.base import Shape

    return min(sum(values), Shape(LIMIT).width)


def nothing():
    from data.base import LIMIT
""",
    "train_gpt.py": f'''"""Train.

    Two lines of help.
"""
import inspect
import sys
import traceback
from dataclasses import dataclass, field

from data.base import Shape
from eval.score import nothing, score

{RULE}
# 1 config
{RULE}

PACKED_RECIPE: dict | None = None


@dataclass
class Config:
    num_layers: int = field(default=3, metadata={{"env": "NUM_LAYERS"}})


{RULE}
# 2 main
{RULE}
# Everything else.


def fail(amount_of_numbers):
    """Divide by zero."""
    return amount_of_numbers / 0


def main():
    from data.codecs import load

    nothing()
    try:
        fail(3)
    except ZeroDivisionError:
        traceback.print_exc(file=sys.stdout)
    print("name", __name__)
    print("file", __file__)
    print("score", score([1, 2, 3]))
    print("shape", load(Shape(4)))
    print("recipe", PACKED_RECIPE)
    layers = Config.__dataclass_fields__["num_layers"]
    print("fields", layers.type, layers.metadata)
    print("source", inspect.getsource(fail).splitlines()[0])


if __name__ == "__main__":
    main()
''',
}


@pytest.fixture
def project(tmp_path):
    """Write the little program above and return its folder."""
    for name, text in PROGRAM.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.removeprefix("\n"))
    return tmp_path


def change(project: Path, name: str, old: str, new: str) -> None:
    """Replace text in a file of the project."""
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new))


def bundle_of(project: Path) -> str:
    return to_source(bundle(project / "train_gpt.py", project))


def definitions(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def run(path: Path, *arguments: str) -> str:
    """Run a program from an empty folder, so that no first-party module can be imported."""
    empty = path.parent / "empty"
    empty.mkdir(exist_ok=True)
    command = [sys.executable, "-P", str(path), *arguments]
    result = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Bundling


def test_modules_come_before_their_users_and_imports_come_first(project):
    """One namespace runs from top to bottom: a name must be bound before a statement reads it."""
    source = bundle_of(project)
    assert definitions(source) == ["Shape", "describe", "score", "nothing", "load", "Config", "fail", "main"]
    kinds = [isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body[1:]]
    assert kinds == sorted(kinds, reverse=True), "third-party imports stand at the top, after the docstring"


def test_bundle_holds_no_first_party_import_and_each_library_once(project):
    """Beside the packed file there is no module to import, and a second import is bytes for nothing."""
    imports = [
        node
        for node in ast.walk(ast.parse(bundle_of(project)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [ast.unparse(node) for node in imports]
    assert sorted(names) == [
        "from dataclasses import dataclass, field",
        "import inspect",
        "import json",
        "import sys",
        "import traceback",
    ]


def test_function_that_only_imported_gets_a_body(project):
    """A function whose statements are all gone would be a syntax error."""
    nothing = next(
        node for node in ast.parse(bundle_of(project)).body if getattr(node, "name", "") == "nothing"
    )
    assert ast.unparse(nothing.body) == "pass"


def test_what_nothing_uses_is_dropped_even_when_it_uses_itself(project):
    """Every byte counts, and a pair that calls each other holds itself up."""
    source = bundle_of(project)
    for name in ("unused", "also_unused", "UNUSED_LIMIT", "tool_only"):
        assert name not in source


def test_registered_definitions_are_kept(project):
    """A decorator may have put the function into a table: dropping it would empty the table."""
    code = (
        "TABLE = []\n\n\ndef register(f):\n    TABLE.append(f)\n\n\n@register\ndef lonely(x):\n    return x\n"
    )
    change(project, "data/base.py", "LIMIT = 7\n", f"LIMIT = 7\n{code}")
    assert {"register", "lonely"} <= set(definitions(bundle_of(project)))


def test_a_kernel_that_nothing_calls_goes_with_its_fake_and_its_gradient(project):
    """Registered operators weigh kilobytes; a recipe that attends otherwise ships none of them."""
    code = (
        "import torch\n\n\n@torch.library.custom_op('golf::f', mutates_args=())\ndef kernel(x: int) -> int:\n"
        "    return x\n\n\n@kernel.register_fake\ndef _(x):\n    return x\n\n\n"
        "kernel.register_autograd(len)\n"
    )
    change(project, "data/base.py", "LIMIT = 7\n", f"LIMIT = 7\n{code}")
    change(project, "train_gpt.py", "import sys\n", "import sys\nimport torch\n")
    assert "golf::f" not in bundle_of(project) and "register" not in bundle_of(project)
    change(project, "data/base.py", "return json.dumps(", "kernel(1)\n    return json.dumps(")
    assert all(text in bundle_of(project) for text in ("golf::f", "register_fake", "register_autograd"))


def test_a_name_in_a_string_counts_as_used(project):
    """What a program looks up by name shows nowhere else."""
    change(project, "train_gpt.py", "    nothing()\n", '    nothing()\n    globals()["unused"]\n')
    assert "unused" in definitions(bundle_of(project))


def test_only_the_entry_keeps_its_main_guard_and_it_comes_last(project):
    """Merged, the guards of other modules would run their commands too."""
    source = bundle_of(project)
    assert source.count("__name__ == '__main__'") == 1
    assert isinstance(ast.parse(source).body[-1], ast.If)


@pytest.mark.parametrize(
    "code",
    [
        "def describe(shape):\n    return shape\n",
        "class describe:\n    pass\n",
        "describe = 3\n",
        "from json import loads as describe\n",
        "try:\n    import json as describe\nexcept ImportError:\n    describe = None\n",
        "for describe in range(3):\n    pass\n",
    ],
)
def test_one_name_for_two_things_is_refused_and_both_places_are_named(project, code):
    """In one namespace the later one would replace the earlier without a word."""
    change(project, "train_gpt.py", "def main", f"{code}\n\ndef main")
    with pytest.raises(PackingError, match=r"describe.*two.*data/base\.py.*train_gpt\.py, line \d+.*Rename"):
        bundle_of(project)


def test_equal_guarded_imports_are_one_thing(project):
    """Two modules may guard one optional library: the same name, the same thing."""
    guard = "try:\n    import triton\nexcept ImportError:\n    triton = None\n\n"
    change(project, "data/base.py", "LIMIT = 7", f"{guard}LIMIT = 7")
    change(project, "train_gpt.py", "def main", f"{guard}\ndef main")
    assert bundle_of(project).count("import triton") == 1


def test_a_definition_may_not_hide_a_builtin_of_another_module(project):
    """The other module would call it instead of the builtin."""
    change(project, "train_gpt.py", "def main", "def min(values):\n    return values[0]\n\n\ndef main")
    with pytest.raises(PackingError, match=r"builtin's name.*min in train_gpt\.py, used in eval/score\.py"):
        bundle_of(project)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import data.base", "expected `from module import name`"),
        ("from data.base import describe as say", "expected `from module import name`"),
        ("from data.base import *", "expected `from module import name`"),
        ("from .data import base", "expected `from module import name`"),
        ("from data import base", "expected base at the top level of data/__init__.py"),
        ("from data.base import missing", "expected missing at the top level of data/base.py"),
        ("from data.missing import name", "expected such a module below"),
        ("from train_gpt import main", "in a circle: train_gpt.py -> eval/score.py -> train_gpt.py"),
    ],
)
def test_imports_that_cannot_be_merged_are_refused(project, line, message):
    """A bundle has names, not modules: forms that bind a module or rename have no meaning there."""
    change(project, "eval/score.py", "import json\n", f"{line}\nimport json\n")
    with pytest.raises(PackingError, match=message.replace("(", r"\(")):
        bundle_of(project)


def test_lazy_import_of_a_name_that_is_bound_again_is_refused(project):
    """Without its import statement the name would be an unset local."""
    change(project, "train_gpt.py", "    nothing()\n", "    load = load\n")
    with pytest.raises(PackingError, match="binds the name again"):
        bundle_of(project)


def test_optional_library_of_a_lazy_module_is_refused_at_its_top(project):
    """The readable program runs without the library, so the packed one must."""
    change(project, "data/codecs/__init__.py", "from data.base", "import rare\nfrom data.base")
    with pytest.raises(
        PackingError, match=r"data/codecs/__init__.py:1: expected rare to be imported in the function"
    ):
        bundle_of(project)
    change(project, "data/codecs/__init__.py", "import rare\n", "")
    change(project, "data/codecs/__init__.py", "    return", "    import rare\n    return")
    assert "import rare" in bundle_of(project)


def test_future_annotations_hold_for_all_modules_or_none(project):
    """Hoisted, the import changes the field types that dataclasses report in every module."""
    future = "from __future__ import annotations\n"
    change(project, "data/base.py", "import json\n", f"{future}import json\n")
    with pytest.raises(PackingError, match=r"data/base\.py, not in train_gpt\.py"):
        bundle_of(project)
    change(project, "train_gpt.py", "import inspect\n", f"{future}import inspect\n")
    source = bundle_of(project)
    assert source.count(future) == 1
    assert ast.unparse(ast.parse(source).body[1]) == future.strip()


# Recipe


@pytest.mark.parametrize(
    ("text", "recipe", "message"),
    [
        ("x = 1\n", {}, "expected the line `PACKED_RECIPE"),
        ("PACKED_RECIPE = None\n", {"run": {"day": st}}, r"recipe\.run\.day: expected a string"),
        ("PACKED_RECIPE = None\n", {"lr": float("nan")}, r"recipe\.lr: expected"),
    ],
)
def test_recipe_that_cannot_be_embedded_is_refused(text, recipe, message):
    """A value without a literal would be another recipe in the packed program."""
    with pytest.raises(PackingError, match=message):
        specialize([Statement("train_gpt.py", node) for node in ast.parse(text).body], recipe)


# Minifying


def test_minify_keeps_what_programs_look_up_by_name(project):
    """Fields and their metadata are the names of recipes and of the environment; docstrings are nobody's."""
    source = minify(bundle_of(project))
    for text in (
        r"num_layers:int=\w+\(default=3,metadata=\{'env':'NUM_LAYERS'\}\)",
        r"width:int=\w+",
        r"def main\(",
    ):
        assert re.search(text, source)
    for text in ("Say it", "Divide by zero", "Two lines of help"):
        assert text not in source


def test_argument_annotations_ship_only_where_something_reads_them():
    """torch.library and Triton read them; all others are bytes."""
    plain = "def double(amount: int) -> int:\n    return amount * 2\n"
    assert ": int" not in minify(plain).replace(":int", ": int")
    for decorator in ("torch.library.custom_op('golf::op', mutates_args=())", "triton.jit"):
        text = minify(
            f"{plain}\n\n@{decorator}\ndef kernel(x: int, size: tl.constexpr) -> int:\n    return x\n"
        )
        assert "size:tl.constexpr" in text and "x:int" in text
        assert "amount:int" not in text


def test_parameters_shorten_unless_a_call_may_name_them():
    """A keyword, a string for `**`, a field and a function handed to others keep their names."""
    text = minify(
        "class A:\n    def go(self, plain, named, spelled):\n        return plain + named + spelled\n"
        "def lone(first_number, second_number):\n    return first_number - second_number\n"
        "def given(first_number):\n    return first_number\n"
        "print(A().go(1, named=2, **{'spelled': 3}), lone(5, 4), map(given, [1]))\n"
    )
    assert "plain" not in text and "second_number" not in text and text.count("first_number") == 2
    assert "named" in text and "spelled" in text
    exec(compile(text, "text", "exec"), {})


def test_local_names_of_triton_kernels_stay():
    """A constexpr that is renamed by an assignment stops being a constexpr."""
    body = "    offsets = tl.arange(0, BLOCK_SIZE) + BLOCK_SIZE\n" * 9
    text = minify(f"@triton.jit\ndef kernel(BLOCK_SIZE: tl.constexpr):\n{body}    return offsets\n")
    assert "tl.arange(0,BLOCK_SIZE)" in text


def test_docstring_that_the_program_reads_keeps_its_first_line():
    """It is the description in --help."""
    text = '"""Train.\n\nMore."""\nprint(__doc__)\n\n\ndef f():\n    """Gone."""\n    return 1\n'
    assert minify(text).startswith("'Train.'\n")
    assert "Gone" not in minify(text)


# The wrapper


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=200) | st.text('"\\\r\n\0 07a', max_size=40).map(str.encode))
def test_escaped_bytes_read_back_as_themselves(data):
    """The payload is a string literal: a byte that Python reads otherwise is damage."""
    literal = b"#coding:L1\nx=" + escape(data) + b"\n"
    names = {}
    exec(compile(literal, "literal", "exec"), names)
    assert names["x"].encode("latin-1") == data


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_git_line_endings_do_not_change_the_bytes(data):
    """A checkout with autocrlf writes CR LF; Python reads that as LF."""
    literal = (b"#coding:L1\nx=" + escape(data) + b"\n").replace(b"\n", b"\r\n")
    names = {}
    exec(compile(literal, "literal", "exec"), names)
    assert names["x"].encode("latin-1") == data


@pytest.mark.parametrize("method", packer.METHODS)
def test_wrapped_program_runs_as_main_and_shows_its_source(project, method):
    """Triton and torch.compile read source lines by inspect; people read them in tracebacks."""
    (project / "recipe.toml").write_text("[model]\nnum_layers = 4\n")
    out = project / "packed.py"
    pack(project / "recipe.toml", out, project / "train_gpt.py", method)
    printed = run(out)
    assert "name __main__\n" in printed
    assert f"file {out}\n" in printed
    assert "score 6\n" in printed
    assert 'shape {"width": 4}\n' in printed
    assert "recipe {'model': {'num_layers': 4}}\n" in printed
    assert "fields <class 'int'> {'env': 'NUM_LAYERS'}\n" in printed
    assert re.search(r"source def (\w+)\(amount_of_numbers\):", printed)
    assert re.search(r"in (\w+)\n    def \1\(amount_of_numbers\):return amount_of_numbers/0\n", printed)


def test_packed_and_readable_programs_print_the_same(project):
    """The claim of packing, on a program that prints all that it knows of itself."""
    out = project / "train_packed.py"
    pack(None, out, project / "train_gpt.py")
    readable = subprocess.run(
        [sys.executable, "train_gpt.py"], cwd=project, capture_output=True, text=True, check=True
    ).stdout
    kept = [
        line
        for line in readable.splitlines()
        if line.startswith(("name", "score", "shape", "recipe", "fields"))
    ]
    assert len(kept) == 5
    assert set(kept) <= set(run(out).splitlines())


def test_two_packed_programs_in_one_process_keep_their_own_lines(project):
    """linecache goes by file name: one name for both would show the other's source."""
    names = {}
    for i in range(2):
        packed = wrap(f"def f():\n    return 'program {i}'\n", "lzma")
        exec(compile(packed, "stub", "exec"), names.setdefault(i, {"__name__": f"program_{i}"}))
    assert [inspect.getsource(names[i]["f"]).count(f"program {i}") for i in range(2)] == [1, 1]


def test_torch_compiles_functions_of_a_packed_program(tmp_path):
    """Dynamo skips files by name; a skipped packed program would train uncompiled without a word."""
    source = (
        "import torch\nfrom torch._dynamo.testing import CompileCounter\ncounter = CompileCounter()\n"
        "@torch.compile(backend=counter, fullgraph=True)\ndef double(x):\n    return helper(x) * 2\n"
        "def helper(x):\n    return torch.relu(x)\n"
        "print(double(torch.ones(3)).sum().item(), counter.frame_count)\n"
    )
    (tmp_path / "packed.py").write_bytes(wrap(minify(source), "lzma"))
    assert run(tmp_path / "packed.py") == "6.0 1\n"


@pytest.mark.parametrize("method", packer.METHODS)
def test_unwrap_reads_the_source_without_running_it(method):
    """An audit reads programs that it does not trust."""
    source = "raise SystemExit('ran')\n# \u00e9 \\ \" \0\n".replace("\0", "\\0")
    source = source if method != "mix" else source.replace("\u00e9", "e")
    assert unwrap(wrap(source, method)) == source


def test_unknown_wrapper_is_refused():
    """With the names that there are."""
    with pytest.raises(PackingError, match="expected one of brotli, lzma, mix, none, found zip"):
        wrap("x = 1\n", "zip")


# The whole step


def test_packing_twice_gives_the_same_bytes(project):
    """The code size of a record can be checked by packing its source again."""
    outs = [project / "a" / "packed.py", project / "b" / "packed.py"]
    for seed, out in zip(("1", "2"), outs, strict=True):
        subprocess.run(
            [sys.executable, "-m", "pack", "--entry", str(project / "train_gpt.py"), "--out", str(out)],
            cwd=ENTRY.parent,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            check=True,
            capture_output=True,
        )
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_without_brotli_lzma_packs_and_the_report_says_so(project, monkeypatch):
    """Another size on another machine must not look like another program."""
    monkeypatch.setitem(sys.modules, "brotli", None)
    report = pack(None, project / "packed.py", project / "train_gpt.py")
    assert report.steps_left_out == ["brotli: not installed, lzma instead"]
    assert "score 6\n" in run(project / "packed.py")


def test_without_the_minifier_the_program_is_valid_and_the_report_says_so(project, monkeypatch):
    """The same for the step that saves most."""
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    report = pack(None, project / "packed.py", project / "train_gpt.py")
    assert report.steps_left_out == ["minify: python_minifier is not installed"]
    assert report.minified_bytes == report.source_bytes
    assert "score 6\n" in run(project / "packed.py")


def test_json_report_is_one_object_and_agrees_with_the_file(project, capsys):
    """The trainer reads the size of its code from it."""
    out = project / "packed.py"
    main(["--entry", str(project / "train_gpt.py"), "--out", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "out",
        "source_bytes",
        "folded_bytes",
        "minified_bytes",
        "packed_bytes",
        "steps_left_out",
    ]
    assert report["packed_bytes"] == out.stat().st_size
    assert report["minified_bytes"] == len(unwrap(out.read_bytes()).encode())


def test_what_is_done_between_imports_is_done_before_the_later_ones(project):
    """Threads read their settings when the library is loaded: a program that sets them later sets nothing."""
    early = 'import os\n\nos.environ.setdefault("SPIN", "5")\n\nimport json\n'
    (project / "train_gpt.py").write_text(f"{early}\n\ndef main():\n    return json.dumps(1), os\n")
    text = to_source(bundle(project / "train_gpt.py", project))
    assert text.index("import os") < text.index("setdefault") < text.index("import json")
    real = to_source(bundle(ENTRY, ENTRY.parent))
    assert real.index("GOMP_SPINCOUNT") < real.index("import torch")


def test_equal_sources_are_packed_once(project, tmp_path, monkeypatch, capsys):
    """A changed source, another wrap and a damaged copy are packed anew; what comes out is the same file."""
    jobs = []

    def counted(*job):
        jobs.append(job)
        return pack(*job)

    monkeypatch.setattr(cache, "pack", counted)

    def packed(out: str, *more: str) -> tuple[int, bytes]:
        path, before = tmp_path / out, len(jobs)
        words = [
            "--entry",
            str(project / "train_gpt.py"),
            "--out",
            str(path),
            "--cache",
            str(tmp_path / "kept"),
        ]
        main([*words, "--json", *more])
        report = json.loads(capsys.readouterr().out)
        assert report["out"] == str(path)
        assert report["packed_bytes"] == path.stat().st_size
        return len(jobs) - before, path.read_bytes()

    times, first = packed("a/x.py")
    assert times == 1
    assert packed("b/x.py") == (0, first)
    assert packed("b/x.py", "--wrap", "none")[0] == 1
    kept = next(path for path in (tmp_path / "kept").glob("*.py") if path.read_bytes() == first)
    kept.write_bytes(first + b"#")
    assert packed("c/x.py") == (1, first)
    change(project, "data/base.py", "LIMIT = 7", "LIMIT = 8")
    times, changed = packed("a/x.py")
    assert times == 1
    assert changed != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--entry", "missing.py"], "no such program"), (["--recipe", "missing.toml"], "no such recipe")],
)
def test_missing_files_are_user_errors(project, arguments, message, monkeypatch):
    """A wrong path is a sentence, and leaves no half of a program."""
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=message):
        main(["--entry", "train_gpt.py", "--out", "packed.py", *arguments])
    assert not Path("packed.py").exists()


def test_size_table_covers_every_section_and_module(project, capsys):
    """A part that the table leaves out is never made smaller."""
    size.main(["--entry", str(project / "train_gpt.py"), "--json"])
    report = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == [
        "0 docstring",
        "1 config",
        "2 main",
        "data/base.py",
        "data/codecs/__init__.py",
        "eval/score.py",
        "third-party imports",
    ]
    assert report["packed_bytes"] == pack(None, project / "packed.py", project / "train_gpt.py").packed_bytes
    files = [
        project / name
        for name in ("train_gpt.py", "data/base.py", "data/codecs/__init__.py", "eval/score.py")
    ]
    assert report["source_bytes"] == sum(path.stat().st_size for path in files)
    assert parts["2 main"]["packed_bytes"] > parts["1 config"]["packed_bytes"] > 0


# The real program


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Pack the real train_gpt.py once."""
    if not ENTRY.is_file():
        pytest.skip(f"{ENTRY.name} does not exist")
    return pack(None, tmp_path_factory.mktemp("real") / "train_gpt.py")


def test_real_program_packs_below_two_fifths_of_its_minified_source(real):
    """Compression that stops working would show in no other test."""
    assert real.packed_bytes == Path(real.out).stat().st_size
    assert real.packed_bytes < 0.4 * real.minified_bytes


def test_real_program_compiles_and_misses_no_name(real):
    """What dropping and merging could break: a name that is read and bound nowhere."""
    tree = ast.parse(unwrap(Path(real.out).read_bytes()))
    bound = {"__file__", "__name__", *dir(builtins)}
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            bound |= {name for name, _ in bound_names(node)}
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.comprehension):
            bound |= {name for name, _ in bound_names(node.target)}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
    assert read - bound == set()


def test_real_program_shows_its_help_alone_in_an_empty_folder(real):
    """What is handed in is one file: it may need nothing of the checkout."""
    assert "--recipe" in run(Path(real.out), "--help")
