"""Tables of what the null GPU counted, the comparison with the stored figures, and the table of the docs."""

import re
from collections.abc import Iterator
from pathlib import Path

from common import UserError, format_table, read_json, write_json
from dev.pages import DOCS, write_block

FIGURES = Path(__file__).with_name("figures.json")
PAGE = DOCS / "gpu-and-multi-node.md"
COMMAND = "python -m dev.null_gpu --store"  # which makes a part of the page
STORED = ("before", "after")  # columns of the docs; the check takes the last that is there
TOP = 12  # kernels that are listed

# How far a figure may be from the stored one, as a share of it: the first pattern that its name matches.
TOLERANCES = (
    (r"cpu_ms|compile_s", None),  # this machine's: never compared
    (r"peak_gb|reserved_gb|triton_gb|products_tflop", 0.01),
    (r"", 0.0),
)
# Tables of the docs: which cases are columns, and which figures rows, with how the page says them.
STEP_ROWS = (
    ("launches_forward_backward", "launches, forward and backward", ",.0f"),
    ("launches_update", "launches, update", ",.0f"),
    ("loop_syncs", "waits of the host, a step", ",.4g"),
    ("loop_copies_to_device", "copies to the device, a step", ",.4g"),
    ("loop_pageable_copies", "of them not from pinned memory", ",.4g"),
    ("loop_copies_to_host", "copies to the host, a step", ",.4g"),
    ("loop_copies_on_device", "copies on the device, a step", ",.4g"),
    ("peak_gb", "peak, GB", ",.1f"),
    ("triton_gb", "moved by Triton's kernels, GB", ",.1f"),
    ("products_tflop", "matrix products, TFLOP", ",.1f"),
    ("attention_blocks", "blocks, largest attention launch", ",.0f"),
    ("graph_breaks", "graph breaks", ",.0f"),
    ("recompiles", "recompiles", ",.0f"),
)
LORA_ROWS = (
    ("launches_300", "launches, documents of 300 tokens", ",.0f"),
    ("launches_2000", "launches, documents of 2,000 tokens", ",.0f"),
    ("syncs_2000", "waits of the host", ",.4g"),
    ("peak_gb_1000", "peak, documents of 1,000 tokens, GB", ",.1f"),
)
CALIBRATION_ROWS = (
    ("launches", "launches", ",.0f"),
    ("syncs", "waits of the host", ",.4g"),
    ("peak_gb", "peak, GB", ",.1f"),
    ("reserved_gb", "held by the allocator, GB", ",.1f"),
)
DOC_TABLES = (
    (("step_1061_low", "step_1061_full", "step_1061_fused", "step_naive"), STEP_ROWS),
    (("lora_chunk",), LORA_ROWS),
    (("calibration",), CALIBRATION_ROWS),
)

Figures = dict[str, dict[str, float]]  # case -> name -> value


def tolerance(name: str) -> float | None:
    """Return how far a figure may move, as a share; None: it is not compared."""
    return next(share for pattern, share in TOLERANCES if re.search(pattern, name))


def lasting(row: dict[str, float]) -> dict[str, float]:
    """Return the figures of a case that are compared, in six digits."""
    return {name: float(f"{value:.6g}") for name, value in row.items() if tolerance(name) is not None}


def moved(expected: Figures, found: Figures) -> Iterator[str]:
    """Yield a line for each figure that is not what it is expected to be, for the cases that were found."""
    for case, figures in found.items():
        known = expected.get(case, {})
        for name in sorted({*known, *figures}):
            share = tolerance(name) or 0.0
            before, now = known.get(name), figures.get(name)
            if before is None or now is None:
                yield f"{case} {name}: expected {text_of(before)}, found {text_of(now)}"
            elif abs(now - before) > share * abs(before) + 1e-9:
                allowed = f" (+- {share:.0%})" if share else ""
                yield f"{case} {name}: expected {text_of(before)}{allowed}, found {text_of(now)}"


