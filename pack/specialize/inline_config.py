"""Write the recipe's values into the defaults of the config classes."""

import ast

from common import UserError
from formats.recipe import parse_value
from pack.names import last_name, walk
from pack.specialize.facts import Fact, Instance, Known, ProgramFacts, Table
from pack.specialize.scopes import Scopes
from pack.specialize.syntax import is_option, literal

KINDS = {"bool": bool, "int": int, "float": float, "str": str, "tuple": tuple}


def inline_config(program: ProgramFacts) -> None:
    """Write the recipe's values into the config classes: what it fixes as constants, the rest as defaults."""
    sections = {name for name, node in program.classes.items() if any(map(is_option, node.body))}
    made, replaced = _changes(program)
    for root, node in program.classes.items():
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        types = [one.annotation.id if isinstance(one.annotation, ast.Name) else "" for one in fields]
        if not fields or not set(types) <= sections or root in made or len(set(types)) < len(types):
            continue
        program.configs[root] = {one.target.id: Instance(t) for one, t in zip(fields, types)}
        keys = {one.target.id: section for one, section in zip(fields, types)}
        resolved = {}
        for key, section in keys.items():
            program.attributes[root, key] = Instance(section)
            program.configs[section] = {}
            if section not in made | program.relatives:
                resolved[key] = bake_section(program, section, key, replaced)
        _refuse_unknown(program, keys)
        if set(resolved) == set(keys) and all(one is not None for one in resolved.values()):
            program.recipe = {key: values for key, values in resolved.items() if values}


def _refuse_unknown(program: ProgramFacts, keys: dict[str, str]) -> None:
    """Raise for what the recipe names and the config classes do not."""
    for key, values in program.recipe.items():
        if key not in keys:
            raise UserError(f"recipe: unknown section {key!r}. Sections are {', '.join(keys)}.")
        known = [one.target.id for one in program.classes[keys[key]].body if isinstance(one, ast.AnnAssign)]
        left = set(values) - set(known) - set(program.configs[keys[key]])
        if left:
            raise UserError(f"recipe: unknown field {key}.{min(left)}. Correct the recipe.")


def _changes(program: ProgramFacts) -> tuple[set[str], set[str]]:
    """Name the classes that are called with arguments, and the keywords given to `replace`."""
    made, replaced = set(), set()
    for node in walk(program.tree):
        if isinstance(node, ast.Call):
            name = last_name(node)
            if name in ("replace", "_replace"):
                replaced |= {one.arg for one in node.keywords if one.arg}
            elif isinstance(node.func, ast.Name) and (node.args or node.keywords):
                made.add(name)
    return made, replaced


def bake_section(program: ProgramFacts, section: str, key: str, replaced: set[str]) -> dict | None:
    """Write a section's values into its class; returns those it changes, None if one stays open."""
    values, fixed = program.recipe.get(key, {}), {}
    node = program.classes[section]
    for at, one in enumerate(node.body):
        if not is_option(one):
            continue
        name, call = one.target.id, one.value
        kind = KINDS.get(one.annotation.id if isinstance(one.annotation, ast.Name) else "")
        default = Scopes(program).look(call.args[0]) if call.args else None
        if kind is None or name in replaced or not isinstance(default, Known):
            fixed = None
            continue
        settings = {item.arg: item.value for item in call.keywords}
        live = settings.get("live")
        live = live.value if isinstance(live, ast.Constant) else live is not None
        stated = default.value if live == "source" else values.get(name, default.value)
        value = _parsed(f"{key}.{name}", stated, kind)
        _check_bounds(program, f"{key}.{name}", value, settings)
        call.args[0] = literal(value)
        if live == "source" or (live == "auto" and value != default.value):
            live = False
        if not live:
            program.configs[section][name] = value
            program.attributes[section, name] = Known(value)
            node.body[at] = ast.copy_location(ast.Assign([one.target], literal(value)), one)
            program.environment += [env.value for env in call.args[1:2] if env.value]
            if fixed is not None and "live" not in settings and value != default.value:
                fixed[name] = as_lists(value)
        elif not program.style.field_help:  # help is for people, and all that stay are live
            bounds = [item for item in call.keywords if item.arg != "live"]
            one.value = ast.Call(call.func, call.args[:2], bounds)
    return fixed


def as_lists(value):
    """Return tuples as lists, as a recipe's file has them."""
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value


def _parsed(name: str, value, kind: type):
    """Convert a recipe's value to its field's type."""
    try:
        return parse_value(value, kind)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"recipe: {name}: expected {kind.__name__}, found {value!r}.") from error


def _check_bounds(program: ProgramFacts, name: str, value, settings: dict[str, ast.expr]) -> None:
    """Raise where a value is outside the bounds or choices of its declaration, as far as these are known."""
    facts = {key: _choices(program, node) for key, node in settings.items()}
    low, high, choices = (
        facts[key].value if isinstance(facts.get(key), Known) else None for key in ("low", "high", "choices")
    )
    if choices and value not in choices:
        raise UserError(f"recipe: {name}={value} must be one of {', '.join(choices)}.")
    if (low is not None and value < low) or (high is not None and value > high):
        raise UserError(f"recipe: {name}={value} must lie in [{low}, {high}].")


def _choices(program: ProgramFacts, node: ast.expr) -> Fact:
    """Return what a bound is; `TABLE`, `tuple(TABLE)` and `(*TABLE, ...)` hold the table's keys."""
    match node:
        case ast.Name() if isinstance(Scopes(program).look(node), Table):
            return _choices(program, ast.Tuple([ast.Starred(node)]))
        case ast.Call(func=ast.Name(id="tuple"), args=[ast.Name() as name]):
            return _choices(program, ast.Tuple([ast.Starred(name)]))
        case ast.Tuple(elts=items) if any(isinstance(item, ast.Starred) for item in items):
            found = [_spread(program, item) for item in items]
            return None if None in found else Known(sum(found, ()))
    return Scopes(program).look(node)


def _spread(program: ProgramFacts, item: ast.expr) -> tuple | None:
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
