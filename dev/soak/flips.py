"""Files are damaged by a bit, cut short or grown: each is refused in a sentence, none trained on or scored.

A damaged file is given to what reads it at the start of a run, in this process; every COMMAND_EVERY-th one
through the command line as well. A manifest in which no value that matters has changed is no damage.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

import train_gpt
from common import UserError
from data.intact import ShardVerifier
from data.shards import MANIFEST_NAME, TRAIN_GLOB, VAL_GLOB, find_shards
from dev.soak.child import Fault
from dev.soak.place import NUM_STEPS, TINY, Bench, Place, make_dataset
from dev.soak.process import Miss
from formats.checkpoints import NUMBERED_GLOB, newest_checkpoint
from formats.state import read_state

COMMAND_EVERY = 100
HEADER_BYTES = 1024  # in which half of the damage to headers falls
MOST_GARBAGE = 64
RECIPE = "naive"
SIDECAR_GLOB = "fineweb_val_bytes_*.bin"


class Damage(NamedTuple):
    """A way to damage bytes and how often it is drawn."""

    name: str
    weight: int
    apply: Callable[[Random, bytes], bytes]


def flip_bit(rng: Random, blob: bytes, below: int = 0) -> bytes:
    """Flip a bit, of the first bytes where `below` says how many."""
    at = rng.randrange(min(below, len(blob)) or len(blob))
    return blob[:at] + bytes([blob[at] ^ 1 << rng.randrange(8)]) + blob[at + 1 :]


DAMAGES = (
    Damage("a bit flipped", 60, flip_bit),
    Damage("a bit of the header flipped", 20, lambda rng, blob: flip_bit(rng, blob, HEADER_BYTES)),
    Damage("cut short", 10, lambda rng, blob: blob[: rng.randrange(len(blob))]),
    Damage("grown", 10, lambda rng, blob: blob + rng.randbytes(rng.randint(1, MOST_GARBAGE))),
)


class Target(NamedTuple):
    """A kind of file, how often it is drawn, what reads it, and what the command line would do with it."""

    name: str
    weight: int
    find: Callable[["Files"], list[Path]]
    read: Callable[["Files", Path], object]
    command: Callable[["Files", Path], list[str]]


class Files:
    """Sound files of every kind: a finished run with checkpoints, its dataset, another with a sidecar."""

    def __init__(self, bench: Bench, place: Place):
        self.folder = place.folder
        self.data, self.caseops = place.own_data(), make_dataset(place.folder / "caseops", "caseops")
        job = place.train(
            RECIPE, "run.run_id=a", f"run.seed={bench.seed}", f"run.save_every={NUM_STEPS // 3}"
        )
        if job.end():
            raise Miss(f"an uninterrupted run failed: {job.why()}")
        self.run = place.run("a")
        for target in TARGETS:  # what is sound must pass, or refusals mean nothing
            for path in target.find(self):
                target.read(self, path)

    def dataset_of(self, path: Path) -> Path:
        """The dataset that a file is in."""
        return self.caseops if self.caseops in path.parents else self.data


def config_of(data: Path):
    """Resolve the tiny recipe on a dataset."""
    return train_gpt.load_config(None, {}, [*TINY, f"data.data_path={data}"])


def read_dataset(files: Files, path: Path) -> None:
    """Read a dataset as a run does: manifest, tokenizer, validation, sidecar, training shards."""
    cfg = config_of(files.dataset_of(path))
    train_gpt.load_validation(cfg.data)
    shards = find_shards(Path(cfg.data.data_path) / TRAIN_GLOB)
    train_gpt.open_loader(cfg, 1)
    ShardVerifier(shards).wait()


def read_artifact(files: Files, path: Path) -> None:
    """Load an artifact as scoring does."""
    train_gpt.load_artifact(path, config_of(files.data), torch.device("cpu"))


def dataset_command(files: Files, path: Path) -> list[str]:
    """The words of a run on a damaged dataset."""
    return [*TINY, f"data.data_path={files.dataset_of(path)}", f"run.out_dir={files.folder / 'damaged'}"]


def in_dataset(pattern: str) -> Callable[[Files], list[Path]]:
    """Find files of the dataset."""
    return lambda files: [path for path in sorted(files.data.glob(pattern)) if "_bytes_" not in path.name]


TARGETS = (
    Target(
        "checkpoint", 25, lambda files: sorted(files.run.glob(NUMBERED_GLOB)),
        lambda files, path: read_state(path),
        lambda files, path: [*TINY, f"data.data_path={files.data}", f"run.out_dir={files.run.parent}",
                             "--resume", str(path)],
    ),
    Target("training shard", 20, in_dataset(TRAIN_GLOB), read_dataset, dataset_command),
    Target("validation shard", 20, in_dataset(VAL_GLOB), read_dataset, dataset_command),
    Target(
        "artifact", 15, lambda files: [files.run / "artifact.bin"], read_artifact,
        lambda files, path: [*TINY, f"data.data_path={files.data}", "--score", str(path)],
    ),
    Target("manifest", 8, in_dataset(MANIFEST_NAME), read_dataset, dataset_command),
    Target("tokenizer", 6, in_dataset("tokenizer.model"), read_dataset, dataset_command),
    Target(
        "sidecar", 6, lambda files: sorted(files.caseops.glob(SIDECAR_GLOB)), read_dataset, dataset_command,
    ),
)  # fmt: skip


def what_matters(blob: bytes):
    """Return what of a manifest decides: tokenizer, shards, byte total; None where it is no manifest."""
    try:
        manifest = json.loads(blob)
        tokenizer, val = manifest["tokenizer"], manifest["val"]
        named = [tokenizer[key] for key in ("kind", "file", "sha256", "vocab_size")]
        shards = [
            [shard["file"], shard["bytes"], shard["sha256"]]
            for split in (manifest["train"], val)
            for shard in split["shards"] + split.get("sidecars", [])
        ]
        return named, shards, val["expected_token_bytes"]
    except (ValueError, KeyError, TypeError):
        return None


def damage(rng: Random, target: Target, path: Path) -> tuple[str, bytes]:
    """Draw damage that matters to a file; returns its name and the damaged bytes."""
    blob = path.read_bytes()
    while True:
        how = rng.choices(DAMAGES, [one.weight for one in DAMAGES])[0]
        damaged = how.apply(rng, blob)
        if target.name != "manifest" or what_matters(damaged) != what_matters(blob):
            return how.name, damaged


@contextmanager
def replaced(path: Path, blob: bytes) -> Iterator[None]:
    """Give a file other bytes for a while; as another file, so that nothing mapped changes."""
    sound = path.with_suffix(".sound")
    path.rename(sound)
    try:
        path.write_bytes(blob)
        yield
    finally:
        sound.replace(path)


def check_refused(target: Target, files: Files, path: Path, how: str) -> None:
    """Raise unless what reads the file refuses it with a UserError."""
    what = f"{target.name}, {how}"
    try:
        target.read(files, path)
    except UserError:
        return
    except Exception as error:  # whatever a damaged file makes of a reader: it is what is looked for
        raise Miss(f"{what}: a traceback: {type(error).__name__}: {error}"[:200]) from error
    raise Miss(f"{what}: accepted")


def check_command(place: Place, target: Target, files: Files, path: Path, how: str) -> None:
    """Raise unless the command line refuses the file with status 1 and a sentence."""
    try:
        place.check_clean_failure(place.start("train", *target.command(files, path)))
    except Miss as miss:
        raise Miss(f"{target.name}, {how}, by the command line: {miss}") from miss


def check_fallback(rng: Random, bench: Bench, place: Place) -> None:
    """Raise unless a run whose newest checkpoint is damaged resumes from the one before and says so."""
    seed = f"run.seed={bench.seed}"
    fault = Fault(f"after:step:{NUM_STEPS * 3 // 4}/* train_loss:*", "kill")
    place.train(RECIPE, "run.run_id=a", seed, "run.save_every=4", faults=[fault]).end()
    newest = newest_checkpoint(place.run("a"))
    if newest is None:
        raise Miss("a killed run has left no checkpoint")
    newest.write_bytes(damage(rng, TARGETS[0], newest)[1])
    if rng.random() < 0.5:
        job = place.resume("a")
    else:
        job = place.train(RECIPE, seed, "run.save_every=4", "run.resume=auto")
    if job.end():
        raise Miss(f"newest checkpoint damaged: not resumed from the one before: {job.why()}")
    if not any(newest.name in line for line in job.lines):
        raise Miss("newest checkpoint damaged: no line names it")
    place.check_run("a", bench.reference(RECIPE, 1, bench.seed))


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Damage one file."""
    if place.number % COMMAND_EVERY == COMMAND_EVERY // 2:
        check_fallback(rng, bench, place)
        return 1
    if bench.files is None:
        bench.files = Files(bench, bench.open_place("sound"))
    files = bench.files
    known = [target for target in TARGETS if target.find(files)]
    target = rng.choices(known, [one.weight for one in known])[0]
    path = rng.choice(target.find(files))
    how, blob = damage(rng, target, path)
    with replaced(path, blob):
        check_refused(target, files, path, how)
        if place.number % COMMAND_EVERY == 0:
            check_command(place, target, files, path, how)
    return 1
