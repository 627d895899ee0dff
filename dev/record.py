"""Make a record: train every seed, score each from its artifact, compare, audit, write the folder.

    make record RECIPE=records/track_cpu/NAME/recipe.toml SEEDS=1337,42,2025
    python -m dev.record --recipe R --seeds 1337,42,2025 --against records/track_cpu/OLD
    python -m dev.record --recipe R --name 2026-11-21_Longer --data DIR run.max_wallclock_seconds=300

All seeds run one packed program, byte for byte the train_gpt.py of the record. Stopped and started again it
goes on where it was: runs/NAME keeps the program, a run folder a seed, and what a fresh process measured.
Nothing is written to --out while seeds disagree or the audit has a FAIL.
"""

import os
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import deque
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from audit.checks import FOLDER_NAME
from audit.folder import TRACKS
from common import (
    CommandParser,
    UserError,
    atomic_file,
    read_json,
    run_command,
    sha256_file,
    split_numbers,
)
from data.shards import TRAIN_GLOB, VAL_GLOB, find_shards
from dev.submission import (
    Record,
    Run,
    audit_deep,
    audit_folder,
    kept_run,
    merge_checks,
    write_claims,
    write_files,
)
from durable.seals import read_sealed, write_sealed
from eval.logs import parse_log, stable_config
from eval.stats import SeedScore, read_scores
from formats.checkpoints import read_result
from formats.recipe import config_fields, config_hash, config_value, read_recipe, seal_recipe, with_values
from pack.program import ENTRY, has_library, pack
from pack.readable import READABLE_NAME, write_readable
from train_gpt import (
    ARTIFACT_NAME,
    PLACE_FIELDS,
    Config,
    get_recipe,
    get_stages,
    load_config,
    open_tokenizer,
    read_environment,
)

PRIVATE_FIELDS = (*PLACE_FIELDS, "run.seed")  # what the seeds of a record may differ in
RUN_FILES = ("recipe.toml", "train.log", ENTRY.name, ARTIFACT_NAME)  # of a complete run, with result.json
AGAIN = "Delete it: the artifact is scored again."
TAIL_LINES = 20  # of a crashed run that the error shows

say = partial(print, flush=True)


class RecordPlan(NamedTuple):
    """What is to be made; the seed of `cfg` means nothing."""

    name: str  # of the record's folder: YYYY-MM-DD_Name
    recipe: Path
    cfg: Config
    seeds: list[int]
    out: Path  # records/TRACK
    against: list[Path]
    old: list[SeedScore]  # read from `against`: the row to beat; empty without one

    @property
    def work(self) -> Path:
        """The folder of everything on the way: program, run folders, the folder before it is published."""
        return Path(self.cfg.run.out_dir) / self.name

    @property
    def program(self) -> Path:
        return self.work / ENTRY.name

    @property
    def target(self) -> Path:
        return self.out / self.name

    def run_folder(self, seed: int) -> Path:
        return self.work / f"seed{seed}"


def child_environment() -> dict[str, str]:
    """Return the environment without the contest's names: a child runs what the plan says and no more."""
    names = {item.metadata["env"] for item in config_fields(Config).values()}
    return {name: value for name, value in os.environ.items() if name not in names}


def run_logged(command: list[str], label: str) -> None:
    """Run a command and show its lines; raise with the last ones where it fails."""
    tail = deque(maxlen=TAIL_LINES)
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=child_environment(), **settings) as process:
        for line in process.stdout:
            tail.append(line)
            say(f"{label}: {line.rstrip()}")
    if process.returncode != 0:
        raise UserError(
            f"{label}: expected success, found exit status {process.returncode} of "
            f"`{shlex.join(command)}`. Its last lines:\n{''.join(tail)}"
            "Fix this and rerun: complete seeds are not trained again."
        )


# ----------------------------------------------------------------------------------------------------------
# Plan and program
# ----------------------------------------------------------------------------------------------------------


def parse_seeds(text: str) -> list[int]:
    """Read comma-separated seeds, each once."""
    seeds = split_numbers(text, "--seeds", int)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text:.60}: expected different numbers, like 1337,42,2025.")
    return seeds


