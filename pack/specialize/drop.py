"""What nothing needs: locals, methods, rows of tables and imports."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from pack.names import PURE_DECORATORS, Function, blocks, bound_names, children, last_name, walk
from pack.specialize.facts import PACKED_RECIPE, PLAIN_BASES, ProgramFacts
from pack.specialize.scopes import Scopes
from pack.specialize.syntax import (
    class_names,
    constant_body,
    is_pure,
    is_string,
    local_values,
    matched,
    parameters,
)

PLAIN_DECORATORS = PURE_DECORATORS | {"property", "cached_property", "staticmethod", "classmethod"}
# Methods that torch calls and attributes that it reads.
MODULE_HOOKS = {"forward", "extra_repr", "train", "reset_parameters", "get_extra_state", "set_extra_state"}
MODULE_HOOKS |= {"_apply", "_get_name", "_load_from_state_dict", "_save_to_state_dict", "named_parameters"}
MODULE_HOOKS |= {"named_buffers", "named_modules", "named_children", "_named_members", "state_dict"}
MODULE_READS = {
    "Module": {"training"},
    "Linear": {"training", "weight", "bias", "in_features", "out_features"},
}
READING_KINDS = {ast.Call, ast.Attribute, ast.AugAssign, ast.MatchClass, ast.ClassDef, ast.Constant, ast.Name}
PLAIN_TYPES = {"bool", "int", "float", "str"}


def drop_dead_locals(node: Function, is_idle: Callable[[ast.expr], bool]) -> None:
    """Drop assignments to names that the function never reads, of values that have no effect."""
    inner = walk(node)
    if any(isinstance(one, ast.Global | ast.Nonlocal) for one in inner):
        return
    read = {one.id for one in inner if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Store)}
    if read & {"locals", "vars", "dir", "eval", "exec"}:
        return
    for holder in [node, *(one for one in inner if isinstance(one, ast.stmt) and one is not node)]:
        for name, body in [] if isinstance(holder, ast.ClassDef) else blocks(holder):
            made = [kept for one in body if (kept := _live_part(one, read, is_idle)) is not None]
            body[:] = made or ([ast.Pass()] if body and name != "orelse" else [])


def _live_part(node: ast.stmt, read: set[str], is_idle: Callable[[ast.expr], bool]) -> ast.stmt | None:
    """Return an assignment without the pairs whose name is never read; None when nothing is left."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not is_idle(node.value):
        return node
    pairs = list(matched(node.targets[0], node.value))
    if any(value is None for _, value in pairs):
        names = [target.id for target, _ in pairs if isinstance(target, ast.Name)]
        unpacks = isinstance(node.targets[0], ast.Tuple | ast.List)  # what is not spelled out: may fail
        return node if len(names) < len(pairs) or read & set(names) or unpacks else None
    return with_pairs(node, pairs, [(t, v) for t, v in pairs if not isinstance(t, ast.Name) or t.id in read])


def with_pairs(node: ast.stmt, pairs: list[tuple], kept: list[tuple]) -> ast.stmt | None:
    """Return an assignment of (target, value) pairs that does only those kept; None when there is none."""
    if len(kept) == len(pairs):
        return node
    if len(kept) < 2:
        return ast.copy_location(ast.Assign([kept[0][0]], kept[0][1]), node) if kept else None
    targets, values = (list(part) for part in zip(*kept, strict=True))
    made = ast.Assign([ast.Tuple(targets, ast.Store())], ast.Tuple(values, ast.Load()))
    return ast.copy_location(made, node)


def drop_members(program: ProgramFacts) -> None:
    """Drop methods that nothing calls, and constants stored in attributes that nothing reads.

    Only in classes whose bases are NamedTuple, nn.Module or nn.Linear: other libraries call and read by name.
    What only dropped methods read goes with them.
    """
    tree = program.tree
    own = [one for one in tree.body if isinstance(one, ast.ClassDef) and not one.keywords]
    own = [one for one in own if set(map(last_name, one.bases)) <= PLAIN_BASES]
    waiting = [one for node in own for one in node.body if isinstance(one, Function)]
    waiting = [one for one in waiting if not one.name.startswith("__")]
    waiting = [one for one in waiting if set(map(last_name, one.decorator_list)) <= PLAIN_DECORATORS]
    read = NamesRead(tree, {id(one) for one in waiting})
    while found := [one for one in waiting if read.may_call(one)]:
        waiting = [one for one in waiting if one not in found]
        for one in found:
            read.add(one)
    dropped = {id(one) for one in waiting}
    for node in own:
        node.body = [one for one in node.body if id(one) not in dropped]
        is_unread = unread_test(program, node, read)
        for one in list(node.body):
            if isinstance(one, Function):
                drop_stores(one, is_unread)
            elif isinstance(one, ast.Assign) and _is_unread_constant(one, read):
                node.body.remove(one)
        node.body = node.body or [ast.Pass()]


