"""One short name for one long name: what a compressor saw in one function it expects in the next.

Two names share a short one only where no scope sees both. Attributes keep theirs; so do parameters that a
call may name in a way that is not understood here.
"""

import ast
import itertools
import keyword
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from pack.names import PURE_DECORATORS, Function, bound_names, children, is_record, last_name, walk
from pack.specialize.syntax import Comprehension, constructor, parameters

OWN_BASES = {"Module", "NamedTuple"}  # of classes whose methods nobody else calls by keyword
OBJECT_CALLS = {"__call__", "forward"}  # run where an object is called, by whatever name it has there
DYNAMIC = {"eval", "exec", "globals", "locals", "vars"}  # may look up any name


class Scope:
    """A module, class, function or comprehension, and the names that it binds."""

    def __init__(self, parent: "Scope | None", node: ast.AST):
        self.parent, self.node = parent, node
        self.declared: dict[str, bool] = {}  # name: is it global, or nonlocal?
        self.variables: dict[str, Variable] = {}

    @property
    def module(self) -> "Scope":
        return self.parent.module if self.parent else self

    def owner(self, name: str) -> "Scope":
        """Return the scope whose variable a name means here; for a builtin the module."""
        scope = self
        while scope.parent and not scope.declared.get(name):
            is_hidden = scope is not self and isinstance(scope.node, ast.ClassDef)
            if name in scope.variables and not is_hidden:
                return scope
            scope = scope.parent
        return self.module

    def up_to(self, owner: "Scope") -> Iterator["Scope"]:
        """Yield this scope and those around it, `owner` last."""
        scope = self
        while scope is not owner:
            yield scope
            scope = scope.parent
        yield owner


class Variable:
    """A name of one scope: where it is spelled, what sees it, whether it stays."""

    def __init__(self):
        self.spelled: list[tuple[ast.AST, str]] = []  # node, attribute that holds the name
        self.scopes: set[Scope] = set()
        self.is_kept = False


class Mention(NamedTuple):
    """A place that spells a name."""

    scope: Scope
    node: ast.AST
    field: str
    name: str


