"""What a bundled module binds, names and no longer needs: the questions that packing and folding share."""

import ast
import re
from collections import defaultdict
from functools import cache

# Decorators that only change what they decorate. Any other may register it somewhere, so what it
# decorates always ships.
PURE_DECORATORS = {
    "cache",
    "contextmanager",
    "dataclass",
    "inference_mode",
    "lru_cache",
    "no_grad",
    "total_ordering",
}

# Decorators of kernels that are reached by the name of what they decorate; fakes and gradients hang on it.
KERNEL_DECORATORS = {"custom_op", "triton_op", "jit"}

# torch.library and Triton read argument annotations (schemas, tl.constexpr); singledispatch reads types.
DISPATCHERS = {"singledispatch", "singledispatchmethod"}
ANNOTATION_READERS = {"custom_op", "triton_op", "jit"} | DISPATCHERS

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Import = ast.Import | ast.ImportFrom


# Fields of syntax nodes in which no node stands, or only an expression context.
PLAIN_FIELDS = {"ctx", "id", "attr", "arg", "kind", "module", "level", "asname", "rest", "simple"}
PLAIN_FIELDS |= {"is_async", "conversion", "type_comment", "kwd_attrs", "type_ignores"}
PLAIN_KINDS = (ast.Constant, ast.MatchSingleton, ast.Global, ast.Nonlocal)


@cache
def node_fields(kind: type) -> tuple[str, ...]:
    """Name the fields of a kind of node that hold nodes, lists of nodes or nothing."""
    plain = PLAIN_FIELDS | ({"name"} if kind.__name__ != "TypeAlias" else set())
    fields = () if issubclass(kind, PLAIN_KINDS) else kind._fields
    return tuple(name for name in fields if name not in plain)


def children(node: ast.AST) -> list[ast.AST]:
    """List the nodes right below a node, expression contexts aside."""
    found = []
    for name in node_fields(node.__class__):
        value = getattr(node, name, None)
        if value.__class__ is list:
            found += value if None not in value else [item for item in value if item is not None]
        elif value is not None:
            found.append(value)
    return found


def walk(node: ast.AST) -> list[ast.AST]:
    """List a node and all below it: ast.walk at five times its speed."""
    found = [node]
    for node in found:  # which grows
        for name in node_fields(node.__class__):
            value = getattr(node, name, None)
            if value.__class__ is list:  # None: the key of a mapping that is unpacked, a keyword's no default
                found += value if None not in value else [item for item in value if item is not None]
            elif value is not None:
                found.append(value)
    return found


def by_kind(nodes: list[ast.AST]) -> dict[type, list]:
    """Sort nodes by their kind; a kind that none is of has an empty list."""
    kinds: dict[type, list] = defaultdict(list)
    for node in nodes:
        kinds[node.__class__].append(node)
    return kinds


def blocks(node: ast.AST) -> list[tuple[str, list[ast.stmt]]]:
    """List the (field, statements) of a compound statement that stand below it."""
    found = [(name, getattr(node, name, None)) for name in ("body", "orelse", "finalbody")]
    return [(name, body) for name, body in found if isinstance(body, list)]


BINDING_KINDS = {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ExceptHandler}
BINDING_KINDS |= {ast.Import, ast.ImportFrom, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp}


def bound_names(node: ast.AST) -> list[tuple[str, str]]:
    """List (name, imported object or "") for what a statement binds in the scope it stands in."""
    found, todo = [], [node]
    while todo:
        node = todo.pop()
        kind = node.__class__
        if kind is ast.Name:
            if node.ctx.__class__ is ast.Store:
                found.append((node.id, ""))
            continue
        if kind in BINDING_KINDS:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found += [(name, "") for name in (node.name, *declared_global(node))]
                case ast.Import():
                    names = [(alias.asname, alias.name, alias.name.split(".")[0]) for alias in node.names]
                    found += [(asname or top, name if asname else top) for asname, name, top in names]
                case ast.ImportFrom():
                    names = [(alias.asname or alias.name, alias.name) for alias in node.names]
                    found += [(name, f"{node.module}.{original}") for name, original in names]
                case ast.ExceptHandler(name=str(name)):
                    found.append((name, ""))
            if kind is not ast.ExceptHandler:
                continue
        todo += reversed(children(node))
    return found


