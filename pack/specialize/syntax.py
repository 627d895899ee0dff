"""Questions about syntax trees that need no knowledge of the program around them."""

import ast
from collections import defaultdict
from collections.abc import Iterator

from pack.names import Function, bound_names, children, walk

OPTION = "option"  # declares a config field
TERMINAL = ast.Return | ast.Raise | ast.Continue | ast.Break
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
CHANGERS = {"append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add"}
EXPRESSIONS = (
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.JoinedStr, ast.FormattedValue),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Attribute),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)
STATEMENTS = (ast.Return, ast.Assign, ast.If, ast.For, ast.Expr, ast.Pass, ast.Continue, ast.Break)


def named_values(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield (name, value expression or None) for what an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for inner, value in matched(target, node.value):
            if isinstance(inner, ast.Name):
                yield inner.id, value


def matched(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Pair the elements of an assignment's target with those of its value, where they are spelled out."""
    if not isinstance(target, ast.Tuple | ast.List):
        yield target, value
        return
    spelled = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
    starred = [*target.elts, *(value.elts if spelled else [])]
    spelled = spelled and not any(isinstance(item, ast.Starred) for item in starred)
    for i, inner in enumerate(target.elts):
        part = inner.value if isinstance(inner, ast.Starred) else inner
        yield from matched(part, value.elts[i] if spelled else None)


def literal(value) -> ast.expr:
    """Spell a constant, a table or a list as an expression."""
    if isinstance(value, dict):
        return ast.Dict([ast.Constant(key) for key in value], [literal(item) for item in value.values()])
    if isinstance(value, list):
        return ast.List([literal(item) for item in value], ast.Load())
    if isinstance(value, tuple):
        return ast.Tuple([literal(item) for item in value], ast.Load())
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value).startswith("-"):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def clone(node):
    """Copy a node and all below it; what other tools hang on nodes, and on the contexts they share, stays."""
    if isinstance(node, list):
        return [clone(item) for item in node]
    if not isinstance(node, ast.AST) or isinstance(node, ast.expr_context):
        return node
    made = type(node)(**{name: clone(value) for name, value in ast.iter_fields(node)})
    return ast.copy_location(made, node)


def is_literal(value) -> bool:
    """Whether `literal` can spell a value."""
    if isinstance(value, tuple):
        return all(is_literal(item) for item in value)
    return value is None or (type(value) in (bool, int, float, str) and value == value)


def is_pure(node: ast.expr) -> bool:
    """Whether evaluating an expression has no effect."""
    if isinstance(node, ast.Lambda):
        return True
    allowed = (*set(EXPRESSIONS) - {ast.Call}, ast.Starred)
    parts = [child for child in children(node) if isinstance(child, ast.expr)]
    return isinstance(node, allowed) and all(map(is_pure, parts))


def is_steady(node: ast.expr) -> bool:
    """Whether evaluating an expression has no effect, not even on an iterator that it would go through."""
    return is_pure(node) and not any(isinstance(inner, Comprehension | ast.Starred) for inner in walk(node))


def changes_scope(nodes: list[ast.stmt]) -> bool:
    """Whether statements, run or not, change what their function is or what its names mean."""
    kinds = (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
    return any(isinstance(inner, kinds) for node in nodes for inner in walk(node))


def local_values(node: Function) -> dict[str, list[tuple[str, ast.expr | None]]]:
    """Map each name that a function binds to its bindings, (kind, expression): is it a value or an item?"""
    found: dict[str, list] = defaultdict(list)

    def visit(inner: ast.AST) -> None:
        match inner:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[inner.name].append(("", None))
                for below in walk(inner):
                    for name in below.names if isinstance(below, ast.Nonlocal) else ():
                        found[name] += [("", None)] * 2
                return
            case ast.Lambda():
                return
            case ast.Global() | ast.Nonlocal():
                for name in inner.names:
                    found[name] += [("", None)] * 2
            case ast.Assign() | ast.AnnAssign() if inner.value is not None:
                for name, value in named_values(inner):
                    found[name].append(("value", value))
                visit(inner.value)
                return
            case ast.For(target=ast.Name(id=name)):
                found[name].append(("item", inner.iter))
                for child in (inner.iter, *inner.body, *inner.orelse):
                    visit(child)
                return
            case ast.For(target=ast.Tuple(elts=targets)) if all(isinstance(one, ast.Name) for one in targets):
                for i, target in enumerate(targets):
                    found[target.id].append((f"part {i} of {len(targets)}", inner.iter))
                for child in (inner.iter, *inner.body, *inner.orelse):
                    visit(child)
                return
            case ast.comprehension():
                for child in (inner.iter, *inner.ifs):
                    visit(child)
                return
            case ast.Name(ctx=ast.Store() | ast.Del()):
                found[inner.id] += [("", None)] * (2 if isinstance(inner.ctx, ast.Del) else 1)
            case ast.Import() | ast.ImportFrom():
                for name, _ in bound_names(inner):
                    found[name].append(("", None))
            case ast.ExceptHandler(name=str(name)):
                found[name].append(("", None))
            case ast.MatchAs() | ast.MatchStar() | ast.MatchMapping():
                name = inner.rest if isinstance(inner, ast.MatchMapping) else inner.name
                if name:
                    found[name].append(("", None))
            case ast.AugAssign(target=ast.Name(id=name)):
                found[name].append(("", None))
        for child in children(inner):
            visit(child)

    for statement in node.body:
        visit(statement)
    return found


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """List every parameter."""
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return plain + [arg for arg in (arguments.vararg, arguments.kwarg) if arg]


def constant_body(node: ast.FunctionDef) -> ast.Constant | None:
    """Return the constant that is all a function returns; None's when it does nothing."""
    match [one for one in node.body if not (is_text(one) or isinstance(one, ast.Pass))]:
        case []:
            return ast.Constant(None)
        case [ast.Return(value=ast.Constant() as value)]:
            return value
    return None


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_string(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_constant_name(node: ast.expr) -> bool:
    """Whether an expression is the upper-case name of a constant."""
    return isinstance(node, ast.Name) and node.id.isupper()


def constructor(node: ast.ClassDef | None) -> Function | None:
    """Return a class's own `__init__`."""
    body = node.body if node else []
    return next((one for one in body if isinstance(one, Function) and one.name == "__init__"), None)


def class_names(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield (field, annotation) of annotated fields, then (name, None) of what else a class binds."""
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            yield one.target.id, one.annotation
    for one in node.body:
        if not isinstance(one, ast.AnnAssign):
            yield from ((name, None) for name, _ in bound_names(one))


def changed_names(kinds: dict[type, list]) -> set[str]:
    """Name the variables and attributes whose items nodes, by kind, change: `name[k] = v`, `a.name.pop()`."""
    owners = [node.value for node in kinds[ast.Subscript] if not isinstance(node.ctx, ast.Load)]
    owners += [node.value for node in kinds[ast.Attribute] if node.attr in CHANGERS]
    by_name = {owner.id for owner in owners if isinstance(owner, ast.Name)}
    return by_name | {owner.attr for owner in owners if isinstance(owner, ast.Attribute)}


def unnamed_makers(kinds: dict[type, list]) -> set[str]:
    """Name the classes that make instances by `cls`; "" where any may be made without its name."""
    found, types, shown = set(), 0, 0
    for node in kinds[ast.ClassDef]:
        wraps = [one for f in node.body if isinstance(f, Function) for one in f.decorator_list]
        if any(isinstance(one, ast.Name) and one.id == "classmethod" for one in wraps):
            found.add(node.name)
    for node in kinds[ast.Attribute]:
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"):
                pass
            case ast.Attribute(attr="__class__" | "__init__" | "__new__" | "_make"):
                found.add("")
            case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[_]), attr="__name__"):
                shown += 1
            case ast.Attribute(attr="_replace"):
                types += 1
    for node in kinds[ast.Compare]:
        calls = [one for one in (node.left, *node.comparators) if isinstance(one, ast.Call)]
        calls = [one.func for one in calls if len(one.args) == 1]
        shown += sum(isinstance(one, ast.Name) and one.id == "type" for one in calls)
    for node in kinds[ast.Call]:
        types += isinstance(node.func, ast.Name) and node.func.id == "type"
        shown += isinstance(node.func, ast.Attribute) and node.func.attr == "_replace"
    looks_up = {"globals", "eval", "exec"}
    is_dynamic = any(node.id in looks_up and isinstance(node.ctx, ast.Load) for node in kinds[ast.Name])
    is_spelled = any(node.value in ("_make", "_replace") for node in kinds[ast.Constant])
    return found | ({""} if is_dynamic or is_spelled or types > shown else set())


def takes(arguments: ast.arguments, call: ast.Call, first: int = 0) -> bool:
    """Whether a function surely takes what a call gives, behind its first parameters."""
    plain = [*arguments.posonlyargs, *arguments.args]
    names = [arg.arg for arg in plain][first:]
    keys = [one.arg for one in call.keywords]
    if len(plain) < first or None in keys or any(isinstance(arg, ast.Starred) for arg in call.args):
        return False
    by_name = {*names[len(call.args) :], *(arg.arg for arg in arguments.kwonlyargs)}
    by_name -= {arg.arg for arg in arguments.posonlyargs}
    needed = names[len(call.args) : max(len(names) - len(arguments.defaults), 0)]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    needed += [arg.arg for arg, default in pairs if default is None]
    return len(call.args) <= len(names) and set(needed) <= set(keys) <= by_name


def is_only_indexed(name: str, tree: ast.AST) -> bool:
    """Whether every use of a name is to read an item of it."""
    loads, reads = -1, 0  # one is where it is bound
    for node in walk(tree):
        match node:
            case ast.Name(id=found) if found == name:
                loads += 1
            case ast.Subscript(value=ast.Name(id=found), ctx=ast.Load()) if found == name:
                reads += 1
    return loads == reads


def is_option(node: ast.stmt) -> bool:
    """Whether a statement declares a config field."""
    match node:
        case ast.AnnAssign(value=ast.Call(func=ast.Name(id=name))):
            return name == OPTION
    return False


def outline(tree: ast.AST) -> list[tuple]:
    """List what tells a tree from another: each node's kind, names, values and lengths of lists."""
    found = []
    for node in walk(tree):
        kind = node.__class__
        if kind is ast.Name:
            found.append((kind, node.id))
        elif kind is ast.Attribute:
            found.append((kind, node.attr))
        elif kind is ast.Constant:
            found.append((kind, repr(node.value)))
        else:
            found.append((kind, *map(_outlined, map(vars(node).get, kind._fields))))
    return found


def _outlined(value) -> int | str | None:
    if isinstance(value, list):
        return len(value)
    return value.__class__.__name__ if isinstance(value, ast.AST) else value
