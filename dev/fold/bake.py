"""Write the recipe's values into the defaults of the config classes."""

import ast

from dev.fold.facts import Fact, Instance, Known, Program, Table
from dev.fold.scopes import Scopes
from dev.fold.syntax import is_option, literal
from dev.names import last_name
from formats.recipe import parse_value

KINDS = {"bool": bool, "int": int, "float": float, "str": str, "tuple": tuple}


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
    """Return what a bound is; `tuple(TABLE)` and `(*TABLE, ...)` hold the table's keys."""
    match node:
        case ast.Call(func=ast.Name(id="tuple"), args=[ast.Name() as name]):
            return _choices(program, ast.Tuple([ast.Starred(name)]))
        case ast.Tuple(elts=items) if any(isinstance(item, ast.Starred) for item in items):
            found = [_spread(program, item) for item in items]
            return None if None in found else Known(sum(found, ()))
    return Scopes(program).look(node)


def _spread(program: Program, item: ast.expr) -> tuple | None:
    """Return what an item of a tuple display adds to it."""
    fact = Scopes(program).look(item.value if isinstance(item, ast.Starred) else item)
    if not isinstance(item, ast.Starred):
        return (fact.value,) if isinstance(fact, Known) else None
    if isinstance(fact, Table):
        return tuple(one.value for one in fact.node.keys)
    value = program.values.get(item.value.id) if isinstance(item.value, ast.Name) else None
    if isinstance(value, ast.Dict) and all(isinstance(one, ast.Constant) for one in value.keys):
        return tuple(one.value for one in value.keys)
    return fact.value if isinstance(fact, Known) and isinstance(fact.value, tuple) else None
