"""What a campaign found, as JSON, as a table for a terminal, and as the table of docs/nothing-lost.md."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common import UserError, format_table, read_json
from dev.gpu_battery.report import markdown_row
from dev.machine import look
from dev.pages import DOCS, write_block
from dev.soak.driver import status_of

FORMAT = 1
PAGE = DOCS / "nothing-lost.md"
COMMAND = "python -m dev.soak --enter"
PACKAGES = ("torch", "numpy", "safetensors", "filelock", "sentencepiece")
SHOWN_MISSES = 10  # of a campaign on a terminal
COLUMNS = {"campaign": "<12", "tried": ">14", "survived": ">10", "seconds": ">9"}


def find_versions() -> dict[str, str]:
    """Versions of Python and of the packages that read and write state."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def make_report(rows: list[dict], seed: int, notes: dict[str, str]) -> dict:
    """Put a report together."""
    machine = look()
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {name: machine[name] for name in ("system", "cores", "memory")},
        "versions": find_versions(),
        "seed": seed,
        "notes": notes,
        "status": status_of(rows),
        "rows": rows,
    }


def tried(row: dict) -> str:
    """Say how much was tried, and of how much where that is not all."""
    return f"{row['tried']:,}" if row["tried"] >= row["asked"] else f"{row['tried']:,} of {row['asked']:,}"


def format_plain(report: dict) -> str:
    """Lay a report out for a terminal."""
    table = [
        (row["campaign"], tried(row), row["survived"], f"{row['seconds']:.0f}") for row in report["rows"]
    ]
    lines = [format_table(COLUMNS, table)]
    for row in report["rows"]:
        counts = {miss: row["misses"].count(miss) for miss in row["misses"]}
        lines += [
            f"{row['campaign']}: {count} x {miss}" for miss, count in list(counts.items())[:SHOWN_MISSES]
        ]
    walls = sum(row["launcher_tracebacks"] for row in report["rows"])
    lines.append(f"tracebacks of torchrun itself, not counted as misses: {walls}")
    lines += [f"{name}: {note}" for name, note in report["notes"].items()]
    return "\n".join([*lines, f"status: {report['status']}, seed {report['seed']}"])


def format_page(report: dict) -> str:
    """Lay a report out as Markdown."""
    machine, versions = report["machine"], report["versions"]
    head = (
        f"{report['date']}, {machine['system']}, {machine['cores'].partition(',')[0]} cores, "
        f"{machine['memory']}, torch {versions['torch']}; seed {report['seed']}; {report['status']}."
    )
    notes = "".join(f" {name}: {note}." for name, note in report["notes"].items())
    lines = [
        head + notes,
        "",
        markdown_row(("campaign", "what must hold", "tried", "survived", "seconds")),
        "|---|---|---|---|---|",
    ]
    lines += [
        markdown_row(
            (row["campaign"], row["holds"], tried(row), f"{row['survived']:,}", f"{row['seconds']:.0f}")
        )
        for row in report["rows"]
    ]
    return "\n" + "\n".join(lines) + "\n"


def read_report(path: Path) -> dict:
    """Read what --json wrote; raises for another file."""
    report = read_json(path)
    rows = report.get("rows") if isinstance(report, dict) and report.get("format") == FORMAT else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected what `python -m dev.soak --json` writes, found another JSON file.")
    return report


def enter(path: Path, page: Path = PAGE) -> dict:
    """Put a report's table into the page; returns the report."""
    report = read_report(path)
    write_block(page, COMMAND, format_page(report))
    return report