class Scan:
    """The scopes of a program and the names that each mentions."""

    def __init__(self, tree: ast.Module):
        self.module = Scope(None, tree)
        self.scopes = {id(tree): self.module}
        self.bound: list[Mention] = []
        self.read: list[Mention] = []
        for node in tree.body:
            self.visit(node, self.module)
        for scope, _, _, name in self.bound:
            if scope.declared.get(name) is not False:
                holder = self.module if scope.declared.get(name) else scope
                holder.variables.setdefault(name, Variable())
        for scope, node, field, name in self.bound + self.read:
            owner = scope.owner(name)
            if name not in owner.variables:
                owner.variables[name] = Variable()
                owner.variables[name].is_kept = True  # a builtin
            owner.variables[name].spelled.append((node, field))
            owner.variables[name].scopes.update(scope.up_to(owner))

    def visit(self, node: ast.AST, scope: Scope) -> None:
        """Note what a node of `scope` and all below it mention."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() | ast.ClassDef():
                self.visit_definition(node, scope)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                self.visit(node.generators[0].iter, scope)
                inner = self.scopes[id(node)] = Scope(scope, node)
                outside = node.generators[0].iter
                below = [child for one in node.generators for child in children(one)]
                values = [child for child in children(node) if not isinstance(child, ast.comprehension)]
                for child in below + values:
                    if child is not outside:
                        self.visit(child, inner)
            case ast.NamedExpr():
                holder = scope
                while isinstance(holder.node, Comprehension):
                    holder = holder.parent
                self.bound.append(Mention(holder, node.target, "id", node.target.id))
                self.visit(node.value, scope)
            case ast.Name():
                kind = self.read if isinstance(node.ctx, ast.Load) else self.bound
                kind.append(Mention(scope, node, "id", node.id))
            case ast.alias():
                self.bound.append(Mention(scope, node, "asname", node.asname or node.name.split(".")[0]))
            case ast.Global() | ast.Nonlocal():
                for name in node.names:
                    scope.declared[name] = isinstance(node, ast.Global)
                    self.read.append(Mention(scope, node, name, name))
            case _:
                field = "rest" if isinstance(node, ast.MatchMapping) else "name"
                if isinstance(getattr(node, field, None), str):  # except, case
                    self.bound.append(Mention(scope, node, field, getattr(node, field)))
                for child in children(node):
                    self.visit(child, scope)

    def visit_definition(self, node: Function | ast.Lambda | ast.ClassDef, scope: Scope) -> None:
        """Note what a definition mentions: outside its scope all but its parameters and body."""
        inner = self.scopes[id(node)] = Scope(scope, node)
        body = node.body if isinstance(node.body, list) else [node.body]
        if not isinstance(node, ast.Lambda):
            self.bound.append(Mention(scope, node, "name", node.name))
        arguments = [] if isinstance(node, ast.ClassDef) else parameters(node.args)
        self.bound += [Mention(inner, arg, "arg", arg.arg) for arg in arguments]
        for child in children(node):
            if isinstance(child, ast.arguments):
                around = [one for one in [*child.defaults, *child.kw_defaults] if one is not None]
                for one in around + [arg.annotation for arg in arguments if arg.annotation]:
                    self.visit(one, scope)
            else:
                self.visit(child, inner if child in body else scope)


def rename(tree: ast.Module, kept_globals: list[str], kept_locals: set[str]) -> None:
    """Give the names of a module short ones; what kernels name (kept_locals) stays, wherever it stands."""
    scan = Scan(tree)
    if DYNAMIC & set(scan.module.variables):
        return
    link_keywords(tree, scan)
    for scope in scan.scopes.values():
        for name, variable in scope.variables.items():
            is_global = scope is scan.module
            stays = isinstance(scope.node, ast.ClassDef) or name.startswith("__") or name in kept_locals
            stays = stays or (is_global and name in kept_globals)
            dotted = [n for n, _ in variable.spelled if isinstance(n, ast.alias) and "." in n.name]
            variable.is_kept |= stays or any(not one.asname for one in dotted)
    paint(scan)


def paint(scan: Scan) -> None:
    """Choose and write the short names: locals first, then by how often a name is spelled."""
    taken: dict[str, set[Scope]] = defaultdict(set)
    groups: dict[str, list[Variable]] = defaultdict(list)
    for scope in scan.scopes.values():
        for name, variable in scope.variables.items():
            if variable.is_kept:
                taken[name] |= variable.scopes
            else:
                groups[name].append(variable)
    own = scan.module.variables.values()

    def rank(variables: list[Variable]) -> tuple[bool, int]:
        return any(one in own for one in variables), -sum(len(one.spelled) for one in variables)

    for variables in sorted(groups.values(), key=rank):
        seen = set().union(*(variable.scopes for variable in variables))
        short = next(one for one in short_names() if taken[one].isdisjoint(seen))
        taken[short] |= seen
        for node, field in (place for variable in variables for place in variable.spelled):
            if isinstance(node, ast.Global | ast.Nonlocal):
                node.names[node.names.index(field)] = short
            else:
                setattr(node, field, short)


def short_names() -> Iterator[str]:
    """Yield identifiers, the shortest first."""
    for size in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=size):
            if not keyword.iskeyword("".join(letters)):
                yield "".join(letters)


def link_keywords(tree: ast.Module, scan: Scan) -> None:
    """Make keywords that mean a parameter for certain be spelled with it; keep what others may mean."""
    targets, free = _targets(tree), _unpublished(tree)
    anywhere, by_method = _texts(tree), defaultdict(set)  # names that any call, that a call of .m may mean
    fitting: list[tuple[ast.keyword, Function]] = []
    records = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and is_record(node)}
    for call in (node for node in walk(tree) if isinstance(node, ast.Call)):
        own = targets.get(call.func.id) if isinstance(call.func, ast.Name) else None
        for one in (one for one in call.keywords if one.arg):
            if own is not None:
                fitting.append((one, own))
            elif isinstance(call.func, ast.Attribute):
                by_method[call.func.attr].add(one.arg)
            elif not (isinstance(call.func, ast.Name) and call.func.id in records):  # else: its fields
                anywhere.add(one.arg)
    spoken = anywhere.union(*by_method.values())
    for node in (node for node in walk(tree) if isinstance(node, Function | ast.Lambda)):
        variables = scan.scopes[id(node)].variables
        is_called_as_object = isinstance(node, ast.Lambda) or node.name in OBJECT_CALLS
        named = spoken if is_called_as_object else anywhere | by_method[node.name]
        for arg in [*node.args.args, *node.args.kwonlyargs]:
            variables[arg.arg].is_kept |= id(node) not in free or arg.arg in named
    for one, function in fitting:
        if one.arg in [arg.arg for arg in [*function.args.args, *function.args.kwonlyargs]]:
            scan.scopes[id(function)].variables[one.arg].spelled.append((one, "arg"))


def _targets(tree: ast.Module) -> dict[str, Function]:
    """Map names that calls use to the functions that run: functions, and constructors of classes."""
    counts = [name for node in walk(tree) for name in _bindings(node)]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {node.name: node for node in tree.body if isinstance(node, Function)}
    for name, node in classes.items():
        found |= {name: init} if (init := constructor(node)) else {}
    return {name: node for name, node in found.items() if counts.count(name) == 1}


def _bindings(node: ast.AST) -> list[str]:
    """List what a node binds by itself, parameters included."""
    match node:
        case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.ClassDef(name=name):
            return [name]
        case ast.Name(ctx=ast.Store()) | ast.Import() | ast.ImportFrom():
            return [name for name, _ in bound_names(node)]
    return []


def _texts(tree: ast.Module) -> set[str]:
    """Name what strings spell: keys that `**` may turn into keywords. Texts with spaces are for people."""
    texts = [node.value for node in walk(tree) if isinstance(node, ast.Constant)]
    words = [re.findall(r"[A-Za-z_]\w*", text) for text in texts if isinstance(text, str) and " " not in text]
    return set(itertools.chain(*words))


def _unpublished(tree: ast.Module) -> set[int]:
    """Return the ids of functions that only the program calls, not by a name that others know."""
    called = {id(node.func) for node in walk(tree) if isinstance(node, ast.Call)}
    loads = [node for node in walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    handed_on = {node.id for node in loads if id(node) not in called}
    classes = [node for node in walk(tree) if isinstance(node, ast.ClassDef)]
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | OWN_BASES
    others = [node for node in classes if not set(map(last_name, node.bases)) <= own]
    foreign = {id(method) for node in others for method in node.body}
    methods = {id(method) for node in classes for method in node.body}
    pure = PURE_DECORATORS | {"property"}

    def is_free(node: Function) -> bool:
        if id(node) in foreign or not set(map(last_name, node.decorator_list)) <= pure:
            return False
        return id(node) in methods or node.name not in handed_on

    nodes = walk(tree)
    free = {id(node) for node in nodes if isinstance(node, Function) and is_free(node)}
    return free | {id(node) for node in nodes if isinstance(node, ast.Lambda)}