class NamesRead:
    """Attributes that a program may read: by name, by a string that spells them, by getattr of an f-string.

    `left_out` holds the ids of functions that do not count.
    """

    def __init__(self, tree: ast.Module, left_out: set[int]):
        self.calls: dict[str, list[ast.Call | None]] = {name: [None] for name in MODULE_HOOKS}
        self.owners: dict[str, set[str]] = {}  # attribute: classes whose instances it is read from, no others
        self.patterns: set[str] = set()
        self.reads_all = False  # does it read what an object holds, whatever the names
        self.left_out = left_out
        self.classes = {one.name for one in tree.body if isinstance(one, ast.ClassDef)}
        for one in tree.body:
            if (PACKED_RECIPE, "") not in bound_names(one):
                self.add(one)

    def add(self, statement: ast.stmt) -> None:
        """Note what a statement reads."""
        todo = [statement]
        while todo:
            node = todo.pop()
            todo += [child for child in children(node) if id(child) not in self.left_out]
            if node.__class__ not in READING_KINDS:
                continue
            match node:
                case ast.Call(func=ast.Attribute(attr=name) as func) if not self._is_class(func.value):
                    self.calls.setdefault(name, []).append(node)
                    todo.remove(func)
                    todo.append(func.value)
                    if name == "split" and is_string(func.value):  # getattr(x, n) for n in "a b".split()
                        for word in func.value.value.split():
                            self.note(word)
                case ast.Attribute(ctx=ast.Load(), attr=name) if getattr(node, "owner", ""):
                    self.owners.setdefault(name, set()).add(node.owner)
                case ast.Attribute(ctx=ast.Load() | ast.Del(), attr=name):
                    self.note(name)
                case ast.AugAssign(target=ast.Attribute(attr=name)):
                    self.note(name)
                case ast.MatchClass(kwd_attrs=names):
                    for name in names:
                        self.note(name)
                case ast.ClassDef(body=body):  # `length = size`, `@size.setter`
                    inner = [one for one in body if not isinstance(one, Function)]
                    inner += [one for f in body if isinstance(f, Function) for one in f.decorator_list]
                    names = [name for one in inner for name in walk(one) if isinstance(name, ast.Name)]
                    for name in names:
                        if isinstance(name.ctx, ast.Load):
                            self.note(name.id)
                case ast.Constant(value=str(text)) if " " not in text:
                    for name in re.findall(r"[A-Za-z_]\w*", text):
                        self.note(name)
            match node:
                case ast.Name(id="vars") | ast.Attribute(attr="__dict__"):
                    self.reads_all = True
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.JoinedStr(values=parts), *_]):
                    texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                    self.patterns.add("".join(".*" if text is None else re.escape(text) for text in texts))
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.BinOp(), *_]):
                    self.patterns.add(".*")

    def note(self, name: str) -> None:
        """Note that a name is read in a way that tells nothing of its owner."""
        self.calls.setdefault(name, []).append(None)

    def _is_class(self, node: ast.expr) -> bool:
        """Whether a method is looked up in its class: then the call also gives the object."""
        return isinstance(node, ast.Name) and node.id in self.classes

    def __contains__(self, name: str) -> bool:
        return self.may_be_of(name, "")

    def may_be_of(self, name: str, owner: str) -> bool:
        """Whether an attribute may be read from an instance of this class, or of any where none is named."""
        read_from = self.owners.get(name, set())
        is_owned = owner in read_from if owner else bool(read_from)
        return is_owned or name in self.calls or any(re.fullmatch(one, name) for one in self.patterns)

    def may_call(self, method: Function) -> bool:
        """Whether some read of a method's name may mean this method: its arguments fit, if it is a call."""
        if method.name in self and (method.decorator_list or method.name not in self.calls):
            return True
        return any(call is None or _fits(method.args, call) for call in self.calls.get(method.name, ()))


