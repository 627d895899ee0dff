"""Fold what a recipe fixes: a branch that the recipe can never take is not shipped.

`fold` writes the recipe into the defaults of the config classes, replaces what is thereby constant, takes
the branches that constants decide and drops what nothing names any more, until nothing changes. What
cannot be proved constant stays. Taken on trust, all of it house style:

- A config class declares its fields with `option` (formats/recipe.py); a field that is not live has the
  recipe's value in every instance. A class that the program also makes with arguments of its own is left
  alone, and so is a field that it gives to `replace`.
- An annotation that names a class of the program is true.
- Reading a name or an attribute has no effect.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

from dev.names import PURE_DECORATORS, Function, bound_names, last_name, needed_statements
from formats.recipe import parse_value

OPTION = "option"  # declares a config field
PACKED_RECIPE = "PACKED_RECIPE"  # holds the recipe's values that are no defaults
MAX_ROUNDS = 50
MAX_ITEMS = 10_000  # of a range that is evaluated
LONGEST_LITERAL = 8  # characters that may replace a shorter name
KINDS = {"bool": bool, "int": int, "float": float, "str": str, "tuple": tuple}
TERMINAL = ast.Return | ast.Raise | ast.Continue | ast.Break
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def bounded_range(*limits: int) -> range:
    """A range of moderate length: the packer computes, it does not train."""
    made = range(*limits)
    if len(made) > MAX_ITEMS:
        raise ValueError(f"a range of {len(made)} items is too long to evaluate")
    return made


# Builtins without effects; calls of them with constant arguments are evaluated.
SAFE_BUILTINS = {
    made.__name__: made for made in (abs, all, any, bool, dict, enumerate, float, int, len, list)
}
SAFE_BUILTINS |= {made.__name__: made for made in (max, min, round, set, sorted, str, sum, tuple, zip)}
SAFE_BUILTINS["range"] = bounded_range
EXPRESSIONS = (
    *(ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call),
    *(ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.JoinedStr, ast.FormattedValue),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Attribute),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)
STATEMENTS = (ast.Return, ast.Assign, ast.If, ast.For, ast.Expr, ast.Pass, ast.Continue, ast.Break)


# ----------------------------------------------------------------------------------------------------------
# Facts
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A constant: None, bool, int, float, str or a tuple of such."""

    value: object


@dataclass(frozen=True)
class Instance:
    """An object of a class of the program; "" is some object that is not None."""

    name: str = ""


@dataclass(frozen=True)
class Items:
    """A list, or the like, of instances of a class of the program."""

    name: str


@dataclass(frozen=True)
class Table:
    """A dict display with constant keys that nothing changes."""

    node: ast.Dict


Fact = Known | Instance | Items | Table | None  # None: unknown


def join(facts: list[Fact]) -> Fact:
    """Return what is true of all values; unknown when they differ (1, 1.0 and True do)."""
    return facts[0] if facts and len({repr(fact) for fact in facts}) == 1 else None


@dataclass
class Observations:
    """What a round sees in the whole program."""

    stores: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # attribute: (class, Fact)
    calls: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # name: (facts, {name: Fact})
    escapes: set[str] = field(default_factory=set)  # names that are read other than to call them
    replaced: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # field: Facts
    is_dynamic: bool = False  # attributes are set or fields replaced under computed names


@dataclass
class Program:
    """A module and what earlier rounds proved about it."""

    tree: ast.Module
    recipe: dict
    configs: dict[str, dict] = field(
        default_factory=dict
    )  # config class: {field: value, or class of section}
    attributes: dict[tuple[str, str], Fact] = field(default_factory=dict)  # (class, attribute)
    params: dict[tuple[str, str], Fact] = field(default_factory=dict)  # (function or class, parameter)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    pure: dict[str, Callable] = field(default_factory=dict)  # functions that can be run here
    values: dict[str, ast.expr | None] = field(default_factory=dict)  # module names bound once: their value

    def index(self) -> None:
        """Find the definitions; a name that is bound twice has none."""
        counts = Counter(name for node in self.tree.body for name, _ in bound_names(node))
        once = [node for node in self.tree.body if all(counts[name] == 1 for name, _ in bound_names(node))]
        self.classes = {node.name: node for node in once if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in once if isinstance(node, ast.FunctionDef)}
        values = dict.fromkeys(counts)
        for node in once:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                values |= dict(named_values(node))
        self.values = values

    def relatives(self) -> set[str]:
        """Name the classes that take part in inheritance within the program."""
        found = set()
        for name, node in self.classes.items():
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)} & set(self.classes)
            found |= bases | ({name} if bases else set())
        return found


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
        yield from matched(
            inner.value if isinstance(inner, ast.Starred) else inner, value.elts[i] if spelled else None
        )


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
    return isinstance(node, allowed) and all(
        is_pure(child) if isinstance(child, ast.expr) else True for child in ast.iter_child_nodes(node)
    )


