"""Audit a record folder or a program: will it be accepted, and if not, why?

    python -m audit records/track_10min_16mb/2026-...           table on the terminal
    python -m audit FOLDER --markdown                           ready to paste into a pull request
    python -m audit FOLDER --against OLD_FOLDER --json          with the test against the row to beat
    python -m audit --run train_gpt.py [--recipe R]             run it in a miniature world and attack it
    python -m audit FOLDER --run FOLDER/train_gpt.py --data DIR everything
    python -m audit --cases                                     the violations library

The folder audit reads logs, JSON and source; nothing of the folder is executed. --run executes the program in
a sandbox: no network, no rights, no environment, bounded time, memory and processes. Exit status by the worst
verdict: 0 PASS (or NOT RUN), 3 SUSPECT, 4 FAIL; 1 and 2 are errors of the command.
"""

import json
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path

from audit.checks import Finding, join, worst
from audit.folder import Case, SubmissionFolder, find_track, read_logs, read_submission
from audit.matrix import CASES, print_matrix
from audit.program import read_program
from audit.report import Findings, as_json, as_markdown, as_text, exit_status
from audit.run import run_program
from audit.table import CHECKS, judge
from common import CommandParser, UserError, choose_named, run_command
from data.doctor import examine
from eval.stats import read_scores

DOCTOR_STATES = {"ok": "PASS", "note": "PASS", "labelled": "SUSPECT", "skipped": "NOT RUN", "FAIL": "FAIL"}
DOCTOR_CHECKS = {
    "K9": ("tokenizer", "byte account", "val totals", "sidecars"),
    "K10": ("overlap", "natural duplicates"),
}


def read_case(root: Path, against: list[Path] | None = None) -> Case:
    """Read a folder once for all checks."""
    folder = SubmissionFolder(root)
    submission, error = read_submission(folder)
    readme = folder.text("README.md") if folder.named("README.md") else ""
    logs = read_logs(folder)
    program = read_program(folder, logs[0].config if logs else {}, readme)
    values = [row.val_bpb for row in read_scores(against)] if against else None
    track = find_track(folder, submission)
    return Case(folder, track, readme, submission, error, logs, program, values)


def audit_folder(
    root: Path, against: list[Path] | None = None, measured: dict[str, Finding] | None = None
) -> Findings:
    """Return every check of the table with its finding; `measured` holds those of probes that were run."""
    return judge(read_case(root, against), measured)


def audit_data(folder: Path, tokenizer: Path | None) -> dict[str, Finding]:
    """K9 and K10 from what data.doctor says of the data."""
    states = {found.check: found for found in examine(folder, tokenizer)}
    findings = {}
    for check, names in DOCTOR_CHECKS.items():
        rows = [states[name] for name in names if name in states and states[name].state != "skipped"]
        texts = [f"{row.check}: {row.detail}" for row in rows]
        verdict = worst(*(DOCTOR_STATES[row.state] for row in rows)) if rows else "NOT RUN"
        findings[check] = Finding(verdict, texts or ["data.doctor had nothing to compare"])
    return findings


def read_settings(pairs: list[str]) -> dict[str, str]:
    """Split KEY=VALUE words, as the README of a record prints them before its command."""
    bad = [pair for pair in pairs if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair)]
    if bad:
        raise UserError(f"--env: expected KEY=VALUE, found {bad[0]!r}.")
    return dict(pair.split("=", 1) for pair in pairs)


def measure(args: Namespace) -> dict[str, Finding]:
    """Run what needs the program or the data; a finding about the real data stands beside the miniature's."""
    found = run_program(args.run, args.recipe, read_settings(args.env)) if args.run else {}
    if args.artifact:
        from audit.artifact import probe_artifact

        found |= probe_artifact(args.artifact)
    for check, finding in (audit_data(args.data, args.tokenizer) if args.data else {}).items():
        other = found.get(check, Finding("PASS", []))
        found[check] = join(finding, other)
    return found


def build_parser() -> CommandParser:
    """Declare the command line."""
    parser = CommandParser(prog="python -m audit", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of records/")
    parser.add_argument("--against", nargs="+", type=Path, help="logs, JSON or folders of the row to beat")
    parser.add_argument("--run", type=Path, metavar="PROGRAM", help="a train_gpt.py to run (minutes)")
    parser.add_argument("--recipe", type=Path, help="with --run: a recipe for this harness's source")
    parser.add_argument("--env", nargs="*", default=[], metavar="KEY=VALUE", help="with --run: its settings")
    parser.add_argument("--artifact", type=Path, help="an artifact of this harness to probe (minutes)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="token shards to examine for K9 and K10")
    parser.add_argument("--tokenizer", type=Path, help="with --data: default is the one beside the shards")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="run the violations library; default: all")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    shape.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Audit and print the report."""
    args = build_parser().parse_args(argv)
    read_settings(args.env)
    if args.cases is not None:
        return print_matrix(choose_named(CASES, ",".join(args.cases), "--cases"))
    if not (args.folder or args.run or args.data):
        raise UserError("expected a folder, --run PROGRAM, --data DIR or --cases, found none. See --help.")
    measured = measure(args)
    if args.folder:
        findings = audit_folder(args.folder, args.against, measured)
    else:
        findings = [(check, measured[check.id]) for check in CHECKS if check.id in measured]
    name = (args.folder or args.run or args.data).resolve().name
    if args.json:
        print(json.dumps(as_json(name, findings)))
    else:
        print((as_markdown if args.markdown else as_text)(name, findings))
    return exit_status(findings)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that programs end and their folders go
    run_command(main)
