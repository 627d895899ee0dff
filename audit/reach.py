"""What of a program can run under the configuration that ran: branches that its settings rule out are dead.

Errs towards live: a function is live when live code mentions its name; a branch is dead only when its
condition is computed from settings and literals. Works on syntax trees; nothing is executed.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

COMPARE: dict[type, Callable] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda value, group: value in group,
    ast.NotIn: lambda value, group: value not in group,
}
CONVERT = {"int": int, "float": float, "bool": bool, "str": str}
JUMPS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
Function = ast.FunctionDef | ast.AsyncFunctionDef
ALWAYS_LIVE = {"forward", "backward", "main"}  # called through torch or a launcher
MARKS = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)  # nodes without a place
UNKNOWN = object()


class Live(NamedTuple):
    """A live syntax node, the layer it is in and the function around it (None: module level)."""

    layer: str
    function: Function | None
    node: ast.AST


def read_literal(text: str) -> Any:
    """Turn a value as a log prints it into a Python value; a word stays a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def read_settings(
    trees: list[ast.Module], logged: dict[str, str], environment: dict[str, str]
) -> dict[str, Any]:
    """Return name -> value of the settings that a program takes from the environment; the log wins.

    A name that is also set in another way has no known value.
    """
    found: dict[str, Any] = {}
    spoiled = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = last_name(target)
            value = evaluate(node.value, {}, environment) if _reads_environment(node.value) else UNKNOWN
            if value is UNKNOWN or found.get(name, value) != value:
                spoiled.add(name)
            found[name] = value
    found = {name: value for name, value in found.items() if name not in spoiled}
    return found | {key: read_literal(text) for key, text in logged.items() if key in found}


def last_name(node: ast.AST) -> str:
    """Return the last name of a Name or Attribute, "" for others."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _reads_environment(node: ast.AST) -> bool:
    attributes = (inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
    return any(name in ("environ", "getenv") for name in attributes)


def evaluate(node: ast.expr, settings: dict[str, Any], environment: dict[str, str] | None = None) -> Any:
    """Compute a condition from settings and literals; UNKNOWN where it depends on more."""

    def inner(child: ast.expr) -> Any:
        return evaluate(child, settings, environment)

    match node:
        case ast.Constant():
            return node.value
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return settings.get(name, UNKNOWN)
        case ast.Tuple() | ast.List() | ast.Set():
            values = [inner(item) for item in node.elts]
            return UNKNOWN if UNKNOWN in values else values
        case ast.UnaryOp(op=ast.Not()):
            value = inner(node.operand)
            return UNKNOWN if value is UNKNOWN else not value
        case ast.BoolOp():
            return _evaluate_bool(node, [inner(child) for child in node.values])
        case ast.Compare(ops=[op], comparators=[right]):
            return _apply(COMPARE.get(type(op)), inner(node.left), inner(right))
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in CONVERT:
            return _apply(CONVERT[name], inner(argument))
        case ast.Call(func=ast.Attribute(attr="get" | "getenv"), args=[ast.Constant(value=key), *rest]):
            if environment is None or not isinstance(key, str):
                return UNKNOWN
            return environment.get(key, inner(rest[0]) if rest else None)
        case ast.Call(func=ast.Attribute(attr="lower" | "strip"), args=[]):
            value = inner(node.func.value)
            return value.lower().strip() if isinstance(value, str) else UNKNOWN
    return UNKNOWN


def _apply(function: Callable | None, *values: Any) -> Any:
    if function is None or UNKNOWN in values:
        return UNKNOWN
    try:
        return function(*values)
    except (TypeError, ValueError, OverflowError):
        return UNKNOWN


def _evaluate_bool(node: ast.BoolOp, values: list[Any]) -> Any:
    """A decisive operand decides even beside unknown ones."""
    decisive = isinstance(node.op, ast.Or)
    known = [bool(value) for value in values if value is not UNKNOWN]
    if decisive in known:
        return decisive
    return (not decisive) if len(known) == len(values) else UNKNOWN


def live_nodes(layers: dict[str, ast.Module], settings: dict[str, Any]) -> list[Live]:
    """Return every node that can run: module levels, and functions whose names live code mentions."""
    found: list[Live] = []
    waiting: dict[str, list[tuple[str, Function]]] = {}  # functions seen, not mentioned yet
    mentioned: set[str] = set(ALWAYS_LIVE)
    todo: list[Live] = [Live(name, None, tree) for name, tree in layers.items()]
    while todo:
        layer, function, node = todo.pop()
        found.append(Live(layer, function, node))
        name = last_name(node)
        if name and name not in mentioned:
            mentioned.add(name)
            for home, body in waiting.pop(name, []):
                todo += [Live(home, body, child) for child in _statements(body.body, settings)]
        for child in _live_children(node, settings):
            if not isinstance(child, Function):
                todo.append(Live(layer, function, child))
                continue
            todo += [Live(layer, function, part) for part in [*child.decorator_list, child.args]]
            if child.name in mentioned or child.name.startswith("__") or child.decorator_list:
                todo += [Live(layer, child, part) for part in _statements(child.body, settings)]
            else:
                waiting.setdefault(child.name, []).append((layer, child))
    return found


def _live_children(node: ast.AST, settings: dict[str, Any]) -> Iterator[ast.AST]:
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield from _statements(_branch(node, value, settings), settings)
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST) and not isinstance(value, MARKS):
            if isinstance(node, ast.IfExp) and value is not node.test:
                truth = evaluate(node.test, settings)
                if truth is not UNKNOWN and bool(truth) != (value is node.body):
                    continue
            yield value


def _branch(node: ast.AST, statements: list[ast.stmt], settings: dict[str, Any]) -> list[ast.stmt]:
    """The statements of a branch; none where the condition of an `if` or `while` rules it out."""
    if not isinstance(node, ast.If | ast.While):
        return statements
    truth = evaluate(node.test, settings)
    if truth is UNKNOWN or (isinstance(node, ast.While) and statements is node.orelse):
        return statements
    return statements if bool(truth) == (statements is node.body) else []


def _statements(statements: list[ast.stmt], settings: dict[str, Any]) -> Iterator[ast.stmt]:
    """Yield statements up to the first that always leaves the block."""
    for statement in statements:
        yield statement
        taken = [statement]
        if isinstance(statement, ast.If):
            truth = evaluate(statement.test, settings)
            taken = [] if truth is UNKNOWN else statement.body if truth else statement.orelse
        if taken and isinstance(taken[-1], JUMPS):
            return