def _fits(arguments: ast.arguments, call: ast.Call) -> bool:
    """Whether a method that is called on an object takes what a call gives."""
    spread = any(isinstance(arg, ast.Starred) for arg in call.args)
    if spread or arguments.vararg or arguments.kwarg or any(one.arg is None for one in call.keywords):
        return True
    names = [arg.arg for arg in [*arguments.posonlyargs, *arguments.args]][1:]
    given = {*names[: len(call.args)], *(one.arg for one in call.keywords)}
    needed = {*names[: max(len(names) - len(arguments.defaults), 0)]}
    known = {*names, *(arg.arg for arg in arguments.kwonlyargs)}
    return len(call.args) <= len(names) and needed <= given <= known


def _is_unread_constant(node: ast.Assign, read: NamesRead) -> bool:
    """Whether a class's constant is one that nothing reads."""
    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    is_kept = any(name in read or name.startswith("_") for name in names)
    return len(names) == len(node.targets) and is_pure(node.value) and not is_kept


def drop_stores(method: Function, is_unread: Callable[[ast.expr, ast.expr], bool]) -> None:
    """Drop from a method what it stores in attributes of self that nothing reads."""
    for inner in walk(method):
        body = getattr(inner, "body", None)
        if isinstance(body, list):
            kept = [left for one in body if (left := _without_unread(one, is_unread)) is not None]
            inner.body = kept or [ast.Pass()]


def _without_unread(node: ast.stmt, is_unread: Callable[[ast.expr, ast.expr], bool]) -> ast.stmt | None:
    """Return an assignment without what it stores in attributes of self that nothing reads."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return node
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    pairs = list(matched(targets[0], node.value))
    if len(targets) > 1 or any(value is None for _, value in pairs):
        return node
    return with_pairs(node, pairs, [pair for pair in pairs if not is_unread(*pair)])


def unread_test(program: ProgramFacts, node: ast.ClassDef, read: NamesRead) -> Callable[..., bool]:
    """Return the test whether a method's store is one of a value without effects that nothing reads.

    What a class itself says of an attribute (a field, a descriptor) is for others; a module registers the
    modules and parameters that are stored in it, whatever their names.
    """
    owner = node.name if node.name not in program.relatives else ""
    bound = set(dict(class_names(node)))
    bases = set(map(last_name, node.bases))
    bound = bound.union(*(MODULE_READS.get(base, ()) for base in bases))
    plain = PLAIN_TYPES | program.configs.keys()
    arguments = [arg for one in node.body if isinstance(one, Function) for arg in parameters(one.args)]
    other = {
        arg.arg
        for arg in arguments
        if not (isinstance(arg.annotation, ast.Name) and arg.annotation.id in plain)
    }
    simple = {arg.arg for arg in arguments} - other if bases & MODULE_READS.keys() else None

    def is_unread(target: ast.expr, value: ast.expr) -> bool:
        match target:
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if attr not in bound:
                is_free = simple is None or _is_no_module(value, simple)
                return not read.may_be_of(attr, owner) and is_pure(value) and is_free
        return False

    return (lambda *_: False) if read.reads_all or "__setattr__" in bound else is_unread


def _is_no_module(node: ast.expr, simple: set[str]) -> bool:
    """Whether an expression's value surely is neither a module nor a parameter."""
    if isinstance(node, ast.Attribute | ast.Name):
        return (node.id if isinstance(node, ast.Name) else "") in simple
    return isinstance(node, ast.Constant | ast.JoinedStr | ast.Compare | ast.BinOp | ast.UnaryOp | ast.Tuple)


def drop_rows(program: ProgramFacts, kinds: dict[type, list]) -> None:
    """Drop rows of tables that every use of the table passes over; `kinds` holds the program's nodes."""
    if any(map(_filter_of, kinds[ast.For])):
        for function in [*kinds[ast.FunctionDef], *kinds[ast.AsyncFunctionDef]]:
            drop_loop_rows(function)
    filters: dict[str, list[str]] = defaultdict(list)  # table: by the call of which field a use filters it
    for node in kinds[ast.comprehension]:
        match node:
            case ast.comprehension(
                target=ast.Name(id=row),
                iter=ast.Name(id=table),
                ifs=[ast.Call(func=ast.Attribute(value=ast.Name(id=called), attr=attr)), *_],
            ) if row == called:
                filters[table].append(attr)
    uses = Counter(node.id for node in kinds[ast.Name] if isinstance(node.ctx, ast.Load))
    for name, fields in filters.items():
        table = program.values.get(name)
        if len(fields) == uses[name] and len(set(fields)) == 1 and isinstance(table, ast.Tuple | ast.List):
            table.elts = [row for row in table.elts if not _fails(program, row, fields[0])]


