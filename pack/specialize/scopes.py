"""What expressions are at a place of the program: names in force there, constants, instances, tables."""

import ast
import re
from collections.abc import Iterator
from types import SimpleNamespace

from pack.names import children, is_record, walk
from pack.specialize.facts import MAKERS, Fact, Instance, Items, Known, ProgramFacts, Table, join
from pack.specialize.syntax import (
    EXPRESSIONS,
    Comprehension,
    class_names,
    constructor,
    is_literal,
    is_pure,
    takes,
)

MAX_ITEMS = 10_000  # of a range that is evaluated


def bounded_range(*limits: int) -> range:
    """A range of moderate length: the packer computes, it does not train."""
    made = range(*limits)
    if len(made) > MAX_ITEMS:
        raise ValueError(f"a range of {len(made)} items is too long to evaluate")
    return made


# Builtins without effects; calls of them with constant arguments are evaluated.
SAFE = (abs, all, any, bool, dict, enumerate, float, int, len, list, max, min, round, set, sorted, str, sum)
SAFE_BUILTINS = {made.__name__: made for made in (*SAFE, tuple, zip)} | {"range": bounded_range}


class Scopes:
    """Names in force at a place of the program, and what expressions are there."""

    def __init__(self, program: ProgramFacts):
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

    def is_quiet(self, node: ast.expr) -> bool:
        """Whether an expression calls nothing but what is known to have no effect."""
        quiet = self.program.configs.keys() | self.program.pure.keys()
        for inner in walk(node):
            if isinstance(inner, ast.NamedExpr | ast.Yield | ast.YieldFrom | ast.Await):
                return False
            if isinstance(inner, ast.Call):
                name = inner.func.id if isinstance(inner.func, ast.Name) else ""
                if not (name in quiet or self.is_builtin(name)):
                    return False
        return True

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
                name = owner.name if isinstance(owner, Instance) else None
                return self.program.attributes.get((name, attr))
            case ast.Subscript(value=base, slice=key) if not isinstance(key, ast.Slice):
                found = self.look(base)
                if isinstance(found, Items):
                    return Instance(found.name)
                chosen = select(found.node, self.look(key)) if isinstance(found, Table) else None
                if chosen is not None:
                    return self.look(chosen)
                if isinstance(found, Table):
                    return join([self.look(value) for value in found.node.values])
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
            case ast.Compare(
                left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[ast.Name(id=name)]
            ) if isinstance(table := self.program.values.get(name), ast.Dict) and name.isupper():
                key = self.look(left)
                if isinstance(key, Known) and all(isinstance(one, ast.Constant) for one in table.keys):
                    return Known((key.value in [one.value for one in table.keys]) == isinstance(op, ast.In))
            case ast.Compare(ops=operators) if any(isinstance(op, ast.Is | ast.IsNot) for op in operators):
                return None  # whether equal constants are one object is the interpreter's choice
            case ast.Lambda() | ast.Set() | ast.JoinedStr():
                return Instance() if not isinstance(node, ast.JoinedStr) else self.evaluate(node)
            case ast.Dict():
                return Table(node) if self.is_table(node) else Instance()
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                tables = [self.look(left), self.look(right)]
                if all(isinstance(table, Table) for table in tables):
                    return merged(*tables)
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
        fact = Scopes(self.program).look(value)
        is_changing = isinstance(value, ast.List) or (isinstance(fact, Table) and not name.isupper())
        return Instance() if is_changing else fact

    def look_call(self, node: ast.Call) -> Fact:
        """Return what a call gives: an instance, what the annotation says, or the value itself."""
        if isinstance(node.func, ast.Name) and self.is_global(node.func.id):
            name = node.func.id
            if name in self.program.classes:
                is_open = MAKERS & set(dict(class_names(self.program.classes[name])))
                return None if is_open else Instance(name)
            if name in self.program.functions:
                said = self.annotated(self.program.functions[name].returns)
                return said or self.program.returns.get(name) or self.evaluate(node)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if last == "ModuleList" and len(node.args) == 1:
            return self.items(node.args[0])
        return None

    def is_table(self, node: ast.Dict) -> bool:
        """Whether a dict display has different constant keys, and values without effects."""
        plain = all(isinstance(one, ast.Constant) for one in node.keys)
        plain = plain and all(is_pure(value) or self.is_row(value) for value in node.values)
        return plain and len({one.value for one in node.keys}) == len(node.keys)

    def is_row(self, node: ast.expr) -> bool:
        """Whether an expression makes a NamedTuple of the program, of parts without effects."""
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if self.is_global(name):
                record = name in self.program.classes and is_record(self.program.classes[name])
                return record and all(map(is_pure, [*args, *(one.value for one in keywords)]))
        return False

    def is_idle(self, node: ast.expr) -> bool:
        """Whether a value has no effect: a record or a changed copy of one, or what calls nothing."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name() as owner, attr="_replace"), args=[]):
                fact = self.look(owner)
                made = self.program.classes.get(fact.name) if isinstance(fact, Instance) else None
                if made is None or not is_record(made) or fact.name in self.program.relatives:
                    return False
                fields = {key for key, annotation in class_names(made) if annotation}
                return all(is_pure(one.value) and one.arg in fields for one in node.keywords)
            case ast.Call(func=ast.Name(id=name)) if self.is_row(node):
                fields = [one for one in self.program.classes[name].body if isinstance(one, ast.AnnAssign)]
                defaults = [one.value for one in fields if one.value is not None]
                names = [ast.arg(one.target.id) for one in fields]
                return takes(ast.arguments([], names, None, [], [], None, defaults), node)
        return is_pure(node)

    def field(self, row: ast.Call, name: str) -> ast.expr | None:
        """Return the expression of a row's field: the one given, or else a constant default."""
        matches, given = self.arguments(row.func.id, row)
        fields = [one for one in self.program.classes[row.func.id].body if isinstance(one, ast.AnnAssign)]
        defaults = {one.target.id: one.value for one in fields if isinstance(one.value, ast.Constant)}
        return (defaults | given).get(name) if matches else None

    def evaluate(self, node: ast.expr) -> Known | None:
        """Compute an expression all of whose names are known."""
        makes_items = isinstance(node, Comprehension)  # open inside, yet perhaps closed
        if not makes_items and any(id(child) in self.open for child in children(node)):
            return None
        if not all(isinstance(inner, EXPRESSIONS) for inner in walk(node)) or may_explode(node):
            return None
        names: dict[str, object] = {}
        try:
            closed = _Closer(self, names, node).close(node)
            code = compile(ast.fix_missing_locations(ast.Expression(closed)), "fold", "eval")
            value = eval(code, {"__builtins__": {}} | names)
        except Exception:  # an open expression, or one that fails: it may fail where it stands, too
            return None
        return Known(value) if is_literal(value) and len(repr(value)) < 200 else None

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


