"""SPEC.toml: what a sweep varies, with what budget, and what it is after; checked before anything starts."""

import difflib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from common import UserError, parse_json
from dev.desk.extras import require
from dev.desk.training import DATA_PLACES, MEASURES, OF_A_JOB, WITHOUT_EFFECT
from formats.recipe import (
    config_fields,
    config_hash,
    config_value,
    read_toml,
    with_values,
)
from scoring.budget import BYTES, SCORING, TRAINING
from train_gpt import Config, load_config, read_environment

# Top-level keys: type, value where the file says none (None: it must).
KEYS = {
    "name": (str, None),
    "recipe": (str, None),
    "seconds": (float, 0),
    "steps": (int, 0),
    "trials": (int, 0),
    "measure": (str, "artifact"),
    "seeds": (list, [1337]),
    "objectives": (list, ["val_bpb"]),
    "constraints": (list, ["bytes", "training", "scoring"]),
    "set": (dict, {}),
    "space": (dict, None),
    "sampler": (dict, {}),
    "prune": (dict, {}),
}
SAMPLERS = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
    "grid": "RandomSampler",  # every combination is queued, so that none is ever drawn
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
PRUNE_KEYS = {"kind": "none", "on": "train_loss", "rungs": 10}  # those that are not the pruner's own
OBJECTIVES = ("val_bpb", "bytes")
CONSTRAINTS = {"bytes": BYTES, "training": TRAINING, "scoring": SCORING}  # ledgers of a run
DIMENSION_KEYS = {  # of a dimension: what is expected
    "low": "a number below 2^53",
    "high": "a number below 2^53",
    "step": "a number below 2^53",
    "log": "true or false",
    "choices": "a list of text, numbers, true or false, or lists of these",
    "also": "a list of other fields, each once",
    "when": 'a table of fields with lists of values, as {model.smear = ["gated"]}',
}
MOST_NUMBER = 2**53
BUDGET = ("run.seed", "run.iterations", "run.max_wallclock_seconds")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
NAME_ADVICE = "a name of letters, digits and . _ + -, a letter or digit first"
EVENTS_A_RUNG = 8  # losses that are averaged, at least, where the number of steps is known
LOG_EVERY = 10  # steps, at most, where a clock ends the training
MOST_COMBINATIONS = 10_000  # of a grid
MOST_TRIALS = 10**6
MOST_SECONDS = 10**9
DRAWS = 64  # random settings that are tried before anything starts


class Dimension(NamedTuple):
    """A field of the recipe that a sweep varies."""

    field: str
    kind: str  # float | int | categorical, as Optuna names them
    options: dict  # of Optuna's suggest_float, suggest_int, suggest_categorical
    also: tuple[str, ...]  # fields that take the same value
    when: dict[str, list]  # it is varied only where these fields have one of these values

    def is_active(self, values: dict) -> bool:
        """Whether it is varied beside these values of dimensions before it."""
        return all(values.get(field) in allowed for field, allowed in self.when.items())

    def suggest(self, trial):
        """Let a trial of Optuna choose a value."""
        return getattr(trial, f"suggest_{self.kind}")(self.field, **self.options)

    def corners(self) -> list:
        """List the choices, or the ends of the range."""
        return self.options.get("choices") or [self.options["low"], self.options["high"]]

    def grid(self) -> list | None:
        """List all values in order; None where they are not countable."""
        options = self.options
        if self.kind == "categorical":
            return options["choices"]
        if options.get("log") or (self.kind == "float" and "step" not in options):
            return None
        step, count = options.get("step", 1), 0
        values = []
        while (value := round(options["low"] + count * step, 12)) <= options["high"] + 1e-12:
            if count > MOST_COMBINATIONS:  # more than any grid may have
                break
            values.append(int(value) if self.kind == "int" else value)
            count += 1
        return values

    def contains(self, value) -> bool:
        """Whether a value could be chosen."""
        options = self.options
        if self.kind == "categorical":
            return value in options["choices"]
        if not is_number(value):
            return False
        steps = (value - options["low"]) / options["step"] if "step" in options else 0
        return options["low"] <= value <= options["high"] and abs(steps - round(steps)) < 1e-6


