"""One round over the program: write what is constant, take decided branches, note what is done with names."""

import ast
import re

from pack.names import PURE_DECORATORS, Function, bound_names, by_kind, free_names, last_name, walk
from pack.printing import to_text
from pack.specialize.drop import drop_dead_locals
from pack.specialize.facts import Fact, Instance, Items, Known, Observations, ProgramFacts, Table, join
from pack.specialize.scopes import Scopes, select
from pack.specialize.syntax import (
    TERMINAL,
    Comprehension,
    changed_names,
    changes_scope,
    class_names,
    clone,
    constant_body,
    is_constant_name,
    is_only_indexed,
    is_option,
    is_pure,
    is_steady,
    is_text,
    literal,
    local_values,
    matched,
    parameters,
    takes,
)

SETTLED = ast.Constant | ast.Lambda | ast.Starred | ast.FormattedValue | ast.Tuple | ast.Slice
LONGEST_LITERAL = 8  # characters that may replace a shorter name


class Specializer(ast.NodeTransformer, Scopes):
    """Replace what is constant, take decided branches, and note what the program does with its names."""

    def __init__(self, program: ProgramFacts):
        Scopes.__init__(self, program)
        self.seen = Observations()
        self.owner = ""  # the class whose body this is
        self.unstable: list[set[str]] = []  # names of each scope that are bound more than once
        self.stored: dict[int, Fact] = {}  # attribute target -> what is stored there
        self.hints: dict[int, Fact] = {}  # lambda -> what its parameter is
        self.relatives = program.relatives
        self.returned: list[list[Fact]] = []  # what the functions around return

    # Scopes

    def visit_FunctionDef(self, node: Function) -> Function:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        self.visit_defaults(node.args)
        owner, self.owner = self.owner, ""
        self.push_function(node, owner)
        self.returned.append([])
        node.body = self.block(node.body) or [ast.Pass()]
        returned = self.returned.pop()
        if not owner and len(self.stack) == 1 and not node.decorator_list and not changes_scope(node.body):
            ends = isinstance(node.body[-1], ast.Return | ast.Raise)
            self.seen.returns[node.name] = join(returned if ends else [*returned, Known(None)])
        drop_dead_locals(node, self.is_idle)
        self.stack.pop()
        self.unstable.pop()
        self.owner = owner
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        self.visit_FunctionDef(node)
        self.seen.returns.pop(node.name, None)
        return node

    def visit_Return(self, node: ast.Return) -> ast.Return:
        node.value = node.value and self.visit(node.value)
        self.returned[-1].append(self.look(node.value) if node.value else Known(None))
        return node

    def visit_defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(default) for default in arguments.defaults]
        arguments.kw_defaults = [default and self.visit(default) for default in arguments.kw_defaults]

    def push_function(self, node: Function, owner: str) -> None:
        """Enter a function: what its parameters and its names bound once are."""
        bindings = local_values(node)
        known = {}
        if not self.stack or (owner and node.name == "__init__"):
            facts = self.program.params.items()
            known = {param: fact for (name, param), fact in facts if name == (owner or node.name)}
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
        single = {n: found[0] for n, found in bindings.items() if len(found) == 1 and n not in names}
        once = {n: found for n, found in single.items() if found[0]}
        for _ in once:
            before = dict(scope)
            for name, (kind, value) in once.items():
                if kind.startswith("part"):
                    fact = self.part(value, *map(int, re.findall(r"\d+", kind)))
                else:
                    fact = self.look(value) if value is not None else None
                if isinstance(fact, Items) and name in changed_names(by_kind(walk(node))):
                    fact = Instance()
                if kind == "item":
                    fact = Instance(fact.name) if isinstance(fact, Items) else None
                if isinstance(fact, Table) and not is_only_indexed(name, node):
                    fact = Instance()
                scope[name] = fact
            if scope == before:
                break

    def part(self, node: ast.expr, at: int, width: int) -> Fact:
        """Return what the items of tuples are that a comprehension makes, sorted or not."""
        match node:
            case ast.Call(func=ast.Name(id="sorted"), args=[inner]) if self.is_builtin("sorted"):
                return self.part(inner, at, width)
            case ast.SetComp() | ast.ListComp() | ast.GeneratorExp():
                if isinstance(node.elt, ast.Tuple) and len(node.elt.elts) == width:
                    targets = [inner for one in node.generators for inner in walk(one.target)]
                    self.stack.append({inner.id: None for inner in targets if isinstance(inner, ast.Name)})
                    fact = self.look(node.elt.elts[at])
                    self.stack.pop()
                    return None if isinstance(fact, Table) else fact
        return None

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
            inner = [child.id for child in walk(one.target) if isinstance(child, ast.Name)]
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
            for inner in walk(node):  # section defaults make instances, without arguments
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
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

    def visit_MatchValue(self, node: ast.MatchValue) -> ast.MatchValue:
        value = self.visit(clone(node.value))
        is_allowed = isinstance(value, ast.Constant) and type(value.value) in (int, float, str)
        node.value = value if is_allowed else node.value
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        if is_text(node):
            return node
        node.value = self.visit(node.value)
        return None if isinstance(node.value, ast.Constant) else node

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
        if isinstance(node, SETTLED) or (self.program.style.constants and is_constant_name(node)):
            return node
        fact = self.look(node)
        if fact is None and not isinstance(node, Comprehension):
            self.open.add(id(node))
        if not isinstance(fact, Known) or not self.is_quiet(node):
            return node
        made = literal(fact.value)
        length = len(ast.unparse(made))
        return made if length <= LONGEST_LITERAL or length <= len(to_text(node)) else node

    def truth(self, node: ast.expr) -> bool | None:
        """Return what a condition decides, where that is known."""
        fact = self.look(node)
        if isinstance(fact, Known):
            return bool(fact.value)
        if isinstance(fact, Instance) and fact.name in self.program.classes:
            made = self.program.classes[fact.name]
            plain = not made.bases and not {"__bool__", "__len__"} & {n for n, _ in class_names(made)}
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
            if chosen is not None and (table.node is node.value or self.means_here(node.value, chosen)):
                return self.visit(clone(chosen))
        return node

    def means_here(self, table: ast.expr, node: ast.expr) -> bool:
        """Whether an entry of a table means here what it means in the table."""
        if isinstance(table, ast.Name) and self.is_global(table.id):
            return all(map(self.is_global, free_names(node)))
        return self.is_stable(node)

    def is_stable(self, node: ast.expr) -> bool:
        """Whether an expression means the same anywhere in this function."""
        inner = {child.id for child in walk(node) if isinstance(child, ast.Name)}
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
            self.seen.is_dynamic |= node.id in ("setattr", "delattr", "vars")
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        node.value = self.visit(node.value)
        if not isinstance(node.ctx, ast.Load):
            owner = self.look(node.value)
            name = owner.name if isinstance(owner, Instance) else ""
            self.seen.stores[node.attr].append((name, self.stored.pop(id(node), None)))
        if node.attr in ("__dict__", "__setattr__"):
            self.seen.is_dynamic = True
        if isinstance(node.ctx, ast.Load) and is_pure(node.value):
            method = self.method(node.value, node.attr, ["property"])
            constant = constant_body(method) if isinstance(method, ast.FunctionDef) else None
            if constant:
                return clone(constant)
        fact = self.look(node.value)
        is_told = isinstance(fact, Instance) and self.program.is_nominal(fact.name)
        node.owner = fact.name if is_told else ""  # for drop_members
        field = self.field(node.value, node.attr) if self.is_row(node.value) else None
        return node if field is None else self.visit(clone(field))

    def method(self, owner: ast.expr, name: str, decorators: list[str]) -> Function | None:
        """Return the method of an instance that has just these decorators, where no other can be meant."""
        fact = self.look(owner)
        if not isinstance(fact, Instance) or fact.name not in self.program.classes.keys() - self.relatives:
            return None
        if self.program.stored is None or name in self.program.stored:
            return None
        body = self.program.classes[fact.name].body
        found = [one for one in body if isinstance(one, Function) and one.name == name]
        is_other = len(found) != 1 or any((name, "") in bound_names(one) for one in body if one not in found)
        if is_other:
            return None
        return found[0] if [last_name(one) for one in found[0].decorator_list] == decorators else None

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = node.func.id if isinstance(node.func, ast.Name) and self.is_global(node.func.id) else ""
        self.hint_lambdas(name, node)
        if not name:
            node.func = self.visit(node.func)
        node.args = [self.visit(arg) for arg in node.args]
        for one in node.keywords:
            one.value = self.visit(one.value)
        self.observe(name, node)
        if isinstance(node.func, ast.Lambda):
            is_called_bare = not (node.args or node.keywords or parameters(node.func.args))
            if is_called_bare or (isinstance(node.func.body, ast.Constant) and all(map(is_pure, node.args))):
                return node.func.body
        if name == "isinstance" and self.look(node.args[0]) == Known(None):
            return ast.Constant(False)
        if name == "getattr" and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            attr = node.args[1].value
            if isinstance(attr, str) and attr.isidentifier() and name not in self.program.values:
                return self.visit(ast.Attribute(node.args[0], attr, ast.Load()))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2:
            table, key = self.look(node.func.value), self.look(node.args[0])
            keys = [one.value for one in table.node.keys] if isinstance(table, Table) else None
            if keys is not None and isinstance(key, Known) and self.is_quiet(node.args[0]):
                return node.args[1] if key.value not in keys else node
        called = self.program.functions.get(name)
        if isinstance(node.func, ast.Attribute) and is_pure(node.func.value):
            called = self.method(node.func.value, node.func.attr, [])
        if isinstance(called, ast.FunctionDef) and not called.decorator_list:
            constant = constant_body(called) if takes(called.args, node, first=0 if name else 1) else None
            if constant and all(map(is_steady, [*node.args, *(one.value for one in node.keywords)])):
                return clone(constant)
        return node

    def hint_lambdas(self, name: str, node: ast.Call) -> None:
        """Note what the parameter of a lambda is that becomes a field annotated Callable[[X], ...]."""
        if name in self.program.classes:
            for key, value in self.arguments(name, node)[1].items():
                if isinstance(value, ast.Lambda):
                    annotation = dict(class_names(self.program.classes[name])).get(key)
                    match annotation:
                        case ast.Subscript(slice=ast.Tuple(elts=[ast.List(elts=[parameter]), _])):
                            self.hints[id(value)] = self.annotated(parameter)

    def replaced(self, owner: ast.expr, given: ast.keyword) -> Fact:
        """Return what `_replace` gives to a field: what calls give, if that makes it that again."""
        fact, before = self.look(given.value), self.look(owner)
        key = (before.name, given.arg) if isinstance(before, Instance) else None
        if fact is None and key in self.program.candidates and key not in self.program.attributes:
            known_open, self.open = self.open, set()
            self.program.attributes[key] = self.program.candidates[key]
            fact = join([self.look(given.value), self.program.candidates[key]])
            del self.program.attributes[key]
            self.open = known_open
        return fact

    def observe(self, name: str, node: ast.Call) -> None:
        """Note a call's arguments, and the attributes that it sets or replaces."""
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if last in ("setattr", "delattr", "__setattr__", "vars", "exec"):
            key = node.args[1] if len(node.args) > 1 else None
            if isinstance(key, ast.Constant):
                self.seen.stores[key.value].append(("", None))
            else:
                self.seen.is_dynamic = True
        if last == "_replace":
            for one in node.keywords:
                self.seen.replaced[one.arg or ""].append(self.replaced(node.func.value, one))
        if name in self.program.functions or name in self.program.classes:
            matches, given = self.arguments(name, node)
            facts = {key: self.look(value) for key, value in given.items()}
            self.seen.calls[name].append(facts if matches else None)
