"""What a trial found: one object for programs, a table for people, an entry for the journal."""

import math
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, format_table
from dev.desk.training import Outcome
from dev.trial.plan import NEW, OLD, Plan, changed_files, differences
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
from train_gpt import learning_rate_mul

SURPRISE = 3.0  # deviations of the normal distribution
DRIFT = 0.15  # of a side's time a step, above which the machine was not steady
LEAST_STEPS = 24  # of a run whose slope is taken
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
        | {"bytes": max(run.num_bytes for run in runs) or None, "over_limits": over}
    )


def loss_slope(folder: Path, bpb_per_nat: float) -> tuple[float, float] | None:
    """Return bits a byte that one more step saves at a run's end, and the error of that.

    The slope of the training loss over the last part of the run: later steps of a longer run would have had
    other learning rates, so it is a guide, no measurement. None where events are too few.
    """
    events = [event for event in split_events(folder / METRICS_NAME)[0] if event["kind"] == "train"]
    last = events[-int(len(events) * SLOPE_SHARE) :]
    if len(events) < LEAST_STEPS:
        return None
    steps = np.array([event["step"] for event in last], dtype=np.float64)
    losses = np.array([event["train_loss"] for event in last])
    steps -= steps.mean()
    slope = steps @ losses / (steps @ steps)
    residuals = losses - losses.mean() - slope * steps
    error = math.sqrt(residuals @ residuals / (len(last) - 2) / (steps @ steps))
    return -slope * bpb_per_nat, error * bpb_per_nat


def exchange_rate(pairs: list[Pair], shorter: dict[int, Outcome], effect: float) -> dict:
    """Return what a step of the old side is worth in bits a byte, how that is known, and the effect in steps.

    `shorter`: the old side's runs of a smaller budget, by seed; they measure it. Else the training losses do,
    and their error does not shrink with the seeds: all of them see the same batches. What is not known is
    None.
    """
    rates = [
        (run.val_bpb - pair.old.val_bpb) / (pair.old.steps - run.steps)
        for pair in pairs
        if (run := shorter.get(pair.seed)) and run.steps < pair.old.steps
    ]
    slopes = [loss_slope(pair.old.folder, pair.old.val_bpb / pair.old.val_loss) for pair in pairs]
    known = [slope for slope in slopes if slope]
    if rates:
        n, rate, error = summarize(rates)
        said = f"{n} shorter runs of the old side"
    elif known:
        rate, error = (summarize(list(column)).mean for column in zip(*known))
        said = f"slope of the training loss over the last {SLOPE_SHARE:.0%} of {len(known)} old runs"
    else:
        rate, error, said = None, None, f"not known: fewer than {LEAST_STEPS} steps; --exchange measures it"
    is_clear = rate is not None and rate > 2 * (error or 0)
    steps = effect / rate if is_clear else None
    return {"bpb_per_step": rate, "error": error, "from": said, "effect_in_steps": steps}


def warnings(plan: Plan, pairs: list[Pair]) -> list[str]:
    """Say what makes the verdict weaker than it looks."""
    found = []
    for label in (OLD, NEW):
        runs = [getattr(pair, label) for pair in pairs]
        paces = [ms_per_step(run) for run in runs]
        if max(paces) > (1 + DRIFT) * min(paces):
            found.append(
                f"{label}: a step took {min(paces):.1f} to {max(paces):.1f} ms: the machine was not steady, "
                "or not idle"
            )
        if over := sorted({name for run in runs for name in run.over_limits}):
            found.append(f"{label}: over its limit of {', '.join(over)}: no valid submission")
    if any(pair.new.origin.get("machine") != pair.old.origin.get("machine") for pair in pairs):
        found.append("pairs whose runs come from two machines")
    if (
        plan.shares[0]
        and "steps" not in plan.budget
        and any(p.new.was_found != p.old.was_found for p in pairs)
    ):
        found.append(
            "one side of a pair trained alone, beside its partner's earlier run: its steps may be faster"
        )
    if plan.measure == "weights":
        found.append("float weights were compared: quantization, bytes and the recipe's scorer were not")
    if len(plan.seeds) < KEEP_FROM:
        found.append(f"{len(plan.seeds)} seeds can drop a change, {KEEP_FROM} are needed to keep one")
    return found + odd_spread(plan, pairs) + late_start(plan)


def odd_spread(plan: Plan, pairs: list[Pair]) -> list[str]:
    """Say whether the differences spread more than the stated deviation explains (chi-squared,
    Wilson-Hilferty)."""
    n, _, std = summarize([pair.difference for pair in pairs])
    if not plan.design.sigma or n < 2:
        return []
    df = n - 1
    ratio = (std / plan.design.sigma) ** 2
    z = (ratio ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    said = f"the differences have deviation {std:.5f}, --sigma says {plan.design.sigma:g}: too sure"
    return [said] if z > SURPRISE else []


def late_start(plan: Plan) -> list[str]:
    """Say whether fixed steps are fewer than the schedule's decay: the rates never reach the recipe's."""
    found = []
    for side in (plan.old, plan.new) if "steps" in plan.budget else ():
        steps = range(0, side.cfg.run.iterations, max(1, side.cfg.run.iterations // 1000))
        most = max(learning_rate_mul(side.cfg, step, 0.0) for step in steps)
        if most < 1:
            found.append(
                f"{side.label}: so few steps are all decay: its learning rates begin at {most:.2f} of "
                "the recipe's"
            )
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
    sigma = plan.design.sigma or decision.std
    if decision.word != UNDECIDED or not sigma:
        return ""
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
    design = plan.design
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
        "exchange": exchange_rate(pairs, shorter, decision.effect),
        "budget": plan.budget,
        "measure": plan.measure,
        "differences": differences(plan),
        "changed_files": changed_files(plan),
        "command": shlex.join(sys.orig_argv[1:]),
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
    """Say what a step is worth, and the effect in steps."""
    rate = report["exchange"]
    if rate["bpb_per_step"] is None:
        return f"What a step is worth is {rate['from']}"
    spread = f" +- {rate['error']:.2g}" if rate["error"] is not None else ""
    line = f"A step is worth {rate['bpb_per_step']:.3g}{spread} bits a byte ({rate['from']})"
    steps = rate["effect_in_steps"]
    if steps is None:
        return f"{line}: too uncertain to count the effect in steps"
    return f"{line}: the effect is {abs(steps):,.0f} steps {'lost' if steps > 0 else 'saved'}"


def said_of_side(side: dict) -> str:
    """Say a side's mean score, steps and most bytes."""
    spread = f" +- {side['std']:.5f}" if side["std"] is not None else ""
    size = f", at most {side['bytes']:,} bytes" if side["bytes"] else ""
    return (
        f"{side['mean']:.5f}{spread} bits a byte, {side['steps']:,.0f} steps, "
        f"{side['ms_per_step']:.1f} ms a step{size}"
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
    lines += [f"{label}: {said_of_side(report['sides'][label])}" for label in (NEW, OLD)]
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
    means = "; ".join(f"{label} {said_of_side(sides[label])}" for label in (OLD, NEW))
    files = f" Files: {', '.join(report['changed_files'])}." if report["changed_files"] else ""
    lines = [
        f"## {date.today()}: {report['trial']}",
        "",
        f"Hypothesis: {hypothesis}." if hypothesis else "",
        f"Change: {changed}.{files} Old: {sides[OLD]['side']}. Budget {budget}, {report['measure']}.",
        f"Command: `python {report['command']}`.",
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