def make_plan(args: Namespace) -> RecordPlan:
    """Resolve the command line; every setting, place and name is checked before work starts."""
    places = {}
    if args.data:
        places = {"data.data_path": str(args.data)}
        if (args.data / "tokenizer.model").is_file():
            places["data.tokenizer_path"] = str(args.data / "tokenizer.model")
    overrides = [f"{name}={value}" for name, value in places.items()] + args.overrides
    cfg = load_config(str(args.recipe), read_environment().overrides, overrides)
    home = args.recipe.resolve().parent.name
    name = args.name or (home if FOLDER_NAME.fullmatch(home) else f"{date.today()}_{home}")
    if not FOLDER_NAME.fullmatch(name):
        raise UserError(f"--name: expected YYYY-MM-DD_Name without spaces, found {name!r}.")
    if args.out.name not in TRACKS:
        raise UserError(f"--out: expected records/ and one of {', '.join(TRACKS)}, found {args.out}.")
    old = read_scores(args.against) if args.against else []
    plan = RecordPlan(name, args.recipe, cfg, parse_seeds(args.seeds), args.out, args.against, old)
    check_target(plan)
    check_limits(plan)
    for pattern in (TRAIN_GLOB, VAL_GLOB):
        find_shards(Path(cfg.data.data_path) / pattern)
    open_tokenizer(cfg.data)
    return plan


def check_target(plan: RecordPlan) -> None:
    """Raise where the record would replace another; it may fill the folder of its own, unchanged recipe."""
    if not plan.target.exists():
        return
    at_home = plan.target.resolve() == plan.recipe.resolve().parent
    if not at_home or not is_unchanged(plan):
        reason = "its recipe is not the one that would run" if at_home else "it exists"
        raise UserError(f"{plan.target}: {reason}. Give the record another --name.")


def check_limits(plan: RecordPlan) -> None:
    """Raise where the settings allow a run more than the track does."""
    track = TRACKS[plan.out.name]
    limits = {"run.max_wallclock_seconds": track.train_s, "quant.limit_bytes": track.limit_bytes}
    for name, limit in limits.items():
        value = config_value(plan.cfg, name)
        if limit is not None and value > limit:
            raise UserError(f"{name}={value} is over the limit of {track.name}: set it to {limit} or less.")


def settings(cfg: Config) -> dict:
    """Return {"section.key": value} of what all seeds of a record share."""
    return {name: config_value(cfg, name) for name in config_fields(Config) if name not in PRIVATE_FIELDS}


def is_unchanged(plan: RecordPlan) -> bool:
    """Whether the recipe file alone, without environment and command line, gives the plan's settings."""
    return settings(with_values(Config(), read_recipe(plan.recipe), "recipe")) == settings(plan.cfg)


def make_program(plan: RecordPlan) -> None:
    """Pack the source with the shared recipe: the one program that all seeds run."""
    say("packing the program that all seeds run")
    recipe = get_recipe(plan.cfg, live=True)
    for section, key in (name.split(".") for name in PRIVATE_FIELDS):
        recipe[section].pop(key)
    with atomic_file(plan.work / "recipe.toml") as file:
        file.write(seal_recipe(recipe).encode())
    report = pack(plan.work / "recipe.toml", plan.program)
    for step in report.steps_left_out:
        say(f"packing left out {step}; the size is that of the file as written")
    say(f"program: {plan.program}, {report.packed_bytes:,} bytes")


# ----------------------------------------------------------------------------------------------------------
# Seeds
# ----------------------------------------------------------------------------------------------------------


def num_ranks(cfg: Config, most: int | None = None) -> int:
    """Return the most GPUs, of this machine or so many, that can share every step's micro-batches, or 1."""
    count = torch.accelerator.device_count() if cfg.run.device != "cpu" else 0
    count = count if most is None else min(most, count)
    fits = (n for n in range(count, 0, -1) if all(row.micro_batches % n == 0 for row in get_stages(cfg)))
    return next(fits, 1)