def changes_scope(nodes: list[ast.stmt]) -> bool:
    """Whether statements, run or not, change what their function is or what its names mean."""
    kinds = (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
    return any(isinstance(inner, kinds) for node in nodes for inner in ast.walk(node))


# ----------------------------------------------------------------------------------------------------------
# Scopes and values
# ----------------------------------------------------------------------------------------------------------


def local_values(node: Function) -> dict[str, list[tuple[str, ast.expr | None]]]:
    """Map each name that a function binds to its bindings, (kind, expression): is it a value or an item?"""
    found: dict[str, list] = defaultdict(list)

    def walk(inner: ast.AST) -> None:
        match inner:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[inner.name].append(("", None))
                for below in ast.walk(inner):
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
                walk(inner.value)
                return
            case ast.For(target=ast.Name(id=name)):
                found[name].append(("item", inner.iter))
                for child in (inner.iter, *inner.body, *inner.orelse):
                    walk(child)
                return
            case ast.comprehension():
                for child in (inner.iter, *inner.ifs):
                    walk(child)
                return
            case ast.Name(ctx=ast.Store() | ast.Del()):
                found[inner.id] += [("", None)] * (2 if isinstance(inner.ctx, ast.Del) else 1)
            case ast.Import() | ast.ImportFrom() | ast.ExceptHandler():
                for name, _ in bound_names(inner) if not isinstance(inner, ast.ExceptHandler) else ():
                    found[name].append(("", None))
                if isinstance(inner, ast.ExceptHandler) and inner.name:
                    found[inner.name].append(("", None))
            case ast.MatchAs() | ast.MatchStar() | ast.MatchMapping():
                name = inner.rest if isinstance(inner, ast.MatchMapping) else inner.name
                if name:
                    found[name].append(("", None))
            case ast.AugAssign(target=ast.Name(id=name)):
                found[name].append(("", None))
        for child in ast.iter_child_nodes(inner):
            walk(child)

    for statement in node.body:
        walk(statement)
    return found


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """List every parameter."""
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return plain + [arg for arg in (arguments.vararg, arguments.kwarg) if arg]


class Scopes:
    """Names in force at a place of the program, and what expressions are there."""

    def __init__(self, program: Program):
        self.program = program
        self.stack: list[dict[str, Fact]] = []
        self.open: set[int] = set()  # expressions already found to be unknown, by id

    def resolve(self, name: str) -> tuple[bool, Fact]:
        """Return (is the name local, its fact)."""
        for scope in reversed(self.stack):
            if name in scope:
                return True, scope[name]
        return False, None

    def is_global(self, name: str) -> bool:
        return not self.resolve(name)[0]

    def is_builtin(self, name: str) -> bool:
        return name in SAFE_BUILTINS and self.is_global(name) and name not in self.program.values

    def annotated(self, node: ast.expr | None) -> Fact:
        """Return what an annotation says."""
        match node:
            case ast.Name(id=name) | ast.Constant(value=str(name)) if name in self.program.classes:
                return Instance(name)
            case ast.Subscript(value=ast.Name(id="list"), slice=ast.Name(id=name)):
                return Items(name) if name in self.program.classes else None
        return None

    def look(self, node: ast.expr) -> Fact:
        """Return what is known of an expression's value."""
        match node:
            case ast.Constant(value=value):
                return Known(value) if is_literal(value) else Instance()
            case ast.Name(id=name):
                return self.look_name(name)
            case ast.Attribute(value=base, attr=attr):
                owner = self.look(base)
                return (
                    self.program.attributes.get((owner.name, attr)) if isinstance(owner, Instance) else None
                )
            case ast.Subscript(value=base, slice=key) if not isinstance(key, ast.Slice):
                found = self.look(base)
                if isinstance(found, Items):
                    return Instance(found.name)
                chosen = select(found.node, self.look(key)) if isinstance(found, Table) else None
                if chosen is not None:
                    return self.look(chosen)
            case ast.Call():
                found = self.look_call(node)
                if found is not None:
                    return found
            case ast.IfExp():
                found = join([self.look(node.body), self.look(node.orelse)])
                if found is not None:
                    return found
            case ast.Compare(
                left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(value=None)]
            ):
                found = self.look(left)
                if found is not None:
                    is_none = found == Known(None)
                    return Known(is_none == isinstance(op, ast.Is))
            case ast.Compare(ops=operators) if any(isinstance(op, ast.Is | ast.IsNot) for op in operators):
                return None  # whether equal constants are one object is the interpreter's choice
            case ast.Lambda() | ast.Set() | ast.JoinedStr():
                return Instance() if not isinstance(node, ast.JoinedStr) else self.evaluate(node)
            case ast.Dict():
                return Table(node) if is_table(node) else Instance()
            case ast.ListComp() | ast.GeneratorExp() | ast.List():
                return self.items(node) or (Instance() if not isinstance(node, ast.GeneratorExp) else None)
        return self.evaluate(node)

    def items(self, node: ast.expr) -> Items | None:
        """Return what the items of a comprehension are, when it makes instances."""
        if isinstance(node, ast.ListComp | ast.GeneratorExp) and isinstance(node.elt, ast.Call):
            made = self.look_call(node.elt)
            return Items(made.name) if isinstance(made, Instance) and made.name else None
        return None

    def look_name(self, name: str) -> Fact:
        is_local, fact = self.resolve(name)
        if is_local:
            return fact
        value = self.program.values.get(name)
        if value is None:
            return Instance() if name in self.program.functions or name in self.program.classes else None
        if isinstance(value, ast.Dict | ast.List):
            return Instance()  # somebody may change what it holds
        return Scopes(self.program).look(value)

    def look_call(self, node: ast.Call) -> Fact:
        """Return what a call gives: an instance, what the annotation says, or the value itself."""
        if isinstance(node.func, ast.Name) and self.is_global(node.func.id):
            name = node.func.id
            if name in self.program.classes:
                return Instance(name)
            if name in self.program.functions:
                return self.annotated(self.program.functions[name].returns) or self.evaluate(node)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if last == "ModuleList" and len(node.args) == 1:
            return self.items(node.args[0])
        return None

    def evaluate(self, node: ast.expr) -> Known | None:
        """Compute an expression all of whose names are known."""
        makes_items = isinstance(node, Comprehension)  # open inside, yet perhaps closed
        if not makes_items and any(id(child) in self.open for child in ast.iter_child_nodes(node)):
            return None
        if not all(isinstance(inner, EXPRESSIONS) for inner in ast.walk(node)) or _may_explode(node):
            return None
        names: dict[str, object] = {}
        try:
            closed = _Close(self, names, node).visit(clone(node))
            code = compile(ast.fix_missing_locations(ast.Expression(closed)), "fold", "eval")
            value = eval(code, {"__builtins__": {}} | names)
        except Exception:  # an open expression, or one that fails: it may fail where it stands, too
            return None
        return Known(value) if is_literal(value) and len(repr(value)) < 200 else None


