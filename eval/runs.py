"""Find what is to be scored: an artifact, where its data lie, and the score that somebody recorded for it."""

import re
from pathlib import Path
from typing import NamedTuple

from common import UserError, damage_named, read_json, sha256_file
from eval.logs import parse_log
from formats.checkpoints import RESULT_NAME, read_result
from formats.recipe import config_fields, config_hash, read_recipe, with_values
from scoring.modes import SCORERS
from train_gpt import ARTIFACT_NAME, DTYPES, Config, only_live, read_environment

SUBMISSION_NAME = "submission.json"
RECIPE_NAME, PROGRAM_NAME, LOG_NAME = "recipe.toml", "train_gpt.py", "train.log"
RUNS = Path("runs")
TOLERANCE = 1e-6  # bits per byte; the same machine reproduces its own score far closer than this
ADAPTING_TOLERANCE = 1e-5  # other numbers of ranks or threads sum gradients in another order
BFLOAT16_TOLERANCE = 2e-5  # products round by the shape of their batch: 5e-6 was seen on one machine


class Target(NamedTuple):
    """An artifact to score. What is not known is None."""

    artifact: Path
    live: Config  # paths and device; every other field is a default that the artifact replaces
    result: dict | None = None  # a run's result.json, and the calibration_ms of its log
    recorded_bpb: float | None = None
    stated_tolerance: float | None = None  # of the recorded score, in bits per byte
    switch_at: int = -1  # units that adapted when the score was recorded
    computed: str = ""  # the log's line on device and compute_dtype of the recorded score

    def tolerance(self, mode: str) -> float:
        """Return how far a score may be from the recorded one."""
        adapts = mode not in SCORERS or SCORERS[mode].adapt is not None
        usual = ADAPTING_TOLERANCE if adapts else TOLERANCE
        usual = BFLOAT16_TOLERANCE if "bfloat16" in self.computed else usual
        return usual if self.stated_tolerance is None else self.stated_tolerance

    def recorded_dtype(self, device_type: str) -> str:
        """Return the arithmetic of the recorded score, if it was computed on such a device; else nothing.

        "auto" is float32 on one CPU and bfloat16 on another, and the score differs by 5e-5 between them.
        """
        found = re.fullmatch(rf"device:{device_type} compute_dtype:(\w+).*", self.computed)
        return found[1] if found and found[1] in DTYPES else ""


