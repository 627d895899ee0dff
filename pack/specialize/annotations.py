"""Annotations of a program for readers: they stay, but for what nothing else in the program names."""

import ast
import re

from pack.names import bound_names, children, drop_annotations, needed_statements, walk
from pack.specialize.syntax import clone


def trim_annotations(tree: ast.Module) -> None:
    """Drop what annotations alone name, and from the annotations the names of it."""
    bare = ast.Module([clone(node) for node in tree.body], [])
    drop_annotations(bare)
    kept = set(needed_statements(bare.body, set()))
    dropped = [node for i, node in enumerate(tree.body) if i not in kept]
    tree.body = [node for i, node in enumerate(tree.body) if i in kept]
    gone = {name for node in dropped for name, _ in bound_names(node)}
    gone -= {name for node in tree.body for name, _ in bound_names(node)}
    for node in walk(tree):
        match node:
            case ast.FunctionDef(returns=ast.expr()):
                node.returns = without(node.returns, gone)
            case ast.arg(annotation=ast.expr()):
                node.annotation = without(node.annotation, gone)
            case ast.AnnAssign():
                node.annotation = without(node.annotation, gone) or ast.Name("object", ast.Load())


def without(node: ast.expr, gone: set[str]) -> ast.expr | None:
    """Return an annotation without the alternatives that name what is gone; None when nothing is left."""
    if not gone & named(node):
        return node
    if isinstance(node, ast.BinOp):
        left, right = without(node.left, gone), without(node.right, gone)
        if left and right:
            node.left, node.right = left, right
            return node
        return left or right
    return None


def named(node: ast.AST) -> set[str]:
    """Collect the names in an annotation, those in strings too."""
    found = {node.id} if isinstance(node, ast.Name) else set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = set(re.findall(r"[A-Za-z_]\w*", node.value))
    return found.union(*map(named, children(node)))
