"""Where cases happen: tiny data and recipes, runs in folders of their own, what undisturbed ones leave."""

import contextlib
import io
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from common import UserError, read_json, sha256_file
from data.codecs import load_codec
from data.documents import Document
from data.prepare import write_dataset
from data.shards import ALL_SHARDS_GLOB, MANIFEST_NAME, stated_hashes
from data.train_tokenizer import train_tokenizer
from dev.soak.child import Fault
from dev.soak.process import Job, Miss, kill_marked, launcher, make_environment, python
from durable.seals import split_events
from formats.checkpoints import METRICS_NAME, newest_checkpoint, read_result
from formats.state import read_state

VOCAB_SIZE = 300
NUM_STEPS = 24
TEMPORARIES = (".*.part", ".staging")
TINY = (
    "run.compile=off", f"run.iterations={NUM_STEPS}", "run.max_wallclock_seconds=0", "run.warmup_steps=1",
    "run.val_loss_every=0", "run.val_batch_tokens=512", "run.train_log_every=1", "run.device=cpu",
    "data.seq_len=16", "data.batch_tokens=128", "data.micro_batches=4",
    "model.num_layers=2", "model.model_dim=32", "model.num_heads=4", "model.num_kv_heads=2",
    "model.compute_dtype=float32", "schedule.warmdown_iters=12", "quant.float16_numel=0",
)  # fmt: skip
RECIPES = {
    "naive": (),
    "qat": (
        "quant.qat_start=0.4", "quant.matrix_bits=6", "quant.scale_floor=0", "quant.method=gptq",
        "quant.calib_batches=2",
    ),
    "swa": ("average.swa_every=2", "average.swa_below=0.9"),
    "ema": ("average.ema_decay=0.9", "optim.grad_clip_norm=0.5"),
    "staged": ("schedule.stages=0:16:128:4:1:0,0.5:32:256:4:0.7:0.5",),
}  # fmt: skip


class Reference(NamedTuple):
    """What an uninterrupted run leaves."""

    artifact: bytes
    losses: dict[int, float]  # step -> nats
    weights: dict[str, bytes] | None  # arrays of its last checkpoint; None where it kept none


def make_texts(count: int, seed: int) -> list[str]:
    """Make short texts of made-up words, different for every seed."""
    rng = Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(20, 60))) + f". {seed}-{i}\n" for i in range(count)]


def make_dataset(folder: Path, kind: str = "sentencepiece", seed: int = 1) -> Path:
    """Train a tokenizer of a kind in a folder and write shards beside it: some thousand tokens."""
    folder.mkdir(parents=True)
    train, val = make_texts(120, seed), make_texts(8, seed + 1)
    tokenizer = folder / "tokenizer.model"
    train_tokenizer(train, 400 if kind == "caseops" else VOCAB_SIZE, tokenizer, kind)
    documents = [[Document(text, str(i)) for i, text in enumerate(texts)] for texts in (train, val)]
    settings = {"shard_tokens": 6000, "num_threads": 1}
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        write_dataset(folder, load_codec(tokenizer), *documents, {"made_by": "dev.soak"}, **settings)
    return folder


def read_losses(folder: Path) -> dict[int, float]:
    """Read a run's training losses by step; raises for a broken line or two losses of one step."""
    losses: dict[int, float] = {}
    events, fault = split_events(folder / METRICS_NAME)
    if fault:
        raise Miss(fault)
    for event in events:
        if (
            event["kind"] == "train"
            and losses.setdefault(event["step"], event["train_loss"]) != event["train_loss"]
        ):
            raise Miss(f"step {event['step']} has two different losses")
    return losses


def step_of(checkpoint: Path | None) -> int:
    """The step in a checkpoint's name; -1 for none."""
    return int(checkpoint.stem.removeprefix("checkpoint_step")) if checkpoint else -1


def read_arrays(path: Path) -> dict[str, bytes]:
    """Read the arrays of a checkpoint, by where they stand in it."""
    found: dict[str, bytes] = {}

    def collect(tree, name: str) -> None:
        if isinstance(tree, np.ndarray):
            found[name] = tree.tobytes()
        for key, value in (
            tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else ())
        ):
            collect(value, f"{name}/{key}")

    try:
        collect(read_state(path)[0], "")
    except UserError as error:
        raise Miss(f"the last checkpoint cannot be read: {error}") from error
    return found


def write_texts(path: Path, count: int, seed: int) -> Path:
    """Write made-up texts as the lines of a .jsonl file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(count, seed)))
    return path


class Bench:
    """What the cases of one campaign share: the tiny dataset, and references made once."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.data = make_dataset(folder / "data")
        self.references: dict[tuple, Reference | Miss] = {}
        self.files = None  # of flips
        self.sound = None  # of mutations
        self.notes: Counter = Counter()  # how something was done, how often; for the report

    def open_place(self, name: str, number: int = 0) -> "Place":
        """Make the folder of a case, the number-th of its campaign."""
        return Place(self, self.folder / f"{name}_{number}", number)

    def reference(self, recipe: str, ranks: int, seed: int) -> Reference:
        """Return what an uninterrupted run of a recipe leaves."""
        key = recipe, ranks, seed
        if key not in self.references:
            try:
                self.references[key] = self.make_reference(*key)
            except Miss as miss:
                self.references[key] = miss
        if isinstance(self.references[key], Miss):
            raise self.references[key]
        return self.references[key]

    def make_reference(self, recipe: str, ranks: int, seed: int) -> Reference:
        """Run a recipe undisturbed."""
        place = self.open_place(f"reference_{recipe}_{ranks}_{seed}")
        try:
            job = place.train(recipe, "run.run_id=a", f"run.seed={seed}", "run.save_every=4", ranks=ranks)
            if job.end():
                raise Miss(f"{recipe}: an undisturbed run failed: {job.why()}")
            run, newest = place.run("a"), newest_checkpoint(place.run("a"))
            weights = read_arrays(newest) if step_of(newest) == NUM_STEPS else None
            return Reference((run / "artifact.bin").read_bytes(), read_losses(run), weights)
        finally:
            kill_marked(place.mark, place.jobs)
            place.close()

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


