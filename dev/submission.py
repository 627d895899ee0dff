"""Write the folder of a record in the contest's format from finished runs and what an audit found.

Nothing is stated that was not measured: scores come from result.json and from a fresh process, sizes from
files, compliance from verdicts of checks, and a check that did not run leaves its line null.
"""

import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

import torch

from audit import __main__ as audit
from audit.checks import STOP_TOLERANCE_MS
from audit.folder import SubmissionFolder, Track
from audit.program import read_program, third_party_imports
from audit.report import STATUS, as_json
from audit.table import CHECKS
from common import CommandParser, UserError, parse_json, run_command, sha256_file, write_json
from durable.seals import split_events
from eval.logs import RunLog, logged_events
from eval.stats import Sample, SeedScore, compare, read_scores, summarize
from formats.checkpoints import METRICS_NAME
from formats.curves import CURVES_NAME, draw_curves, event_curves
from formats.recipe import config_fields, config_value
from pack.program import ENTRY, collect
from train_gpt import ARTIFACT_NAME, Config

ROOT = ENTRY.parent
SOURCES = (ROOT / "eval" / "__main__.py", ROOT / "pack" / "__main__.py")  # with what they import: the trainer
NOTICES = "THIRD_PARTY_NOTICES.md"
BASELINE = "baseline.json"  # the scores of the row to beat
KEPT_BYTES = 1_000_000  # code + artifact up to this: the folder keeps an artifact
ORDER = ("NOT RUN", "PASS", "SUSPECT", "FAIL")  # what counts where two reports speak of one check

# Keys of `compliance`, and the checks that must all PASS for true.
COMPLIANCE = (
    ("train_under_{train:.0f}s", ("K5",)),
    ("eval_under_{eval:.0f}s", ("K5",)),
    ("artifact_under_{limit:.0f}mb", ("K6",)),
    ("three_seeds", ("K7",)),
    ("no_slot", ("K13",)),
    ("no_pre_quant_ttt", ("K11",)),
    ("no_etlb", ("K13", "K15")),
    ("no_ngram_cache", ("K12",)),
    ("score_first_ttt", ("K13", "K15")),
)


class Run(NamedTuple):
    """A seed: its run folder, what the run recorded, what a fresh process measured, its log."""

    seed: int
    folder: Path
    result: dict
    evaluation: dict
    log: RunLog

    @property
    def val_bpb(self) -> float:
        return self.result["score"]["val_bpb"]

    @property
    def training_s(self) -> float:
        """Seconds of training and of calibration, which reads training data too."""
        return (self.result["train_ms"] + self.log.facts.get("calibration_ms", 0.0)) / 1000

    @property
    def model_bytes(self) -> int:
        return (self.folder / ARTIFACT_NAME).stat().st_size

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + (self.folder / ENTRY.name).stat().st_size


class Record(NamedTuple):
    """All that a folder is written from."""

    name: str
    track: Track
    cfg: Config
    recipe: Path  # the file that becomes recipe.toml
    intro: Path  # a README whose text above its first "## " opens the record's; may be missing
    runs: list[Run]
    old: list[SeedScore]  # the row to beat; empty without one
    about: dict[str, str]  # author, github_id, blurb

    def sample(self, key: str) -> Sample:
        """Summarize val_bpb or val_loss over the seeds."""
        return summarize([run.result["score"][key] for run in self.runs])

    @property
    def comparison(self) -> dict | None:
        """The tests against the row to beat, as `python -m eval.stats` makes them from the logs."""
        logs = [run.folder / "train.log" for run in self.runs]
        return compare(read_scores(logs), self.old) if self.old else None


def kept_run(runs: list[Run]) -> Run:
    """Return the run whose score is the nearest to the mean: its artifact is the one to look at."""
    mean = summarize([run.val_bpb for run in runs]).mean
    return min(runs, key=lambda run: abs(run.val_bpb - mean))


def keeps_artifact(runs: list[Run]) -> bool:
    """Whether the folder holds an artifact: the contest's 16 MB ones stay out of the repository."""
    return max(run.total_bytes for run in runs) <= KEPT_BYTES


# ----------------------------------------------------------------------------------------------------------
# Audit
# ----------------------------------------------------------------------------------------------------------


def audit_folder(folder: Path, against: list[Path]) -> list[dict]:
    """Audit a record folder: seconds, nothing runs."""
    return as_json(folder.name, audit.audit_folder(folder, against or None))["checks"]


