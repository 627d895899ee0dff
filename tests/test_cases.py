"""The violations library: each violation fails its checks, each legal twin passes, in whatever disguise."""

import ast
import base64
import builtins
import lzma
import shutil

import pytest

from audit.checks import Finding
from audit.matrix import CASES, FOLDER, MatrixRow, is_as_expected, program_text, run_case
from audit.run import run_program

pytestmark = pytest.mark.numeric

QUICK = ("train_on_val", "later_epoch", "hashed_cache", "carried_state")
PROTOCOL = {"load", "score"}
BY_NAME = {row.name: row for row in CASES}


def variants(rows):
    """Each row as (file name, checks that must fail it): the violation and its twin."""
    return [pair for row in rows for pair in ((row.name, set(row.checks)), (f"{row.name}_fixed", set()))]


class Renamer(ast.NodeTransformer):
    """Give every name that a program binds another one; the protocol's stay."""

    def __init__(self, tree):
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and is_stored(node)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        bound -= PROTOCOL | set(dir(builtins))
        self.names = {name: f"x{number}" for number, name in enumerate(sorted(bound))}

    def visit_Name(self, node):
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node):
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_FunctionDef(self, node):
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)


def is_stored(node):
    return isinstance(node.ctx, ast.Store)


def renamed(source):
    tree = ast.parse(source)
    return ast.unparse(Renamer(tree).visit(tree))


def wrapped(source):
    blob = base64.b85encode(lzma.compress(source.encode())).decode()
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{blob}")))\n'


def with_helper(source):
    """Split a program into a helper module with all of it and a main program: (program, helper)."""
    body, guard, rest = source.partition("if __name__")
    return f"from helper import *\n\n{guard}{rest}", body


DISGUISES = {
    "renamed": lambda source: (renamed(source), ""),
    "wrapped": lambda source: (wrapped(source), ""),
    "helper": with_helper,
    "all": lambda source: tuple(map(wrapped, with_helper(renamed(source)))),
}


def run_disguised(folder, name, disguise):
    shutil.copy(FOLDER / "toy.py", folder)
    program, helper = DISGUISES[disguise](program_text(name))
    (folder / "train_gpt.py").write_text(program)
    (folder / "helper.py").write_text(helper)
    return run_program(folder / "train_gpt.py")


def facts(found):
    return {check: finding for check, finding in found.items() if finding.verdict != "PASS"}


@pytest.mark.parametrize(("name", "expected"), variants([BY_NAME[name] for name in QUICK]))
def test_cases_come_out_as_expected(name, expected):
    """One mechanism each of training, adaptation, normalisation and packaging."""
    found = run_case(name)
    assert is_as_expected(found, expected), facts(found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), variants(row for row in CASES if row.name not in QUICK))
def test_all_other_cases_come_out_as_expected(name, expected):
    """The library is what the checks promise."""
    found = run_case(name)
    assert is_as_expected(found, expected), facts(found)


@pytest.mark.parametrize("disguise", ["renamed", "wrapped", "helper"])
def test_a_disguise_hides_nothing(tmp_path, disguise):
    """Verdicts rest on what the program does: source checkers were fooled by aliases and wrappers."""
    found = run_disguised(tmp_path, "later_epoch", disguise)
    assert is_as_expected(found, set(BY_NAME["later_epoch"].checks)), facts(found)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), variants(CASES))
def test_all_cases_come_out_alike_in_every_disguise_at_once(tmp_path, name, expected):
    """Renamed, the leak in a helper module, both wrapped in lzma and base85."""
    found = run_disguised(tmp_path, name, "all")
    assert is_as_expected(found, expected), facts(found)


def test_every_case_is_a_short_pair():
    """A case is read as documentation: what breaks the rule, and what does not."""
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "toy"}
    assert files == {row.name for row in CASES}
    assert max(len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")) < 120
    assert max(len(program_text(name).splitlines()) for name in files) < 80
    assert all("\n\nLegal" in ast.get_docstring(ast.parse(program_text(name))) for name in files)
    assert all(program_text(name).count("\nLEGAL = False\n") == 1 for name in files)


def test_a_suspicion_spoils_a_twin_and_does_not_stand_for_a_failure():
    """The judge of the matrix itself: a legal program may not even be suspected."""
    row = MatrixRow("x", ("K12",))
    assert not is_as_expected({"K12": Finding("PASS", []), "K18": Finding("SUSPECT", [])}, set())
    assert not is_as_expected({"K12": Finding("NOT RUN", [])}, set(row.checks))
    assert not is_as_expected({"K12": Finding("SUSPECT", [])}, set(row.checks))
    assert is_as_expected({"K12": Finding("FAIL", []), "K18": Finding("PASS", [])}, set(row.checks))
