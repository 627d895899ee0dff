"""Signals in each phase of a run, to process, launcher or one rank: it ends, says so, and can go on."""

import re
import signal
from random import Random

from dev.soak.child import STALL_LINE, Fault
from dev.soak.place import RECIPES, Bench, Place, step_of
from dev.soak.process import GRACE_SECONDS, Job, Miss, wait_until_gone
from formats.checkpoints import newest_checkpoint

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
TO_LAUNCHER = ("SIGINT", "SIGTERM", "SIGHUP")  # what torchrun passes on; SIGUSR1 ends it without a word
STALL_SECONDS = 2.0
STEP = 7  # of the signals in training
# A phase, and the point at which its processes wait for the signal.
PHASES = {
    "before the first step": "after:warming up*",
    "training": f"after:step:{STEP}/* train_loss:*",
    "quantizing": "after:quantizing:*",
    "scoring": "line:scoring:*",
}


def stop_run(job: Job, number: int, ranks: int, to_launcher: bool) -> int:
    """Send the signal to a run that waits in its phase; returns the status."""
    for count in range(1, ranks + 1):
        if not job.wait_for(STALL_LINE, count):
            raise Miss(f"ended before the phase: {job.why()}")
    stalled = re.findall(rf"{STALL_LINE} pid:(\d+) rank:(\d+)", job.text)
    pids = {int(rank): int(pid) for pid, rank in stalled}
    job.send(number, job.process.pid if to_launcher else pids[ranks - 1])
    return job.end()


def check_words(job: Job, name: str, what: str, has_checkpoint: bool) -> None:
    """Raise unless the run says that it was stopped, and after training's checkpoint how to go on."""
    said = [line for line in job.lines if name in line or "stopped" in line.lower()]
    if not said:
        raise Miss(f"{what}: no line says that it was stopped; the last: {job.why()}")
    if has_checkpoint and not any("--resume" in line for line in job.lines):
        raise Miss(f"{what}: no line says how to go on")


def choose(rng: Random, number: int) -> tuple[str, str, int, bool]:
    """Choose signal, phase, ranks, whether the launcher gets it; 16 cases have all pairs of the first two."""
    name, phase = SIGNALS[number % 4], list(PHASES)[(number + number // 4) % 4]
    ranks = rng.choice((1, 1, 2))
    return name, phase, ranks, ranks > 1 and name in TO_LAUNCHER and rng.random() < 0.5


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Stop one run in one phase, then finish it."""
    name, phase, ranks, to_launcher = choose(rng, place.number)
    recipe, save_every = rng.choice(list(RECIPES)), rng.choice((0, 4))
    reference = bench.reference(recipe, ranks, bench.seed)
    words = "run.run_id=a", f"run.seed={bench.seed}", f"run.save_every={save_every}"
    fault = Fault(PHASES[phase], "stall", value=STALL_SECONDS)
    job = place.train(recipe, *words, faults=[fault], ranks=ranks)
    number = signal.Signals[name]
    status = stop_run(job, number, ranks, to_launcher)
    what = f"{name} in {phase}, {ranks} ranks{', to the launcher' if to_launcher else ''}"
    if status == 0 or (ranks == 1 and status != 128 + number):
        raise Miss(f"{what}: expected status {128 + number}, found {status}: {job.why()}")
    if left := wait_until_gone(place.mark, GRACE_SECONDS):
        raise Miss(f"{what}: a process is left: {next(iter(left.values()))[:80]}")
    check_words(job, name, what, phase == "training")
    newest = newest_checkpoint(place.run("a"))
    if phase == "training" and step_of(newest) < STEP:
        raise Miss(f"{what}: stopped after step {STEP}, its newest checkpoint is of step {step_of(newest)}")
    if newest:
        last = place.resume("a", ranks=ranks)
    else:
        last = place.train(recipe, *words, "run.resume=auto", ranks=ranks)
    if last.end():
        raise Miss(f"{what}: not resumed: {last.why()}")
    place.check_run("a" if newest else place.only_finished(), reference)
    return 1