@cache
def declared_global(node: Definition) -> tuple[str, ...]:
    """List the names that functions in a definition declare global."""
    return tuple(name for inner in walk(node) if isinstance(inner, ast.Global) for name in inner.names)


def identifiers(node: ast.AST, with_strings: bool = True) -> set[str]:
    """Collect every global name that code below `node` may look up, docstrings aside.

    With strings, those without spaces count with each identifier in them: globals()["name"] finds them.
    Modules share one namespace when packed, so an attribute never names a global.
    """
    texts = _texts(node) if with_strings else ()
    return free_names(node).union(*(re.findall(r"[A-Za-z_]\w*", text) for text in texts if " " not in text))


def _texts(node: ast.AST) -> list[str]:
    """List the strings below a node that are no docstrings."""
    inner = walk(node)
    docstrings = {id(one.value) for one in inner if isinstance(one, ast.Expr)}
    constants = [one for one in inner if isinstance(one, ast.Constant) and id(one) not in docstrings]
    return [one.value for one in constants if isinstance(one.value, str)]


SCOPE_KINDS = {ast.Global, ast.Nonlocal, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda}
SCOPE_KINDS |= {ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp}


def free_names(node: ast.AST) -> set[str]:
    """Collect the names that code looks up outside the functions and comprehensions that bind them."""
    return _names_of([node])


def _names_of(nodes: list[ast.AST]) -> set[str]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        kind = node.__class__
        if kind is ast.Name:
            found.add(node.id)
            continue
        below = children(node)
        if kind in SCOPE_KINDS:
            match node:
                case ast.Global() | ast.Nonlocal():
                    found.update(node.names)
                case ast.AnnAssign(target=ast.Name()):
                    below = below[1:]
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    body = node.body if isinstance(node.body, list) else [node.body]
                    below = [one for one in below if one not in body]
                    found |= _names_of(body) - _own_names(node, body)
                case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                    found |= _names_of(below) - _names_of([one.target for one in node.generators])
                    below = [node.generators[0].iter]
        todo += below
    return found


def _own_names(node: Function | ast.Lambda, body: list[ast.AST]) -> set[str]:
    """Name the parameters and locals of a function."""
    own = {arg.arg for arg in walk(node.args) if arg.__class__ is ast.arg}
    own |= {name for one in body for name, _ in bound_names(one)}
    declared = [one.names for one in walk(node) if isinstance(one, ast.Global | ast.Nonlocal)]
    return own.difference(*declared)


