"""Print syntax trees as text that is the same whatever Python prints it and compiles on the oldest.

From 3.12 on, `ast.unparse` and python_minifier print f-strings with quotes inside quotes of one kind, which
3.11 cannot read; the rest of what they print is the same from 3.11 to 3.14. So f-strings are printed here,
and the minifier is told to print for OLDEST.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

OLDEST = (3, 11)  # the Python that must read what is printed
QUOTES = ("'", '"', "'''", '"""')
CONVERSIONS = {-1: "", 97: "!a", 114: "!r", 115: "!s"}
STAND_IN = "\0{}\0"  # a name that no program has
NEEDS_BRACKETS = (ast.Lambda, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.IfExp)


def to_text(tree: ast.AST) -> str:
    """Print a tree as `ast.unparse` of Python 3.11 would, f-strings that it cannot print as str.format."""
    if isinstance(tree, ast.JoinedStr):
        return _print_fstring(tree)
    swaps = list(_outermost_fstrings(tree))
    for number, (holder, key, _) in enumerate(swaps):
        _put(holder, key, ast.Name(STAND_IN.format(number), ast.Load()))
    try:
        text = ast.unparse(tree)
    finally:
        for holder, key, node in swaps:
            _put(holder, key, node)
    return re.sub("\0(\\d+)\0", lambda found: _print_fstring(swaps[int(found[1])][2]), text)


def _outermost_fstrings(tree: ast.AST) -> Iterator[tuple[ast.AST | list, str | int, ast.JoinedStr]]:
    """Yield (holder, key, node) of each f-string below `tree` that is in no other."""
    for name, value in ast.iter_fields(tree):
        holder, pairs = (value, enumerate(value)) if isinstance(value, list) else (tree, [(name, value)])
        for key, node in pairs:
            if isinstance(node, ast.JoinedStr):
                yield holder, key, node
            elif isinstance(node, ast.AST):
                yield from _outermost_fstrings(node)


def _put(holder: ast.AST | list, key: str | int, node: ast.expr) -> None:
    """Replace what a list or a node holds."""
    if isinstance(holder, list):
        holder[key] = node
    else:
        setattr(holder, key, node)


class _Unprintable(Exception):
    """An f-string that Python 3.11 has no spelling for with these quotes."""


def _print_fstring(node: ast.JoinedStr) -> str:
    """Print an f-string with the first quotes that suit it, if need be with escaped quotes in its text."""
    for escapes, quote in itertools.product((False, True), QUOTES):
        try:
            text = "".join(_print_part(part, quote, escapes) for part in node.values)
        except _Unprintable:
            continue
        text = f"f{quote}{text}{quote}"
        if _reads_as(text, node):
            return text
    return _print_format(node)


def _reads_as(text: str, node: ast.JoinedStr) -> bool:
    """Whether a text is this f-string, in the Python that runs."""
    try:
        return _shape(ast.parse(text, mode="eval").body) == _shape(node)
    except SyntaxError:
        return False


def _shape(node: ast.JoinedStr) -> str:
    """Describe an f-string without the empty texts that some Pythons (3.12.1) put beside its fields."""
    return re.sub(r"Constant\(value=''\)(, )?", "", ast.dump(node)).replace(", ]", "]")


def _print_part(part: ast.expr, quote: str, escapes: bool) -> str:
    """Print a literal part or a replacement field of an f-string in these quotes."""
    if isinstance(part, ast.Constant):
        text = part.value.encode("unicode_escape").decode()
        text = re.sub(r"\\x([89a-f].)|\\u(....)|\\U(.{8})", _unescaped, text)
        if quote[0] in text and not escapes:
            raise _Unprintable
        text = text.replace(quote[0], "\\" + quote[0])
        return text.replace("{", "{{").replace("}", "}}")
    if isinstance(part.value, NEEDS_BRACKETS):
        value = f"({to_text(part.value)})"
    else:
        value = to_text(part.value)
    value = " " * value.startswith("{") + value
    spec = _print_spec(part.format_spec, quote)
    if any(sign in value for sign in (quote, "\\", "\n", "#")):
        raise _Unprintable
    return f"{{{value}{CONVERSIONS[part.conversion]}{spec}}}"


def _unescaped(found: re.Match) -> str:
    """Write a printable character that unicode_escape spelled out as itself."""
    character = chr(int(found[1] or found[2] or found[3], 16))
    return character if character.isprintable() else found[0]


def _print_spec(spec: ast.JoinedStr | None, quote: str) -> str:
    """Print what follows the colon of a replacement field."""
    if spec is None:
        return ""
    parts = []
    for part in spec.values:
        if isinstance(part, ast.Constant) and set(part.value) & set("{}\\\n'\""):
            raise _Unprintable
        parts.append(part.value if isinstance(part, ast.Constant) else _print_part(part, quote, False))
    return ":" + "".join(parts)


def _print_format(node: ast.JoinedStr) -> str:
    """Print an f-string as a call of str.format, which means the same and needs no quotes inside quotes."""
    values: list[ast.expr] = []

    def template(parts: list[ast.expr]) -> str:
        text = ""
        for part in parts:
            if isinstance(part, ast.Constant):
                text += part.value.replace("{", "{{").replace("}", "}}")
            else:
                values.append(part.value)
                spec = ":" + template(part.format_spec.values) if part.format_spec else ""
                text += f"{{{CONVERSIONS[part.conversion]}{spec}}}"
        return text

    called = ast.Attribute(ast.Constant(template(node.values)), "format", ast.Load())
    return to_text(ast.Call(called, values, []))


@contextmanager
def minifier_prints_for_oldest() -> Iterator[None]:
    """Let python_minifier print for OLDEST: it asks the running Python whether quotes may nest."""
    from python_minifier import expression_printer

    running = expression_printer.sys
    expression_printer.sys = SimpleNamespace(version_info=OLDEST)
    try:
        yield
    finally:
        expression_printer.sys = running