def audit_deep(folder: Path, run: Run) -> list[list[dict]]:
    """Attack the scores of a run's artifact, run the program in a sandbox, examine the data (minutes).

    Returns a report of each, without what only a folder can be asked.
    """
    places = run.result["places"]
    data = ["--data", places["data.data_path"], "--tokenizer", places["data.tokenizer_path"]]
    asked = {check.id for check in CHECKS if check.kind in ("dynamic", "data")}
    reports = []
    attack = [folder, "--artifact", run.folder / ARTIFACT_NAME]
    for options in (attack, ["--run", folder / ENTRY.name, *data]):
        command = [sys.executable, "-m", "audit", *map(str, options), "--json"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode not in STATUS.values():
            raise UserError(f"`python -m audit` ended with status {child.returncode}: see above.")
        report = parse_json(child.stdout, "python -m audit --json")
        reports.append([check for check in report["checks"] if check["id"] in asked])
    return reports


def merge_checks(*reports: list[dict]) -> list[dict]:
    """Return one row a check: the worst verdict of those that ran, with the evidence of all that agree."""
    merged: dict[str, dict] = {}
    for check in (check for report in reports for check in report):
        known = merged.get(check["id"])
        rank = ORDER.index(check["verdict"]) - ORDER.index(known["verdict"]) if known else 1
        if rank > 0:
            merged[check["id"]] = check
        elif rank == 0 and check["verdict"] != "NOT RUN":
            merged[check["id"]] = known | {"evidence": known["evidence"] + check["evidence"]}
    return sorted(merged.values(), key=lambda check: int(check["id"][1:]))


def compliance(record: Record, checks: list[dict]) -> dict:
    """Return key -> true (all its checks PASS), false (one FAILs) or null (not shown), and the checks.

    A limit is also held against what the runs measured.
    """
    verdicts = {check["id"]: check["verdict"] for check in checks}
    eval_s = record.track.eval_limit(record.runs[0].result["score"]["num_bytes"])
    limits = {"train": record.track.train_s, "eval": eval_s, "limit": record.track.limit_bytes / 1_000_000}
    spent = {
        "train": max(run.training_s for run in record.runs) - STOP_TOLERANCE_MS / 1000,
        "eval": max(run.result["score"]["seconds"] for run in record.runs),
        "limit": max(run.total_bytes for run in record.runs) / 1_000_000,
    }
    rows, sources = {}, {}
    for key, ids in COMPLIANCE:
        limit = next((name for name in limits if f"{{{name}:" in key), "")
        if limit and limits[limit] is None:
            continue
        name, found = key.format_map(limits), {verdicts.get(check, "NOT RUN") for check in ids}
        rows[name] = True if found == {"PASS"} else False if "FAIL" in found else None
        if limit and spent[limit] > limits[limit]:
            rows[name] = False
        sources[name] = list(ids)
    if len(record.runs) < 3:
        rows["three_seeds"] = False
    if record.cfg.eval.tilt_online > 0 or record.cfg.eval.running_lengths:
        rows["no_ngram_cache"] = False
    return rows | {"checks": sources}


# ----------------------------------------------------------------------------------------------------------
# submission.json
# ----------------------------------------------------------------------------------------------------------


def changed_settings(cfg: Config) -> dict:
    """Return {"section.key": value} of what the recipe fixes to something else than the naive baseline."""
    return {
        name: config_value(cfg, name)
        for name, item in config_fields(Config).items()
        if not item.metadata["live"] and config_value(cfg, name) != item.default
    }


def hardware() -> str:
    """Name the accelerators of this machine, else its processor and the threads that torch uses."""
    count = torch.cuda.device_count()
    if count:
        return f"{count}x {torch.cuda.get_device_name(0)}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{torch.get_num_threads()} threads, {found[1] if found else platform.processor()}"


def seed_row(run: Run) -> dict:
    """Return a seed's line of `seed_results`."""
    score = run.result["score"]
    return {
        "val_loss": score["val_loss"],
        "val_bpb": score["val_bpb"],
        "val_bpb_fresh_process": run.evaluation["val_bpb"],
        "artifact_bytes": run.total_bytes,
        "model_bytes": run.model_bytes,
        "artifact_sha256": run.result["artifact_sha256"],
        "steps": run.result["steps"],
        "train_time_s": round(run.result["train_ms"] / 1000, 3),
        "eval_time_s": round(score["seconds"], 3),
        "switch_at": score["switch_at"],
    }


def build_submission(record: Record, checks: list[dict]) -> dict:
    """Return submission.json under the keys that late records share."""
    runs, bpb, loss = record.runs, record.sample("val_bpb"), record.sample("val_loss")
    sizes = [run.total_bytes for run in runs]
    title = record.name.partition("_")[2].replace("_", " ")
    torch_line = re.search(r"Running PyTorch (\S+)", runs[0].log.text)
    facts = {
        "author": record.about["author"],
        "github_id": record.about["github_id"],
        "name": title,
        "blurb": record.about["blurb"] or f"{title}: val_bpb {bpb.mean:.8f}, mean of {bpb.n} seeds.",
        "date": record.name[:10],
        "track": record.track.name,
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": loss.std,
        "val_bpb_std": bpb.std,
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): seed_row(run) for run in runs},
        "bytes_total": kept_run(runs).total_bytes,
        "bytes_code": (runs[0].folder / ENTRY.name).stat().st_size,
        "artifact_bytes_mean": round(math.fsum(sizes) / len(sizes)),
        "artifact_bytes_max": max(sizes),
        "hardware": hardware(),
        "pytorch_version": torch_line[1] if torch_line else torch.__version__,
        "technique_summary": ", ".join(
            f"{key}={value}" for key, value in changed_settings(record.cfg).items()
        ),
        "compliance": compliance(record, checks),
        "source": get_source(),
        "attribution": {"notices": NOTICES},
        "base_pr": None,
    }
    comparison = record.comparison
    return facts | ({"comparison": comparison} if comparison else {})


