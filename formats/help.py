"""`--help`, `--help SECTION`, `--help FIELD`: what a config's field means, may be, and who changes it."""

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from common import CommandParser, UserError
from formats.hardware import format_hardware
from formats.recipe import KINDS, config_fields, parse_value, read_recipe

RECIPES = Path(__file__).resolve().parent.parent / "records"
WIDTH = 79
UNITS = {  # by the end of a field's name
    "seconds": "seconds",
    "s": "seconds",
    "tokens": "tokens",
    "len": "tokens",
    "docs": "documents",
    "bytes": "bytes",
    "bits": "bits",
    "dim": "channels",
    "steps": "steps",
    "iters": "steps",
    "frac": "a fraction",
    "epochs": "passes",
}


class FieldParser(CommandParser):
    """A parser whose --help explains a config's sections and fields, too."""

    def __init__(self, **settings):
        super().__init__(add_help=False, **settings)

    def explain(self, config) -> None:
        """Add `--help [NAME]` for a config, and read an unknown option as a field that was meant."""
        self.config = config
        about = "show this, or what a section or a field of the config means"
        self.add_argument("-h", "--help", action=FieldHelp, config=config, help=about)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; an unknown option that names a field is told how fields are written."""
        _, unrecognized, rest = message.partition("unrecognized arguments: ")
        words = rest.split()
        if unrecognized and words[0].startswith("--"):
            name, _, value = words[0].partition("=")
            value = value or (words[1] if len(words) > 1 and not words[1].startswith("-") else "VALUE")
            fields = [f"{field}={value}" for field in meant_fields(self.config, name)]
            known = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.8)
            if fields and not known:
                self.exit(2, f"{self.prog}: error: {name}: fields are written {' or '.join(fields)}\n")
        super().error(message)


class FieldHelp(argparse.Action):
    """`--help [NAME]`: the command's help, or that of a section or a field of its config."""

    def __init__(self, option_strings, dest, config=None, **settings):
        super().__init__(option_strings, dest, nargs="?", metavar="NAME", **settings)
        self.config = config

    def __call__(self, parser, namespace, values, option_string=None):
        print(explain(self.config, values) if values else parser.format_help().rstrip())
        parser.exit()


NANOGPT = {  # its names that ours do not resemble
    "batch_size": "data.batch_tokens",
    "block_size": "data.seq_len",
    "n_embd": "model.model_dim",
    "max_iters": "run.iterations",
    "learning_rate": "optim.matrix_lr",
}


def meant_fields(config, word: str) -> list[str]:
    """Name the fields that an unknown word may mean: its key, the end of its key, or one spelled alike."""
    key = word.lstrip("-").replace("-", "_").lower()
    known = config_fields(config)
    if key in NANOGPT:
        return [NANOGPT[key]]
    own = [full for full, item in known.items() if key in (full, item.name, item.metadata["env"].lower())]
    ends = [full for full in known if full.startswith(f"{key}_") or full.endswith(f"_{key}")]
    words = {word: full for full in known for word in (full, full.partition(".")[2])}
    near = [words[word] for word in difflib.get_close_matches(key, words, n=1)]
    return own or ends[:3] or near


def check_names(config, names: Iterable[str]) -> None:
    """Raise for the first name of the command line that is no field."""
    for name in names:
        if name not in config_fields(config):
            fields = config_fields(config).items()
            named = [full for full, item in fields if item.metadata["env"] == name]
            near = " or ".join(meant_fields(config, name))
            hint = f"Did you mean {near}?" if near else "`python train_gpt.py --help` lists all fields."
            if named:
                hint = f"Write {named[0]}=..., or set {name} in the environment, before the command."
            raise UserError(f"command line: unknown field {name!r:.60}. {hint}")


def near_misses(config, names: Iterable[str]) -> list[str]:
    """Say which variables of an environment are spelled almost as those that a config reads."""
    known = {item.metadata["env"] for item in config_fields(config).values()} - {""}
    odd = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.9) for name in names if name.isupper()}
    return [
        f"{name} is not read; did you mean {near[0]}?"
        for name, near in odd.items()
        if near and name not in known
    ]


