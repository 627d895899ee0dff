"""Text that every Python from 3.11 on prints alike and reads: f-strings are what they differ in."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.printing import OLD_STRING, to_text
from pack.program import minify

VALUES = {"a": "it's", "b": 3.14159, "w": 12, "d": {"k": 'a "b"', "'": "\\", "#": "\n"}}
SPELLED = {
    """f'{", ".join(a)}'""": """f"{', '.join(a)}\"""",
    """f"{d['k']} and {a!r:>{w}}\"""": None,
    """f'it is {a}'""": None,
    '''f"it's {d['k']}"''': None,
    """f'"{b:.2f}" {{}}'""": None,
    """f'{(lambda: w)()} {(a if b else d)} { {1: 2}[1]}'""": None,
    """f"{'a' + f'{b}'}\"""": None,
    """f'{b=}'""": "f'b={b!r}'",
    r"""f'{a}\n\t\\ X'""".replace("X", "\xe9"): None,
    "f''": None,
}


@pytest.mark.parametrize("source, text", SPELLED.items())
def test_fstrings_are_spelled_like_the_oldest_python_spells_them(source, text):
    """Other quotes inside than outside; None: as they are written."""
    assert to_text(ast.parse(source)) == (text or source)


@pytest.mark.parametrize(
    "value, text",
    [
        ("\n", r"''.join(('{}'.format(a.split('\n')), '!'))"),
        ("#", "''.join(('{}'.format(a.split('#')), '!'))"),
        ("\\", r"''.join(('{}'.format(a.split('\\')), '!'))"),
        ("'''\"\"\"", None),
    ],
)
def test_what_no_quotes_can_hold_is_a_call_of_format(value, text):
    """A recipe's text that folding puts inside an f-string; 3.11 allows no backslash there."""
    tree = ast.parse("f'{a.split(SEPARATOR)}!'")
    tree.body[0].value.values[0].value.args[0] = ast.Constant(value)
    printed = to_text(tree)
    assert text in (None, printed)
    assert eval(printed, {"a": f"x{value}y"}) == "['x', 'y']!"


class Odd:
    """A value whose format says which specification it got."""

    def __format__(self, spec: str) -> str:
        return f"<{spec}>"


@pytest.mark.parametrize(
    "source",
    [
        r'f"{x:\x7b>4}"',
        r'f"{odd:a\x7db}|{odd:\u007d}"',
        r'f"{calls!r:\">4} {calls.append(1)} {calls}"',
        r'f"{odd:\"{calls.append(1)}{calls}\"}"',
        r'f"{int} {odd} {calls!r:\">9.4}"',
    ],
)
def test_calls_format_each_field_when_its_turn_comes(source):
    """Braces in a specification, what a later field changes, classes, whose __format__ needs an instance."""
    names = [{"x": 1, "odd": Odd(), "calls": []} for _ in range(2)]
    printed = to_text(ast.parse(source))
    assert "format(" in printed
    assert eval(printed, names[0]) == eval(source, names[1])


@pytest.mark.parametrize(
    "text, whole",
    [
        ("f'a'", True),
        ('f"""{len("it\'s")}"""', True),
        ("f'{len(\"it's\")}'", False),
        (r"f'a\'b'", True),
        ("f'''{f'''a'''}'''", False),
        ("f'''a\nb'''", True),
        ("f'a\nb'", False),
        (r"rf'\d'", True),
        ("f'a'f'b'", False),
    ],
)
def test_old_pythons_end_a_string_at_its_first_quote(text, whole):
    """What decides, on a new Python, whether an old one reads a spelling."""
    assert bool(OLD_STRING.fullmatch(text)) == whole


def test_the_tree_is_left_as_it_was():
    """Placeholders stand in for f-strings only while the rest is printed."""
    tree = ast.parse("x = [f'{a}', g(f'{b!r}', k=f'{w:>{w}}')]\nassert x, f'no {x}'")
    before = ast.dump(tree)
    to_text(tree)
    assert ast.dump(tree) == before


def fields(depth: int) -> st.SearchStrategy[ast.expr]:
    """Expressions of a replacement field: names, text of any kind, subscripts, f-strings in f-strings."""
    names = st.sampled_from(["a", "b", "w"]).map(lambda name: ast.Name(name, ast.Load()))
    keys = st.sampled_from(sorted(VALUES["d"])).map(
        lambda key: ast.Subscript(ast.Name("d", ast.Load()), ast.Constant(key), ast.Load())
    )
    texts = st.text("ab'\"\\\n{}#\xe9\0", max_size=4).map(ast.Constant)
    choices = [names, keys, texts]
    return st.one_of(*choices, fstrings(depth - 1)) if depth else st.one_of(*choices)


@st.composite
def fstrings(draw, depth: int = 2) -> ast.JoinedStr:
    """F-string trees, as folding can make them: parts that no source has written."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()) and not (parts and isinstance(parts[-1], ast.Constant)):
            parts.append(ast.Constant(draw(st.text("ab'\"\\\n\r{}\t\xe9\0", min_size=1, max_size=5))))
        else:
            spec = draw(st.sampled_from([None, ">9", "\x22>9", "{<9", "w"]))
            if spec == "w":  # a width that is computed
                width = ast.FormattedValue(ast.Name("w", ast.Load()), -1, None)
                spec = ast.JoinedStr([ast.Constant("<"), width])
            elif spec:
                spec = ast.JoinedStr([ast.Constant(spec)])
            conversion = draw(st.sampled_from([114, 115, 97]) if spec else st.sampled_from([-1, 114]))
            parts.append(ast.FormattedValue(draw(fields(depth)), conversion, spec))
    return ast.JoinedStr(parts)


@settings(deadline=None)
@given(fstrings())
def test_any_fstring_keeps_its_value(node):
    """Printed, and printed again by the minifier."""
    expression = ast.fix_missing_locations(ast.Expression(node))
    expected = eval(compile(expression, "tree", "eval"), dict(VALUES))
    text = to_text(node)
    assert eval(text, dict(VALUES)) == expected
    names = dict(VALUES)
    exec(minify(f"main = {text}"), names)
    assert names["main"] == expected
