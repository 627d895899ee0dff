"""What a trial compares: two sides, seeds, a budget; and what may not differ between the sides."""

import math
import re
import subprocess
import tarfile
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common import UserError, split_numbers
from dev.desk.training import (
    REPOSITORY,
    Job,
    Share,
    hash_of_code,
    hashes_of_data,
    settings,
    snapshot,
    split_machine,
)
from dev.trial.sequential import MOST_PAIRS, Design
from formats.preflight import check_recipe_path
from formats.recipe import with_values
from train_gpt import SOURCES, Config, load_config, name_rules, read_environment

SEEDS = (1337, 42, 2025, *range(1, MOST_PAIRS - 2))
NEW, OLD = "new", "old"
COMPARED = {  # what both sides must have in common, by the key of a run's origin
    "data": "training data",
    "validation": "validation text: bits a byte of two texts say nothing of each other",
    "tokenizer": "tokenizer",
}
NAME_CHARS = 80


class Side(NamedTuple):
    """One of the two configurations, any seed."""

    label: str  # NEW or OLD
    said: str  # how the command line named it
    cfg: Config
    root: Path  # the checkout whose code trains it


class Plan(NamedTuple):
    """A trial as it was asked for."""

    name: str
    new: Side
    old: Side
    seeds: tuple[int, ...]
    budget: dict[str, float]  # {"seconds": S}, {"steps": N}, or {}: the recipes' own
    measure: str
    design: Design
    out: Path
    shares: tuple[Share | None, ...]  # of the machine: one for each run in turn, two for both sides at once
    allowed: tuple[str, ...]  # of COMPARED, and "machine"

    def job(self, side: Side, seed: int, share: Share | None = None) -> Job:
        """Return the training of a side with a seed."""
        cfg = with_values(side.cfg, {"run.seed": seed}, "trial")
        label = f"seed {seed} {side.label}"
        return Job(cfg, self.measure, self.out, side.root, share, "machine" in self.allowed, label)


def read_seeds(text: str) -> tuple[int, ...]:
    """Read a number of seeds, or seeds with commas between; each once."""
    if "," not in text:
        count = split_numbers(text, "--seeds", int)[0]
        if not 2 <= count <= MOST_PAIRS:
            raise UserError(
                f"--seeds {text:.20}: expected 2 to {MOST_PAIRS} seeds, or the seeds themselves with commas "
                "between, as 1337,42,2025."
            )
        return SEEDS[:count]
    seeds = tuple(split_numbers(text.rstrip(","), "--seeds", int))
    if len(set(seeds)) < len(seeds) or not 2 <= len(seeds) <= MOST_PAIRS:
        raise UserError(f"--seeds {text:.60}: expected 2 to {MOST_PAIRS} different seeds, as 1337,42,2025.")
    return seeds


def budget_values(args: Namespace) -> tuple[dict[str, float], list[str]]:
    """Return the budget as {"seconds" or "steps": number}, and as overrides."""
    if args.seconds is not None and args.steps is not None:
        raise UserError("expected --seconds or --steps, found both: time and steps are different questions.")
    if args.seconds is not None:
        if not 0 < args.seconds < 1e9:
            raise UserError(f"--seconds {args.seconds}: expected a training time above 0, as 90.")
        return {"seconds": args.seconds}, [f"run.max_wallclock_seconds={args.seconds}"]
    if args.steps is not None:
        if not 1 <= args.steps < 10**9:
            raise UserError(f"--steps {args.steps}: expected a number of steps from 1 on, as 400.")
        return {"steps": args.steps}, [f"run.iterations={args.steps}", "run.max_wallclock_seconds=0"]
    return {}, []