def newest_run(root: Path = RUNS) -> Path:
    """Return the complete run folder (it has result.json) that was finished last, records' seeds too."""
    results = sorted(root.glob(f"**/{RESULT_NAME}"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise UserError(f"{root}: no complete run found. `make run` trains one; or name an artifact file.")
    return results[-1].parent


def find_target(path: Path, chosen: Path | None = None) -> Target:
    """Resolve a run folder, a record folder or an artifact file; `chosen` is the artifact of a record."""
    if (path / RESULT_NAME).is_file():
        return find_run(path)
    if (path / RECIPE_NAME).is_file() and (path / "README.md").is_file():
        return find_record(path, chosen)
    if path.is_dir():
        raise UserError(
            f"{path}: expected {RESULT_NAME} (a complete run), or {RECIPE_NAME} and README.md (a record), "
            "found neither. Run it again or name an artifact."
        )
    if path.name == ARTIFACT_NAME and (path.parent / RESULT_NAME).is_file():
        return find_run(path.parent)  # which knows where its data lie
    return Target(path, live_config({}))


def live_config(values: dict) -> Config:
    """Merge the live fields of `values` and of the environment, which wins; other fields are ignored."""
    live = [name for name, item in config_fields(Config).items() if item.metadata["live"]]
    cfg = Config()
    for source, found in (("recipe", values), ("environment", read_environment().overrides)):
        cfg = with_values(cfg, {name: found[name] for name in live if name in found}, source)
    return cfg


def find_run(folder: Path) -> Target:
    """Read a run folder; refuses an artifact that is not the one which the result describes."""
    result = read_result(folder)
    artifact = folder / ARTIFACT_NAME
    if sha256_file(artifact) != result["artifact_sha256"]:
        raise UserError(
            f"{artifact}: not the file that {RESULT_NAME} describes, or damaged. Run it again, or "
            "score a copy of it elsewhere by itself."
        )
    recipe = with_values(Config(), read_recipe(folder / RECIPE_NAME), str(folder))
    found = config_hash(recipe)
    if found != result["config_hash"]:
        raise UserError(
            f"{folder / RECIPE_NAME}: expected the recipe {result['config_hash']} that {RESULT_NAME} beside "
            f"it states, found {found}. Take both files from one run, or score {artifact} "
            "elsewhere by itself."
        )
    environ = read_environment().overrides
    lost = [name for name, place in result["places"].items() if name in environ and not Path(place).exists()]
    moved = {name: environ[name] for name in lost}
    live = with_values(recipe, result["places"] | moved, str(folder))
    score, text = result["score"], read_log(folder, result.get("seed"))
    result["calibration_ms"] = parse_log(LOG_NAME, text).facts.get("calibration_ms", 0.0)
    computed = find_arithmetic(text)
    return Target(artifact, only_live(live), result, score["val_bpb"], None, score["switch_at"], computed)


def read_log(folder: Path, seed) -> str:
    """Read the log of a run folder, or that of a seed of a record; empty without one."""
    for log in (folder / LOG_NAME, folder / f"train_seed{seed}.log"):
        if log.is_file():
            return log.read_text(encoding="utf-8", errors="replace")
    return ""


def find_arithmetic(log: str) -> str:
    """Return the line of a run's log that names device and compute_dtype; empty without one."""
    found = re.search(r"^device:\w+ compute_dtype:.*$", log, re.MULTILINE)
    return found[0] if found else ""


def find_record(folder: Path, chosen: Path | None) -> Target:
    """Read a record folder: its own artifact, or the one in runs/ that it states, or the chosen one.

    submission.json states them: seed_results[seed] with artifact_sha256, val_bpb and, where adaptation was
    cut, switch_at; tolerance_bpb for all. Raises with the command that trains one where there is none: the
    record's own program, or without one the recipe.
    """
    path = folder / SUBMISSION_NAME
    facts = read_json(path) if path.is_file() else {}
    with damage_named(path, "a submission.json with seed_results", "Take it from the record again."):
        rows = [(seed, row, row["val_bpb"] + 0.0) for seed, row in facts.get("seed_results", {}).items()
                if "artifact_sha256" in row]  # fmt: skip
        seeds = {str(row["artifact_sha256"]): (seed, row) for seed, row, _ in rows}
    live = live_config(read_recipe(folder / RECIPE_NAME))
    artifacts = [chosen] if chosen else [folder / ARTIFACT_NAME, *sorted(RUNS.glob(f"**/{ARTIFACT_NAME}"))]
    for artifact in filter(Path.is_file, artifacts):
        seed, row = seeds.get(sha256_file(artifact), ("", None))
        if row:
            is_run = (artifact.parent / RESULT_NAME).is_file()  # it knows where its data lie
            found = find_run(artifact.parent) if is_run else Target(artifact, live)
            switch_at = row.get("switch_at", found.switch_at)
            stated = facts.get("tolerance_bpb")
            computed = found.computed or find_arithmetic(read_log(folder, seed))
            found = found._replace(recorded_bpb=row["val_bpb"], computed=computed)
            return found._replace(stated_tolerance=stated, switch_at=switch_at)
        if chosen or artifact.parent == folder:
            stated = ", ".join(sha[:16] for sha in seeds) or "none"
            raise UserError(
                f"{artifact}: expected an artifact that {path} states (sha256 {stated}), found "
                f"{sha256_file(artifact)[:16]}. `python -m eval {artifact}` scores it by itself."
            )
    program = folder / PROGRAM_NAME
    start = str(program) if program.is_file() else f"{PROGRAM_NAME} --recipe {folder / RECIPE_NAME}"
    seed = "".join(f" run.seed={seed}" for seed, _ in [*seeds.values()][:1])
    data = f"data.data_path={live.data.data_path} data.tokenizer_path={live.data.tokenizer_path}"
    raise UserError(
        f"{folder}: expected {ARTIFACT_NAME} in it, or in {RUNS}/ one that {SUBMISSION_NAME} states, found "
        f"none. Name it (ARTIFACT=FILE) or train it: python {start}{seed} {data}"
    )
