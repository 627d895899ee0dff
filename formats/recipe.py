"""Recipes: a config as frozen dataclasses, one a section, filled from TOML, environment and command line.

A field is declared with `option`; its name everywhere is "section.key". Works on any such config class, so
that tools without a model (the audit, the packer) can read recipes too.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from common import UserError, parse_json
from durable.seals import DIGEST, check_digest, digest_of

KINDS = {
    bool: "0 or 1",
    int: "a whole number",
    float: "a finite number",
    str: "text without control characters",
    tuple: "a list: 3,4 or 1:2,3:4",
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # breaks or forges lines of a log


def option(default, env: str = "", text: str = "", *, live=False, low=None, high=None, choices=()):
    """Declare a config field: default, contest environment name, help, and the values that it may take.

    A live field (paths, seed, clock, logging) stays free in a packed program; one with live="auto" while the
    recipe leaves it at its default; one with live="source" is not in it. The others are the recipe.
    """
    metadata = {"env": env, "help": text, "live": live, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def config_fields(config) -> dict[str, dataclasses.Field]:
    """Map "section.key" to its field, in order; `config` is a config class or an instance of it."""
    return {
        f"{section.name}.{item.name}": item
        for section in dataclasses.fields(config)
        for item in dataclasses.fields(section.type)
    }


def config_value(config, name: str):
    """Read a field by its "section.key" name."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def parse_value(value, kind: type):
    """Convert text or a TOML value to a field's type; raises ValueError when it does not fit."""
    if kind is bool:
        words = {"1": True, "true": True, "0": False, "false": False}
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if kind is tuple:
        if isinstance(value, str) and value[:1] == "[":
            value = parse_json(value, "a list")  # as recipes write it
        items = [item for item in value.split(",") if item] if isinstance(value, str) else value
        return tuple(parse_item(item) for item in items)
    if kind is int and isinstance(value, str):
        return int(value.replace("_", ""))
    if isinstance(value, (dict, list, bool)) or (kind is int and value != int(value)):
        raise ValueError
    converted = kind(value)
    if kind is str and CONTROL.search(converted):
        raise ValueError
    if kind is float and not math.isfinite(converted):
        raise ValueError
    return converted


def parse_item(value):
    """Convert an item of a tuple: a number, or a row of numbers written a:b:c or as a list."""
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and ":" in value):
        return tuple(parse_number(part) for part in (value.split(":") if isinstance(value, str) else value))
    return parse_number(value)


def parse_number(value) -> int | float:
    """Convert text or a number to an int where it is one, else to a finite float."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return int(number) if number.is_integer() else number


def with_values(config, values: dict, source: str):
    """Return config with {"section.key": value} applied; an unknown name is an error with a suggestion."""
    known = config_fields(config)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}?" if near else "`python train_gpt.py --help` lists all fields."
            raise UserError(f"{source}: unknown field {name!r:.60}. {hint}")
        section, key = name.split(".")
        try:
            changed = {key: parse_value(value, known[name].type)}
        except (ValueError, TypeError, OverflowError) as error:
            env = known[name].metadata["env"]
            alias = f" ({env})" if env else ""
            kind = KINDS[known[name].type]
            raise UserError(f"{source}: {name}{alias}: expected {kind}, found {value!r:.60}.") from error
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changed)}
        )
    return config


def check_ranges(config) -> None:
    """Raise for the first field whose value is outside the range or the choices of its declaration."""
    for name, item in config_fields(config).items():
        value, limits = config_value(config, name), item.metadata
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(f"{name}={value} must be one of {', '.join(limits['choices'])}.")
        for bound, word, broken in (
            (limits["low"], "least", lambda value, bound: value < bound),
            (limits["high"], "most", lambda value, bound: value > bound),
        ):
            if bound is not None and broken(value, bound):
                raise UserError(f"{name}={value} must be at {word} {bound}.")


def environment_values(config, environ: Mapping[str, str]) -> dict[str, str]:
    """Pick the fields that an environment sets under their contest names."""
    named = {name: item.metadata["env"] for name, item in config_fields(config).items()}
    return {name: environ[env] for name, env in named.items() if env and env in environ}


def read_toml(path: str | Path, what: str, advice: str) -> dict:
    """Read a TOML file, at most one digest of what it says included; raises for all that is none.

    A file without a digest must end its last line: otherwise it may have been cut off.
    """
    try:
        text = Path(path).read_bytes().decode().removeprefix("\ufeff")
        content = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such {what}. {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}. Mend the file or take another.") from error
    if DIGEST in content:
        check_digest(path, content, "If you changed it, remove the line of the digest.")
        del content[DIGEST]
    elif text and not text.endswith("\n"):
        last = text.splitlines()[-1][-40:]
        raise UserError(
            f"{path}: expected a last line that ends, found {last!r}: the file may be cut off. End it with a "
            "new line if it is whole."
        )
    return content


def flatten_recipe(recipe: dict, source: str) -> dict:
    """Turn {section: {key: value}} into {"section.key": value}."""
    stray = [key for key, value in recipe.items() if not isinstance(value, dict)]
    if stray:
        raise UserError(f"{source}: expected key = value below a [section], found {stray[0]!r} outside.")
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def read_recipe(path: str | Path) -> dict:
    """Read a recipe.toml as {"section.key": value}."""
    path = Path(path) / "recipe.toml" if Path(path).is_dir() else path
    return flatten_recipe(read_toml(path, "recipe", "Recipes are records/*/*/recipe.toml."), str(path))


def parse_overrides(texts: list[str]) -> dict[str, str]:
    """Split "section.key=value" arguments."""
    bad = [text for text in texts if "=" not in text]
    if bad:
        raise UserError(f"command line: expected section.key=value, found {bad[0]!r}.")
    return dict(text.split("=", 1) for text in texts)


def get_recipe(config, live: bool = False) -> dict[str, dict]:
    """Return {section: {key: value}} of every field that a recipe fixes, or with live of all fields."""
    recipe: dict[str, dict] = {}
    for name, item in config_fields(config).items():
        if live or not item.metadata["live"]:
            section, key = name.split(".")
            recipe.setdefault(section, {})[key] = config_value(config, name)
    return recipe


def changed_recipe(config) -> dict[str, dict]:
    """Return {section: {key: value}} of the fields that a recipe fixes to other values than the defaults."""
    known = config_fields(config)
    changed = {
        section: {key: value for key, value in keys.items() if value != known[f"{section}.{key}"].default}
        for section, keys in get_recipe(config).items()
    }
    return {section: keys for section, keys in changed.items() if keys}


def recipe_hash(recipe: dict[str, dict]) -> str:
    """Hash what a recipe changes: equal for all seeds, machines and paths of one configuration."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def config_hash(config) -> str:
    """Hash what a config's recipe changes."""
    return recipe_hash(changed_recipe(config))


def format_toml(recipe: dict[str, dict]) -> str:
    """Write {section: {key: value}} as TOML; JSON spells these values alike."""
    sections = [
        "\n".join([f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())])
        for section, keys in recipe.items()
    ]
    return "\n\n".join(sections) + "\n"


def seal_recipe(recipe: dict[str, dict]) -> str:
    """Write {section: {key: value}} as TOML that is refused once it was altered by accident."""
    line = f'{DIGEST} = "{digest_of(recipe)}"  # remove this line when you change the recipe'
    return f"{line}\n\n{format_toml(recipe)}"