def _may_explode(node: ast.expr) -> bool:
    """Whether an expression has a power or shift that is not small and spelled out."""
    powers = (ast.Pow, ast.LShift)
    return any(
        isinstance(inner, ast.BinOp)
        and isinstance(inner.op, powers)
        and not re.fullmatch(r"-?\d{1,2}(\.\d+)?", ast.unparse(inner.right))
        for inner in ast.walk(node)
    )


class _Close(ast.NodeTransformer):
    """Replace what is known in an expression by names of values; raises LookupError for the unknown."""

    def __init__(self, scopes: Scopes, names: dict[str, object], node: ast.expr):
        self.scopes, self.names = scopes, names
        inner = [child for child in ast.walk(node) if isinstance(child, ast.comprehension)]
        self.own = {
            child.id for one in inner for child in ast.walk(one.target) if isinstance(child, ast.Name)
        }

    def value(self, value) -> ast.expr:
        name = f"_{len(self.names)}"
        self.names[name] = value
        return ast.Name(name, ast.Load())

    def known(self, node: ast.expr) -> ast.expr:
        fact = self.scopes.look(node)
        if isinstance(fact, Known):
            return self.value(fact.value)
        if isinstance(fact, Instance) and fact.name in self.scopes.program.configs:
            return self.value(config_object(self.scopes.program, fact.name))
        raise LookupError

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return node if node.id in self.own else self.known(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self.known(node)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        pure = self.scopes.program.pure
        is_pure_call = name in pure and self.scopes.is_global(name)
        if name in self.own or not (is_pure_call or self.scopes.is_builtin(name)):
            raise LookupError
        function = self.value(pure[name] if is_pure_call else SAFE_BUILTINS[name])
        args = [self.visit(arg) for arg in node.args]
        keywords = [ast.keyword(one.arg, self.visit(one.value)) for one in node.keywords]
        return ast.Call(function, args, keywords)


def config_object(program: Program, name: str) -> SimpleNamespace:
    """Make an object that has the fixed fields of a config class and no others."""
    fields = program.configs[name]
    return SimpleNamespace(
        **{
            key: config_object(program, value.name) if isinstance(value, Instance) else value
            for key, value in fields.items()
        }
    )


def is_table(node: ast.Dict) -> bool:
    """Whether a dict display has different constant keys, and values without effects."""
    plain = all(isinstance(one, ast.Constant) for one in node.keys) and all(map(is_pure, node.values))
    return plain and len({one.value for one in node.keys}) == len(node.keys)


def select(node: ast.Dict, key: Fact) -> ast.expr | None:
    """Return the entry of a table under a key, where that is known."""
    if isinstance(key, Known):
        for one, value in zip(node.keys, node.values, strict=True):
            if repr(one.value) == repr(key.value):
                return value
    return None


# ----------------------------------------------------------------------------------------------------------
# One round over the program
# ----------------------------------------------------------------------------------------------------------


class Folder(ast.NodeTransformer, Scopes):
    """Replace what is constant, take decided branches, and note what the program does with its names."""

    def __init__(self, program: Program):
        Scopes.__init__(self, program)
        self.seen = Observations()
        self.owner = ""  # the class whose body this is
        self.unstable: list[set[str]] = []  # names of each scope that are bound more than once
        self.stored: dict[int, Fact] = {}  # attribute target -> what is stored there
        self.hints: dict[int, Fact] = {}  # lambda -> what its parameter is

    # Scopes

    def visit_FunctionDef(self, node: Function) -> Function:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        self.visit_defaults(node.args)
        owner, self.owner = self.owner, ""
        self.push_function(node, owner)
        node.body = self.block(node.body) or [ast.Pass()]
        self.stack.pop()
        self.unstable.pop()
        self.owner = owner
        drop_dead_locals(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(default) for default in arguments.defaults]
        arguments.kw_defaults = [default and self.visit(default) for default in arguments.kw_defaults]

    def push_function(self, node: Function, owner: str) -> None:
        """Enter a function: what its parameters and its names bound once are."""
        bindings = local_values(node)
        known = {}
        if not self.stack or (owner and node.name == "__init__"):
            known = {
                param: fact
                for (name, param), fact in self.program.params.items()
                if name == (owner or node.name)
            }
        scope: dict[str, Fact] = dict.fromkeys(bindings)
        params = parameters(node.args)
        is_method = all(last_name(one) in PURE_DECORATORS | {"property"} for one in node.decorator_list)
        special = {arg.arg for arg in (node.args.vararg, node.args.kwarg) if arg}
        for i, arg in enumerate(params):
            fact = self.annotated(arg.annotation) or known.get(arg.arg)
            if owner and i == 0 and is_method:
                fact = Instance(owner)
            scope[arg.arg] = fact if arg.arg not in bindings and arg.arg not in special else None
        names = {arg.arg for arg in params}
        self.unstable.append({n for n, found in bindings.items() if len(found) > 1 or n in names})
        self.stack.append(scope)
        once = {
            n: found[0] for n, found in bindings.items() if len(found) == 1 and n not in names and found[0][0]
        }
        for _ in once:
            before = dict(scope)
            for name, (kind, value) in once.items():
                fact = self.look(value) if value is not None else None
                if kind == "item":
                    fact = Instance(fact.name) if isinstance(fact, Items) else None
                if isinstance(fact, Table) and not is_only_indexed(name, node):
                    fact = Instance()
                scope[name] = fact
            if scope == before:
                break

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.visit_defaults(node.args)
        hint = self.hints.pop(id(node), None)
        names = [arg.arg for arg in parameters(node.args)]
        self.stack.append({name: hint if i == 0 else None for i, name in enumerate(names)})
        self.unstable.append(set())
        node.body = self.visit(node.body)
        self.stack.pop()
        self.unstable.pop()
        return node

    def visit_comprehension_like(self, node: Comprehension) -> Comprehension:
        scope: dict[str, Fact] = {}
        self.stack.append(scope)
        self.unstable.append(set())
        for one in node.generators:
            one.iter = self.visit(one.iter)
            items = self.look(one.iter)
            inner = [child.id for child in ast.walk(one.target) if isinstance(child, ast.Name)]
            scope |= dict.fromkeys(inner)
            if isinstance(items, Items) and isinstance(one.target, ast.Name):
                scope[one.target.id] = Instance(items.name)
            one.ifs = [test for test in map(self.test, one.ifs) if not self.is_true(test)]
        for name in ("key", "value", "elt"):
            if hasattr(node, name):
                setattr(node, name, self.visit(getattr(node, name)))
        self.stack.pop()
        self.unstable.pop()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_like

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        if node.name in self.program.configs or any(map(is_option, node.body)):
            for inner in ast.walk(node):  # section defaults make instances, without arguments
                if isinstance(inner, ast.Name):
                    self.seen.escapes.add(inner.id)
            return node
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [ast.keyword(one.arg, self.visit(one.value)) for one in node.keywords]
        owner, self.owner = self.owner, node.name if not self.stack else ""
        body = []
        for statement in node.body:
            if isinstance(statement, Function):
                body.append(self.visit(statement))
            else:
                self.stack.append({name: None for one in node.body for name, _ in bound_names(one)})
                self.unstable.append(set())
                body += self.block([statement])
                self.stack.pop()
                self.unstable.pop()
        node.body = body or [ast.Pass()]
        self.owner = owner
        return node

    # Statements

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Fold statements; those behind one that leaves the block go."""
        made: list[ast.stmt] = []
        for i, statement in enumerate(body):
            folded = self.visit(statement)
            made += folded if isinstance(folded, list) else [folded] if folded is not None else []
            if made and isinstance(made[-1], TERMINAL) and not changes_scope(body[i + 1 :]):
                break
        return made

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, self.block(value) or ([] if name == "orelse" else [ast.Pass()]))
            elif isinstance(value, list):
                setattr(node, name, [self.visit(v) if isinstance(v, ast.AST) else v for v in value])
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        node.test = self.test(node.test)
        truth = self.truth(node.test)
        if truth is not None and is_pure(node.test):
            taken, other = (node.body, node.orelse) if truth else (node.orelse, node.body)
            if not changes_scope(other):
                return self.block(taken)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        if not node.body and not node.orelse:
            return [] if is_pure(node.test) else ast.Expr(node.test)
        if node.orelse and all(isinstance(one, ast.Pass) for one in node.body):
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        node.body = node.body or [ast.Pass()]
        return node

    def visit_While(self, node: ast.While) -> ast.stmt | list[ast.stmt]:
        node.test = self.test(node.test)
        if self.is_false(node.test) and not changes_scope(node.body):
            return self.block(node.orelse)
        node.body, node.orelse = self.block(node.body) or [ast.Pass()], self.block(node.orelse)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | None:
        node.test = self.test(node.test)
        node.msg = node.msg and self.visit(node.msg)
        return None if self.is_true(node.test) else node

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        made = self.generic_visit(node)
        is_empty = isinstance(made.iter, ast.Tuple | ast.List) and not made.iter.elts
        return self.block(made.orelse) if is_empty and not changes_scope(made.body) else made

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        node.value = self.visit(node.value)
        for target in node.targets:
            for inner, value in matched(target, node.value):
                if isinstance(inner, ast.Attribute):
                    self.stored[id(inner)] = self.look(value) if value is not None else None
        node.targets = [self.visit(target) for target in node.targets]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if node.value is not None:
            node.value = self.visit(node.value)
            if isinstance(node.target, ast.Attribute):
                self.stored[id(node.target)] = self.look(node.value)
        node.target = self.visit(node.target)
        return node

    # Expressions

    def visit(self, node: ast.AST):
        made = super().visit(node)
        if isinstance(made, ast.expr) and isinstance(getattr(made, "ctx", ast.Load()), ast.Load):
            return self.settle(made)
        return made

    def settle(self, node: ast.expr) -> ast.expr:
        """Write an expression whose value is known as that value, unless that is longer."""
        if isinstance(
            node, ast.Constant | ast.Lambda | ast.Starred | ast.FormattedValue | ast.Tuple | ast.Slice
        ):
            return node
        fact = self.look(node)
        if fact is None and not isinstance(node, Comprehension):
            self.open.add(id(node))
        if not isinstance(fact, Known):
            return node
        made = literal(fact.value)
        length = len(ast.unparse(made))
        return made if length <= LONGEST_LITERAL or length <= len(ast.unparse(node)) else node

    def truth(self, node: ast.expr) -> bool | None:
        """Return what a condition decides, where that is known."""
        fact = self.look(node)
        if isinstance(fact, Known):
            return bool(fact.value)
        if isinstance(fact, Instance) and fact.name in self.program.classes:
            made = self.program.classes[fact.name]
            plain = not made.bases and not {"__bool__", "__len__"} & {n for n, _ in _class_names(made)}
            return True if plain else None
        return None

    def is_true(self, node: ast.expr) -> bool:
        return self.truth(node) is True

    def is_false(self, node: ast.expr) -> bool:
        return self.truth(node) is False

    def test(self, node: ast.expr) -> ast.expr:
        """Fold an expression of which only the truth counts."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.test(node.operand)
            return self.settle(node)
        if not isinstance(node, ast.BoolOp):
            return self.visit(node)
        decides = isinstance(node.op, ast.Or)  # the truth that ends the evaluation
        made: list[ast.expr] = []
        for value in node.values:
            folded = self.test(value)
            truth = self.truth(folded)
            if truth is not None and is_pure(folded):
                if truth == decides:
                    made = [*made, folded] if not all(map(is_pure, made)) else [ast.Constant(decides)]
                    break
                continue
            made.append(folded)
        if not made:
            return ast.Constant(not decides)
        return made[0] if len(made) == 1 else ast.BoolOp(node.op, made)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        decides = isinstance(node.op, ast.Or)
        made: list[ast.expr] = []
        for i, value in enumerate(node.values):
            folded = self.visit(value)
            truth = self.truth(folded)
            if truth == (not decides) and is_pure(folded) and i < len(node.values) - 1:
                continue
            made.append(folded)
            if truth == decides:
                break
        return made[0] if len(made) == 1 else ast.BoolOp(node.op, made)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        node.operand = self.test(node.operand) if isinstance(node.op, ast.Not) else self.visit(node.operand)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node.test = self.test(node.test)
        truth = self.truth(node.test)
        if truth is not None and is_pure(node.test):
            return self.visit(node.body if truth else node.orelse)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load) or isinstance(node.slice, ast.Slice):
            return node
        table = self.look(node.value)
        if isinstance(table, Table):
            chosen = select(table.node, self.look(node.slice))
            if chosen is not None and (table.node is node.value or self.is_stable(chosen)):
                return self.visit(clone(chosen))
        return node

    def is_stable(self, node: ast.expr) -> bool:
        """Whether an expression means the same anywhere in this function."""
        inner = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        shadowed = len(self.stack) > 1 and any(name in self.stack[-1] for name in inner)
        return not shadowed and not any(inner & names for names in self.unstable)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        self.generic_visit(node)
        made: list[ast.expr] = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                text = self.evaluate(ast.JoinedStr([part])) if part.format_spec is None else None
                part = ast.Constant(text.value) if text is not None and len(text.value) <= 24 else part
            if made and isinstance(part, ast.Constant) and isinstance(made[-1], ast.Constant):
                made[-1] = ast.Constant(made[-1].value + part.value)
            else:
                made.append(part)
        plain = len(made) == 1 and isinstance(made[0], ast.Constant)
        return made[0] if plain else ast.JoinedStr(made)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:
        node.value = self.visit(node.value)
        if isinstance(node.format_spec, ast.JoinedStr):
            self.generic_visit(node.format_spec)
        return node

    # Names, attributes, calls: what the program does with them

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if isinstance(node.ctx, ast.Load) and self.is_global(node.id):
            self.seen.escapes.add(node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        node.value = self.visit(node.value)
        if not isinstance(node.ctx, ast.Load):
            owner = self.look(node.value)
            name = owner.name if isinstance(owner, Instance) else ""
            self.seen.stores[node.attr].append((name, self.stored.pop(id(node), None)))
        if node.attr in ("__dict__", "__setattr__"):
            self.seen.is_dynamic = True
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = node.func.id if isinstance(node.func, ast.Name) and self.is_global(node.func.id) else ""
        self.hint_lambdas(name, node)
        if not name:
            node.func = self.visit(node.func)
        node.args = [self.visit(arg) for arg in node.args]
        for one in node.keywords:
            one.value = self.visit(one.value)
        self.observe(name, node)
        if isinstance(node.func, ast.Lambda) and not (
            node.args or node.keywords or parameters(node.func.args)
        ):
            return node.func.body
        if name == "getattr" and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            attr = node.args[1].value
            if isinstance(attr, str) and attr.isidentifier() and name not in self.program.values:
                return self.visit(ast.Attribute(node.args[0], attr, ast.Load()))
        if name in self.program.functions and not self.program.functions[name].decorator_list:
            constant = constant_body(self.program.functions[name])
            if constant and all(map(is_pure, [*node.args, *(one.value for one in node.keywords)])):
                return clone(constant)
        return node

    def hint_lambdas(self, name: str, node: ast.Call) -> None:
        """Note what the parameter of a lambda is that becomes a field annotated Callable[[X], ...]."""
        if name in self.program.classes:
            for key, value in self.arguments(name, node)[1].items():
                if isinstance(value, ast.Lambda):
                    annotation = dict(_class_names(self.program.classes[name])).get(key)
                    match annotation:
                        case ast.Subscript(slice=ast.Tuple(elts=[ast.List(elts=[parameter]), _])):
                            self.hints[id(value)] = self.annotated(parameter)

    def arguments(self, name: str, node: ast.Call) -> tuple[bool, dict[str, ast.expr]]:
        """Match a call's arguments with parameter or field names: (are all matched, {name: expression})."""
        names = parameter_names(self.program, name)
        plain: list[ast.expr] = []
        for arg in node.args:
            value = arg
            if isinstance(arg, ast.Starred):
                value = self.program.values.get(arg.value.id) if isinstance(arg.value, ast.Name) else None
                if not isinstance(value, ast.Tuple) or not self.is_global(arg.value.id):
                    return False, {}
                plain += value.elts
            else:
                plain.append(value)
        if names is None or len(plain) > len(names) or any(one.arg is None for one in node.keywords):
            return False, {}
        return True, dict(zip(names, plain)) | {one.arg: one.value for one in node.keywords}

    def observe(self, name: str, node: ast.Call) -> None:
        """Note a call's arguments, and the attributes that it sets or replaces."""
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if last in ("setattr", "delattr", "__setattr__", "vars"):
            key = node.args[1] if len(node.args) > 1 else None
            if isinstance(key, ast.Constant):
                self.seen.stores[key.value].append(("", None))
            else:
                self.seen.is_dynamic = True
        if last in ("replace", "_replace"):
            for one in node.keywords:
                self.seen.replaced[one.arg or ""].append(self.look(one.value))
        if name in self.program.functions or name in self.program.classes:
            matches, given = self.arguments(name, node)
            facts = {key: self.look(value) for key, value in given.items()}
            self.seen.calls[name].append(facts if matches else None)


def parameter_names(program: Program, name: str) -> list[str] | None:
    """List a function's or class's parameters by position; None where they cannot be told."""
    if name in program.functions:
        node = program.functions[name]
    else:
        made = program.classes[name]
        inits = [one for one in made.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        if not inits:
            return [key for key, _ in _class_names(made)] if is_record(made) else None
        node = inits[0]
    if node.args.vararg:
        return None
    names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args]]
    return names if name in program.functions else names[1:]


