"""torchrun starts killed ranks again, and the run goes on from its checkpoint; no rank outlives torchrun."""

from random import Random

from dev.soak.child import DEATH_LINE, Fault
from dev.soak.place import NUM_STEPS, RECIPES, Bench, Place
from dev.soak.process import TIMEOUT_SECONDS, Miss, wait_until_gone

MOST_RESTARTS = 3
FIRST_STEP = 4  # at which a checkpoint is sure to be there
LAUNCHER_EVERY = 5  # cases: in one of them the launcher itself is killed


def lose_ranks(rng: Random, place: Place, recipe: str, words: tuple[str, ...]) -> None:
    """Kill one rank one to three times at a step; the launcher has to bring the run to its end."""
    kills = rng.randint(1, MOST_RESTARTS)
    steps = sorted(rng.sample(range(FIRST_STEP, NUM_STEPS), kills))
    faults = [
        Fault(f"after:step:{step}/* train_loss:*", "kill", 1, rng.randrange(2), restart)
        for restart, step in enumerate(steps)
    ]
    job = place.train(recipe, *words, faults=faults, ranks=2, restarts=MOST_RESTARTS)
    if job.end():
        raise Miss(f"{recipe}, {kills} ranks lost: not finished: {job.why()}")
    deaths = sum(DEATH_LINE in line for line in job.lines)
    if deaths != kills:
        raise Miss(f"{recipe}: meant to lose {kills} ranks, lost {deaths}")
    firsts = sum(line.startswith("step:1/") and "train_loss" in line for line in job.lines)
    log = (place.run("a") / "train.log").read_text(encoding="utf-8")
    if firsts != 1 or log.count("warming up") != kills + 1:
        raise Miss(f"{recipe}, {kills} ranks lost: began again at step 0, or the log of before is gone")


def lose_launcher(rng: Random, place: Place, recipe: str, words: tuple[str, ...]) -> None:
    """Kill the launcher: its ranks have to end by themselves; then resume."""
    fault = Fault(
        f"after:step:{rng.randint(FIRST_STEP, NUM_STEPS // 2)}/* train_loss:*", "kill-parent", rank=0
    )
    pause = Fault(fault.point, "stall", rank=0, value=3.0)  # so that the run is not done before them
    job = place.train(recipe, *words, faults=[fault, pause], ranks=2)
    job.process.wait(TIMEOUT_SECONDS)
    if left := wait_until_gone(place.mark, TIMEOUT_SECONDS):
        raise Miss(f"a rank outlives its launcher: {next(iter(left.values()))[:80]}")
    last = place.resume("a", ranks=2)
    if last.end():
        raise Miss(f"{recipe}, launcher killed: not resumed: {last.why()}")


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Lose ranks, or the launcher, of one run."""
    recipe = rng.choice(list(RECIPES))
    reference = bench.reference(recipe, 2, bench.seed)
    words = "run.run_id=a", f"run.seed={bench.seed}", f"run.save_every={rng.choice((1, 2))}"
    is_launcher = place.number % LAUNCHER_EVERY == LAUNCHER_EVERY - 1
    (lose_launcher if is_launcher else lose_ranks)(rng, place, recipe, words)
    place.check_run("a", reference)
    return 1
