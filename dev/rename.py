"""Parameters that no call gives by name become positional, so that the minifier may shorten them in place."""

import ast
import re

from dev.names import PURE_DECORATORS, Function, last_name, walk

OWN_BASES = {"Module", "NamedTuple"}  # of classes whose methods nobody else calls by keyword


def make_positional(tree: ast.Module) -> None:
    """Mark parameters as positional-only wherever no call can name them.

    A call names a parameter by keyword or, through `**`, by a string or a field. A function that is handed
    to others may be called in any way. The minifier takes the marker out again.
    """
    spoken = _spoken(tree)
    handed_on = _handed_on(tree)
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    methods: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and {last_name(base) for base in node.bases} <= own | OWN_BASES:
            methods |= {id(one) for one in node.body if isinstance(one, Function)}
    for node in tree.body:
        if isinstance(node, Function) and node.name not in handed_on:
            methods.add(id(node))
    for node in walk(tree):
        plain = isinstance(node, Function) and all(
            last_name(one) in PURE_DECORATORS | {"property"} for one in node.decorator_list
        )
        if (plain and id(node) in methods) or isinstance(node, ast.Lambda):
            _mark(node.args, spoken)


def _mark(arguments: ast.arguments, spoken: set[str]) -> None:
    """Move parameters up to the first that a call may name to the positional ones."""
    unspoken = [arg.arg not in spoken for arg in arguments.args]
    count = unspoken.index(False) if False in unspoken else len(unspoken)
    arguments.posonlyargs += arguments.args[:count]
    del arguments.args[:count]


def _spoken(tree: ast.Module) -> set[str]:
    """Name what calls may use as keywords: keywords, words in strings, fields."""
    found: set[str] = set()
    for node in walk(tree):
        match node:
            case ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Constant(value=str(text)):
                found |= set(re.findall(r"[A-Za-z_]\w*", text))
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


def _handed_on(tree: ast.Module) -> set[str]:
    """Name what is read other than to call it."""
    called = {id(node.func) for node in walk(tree) if isinstance(node, ast.Call)}
    return {
        node.id
        for node in walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in called
    }
