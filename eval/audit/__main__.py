"""Audit a record folder: will it be accepted, and if not, why?

    python -m eval.audit records/track_10min_16mb/2026-...           table on the terminal
    python -m eval.audit FOLDER --markdown                           ready to paste into a pull request
    python -m eval.audit FOLDER --against OLD_FOLDER --json          with the test against the row to beat
    python -m eval.audit FOLDER --artifact FOLDER/artifact.bin       and the probes of the model's scores

Reads logs, JSON and source; nothing of the folder is executed (an artifact is data). Exit status by the worst
verdict: 0 PASS (or NOT RUN), 3 SUSPECT, 4 FAIL; 1 and 2 are errors of the command.
"""

import json
from pathlib import Path

from data.errors import CommandParser, run_command
from eval.audit.folder import Case, Folder, find_track, read_logs, read_submission
from eval.audit.program import read_program
from eval.audit.report import Findings, as_json, as_markdown, as_text, exit_status
from eval.audit.table import judge
from eval.stats import read_scores


def read_case(root: Path, against: list[Path] | None = None) -> Case:
    """Read a folder once for all checks."""
    folder = Folder(root)
    submission, error = read_submission(folder)
    readme = folder.text("README.md") if folder.named("README.md") else ""
    logs = read_logs(folder)
    program = read_program(folder, logs[0].config if logs else {}, readme)
    values = [row.val_bpb for row in read_scores(against)] if against else None
    track = find_track(folder, submission)
    return Case(folder, track, readme, submission, error, logs, program, values)


def audit_folder(root: Path, against: list[Path] | None = None, artifact: Path | None = None) -> Findings:
    """Return every check of the table with its finding."""
    measured = None
    if artifact:
        from eval.audit.artifact import probe_artifact  # torch, which the folder audit does without

        measured = probe_artifact(artifact)
    return judge(read_case(root, against), measured)


def main(argv: list[str] | None = None) -> int:
    """Audit a folder and print the report."""
    parser = CommandParser(prog="python -m eval.audit", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of records/")
    parser.add_argument("--against", nargs="+", type=Path, help="logs, JSON or folders of the row to beat")
    parser.add_argument("--artifact", type=Path, help="an artifact of this harness to probe (minutes)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    shape.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args(argv)
    findings = audit_folder(args.folder, args.against, args.artifact)
    name = args.folder.resolve().name
    if args.json:
        print(json.dumps(as_json(name, findings)))
    else:
        print((as_markdown if args.markdown else as_text)(name, findings))
    return exit_status(findings)


if __name__ == "__main__":
    run_command(main)
