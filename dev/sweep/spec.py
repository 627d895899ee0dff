"""SPEC.toml: what a sweep varies, with what budget, and what it is after; checked before anything starts."""

import difflib
import json
import os
import re
import warnings
from collections.abc import Iterator
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
DIMENSION_KEYS = ("low", "high", "step", "log", "choices", "also", "when")
BUDGET = ("run.seed", "run.iterations", "run.max_wallclock_seconds")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
NAME_ADVICE = "a name of letters, digits and . _ + -, a letter or digit first"
EVENTS_A_RUNG = 8  # losses that are averaged, at least, where the number of steps is known
LOG_EVERY = 10  # steps, at most, where a clock ends the training
MOST_COMBINATIONS = 10_000  # of a grid
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
            values.append(int(value) if self.kind == "int" else value)
            count += 1
        return values

    def contains(self, value) -> bool:
        """Whether a value could be chosen."""
        options = self.options
        if self.kind == "categorical":
            return value in options["choices"]
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
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
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
    whole = seeds and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    once = len({str(seed) for seed in seeds}) == len(seeds)
    needs_bytes = plan["measure"] == "weights" and "bytes" in objectives
    pruned, rungs = plan["prune"]["kind"] != "none", plan["prune"]["rungs"]
    at_end = "prune: expected one objective: a trade-off is not known before its end"
    by_clock = bool(plan["seconds"]) and plan["prune"]["on"] == "val_loss"
    rules = [
        (NAME.fullmatch(plan["name"]), f"name: expected {NAME_ADVICE}, found {plan['name']!r:.60}"),
        ((plan["seconds"] > 0) != (plan["steps"] > 0), "expected either seconds or steps, above 0"),
        (grid or plan["trials"] > 0, "trials: expected a number from 1 on"),
        (not grid or not plan["trials"], "trials: a grid has as many as combinations: leave it out"),
        (whole and once, "seeds: expected whole numbers, each once"),
        (objectives, "objectives: expected one at least"),
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
        problems += [
            problem for make in (make_sampler, make_pruner) for problem in refusals(partial(make, plan))
        ]


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
        except (TypeError, ValueError, ImportError) as error:
            return [f"Optuna: {error}"]
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
    known, before = config_fields(Config), set()
    for field, stated in space.items():
        place = f"[space] {field}"
        if field not in known:
            check_fields({field: 0}, "[space]", problems)
            continue
        if not isinstance(stated, dict) or set(stated) - set(DIMENSION_KEYS):
            problems.append(
                f"{place}: expected a table of some of {', '.join(DIMENSION_KEYS)}, found {stated!r:.80}"
            )
            continue
        kind = {int: "int", float: "float"}.get(known[field].type, "categorical")
        kind = "categorical" if "choices" in stated else kind
        keys = ("choices",) if kind == "categorical" else ("low", "high", "step", "log")
        options = {key: stated[key] for key in keys if key in stated}
        also, when = tuple(stated.get("also", ())), flatten(stated.get("when", {}))
        for name in (field, *also):
            if name in fixed:
                problems.append(f"{place}: {name} is in [set], too")
        problems += [f"{place}: when names {parent}, which must be above it" for parent in set(when) - before]
        before.add(field)
        stray = set(stated) - {*keys, "also", "when"}
        faults = [f"{place}: {', '.join(sorted(stray))} do not go with choices"] if stray else []
        faults += find_faults(field, kind, options)
        problems += faults
        if not faults:
            dimension = make_dimension(field, kind, options, also, when)
            for value in dimension.corners():
                check_fields(dict.fromkeys((field, *also), value), "[space]", problems)
            yield dimension


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
    right = (int,) if kind == "int" else (int, float)
    if not all(isinstance(number, right) and not isinstance(number, bool) for number in numbers):
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