class Place:
    """One case: its folder, the processes that it started, and how to start them."""

    def __init__(self, bench: Bench, folder: Path, number: int):
        self.bench, self.folder, self.number, self.data = bench, folder, number, bench.data
        self.mark = uuid.uuid4().hex
        self.jobs: list[Job] = []
        self.runs = folder / "runs"
        (folder / "tmp").mkdir(parents=True)

    def own_data(self) -> Path:
        """Give the case a copy of the dataset that it may damage."""
        self.data = self.folder / "data"
        shutil.copytree(self.bench.data, self.data)
        return self.data

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.runs / name

    def start(self, *words: str, faults: Sequence[Fault] = (), ranks: int = 1, restarts: int = 0) -> Job:
        """Start a program of dev.soak.child; under torchrun for more ranks than one, or for restarts."""
        head = launcher(ranks, restarts) if ranks > 1 or restarts else python("-m")
        environment = make_environment(self.mark, faults, self.folder / "tmp")
        job = Job([*head, "dev.soak.child", *words], environment)
        self.jobs.append(job)
        return job

    def train(self, recipe: str, *words: str, **settings) -> Job:
        """Start a run of a recipe in this case's folder."""
        own = f"run.out_dir={self.runs}", f"data.data_path={self.data}"
        return self.start("train", *TINY, *RECIPES[recipe], *own, *words, **settings)

    def resume(self, name: str, **settings) -> Job:
        """Resume a run by its folder."""
        return self.start("train", "--resume", str(self.run(name)), **settings)

    def only_finished(self) -> str:
        """The name of the one run here that has a result."""
        found = sorted(path.parent.name for path in self.runs.glob("*/result.json"))
        if len(found) != 1:
            raise Miss(f"expected one finished run, found {len(found)}: {self.jobs[-1].why()}")
        return found[0]

    def check_run(self, name: str, reference: Reference) -> None:
        """Raise unless a run has ended with what the uninterrupted one left."""
        run = self.run(name)
        if not (run / "result.json").is_file():
            raise Miss(f"no result.json: {self.jobs[-1].why()}")
        losses, expected = read_losses(run), reference.losses
        odd = [step for step in expected if losses.get(step) != expected[step]]
        if odd:
            raise Miss(f"step {odd[0]}: expected the loss {expected[odd[0]]}, found {losses.get(odd[0])}")
        if (run / "artifact.bin").read_bytes() != reference.artifact:
            raise Miss("the artifact is not that of an uninterrupted run")
        newest = newest_checkpoint(run)
        if reference.weights and step_of(newest) == NUM_STEPS and read_arrays(newest) != reference.weights:
            raise Miss("the last checkpoint is not that of an uninterrupted run")
        self.check_own(run)
        self.check_temporaries()

    def check_own(self, run: Path) -> None:
        """Raise unless a run's result belongs to its log and its artifact."""
        result, log = read_result(run), (run / "train.log").read_text(encoding="utf-8")
        if {f"seed:{result['seed']}"} != {line for line in log.splitlines() if line.startswith("seed:")}:
            raise Miss(f"result.json is of seed {result['seed']}, the log beside it not")
        if result["artifact_sha256"] != sha256_file(run / "artifact.bin"):
            raise Miss("result.json and the artifact beside it are of two runs")

    def check_temporaries(self) -> None:
        """Raise where something half written has been left."""
        for pattern in TEMPORARIES:
            left = [path for root in (self.runs, self.data) for path in root.rglob(pattern)]
            if left:
                raise Miss(f"left behind: {left[0].name}")

    def check_clean_failure(self, job: Job) -> None:
        """Raise unless a process ended with status 1 and one sentence of its own."""
        status = job.end()
        errors = [line for line in job.lines if line.startswith("error: ")]
        if status == 0:
            raise Miss("something wrong was accepted: the process ended well")
        if not errors:
            raise Miss(f"ended with status {status} and no sentence: {job.why()}")

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_dataset(folder: Path) -> None:
    """Raise unless a dataset is whole: its manifest's shards and no others, with the bytes that it states."""
    manifest = read_json(folder / MANIFEST_NAME)
    stated = stated_hashes(folder)
    found = {path.name: sha256_file(path) for path in folder.glob(ALL_SHARDS_GLOB)}
    if found != stated:
        odd = min(name for name in {*found, *stated} if found.get(name) != stated.get(name))
        raise Miss(f"the dataset is mixed: {odd} is not what the manifest says")
    tokenizer = manifest["tokenizer"]
    if sha256_file(folder / tokenizer["file"]) != tokenizer["sha256"]:
        raise Miss("the dataset is mixed: its tokenizer is not the manifest's")
