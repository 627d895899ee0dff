"""The file that a recipe really runs, for people: one Python file, names, docstrings and comments kept.

    python -m pack --recipe records/.../recipe.toml --readable --out runs/packed/readable.py

The program is specialized as a packed one is (pack/specialize), but nothing is shortened or wrapped. Its
statements are printed as their files have them (pack/layout.py), in the order of train_gpt.py's sections:
MODULES says in which section a module's code stands. Formatted by ruff.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common import atomic_file
from pack.layout import Layout
from pack.names import Definition, Function, Import, bound_names, children, free_names
from pack.printing import to_text
from pack.program import (
    ENTRY,
    IMPORTS_LABEL,
    PackingError,
    Statement,
    bundle,
    has_library,
    is_main_guard,
    read_sections,
    specialize,
)
from pack.size import sections
from pack.specialize.facts import FOR_READERS
from pack.specialize.syntax import is_text

READABLE_NAME = "train_gpt_readable.py"  # beside a record's packed program
WIDTH = 110
RULE = "# " + "-" * 106
SCORING = "scoring"
# Where a module's code stands: the first row whose text starts its path.
MODULES = {
    "common.py": "1",
    "formats/recipe.py": "2",
    "formats/rules.py": "2",
    "formats/help.py": "2",
    "quantizers/config.py": "2",
    "scoring/config.py": "2",
    "kernels/machine.py": "3",
    "formats/events.py": "3",
    "formats/curves.py": "3",
    "data/": "4",
    "kernels/": "5",
    "quantizers/": "9",
    "formats/checkpoints.py": "11",
    "formats/": "10",
    "scoring/": SCORING,
}
RUFF_COMMANDS = (
    ("check", "--select=I", "--fix-only", "--quiet"),
    ("format", "--config=format.skip-magic-trailing-comma=true", "--quiet"),
)
RUFF = ("--isolated", f"--line-length={WIDTH}", "--target-version=py311")


class ReadableReport(NamedTuple):
    """What `write_readable` wrote."""

    out: str
    lines: int
    bytes: int


class Section(NamedTuple):
    """A part of the file: the banner's lines, and the statements."""

    banner: list[str]
    statements: list[Statement]


def write_readable(recipe_path: Path, out: Path, entry: Path = ENTRY) -> ReadableReport:
    """Write the one file that a recipe runs."""
    text = make_readable(recipe_path, entry)
    compile(text, str(out), "exec")
    with atomic_file(out) as file:
        file.write(text.encode())
    return ReadableReport(str(out), text.count("\n"), len(text.encode()))


def make_readable(recipe_path: Path, entry: Path = ENTRY) -> str:
    """Return the text of the one file that a recipe runs."""
    return arrange(for_readers(recipe_path, entry), recipe_path, entry)


def for_readers(recipe_path: Path, entry: Path = ENTRY) -> list[Statement]:
    """Return the program of a recipe: without what the main guard has for other names, the hook of audits."""
    statements = bundle(entry, entry.resolve().parent)
    for guard in (one.node for one in statements if is_main_guard(one.node)):
        guard.orelse = []
    return specialize(statements, read_sections(recipe_path), FOR_READERS)


def arrange(statements: list[Statement], recipe_path: Path, entry: Path = ENTRY) -> str:
    """Return the text of a specialized program: in order, in the words of its files, formatted."""
    root = entry.resolve().parent
    labels = {statement.label for statement in statements} | {entry.name}
    sources = {
        label: Layout((root / label).read_text(encoding="utf-8")) for label in labels - {IMPORTS_LABEL}
    }
    text = compose(in_sections(statements, sources, entry.name), sources, entry.name, recipe_path)
    made = ruff_format(text)
    check_same(statements, made)
    return made


# ----------------------------------------------------------------------------------------------------------
# Order
# ----------------------------------------------------------------------------------------------------------


def in_sections(statements: list[Statement], sources: dict[str, Layout], entry: str) -> list[Section]:
    """Deal statements to sections, each before what needs it at module level."""
    banners = read_banners(sources[entry].lines)
    keys = [key for key, _, _ in banners]
    groups: dict[str, list[Statement]] = {key: [] for key in keys}
    for statement in statements:
        groups[section_of(statement, banners, entry)].append(statement)
    order = [statement for key in keys for statement in groups[key]]
    placed = before_use(order, {id(one.node): key for key in keys for one in groups[key]})
    return [Section(banner, placed[key]) for key, _, banner in banners if placed[key]]


def read_banners(lines: list[str]) -> list[tuple[str, int, list[str]]]:
    """Find the entry's sections: (key, first line, lines of the banner and the comment below it)."""
    found = []
    for name, start in sections("\n".join(lines)):
        end = start + 2
        while lines[end].startswith("#"):
            end += 1
        key = name.split()[0]
        if key == "11":
            found.append((SCORING, start, [RULE, "# scoring", RULE]))
        found.append((key, start, lines[start - 1 : end] if key != "0" else []))
    return found


def section_of(statement: Statement, banners: list[tuple[str, int, list[str]]], entry: str) -> str:
    """Return the key of the section that a statement belongs to."""
    label, node = statement
    keys = {key for key, _, _ in banners}
    if label == IMPORTS_LABEL:
        return "1" if "1" in keys else "0"
    if label == entry:
        return [key for key, start, _ in banners if key != SCORING and start <= node.lineno][-1]
    key = next((key for start, key in MODULES.items() if label.startswith(start)), "1")
    return key if key in keys else "0"