def may_explode(node: ast.expr) -> bool:
    """Whether an expression has a power or shift that is not small and spelled out."""
    powers = (ast.Pow, ast.LShift)
    return any(
        isinstance(inner, ast.BinOp)
        and isinstance(inner.op, powers)
        and not re.fullmatch(r"-?\d{1,2}(\.\d+)?", ast.unparse(inner.right))
        for inner in walk(node)
    )


class _Closer:
    """Copies of expressions with names of values for what is known; LookupError at the first unknown."""

    def __init__(self, scopes: Scopes, names: dict[str, object], node: ast.expr):
        self.scopes, self.names = scopes, names
        inner = [child for child in walk(node) if isinstance(child, ast.comprehension)]
        self.own = {child.id for one in inner for child in walk(one.target) if isinstance(child, ast.Name)}

    def close(self, node):
        """Copy a node, a list of nodes or what else a field holds."""
        if isinstance(node, list):
            return [self.close(item) for item in node]
        if not isinstance(node, ast.expr | ast.comprehension | ast.keyword):
            return node
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id not in self.own):
            return self.known(node)
        if isinstance(node, ast.Call):
            return ast.Call(self.function(node.func), self.close(node.args), self.close(node.keywords))
        return type(node)(**{name: self.close(value) for name, value in ast.iter_fields(node)})

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

    def function(self, node: ast.expr) -> ast.expr:
        name = node.id if isinstance(node, ast.Name) else ""
        pure = self.scopes.program.pure
        is_pure_call = name in pure and self.scopes.is_global(name)
        if name in self.own or not (is_pure_call or self.scopes.is_builtin(name)):
            raise LookupError
        return self.value(pure[name] if is_pure_call else SAFE_BUILTINS[name])


def config_object(program: ProgramFacts, name: str) -> SimpleNamespace:
    """Make an object that has the fixed fields of a config class and no others."""
    made = SimpleNamespace(**program.configs[name])
    for key, value in program.configs[name].items():
        if isinstance(value, Instance):
            setattr(made, key, config_object(program, value.name))
    return made


def merged(first: Table, second: Table) -> Table:
    """Return what `first | second` holds."""
    pairs = {one.value: (one, value) for table in (first, second) for one, value in entries(table.node)}
    return Table(ast.Dict([one for one, _ in pairs.values()], [value for _, value in pairs.values()]))


def entries(node: ast.Dict) -> Iterator[tuple[ast.Constant, ast.expr]]:
    """Yield the (key, value) pairs of a table."""
    return zip(node.keys, node.values, strict=True)


def select(node: ast.Dict, key: Fact) -> ast.expr | None:
    """Return the entry of a table under a key, where that is known."""
    if isinstance(key, Known):
        for one, value in entries(node):
            if repr(one.value) == repr(key.value):
                return value
    return None


def parameter_names(program: ProgramFacts, name: str) -> list[str] | None:
    """List a function's or class's parameters by position; None where they cannot be told."""
    made = program.classes.get(name)
    node = program.functions.get(name) or constructor(made)
    if node is None:
        return [key for key, _ in class_names(made)] if is_record(made) else None
    if node.args.vararg:
        return None
    names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args]]
    return names if name in program.functions else names[1:]