def _class_names(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield (field, annotation) of annotated fields, then (name, None) of what else a class binds."""
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            yield one.target.id, one.annotation
    for one in node.body:
        if not isinstance(one, ast.AnnAssign):
            yield from ((name, None) for name, _ in bound_names(one))


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a NamedTuple."""
    return [last_name(base) for base in node.bases] == ["NamedTuple"]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_only_indexed(name: str, tree: ast.AST) -> bool:
    """Whether every use of a name is to read an item of it."""
    loads = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree)) - 1
    reads = sum(
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        for node in ast.walk(tree)
    )
    return loads == reads


# ----------------------------------------------------------------------------------------------------------
# What a round proved
# ----------------------------------------------------------------------------------------------------------


def learn(program: Program, seen: Observations) -> None:
    """Turn what a round saw into facts for the next one."""
    relatives = program.relatives()
    for name, node in program.classes.items():
        if name in program.configs or name in relatives:
            continue
        own = {key for key, _ in _class_names(node)}
        if is_record(node):
            learn_record(program, seen, node)
        elif not seen.is_dynamic:
            for attr, stores in seen.stores.items():
                mine = [fact for owner, fact in stores if owner == name]
                if mine and attr not in own and not any(owner == "" for owner, _ in stores):
                    remember(program.attributes, (name, attr), join(mine))
            for statement in node.body:
                if isinstance(statement, ast.Assign) and not seen.replaced.get(""):
                    for key, value in named_values(statement):
                        if isinstance(value, ast.Constant) and key not in seen.stores:
                            remember(program.attributes, (name, key), Known(value.value))
    for name, calls in seen.calls.items():
        if name not in seen.escapes and name not in relatives and None not in calls:
            learn_params(program, name, calls)
    learn_pure(program)