def before_use(order: list[Statement], keys: dict[int, str]) -> dict[str, list[Statement]]:
    """Move what a statement needs as it runs before it; returns {section: statements}."""
    owners: dict[str, list[Statement]] = defaultdict(list)
    for statement in order:
        for name, _ in bound_names(statement.node):
            owners[name].append(statement)
    placed: dict[str, list[Statement]] = defaultdict(list)
    done: set[int] = set()

    def put(statement: Statement, key: str) -> None:
        if id(statement.node) in done:
            return
        done.add(id(statement.node))
        for name in sorted(names_at_once(statement.node, owners, set())):
            for owner in owners[name]:
                put(owner, key)
        placed[key].append(statement)

    for statement in order:
        put(statement, keys[id(statement.node)])
    return placed


def names_at_once(node: ast.AST, owners: dict[str, list[Statement]], seen: set[str]) -> set[str]:
    """Name what must be defined when a statement runs: not what is in functions, unless it calls them."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            parts = [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]
        case ast.Lambda():
            parts = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        case _:
            parts = children(node)
    found = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else set()
    for part in parts:
        found |= names_at_once(part, owners, seen)
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Name) and called.id not in seen:
        seen.add(called.id)
        for owner in owners.get(called.id, []):
            for inner in run_by_call(owner.node):
                found |= free_names(inner)
                found |= names_at_once(ast.Module(inner.body, []), owners, seen)
    return found & owners.keys()


def run_by_call(node: ast.stmt) -> list[Function]:
    """List the functions that run when a function or class is called."""
    if isinstance(node, Function):
        return [node]
    special = ("__init__", "__new__", "__post_init__")
    inner = node.body if isinstance(node, ast.ClassDef) else []
    return [one for one in inner if isinstance(one, Function) and one.name in special]


# ----------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------


def compose(found: list[Section], sources: dict[str, Layout], entry: str, recipe: Path) -> str:
    """Print sections below each other."""
    introduced: set[str] = set()
    lines = [*introduction(sources[entry].tree, recipe), ""]
    for section in found:
        lines += ["", *section.banner, ""]
        current = ""
        for label, node in section.statements:
            if is_text(node):
                continue
            if label not in (current, IMPORTS_LABEL) and (current or label != entry):
                nodes = [] if label == entry else [node for at, node in section.statements if at == label]
                made = headline(label, sources[label].tree, nodes if label not in introduced else [])
                introduced |= {label} if ": " in made[0] else set()
                lines += ["", *made]
            current = label if label != IMPORTS_LABEL else current
            if label == IMPORTS_LABEL:
                lines.append(to_text(node))
            else:
                made = without_banners(sources[label].statement(node, 0), label == entry)
                lines += [*([""] if made[0].startswith("#") else []), *made]
            lines += [""] * (2 if isinstance(node, Definition) else 0)
    return "\n".join(lines) + "\n"


def introduction(tree: ast.Module, recipe: Path) -> list[str]:
    """Return the file's docstring: what the entry does, which recipe this is, map and shapes."""
    paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    name = recipe.resolve().parent.name if recipe.name == "recipe.toml" else recipe.stem
    about = (
        f"The file that the recipe {name} runs:\n"
        "train_gpt.py and the modules that it imports, less what the recipe switches off. What it fixes is\n"
        "written into the code. It weighs itself as code: where weights are fitted to a number of bytes,\n"
        "they get fewer than in the packed program.\n\n"
        "    torchrun --standalone --nproc_per_node=8 FILE      on eight GPUs\n"
        "    python FILE run.seed=7                             other values of the fields declared below"
    )
    kept = [text for text in paragraphs if text.startswith(("Map:", "Shapes:"))]
    text = "\n\n".join([paragraphs[0], about, *kept])
    return [f'"""{text}\n"""']


def headline(label: str, tree: ast.Module, nodes: list[ast.stmt]) -> list[str]:
    """Name a module and, where more is left of it than constants, say what it does, in comments."""
    about = (ast.get_docstring(tree) or "").split("\n\n")[0]
    is_short = len(nodes) < 3 or not any(isinstance(node, Definition) for node in nodes)
    text = label if is_short else f"{label}: {about}"
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)]


def without_banners(lines: list[str], has_about: bool) -> list[str]:
    """Drop banners above a statement, and with `has_about` the comment right below the last one."""
    last = max((i for i, line in enumerate(lines) if re.match(r"# -{20,}$", line)), default=-1)
    rest = lines[last + 1 :]
    while has_about and last >= 0 and rest[0].startswith("#"):
        rest = rest[1:]
    return rest


def ruff_format(text: str) -> str:
    """Format by ruff: imports sorted, one statement a line."""
    if not has_library("ruff"):
        raise PackingError("--readable: formatting needs ruff. Install it: pip install ruff.")
    for command in RUFF_COMMANDS:
        words = [sys.executable, "-m", "ruff", *command, *RUFF, "--stdin-filename=readable.py", "-"]
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackingError(f"--readable: `ruff {command[0]}` failed: {done.stderr.strip()}")
        text = done.stdout
    return text


def check_same(statements: list[Statement], text: str) -> None:
    """Raise unless a text has just these statements, imports aside."""
    expected = one_liners(statement.node for statement in statements)
    found = one_liners(ast.parse(text).body)
    if expected != found:
        odd = next(iter((expected - found) or (found - expected)))
        raise PackingError(
            f"--readable: expected the statements of the packed program, found another: {odd[:300]}. "
            "Write that statement in another way, or report this."
        )


def one_liners(nodes: Iterable[ast.stmt]) -> Counter:
    """Print statements but imports and docstrings, white space aside."""
    kept = [node for node in nodes if not isinstance(node, Import) and not is_text(node)]
    return Counter(re.sub(r"\s+", " ", to_text(node)) for node in kept)
