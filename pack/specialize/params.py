"""Parameters that a function never reads: out of its signature and of every call."""

import ast
from collections import Counter, defaultdict
from typing import NamedTuple

from pack.names import PURE_DECORATORS, last_name, walk
from pack.specialize.facts import ProgramFacts
from pack.specialize.syntax import constructor, is_pure, is_steady, parameters


class Candidate(NamedTuple):
    """A function or constructor that is only ever called by its name."""

    node: ast.FunctionDef
    calls: list[ast.Call]
    is_method: bool


def drop_parameters(program: ProgramFacts, kinds: dict[type, list]) -> None:
    """Drop unread parameters of functions and constructors that are only ever called by their name."""
    calls, loads = _uses(kinds)
    bound = _rebound(kinds)
    relatives = program.relatives
    candidates: list[Candidate] = []
    for name, made in [*program.functions.items(), *program.classes.items()]:
        node = constructor(made) if isinstance(made, ast.ClassDef) else made
        if node is None or (node is not made and name in relatives | program.unseen):
            continue
        is_plain = all(last_name(one) in PURE_DECORATORS for one in node.decorator_list)
        if is_plain and name not in bound and len(calls[name]) == loads[name]:
            candidates.append(Candidate(node, calls[name], is_method=node is not made))
    while any(list(map(_drop, candidates))):  # a parameter may be read for what a call no longer gives
        pass


def _uses(kinds: dict[type, list]) -> tuple[dict[str, list[ast.Call]], Counter]:
    """Return every call of a name, and how often a name is read other than in annotations and isinstance."""
    calls = defaultdict(list)
    for node in kinds[ast.Call]:
        if isinstance(node.func, ast.Name):
            calls[node.func.id].append(node)
    loads = Counter(node.id for node in kinds[ast.Name] if isinstance(node.ctx, ast.Load))
    aside = [call.args[1] for call in calls["isinstance"]]
    for kind in (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign):
        aside += [one for node in kinds[kind] for one in _annotations(node)]
    loads.subtract(inner.id for one in aside for inner in walk(one) if isinstance(inner, ast.Name))
    return calls, loads


def _annotations(node: ast.AST) -> list[ast.expr]:
    """List the annotations of a function or an assignment."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            found = [node.returns, *(arg.annotation for arg in parameters(node.args))]
            return [one for one in found if one is not None]
        case ast.AnnAssign():
            return [node.annotation]
    return []


def _rebound(kinds: dict[type, list]) -> set[str]:
    """Name what functions bind inside: a call by such a name may be another thing's."""
    names = {node.id for node in kinds[ast.Name] if not isinstance(node.ctx, ast.Load)}
    return names.union(node.arg for node in kinds[ast.arg])


def _drop(candidate: Candidate) -> bool:
    """Drop unread parameters where all calls spell theirs out and leave no effect behind. Was there any?"""
    node, calls, is_method = candidate
    unclear = any(isinstance(arg, ast.Starred) for call in calls for arg in call.args)
    if unclear or any(one.arg is None for call in calls for one in call.keywords) or not calls:
        return False
    if node.args.vararg or node.args.kwarg or node.args.posonlyargs:
        return False
    read = {inner.id for one in node.body for inner in walk(one) if isinstance(inner, ast.Name)}
    has_dropped = False
    for arg in [*node.args.args[is_method:], *node.args.kwonlyargs]:
        at = node.args.args.index(arg) - is_method if arg in node.args.args else None
        given = [value for call in calls if (value := _given(call, at, arg.arg)) is not None]
        if arg.arg not in read and all(map(is_steady, given)) and _has_plain_default(node.args, arg):
            has_dropped = True
            _remove_parameter(node.args, arg)
            for call in calls:
                if at is not None and at < len(call.args):
                    del call.args[at]
                call.keywords = [one for one in call.keywords if one.arg != arg.arg]
    return has_dropped


def _has_plain_default(arguments: ast.arguments, arg: ast.arg) -> bool:
    """Whether making a parameter's default, if it has one, has no effect."""
    pairs = [*zip(reversed(arguments.args), reversed(arguments.defaults))]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return all(value is None or is_pure(value) for one, value in pairs if one is arg)


def _given(call: ast.Call, at: int | None, name: str) -> ast.expr | None:
    """Return what a call gives for a parameter."""
    if at is not None and at < len(call.args):
        return call.args[at]
    return next((one.value for one in call.keywords if one.arg == name), None)


def _remove_parameter(arguments: ast.arguments, arg: ast.arg) -> None:
    """Take a parameter and its default out of a signature."""
    if arg in arguments.kwonlyargs:
        at = arguments.kwonlyargs.index(arg)
        del arguments.kwonlyargs[at], arguments.kw_defaults[at]
        return
    at = arguments.args.index(arg)
    first_default = len(arguments.args) - len(arguments.defaults)
    if at >= first_default:
        del arguments.defaults[at - first_default]
    del arguments.args[at]