# ----------------------------------------------------------------------------------------------------------
# README.md
# ----------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list]) -> str:
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def introduction(record: Record) -> str:
    """Return title and text above the first section of the recipe's README, else the record's name."""
    if not record.intro.is_file():
        return f"# {record.name.partition('_')[2].replace('_', ' ')}"
    return record.intro.read_text(encoding="utf-8").partition("\n## ")[0].strip()


def result_section(record: Record) -> str:
    """State the headline, the seeds and their files."""
    bpb, loss, kept = record.sample("val_bpb"), record.sample("val_loss"), kept_run(record.runs)
    rows = []
    for run in record.runs:
        result, score = run.result, run.result["score"]
        spent = [f"{result['steps']:,}", f"{result['train_ms'] / 1000:.1f}"]
        scores = [f"{score['val_loss']:.8f}", f"{run.val_bpb:.8f}"]
        sizes = [f"{run.model_bytes:,}", f"{run.total_bytes:,}"]
        rows.append([run.seed, *spent, *scores, *sizes, f"{score['seconds']:.1f}"])
        rows[-1].append(f"`{result['artifact_sha256']}`")
    header = ["seed", "steps", "training s", "val_loss", "val_bpb", "artifact", "code + artifact"]
    gap = max(abs(run.evaluation["val_bpb"] - run.val_bpb) for run in record.runs)
    program = kept.folder / ENTRY.name
    spread = "" if bpb.std is None else f", std {bpb.std:.8f}"
    text = (
        f"**val_bpb {bpb.mean:.8f}** (n {bpb.n}{spread}), val_loss {loss.mean:.8f} nats a token.\n\n"
        f"{table([*header, 'scoring s', 'sha256 of the artifact'], rows)}\n\n"
        f"All seeds ran this folder's `{ENTRY.name}`, {program.stat().st_size:,} bytes, sha256 "
        f"`{sha256_file(program)}`. A score is measured from the artifact's bytes; a fresh process "
        f"measured it again, at most {gap:.1e} bits a byte away."
    )
    if keeps_artifact(record.runs):
        text += f" `{ARTIFACT_NAME}` is that of seed {kept.seed}, whose score is the nearest to the mean."
    if any(train_points(run) for run in record.runs):
        text += f"\n\n![Training loss by step, a curve a seed]({CURVES_NAME})"
    return text


def train_points(run: Run) -> list[tuple[float, float]]:
    """Return (step, nats a token) of a run: of all its steps, or of those in its log."""
    events = split_events(run.folder / METRICS_NAME)[0] or logged_events(run.log)
    return event_curves(events)["training"]


def comparison_section(comparison: dict) -> str:
    """State every test against the row to beat."""
    rows = [
        [row["test"], row["margin"], f"{row['t']:.3f}", f"{row['df']:.2f}", f"{row['p']:.3g}"]
        for row in comparison["tests"]
    ]
    sides = [
        [name, side["n"], f"{side['mean']:.8f}", "" if side["std"] is None else f"{side['std']:.8f}"]
        for name, side in ((name, comparison[name]) for name in ("new", "old"))
    ]
    notes = "".join(f"\n\nWarning: {text}." for text in comparison["warnings"])
    return (
        f"{table(['side', 'n', 'mean val_bpb', 'std'], sides)}\n\n"
        f"{table(['one-sided test', 'margin', 't', 'df', 'p'], rows)}{notes}"
    )


def audit_section(checks: list[dict]) -> str:
    """List the verdicts; the evidence is in audit.json."""
    titles = {check.id: check.title for check in CHECKS}
    rows = [[check["id"], titles[check["id"]], check["verdict"]] for check in checks]
    silent = [check for check in checks if check["verdict"] == "NOT RUN" and check["evidence"]]
    absent = [f"{check['id']} ({check['evidence'][0]})" for check in silent]
    return f"{table(['check', 'of', 'verdict'], rows)}\n\nNot run: {'; '.join(absent) or 'none'}."