def text_of(value: float | None) -> str:
    """Write a figure for people."""
    return "none" if value is None else f"{value:,.6g}"


def check(stored: dict, torch_version: str, found: Figures) -> None:
    """Raise where figures moved, with what to do next."""
    column = next((name for name in reversed(STORED) if name in stored), None)
    if column is None:
        raise UserError(f"{FIGURES}: expected stored figures, found none. Run with --store.")
    if stored[column]["torch"] != torch_version:
        raise UserError(
            f"expected torch {stored[column]['torch']}, whose figures are stored, found {torch_version}. "
            "Name an environment with it (--environment), or keep figures of this one with --store."
        )
    lines = list(moved(stored[column]["cases"], {case: lasting(row) for case, row in found.items()}))
    if lines:
        raise UserError(
            f"{len(lines)} figures moved from those stored as {column!r}:\n  " + "\n  ".join(lines) + "\n"
            "If that is meant, keep them with `python -m dev.null_gpu --store` and commit; else look for "
            "what the last change gave the device to do."
        )


def format_figures(figures: Figures) -> str:
    """Lay all figures out, a line each."""
    rows = [(case, name, text_of(value)) for case, found in figures.items() for name, value in found.items()]
    return format_table({"case": "<16", "figure": "<28", "value": ">14"}, rows)


def format_kernels(kernels: list[dict], names: dict[str, str]) -> str:
    """List the most frequent kernels; names maps the compiler's names to readable ones."""
    rows = [
        (row["launches"], row["blocks"], names.get(row["name"], row["name"])[:100]) for row in kernels[:TOP]
    ]
    return format_table({"launches": ">8,", "most blocks": ">14,", "  kernel": "<102"}, pad_names(rows))


def format_bytes(bytes_by_kernel: dict[str, int]) -> str:
    """List the kernels of Triton that move most, over all their launches; empty without any."""
    most = sorted(bytes_by_kernel.items(), key=lambda item: -item[1])[:TOP]
    rows = [(num_bytes / 1e9, f"  {name[:100]}") for name, num_bytes in most]
    return format_table({"GB moved": ">8.2f", "  kernel": "<102"}, rows) if rows else ""


def pad_names(rows: list[tuple]) -> list[tuple]:
    """Set the last column off from the numbers before it."""
    return [(*row[:-1], f"  {row[-1]}") for row in rows]


def read_figures(path: Path) -> dict:
    """Read the stored figures; empty where nothing is stored."""
    return read_json(path) if path.is_file() else {}


def store(column: str, torch_version: str, found: Figures, figures: Path, page: Path) -> None:
    """Keep figures under a column's name, and rewrite the tables of a page; cases not found stay."""
    stored = read_figures(figures)
    kept = {case: lasting(row) for case, row in found.items()}
    stored[column] = {"torch": torch_version, "cases": stored.get(column, {}).get("cases", {}) | kept}
    write_json(figures, {name: stored[name] for name in STORED if name in stored})
    write_block(page, COMMAND, format_docs(stored))


def format_docs(stored: dict) -> str:
    """Write the figures as the docs' Markdown tables: for each case a column for each time of storing."""
    return "\n\n".join(format_doc_table(stored, cases, rows) for cases, rows in DOC_TABLES)


def format_doc_table(stored: dict, cases: tuple[str, ...], rows: tuple) -> str:
    """Write one of them."""
    columns = [(case, name) for case in cases for name in STORED]
    titles = " | ".join(f"{case}: {name}" if name == STORED[0] else name for case, name in columns)
    lines = [f"| | {titles} |", "|---|" + "---:|" * len(columns)]
    for figure, label, spec in rows:
        values = [stored.get(name, {}).get("cases", {}).get(case, {}).get(figure) for case, name in columns]
        cells = ["" if value is None else format(value, spec) for value in values]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
