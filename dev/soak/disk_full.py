"""The disk gets full in each kind of write: one sentence, the last good files stay, it goes on with room.

The disk is a small tmpfs where one may be mounted; elsewhere the process's own writes fail as on a full disk.
"""

import subprocess
from pathlib import Path
from random import Random

from dev.soak.child import Fault
from dev.soak.place import RECIPES, Bench, Place, check_dataset, write_texts
from dev.soak.process import Job, Miss

DISK_MIB = 8
SENTENCE = "disk is full"
# What is being written, and the point at which the disk gets full; how many bytes stay free is drawn.
WRITES = {
    "a checkpoint": ("file:checkpoint_step*", 4, 200_000),
    "a line of the log": ("line:step:9/*", 1, 0),
    "the artifact": ("file:artifact.bin", 1, 8_000),
    "result.json": ("file:result.json", 1, 0),
    "the recipe": ("file:recipe.toml", 1, 0),
    "a shard": ("file:fineweb_train_000001.bin", 1, 8_000),
    "the manifest": ("file:manifest.json", 1, 0),
    "a checkpoint at the end": ("line:step:24/* train_loss:*", 1, 0),
}


class SmallDisk:
    """A folder whose disk can get full: mounted, or else pretended."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
        self.is_mounted = run_quietly(command)

    def fault(self, what: str, rng: Random) -> Fault:
        """Return the fault that fills it."""
        point, count, most_free = WRITES[what]
        action = "fill" if self.is_mounted else "refuse"
        return Fault(point, action, count, value=rng.randint(0, most_free), folder=str(self.folder))

    def make_room(self) -> None:
        """Free the space."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Take it away."""
        if self.is_mounted:
            run_quietly(["umount", "--lazy", str(self.folder)])


def run_quietly(command: list[str]) -> bool:
    """Run a command; returns whether it worked."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def check_sentence(job: Job, what: str) -> None:
    """Raise unless a process ended with the one sentence on a full disk."""
    status = job.end()
    if status != 1 or not any(SENTENCE in line for line in job.lines):
        raise Miss(f"{what}: expected status 1 and a sentence on the full disk, found {status}: {job.why()}")


def fill_run(rng: Random, place: Place, disk: SmallDisk, what: str) -> None:
    """Fill the disk under a run, make room, resume."""
    recipe = rng.choice(list(RECIPES))
    reference = place.bench.reference(recipe, 1, place.bench.seed)
    place.runs = disk.folder / "runs"
    words = "run.run_id=a", f"run.seed={place.bench.seed}", "run.save_every=2"
    check_sentence(place.train(recipe, *words, faults=[disk.fault(what, rng)]), what)
    disk.make_room()
    last = place.train(recipe, *words, "run.resume=auto")
    if last.end():
        raise Miss(f"{what}: not resumed: {last.why()}")
    place.check_run(place.only_finished(), reference)


def fill_dataset(rng: Random, place: Place, disk: SmallDisk, what: str) -> None:
    """Fill the disk under data.prepare: the former dataset stays, and with room the command works."""
    texts = [write_texts(place.folder / f"{seed}.jsonl", 100, seed) for seed in (3, 4)]
    out = disk.folder / "data"
    tokenizer = place.bench.data / "tokenizer.model"
    words = (
        "prepare",
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(out),
        "--shard-tokens",
        "2000",
        "--val-docs",
        "5",
    )
    if place.start(*words, "--input", str(texts[0])).end():
        raise Miss(f"data.prepare failed: {place.jobs[-1].why()}")
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    second = *words, "--input", str(texts[1])
    check_sentence(place.start(*second, faults=[disk.fault(what, rng)]), what)
    if {path.name: path.read_bytes() for path in out.glob("*.*")} != before:
        raise Miss(f"{what}: the dataset that was there before has changed")
    disk.make_room()
    if place.start(*second).end():
        raise Miss(f"{what}: not written again: {place.jobs[-1].why()}")
    place.data = out
    check_dataset(out)
    place.check_temporaries()


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Fill the disk in one kind of write."""
    what = list(WRITES)[place.number % len(WRITES)]
    disk = SmallDisk(place.folder / "disk")
    bench.notes["disks: a mounted tmpfs" if disk.is_mounted else "disks: writes refused in the process"] += 1
    try:
        (fill_dataset if what in ("a shard", "the manifest") else fill_run)(rng, place, disk, what)
    finally:
        disk.close()
    return 1