def training_command(plan: RecordPlan, seed: int) -> list[str]:
    """Spell out how a seed is trained: by torchrun on several GPUs."""
    data, ranks = plan.cfg.data, num_ranks(plan.cfg)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [
        sys.executable,
        *(torchrun if ranks > 1 else ()),
        str(plan.program),
        f"run.seed={seed}",
        f"run.run_id={plan.run_folder(seed).name}",
        f"run.out_dir={plan.work}",
        f"data.data_path={data.data_path}",
        f"data.tokenizer_path={data.tokenizer_path}",
    ]


def differences(plan: RecordPlan, seed: int) -> list[str]:
    """Say in what a complete run folder is not the plan's run of a seed."""
    folder = plan.run_folder(seed)
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if missing:
        return [f"{', '.join(missing)} missing"]
    result, expected = read_result(folder), settings(plan.cfg)
    found = settings(with_values(plan.cfg, read_recipe(folder / "recipe.toml"), str(folder)))
    places = {name: config_value(plan.cfg, name) for name in PLACE_FIELDS if name.startswith("data.")}
    found |= {name: result["places"][name] for name in places} | {"run.seed": result["seed"]}
    expected |= places | {"run.seed": seed}
    odd = [name for name, value in expected.items() if found[name] != value]
    changed = [f"{name} is {found[name]}, not {expected[name]}" for name in odd]
    if not changed and result["config_hash"] != config_hash(plan.cfg):
        changed.append(f"config_hash is {result['config_hash']}, not {config_hash(plan.cfg)}")
    if sha256_file(folder / ARTIFACT_NAME) != result["artifact_sha256"]:
        changed.append(f"{ARTIFACT_NAME} is not the file that result.json describes")
    if not changed and sha256_file(folder / ENTRY.name) != sha256_file(plan.program):
        changed.append(f"{ENTRY.name} is another program than the source packs to now")
    return changed


def train_seed(plan: RecordPlan, seed: int) -> None:
    """Train a seed unless its run folder is complete; raise where that is a run of something else."""
    folder, label = plan.run_folder(seed), f"seed {seed}"
    if not (folder / "result.json").is_file():
        if folder.is_dir():  # of a training that was cut off: a packed program keeps nothing to go on from
            shutil.rmtree(folder)
        say(f"{label}: training, {plan.seeds.index(seed) + 1} of {len(plan.seeds)}")
        run_logged(training_command(plan, seed), label)
    changed = differences(plan, seed)
    if changed:
        raise UserError(
            f"{folder}: not a complete run of this record: {'; '.join(changed)}. Delete the folder to "
            "train the seed again, or give the record another --name."
        )
    say(f"{label}: complete, {folder}")


def evaluate_seed(plan: RecordPlan, seed: int) -> Run:
    """Score a seed's artifact in a fresh process, once; returns all that is known of the seed."""
    folder = plan.run_folder(seed)
    path, result = folder / "evaluation.json", read_result(folder)
    if not path.is_file() or read_sealed(path, AGAIN)["artifact_sha256"] != result["artifact_sha256"]:
        say(f"seed {seed}: scoring the artifact in a fresh process")
        part = folder / "evaluation.part"
        command = [sys.executable, "-m", "eval", str(folder), "--json"]
        with open(part, "w", encoding="utf-8") as file:
            child = subprocess.run(command, stdout=file, env=child_environment(), check=False)
        if child.returncode != 0:
            raise UserError(
                f"seed {seed}: expected val_bpb {result['score']['val_bpb']:.8f} again in a fresh process, "
                f"found what stands above. `{shlex.join(command)}` repeats it."
            )
        write_sealed(path, read_json(part))
        part.unlink()
    text = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    return Run(seed, folder, result, read_sealed(path, AGAIN), parse_log(f"train_seed{seed}.log", text))


def check_agreement(runs: list[Run]) -> None:
    """Raise unless all seeds ran one configuration and were scored on one text."""
    facts = [
        stable_config(run.log)
        | {f"score {name}": run.evaluation[name] for name in ("num_tokens", "num_bytes", "mode")}
        for run in runs
    ]
    values = {key: [str(row.get(key)) for row in facts] for key in sorted(set().union(*facts))}
    differing = [f"  {key}: {', '.join(found)}\n" for key, found in values.items() if len(set(found)) > 1]
    if differing:
        seeds = ", ".join(str(run.seed) for run in runs)
        raise UserError(
            f"seeds {seeds}: expected one configuration, found differences:\n{''.join(differing)}"
            "Delete the run folders of the odd ones and start again on one machine."
        )


