"""Seal files as they are: those of an earlier version, or that a person changed.

python -m durable.reseal runs/NAME/result.json runs/NAME/metrics.jsonl
"""

from fnmatch import fnmatchcase
from pathlib import Path

from common import CommandParser, UserError, parse_json, read_json, run_command
from durable.seals import write_events, write_sealed

SEALED = ("result*.json", "manifest.json", "config.json", "evaluation.json", "tokenizer_report.json")


def seal_file(path: Path) -> None:
    """Seal a JSON file, or a log of events, as it is."""
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        events = [
            parse_json(line, f"{path}:{number}", strict=False) for number, line in enumerate(lines, start=1)
        ]
        if not all(isinstance(event, dict) and {"kind", "step"} <= event.keys() for event in events):
            raise UserError(f"{path}: expected events with kind and step, found others. Name another file.")
        write_events(path, [{key: event[key] for key in event if key != "crc32"} for event in events])
        return
    facts = read_json(path, strict=False)
    if not isinstance(facts, dict) or not any(fnmatchcase(path.name, pattern) for pattern in SEALED):
        raise UserError(f"{path}: expected one of {', '.join(SEALED)}, found another file. Name one of them.")
    write_sealed(path, facts)


def main(argv: list[str] | None = None) -> None:
    """Seal files."""
    parser = CommandParser(prog="python -m durable.reseal", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result.json, metrics.jsonl, ...")
    for path in parser.parse_args(argv).files:
        seal_file(path)
        print(f"{path}: sealed as it is")


if __name__ == "__main__":
    run_command(main)
