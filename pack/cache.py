"""Packed programs that were made before, by the hash of all that they are made from."""

import hashlib
import json
import sys
from pathlib import Path

from common import UserError, atomic_file, read_json, sha256_file, write_json
from pack.program import REPOSITORY, PackReport, has_library, pack, read_sections

LIBRARIES = ("brotli", "python_minifier")  # a missing one leaves a step out


def cached_pack(recipe_path: Path | None, out: Path, entry: Path, method: str, cache: Path) -> PackReport:
    """Pack, or copy what the same sources, recipe and tools gave before; `cache` is a folder of results."""
    root = entry.resolve().parent
    packages = [REPOSITORY / "pack", *(path.parent for path in root.glob("*/__init__.py"))]
    files = sorted({*root.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))})
    asked = {
        "tools": [sys.version, *(has_library(name) for name in LIBRARIES)],
        "method": method,
        "recipe": read_sections(recipe_path) if recipe_path else None,
        "entry": entry.name,
        "sources": [sha256_file(path) for path in files],
    }
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    program, note = cache / f"{key}.py", cache / f"{key}.json"
    try:
        kept = read_json(note)
        is_whole = kept["sha256"] == sha256_file(program)
    except (UserError, OSError, KeyError, TypeError):  # there is none, or it is damaged
        is_whole = False
    if not is_whole:
        report = pack(recipe_path, program, entry, method)
        kept = {"report": report._asdict(), "sha256": sha256_file(program)}
        write_json(note, kept)
    with atomic_file(out) as file:
        file.write(program.read_bytes())
    return PackReport(**kept["report"] | {"out": str(out)})