def checkout(commit: str, folder: Path) -> Path:
    """Unpack a commit's files into a folder of its own, once; returns it."""
    git = ["git", "-C", str(REPOSITORY)]
    asked = [*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise UserError(f"--against-code {commit:.60}: expected a commit of this checkout, found none.")
    place = (folder / found.stdout.strip()[:12]).resolve()
    if not place.is_dir():
        with tempfile.TemporaryFile() as packed:
            subprocess.run([*git, "archive", found.stdout.strip()], stdout=packed, check=True)
            packed.seek(0)
            with tarfile.open(fileobj=packed) as files:
                files.extractall(place.with_suffix(".part"), filter="data")
        place.with_suffix(".part").replace(place)
    if not (place / "dev" / "desk" / "weights.py").is_file():
        raise UserError(
            f"--against-code {commit:.60}: expected a commit that has dev/desk, found an older one."
        )
    return place


def shares_of(is_parallel: bool) -> tuple[Share | None, ...]:
    """Return the machine's share of each run of a pair: all of it in turn, or half at the same time."""
    return tuple(split_machine(2)) if is_parallel else (None, None)


def make_plan(args: Namespace) -> Plan:
    """Resolve the command line; everything that can be refused is refused here, before any training."""
    budget, limits = budget_values(args)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: expected a folder, found a file. Name another.")
    if args.against:
        check_recipe_path(args.against, "--against")
    environment, seeds = read_environment().overrides, read_seeds(args.seeds)
    new = load_config(args.recipe, environment, [*args.both, *limits, *args.set])
    old = load_config(args.against or args.recipe, environment, [*args.both, *limits])
    here = snapshot(args.out / "code")
    root = checkout(args.against_code, args.out / "code") if args.against_code else here
    recipe = str(args.recipe or "the naive baseline")
    code = [f"code of {args.against_code}"] if args.against_code else []
    sides = [
        Side(NEW, " ".join([recipe, *args.both, *args.set]), new, here),
        Side(OLD, " ".join([str(args.against or recipe), *args.both, *code]), old, root),
    ]
    design = Design(len(seeds), args.alpha, args.sigma, args.worth)
    name = args.name or default_name(args.set or [Path(recipe).stem])
    shares = shares_of(args.parallel)
    plan = Plan(name, *sides, seeds, budget, args.measure, design, args.out, shares, tuple(args.allow))
    check_plan(plan)
    return plan


def default_name(words: list[str]) -> str:
    """Name a trial by the time and what it sets, as a file may be called."""
    said = re.sub(r"[^\w.=+-]+", "_", " ".join(words))
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{said}"[:NAME_CHARS].rstrip("._ ")


def differences(plan: Plan) -> dict[str, list]:
    """Return {"section.key": [old, new]} of the settings that differ, and the codes' hashes if they do."""
    old, new = settings(plan.old.cfg), settings(plan.new.cfg)
    found = {name: [old[name], new[name]] for name in new if old[name] != new[name]}
    codes = [hash_of_code(side.root) for side in (plan.old, plan.new)]
    return found | ({"code": codes} if codes[0] != codes[1] else {})


def changed_files(plan: Plan) -> list[str]:
    """Name the files of training's code that differ between the sides' checkouts, and those of one alone."""
    roots = [side.root for side in (plan.old, plan.new)]
    texts = [
        {path.relative_to(root).as_posix(): path.read_bytes() for name in SOURCES for path in root.glob(name)}
        for root in roots
    ]
    names = sorted(texts[0].keys() | texts[1].keys())
    return [name for name in names if texts[0].get(name) != texts[1].get(name)]


def check_plan(plan: Plan) -> None:
    """Raise for a trial that could not tell anything, or would compare what it was not asked to."""
    design = plan.design
    for option, value, holds, expected in (
        ("--alpha", design.alpha, 0 < design.alpha < 0.5, "a chance above 0 and below 0.5, as 0.05"),
        ("--worth", design.worth, 0 <= design.worth < math.inf, "a difference from 0 on, as 0.0005"),
        ("--sigma", design.sigma, 0 < (design.sigma or 0) < math.inf, "a deviation above 0, as 0.004"),
    ):
        if value is not None and not holds:
            raise UserError(f"{option} {value}: expected {expected}.")
    for name, holds, advice in name_rules(replace(plan.new.cfg.run, run_id=plan.name)):
        if not holds:
            raise UserError(f"--name {plan.name!r:.62}: {name} {advice}.")
    if not differences(plan):
        raise UserError(
            "both sides are the same: expected a setting that differs. Change one with --set "
            "section.key=value, name another recipe with --against, or other code with --against-code COMMIT."
        )
    hashes = [hashes_of_data(side.cfg.data) for side in (plan.old, plan.new)]
    for key, said in COMPARED.items():
        if hashes[0][key] != hashes[1][key] and key not in plan.allowed:
            raise UserError(
                f"the sides differ in their {said}: {hashes[0][key][:12]} (old), {hashes[1][key][:12]} "
                f"(new). Give both one with --both, or compare them all the same with --allow {key}."
            )
