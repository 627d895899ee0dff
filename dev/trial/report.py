"""What a trial found: one object for programs, a table for people, an entry for the journal."""

import math
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, format_table
from dev.desk.training import Outcome
from dev.trial.plan import NEW, OLD, Plan, differences
from dev.trial.sequential import (
    DROP,
    KEEP,
    KEEP_FROM,
    MOST_PAIRS,
    UNDECIDED,
    Decision,
    critical_values,
    pairs_needed,
    smallest_effect,
)
from durable.seals import split_events
from eval.stats import summarize
from formats.checkpoints import METRICS_NAME

DRIFT = 0.15  # of a side's time a step, above which the machine was not steady
SLOPE_SHARE = 1 / 3  # of a run's end over which the slope of its loss is taken
CELLS = {
    "seed": ">6",
    "  side": "<6",
    "val_bpb": ">12.8f",
    "steps": ">8,",
    "ms/step": ">9.1f",
    "train s": ">9.1f",
}
CELLS |= {"all s": ">8.1f", "bytes": ">11,", "  found": "<7", "  folder": "<"}


class Pair(NamedTuple):
    """The two runs of a seed."""

    seed: int
    new: Outcome
    old: Outcome

    @property
    def difference(self) -> float:
        return self.new.val_bpb - self.old.val_bpb


def check_pair(pair: Pair, allowed: tuple[str, ...]) -> None:
    """Raise where two runs were scored on different amounts of text: their scores do not compare."""
    found = [side.score["num_bytes"] for side in (pair.old, pair.new)]
    if found[0] != found[1] and "validation" not in allowed:
        raise UserError(
            f"seed {pair.seed}: expected one validation text, found {found[0]:,} bytes "
            f"(old, {pair.old.folder}) and {found[1]:,} (new, {pair.new.folder}). Set the same "
            "data and eval fields on both sides, or "
            "compare all the same with --allow validation."
        )


def ms_per_step(run: Outcome) -> float:
    """Return the time of a step on the training clock."""
    return 1000 * run.train_s / max(run.steps, 1)


def describe_side(runs: list[Outcome]) -> dict:
    """Sum up the runs of a side."""
    scores = summarize([run.val_bpb for run in runs])
    means = {
        "steps": [run.steps for run in runs],
        "train_seconds": [run.train_s for run in runs],
        "all_seconds": [run.wall_s for run in runs],
        "ms_per_step": [ms_per_step(run) for run in runs],
        "tokens_per_second": [run.tokens_per_second for run in runs],
    }
    over = sorted({name for run in runs for name in run.over_limits})
    return (
        scores._asdict()
        | {name: summarize(values).mean for name, values in means.items()}
        | {"bytes": max(run.num_bytes for run in runs), "over_limits": over}
    )


def loss_slope(folder: Path, bpb_per_nat: float) -> tuple[float, float] | None:
    """Return bits a byte that one more step saves at a run's end, and the error of that.

    The slope of the training loss over the last part of the run: later steps of a longer run would have had
    other learning rates, so it is a guide, no measurement. None where events are too few.
    """
    events = [event for event in split_events(folder / METRICS_NAME)[0] if event["kind"] == "train"]
    last = events[-int(len(events) * SLOPE_SHARE) :]
    if len(last) < 8:
        return None
    steps = np.array([event["step"] for event in last], dtype=np.float64)
    losses = np.array([event["train_loss"] for event in last])
    steps -= steps.mean()
    slope = steps @ losses / (steps @ steps)
    residuals = losses - losses.mean() - slope * steps
    error = math.sqrt(residuals @ residuals / (len(last) - 2) / (steps @ steps))
    return -slope * bpb_per_nat, error * bpb_per_nat


def exchange_rate(pairs: list[Pair], shorter: dict[int, Outcome]) -> dict | None:
    """Return what a step of the old side is worth in bits a byte, and how that is known.

    `shorter`: the old side's runs of a smaller budget, by seed; they measure it. Else the training losses.
    """
    rates = [
        (run.val_bpb - pair.old.val_bpb) / (pair.old.steps - run.steps)
        for pair in pairs
        if (run := shorter.get(pair.seed)) and run.steps < pair.old.steps
    ]
    if rates:
        rate = summarize(rates)
        return {
            "bpb_per_step": rate.mean,
            "std": rate.std,
            "n": rate.n,
            "from": "shorter runs of the old side",
        }
    slopes = [loss_slope(pair.old.folder, pair.old.val_bpb / pair.old.val_loss) for pair in pairs]
    known = [slope for slope in slopes if slope]
    if not known:
        return None
    mean = summarize([slope for slope, _ in known]).mean
    error = math.sqrt(sum(error**2 for _, error in known)) / len(known)
    said = f"slope of the training loss over the last {SLOPE_SHARE:.0%} of the old side's runs"
    return {"bpb_per_step": mean, "std": error, "n": len(known), "from": said}


