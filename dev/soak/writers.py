"""Two writers of one folder at once: one is refused in a sentence, or both finish in folders of their own."""

from pathlib import Path
from random import Random

from dev.soak.child import STALL_LINE, Fault
from dev.soak.place import RECIPES, Bench, Place, check_dataset, write_texts
from dev.soak.process import Job, Miss

STALL = Fault("after:step:5/* train_loss:*", "stall", value=6.0)
STALL_SHARD = Fault("file:fineweb_train_000000.bin", "stall", value=6.0)


def end_all(place: Place, jobs: list[Job]) -> list[Job]:
    """Wait for all; returns those that ended well. The others must have said why in a sentence."""
    well = [job for job in jobs if job.end() == 0]
    for job in jobs:
        if job not in well:
            place.check_clean_failure(job)
    if not well:
        raise Miss(f"nobody finished: {jobs[0].why()}")
    return well


def two_runs(rng: Random, place: Place, recipe: str) -> None:
    """Start two runs of one name with different seeds."""
    seeds = place.bench.seed, place.bench.seed + 1
    jobs = [place.train(recipe, "run.run_id=a", f"run.seed={seed}", "run.save_every=4") for seed in seeds]
    well = end_all(place, jobs)
    folders = sorted(path.parent for path in place.runs.glob("*/result.json"))
    if len(folders) != len(well):
        raise Miss(f"{len(well)} runs ended well, {len(folders)} have a result")
    for folder in folders:
        place.check_own(folder)
        seed = int(next(s for s in seeds if f"seed:{s}\n" in (folder / "train.log").read_text()))
        place.check_run(folder.name, place.bench.reference(recipe, 1, seed))


def old_name_again(rng: Random, place: Place, recipe: str) -> None:
    """Give a new run the name of a finished one."""
    seeds = place.bench.seed, place.bench.seed + 1
    for seed in seeds:
        job = place.train(recipe, "run.run_id=a", f"run.seed={seed}")
        if job.end():
            raise Miss(f"a run failed: {job.why()}")
        if seed == seeds[0]:
            before = {path.name: path.read_bytes() for path in place.run("a").iterdir() if path.is_file()}
    changed = [name for name, blob in before.items() if (place.run("a") / name).read_bytes() != blob]
    if changed:
        raise Miss(f"a new run changed {changed[0]} of the finished run of its name")
    for folder in place.runs.glob("*/result.json"):
        place.check_own(folder.parent)


def resume_running(rng: Random, place: Place, recipe: str) -> None:
    """Resume a run that is still running."""
    job = place.train(
        recipe, "run.run_id=a", f"run.seed={place.bench.seed}", "run.save_every=1", faults=[STALL]
    )
    if not job.wait_for(STALL_LINE):
        raise Miss(f"a run failed: {job.why()}")
    second = place.resume("a")
    place.check_clean_failure(second)
    if str(job.process.pid) not in second.text:
        raise Miss(f"refused, but not for the run that is writing: {second.why()}")
    if job.end():
        raise Miss(f"the run that was resumed while it ran failed: {job.why()}")
    place.check_run("a", place.bench.reference(recipe, 1, place.bench.seed))


def prepare(place: Place, out: Path, seed: int, *faults: Fault) -> Job:
    """Start data.prepare on made-up text."""
    text = write_texts(place.folder / f"{seed}.jsonl", 300, seed)
    tokenizer = place.bench.data / "tokenizer.model"
    words = "--out", str(out), "--shard-tokens", "2000", "--val-docs", "5", "--input", str(text)
    return place.start("prepare", "--tokenizer", str(tokenizer), *words, faults=faults)


def two_prepares(rng: Random, place: Place, recipe: str) -> None:
    """Prepare two texts into one folder."""
    place.data = place.folder / "data"
    first = prepare(place, place.data, 5, STALL_SHARD)
    first.wait_for(STALL_LINE)
    end_all(place, [first, prepare(place, place.data, 6)])
    check_dataset(place.data)
    place.check_temporaries()


def prepare_under_run(rng: Random, place: Place, recipe: str) -> None:
    """Prepare another text where a run trains: the run is as without it, or stops with a sentence."""
    data, seed = place.own_data(), place.bench.seed
    job = place.train(recipe, "run.run_id=a", f"run.seed={seed}", "run.save_every=4", faults=[STALL])
    if not job.wait_for(STALL_LINE):
        raise Miss(f"a run failed: {job.why()}")
    other = prepare(place, data, 7)
    if other.end():
        place.check_clean_failure(other)
    if job.end():
        place.check_clean_failure(job)
    else:
        place.check_run("a", place.bench.reference(recipe, 1, seed))
    check_dataset(data)


def two_builtins(rng: Random, place: Place, recipe: str) -> None:
    """Make the built-in corpus twice at once."""
    place.data = place.folder / "builtin"
    first = place.start("builtin", str(place.data), faults=[STALL_SHARD])
    first.wait_for(STALL_LINE)
    end_all(place, [first, place.start("builtin", str(place.data))])
    check_dataset(place.data)
    place.check_temporaries()


KINDS = (two_runs, two_prepares, prepare_under_run, two_builtins, old_name_again, resume_running)


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Let two writers meet."""
    kind = KINDS[place.number % len(KINDS)]
    try:
        kind(rng, place, rng.choice(list(RECIPES)))
    except Miss as miss:
        raise Miss(f"{kind.__name__.replace('_', ' ')}: {miss}") from miss
    return 1