# ----------------------------------------------------------------------------------------------------------
# Record
# ----------------------------------------------------------------------------------------------------------


def git_author() -> str:
    """Return the name that git would sign with; empty without one."""
    asked = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def build(plan: RecordPlan, runs: list[Run], args: Namespace) -> Path:
    """Write the folder in runs/NAME, audit it, write what the audit says into it; returns the folder.

    Raises where a check FAILs.
    """
    staged = plan.work / "staged" / plan.out.name / plan.name
    shutil.rmtree(staged, ignore_errors=True)
    recipe = plan.recipe if is_unchanged(plan) else plan.work / "recipe.toml"
    about = {"author": args.author or git_author(), "github_id": args.github_id, "blurb": args.blurb}
    # The text of another record tells of other data and numbers: this one starts with its name.
    intro = plan.recipe.parent / "README.md" if plan.recipe.parent.name == plan.name else Path()
    track = TRACKS[plan.out.name]
    record = Record(plan.name, track, plan.cfg, recipe, intro, runs, plan.old, about)
    write_files(staged, record)
    if has_library("ruff"):
        write_readable(plan.work / "recipe.toml", staged / READABLE_NAME)
    else:
        say(f"left out {READABLE_NAME}: it needs ruff (pip install ruff)")
    write_claims(staged, record, [])
    say(f"auditing {staged}")
    reports = audit_deep(staged, kept_run(runs)) if args.audit == "all" else []
    checks = merge_checks(*reports, audit_folder(staged, plan.against))
    write_claims(staged, record, checks)
    checks = merge_checks(*reports, audit_folder(staged, plan.against))
    for check in checks:
        if check["verdict"] in ("FAIL", "SUSPECT"):
            say(f"{check['id']} {check['verdict']}: {'; '.join(check['evidence'])}")
    failed = [check["id"] for check in checks if check["verdict"] == "FAIL"]
    if failed:
        raise UserError(
            f"{staged}: no record is written: the audit FAILs {', '.join(failed)} (evidence above). "
            f"`python -m audit {staged}` repeats it."
        )
    return staged


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(prog="python -m dev.record", description=__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="recipe.toml")
    add("--seeds", default="1337,42,2025", help="comma-separated (%(default)s)")
    add("--out", type=Path, default=Path("records/track_cpu"), help="track (%(default)s)")
    add("--name", default="", help="YYYY-MM-DD_Name; default: the recipe's folder")
    row = "record, run folder or log of the row to beat; repeatable"
    add("--against", type=Path, action="append", default=[], help=row)
    add("--data", type=Path, help="folder of shards and tokenizer.model; default: the recipe's")
    quick = "folder: seconds, without what runs the program"
    add("--audit", choices=("all", "folder"), default="all", help=quick)
    for name in ("author", "github-id", "blurb"):
        add(f"--{name}", default="", help=f"`{name.replace('-', '_')}` of submission.json")
    add("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make a record, or go on making it."""
    args = build_parser().parse_args(argv)
    plan = make_plan(args)
    say(f"record {plan.target}: seeds {', '.join(map(str, plan.seeds))}; work in {plan.work}")
    if not (args.author or git_author()) or not args.github_id:
        say("submission.json will lack your name: add --author and --github-id, or fill them in later")
    clock = plan.cfg.run.max_wallclock_seconds
    if clock:
        minutes = len(plan.seeds) * (clock + 120) / 60
        say(f"about {minutes:.0f} minutes; Ctrl-C stops it, the same command goes on with what is done")
    make_program(plan)
    for seed in plan.seeds:
        train_seed(plan, seed)
    runs = [evaluate_seed(plan, seed) for seed in plan.seeds]
    check_agreement(runs)
    staged = build(plan, runs, args)
    shutil.copytree(staged, plan.target, dirs_exist_ok=True)
    say(f"record written: {plan.target}")
    return 0


if __name__ == "__main__":
    run_command(main)