def warnings(plan: Plan, pairs: list[Pair]) -> list[str]:
    """Say what makes the verdict weaker than it looks."""
    found = []
    for label in (OLD, NEW):
        runs = [getattr(pair, label) for pair in pairs]
        paces = [ms_per_step(run) for run in runs]
        if max(paces) > (1 + DRIFT) * min(paces) and plan.budget.get("steps") is None:
            found.append(
                f"{label}: a step took {min(paces):.1f} to {max(paces):.1f} ms: the machine was not steady, "
                "or not idle"
            )
        if over := sorted({name for run in runs for name in run.over_limits}):
            found.append(f"{label}: over its limit of {', '.join(over)}: no valid submission")
    if any(pair.new.origin.get("machine") != pair.old.origin.get("machine") for pair in pairs):
        found.append("pairs whose runs come from two machines")
    if plan.measure == "weights":
        found.append("float weights were compared: quantization, bytes and the recipe's scorer were not")
    if len(plan.seeds) < KEEP_FROM:
        found.append(f"{len(plan.seeds)} seeds can drop a change, {KEEP_FROM} are needed to keep one")
    return found


def verdict(decision: Decision, pairs: list[Pair]) -> tuple[str, str]:
    """Return the trial's word, and why: a change that breaks a limit is not kept, however good its score."""
    broken = {name for pair in pairs for name in pair.new.over_limits}
    broken -= {name for pair in pairs for name in pair.old.over_limits}
    if decision.word == KEEP and broken:
        return DROP, f"better, but over its limit of {', '.join(sorted(broken))}, which the old side is not"
    if decision.std == 0 and decision.effect == 0:
        return decision.word, "every pair is equal to the last digit: the change does not reach the score"
    reasons = {
        KEEP: "the interval of the difference is below 0",
        DROP: "the interval of the difference is above 0",
        UNDECIDED: "the interval of the difference holds 0",
    }
    return decision.word, reasons.get(decision.word, "the interval is within the difference worth having")


def next_step(plan: Plan, decision: Decision) -> str:
    """Say what would decide an undecided trial."""
    if decision.word != UNDECIDED or not decision.std:
        return ""
    sigma = plan.design.sigma or decision.std
    needed = pairs_needed(plan.design, decision.effect / sigma)
    seen = smallest_effect(plan.design) * sigma
    more = f"about {needed} seeds" if needed else f"more than {MOST_PAIRS} seeds"
    return (
        f"{len(plan.seeds)} seeds show a difference of {seen:.4f} in 4 of 5 trials; to show "
        f"{decision.effect:+.4f}, if it is real, takes {more}"
    )


def make_report(plan: Plan, pairs: list[Pair], decision: Decision, shorter: dict[int, Outcome]) -> dict:
    """Return everything as one JSON object."""
    word, because = verdict(decision, pairs)
    design, rate = plan.design, exchange_rate(pairs, shorter)
    steps = decision.effect / rate["bpb_per_step"] if rate and rate["bpb_per_step"] > 0 else None
    has_interval = math.isfinite(decision.low)
    sides = {
        label: {"side": getattr(plan, label).said}
        | describe_side([getattr(pair, label) for pair in pairs])
        | {"runs": [str(getattr(pair, label).folder) for pair in pairs]}
        for label in (NEW, OLD)
    }
    return {
        "trial": plan.name,
        "verdict": word,
        "because": because,
        "effect": decision.effect,
        "interval": [decision.low, decision.high] if has_interval else None,
        "level": 1 - design.alpha,
        "n": decision.n,
        "max_n": design.max_pairs,
        "std": decision.std,
        "sigma": design.sigma,
        "worth": design.worth,
        "critical_values": [
            value if math.isfinite(value) else None
            for value in critical_values(design.max_pairs, design.sigma is not None, design.alpha)
        ],
        "exchange": rate and rate | {"effect_in_steps": steps},
        "budget": plan.budget,
        "measure": plan.measure,
        "differences": differences(plan),
        "sides": sides,
        "pairs": [
            {
                "seed": pair.seed,
                "new": pair.new.val_bpb,
                "old": pair.old.val_bpb,
                "difference": pair.difference,
            }
            for pair in pairs
        ],
        "trained": sum(not run.was_found for pair in pairs for run in (pair.new, pair.old)),
        "origin": pairs[-1].new.origin,
        "warnings": warnings(plan, pairs),
        "next": next_step(plan, decision),
    }


