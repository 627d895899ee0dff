"""Several runs beside each other: which belong together, what differs, who is better, how sure that is."""

import re
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from dev.desk.runs import RunFacts
from eval.stats import SeedScore, compare, critical_t, summarize, unequal, uneven, welch_error
from formats.recipe import config_fields, config_hash, config_value
from train_gpt import Config

BUDGET = ("run.iterations", "run.max_wallclock_seconds")  # live fields that make another experiment
PRIVATE = ("run.seed", "run.run_id", "run.out_dir", "run.resume", "run.overwrite")  # that make none
DIGESTS = {"data.data_path": "data", "data.tokenizer_path": "tokenizer"}  # of what lies at a place: origin's
LEVEL = 0.95  # of intervals


class Group(NamedTuple):
    """Runs of one recipe and budget, which differ in their seeds."""

    name: str
    runs: list[RunFacts]
    cfg: Config | None

    @property
    def scores(self) -> list[SeedScore]:
        """Return the scores that there are, as eval.stats takes them."""
        return [
            SeedScore(run.name, run.seed, run.val_bpb, run.score.get("val_loss"), "", self.name)
            for run in self.runs
            if run.val_bpb is not None
        ]


def group_runs(runs: list[RunFacts], configs: list[Config | None]) -> list[Group]:
    """Put runs of one recipe and budget together, in order."""
    found: dict[tuple, list[int]] = {}
    for i, (run, cfg) in enumerate(zip(runs, configs)):
        budget = tuple(run.recipe.get(name) for name in BUDGET)
        recipe = config_hash(cfg) if cfg else f"unread {i}"
        found.setdefault((recipe, budget, run.kind == "weights"), []).append(i)
    members = [([runs[i] for i in group], configs[group[0]]) for group in found.values()]
    return [Group(name_group([run.name for run in group]), group, cfg) for group, cfg in members]


def name_group(names: list[str]) -> str:
    """Name a group by what the names of its runs begin with."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    common = re.sub(r"(?:[\W_]+seed)?[\W_]+[^\W_]*$", "", "".join(letters[0] for letters in alike))
    return common or f"{names[0]} and {len(names) - 1} more"


def differences(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """List the fields in which recipes differ, with the value in each."""
    rows = []
    for name in config_fields(Config):
        values = [
            str(config_value(group.cfg, name) if group.cfg else group.runs[0].recipe.get(name, "?"))
            for group in groups
        ]
        if name not in PRIVATE and len(set(identities(name, values, groups))) > 1:
            rows.append((name, values))
    return rows


def identities(name: str, values: list[str], groups: list[Group]) -> list[str]:
    """Return what tells a field's values apart: of a place the digest of what is there, else its path."""
    if name not in DIGESTS:
        return values
    digests = [group.runs[0].origin.get(DIGESTS[name]) for group in groups]
    return [str(one) for one in digests] if all(digests) else [str(Path(one).resolve()) for one in values]


class Verdict(NamedTuple):
    """A group against the first one: negative differences favour it."""

    group: Group
    difference: float
    interval: tuple[float, float] | None  # of the difference, of level LEVEL
    welch: float | None  # one-sided p of "lower than the first"
    paired: float | None
    seeds_needed: int | None


def judge(groups: list[Group]) -> list[Verdict]:
    """Compare the scores of every later group with those of the first."""
    first, found = groups[0].scores, []
    for group in groups[1:]:
        scores = group.scores
        if not (first and scores):
            continue
        report = compare(scores, first)
        p = {row["test"]: row["p"] for row in report["tests"] if row["margin"] == "0"}
        sides = [[row.val_bpb for row in side] for side in (scores, first)]
        difference = report["new"]["mean"] - report["old"]["mean"]
        numbers = p.get("Welch"), p.get("paired by seed"), report["minimum_seeds"]["0"]
        found.append(Verdict(group, difference, interval(*sides), *numbers))
    return found


def interval(new: list[float], old: list[float]) -> tuple[float, float] | None:
    """Return Welch's interval of mean(new) - mean(old); None below two scores a side."""
    a, b = summarize(new), summarize(old)
    if a.std is None or b.std is None:
        return None
    error, df = welch_error(a, b)
    half = critical_t((1 - LEVEL) / 2, df) * error
    return a.mean - b.mean - half, a.mean - b.mean + half


def weaknesses(groups: list[Group]) -> list[str]:
    """Say what makes scores, or their comparison, a weak basis."""
    runs = [run for group in groups for run in group.runs]
    said = []
    for run in runs:
        if run.val_bpb is None:
            said.append(f"{run.name}: no score: it is left out of the statistics.")
        said += [f"{run.name}: NOT A VALID RUN: over its limit of {limit}." for limit in over_limits(run)]
        said += [
            f"{run.name}: {run.score[key]}." for key in ("invalid", "not_comparable") if run.score.get(key)
        ]
    results = [run.result for run in runs if run.result]
    silent = ", ".join(run.name for run in runs if run.result and not run.origin)
    if silent and len(runs) > 1:
        said.append(f"Not told: data, code and machine of {silent}. They may differ.")
    said += [f"{text[0].upper()}{text[1:]}." for text in unequal(results)]
    for group in groups:
        said += [
            f"{group.name}: {text}." for text in uneven([run.result for run in group.runs if run.result])
        ]
    if len({run.kind == "weights" for run in runs if run.result}) > 1:
        said.append("Some scores are of float weights, others of artifacts: quantization is in these alone.")
    return said


def say_limits(run: RunFacts) -> str | None:
    """Say whether a run kept its limits; None where nobody knows, as of weights, which have no bytes."""
    if broken := over_limits(run):
        return f"over: {'; '.join(broken)}"
    return "kept" if run.kind != "weights" and "over_limits" in (run.result or {}) else None


def over_limits(run: RunFacts) -> list[str]:
    """List the limits that a run is over."""
    found = (run.result or {}).get("over_limits", [])
    return [str(row) for row in found] if isinstance(found, list) else []
