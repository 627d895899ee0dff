"""Short names mean what the long ones meant, and one long name is as often as possible one short name."""

import ast
import contextlib
import io

import pytest

from pack.rename import rename

SCOPES = """
import json as spelled_json, os.path
from math import floor as rounded, pi

count = 3
table = {name: number for number, name in enumerate("abc")}


class Shape:
    width = count
    sides = [count for unused in range(width)]

    def __init__(self, height, depth=count, *, color="red", **others):
        self.height, self.depth, self.color, self.others = height, depth, color, others

    def area(self, factor=1):
        return self.height * self.width * factor

    @property
    def corner(self):
        return lambda size, count=2: size + count + self.depth


class Child(Shape):
    def area(self, factor=1):
        return super().area(factor=factor) + 1


def outer(first, *rest, scale=1, **named):
    total = 0

    def add(amount):
        nonlocal total
        total += amount * scale
        return total

    if (found := [later for later in rest if later > first]) and named:
        add(found[-1])
    return add(first), total, [name for name in named], {key: {inner for inner in key} for key in named}


def counting():
    global count, made
    count += 1
    made = [count for count in range(2)]
    return count


def failing(value):
    try:
        return 1 / value
    except ZeroDivisionError as error:
        return str(error)
    finally:
        del value


def matching(value):
    match value:
        case [head, *tail]:
            return head, tail
        case {"key": inner, **rest}:
            return inner, rest
        case int() as number:
            return number


class Layer:
    def __call__(self, inner_input, first=0):
        return inner_input + first


class Holder:
    def __init__(self):
        self.layer = Layer()

    def run(self, value):
        return self.layer(value, first=2) + self.layer(inner_input=value)


def swallowing(**others):
    value = 1
    return value, others


def by_string(spelled, named):
    return spelled - named


def handed_on(spoken):
    return spoken


print(table, Shape.sides, Shape(1, color="blue", size=4).others, Child(height=2).area(factor=3))
print(Child(2, 5).corner(1), outer(1, 2, 0, scale=3, alpha=1, beta=2), outer(4), counting(), count, made)
print(failing(0), failing(4), matching([1, 2, 3]), matching({"key": 1, "more": 2}), matching(7))
print(by_string(**{"spelled": 3}, named=1), (lambda func: func(spoken=2))(handed_on), rounded(pi))
print(Holder().run(3), swallowing(others=4, value=2))
print(spelled_json.dumps([os.path.basename("a/b")]), [i for i in range(3) if i], sorted("ba", key=ord))
"""


def output_of(source: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "source", "exec"), {"__name__": "source"})
    return printed.getvalue()


def renamed(source: str, kept_globals=(), kept_locals=()) -> str:
    tree = ast.parse(source)
    rename(tree, list(kept_globals), set(kept_locals))
    return ast.unparse(tree)


def test_a_renamed_program_does_what_it_did():
    """Every kind of scope and binding must resolve as Python does, or a packed program is another program."""
    made = renamed(SCOPES)
    assert output_of(made) == output_of(SCOPES)
    for name in (
        "amount",
        "total",
        "later",
        "outer",
        "Child",
        "spelled_json as",
        "tail",
        "rounded",
        "unused",
    ):
        assert name not in made
    for name in ("def area", "spoken=2", "spelled,", "os.path"):
        assert name in made


@pytest.mark.parametrize("builtin", ["eval", "locals", "globals"])
def test_a_program_that_looks_names_up_keeps_them(builtin):
    """What these builtins find is known by its name alone."""
    source = f"def find(value):\n    return {builtin}\n"
    assert renamed(source) == source.strip()


def test_one_name_is_one_short_name_everywhere():
    """Equal spelling is what the compressor saves on; per-function names cost the 1.0611 recipe 1.3 KB."""
    source = "def f(cfg, x):\n    return cfg + x\ndef g(x, y, z, cfg):\n    return x * y * z * cfg\nf(1, 2)\n"
    first, second, _ = ast.parse(renamed(source)).body
    assert [arg.arg for arg in first.args.args] == [second.args.args[i].arg for i in (3, 0)]


def test_no_short_name_hides_what_a_scope_reads():
    """A builtin, a kept global or an outer variable of one letter must stay visible."""
    source = (
        "a = 1\ndef f(value):\n    b = [a for _ in value]\n    return lambda third: (third, a, b, c)\nc = 2\n"
    )
    made = renamed(source, kept_globals=["a"], kept_locals=())
    space: dict = {}
    exec(made, space)
    name = next(key for key, value in space.items() if callable(value))
    assert space["a"] == 1 and space[name]([5])(7) == (7, 1, [1], 2)


def test_names_of_kernels_stay_and_other_globals_shorten():
    """A Triton kernel reads its globals and constants by name."""
    source = "LIMIT = 1\nOTHER = 2\ndef kernel(BLOCK):\n    return BLOCK + LIMIT\n"
    made = renamed(source, kept_locals=["BLOCK", "LIMIT"])
    assert made == "LIMIT = 1\na = 2\n\ndef b(BLOCK):\n    return BLOCK + LIMIT"
