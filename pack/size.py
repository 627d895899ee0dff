"""Weigh the shipped program: what each section of train_gpt.py and each bundled module costs.

    python -m pack.size --recipe records/.../recipe.toml

Packed bytes of a part are marginal: the packed program minus the packed program without the part's
statements. Parts share words, so these do not add up to the whole, and a small part can cost nothing.
"""

import ast
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import CommandParser, format_table, run_command
from pack.names import Import
from pack.program import (
    ENTRY,
    IMPORTS_LABEL,
    PackingError,
    best_method,
    bundle,
    has_library,
    minify,
    parse_source,
    read_sections,
    specialize,
    to_source,
    wrap,
)
from pack.specialize.syntax import is_text

BANNER_RULE = re.compile(r"# -{20,}$")
BANNER_NAME = re.compile(r"# (\d+ .*\S)\s*$")
BEFORE_BANNERS = "0 docstring"


class SectionSize(NamedTuple):
    """A section or module: its name, lines and bytes in the file, packed bytes it adds."""

    name: str
    lines: int
    source_bytes: int
    packed_bytes: int


class SizeReport(NamedTuple):
    """The parts and the whole: lines and bytes of the files, bytes after each step of packing."""

    parts: list[SectionSize]
    lines: int
    source_bytes: int
    bundled_bytes: int
    folded_bytes: int
    minified_bytes: int
    packed_bytes: int


def sections(source: str) -> list[tuple[str, int]]:
    """Find the banners: (name, line of its upper rule) in order; what comes before is a section, too."""
    lines = source.split("\n")
    found = [(BEFORE_BANNERS, 1)]
    for i, (rule, name) in enumerate(pairwise(lines), start=1):
        match = BANNER_NAME.match(name)
        if BANNER_RULE.match(rule) and match:
            found.append((match[1], i))
    return found


def weigh(recipe_path: Path | None, entry: Path = ENTRY) -> SizeReport:
    """Pack the program whole and without each part, and measure."""
    entry = entry.resolve()
    parse_source(entry, entry.name)
    found = sections(entry.read_text(encoding="utf-8"))
    statements = bundle(entry, entry.parent)
    source = to_source(statements)
    bundled_bytes, labels = len(source.encode()), {statement.label for statement in statements}
    if recipe_path is not None:
        statements = specialize(statements, read_sections(recipe_path))
        source = to_source(statements)
    minified = minify(source) if has_library("python_minifier") else source
    pieces = top_level_pieces(minified)
    owners = [
        [name for name, start in found if start <= node.lineno][-1] if label == entry.name else label
        for label, node in statements
        if not (is_text(node) or isinstance(node, Import))  # minifying removes texts
    ]
    owners = [IMPORTS_LABEL] * (len(pieces) - len(owners)) + owners
    whole = packed_bytes(pieces)
    parts = []
    texts = source_texts(entry, found, labels).items()
    for name, text in tqdm(texts, desc="weigh", unit=" parts", mininterval=1.0, disable=None):
        rest = [piece for piece, owner in zip(pieces, owners, strict=True) if owner != name]
        parts.append(SectionSize(name, text.count("\n"), len(text.encode()), whole - packed_bytes(rest)))
    lines, source_bytes = sum(part.lines for part in parts), sum(part.source_bytes for part in parts)
    packed = len(wrap(minified, best_method()))
    sizes = (source_bytes, bundled_bytes, len(source.encode()), len(minified.encode()), packed)
    return SizeReport(parts, lines, *sizes)


def top_level_pieces(text: str) -> list[str]:
    """Cut minified source into its top-level statements: imports first, the others in order."""
    lines = text.split("\n")
    imports, pieces = [], []
    for node in ast.parse(text).body:
        first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
        alone = node.col_offset == 0 and node.end_col_offset == len(lines[node.end_lineno - 1].encode())
        piece = "\n".join(lines[first - 1 : node.end_lineno]) if alone else ast.get_source_segment(text, node)
        (imports if isinstance(node, Import) else pieces).append(piece)
    return imports + pieces


def packed_bytes(pieces: list[str]) -> int:
    """Size of the packed file that holds these statements."""
    return len(wrap("\n".join(pieces), best_method()))


def source_texts(entry: Path, found: list[tuple[str, int]], labels: set[str]) -> dict[str, str]:
    """Return the readable text of every part: sections in order, then modules by name.

    Third-party imports of all files are one part of the bundle; their text counts where it stands.
    """
    lines = entry.read_text(encoding="utf-8").splitlines(keepends=True)
    starts = [start - 1 for _, start in found] + [len(lines)]
    texts = {name: "".join(lines[a:b]) for (name, _), (a, b) in zip(found, pairwise(starts), strict=True)}
    for label in sorted(labels - {entry.name, IMPORTS_LABEL}):
        texts[label] = (entry.parent / label).read_text(encoding="utf-8")
    return texts | {IMPORTS_LABEL: ""}


def format_report(report: SizeReport) -> str:
    """Lay the report out as a table."""
    rows = [*report.parts, ("total", report.lines, report.source_bytes, report.packed_bytes)]
    width = max(len(row[0]) for row in rows)
    columns = {"part": f"<{width}", "lines": ">8,", "source bytes": ">14,", "packed bytes": ">14,"}
    return format_table(columns, rows) + (
        f"\nlines:{report.lines} source_bytes:{report.source_bytes} bundled_bytes:{report.bundled_bytes} "
        f"folded_bytes:{report.folded_bytes} minified_bytes:{report.minified_bytes} "
        f"packed_bytes:{report.packed_bytes}"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = CommandParser(
        prog="python -m pack.size",
        description="Lines and bytes of the shipped program by section of train_gpt.py and by module. Packed "
        "bytes of a part are what the packed file shrinks by when the part is left out.",
    )
    parser.add_argument("--recipe", type=Path, help="recipe.toml to embed (default: none)")
    parser.add_argument("--entry", type=Path, default=ENTRY, help="program to weigh (default: train_gpt.py)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(argv)
    if not options.entry.is_file():
        raise PackingError(f"{options.entry}: no such program. --entry names the file to weigh.")
    if not has_library("python_minifier"):
        note = "python_minifier is not installed: sizes are those of the program without that step"
        print(note, file=sys.stderr)
    report = weigh(options.recipe, options.entry)
    if options.json:
        print(json.dumps(report._asdict() | {"parts": [part._asdict() for part in report.parts]}))
    else:
        print(format_report(report))


if __name__ == "__main__":
    run_command(main)
