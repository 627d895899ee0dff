"""Read what runs and records left, finished or not: one shape for report, watch, track and sweep.

Nothing here raises for a half-written or older file: what could not be read is a sentence in `notes`. Only
names that hold no run at all are an error.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import UserError, check_output, parse_json, read_json, sha256_file
from durable.seals import check_digest, last_seal, split_events
from eval.logs import RunLog, logged_events, logged_tables, parse_log, read_seed
from formats.checkpoints import METRICS_NAME, RESULT_NAME
from formats.recipe import read_recipe

ARTIFACT_NAME, LOG_NAME, RECIPE_NAME = "artifact.bin", "train.log", "recipe.toml"
SUBMISSION_NAME, WEIGHTS_NAME, AUDIT_NAME = "submission.json", "weights.json", "audit.json"
RUN_MARKS = (RESULT_NAME, WEIGHTS_NAME, METRICS_NAME, LOG_NAME)
TEMPLATE = Path(__file__).parents[1] / "report" / "page.html"  # of every page
MOST_LEVELS = 4  # of folders between a named folder and a run
BYTES_TITLE, SECONDS_TITLE = "bytes of the submission", "seconds by phase"  # of tables in logs
CLOCK_TITLE = "training clock"
RESULT_ADVICE = "What it says is shown, and was altered since the run wrote it."
INVALID = re.compile(r"^NOT A VALID RUN: (.+)$", re.MULTILINE)  # of a log: the limits that it is over


def is_number(value: object) -> bool:
    """Tell a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Tell a whole number from 0 on."""
    return is_number(value) and isinstance(value, int) and value >= 0


def is_stages(value: object) -> bool:
    """Tell stages of a schedule, whose third entry is the tokens of a step."""
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) > 2 and is_count(row[2]) for row in value
    )


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list(value: object) -> bool:
    return isinstance(value, list)


def is_object(value: object) -> bool:
    return isinstance(value, dict)


# Fields that readers count on, and what they must be; other fields may be anything.
RESULT_KINDS = {
    "steps": is_count, "train_ms": is_number, "calibration_ms": is_number, "tokens_per_second": is_number,
    "origin": is_object, "places": is_object, "byte_account": is_object, "over_limits": is_list,
    "resumed_at": is_list, "artifact_sha256": is_text, "config_hash": is_text,
}  # fmt: skip
SCORE_KINDS = {
    "val_loss": is_number, "seconds": is_number, "num_bytes": is_count, "num_tokens": is_count,
    "invalid": is_text, "not_comparable": is_text,
}  # fmt: skip
RECIPE_KINDS = {
    "run.iterations": is_count, "run.max_wallclock_seconds": is_number, "data.batch_tokens": is_count,
    "schedule.stages": is_stages,
}  # fmt: skip


class RunFacts(NamedTuple):
    """One training: of a run folder, or of a seed of a record."""

    name: str  # unique among those that were read together
    folder: Path
    kind: str  # "run", "record", or "weights" where the score is of the weights, without an artifact
    state: str  # "finished" where there is a score, else "unfinished"
    seed: int | None
    recipe: dict  # {"section.key": value}; empty where there is none
    result: dict | None  # in the shape of result.json; a record's seed says less than a run
    events: list[dict]  # {"kind", "step", ...}, in order; a record's are those of its log's lines
    log: RunLog | None
    notes: tuple[str, ...]  # sentences on what is missing, cut off or altered

    @property
    def score(self) -> dict:
        """What was measured from the artifact, or from the weights; empty before that."""
        return (self.result or {}).get("score", {})

    @property
    def val_bpb(self) -> float | None:
        return self.score.get("val_bpb")

    @property
    def origin(self) -> dict:
        """What the result depends on besides its recipe; empty for those that do not say."""
        return (self.result or {}).get("origin", {})

    @property
    def ledger(self) -> dict[str, int]:
        """Bytes by part of the submission; empty where nothing was weighed."""
        return dict((self.result or {}).get("ledger", []))

    @property
    def artifact(self) -> Path | None:
        """The artifact that the score is of, where the folder holds it."""
        path, stated = self.folder / ARTIFACT_NAME, (self.result or {}).get("artifact_sha256")
        is_own = path.is_file() and (stated is None or sha256_file(path) == stated)
        return path if is_own else None


def is_record(folder: Path) -> bool:
    """Tell a record's folder: it has a recipe and a README, or a submission, and is no run's."""
    if (folder / METRICS_NAME).is_file() or (folder / LOG_NAME).is_file():
        return False
    has_recipe = (folder / RECIPE_NAME).is_file() and (folder / "README.md").is_file()
    return has_recipe or (folder / SUBMISSION_NAME).is_file()


def is_run(folder: Path) -> bool:
    """Tell a run's folder: a finished one, or one where a training has begun."""
    return any((folder / name).is_file() for name in RUN_MARKS)


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder; of a record its first seed."""
    return read_record(folder)[0] if is_record(folder) else _read_run(folder)


def read_runs(paths: Iterable[str | Path]) -> list[RunFacts]:
    """Read runs, records (one a seed) and folders of them, each training once, under unique names.

    Raises where a name holds none.
    """
    runs: list[RunFacts] = []
    for path in map(Path, paths):
        found = [run for folder in find_folders(path) for run in _read_folder(folder)]
        if not found:
            said = "found none" if path.exists() else "no such file or folder"
            raise UserError(
                f"{path}: expected a run (it has {METRICS_NAME} or {RESULT_NAME}), a record or a folder of "
                f"them, {said}. `make run` trains one into runs/."
            )
        runs += found
    return with_names(list({_identity(run): run for run in reversed(runs)}.values())[::-1])


def check_page(out: Path, files: Iterable[Path] = ()) -> None:
    """Raise unless a page may be written there: a name in .html that is neither a folder nor a file in use.

    What runs, records, texts and sources are made of has other endings, and so have devices.
    """
    if out.suffix != ".html" or out.is_dir():
        found = "a folder" if out.is_dir() else repr(str(out))
        raise UserError(f"--out {out}: expected a name that ends in .html, found {found}. Name a file.")
    check_output(out, [TEMPLATE, *files])


def find_folders(path: Path, levels: int = MOST_LEVELS) -> Iterator[Path]:
    """Find the folders of runs and records at or below a path, by name; a file stands for its folder."""
    folder = path.parent if path.is_file() else path
    if is_record(folder) or is_run(folder):
        yield folder
    elif path.is_dir() and levels:
        inside = (one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
        for child in sorted(inside):
            yield from find_folders(child, levels - 1)


def _read_folder(folder: Path) -> list[RunFacts]:
    return read_record(folder) if is_record(folder) else [_read_run(folder)]


def _identity(run: RunFacts) -> tuple:
    """What is equal of one training wherever it is filed: an artifact's digest, else the folder."""
    digest = (run.result or {}).get("artifact_sha256")
    return (digest, run.seed) if digest else (str(run.folder.resolve()), run.seed)


