"""What results.json says, for people: a plain table, or a Markdown one to paste into a journal."""

from collections.abc import Iterator
from itertools import pairwise

NOTE_CHARS = 160  # of an error that a table shows; the whole is in the file


def number(value: float | int) -> str:
    """Write a number as short as its size allows."""
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 10_000 else f"{value:.4g}"


def scalars(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield ("outer.inner", text) of what is one number or word; lists have tables of their own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from scalars(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, bool) or value is None or isinstance(value, str):
        yield name, {True: "yes", False: "no", None: "unknown"}.get(value, value)
    elif isinstance(value, int | float):
        yield name, number(value)


def lists(value, name: str) -> Iterator[tuple[str, list[dict]]]:
    """Yield (name, rows) of every list of objects with equal keys, such as the kernels of a profile."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from lists(item, f"{name}.{key}")
    elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        yield name, value


def describe(value) -> str:
    """Write one measurement on one line."""
    return ", ".join(f"{name} {text}".strip() for name, text in scalars(value)) or "see the file"


def table_rows(report: dict) -> Iterator[tuple[str, str, str]]:
    """Yield (part, measurement, what was found): the part's status, its results, its errors."""
    for name, part in report["parts"].items():
        reason = f": {part['reason']}" if part.get("reason") else ""
        spent = f" in {part['seconds']} s" if "seconds" in part else ""
        yield name, part["status"] + spent + reason, part["measures"]
        for measurement, value in part.get("results", {}).items():
            yield name, measurement, describe(value)
        for measurement, text in part.get("errors", {}).items():
            yield name, measurement, f"ERROR {' '.join(text.split())[:NOTE_CHARS]}"


def head(report: dict) -> str:
    """Say what was measured on: card, versions, date."""
    versions = report["parts"].get("machine", {}).get("results", {}).get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    what = "rehearsal in miniature, its numbers mean nothing" if report["rehearsal"] else "measured"
    return (
        f"{report['started']}, {what}; card: {report['card']}; "
        f"{', '.join(['Python ' + report['python'], *named])}; commit {report['commit']}; "
        f"{report['seconds']:.0f} s of {report['limit_s']:.0f}"
    )


def format_plain(report: dict) -> str:
    """Lay out the report for a terminal."""
    rows = list(table_rows(report))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
    lines = [head(report)]
    for (before, _, _), (part, measurement, text) in pairwise([("", "", ""), *rows]):
        shown = part if part != before else ""
        lines.append(f"{shown:<{widths[0]}}  {measurement:<{min(widths[1], 40)}}  {text}".rstrip())
    return "\n".join(lines)


def format_markdown(report: dict) -> str:
    """Lay out the report as Markdown tables: all measurements, then each list."""
    lines = [head(report), "", "| part | measurement | found |", "|---|---|---|"]
    lines += [markdown_row(row) for row in table_rows(report)]
    for name, part in report["parts"].items():
        for title, rows in lists(part.get("results", {}), name):
            columns = list(rows[0])
            lines += ["", title, "", markdown_row(columns), "|" + "---|" * len(columns)]
            lines += [markdown_row([describe(row.get(column)).strip() for column in columns]) for row in rows]
    return "\n".join(lines)


def markdown_row(cells) -> str:
    """Write one row; a bar would end a cell."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