def remember(facts: dict, key: tuple[str, str], fact: Fact) -> None:
    """Keep a fact about every value of something."""
    if isinstance(fact, Known | Instance | Items) and fact != Instance():
        facts[key] = fact


def learn_record(program: Program, seen: Observations, node: ast.ClassDef) -> None:
    """Find the fields of a NamedTuple that have one value in all instances."""
    calls = seen.calls.get(node.name, [])
    if node.name in seen.escapes or None in calls or seen.is_dynamic or "" in seen.replaced:
        return
    scopes = Scopes(program)
    for one in node.body:
        if isinstance(one, ast.AnnAssign):
            key = one.target.id
            default = scopes.look(one.value) if one.value is not None else None
            facts = [call.get(key, default) for call in calls] + seen.replaced.get(key, [])
            remember(program.attributes, (node.name, key), scopes.annotated(one.annotation) or join(facts))


def learn_params(program: Program, name: str, calls: list[dict[str, Fact]]) -> None:
    """Find the parameters of a function or class that have one value in all calls."""
    if name in program.functions:
        node, owner = program.functions[name], name
    else:
        body = program.classes[name].body if name in program.classes else []
        inits = [one for one in body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        if not inits:
            return
        node, owner = inits[0], name
    if any(last_name(decorator) not in PURE_DECORATORS for decorator in node.decorator_list):
        return
    plain = [*node.args.posonlyargs, *node.args.args]
    pairs = list(zip(reversed(plain), reversed(node.args.defaults))) + list(
        zip(node.args.kwonlyargs, node.args.kw_defaults)
    )
    scopes = Scopes(program)
    defaults = {arg.arg: scopes.look(value) if value is not None else None for arg, value in pairs}
    for arg in [*plain, *node.args.kwonlyargs]:
        facts = [call.get(arg.arg, defaults.get(arg.arg)) for call in calls]
        remember(program.params, (owner, arg.arg), join(facts))


def learn_pure(program: Program) -> None:
    """Find the functions that only compute, and make them callable here."""
    candidates = {
        name: node for name, node in program.functions.items() if not node.decorator_list and _is_plain(node)
    }
    while True:
        kept = {name: node for name, node in candidates.items() if _only_calls(node, candidates, program)}
        if len(kept) == len(candidates):
            break
        candidates = kept
    scopes = Scopes(program)
    names: dict[str, object] = {"__builtins__": {}} | SAFE_BUILTINS
    for name in {
        inner.id for node in kept.values() for inner in ast.walk(node) if isinstance(inner, ast.Name)
    }:
        fact = scopes.look_name(name)
        names |= {name: fact.value} if isinstance(fact, Known) else {}
    bare = [clone(node) for node in kept.values()]
    for node in bare:
        node.returns = None
        for arg in parameters(node.args):
            arg.annotation = None
    exec(compile(ast.fix_missing_locations(ast.Module(bare, [])), "fold", "exec"), names)
    program.pure = {name: names[name] for name in kept}


def _is_plain(node: ast.FunctionDef) -> bool:
    """Whether a function has nothing in it but computations on names and attributes."""
    kinds = (*EXPRESSIONS, *STATEMENTS)
    stores = (ast.Store, ast.Del)
    return (
        not (node.args.vararg or node.args.kwarg)
        and all(
            isinstance(one, ast.Constant)
            for one in [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        )
        and all(isinstance(inner, kinds) for one in node.body for inner in ast.walk(one))
        and not any(
            isinstance(inner, ast.Attribute | ast.Subscript) and isinstance(inner.ctx, stores)
            for inner in ast.walk(node)
        )
    )


def _only_calls(node: ast.FunctionDef, candidates: dict, program: Program) -> bool:
    """Whether a function calls only builtins without effects and functions of that kind."""
    own = {arg.arg for arg in parameters(node.args)} | set(local_values(node))
    for inner in ast.walk(ast.Module(node.body, [])):
        if isinstance(inner, ast.Call):
            name = inner.func.id if isinstance(inner.func, ast.Name) else ""
            is_builtin = name in SAFE_BUILTINS and name not in program.values
            if name in own or not (name in candidates or is_builtin):
                return False
        if isinstance(inner, ast.BinOp) and _may_explode(inner):
            return False
    return True


# ----------------------------------------------------------------------------------------------------------
# What nothing needs
# ----------------------------------------------------------------------------------------------------------


def drop_dead_locals(node: Function) -> None:
    """Drop assignments to names that the function never reads."""
    inner = list(ast.walk(node))
    if any(isinstance(one, ast.Global | ast.Nonlocal) for one in inner):
        return
    read = {one.id for one in inner if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Store)}
    if "locals" in read:
        return
    for holder in [node, *(one for one in inner if isinstance(one, ast.stmt) and one is not node)]:
        if isinstance(holder, ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            body = getattr(holder, name, None)
            if isinstance(body, list):
                made = [kept for one in body if (kept := _live_part(one, read)) is not None]
                setattr(holder, name, made or ([ast.Pass()] if body and name != "orelse" else []))


def _live_part(node: ast.stmt, read: set[str]) -> ast.stmt | None:
    """Return an assignment without the pairs whose name is never read; None when nothing is left."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not is_pure(node.value):
        return node
    pairs = list(matched(node.targets[0], node.value))
    if any(value is None for _, value in pairs):
        names = [target.id for target, _ in pairs if isinstance(target, ast.Name)]
        return node if len(names) < len(pairs) or read & set(names) or _unpacks(node) else None
    kept = [(t, value) for t, value in pairs if not isinstance(t, ast.Name) or t.id in read]
    if len(kept) == len(pairs):
        return node
    if not kept:
        return None
    targets, values = [t for t, _ in kept], [value for _, value in kept]
    if len(kept) == 1:
        return ast.copy_location(ast.Assign(targets, values[0]), node)
    made = ast.Assign([ast.Tuple(targets, ast.Store())], ast.Tuple(values, ast.Load()))
    return ast.copy_location(made, node)


def _unpacks(node: ast.Assign) -> bool:
    """Whether an assignment unpacks what is not spelled out: that may fail."""
    return isinstance(node.targets[0], ast.Tuple | ast.List)


def drop_members(tree: ast.Module) -> None:
    """Drop methods that nothing names, and constants stored in attributes that nothing reads.

    Only in classes whose bases are of this program, NamedTuple or, for attributes, nn.Module: other
    libraries call and read by name.
    """
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            read |= set(re.findall(r"[A-Za-z_]\w*", node.value))
    own = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in own.values():
        bases = {last_name(base) for base in node.bases}
        if not bases <= {"NamedTuple", "Module"} or node.keywords:
            continue
        for method in [one for one in node.body if isinstance(one, Function)]:
            if not bases & {"Module"} and not method.name.startswith("__") and method.name not in read:
                node.body.remove(method)
                continue
            for inner in ast.walk(method):
                body = getattr(inner, "body", None)
                if isinstance(body, list):
                    inner.body = [one for one in body if not _stores_unread(one, read)] or [ast.Pass()]
        node.body = node.body or [ast.Pass()]


def _stores_unread(node: ast.stmt, read: set[str]) -> bool:
    """Whether a statement only stores a constant in an attribute of self that nothing reads."""
    match node:
        case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=attr)], value=ast.Constant()):
            return attr not in read
    return False


def drop_rows(program: Program) -> None:
    """Drop rows of tables that every use of the table passes over."""
    filters: dict[str, list[str]] = defaultdict(list)  # table: by the call of which field a use filters it
    uses: Counter = Counter()
    for node in ast.walk(program.tree):
        match node:
            case ast.comprehension(
                target=ast.Name(id=row),
                iter=ast.Name(id=table),
                ifs=[ast.Call(func=ast.Attribute(value=ast.Name(id=called), attr=attr)), *_],
            ) if row == called:
                filters[table].append(attr)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                drop_loop_rows(node)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            uses[node.id] += 1
    for name, fields in filters.items():
        table = program.values.get(name)
        if len(fields) == uses[name] and len(set(fields)) == 1 and isinstance(table, ast.Tuple | ast.List):
            table.elts = [row for row in table.elts if not _fails(program, row, fields[0])]


def _fails(program: Program, row: ast.expr, key: str) -> bool:
    """Whether a table's row, a call, has in a field a function that returns False."""
    if not isinstance(row, ast.Call) or not isinstance(row.func, ast.Name):
        return False
    if row.func.id not in program.classes:
        return False
    value = Folder(program).arguments(row.func.id, row)[1].get(key)
    if isinstance(value, ast.Name) and value.id in program.functions:
        value = constant_body(program.functions[value.id])
    result = value.body if isinstance(value, ast.Lambda) else value
    return isinstance(result, ast.Constant) and not result.value


def constant_body(node: ast.FunctionDef) -> ast.Constant | None:
    """Return the constant that is all a function returns."""
    match [one for one in node.body if not _is_text(one)]:
        case [ast.Return(value=ast.Constant() as value)]:
            return value
    return None


def drop_loop_rows(function: Function) -> None:
    """Drop the rows of a spelled out list for which the loop over it does nothing."""
    for loop in [node for node in ast.walk(function) if isinstance(node, ast.For)]:
        if len(loop.body) != 1 or not isinstance(loop.body[0], ast.If) or loop.body[0].orelse or loop.orelse:
            continue
        test, is_negated = loop.body[0].test, False
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, is_negated = test.operand, True
        names = [item.id for item in getattr(loop.target, "elts", []) if isinstance(item, ast.Name)]
        rows = _rows_of(loop.iter, function)
        if rows is None or not isinstance(test, ast.Name) or names.count(test.id) != 1:
            continue
        position = names.index(test.id)
        rows.elts = [row for row in rows.elts if not _is_passed_over(row, len(names), position, is_negated)]


def _rows_of(node: ast.expr, function: Function) -> ast.List | ast.Tuple | None:
    """Return the display that a loop goes over: itself, or the one value of a name used once."""
    if isinstance(node, ast.List | ast.Tuple):
        return node
    if isinstance(node, ast.Name):
        found = local_values(function).get(node.id, [])
        uses = sum(isinstance(inner, ast.Name) and inner.id == node.id for inner in ast.walk(function))
        if len(found) == 1 and uses == 2 and isinstance(found[0][1], ast.List | ast.Tuple):
            return found[0][1]
    return None


def _is_passed_over(row: ast.expr, width: int, position: int, is_negated: bool) -> bool:
    """Whether a row's item at a position is a constant for which the loop's condition is false."""
    if not isinstance(row, ast.Tuple) or len(row.elts) != width or not is_pure(row):
        return False
    try:
        return bool(ast.literal_eval(row.elts[position])) == is_negated
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------
# The config classes
# ----------------------------------------------------------------------------------------------------------


def is_option(node: ast.stmt) -> bool:
    """Whether a statement declares a config field."""
    return (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == OPTION
    )


def bake(program: Program) -> None:
    """Write the recipe's values into the defaults of the config classes; other values stay in the recipe."""
    sections = {name for name, node in program.classes.items() if any(map(is_option, node.body))}
    made, replaced = _changes(program)
    for root, node in program.classes.items():
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        types = [one.annotation.id if isinstance(one.annotation, ast.Name) else "" for one in fields]
        if not fields or not set(types) <= sections or root in made or len(set(types)) < len(types):
            continue
        program.configs[root] = {one.target.id: Instance(t) for one, t in zip(fields, types)}
        for one, section in zip(fields, types):
            program.attributes[root, one.target.id] = Instance(section)
            program.configs[section] = {}
            if section not in made | program.relatives():
                bake_section(program, section, one.target.id, replaced)
    for section in [key for key, values in program.recipe.items() if values == {}]:
        del program.recipe[section]


def _changes(program: Program) -> tuple[set[str], set[str]]:
    """Name the classes that are called with arguments, and the keywords given to `replace`."""
    made, replaced = set(), set()
    for node in ast.walk(program.tree):
        if isinstance(node, ast.Call):
            name = last_name(node)
            if name in ("replace", "_replace"):
                replaced |= {one.arg for one in node.keywords if one.arg}
            elif isinstance(node.func, ast.Name) and (node.args or node.keywords):
                made.add(name)
    return made, replaced


def bake_section(program: Program, section: str, key: str, replaced: set[str]) -> None:
    """Write one section's values into its class and note those that nothing changes."""
    values = program.recipe.get(key, {})
    for one in filter(is_option, program.classes[section].body):
        name, call = one.target.id, one.value
        kind = KINDS.get(one.annotation.id if isinstance(one.annotation, ast.Name) else "")
        default = Scopes(program).look(call.args[0]) if call.args else None
        if kind is None or name in replaced or not isinstance(default, Known) or not isinstance(values, dict):
            continue
        try:
            value = parse_value(values[name], kind) if name in values else default.value
        except (ValueError, TypeError, OverflowError):
            continue  # the program says what is wrong with it
        values.pop(name, None)
        call.args[0] = literal(value)
        settings = {item.arg: item.value for item in call.keywords}
        live = settings.get("live")
        if live is None and len(call.args) <= 3 and _is_within(program, value, settings):
            program.configs[section][name] = value
            program.attributes[section, name] = Known(value)
            has_env = len(call.args) > 1 and not (
                isinstance(call.args[1], ast.Constant) and not call.args[1].value
            )
            one.value = ast.Call(call.func, call.args[: 1 + has_env], [])


def _is_within(program: Program, value, settings: dict[str, ast.expr]) -> bool:
    """Whether a value is provably within the bounds and choices of its declaration."""
    facts = {name: _choices(program, node) for name, node in settings.items()}
    if not set(facts) <= {"low", "high", "choices"} or any(fact is None for fact in facts.values()):
        return False
    low, high, choices = (facts[name].value if name in facts else None for name in ("low", "high", "choices"))
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (not choices or value in choices)
    )


def _choices(program: Program, node: ast.expr) -> Fact:
    """Return what a bound is; `tuple(TABLE)` is the table's keys."""
    match node:
        case ast.Call(func=ast.Name(id="tuple"), args=[ast.Name(id=name)]) if isinstance(
            program.values.get(name), ast.Dict
        ):
            return Known(
                tuple(key.value for key in program.values[name].keys if isinstance(key, ast.Constant))
            )
    return Scopes(program).look(node)


# ----------------------------------------------------------------------------------------------------------
# The whole
# ----------------------------------------------------------------------------------------------------------


def fold(source: str, recipe: dict) -> str:
    """Return the program with its recipe inside, less what the recipe makes superfluous."""
    tree = ast.parse(source)
    fold_tree(tree, recipe)
    return ast.unparse(tree) + "\n"


def fold_tree(tree: ast.Module, recipe: dict) -> None:
    """Fold a module in place; statements of its top level that stay keep their identity."""
    program = Program(
        tree, {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    )
    program.index()
    bake(program)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and (PACKED_RECIPE, "") in bound_names(node):
            node.value = literal(program.recipe)
    program.index()
    learn_pure(program)
    before = ""
    for _ in range(MAX_ROUNDS):
        folder = Folder(program)
        tree.body = folder.block(tree.body)
        drop_members(tree)
        program.index()
        drop_rows(program)
        tree.body = [tree.body[i] for i in needed_statements(tree.body, set())]
        drop_imports(tree)
        program.index()
        learn(program, folder.seen)
        ast.fix_missing_locations(tree)
        text = ast.unparse(tree) + repr((program.attributes, program.params, sorted(program.pure)))
        if text == before:
            return
        before = text


def drop_imports(tree: ast.Module) -> None:
    """Drop imports at the top level whose names nothing reads."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in list(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            node.names = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in read]
            if not node.names:
                tree.body.remove(node)
