"""Is a change better? Two settings, paired seeds, in turn on one machine, until the verdict is clear.

    make trial SET="optim.matrix_lr=0.03" SECONDS=90
    python -m dev.trial --recipe R --set optim.matrix_lr=0.03 model.xsa_last=2 --seeds 5 --seconds 90
    python -m dev.trial --recipe R --against R2 --steps 400 --measure weights     two recipes, a screen
    python -m dev.trial --recipe R --against-code HEAD --steps 400                your code against a commit's

Both sides train with the same seeds, one after the other, the order swapped from pair to pair, so that a
machine that grows slower hits both alike. After each pair the interval of the difference says keep, drop, no
difference or undecided; the first verdict ends the trial. With chance 1 - ALPHA the true difference is in all
these intervals, so a wrong verdict comes in at most ALPHA of trials (dev/trial/sequential.py). Three pairs
and an estimated deviation show differences of some four deviations; a known deviation (--sigma, from an
earlier trial of the recipe) shows 1.7.

A run that is finished is not trained again: it is found by its settings, seed, data, code and machine,
wherever it lies below run.out_dir. So a trial can be stopped, started again, and prolonged by more seeds.
Fixed steps ask what a change is worth where each step costs the same, fixed seconds what it is worth. Result:
OUT/NAME.json, and OUT/NAME.md, an entry for dev/LOG.md.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import CommandParser, UserError, atomic_file, run_command, write_json
from dev.desk.training import MEASURES, Outcome, TrainingFailed, train_all
from dev.trial.plan import COMPARED, Plan, changed_files, differences, make_plan
from dev.trial.report import Pair, check_pair, format_report, journal_entry, make_report
from dev.trial.sequential import ALPHA, DROP, UNDECIDED, WORTH, Decision, decide
from formats.recipe import with_values

SHORTER = 0.8  # of the budget: the runs that measure what a step is worth
UNITS = {"seconds": "run.max_wallclock_seconds", "steps": "run.iterations"}

Train = Callable[..., list[Outcome]]


def train_pair(plan: Plan, seed: int, train: Train) -> Pair:
    """Train both sides with a seed: in turn, the order swapped from pair to pair, or at the same time."""
    sides = [plan.old, plan.new]
    if plan.seeds.index(seed) % 2:
        sides.reverse()
    jobs = [plan.job(side, seed, share) for side, share in zip(sides, plan.shares)]
    is_parallel = plan.shares[0] is not None
    found = train(jobs) if is_parallel else [run for job in jobs for run in train([job])]
    runs = {side.label: run for side, run in zip(sides, found)}
    pair = Pair(seed, **runs)
    check_pair(pair, plan.allowed)
    return pair


def is_verdict(error: TrainingFailed, plan: Plan) -> bool:
    """Whether it was the new side that diverged: a verdict on it, no fault of the trial."""
    is_new = error.job in [plan.job(plan.new, seed, error.job.share) for seed in plan.seeds]
    return is_new and error.has_diverged


def run_pairs(plan: Plan, train: Train, tell: Callable[[str], None]) -> tuple[list[Pair], Decision]:
    """Train pair after pair until the verdict is clear or the seeds are used up."""
    pairs: list[Pair] = []
    for seed in plan.seeds:
        tell(f"pair {len(pairs) + 1} of at most {len(plan.seeds)}: seed {seed}")
        pair = train_pair(plan, seed, train)
        pairs.append(pair)
        decision = decide([pair.difference for pair in pairs], plan.design)
        tell(
            f"seed {seed}: new {pair.new.val_bpb:.5f}, old {pair.old.val_bpb:.5f}, difference "
            f"{pair.difference:+.5f}; so far {decision.effect:+.5f} in [{decision.low:+.5f}, "
            f"{decision.high:+.5f}]: {decision.word}"
        )
        if decision.word != UNDECIDED:
            break
        left = len(plan.seeds) - len(pairs)
        seconds = (
            max(pair.new.wall_s, pair.old.wall_s) if plan.shares[0] else pair.new.wall_s + pair.old.wall_s
        )
        if left:
            tell(f"at most {left} more pairs, about {left * seconds / 60:.0f} minutes")
    return pairs, decision


def measure_exchange(plan: Plan, pairs: list[Pair], train: Train, tell) -> dict[int, Outcome]:
    """Train the old side once more with each seed, on a smaller budget: what is a step worth?"""
    unit, amount = next(iter(plan.budget.items()))
    amount = round(SHORTER * amount) if unit == "steps" else SHORTER * amount
    cfg = with_values(plan.old.cfg, {UNITS[unit]: amount}, "--exchange")
    side = plan.old._replace(cfg=cfg)
    tell(f"what a step is worth: {len(pairs)} runs of the old side with {amount:g} {unit}")
    return {pair.seed: train([plan.job(side, pair.seed, plan.shares[0])])[0] for pair in pairs}


def decide_trial(plan: Plan, args, train: Train, tell: Callable[[str], None]) -> tuple[dict, str, str]:
    """Run a trial; returns its object, its lines and its entry for the journal."""
    try:
        pairs, decision = run_pairs(plan, train, tell)
    except TrainingFailed as error:
        if not is_verdict(error, plan):
            raise
        facts = {"trial": plan.name, "verdict": DROP, "because": f"the new side diverged: {error}"}
        facts |= {"budget": plan.budget, "measure": plan.measure, "differences": differences(plan)}
        said = f"verdict: DROP: {facts['because']}"
        return facts, said, f"## {plan.name}\n\nChange: {plan.new.said}. Verdict: **drop**: it diverged.\n"
    shorter = measure_exchange(plan, pairs, train, tell) if args.exchange else {}
    report = make_report(plan, pairs, decision, shorter)
    return report, format_report(report, pairs), journal_entry(report, args.hypothesis)


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(prog="python -m dev.trial", description=__doc__)
    add = parser.add_argument
    field = "section.key=value"
    add("--recipe", help="recipe.toml or its folder; default: the contest's naive baseline")
    add("--set", nargs="+", action="extend", default=[], metavar=field, help="what the new side changes")
    add("--both", nargs="+", action="extend", default=[], metavar=field, help="what both sides change")
    add("--against", metavar="R2", help="recipe of the old side; default: --recipe")
    add("--against-code", metavar="COMMIT", help="the old side runs this commit's code")
    about = "how many at most, or which, with commas between (%(default)s)"
    add("--seeds", default="3", metavar="N", help=about)
    add("--seconds", type=float, metavar="S", help="training clock of every run; default: the recipes' own")
    add("--steps", type=int, metavar="N", help="steps of every run, without a clock")
    about = "score by the artifact, or by the float weights, without quantizer and scorer (%(default)s)"
    add("--measure", choices=MEASURES, default="artifact", help=about)
    about = "both sides of a pair at the same time, each on half of the cores or GPUs"
    add("--parallel", action="store_true", help=about)
    add(
        "--alpha",
        type=float,
        default=ALPHA,
        help="share of wrong verdicts, both kinds together (%(default)s)",
    )
    about = "known deviation of one pair's difference, in bits a byte; default: estimated from the pairs"
    add("--sigma", type=float, metavar="BPB", help=about)
    about = "smallest difference worth having (%(default)s): an interval within it is `no difference`"
    add("--worth", type=float, default=WORTH, metavar="BPB", help=about)
    about = f"measure what a step is worth: the old side again at {SHORTER:g} of --seconds or --steps"
    add("--exchange", action="store_true", help=about)
    about = "compare although the sides differ in it; machine: take finished runs of other machines"
    add("--allow", nargs="+", action="extend", default=[], choices=(*COMPARED, "machine"), help=about)
    add("--hypothesis", default="", help="a sentence for the journal")
    add("--name", default="", help="of the trial's files; default: time and what is set")
    add("--out", type=Path, default=Path("runs/trials"), help="folder of runs and results (%(default)s)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: list[str] | None = None, train: Train = train_all) -> int:
    """Run a trial."""
    args = build_parser().parse_args(argv)
    if args.exchange and args.seconds is None and args.steps is None:
        raise UserError("--exchange: expected --seconds or --steps to make smaller, found neither.")
    tell = partial(print, file=sys.stderr, flush=True)
    plan = make_plan(args)
    for name, (old, new) in differences(plan).items():
        tell(f"differs: {name}: {old} (old), {new} (new)")
    for name in changed_files(plan):
        tell(f"differs: {name}")
    try:
        report, lines, entry = decide_trial(plan, args, partial(train, tell=tell), tell)
    except KeyboardInterrupt:
        tell("finished runs are kept: the same command goes on with them")
        raise
    place = args.out / plan.name
    write_json(place.with_name(f"{place.name}.json"), report)
    with atomic_file(place.with_name(f"{place.name}.md")) as file:
        file.write(entry.encode())
    tell(f"entry for the journal: {place}.md")
    print(json.dumps(report) if args.json else lines)
    return 0


if __name__ == "__main__":
    run_command(main)