def explain(config, name: str) -> str:
    """Explain a section, or a field by its name, with or without the section, or the contest's name."""
    known = config_fields(config)
    sections = {section.name: section.type for section in dataclasses.fields(config)}
    if name in sections:
        return describe_section(config, name)
    matching = [
        full for full, item in known.items() if name in (full, item.name, item.metadata["env"] or full)
    ]
    if len(matching) == 1:
        return describe_field(matching[0], known[matching[0]])
    if matching:
        raise UserError(f"--help {name}: expected one field, found {' and '.join(matching)}. Name one.")
    words = [*known, *(full.partition(".")[2] for full in known)]
    near = difflib.get_close_matches(name, sections, n=1) or difflib.get_close_matches(name, words, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Sections are {', '.join(sections)}."
    raise UserError(f"--help {name!r:.60}: expected a section or a field, found neither. {hint}")


def describe_sections(config) -> str:
    """List the sections with the names of their fields, for --help."""
    lines = ["fields, as section.key=value (`--help SECTION` lists them, `--help FIELD` explains one):", ""]
    for section in dataclasses.fields(config):
        lines.append(f"  {section.name}: {section.type.__doc__.splitlines()[0]}")
        names = " ".join(item.name for item in dataclasses.fields(section.type))
        lines += [*textwrap.wrap(names, WIDTH, initial_indent=4 * " ", subsequent_indent=4 * " "), ""]
    return "\n".join(lines).rstrip()


def describe_section(config, name: str) -> str:
    """List the fields of a section with default, meaning, range and the contest's name."""
    section = next(section.type for section in dataclasses.fields(config) if section.name == name)
    lines = [f"{name}: {section.__doc__.splitlines()[0]}"]
    lines += ["field = default: meaning; range [the contest's name]", ""]
    for item in dataclasses.fields(section):
        env = f" [{item.metadata['env']}]" if item.metadata["env"] else ""
        limits = "; ".join(filter(None, (item.metadata["help"], describe_range(item, brief=True))))
        text = f"{item.name} = {format_value(item.default)}: {limits}{env}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=2 * " ", subsequent_indent=8 * " ")
    return "\n".join(lines)


def describe_field(name: str, item: dataclasses.Field) -> str:
    """Explain a field: meaning, default, range, unit, the contest's name and the recipes that change it."""
    packed = {True: "free", False: "fixed by the recipe", "auto": "free, unless the recipe sets it"}
    packed["source"] = "not there: a packed program runs once"
    unit = UNITS.get(item.name.rpartition("_")[2], "") if item.type in (int, float) else ""
    rows = {
        "default": format_value(item.default),
        "values": describe_range(item),
        "unit": unit,
        "environment": item.metadata["env"] and f"{item.metadata['env']}, as in the contest",
        "once packed": packed[item.metadata["live"]],
    }
    lines = [f"{name}: {item.metadata['help']}"]
    lines += [f"  {label:<13}{value}" for label, value in rows.items() if value]
    if isinstance(item.metadata["choices"], dict):
        width = max(map(len, item.metadata["choices"]))
        lines += [f"    {key:<{width}}  {text}" for key, text in item.metadata["choices"].items()]
    found = recipes_with(name, item)
    lines += ["  recipes that change it:"] if found else []
    lines += [f"    {recipe}: {value}" for recipe, value in found.items()]
    return "\n".join(lines)


def describe_range(item: dataclasses.Field, brief: bool = False) -> str:
    """Say what a field may be; briefly: only what its default does not show."""
    low, high, choices = (item.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return " | ".join(choices)
    bounds = {(True, True): f"from {low} to {high}", (True, False): f"at least {low}"}
    bounds |= {(False, True): f"at most {high}", (False, False): ""}
    limit = bounds[low is not None, high is not None]
    return limit if brief else ", ".join(filter(None, (KINDS[item.type], limit)))


def format_value(value) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple):
        items = [":".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value]
        return ",".join(items) or "''"
    return str(int(value)) if isinstance(value, bool) else str(value) or "''"


def recipes_with(name: str, item: dataclasses.Field) -> dict[str, str]:
    """Map the recipes in records/ that change a field from its default to its value there."""
    found = {}
    for path in sorted(RECIPES.glob("*/*/recipe.toml")):
        value = parse_value(read_recipe(path).get(name, item.default), item.type)
        if value != item.default:
            found[str(path.parent.relative_to(RECIPES.parent))] = format_value(value)
    return found


def format_description(found: dict) -> str:
    """Lay out what --describe found for people: counts, parameters, the order of blocks, the schedule."""
    rows = [
        ("parameters", f"{found['num_params']:,}"),
        ("operations a token", f"{found['flops_per_token']:,} forward and backward"),
        ("artifact, estimated", f"{found['estimated_artifact_bytes']:,} bytes without the code"),
        ("recipe hash", found["config_hash"]),
    ]
    lines = [f"{name:<22}{value}" for name, value in rows]
    lines += ["", "parameters by rule"]
    lines += [f"  {count:>12,}  {pattern}" for pattern, count in found["params_by_rule"].items()]
    order = ["".join([str(step["layer"]), "+" * step["push"]]) for step in found["layer_plan_recurring"]]
    lines += ["", "order of the layers (+: kept for a skip)", f"  {' '.join(order)}", "", "schedule"]
    columns = found["schedule"][0]
    same = {name: {row[name] for row in found["schedule"]} for name in columns if name != "step"}
    lines += [f"  {name:<20}{value:g} throughout" for name, (value, *more) in same.items() if not more]
    changing = [name for name in columns if name == "step" or len(same[name]) > 1]
    if len(changing) > 1:
        lines.append("".join(f"{name.removesuffix('_tokens')[:12]:>13}" for name in changing))
        lines += ["".join(f"{row[name]:>13.6g}" for name in changing) for row in found["schedule"]]
    lines += ["", *format_hardware(found["hardware"])] if "hardware" in found else []
    return "\n".join(lines)
