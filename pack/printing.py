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
# A whole string for Pythons before 3.12: it ends at the first of its quotes that no backslash precedes.
OLD_STRING = re.compile(
    r"""(?s)r?f('''((?!''')[^\\]|\\.)*'''|\"""((?!\""")[^\\]|\\.)*\"""|'[^'\\\n]*(\\.[^'\\\n]*)*'|"[^"\\\n]*(\\.[^"\\\n]*)*")"""
)
NEEDS_BRACKETS = (ast.Lambda, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.IfExp)


def to_text(tree: ast.AST) -> str:
    """Print a tree as `ast.unparse` of Python 3.11 would, f-strings that it cannot print as calls."""
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
    return _print_calls(node)


def _reads_as(text: str, node: ast.JoinedStr) -> bool:
    """Whether a text is this f-string, in the Python that runs, and one string for OLDEST."""
    if not OLD_STRING.fullmatch(text):
        return False
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


def _print_calls(node: ast.JoinedStr) -> str:
    """Print an f-string as calls of str.format, field after field as the f-string formats them.

    They need no quotes inside quotes. One call for all would evaluate the last before it formats the first.
    """
    parts = [part if isinstance(part, ast.Constant) else _format_call(part) for part in node.values]
    whole = ast.Tuple(parts, ast.Load())
    return to_text(parts[0] if len(parts) == 1 else _call(ast.Constant(""), "join", whole))


def _format_call(part: ast.FormattedValue) -> ast.Call:
    """Return a field as a call: '{!r}'.format(x), with a specification '{:{}}'.format(x, spec)."""
    conversion, spec, value = CONVERSIONS[part.conversion], part.format_spec, part.value
    if spec is None:
        return _call(ast.Constant(f"{{{conversion}}}"), "format", value)
    if conversion:  # before the specification is evaluated
        template = ast.Constant(conversion.replace("!", "%"))
        value = ast.BinOp(template, ast.Mod(), ast.Tuple([value], ast.Load()))
    if all(isinstance(inner, ast.Constant) for inner in spec.values):
        spec = ast.Constant("".join(inner.value for inner in spec.values))
    return _call(ast.Constant("{:{}}"), "format", value, spec)


def _call(owner: ast.expr, method: str, *arguments: ast.expr) -> ast.Call:
    """Return a call of a method."""
    return ast.Call(ast.Attribute(owner, method, ast.Load()), list(arguments), [])


@contextmanager
def minifier_prints_for_oldest() -> Iterator[None]:
    """Let python_minifier print for OLDEST.

    It asks the running Python whether quotes may nest, and takes any spelling that this Python reads.
    """
    from python_minifier import expression_printer
    from python_minifier.f_string import FString

    running, is_correct = expression_printer.sys, FString.is_correct_ast
    expression_printer.sys = SimpleNamespace(version_info=OLDEST)
    FString.is_correct_ast = lambda self, code: bool(OLD_STRING.fullmatch(code)) and is_correct(self, code)
    try:
        yield
    finally:
        expression_printer.sys, FString.is_correct_ast = running, is_correct