def commands(record: Record) -> str:
    """Spell out how to repeat training, score, audit and test from the repository's root."""
    folder, kept = f"records/{record.track.name}/{record.name}", kept_run(record.runs)
    places = kept.result["places"]
    data = f"data.data_path={places['data.data_path']} data.tokenizer_path={places['data.tokenizer_path']}"
    lines = [f"python {folder}/{ENTRY.name} run.seed={kept.seed} {data}"]
    if keeps_artifact(record.runs):
        lines.append(f"python -m eval {folder}")
    against = f" --against {folder}/{BASELINE}" if record.old else ""
    lines += [f"python -m audit {folder}{against}", f"python -m eval.stats {folder}{against}"]
    return "\n".join(lines)


def build_readme(record: Record, checks: list[dict]) -> str:
    """Write README.md."""
    changed = "\n".join(f"{name} = {value}" for name, value in changed_settings(record.cfg).items())
    sections = {"Result": result_section(record)}
    if comparison := record.comparison:
        sections["Against the row to beat"] = comparison_section(comparison)
    if checks:
        sections["Audit"] = audit_section(checks)
    sections["Configuration"] = f"`recipe.toml`; unlike the naive baseline:\n\n```\n{changed}\n```"
    source = get_source()
    sections["Again"] = (
        f"On {hardware()}, requirements.txt installed. Packed from the source of commit "
        f"{source['commit'] or 'unknown'} (sha256 of its modules {source['sha256']}):\n\n"
        f"```\n{commands(record)}\n```"
    )
    parts = [introduction(record), *(f"## {title}\n\n{text}" for title, text in sections.items())]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def list_requirements(folder: Path) -> str:
    """Pin the packages that the packed program imports; those that are not installed are named only."""
    installed = packages_distributions()
    names = sorted(third_party_imports(read_program(SubmissionFolder(folder), {}, "")))
    pins = {
        f"{distribution}=={version(distribution).partition('+')[0]}"
        for name in names
        for distribution in installed.get(name, ())[:1]
    }
    lines = sorted(pins)
    if absent := [name for name in names if name not in installed]:
        lines.append(f"# imported where present, absent where this was measured: {', '.join(absent)}")
    return "".join(f"{line}\n" for line in lines)


@cache
def get_source() -> dict:
    """Say which source the program was packed from: commit, files changed since, and a hash of every module.

    The hash is over trainer, packer and scorer with all that they import; `python -m dev.submission` prints
    that of a checkout.
    """
    labels = {module.label for entry in SOURCES for module in collect(entry, ROOT)}
    return {
        "commit": ask_git("rev-parse", "HEAD"),
        "changed": ask_git("diff", "--name-only", "HEAD", "--", *sorted(labels)).split(),
        "sha256": hash_sources(ROOT, labels),
    }


def ask_git(*arguments: str) -> str:
    """Ask git about this checkout; empty where there is none."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def hash_sources(root: Path, labels: Iterable[str]) -> str:
    """Hash files by their names below the root and their contents."""
    rows = [f"{label} {sha256_file(root / label)}\n" for label in sorted(labels)]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def write_files(folder: Path, record: Record) -> None:
    """Copy what the runs left: program, recipe, logs, artifact, requirements, the row to beat."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept_run(record.runs)
    copies = {record.recipe: "recipe.toml", kept.folder / ENTRY.name: ENTRY.name}
    copies |= {run.folder / "train.log": f"train_seed{run.seed}.log" for run in record.runs}
    if keeps_artifact(record.runs):
        copies |= {kept.folder / name: name for name in (ARTIFACT_NAME, "result.json")}
    for file, name in copies.items():
        shutil.copyfile(file, folder / name)
    curves = {f"seed {run.seed}": points for run in record.runs if (points := train_points(run))}
    if curves:
        picture = draw_curves(f"{record.name}: training loss", curves)
        (folder / CURVES_NAME).write_text(picture, encoding="utf-8")
    (folder / "requirements.txt").write_text(list_requirements(folder), encoding="utf-8")
    if record.old:
        write_json(folder / BASELINE, {"scores": [row._asdict() for row in record.old]})


def write_claims(folder: Path, record: Record, checks: list[dict]) -> None:
    """Write README.md, submission.json and audit.json; without checks, claims that can be audited."""
    (folder / "README.md").write_text(build_readme(record, checks), encoding="utf-8")
    write_json(folder / "submission.json", build_submission(record, checks))
    write_json(folder / "audit.json", {"checks": checks})


def main(argv: list[str] | None = None) -> None:
    """Print the source of a checkout."""
    description = "Print commit, changed files and hash of the source that records are made with, as JSON."
    CommandParser(prog="python -m dev.submission", description=description).parse_args(argv)
    print(json.dumps(get_source()))


if __name__ == "__main__":
    run_command(main)