def needed_statements(body: list[ast.stmt], always: set[int]) -> list[int]:
    """Return the indices of the statements that run or that one of those names, directly or through others.

    `always` holds the indices of statements that stay whatever they are.
    """
    own = {name for node in body if not isinstance(node, Import) for name, _ in bound_names(node)}
    kinds = by_kind([node for one in body for node in walk(one)])
    functions = {node.name: node.decorator_list for node in body if isinstance(node, Function)}
    kernels = {name for name, made in functions.items() if KERNEL_DECORATORS & set(map(last_name, made))}
    looks_up = any(node.id == "globals" for node in kinds[ast.Name])
    named_by = [identifiers(node, looks_up) for node in body]
    hooks = {"__init_subclass__", "__subclasses__"}
    defined = {node.name for kind in (ast.FunctionDef, ast.AsyncFunctionDef) for node in kinds[kind]}
    has_hooks = not hooks.isdisjoint(defined.union(node.attr for node in kinds[ast.Attribute]))
    records = {node.name for node in body if isinstance(node, ast.ClassDef) and is_record(node)}
    defines: dict[int, set[str]] = {}  # index of a droppable statement -> its names
    for i, node in enumerate(body):
        registers = has_hooks and isinstance(node, ast.ClassDef) and node.bases
        if i not in always and not registers and is_pure_definition(node, own - records):
            defines[i] = {name for name, _ in bound_names(node)}
        elif i not in always and kernel_of(node) in kernels:
            defines[i] = {kernel_of(node)}
    kept = set(range(len(body))) - set(defines)
    fresh = set(kept)
    while fresh:
        named = set().union(*(named_by[i] for i in fresh))
        fresh = {i for i, names in defines.items() if i not in kept and names & named}
        kept |= fresh
    return sorted(kept)


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a NamedTuple."""
    return [last_name(base) for base in node.bases] == ["NamedTuple"]


def kernel_of(node: ast.stmt) -> str | None:
    """Name the kernel whose fake or gradient a statement registers: `@k.register_fake`, `k.register(...)`."""
    match node:
        case ast.FunctionDef(decorator_list=[ast.Attribute(value=ast.Name(id=name))]):
            return name
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            return name
    return None


def is_pure_definition(node: ast.stmt, own: set[str]) -> bool:
    """Whether running `node` only binds its names, as far as can be told without running it."""
    if isinstance(node, Definition):
        pure = PURE_DECORATORS | KERNEL_DECORATORS
        defaults = () if isinstance(node, ast.ClassDef) else (*node.args.defaults, *node.args.kw_defaults)
        calls = [one for default in defaults if default for one in walk(default) if isinstance(one, ast.Call)]
        is_pure = all(last_name(decorator) in pure for decorator in node.decorator_list)
        return is_pure and not any(own & identifiers(call.func) for call in calls)
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    inner = [one for target in targets for one in walk(target)]
    plain = all(isinstance(one, ast.Name | ast.Tuple | ast.expr_context) for one in inner)
    calls = [one for one in walk(node) if isinstance(one, ast.Call)]
    return plain and not any(own & identifiers(call.func) for call in calls)


def last_name(decorator: ast.expr) -> str:
    """Give `c` for the decorators `@c`, `@a.b.c` and `@a.b.c(...)`."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(target).rpartition(".")[2]


def drop_annotations(tree: ast.Module) -> None:
    """Drop the annotations of functions where nothing reads them; a NamedTuple's become `int`."""
    nodes = walk(tree)
    functions = [node for node in nodes if isinstance(node, Function)]
    readers = {id(node): ANNOTATION_READERS & set(map(last_name, node.decorator_list)) for node in functions}
    if any(read & DISPATCHERS for read in readers.values()):
        return
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {node.id for node in nodes if isinstance(node, ast.Name)}
    reads_fields = {"__annotations__", "get_type_hints"} & named
    for node in nodes:
        if isinstance(node, Function) and not readers[id(node)]:
            node.returns = None
            for argument in (inner for inner in walk(node.args) if isinstance(inner, ast.arg)):
                argument.annotation = None
            _drop_variable_annotations(node)
        elif isinstance(node, ast.ClassDef) and is_record(node) and not reads_fields:
            for field in (one for one in node.body if isinstance(one, ast.AnnAssign)):
                field.annotation = ast.copy_location(ast.Name("int", ast.Load()), field.annotation)


def _drop_variable_annotations(node: Function) -> None:
    """Turn `name: Type = value` in a function's blocks into `name = value`."""
    for holder in (inner for inner in walk(node) if not isinstance(inner, ast.ClassDef)):
        for _, body in blocks(holder):
            body[:] = [_plain(one) for one in body]


def _plain(node: ast.stmt) -> ast.stmt:
    """Return an annotated assignment without its annotation."""
    if not isinstance(node, ast.AnnAssign) or node.value is None:
        return node
    return ast.copy_location(ast.Assign([node.target], node.value), node)