class Spec(NamedTuple):
    """A sweep, checked."""

    path: Path
    name: str
    recipe: Path
    seconds: float  # training clock of a training; 0: `steps` end it
    steps: int
    trials: int
    measure: str  # artifact | weights
    seeds: list[int]  # trained for every setting; the mean counts
    objectives: list[str]  # all smaller is better
    constraints: list[str]
    fixed: dict  # "section.key" -> value, in every training
    space: tuple[Dimension, ...]
    sampler: dict  # kind, and options of Optuna's class
    prune: dict  # kind, on, rungs, and options of Optuna's class

    def suggest(self, trial) -> dict:
        """Let a trial choose a value for every dimension that is active."""
        values: dict = {}
        for dimension in self.space:
            if dimension.is_active(values):
                values[dimension.field] = dimension.suggest(trial)
        return values

    def changes(self, values: dict) -> dict:
        """Return {"section.key": value} of what a setting changes in the recipe, budget and seed apart."""
        also = {d.field: d.also for d in self.space}
        twins = {twin: value for field, value in values.items() for twin in also[field]}
        return self.fixed | values | twins

    def budget(self) -> dict:
        """Return the fields that end a training, and those by which pruning sees it."""
        rungs = self.prune["rungs"]
        if self.seconds:
            return {"run.max_wallclock_seconds": self.seconds}
        found = {"run.iterations": self.steps, "run.max_wallclock_seconds": 0}
        if self.prune["on"] == "val_loss" and self.prune["kind"] != "none":
            found["run.val_loss_every"] = max(1, self.steps // rungs)
        return found

    def config(self, values: dict, seed: int) -> Config:
        """Resolve a training; raises a UserError where its settings cannot work together."""
        wanted = self.changes(values) | self.budget() | {"run.seed": seed}
        cfg = load_config(str(self.recipe), read_environment().overrides, spell(wanted))
        most = max(1, self.steps // (self.prune["rungs"] * EVENTS_A_RUNG)) if self.steps else LOG_EVERY
        if self.prune["kind"] != "none" and not 0 < cfg.run.train_log_every <= most:
            cfg = with_values(cfg, {"run.train_log_every": most}, "sweep")
        return cfg

    def own_values(self) -> dict | None:
        """Return the recipe's own setting, None where the space does not hold it."""
        cfg, values = self.config({}, self.seeds[0]), {}
        for dimension in self.space:
            if dimension.is_active(values):
                value = config_value(cfg, dimension.field)
                values[dimension.field] = as_choice(value) if dimension.kind == "categorical" else value
                twins = {config_value(cfg, twin) for twin in dimension.also}
                if twins - {value} or not dimension.contains(values[dimension.field]):
                    return None
        return values

    def identity(self) -> dict:
        """Return what may not change while a sweep goes on: its trials would not be comparable."""
        facts = {
            "recipe": config_hash(self.config({}, self.seeds[0])),
            "budget": self.budget(),
            "measure": self.measure,
            "seeds": self.seeds,
            "objectives": self.objectives,
            "constraints": self.constraints,
            "set": self.fixed,
            "space": {d.field: [d.kind, d.options, d.also, d.when] for d in self.space},
        }
        return parse_json(json.dumps(facts), self.path)  # as it is read back


def spell(values: dict) -> list[str]:
    """Write settings as the command line takes them."""
    return [f"{field}={as_choice(value)}" for field, value in values.items()]


def is_number(value) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST_NUMBER


def is_plain(value) -> bool:
    """Whether a TOML value is one that a recipe can have: no date, no table."""
    return isinstance(value, str | bool) or is_number(value) or is_list(value, is_plain)


def is_list(value, holds: Callable) -> bool:
    """Whether a value is a list of which every item is right."""
    return isinstance(value, list) and all(map(holds, value))


# What an option of Optuna's classes may be: the words of its annotation.
TYPES = {
    "int": lambda value: is_number(value) and isinstance(value, int),
    "float": is_number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
}


def as_choice(value):
    """Write a list as JSON, which Optuna can choose and a recipe can read; booleans as 0 and 1."""
    if isinstance(value, bool):
        return int(value)
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list | tuple) else value


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def read_spec(path: Path, trials: int = 0) -> Spec:
    """Read and check SPEC.toml; `trials` replaces its number of them. Raises for all that is wrong."""
    load_optuna()
    content = read_toml(path, "spec of a sweep", "docs/sweeps.md has an example.")
    problems: list[str] = []
    content = with_defaults(content, problems)
    if trials:
        content["trials"] = trials
    check_plan(content, problems)
    fixed = flatten(content["set"])
    space = tuple(read_space(flatten(content["space"]), fixed, problems))
    check_fields(fixed, "[set]", problems)
    stop_if(problems, path)
    plan = {key: content[key] for key in KEYS if key not in ("set", "space", "recipe")}
    spec = Spec(
        path=path,
        recipe=Path(os.path.relpath(path.parent / content["recipe"])),
        fixed=fixed,
        space=space,
        **plan,
    )
    if spec.sampler["kind"] == "grid":
        spec = spec._replace(trials=count_grid(spec, problems))
        stop_if(problems, path)
    problems += find_refused(spec)
    stop_if(problems, path)
    return spec


def stop_if(problems: list[str], path: Path) -> None:
    """Raise for problems, all in one error."""
    if problems:
        listed = "".join(f"\n  {problem}" for problem in dict.fromkeys(problems))
        raise UserError(
            f"{path}: expected a sweep that can run, found:{listed}\nMend the file and run it again."
        )


def near(word: str, known) -> str:
    """Suggest the nearest known word."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {found[0]}?" if found else f"known are {', '.join(known)}"


def with_defaults(content: dict, problems: list[str]) -> dict:
    """Return the file's content with all keys; unknown and missing ones and wrong types are problems."""
    problems += [f"unknown key {key!r:.60}: {near(key, KEYS)}" for key in content if key not in KEYS]
    filled = {}
    for key, (kind, default) in KEYS.items():
        value = content.get(key, default)
        if kind is float and is_number(value):
            value = float(value)
        if value is None or not isinstance(value, kind) or isinstance(value, bool):
            words = {str: "text", float: "a number", int: "a whole number", list: "a list", dict: "a table"}
            found = "none" if key not in content else repr(value)[:60]
            problems.append(f"{key}: expected {words[kind]}, found {found}")
            value = kind()
        filled[key] = value
    filled["sampler"] = {"kind": "tpe", **filled["sampler"]}
    filled["prune"] = PRUNE_KEYS | filled["prune"]
    return filled


def check_plan(plan: dict, problems: list[str]) -> None:
    """Collect what is wrong with everything but the fields."""
    seeds, objectives, grid = plan["seeds"], plan["objectives"], plan["sampler"]["kind"] == "grid"
    is_one = (plan["seconds"] > 0) != (plan["steps"] > 0)
    whole = seeds and all(is_number(seed) and isinstance(seed, int) for seed in seeds)
    needs_bytes = plan["measure"] == "weights" and "bytes" in objectives
    pruned, rungs = plan["prune"]["kind"] != "none", plan["prune"]["rungs"]
    at_end = "prune: expected one objective: a trade-off is not known before its end"
    by_clock = bool(plan["seconds"]) and plan["prune"]["on"] == "val_loss"
    rules = [
        (plan["recipe"], "recipe: expected the name of a file"),
        (NAME.fullmatch(plan["name"]), f"name: expected {NAME_ADVICE}, found {plan['name']!r:.60}"),
        (is_one, "expected either seconds or steps, above 0"),
        (0 <= plan["seconds"] < MOST_SECONDS, f"seconds: expected a number below {MOST_SECONDS:,}"),
        (0 <= plan["steps"] < MOST_SECONDS, f"steps: expected a number below {MOST_SECONDS:,}"),
        (grid or 0 < plan["trials"] <= MOST_TRIALS, f"trials: expected a number from 1 to {MOST_TRIALS:,}"),
        (not grid or not plan["trials"], "trials: a grid has as many as combinations: leave it out"),
        (whole and not has_twins(seeds), "seeds: expected whole numbers, each once"),
        (objectives, "objectives: expected one at least"),
        (not has_twins(objectives), "objectives: expected each once"),
        (not has_twins(plan["constraints"]), "constraints: expected each once"),
        (not needs_bytes, "objectives: bytes need measure = \"artifact\""),
        (not pruned or len(objectives) < 2, at_end),
        (isinstance(rungs, int) and 1 < rungs <= 1000, "prune.rungs: expected a whole number from 2 to 1000"),
        (not (pruned and by_clock), "prune.on: val_loss needs steps: with seconds, prune on train_loss"),
    ]  # fmt: skip
    problems += [problem for holds, problem in rules if not holds]
    for key, found, known in (
        ("measure", [plan["measure"]], MEASURES),
        ("objectives", objectives, OBJECTIVES),
        ("constraints", plan["constraints"], CONSTRAINTS),
        ("sampler.kind", [plan["sampler"]["kind"]], SAMPLERS),
        ("prune.kind", [plan["prune"]["kind"]], PRUNERS),
        ("prune.on", [plan["prune"]["on"]], ("train_loss", "val_loss")),
    ):
        problems += [
            f"{key}: {item!r:.60}: {near(str(item), known)}" for item in found if item not in list(known)
        ]
    if str(plan["sampler"]["kind"]) in SAMPLERS and str(plan["prune"]["kind"]) in PRUNERS:
        problems += check_options(plan)


def has_twins(values: list) -> bool:
    """Whether a value is twice in a list of anything."""
    return len({str(value) for value in values}) < len(values)


def check_options(plan: dict) -> list[str]:
    """Say what is wrong with the options of Optuna's sampler and pruner: by their types, then by use."""
    faults = []
    for table, own, known, module in (
        ("sampler", {"kind"}, SAMPLERS, "samplers"),
        ("prune", set(PRUNE_KEYS), PRUNERS, "pruners"),
    ):
        taken = inspect.signature(
            getattr(getattr(load_optuna(), module), known[plan[table]["kind"]])
        ).parameters
        for key, value in plan[table].items():
            if key in own:
                continue
            words = option_types(taken[key]) if key in taken else []
            if key not in taken:
                faults.append(
                    f"[{table}] {key}: no option of {known[plan[table]['kind']]}: {near(key, taken)}"
                )
            elif not any(TYPES[word](value) for word in words) or (is_number(value) and value < 0):
                expected = " or ".join(words) or "nothing: a file cannot say it"
                expected += " from 0 on" if is_number(value) and value < 0 else ""
                faults.append(f"[{table}] {key}: expected {expected}, found {value!r:.60}")
    return faults or refusals(partial(use_once, plan))


def option_types(parameter: inspect.Parameter) -> list[str]:
    """List which of TYPES a parameter takes, by its annotation."""
    note = parameter.annotation if isinstance(parameter.annotation, str) else parameter.annotation.__name__
    return [word for word in TYPES if word in map(str.strip, note.split("|"))]


def use_once(plan: dict) -> None:
    """Let a sampler and a pruner choose and judge a few trials: Optuna checks some options only then."""
    optuna = load_optuna()
    aims = ["minimize"] * max(1, len(plan["objectives"]))
    for shift in (0, MOST_TRIALS):  # a seed that is shifted must stay one
        study = optuna.create_study(
            directions=aims, sampler=make_sampler(plan, shift), pruner=make_pruner(plan)
        )
        for _ in range(2):
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            trial.suggest_int("n", 1, 3)
            for rung in range(1, 4) if len(aims) == 1 else ():
                trial.report(1.0, rung)
                trial.should_prune()
            study.tell(trial, [1.0] * len(aims))


def load_optuna():
    """Import Optuna and let it speak of errors alone."""
    optuna = require("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def make_sampler(plan: dict, shift: int = 0):
    """Make Optuna's sampler of a spec; a seed is shifted by the number of trials, whichever worker asks."""
    options = {key: value for key, value in plan["sampler"].items() if key != "kind"}
    if "seed" in options and plan["sampler"]["kind"] != "qmc":  # which is one sequence
        options["seed"] += shift
    return getattr(load_optuna().samplers, SAMPLERS[plan["sampler"]["kind"]])(**options)


def make_pruner(plan: dict):
    """Make Optuna's pruner of a spec."""
    options = {key: value for key, value in plan["prune"].items() if key not in PRUNE_KEYS}
    return getattr(load_optuna().pruners, PRUNERS[plan["prune"]["kind"]])(**options)


def refusals(make) -> list[str]:
    """Say why Optuna refuses the options of what is made, or corrects them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make()
        except Exception as error:  # of any kind, by where in Optuna an option is used first
            return [f"Optuna: {error or type(error).__name__}"]
    return [f"Optuna: {item.message}" for item in caught if item.category is UserWarning]


# ----------------------------------------------------------------------------------------------------------
# Fields
# ----------------------------------------------------------------------------------------------------------


def flatten(table: dict) -> dict:
    """Return {"section.key": value} of a table in which names may be nested or quoted."""
    flat = {}
    for name, value in table.items():
        inner = value.items() if "." not in name and isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": item for key, item in inner} or {name: value}
    return flat


def check_fields(values: dict, place: str, problems: list[str]) -> None:
    """Collect fields that no recipe has, values that they cannot have, and fields that are not the spec's."""
    for field, value in values.items():
        if not is_plain(value):
            problems.append(
                f"{place} {field}: expected text, a number, a truth value or a list, found {value!r:.60}"
            )
            continue
        try:
            with_values(Config(), {field: as_choice(value)}, place)
        except UserError as error:
            problems.append(str(error))
        if field in BUDGET:
            problems.append(f"{place}: {field} is said by seconds, steps and seeds at the top of the file")
        elif field in (WITHOUT_EFFECT - set(DATA_PLACES) if place == "[space]" else OF_A_JOB):
            problems.append(f"{place}: {field} changes no result of a training, or is the sweep's own")


def read_space(space: dict, fixed: dict, problems: list[str]) -> Iterator[Dimension]:
    """Yield the dimensions; what is wrong with them is added to the problems."""
    if not space:
        problems.append(
            "[space]: expected a field to vary at least, as optim.matrix_lr = {low = 0.01, high = 0.05}"
        )
    known, above = config_fields(Config), {}
    taken = dict.fromkeys(space, "[space]") | dict.fromkeys(fixed, "[set]")
    for field, stated in sorted(space.items(), key=depends):  # TOML keeps no order between sections
        place = f"[space] {field}"
        if field not in known:
            check_fields({field: 0}, "[space]", problems)
            continue
        faults = find_wrong_keys(field, stated)
        if faults:
            problems += faults
            above[field] = None
            continue
        kind = {int: "int", float: "float"}.get(known[field].type, "categorical")
        kind = "categorical" if "choices" in stated else kind
        keys = ("choices",) if kind == "categorical" else ("low", "high", "step", "log")
        options = {key: stated[key] for key in keys if key in stated}
        also, when = tuple(stated.get("also", ())), flatten(stated.get("when", {}))
        if field in fixed:
            problems.append(f"{place}: {field} is in [set], too")
        problems += [f"{place}: {twin} is in {taken[twin]}, too" for twin in also if twin in taken]
        taken |= dict.fromkeys(also, f"also of {field}")
        stray = set(stated) - {*keys, "also", "when"}
        faults = [f"{place}: {', '.join(sorted(stray))} do not go with choices"] if stray else []
        faults += find_faults(field, kind, options) + find_wrong_parents(place, when, above)
        problems += faults
        above[field] = None
        if not faults:
            above[field] = dimension = make_dimension(field, kind, options, also, when)
            for value in dimension.corners():
                check_fields(dict.fromkeys((field, *also), value), "[space]", problems)
            yield dimension


def depends(item: tuple) -> bool:
    """Whether a dimension is varied only beside some values of others."""
    return isinstance(item[1], dict) and "when" in item[1]


def find_wrong_keys(field: str, stated) -> list[str]:
    """Say which keys of a dimension are unknown or of a wrong type."""
    place = f"[space] {field}"
    if not isinstance(stated, dict) or set(stated) - set(DIMENSION_KEYS):
        return [f"{place}: expected a table of some of {', '.join(DIMENSION_KEYS)}, found {stated!r:.80}"]
    is_right = {
        "low": is_number,
        "high": is_number,
        "step": is_number,
        "log": TYPES["bool"],
        "choices": lambda value: is_list(value, is_plain),
        "also": lambda value: is_list(value, TYPES["str"]) and not has_twins([*value, field]),
        "when": lambda value: (
            isinstance(value, dict)
            and all(is_list(allowed, is_plain) and allowed for allowed in flatten(value).values())
        ),
    }
    return [
        f"{place}: {key}: expected {DIMENSION_KEYS[key]}, found {value!r:.60}"
        for key, value in stated.items()
        if not is_right[key](value)
    ]


def find_wrong_parents(place: str, when: dict, above: dict) -> list[str]:
    """Say which fields that a dimension depends on are not above it, or cannot have the values."""
    faults = [
        f"{place}: when names {parent}, which must be above it" for parent in when if parent not in above
    ]
    for parent, allowed in when.items():
        if (dimension := above.get(parent)) is not None:  # else it is wrong itself
            never = [value for value in allowed if not dimension.contains(as_choice(value))]
            faults += [f"{place}: when: {parent} is never {value!r:.60}" for value in never]
    return faults


def find_faults(field: str, kind: str, options: dict) -> list[str]:
    """Say what is wrong with a range or with choices."""
    place = f"[space] {field}"
    if kind == "categorical":
        choices = options.get("choices")
        if not isinstance(choices, list) or not choices:
            return [f"{place}: expected choices = [...], because it is no number or has choices"]
        texts = [json.dumps(choice) for choice in choices]
        return [f"{place}: a choice twice in {choices}"] if len(set(texts)) < len(texts) else []
    numbers = [options.get(key) for key in ("low", "high")] + ([options["step"]] if "step" in options else [])
    if not all(map(TYPES[kind], numbers)):
        what = "whole numbers" if kind == "int" else "numbers"
        return [f"{place}: expected {what} low and high, and step if any, found {options}"]
    make = {"int": "IntDistribution", "float": "FloatDistribution"}[kind]
    return [
        f"{place}: {said}" for said in refusals(lambda: getattr(load_optuna().distributions, make)(**options))
    ]


def make_dimension(field: str, kind: str, options: dict, also: tuple, when: dict) -> Dimension:
    """Make a dimension; choices are what Optuna can keep."""
    if kind == "categorical":
        options = {"choices": [as_choice(choice) for choice in options["choices"]]}
    when = {parent: [as_choice(value) for value in allowed] for parent, allowed in when.items()}
    return Dimension(field, kind, options, also, when)


# ----------------------------------------------------------------------------------------------------------
# Settings, before anything starts
# ----------------------------------------------------------------------------------------------------------


def combinations(space: tuple[Dimension, ...], values: dict | None = None) -> Iterator[dict]:
    """Yield every setting of a grid that begins with these values, the last dimension fastest."""
    values = values or {}
    if not space:
        yield values
    elif not space[0].is_active(values):
        yield from combinations(space[1:], values)
    else:
        for value in space[0].grid():
            yield from combinations(space[1:], values | {space[0].field: value})


def count_grid(spec: Spec, problems: list[str]) -> int:
    """Count the settings of a grid; ranges without steps and too many settings are problems."""
    endless = [d.field for d in spec.space if d.grid() is None]
    if endless:
        problems.append(f"a grid needs choices, or low, high and step: {', '.join(endless)} has none")
        return 0
    count = sum(1 for _ in islice(combinations(spec.space), MOST_COMBINATIONS + 1))
    if count > MOST_COMBINATIONS:
        problems.append(f"a grid of more than {MOST_COMBINATIONS:,} settings: take fewer values")
    return count


def draw_settings(spec: Spec, count: int, fixed: dict | None = None) -> Iterator[dict]:
    """Yield random settings, which keep the values of some fields; always the same ones."""
    optuna = load_optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        if fixed:
            study.enqueue_trial(fixed)
        yield spec.suggest(study.ask())


def why_refused(spec: Spec, values: dict) -> str:
    """Say why no training can have these values, "" where one can."""
    try:
        spec.config(values, spec.seeds[0])
    except UserError as error:
        return str(error)
    return ""


def find_refused(spec: Spec) -> list[str]:
    """Find the ends of ranges and the choices that no setting can have; [set] must fit the recipe, too."""
    if said := why_refused(spec, {}):
        return [f"the recipe with [set]: {said}"]
    problems = []
    for dimension in spec.space:
        for value in dimension.corners():
            first = said = why_refused(spec, {dimension.field: value})
            drawn = draw_settings(spec, DRAWS, {dimension.field: value})
            while said and (values := next(drawn, None)) is not None:
                said = why_refused(spec, values) if values.get(dimension.field) == value else said
            if said:
                problems.append(f"[space] {dimension.field}={value} fits no setting: {first}")
    return problems


def count_refused(spec: Spec) -> tuple[int, str]:
    """Return how many of DRAWS random settings no training can have, and why the first cannot."""
    said = [why_refused(spec, values) for values in draw_settings(spec, DRAWS)]
    refused = [reason for reason in said if reason]
    return len(refused), refused[0] if refused else ""
