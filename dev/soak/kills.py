"""Runs are killed with SIGKILL at random moments, a third of them inside a write, and go on by themselves."""

import time
from random import Random

from dev.soak.child import DEATH_LINE, Fault
from dev.soak.place import RECIPES, Bench, Place
from dev.soak.process import GRACE_SECONDS, TIMEOUT_SECONDS, Job, Miss, marked, wait_until_gone

CHAIN = 10  # kills of one run at most
MOST_STEPS = 3  # that a run takes between two kills of a chain
MOST_WRITES = 7
WRITES = ("fsync", "replace")
KILLED = -9


def kill_in_write(rng: Random, place: Place, start) -> Job:
    """Let it die within a write: before the file is synced, torn in half, or before it gets its name."""
    point, action = rng.choice((("fsync", "kill"), ("fsync", "tear"), ("replace", "kill")))
    return start([Fault(point, action, rng.randint(1, MOST_WRITES), rank=0)])


def kill_at_step(rng: Random, place: Place, start) -> Job:
    """Kill a rank, or the launcher, from outside some milliseconds after a step."""
    job = start([])
    if job.wait_for(" train_loss:", rng.randint(1, MOST_STEPS)):
        time.sleep(rng.uniform(0, 0.06))
        pids = [job.process.pid, *sorted(marked(place.mark))]
        job.send(9, rng.choice(pids))
    return job


def kill_at_line(rng: Random, place: Place, start) -> Job:
    """Let a rank die before or after a line of the log, in any phase of the run."""
    line = rng.choice(
        ("warming up*", "validating*", "quantizing*", "step:*", "Serialized model*", "scoring*")
    )
    return start([Fault(f"{rng.choice(('line', 'after'))}:{line}", "kill", rng.randint(1, 2), rank=0)])


def kill_any_time(rng: Random, place: Place, start) -> Job:
    """Kill everything at a time since the start."""
    job = start([])
    time.sleep(rng.uniform(0.1, 6))
    for pid in [job.process.pid, *marked(place.mark)]:
        job.send(9, pid)
    return job


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Kill one run up to CHAIN times and compare what it leaves at its end; returns the number of kills."""
    recipe, ranks = rng.choice(list(RECIPES)), rng.choice((1, 1, 2))
    reference = bench.reference(recipe, ranks, bench.seed)
    words = (
        "run.run_id=a",
        f"run.seed={bench.seed}",
        f"run.save_every={rng.choice((1, 2))}",
        "run.resume=auto",
    )

    def start(faults: list[Fault]) -> Job:
        return place.train(recipe, *words, faults=faults, ranks=ranks)

    kills = 0
    for _ in range(min(CHAIN, most)):
        kill = rng.choice(
            (kill_in_write, kill_in_write, kill_at_step, kill_at_step, kill_at_line, kill_any_time)
        )
        job = kill(rng, place, start)
        status = job.end()
        if status == 0:  # it was done before the moment came
            place.check_run("a", reference)
            return max(kills, 1)
        if ranks == 1 and status != KILLED:
            raise Miss(f"{recipe}: ended with status {status} before it was killed: {job.why()}")
        kills += 1
        bench.notes["kills inside a write"] += any(f"{DEATH_LINE} at:{one}" in job.text for one in WRITES)
        if left := wait_until_gone(place.mark, TIMEOUT_SECONDS - GRACE_SECONDS):
            raise Miss(f"a kill left a process running: {next(iter(left.values()))[:80]}")
    last = start([])
    if last.end():
        raise Miss(f"{recipe}, {ranks} ranks, {kills} kills: not resumed: {last.why()}")
    place.check_run("a", reference)
    return max(kills, 1)
