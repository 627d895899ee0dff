"""What a round proved: attributes, fields and parameters that have one value, functions that only compute."""

import ast

from pack.names import PURE_DECORATORS, is_record, last_name, walk
from pack.specialize.facts import Fact, Instance, Items, Known, Observations, ProgramFacts, join
from pack.specialize.scopes import SAFE_BUILTINS, Scopes, may_explode
from pack.specialize.syntax import (
    EXPRESSIONS,
    STATEMENTS,
    class_names,
    clone,
    constructor,
    local_values,
    named_values,
    parameters,
)


def infer(program: ProgramFacts, seen: Observations) -> None:
    """Turn what a round saw into facts for the next one."""
    relatives = program.relatives
    program.stored = None if seen.is_dynamic else set(seen.stores)
    for name, node in program.classes.items():
        if name in program.configs or name in relatives:
            continue
        own = {key for key, _ in class_names(node)}
        if is_record(node):
            learn_record(program, seen, node)
        elif not seen.is_dynamic:
            for attr, stores in seen.stores.items():
                mine = [fact for owner, fact in stores if owner == name]
                if mine and attr not in own and not any(owner == "" for owner, _ in stores):
                    fact = join(mine)
                    if not isinstance(fact, Items) or attr not in program.changed:
                        remember(program.attributes, (name, attr), fact)
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    for key, value in named_values(statement):
                        if isinstance(value, ast.Constant) and key not in seen.stores:
                            remember(program.attributes, (name, key), Known(value.value))
    for name, fact in seen.returns.items():
        if isinstance(fact, Instance | Items) and fact != Instance() and name in program.functions:
            program.returns[name] = fact
    for name, calls in seen.calls.items():
        if name not in seen.escapes | relatives | program.unseen and None not in calls:
            learn_params(program, name, calls)
    infer_pure(program)


def remember(facts: dict, key: tuple[str, str], fact: Fact) -> None:
    """Keep a fact about every value of something."""
    if isinstance(fact, Known | Instance | Items) and fact != Instance():
        facts[key] = fact


def learn_record(program: ProgramFacts, seen: Observations, node: ast.ClassDef) -> None:
    """Find the fields of a NamedTuple that have one value in all instances."""
    calls = seen.calls.get(node.name, [])
    if node.name in seen.escapes | program.unseen or None in calls or seen.is_dynamic or "" in seen.replaced:
        return
    scopes = Scopes(program)
    for one in node.body:
        if isinstance(one, ast.AnnAssign):
            key = one.target.id
            default = scopes.look(one.value) if one.value is not None else None
            facts = [call.get(key, default) for call in calls]
            remember(program.candidates, (node.name, key), join(facts))
            facts += seen.replaced.get(key, [])
            remember(program.attributes, (node.name, key), scopes.annotated(one.annotation) or join(facts))


def learn_params(program: ProgramFacts, name: str, calls: list[dict[str, Fact]]) -> None:
    """Find the parameters of a function or class that have one value in all calls."""
    node = program.functions.get(name) or constructor(program.classes.get(name))
    if node is None or any(last_name(one) not in PURE_DECORATORS for one in node.decorator_list):
        return
    plain = [*node.args.posonlyargs, *node.args.args]
    pairs = [*zip(reversed(plain), reversed(node.args.defaults))]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults)
    scopes = Scopes(program)
    defaults = {arg.arg: scopes.look(value) if value is not None else None for arg, value in pairs}
    for arg in [*plain, *node.args.kwonlyargs]:
        facts = [call.get(arg.arg, defaults.get(arg.arg)) for call in calls]
        remember(program.params, (name, arg.arg), join(facts))


def infer_pure(program: ProgramFacts) -> None:
    """Find the functions that only compute, and make them callable here."""
    bare = {name: node for name, node in program.functions.items() if not node.decorator_list}
    candidates = {name: node for name, node in bare.items() if _is_plain(node)}
    while True:
        kept = {name: node for name, node in candidates.items() if _only_calls(node, candidates, program)}
        if len(kept) == len(candidates):
            break
        candidates = kept
    scopes = Scopes(program)
    names: dict[str, object] = {"__builtins__": {}} | SAFE_BUILTINS
    for name in {inner.id for node in kept.values() for inner in walk(node) if isinstance(inner, ast.Name)}:
        fact = scopes.look_name(name)
        names |= {name: fact.value} if isinstance(fact, Known) else {}
    copies = [clone(node) for node in kept.values()]
    for node in copies:
        node.returns = None
        for arg in parameters(node.args):
            arg.annotation = None
    exec(compile(ast.fix_missing_locations(ast.Module(copies, [])), "fold", "exec"), names)
    program.pure = {name: names[name] for name in kept}


def _is_plain(node: ast.FunctionDef) -> bool:
    """Whether a function has nothing in it but computations on names and attributes."""
    defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    if node.args.vararg or node.args.kwarg or not all(isinstance(one, ast.Constant) for one in defaults):
        return False
    parts = [one for one in walk(node) if isinstance(one, ast.Attribute | ast.Subscript)]
    kinds = (*EXPRESSIONS, *STATEMENTS)
    is_known = all(isinstance(inner, kinds) for one in node.body for inner in walk(one))
    return is_known and all(isinstance(one.ctx, ast.Load) for one in parts)


def _only_calls(node: ast.FunctionDef, candidates: dict, program: ProgramFacts) -> bool:
    """Whether a function calls only builtins without effects and functions of that kind."""
    own = {arg.arg for arg in parameters(node.args)} | set(local_values(node))
    for inner in walk(ast.Module(node.body, [])):
        if isinstance(inner, ast.Call):
            name = inner.func.id if isinstance(inner.func, ast.Name) else ""
            is_builtin = name in SAFE_BUILTINS and name not in program.values
            if name in own or not (name in candidates or is_builtin):
                return False
        if isinstance(inner, ast.BinOp) and may_explode(inner):
            return False
    return True