def with_names(runs: list[RunFacts]) -> list[RunFacts]:
    """Give runs names that differ: as many folders as it takes, at last a number."""
    parts = [(*map(_printable, run.folder.resolve().parts), run.name) for run in runs]

    def spell(i: int, count: int) -> str:
        *folders, name = parts[i]
        return "/".join([*folders[len(folders) - 1 - count : -1], name]) if count else name

    names = [spell(i, 0) for i in range(len(runs))]
    for count in range(1, max(map(len, parts), default=0)):
        twice = {name for name in names if names.count(name) > 1}
        names = [spell(i, count) if name in twice else name for i, name in enumerate(names)]
    numbers = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    names = [name if number == 1 else f"{name} ({number})" for name, number in zip(names, numbers)]
    return [run._replace(name=name) for run, name in zip(runs, names)]


def _printable(name: str) -> str:
    """Spell a file's name such that UTF-8 can express it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_run(folder: Path) -> RunFacts:
    """Read a run folder: what there is of recipe, events, log and result."""
    notes: list[str] = []
    path = folder / METRICS_NAME
    events = _read_events(path, notes)
    result, kind = read_facts(folder / RESULT_NAME, notes), "run"
    if result is None:
        result = read_facts(folder / WEIGHTS_NAME, notes)
        kind = "weights" if result else "run"
    if result is None:
        notes.append(f"{folder}: no {RESULT_NAME}: the run is not finished, so it has no score.")
    elif result.get("metrics_crc32") not in (None, last_seal(path)):
        notes.append(f"{path}: not the events that {RESULT_NAME} beside it counts, or a part of them.")
    recipe, log = _read_recipe(folder, notes), _read_log(folder / LOG_NAME, notes)
    if not events and log:
        events = logged_events(log)
    seeds = ((result or {}).get("seed"), recipe.get("run.seed"), log.seed if log else None)
    seed = next((found for found in map(read_seed, seeds) if found is not None), None)
    name = _printable(folder.resolve().name)
    state = "unfinished" if result is None else "finished"
    return RunFacts(name, folder, kind, state, seed, recipe, result, events, log, tuple(notes))


def _read_events(path: Path, notes: list[str]) -> list[dict]:
    """Read the events up to the first that was altered or is half written."""
    if not path.is_file():
        return []
    try:
        events, fault = split_events(path)
        is_whole = path.read_bytes()[-1:] in (b"", b"\n")
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error.strerror}).")
        return []
    if fault:
        notes.append(f"{fault} What follows it is left out.")
    elif not is_whole:
        notes.append(f"{path}: the last line is cut off; it is left out.")
    return events


def read_facts(path: Path, notes: list[str]) -> dict | None:
    """Read result.json or another of its shape; None where it holds no score."""
    if not path.is_file():
        return None
    try:
        facts = read_json(path, strict=False)
    except UserError as error:
        notes.append(str(error))
        return None
    score = facts.get("score") if isinstance(facts, dict) else None
    if not isinstance(score, dict) or not isinstance(score.get("val_bpb"), float):
        notes.append(f"{path}: expected a score with val_bpb, found none: taken as unfinished.")
        return None
    try:
        check_digest(path, facts, RESULT_ADVICE)
    except UserError as error:
        notes.append(str(error))
    return keep_known(facts, path, notes)


def keep_known(facts: dict, place: str | Path, notes: list[str]) -> dict:
    """Leave out the fields of a result that are of another kind than readers take, and note them."""
    kept = keep_kinds(facts, RESULT_KINDS, place, notes)
    kept["score"] = keep_kinds(facts["score"], SCORE_KINDS, place, notes)
    if not is_object(kept.get("origin", {}).get("machine", {})):
        kept["origin"] = keep_kinds(kept["origin"], {"machine": is_object}, place, notes)
    return kept | {"ledger": _pairs(facts.get("ledger")), "seconds": dict(_pairs(facts.get("seconds")))}


def keep_kinds(
    facts: dict, kinds: dict[str, Callable[[object], bool]], place: str | Path, notes: list[str]
) -> dict:
    """Return an object without the fields that are of another kind than these; null is a field not told."""
    told = {name: value for name, value in facts.items() if value is not None or name not in kinds}
    strange = [name for name, is_kind in kinds.items() if name in told and not is_kind(told[name])]
    if strange:
        notes.append(f"{place}: left out, for they hold something else than expected: {', '.join(strange)}.")
    return {name: value for name, value in told.items() if name not in strange}


def _pairs(rows) -> list[tuple[str, float]]:
    """Take (name, number) rows, or an object of them, and leave out what is neither."""
    rows = rows.items() if isinstance(rows, dict) else rows if isinstance(rows, list) else []
    pairs = (row for row in rows if isinstance(row, (list, tuple)) and len(row) == 2)
    return [(str(name), number) for name, number in pairs if is_number(number)]


def _read_recipe(folder: Path, notes: list[str]) -> dict:
    try:
        path = folder / RECIPE_NAME
        return keep_kinds(read_recipe(path), RECIPE_KINDS, path, notes)
    except (UserError, OSError) as error:
        notes.append(str(error))
        return {}


def _read_log(path: Path, notes: list[str]) -> RunLog | None:
    try:
        return parse_log(str(path), path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        notes.append(f"{path}: no log ({error.strerror}).")
        return None


# ----------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> list[RunFacts]:
    """Read a record, a seed each; one without scores is a recipe that was not run."""
    notes: list[str] = []
    recipe, name = _read_recipe(folder, notes), _printable(folder.resolve().name)
    rows = _seed_rows(folder / SUBMISSION_NAME, notes)
    kept = read_facts(folder / RESULT_NAME, notes) or {}
    runs = []
    for seed, row in rows.items():
        found = list(notes)
        log = _read_log(folder / f"train_seed{seed}.log", found)
        is_kept = kept.get("artifact_sha256") is not None and (
            kept["artifact_sha256"] == row.get("artifact_sha256")
        )
        result = keep_known(_seed_result(row, log), folder / SUBMISSION_NAME, found)
        result |= kept if is_kept else {}
        events = logged_events(log) if log else []
        facts = (name + f" seed {seed}", folder, "record", "finished", seed, recipe, result, events, log)
        runs.append(RunFacts(*facts, tuple(found)))
    if not runs:
        notes.append(f"{folder}: a recipe without scores: nobody has run it here.")
        runs = [RunFacts(name, folder, "record", "unfinished", None, recipe, None, [], None, tuple(notes))]
    return runs


def _seed_rows(path: Path, notes: list[str]) -> dict[int, dict]:
    """Read seed -> row of a submission.json: those that state a score."""
    if not path.is_file():
        return {}
    try:
        stated = read_json(path).get("seed_results", {})
        rows = {read_seed(seed): row for seed, row in stated.items()}
        return {
            seed: row
            for seed, row in rows.items()
            if seed is not None and isinstance(row.get("val_bpb"), float)
        }
    except UserError as error:
        notes.append(str(error))
    except AttributeError:
        notes.append(f"{path}: expected seed_results with a row a seed, found something else.")
    return {}


def _seed_result(row: dict, log: RunLog | None) -> dict:
    """Word a seed of a submission, and the tables of its log, as a result."""
    tables = logged_tables(log) if log else {}
    score = {"val_loss": row.get("val_loss"), "val_bpb": row["val_bpb"], "seconds": row.get("eval_time_s")}
    result = {name: row[name] for name in ("steps", "artifact_sha256") if name in row} | {"score": score}
    result["calibration_ms"] = log.facts.get("calibration_ms", 0.0) if log else 0.0
    if is_number(row.get("train_time_s")):
        result["train_ms"] = 1000 * row["train_time_s"]
    if broken := INVALID.search(log.text) if log else None:
        result["over_limits"] = broken[1].split("; ")
    elif BYTES_TITLE in tables and CLOCK_TITLE in tables:  # both were held against their limits
        result["over_limits"] = []
    ledger = [(name, round(number)) for name, number in tables.get(BYTES_TITLE, {}).items()]
    return result | {"ledger": ledger, "seconds": tables.get(SECONDS_TITLE, {})}


def read_audit(folder: Path) -> list[dict]:
    """Return the verdicts that a record's audit.json holds, none where it has none."""
    path = folder / AUDIT_NAME
    if not path.is_file():
        return []
    try:
        checks = parse_json(path.read_bytes(), path)["checks"]
        return [check for check in checks if isinstance(check.get("verdict"), str)]
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return []