def drop_entries(program: ProgramFacts, kinds: dict[type, list]) -> None:
    """Drop entries of tables that are only looked up, where nothing else in the program spells the key."""
    tables = {
        name: value
        for name, value in program.values.items()
        if isinstance(value, ast.Dict) and name.isupper() and all(map(is_string, value.keys))
    }
    loads = Counter(node.id for node in kinds[ast.Name] if isinstance(node.ctx, ast.Load))
    owners = [node.value for node in kinds[ast.Subscript] if isinstance(node.ctx, ast.Load)]
    methods = [node.func for node in kinds[ast.Call] if isinstance(node.func, ast.Attribute)]
    owners += [node.value for node in methods if node.attr == "get"]
    lookups = Counter(owner.id for owner in owners if isinstance(owner, ast.Name))
    recipes = [one for one in program.tree.body if (PACKED_RECIPE, "") in bound_names(one)]
    aside = {id(node.value) for node in kinds[ast.Expr]} | {id(node) for one in recipes for node in walk(one)}
    texts = [node.value for node in kinds[ast.Constant] if is_string(node) and id(node) not in aside]
    spelled = Counter(word for text in texts for word in {text, *re.split(r"\W", text)})
    for name, table in tables.items():
        if loads[name] == lookups[name]:
            kept = [(k, v) for k, v in zip(table.keys, table.values, strict=True) if spelled[k.value] > 1]
            table.keys, table.values = [k for k, _ in kept], [v for _, v in kept]


def _fails(program: ProgramFacts, row: ast.expr, key: str) -> bool:
    """Whether a table's row, a call, has in a field a function that returns False."""
    if not isinstance(row, ast.Call) or not isinstance(row.func, ast.Name):
        return False
    if row.func.id not in program.classes:
        return False
    value = Scopes(program).arguments(row.func.id, row)[1].get(key)
    if isinstance(value, ast.Name) and value.id in program.functions:
        value = constant_body(program.functions[value.id])
    result = value.body if isinstance(value, ast.Lambda) else value
    return isinstance(result, ast.Constant) and not result.value


def drop_loop_rows(function: Function) -> None:
    """Drop the rows of a spelled out list for which the loop over it does nothing."""
    for loop in [node for node in walk(function) if isinstance(node, ast.For)]:
        found, rows = _filter_of(loop), _rows_of(loop.iter, function)
        if found and rows is not None:
            rows.elts = [row for row in rows.elts if not _is_passed_over(row, len(loop.target.elts), *found)]


def _filter_of(loop: ast.For) -> tuple[int, bool] | None:
    """Return (position, is it negated) of the item of a loop's rows without which its body does nothing."""
    if len(loop.body) != 1 or not isinstance(loop.body[0], ast.If) or loop.body[0].orelse or loop.orelse:
        return None
    test, is_negated = loop.body[0].test, False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, is_negated = test.operand, True
    items = getattr(loop.target, "elts", [])
    names = [item.id for item in items if isinstance(item, ast.Name)]
    if not isinstance(test, ast.Name) or names.count(test.id) != 1 or len(names) < len(items):
        return None
    return names.index(test.id), is_negated


def _rows_of(node: ast.expr, function: Function) -> ast.List | ast.Tuple | None:
    """Return the display that a loop goes over: itself, or the one value of a name used once."""
    if isinstance(node, ast.List | ast.Tuple):
        return node
    if isinstance(node, ast.Name):
        found = local_values(function).get(node.id, [])
        uses = sum(isinstance(inner, ast.Name) and inner.id == node.id for inner in walk(function))
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


def drop_imports(tree: ast.Module) -> None:
    """Drop imports at the top level whose names nothing reads."""
    read = {node.id for node in walk(tree) if isinstance(node, ast.Name)}
    for node in list(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            node.names = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in read]
            if not node.names:
                tree.body.remove(node)
