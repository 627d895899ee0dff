"""The plan of the house, checked on syntax trees: imports, environment, lengths, characters."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from fixtures_model import ROOT, run_python

TRAINER = "train_gpt"
# Each room may import those that it names, and what they may import; nothing else.
ROOMS = {
    "common": (),
    "durable": ("common",),
    "data": ("durable",),
    "formats": ("durable",),
    "kernels": ("common",),
    "quantizers": ("kernels", "formats", "data"),
    "scoring": ("kernels", "formats", "data"),
    TRAINER: ("scoring", "quantizers"),
    "eval": (TRAINER,),
    "pack": ("formats",),
    "audit": ("eval", "pack"),
    "dev": ("audit",),
    "parameter_golf": ("eval",),
    "launch": ("dev",),  # a notebook
    "tests": ("launch", "parameter_golf"),
}
# The folder audit, statistics and packing run where no torch is installed; data tools need none.
WITHOUT_TORCH = (
    "common",
    "durable",
    "data",
    "formats",
    "pack",
    "scoring.budget",
    "eval.logs",
    "eval.stats",
    "audit.folder",
)
FUNCTION_LINES = 60
LONG_FUNCTION_LINES = 90
ALLOWED_LONG = {("train_gpt.py", "train")}
# Who may parse JSON without common.parse_json, and why.
OWN_JSON = {
    "common.py": "is the gate",
    "audit/inside.py": "runs in the sandbox with the standard library alone, on its own parent's lines",
    "dev/gpu_battery/child.py": "reads its own parent's argument",
    "dev/gpu_battery/job.py": "takes NaN as text from its own child",
    "dev/gpu_battery/timing.py": "reads the profiler's trace, whose objects may repeat keys",
    "dev/soak/child.py": "reads its own parent's variable",
    "dev/soak/flips.py": "damages files on purpose",
    "dev/soak/mutations.py": "mutates files on purpose",
    "formats/artifact.py": "bounds and words it itself",
    "launch/quickstart.py": "is a notebook, which shows how a result is read",
    "formats/state.py": "bounds and words it itself",
}
CODE_IN_DATA = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@cache
def sources() -> dict[str, Path]:
    """Every first-party source file: path below the root -> file. Packed programs in records/ are none."""
    files = [*ROOT.glob("*.py"), *(path for name in ROOMS for path in (ROOT / name).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(files)}


@cache
def trees() -> dict[str, ast.Module]:
    """The same files as syntax trees."""
    return {label: ast.parse(path.read_text(encoding="utf-8"), label) for label, path in sources().items()}


@cache
def modules() -> dict[str, ast.Module]:
    """The same files by dotted module name."""
    return {
        label.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree
        for label, tree in trees().items()
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected an absolute import, found a relative one"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def top(name: str) -> str:
    return name.partition(".")[0]


def first_party(name: str) -> set[str]:
    return {found for found in imports(modules()[name]) if top(found) in ROOMS}


def below(room: str) -> set[str]:
    """The room and every room that it may import."""
    return {room}.union(*(below(other) for other in ROOMS[room]))


def closure(name: str) -> set[str]:
    """A module and every first-party module that importing it may run."""
    found, todo = set(), {name}
    while todo:
        found |= todo
        todo = {inner for outer in todo for inner in first_party(outer) & set(modules())} - found
    return found


# Who imports whom


def test_rooms_import_only_rooms_below_them():
    """A file that imports upwards makes two rooms one."""
    strays = [
        f"{name} -> {found}"
        for name in modules()
        for found in sorted(first_party(name))
        if top(found) not in below(top(name))
    ]
    assert strays == []


def test_every_file_of_python_is_in_a_room():
    """A new folder says in ROOMS where it stands."""
    known = {f"{name}.py" for name in ROOMS} | set(ROOMS)
    found = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")} | {
        path.name for path in ROOT.glob("*.py")
    }
    assert {name for name in found if not name.startswith(".")} - known <= {"records", "runs"}


def test_what_needs_no_torch_imports_none():
    """Folder audits, statistics and packing run on machines without it."""
    for name in modules():
        if name.startswith(WITHOUT_TORCH):
            users = [inner for inner in closure(name) if "torch" in map(top, imports(modules()[inner]))]
            assert users == [], f"{name} reaches torch through these"


def test_the_trainer_does_not_import_the_packer():
    """What it imports is bundled into the counted program; it runs the packer as a process."""
    assert "pack" not in below(TRAINER)


def test_modules_do_not_import_each_other_in_a_circle():
    """The packer needs an order, and so does a reader."""
    edges = {name: first_party(name) & set(modules()) for name in modules()}
    while leaves := [name for name, found in edges.items() if not found & set(edges)]:
        for name in leaves:
            del edges[name]
    assert edges == {}, "these modules import each other or a module that does"


def test_eval_package_imports_nothing_heavy_and_tokenizers_is_no_package():
    """An __init__.py in tokenizers/ would hide the PyPI package of that name."""
    assert re.findall(r"import (\w+)", (ROOT / "eval" / "__init__.py").read_text()) == ["os"]
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    assert not (ROOT / "tokenizers.py").exists()


# Who reads the environment


def environment_readers(name: str) -> set[str]:
    """Name the functions of a module that read os.environ; `<module>` for reads outside functions."""
    readers = set()
    for node, owner in walk_with_owner(modules()[name], "<module>"):
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if dotted in ("os.environ", "os.environb", "os.getenv"):
            readers.add(owner)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            readers |= {owner for alias in node.names if alias.name in ("environ", "environb", "getenv")}
    return readers


def walk_with_owner(node: ast.AST, owner: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield each node and the outermost function around it; what only sets os.environ is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Subscript) and not isinstance(child.ctx, ast.Load):
            continue
        if isinstance(child, ast.Expr) and ast.unparse(child).startswith("os.environ.setdefault("):
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        inner = child.name if is_function and owner == "<module>" else owner
        yield child, inner
        yield from walk_with_owner(child, inner)


def test_one_function_of_the_trainer_reads_the_environment():
    """A variable read elsewhere would be in no log and no recipe."""
    readers = environment_readers(TRAINER)
    assert len(readers) == 1
    assert readers != {"<module>"}


def test_other_modules_read_the_environment_in_one_function_at_most():
    """And the scorers never: a score may not depend on a variable that nobody logged."""
    owners = {name: environment_readers(name) for name in modules() if top(name) not in ("tests", TRAINER)}
    assert {
        name: readers for name, readers in owners.items() if len(readers) > 1 or "<module>" in readers
    } == {}
    assert [name for name, readers in owners.items() if readers and top(name) == "scoring"] == []


# How things are written


def test_functions_fit_on_a_screen():
    """What does not is two functions."""
    too_long = []
    for label, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            limit = LONG_FUNCTION_LINES if (label, node.name) in ALLOWED_LONG else FUNCTION_LINES
            if lines > limit:
                too_long.append(f"{label}:{node.lineno} {node.name}: {lines} lines, at most {limit}")
    assert too_long == []


@pytest.mark.parametrize("label", sources())
def test_source_is_ascii(label):
    """The mix coder packs ASCII alone, and look-alike letters hide in a review."""
    text = sources()[label].read_bytes()
    assert [i for i, line in enumerate(text.split(b"\n"), start=1) if not line.isascii()] == []


def test_no_file_format_runs_code_when_it_is_read():
    """An artifact or a checkpoint comes from strangers: it is data, never a pickle."""
    found = []
    for name, tree in modules().items():
        found += [f"{name} imports {module}" for module in imports(tree) if top(module) in CODE_IN_DATA]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(f"{name}:{node.lineno} uses torch.load")
            if (
                isinstance(node, ast.keyword)
                and node.arg == "allow_pickle"
                and ast.unparse(node.value) != "False"
            ):
                found.append(f"{name}:{node.lineno} allows pickles")
    assert found == []


@pytest.mark.parametrize(
    "old, new",
    [("dev.pack", "pack"), ("eval.audit", "audit"), ("dev.reference_table", "tests.run_reference")],
)
def test_old_commands_name_the_new_ones_and_work(old, new):
    """For one release: what people have typed or written down."""
    done = run_python("-m", old, "--help")
    assert done.stderr == f"python -m {old} is called python -m {new} now\n"
    assert done.stdout.startswith(f"usage: python -m {new} ")
    assert done.returncode == 0


def test_json_goes_through_one_gate():
    """The library raises three kinds of errors, of which two were tracebacks wherever it was called."""
    direct = {
        label
        for label, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
        if top(label).partition("/")[0] != "tests"
    }
    assert direct <= OWN_JSON.keys(), f"call common.parse_json in {direct - OWN_JSON.keys()}"