def said_of(report: dict) -> str:
    """Say the result in a line: effect, interval, n."""
    low, high = report["interval"] or (-math.inf, math.inf)
    return (
        f"{report['effect']:+.5f} bits a byte, {report['level']:.0%} interval {low:+.5f} to {high:+.5f}, "
        f"n {report['n']}"
    )


def exchange_line(report: dict) -> str:
    """Say what the effect is worth in steps."""
    rate = report["exchange"]
    if not rate:
        return ""
    spread = f" +- {rate['std']:.2g}" if rate["std"] is not None else ""
    line = f"A step is worth {rate['bpb_per_step']:.3g}{spread} bits a byte ({rate['from']}, n {rate['n']})"
    steps = rate["effect_in_steps"]
    return (
        line
        if steps is None
        else f"{line}: the effect is {abs(steps):,.0f} steps {'lost' if steps > 0 else 'saved'}"
    )


def format_report(report: dict, pairs: list[Pair]) -> str:
    """Lay the result out for a terminal."""
    rows = [
        (pair.seed, f"  {label}", run.val_bpb, run.steps, ms_per_step(run), run.train_s, run.wall_s,
         run.num_bytes, "  yes" if run.was_found else "", f"  {run.folder}")
        for pair in pairs
        for label, run in ((NEW, pair.new), (OLD, pair.old))
    ]  # fmt: skip
    lines = [f"{label}: {report['sides'][label]['side']}" for label in (NEW, OLD)]
    lines += [format_table(CELLS, rows)]
    for label in (NEW, OLD):
        side = report["sides"][label]
        spread = f" +- {side['std']:.5f}" if side["std"] is not None else ""
        lines.append(
            f"{label}: {side['mean']:.5f}{spread} bits a byte, {side['steps']:,.0f} steps, "
            f"{side['ms_per_step']:.1f} ms a step, {side['bytes']:,} bytes"
        )
    lines += [exchange_line(report), *(f"warning: {text}" for text in report["warnings"])]
    lines += [f"verdict: {report['verdict'].upper()}: {said_of(report)}", f"  {report['because']}"]
    lines += [f"  {report['next']}"] if report["next"] else []
    return "\n".join(line for line in lines if line)


def journal_entry(report: dict, hypothesis: str) -> str:
    """Return an entry for dev/LOG.md."""
    origin, sides = report["origin"], report["sides"]
    machine = origin.get("machine", {})
    budget = ", ".join(f"{value:g} {unit}" for unit, value in report["budget"].items()) or "the recipes' own"
    cells = {"seed": "", "old": ".8f", "new": ".8f", "difference": "+.8f"}
    rows = [tuple(pair[key] for key in cells) for pair in report["pairs"]]
    table = [
        f"| {' | '.join(format(value, form) for value, form in zip(row, cells.values()))} |" for row in rows
    ]
    changed = "; ".join(f"`{name}` {old} -> {new}" for name, (old, new) in report["differences"].items())
    means = ", ".join(
        f"{label} {side['mean']:.5f} (std {side['std'] or 0:.5f}), {side['steps']:,.0f} "
        f"steps at {side['ms_per_step']:.1f} ms, {side['bytes']:,} bytes"
        for label, side in ((label, sides[label]) for label in (OLD, NEW))
    )
    lines = [
        f"## {date.today()}: {report['trial']}",
        "",
        f"Hypothesis: {hypothesis}." if hypothesis else "",
        f"Change: {changed}. Old: {sides[OLD]['side']}. Budget {budget}, {report['measure']}.",
        f"Machine: {machine.get('cpu')}, {machine.get('device')}, {machine.get('threads')} threads, "
        f"Python {machine.get('python')}, torch {machine.get('torch')}. Data {origin.get('data', '')[:12]}, "
        f"validation {origin.get('validation', '')[:12]}, tokenizer {origin.get('tokenizer', '')[:12]}, "
        f"code {origin.get('code')}.",
        "",
        "| seed | old | new | difference |",
        "|---|---|---|---|",
        *table,
        "",
        f"Result: {means}. Difference {said_of(report)}. {exchange_line(report)}".strip(),
        *(f"Warning: {text}." for text in report["warnings"]),
        f"Verdict: **{report['verdict']}** ({report['because']}).",
    ]
    return "\n".join(line for line in lines if line or line == "").replace("\n\n\n", "\n\n") + "\n"
