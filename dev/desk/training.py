"""Train a configuration in a process of its own, once: a finished run that is the same is found again.

Two runs are the same if all that a result depends on is: every setting but names, places and what is only
logged; seed; training data, validation text and tokenizer by their hashes; the code's hash; number of ranks;
machine, its number of threads included, because time decides how far a run gets.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from common import UserError, atomic_file, parse_json
from data.shards import VAL_GLOB, digest_of_data
from dev.desk import child
from dev.desk.runs import WEIGHTS_NAME
from dev.record import child_environment, num_ranks
from durable.lock import LOCK_NAME, acquire
from durable.seals import digest_of, read_sealed
from formats.checkpoints import METRICS_NAME, RESULT_NAME
from formats.recipe import config_fields, config_hash, config_value, read_recipe, seal_recipe, with_values
from kernels.machine import machine_facts, resolve_device
from train_gpt import (
    ONCE_FIELDS,
    PLACE_FIELDS,
    RECIPE_NAME,
    Config,
    DataConfig,
    code_digest,
    identity,
)

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURES = {"artifact": RESULT_NAME, "weights": WEIGHTS_NAME}  # what a run is scored by: the file it leaves
# What changes no result: names and places (data count by their hashes), what is logged and kept.
WITHOUT_EFFECT = {"run.seed", *PLACE_FIELDS, *ONCE_FIELDS}
WITHOUT_EFFECT |= {"run.save_every", "run.enforce_limits", "run.train_log_every", "run.val_loss_every"}
WITHOUT_EFFECT |= {name for name in config_fields(Config) if name.startswith("watch.")}
DATA_PLACES = ("data.data_path", "data.tokenizer_path")
# A job keeps no checkpoints, and is measured even if it is over a limit: the outcome says so.
OF_A_JOB = {"run.save_every": -1, "run.enforce_limits": False, "run.overwrite": True, "run.resume": "off"}
PROGRESS = re.compile(r"(?P<what>[\w ]+): (?P<percent>\d+)% seconds_left:(?P<left>\d+)$")
LOOK_EVERY_S, TELL_EVERY_S = 0.3, 5.0
END_S = 15.0  # a run may take to end by itself
DIVERGED = ("expected a finite train_loss", "expected finite costs")  # of a run's error
TAIL_LINES = 12  # of a failed run that the error shows


class Share(NamedTuple):
    """The part of this machine that a run computes on."""

    threads: int
    cores: tuple[int, ...] = ()  # empty: any
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: all


class Job(NamedTuple):
    """A training that is wanted."""

    cfg: Config  # resolved, with seed and budget
    measure: str = "artifact"  # or "weights": float, without quantizer and artifact, in half the time
    out: Path = Path("runs/trials")  # folder of the run's folder
    root: Path = REPOSITORY  # the checkout whose code trains
    share: Share | None = None  # None: the whole machine
    any_machine: bool = False  # also take a finished run from another machine
    label: str = ""  # what progress calls it


class Outcome(NamedTuple):
    """What a finished run says of itself."""

    folder: Path
    val_bpb: float
    val_loss: float  # nats a token
    steps: int
    train_s: float  # on the training clock
    wall_s: float  # of everything
    num_bytes: int  # code + artifact; 0 where only weights were measured
    tokens_per_second: float
    over_limits: list[str]
    score: dict  # what was scored, and how
    origin: dict  # what the result depends on besides its recipe
    was_found: bool  # not trained now


class TrainingFailed(UserError):
    """A job whose process ended with an error; `output` are its last lines."""

    def __init__(self, job: Job, folder: Path, status: int, output: list[str]):
        said = "".join(f"\n  {line}" for line in output) or " nothing"
        super().__init__(
            f"{folder}: expected a finished run, found exit status {status}. Mend this and start again: "
            f"finished runs are not trained twice. It said:{said}"
        )
        self.job, self.output = job, output

    @property
    def has_diverged(self) -> bool:
        """Whether training came to no finite loss: a finding, and no fault."""
        return any(words in line for line in self.output for words in DIVERGED)


# ----------------------------------------------------------------------------------------------------------
# Machine and identity
# ----------------------------------------------------------------------------------------------------------


def whole_machine() -> Share:
    """Return the share of a run that is alone."""
    return Share(torch.get_num_threads())


def split_machine(parts: int) -> list[Share]:
    """Divide cores, and GPUs where there are as many, among runs at the same time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.accelerator.device_count()
    gpus = gpus if gpus != [""] else [str(index) for index in range(count)]
    gpus = gpus if len(gpus) >= parts and count else []
    num_cores = len(cores) or os.cpu_count() or 1
    if num_cores < parts:
        raise UserError(
            f"expected a core for each of {parts} runs at a time, found {num_cores}. Run fewer at a time."
        )
    return [
        Share(
            num_cores * (part + 1) // parts - num_cores * part // parts,
            tuple(cores[len(cores) * part // parts : len(cores) * (part + 1) // parts]),
            tuple(gpus[len(gpus) * part // parts : len(gpus) * (part + 1) // parts]),
        )
        for part in range(parts)
    ]


def settings(cfg: Config) -> dict:
    """Return {"section.key": value} of what can change a result, the seed apart."""
    return {name: config_value(cfg, name) for name in config_fields(Config) if name not in WITHOUT_EFFECT}


@cache
def hashes_of_data(data: DataConfig) -> dict[str, str]:
    """Return the hashes of training data, validation text and tokenizer."""
    found = identity(replace(Config(), data=data))
    validation = digest_of_data(Path(data.data_path), VAL_GLOB)
    return {"data": found["data"], "validation": validation, "tokenizer": found["tokenizer"]}


@cache
def hash_of_code(root: Path) -> str:
    """Hash a checkout's code, once."""
    return code_digest(root)


def snapshot(folder: Path) -> Path:
    """Copy this checkout's code into folder/<hash>, once, so that it may be edited while runs train.

    Returns the copy, or the checkout itself where there is no git to name its files.
    """
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    command += ["*.py", ":!tests", ":!records"]
    try:
        said = os.fsdecode(subprocess.run(command, capture_output=True, check=False).stdout)
    except FileNotFoundError:  # no git
        said = ""
    files = {name for name in said.split("\0") if name and (REPOSITORY / name).is_file()}
    if "train_gpt.py" not in files:
        return REPOSITORY
    found = {name: (REPOSITORY / name).read_bytes() for name in sorted(files)}
    key = digest_of({name: hashlib.sha256(text).hexdigest() for name, text in found.items()})
    place = folder.resolve() / key[:12]
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
            for name, text in found.items():
                path = Path(part, "code", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
            with suppress(OSError):  # another command was faster
                Path(part, "code").rename(place)
    return place


def ranks_of(job: Job) -> int:
    """Return how many processes train a job."""
    share = job.share or whole_machine()
    return num_ranks(job.cfg, len(share.gpus) or None)


def origin_of(job: Job) -> dict:
    """Say what the result of a job will depend on besides its settings, as a run's result says it."""
    share, ranks = job.share or whole_machine(), ranks_of(job)
    machine = machine_facts(resolve_device(job.cfg.run.device))
    machine["threads"] = share.threads if ranks == 1 else 1  # as torchrun sets it
    facts = {
        "seed": str(job.cfg.run.seed),
        "code": hash_of_code(job.root),
        "ranks": ranks,
        "machine": machine,
    }
    return hashes_of_data(job.cfg.data) | facts


def run_id(job: Job) -> str:
    """Name a job's run folder: recipe, seed, measure, and a hash of all that its result depends on."""
    key = digest_of(settings(job.cfg) | {"origin": origin_of(job), "measure": job.measure})[:8]
    return f"{config_hash(job.cfg)[:8]}_seed{job.cfg.run.seed}_{job.measure}_{key}"


# ----------------------------------------------------------------------------------------------------------
# Finished runs
# ----------------------------------------------------------------------------------------------------------


def read_outcome(folder: Path, measure: str, was_found: bool = False) -> Outcome:
    """Read a finished run's folder; raises a UserError where its result is damaged."""
    result = read_sealed(folder / MEASURES[measure], "Train it again.")
    score = result["score"]
    return Outcome(
        folder,
        score["val_bpb"],
        score["val_loss"],
        result["steps"],
        result["train_ms"] / 1000,
        sum(result["seconds"].values()),
        sum(size for _, size in result.get("ledger", [])),
        result["tokens_per_second"],
        result["over_limits"],
        {name: value for name, value in score.items() if name not in ("val_bpb", "val_loss", "seconds")},
        result.get("origin", {}),
        was_found,
    )


def places_to_look(job: Job) -> Iterator[Path]:
    """Yield the folders in which the same run may lie: the job's own first."""
    found = [job.out / run_id(job)]
    for root in (job.out, Path(job.cfg.run.out_dir)):
        found += (path.parent for path in sorted(root.glob(f"**/{MEASURES[job.measure]}")))
    yield from dict.fromkeys(found)


def is_same(folder: Path, job: Job, origin: dict) -> bool:
    """Whether a run folder holds the finished run of a job."""
    stated = read_sealed(folder / MEASURES[job.measure], "").get("origin", {})
    if {name: stated.get(name) for name in origin} != origin:
        return False
    return settings(with_values(Config(), read_recipe(folder / RECIPE_NAME), str(folder))) == settings(
        job.cfg
    )


def find_finished(job: Job, ignored: tuple[str, ...] = ()) -> Outcome | None:
    """Find the same run among those that are finished, in the job's folder or below run.out_dir.

    `ignored`: keys of its origin in which it may be another one.
    """
    ignored += ("machine",) * job.any_machine
    origin = {name: value for name, value in origin_of(job).items() if name not in ignored}
    for folder in places_to_look(job):
        with suppress(UserError, OSError, LookupError, TypeError, ValueError):  # damaged, or an older one
            if is_same(folder, job, origin):
                return read_outcome(folder, job.measure, was_found=True)
    return None


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


class Running:
    """A job in work: its process, and what it says on its way."""

    def __init__(self, job: Job):
        self.job, self.folder = job, job.out / run_id(job)
        self.output = job.out / f"{self.folder.name}.output"
        self.name, self.told_at = job.label or self.folder.name, time.monotonic()
        self.read_bytes = {self.output: 0, self.folder / METRICS_NAME: 0}
        job.out.mkdir(parents=True, exist_ok=True)
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                self.command(),
                cwd=job.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the command, which stops its runs
            )

    def command(self) -> list[str]:
        """Spell out the training, and write its recipe."""
        job, ranks = self.job, ranks_of(self.job)
        recipe: dict[str, dict] = {}
        for name, field in config_fields(Config).items():  # what is not said, other code may not know
            value = config_value(job.cfg, name)
            if name not in PLACE_FIELDS + ONCE_FIELDS and (value != field.default or name == "run.seed"):
                section, key = name.split(".")
                recipe.setdefault(section, {})[key] = value
        path = job.out / f"{self.folder.name}.toml"
        with atomic_file(path) as file:
            file.write(seal_recipe(recipe).encode())
        program = {"artifact": ["train_gpt.py"], "weights": ["-m", "dev.desk.weights"]}[job.measure]
        if ranks > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *program]
        places = {"run.out_dir": job.out.resolve(), "run.run_id": self.folder.name}
        places |= {name: Path(config_value(job.cfg, name)).resolve() for name in DATA_PLACES}
        overrides = [f"{name}={value}" for name, value in {**places, **OF_A_JOB}.items()]
        cores = ",".join(map(str, (job.share or whole_machine()).cores)) or "all"
        head = [sys.executable, child.__file__, str(os.getpid()), cores, *program]
        return [*head, "--recipe", str(path.resolve()), *overrides]

    def environment(self) -> dict[str, str]:
        """Return the environment of the training: no settings, its share of the machine."""
        share = self.job.share or whole_machine()
        found = child_environment() | {"PYTHONUNBUFFERED": "1"}
        found |= {"OMP_NUM_THREADS": str(share.threads)} if ranks_of(self.job) == 1 else {}
        return found | ({"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {})

    def new_lines(self, path: Path) -> list[str]:
        """Return the whole lines that a file has grown by since the last call."""
        try:
            with open(path, "rb") as file:
                file.seek(self.read_bytes[path])
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.read_bytes[path] += len(whole)
        return whole.decode("utf-8", "replace").splitlines()

    def events(self) -> list[dict]:
        """Return the events of metrics.jsonl since the last call."""
        found = []
        for line in self.new_lines(self.folder / METRICS_NAME):
            with suppress(UserError):  # half a line
                found.append(parse_json(line, self.folder, strict=False))
        return found

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End the run: what it has trained is lost."""
        if self.is_alive():
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> Outcome:
        """Wait for the end and read the result; raises TrainingFailed with the last lines.

        Also raises where another code trained than the job's: it was edited in the meantime.
        """
        status = self.process.wait()
        if status != 0 or not (self.folder / MEASURES[self.job.measure]).is_file():
            tail = self.output.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:]
            raise TrainingFailed(self.job, self.folder, status, tail)
        for path in (self.output, self.output.with_suffix(".toml")):
            path.unlink(missing_ok=True)
        found = read_outcome(self.folder, self.job.measure)
        expected, code = hash_of_code(self.job.root), found.origin.get("code")
        if code != expected:
            raise UserError(
                f"{self.folder}: expected a run of the code {expected}, found {code}: {self.job.root} was "
                "edited while it trained. Start again."
            )
        return found


def start_training(job: Job) -> Running:
    """Start a job in a process of its own; the folder must be nobody's (await_folder)."""
    return Running(job)


def await_folder(job: Job, tell: Callable[[str], None]) -> None:
    """Wait while another process trains the same job."""
    folder, told = job.out / run_id(job), False
    while folder.is_dir() and not acquire_for_a_moment(folder):
        if not told:
            tell(f"{folder}: another process trains the same; waiting for it")
            told = True
        time.sleep(LOOK_EVERY_S)


def acquire_for_a_moment(folder: Path) -> bool:
    """Whether nobody holds a run folder."""
    lock = FileLock(folder / LOCK_NAME, thread_local=False)
    is_free = acquire(lock, 0.0)
    lock.release()
    return is_free


def train(job: Job, tell: Callable[[str], None] = print) -> Outcome:
    """Return the outcome of a job: found again, or trained now. Progress is told a line at a time."""
    return train_all([job], tell)[0]


def train_all(jobs: list[Job], tell: Callable[[str], None] = print) -> list[Outcome]:
    """Train jobs at the same time; those that are finished are found again."""
    found: list[Outcome | None] = []
    for job in jobs:
        await_folder(job, tell)
        found.append(find_finished(job))
        tell(f"  {job.label or run_id(job)}: {said_of_start(job, found[-1])}")
    running = [start_training(job) for job, outcome in zip(jobs, found) if outcome is None]
    trained = iter(see_through(running, partial(tell_progress, tell=tell), LOOK_EVERY_S))
    return [outcome or next(trained) for outcome in found]


def see_through(running: list[Running], look: Callable[[Running], None], every_s: float) -> list[Outcome]:
    """Look at runs now and then until all have ended; stops them where that, or one of them, raises."""
    try:
        while any(run.is_alive() for run in running):
            for run in running:
                look(run)
            time.sleep(every_s)
        return [run.outcome() for run in running]
    finally:
        for run in running:
            run.stop()


def said_of_start(job: Job, found: Outcome | None) -> str:
    """Say whether a job trains, and which run of it other code has left."""
    if found:
        return f"finished before, {found.folder}"
    older = find_finished(job, ("code",))
    other = f" (a run of it by other code, {older.origin['code']}, does not count)" if older else ""
    return f"trains in {job.out / run_id(job)}{other}"


def tell_progress(run: Running, tell: Callable[[str], None]) -> None:
    """Pass on what a run says of its progress."""
    for line in run.new_lines(run.output):
        said, now = PROGRESS.match(line), time.monotonic()
        if said and now - run.told_at > TELL_EVERY_S:
            run.told_at = now
            tell(f"  {run.name}: {said['what']} {said['percent']} %, {said['left']} s left of it")
