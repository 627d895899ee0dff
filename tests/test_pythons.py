"""A packed program has the same bytes whatever Python packed it, and compiles on every one of them.

The interpreters are those of this machine; `make test-pythons` fetches what is missing of 3.11 to 3.14.
"""

import hashlib
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from run_pythons import interpreters

from pack.program import ENTRY, REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PYTHONS = interpreters()
NAIVE = REPOSITORY / "records/track_10min_16mb/2026-03-17_NaiveBaseline/recipe.toml"

# What Pythons print differently: quotes in f-strings, and what folding can put there.
PROGRAM = r'''
"""A program whose texts are hard to quote."""

PACKED_RECIPE: dict | None = None
SEPARATOR = "\n"
TABLE = {"it's": 'a "quoted" key', "#": "\\"}


def describe(rows, width=7):
    """Return lines."""
    lines = [f"{', '.join(row)!r:>{width}} of {len(row):,}" for row in rows]
    lines.append(f"it's {TABLE["it's".strip()] if rows else 'none'} {SEPARATOR.join(rows[0])}".strip())
    lines.append(f"{TABLE['#']}{{}} {'nested ' + f'{width}'} {(lambda: width)()} {width=}")
    lines.append(f"""{rows[0][0]!s} said "it's" {'#' in TABLE}""")
    lines.append(f"""{len("it's")} <a b="{width}" c='{width if width else "it's"}'>""")
    lines.append(f"{width:\x7b>4} {lines!r:\">4.1} {lines.append('late')}")
    return SEPARATOR.join(lines)


def main():
    print(describe([["a", "b"], ["c"]]))


if __name__ == "__main__":
    main()
'''.replace("""TABLE["it's".strip()]""", "TABLE[list(TABLE)[0]]")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """A folder with what packing needs beside the standard library: pure Python, for any interpreter."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in ("python_minifier", "tqdm"):
        shutil.copytree(Path(find_spec(name).origin).parent, folder / name)
    return folder


def run_under(version: str, libraries: Path, *arguments: str) -> str:
    """Run `python` of a version in the repository; returns its output."""
    environment = {"PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [shutil.which(PYTHONS[version][0]), *PYTHONS[version][1:], *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def pack_everywhere(libraries: Path, folder: Path, *options: str) -> Path:
    """Pack under each interpreter, compile the program there, compare; returns the one program."""
    programs = {}
    for version in PYTHONS:
        out = folder / f"packed_{version}.py"
        run_under(version, libraries, "-m", "pack", "--out", str(out), *options)
        programs[version] = hashlib.sha256(out.read_bytes()).hexdigest()
    assert len(set(programs.values())) == 1, programs
    for version in PYTHONS:
        run_under(version, libraries, "-c", f"compile(open({str(out)!r}, 'rb').read(), 'packed', 'exec')")
    return out


def test_the_packer_sources_print_alike(libraries):
    """Every construct that the packed modules use, without the time that folding takes."""
    script = (
        "import hashlib; from pack.program import ENTRY, REPOSITORY, bundle, to_source; "
        "print(hashlib.sha256(to_source(bundle(ENTRY, REPOSITORY)).encode()).hexdigest())"
    )
    printed = {version: run_under(version, libraries, "-c", script).strip() for version in PYTHONS}
    assert len(set(printed.values())) == 1, printed


@pytest.mark.parametrize("wrap", ["none", "mix"])
def test_hard_texts_pack_to_the_same_bytes(libraries, tmp_path, wrap):
    """And mean the same: the packed program prints what the source prints."""
    source, recipe = tmp_path / "program.py", tmp_path / "recipe.toml"
    source.write_text(PROGRAM)
    recipe.write_text("[quant]\nbits = 6\n")
    options = ("--entry", str(source), "--recipe", str(recipe), "--wrap", wrap)
    packed = pack_everywhere(libraries, tmp_path, *options)
    outputs = {
        run_under(version, libraries, str(program)) for version in PYTHONS for program in (source, packed)
    }
    assert len(outputs) == 1
    assert 'it\'s a "quoted" key a\nb' in outputs.pop()


def test_the_naive_recipe_packs_to_the_same_bytes_and_starts_under_the_oldest(libraries, tmp_path):
    """What a participant packs on any machine runs on the judge's."""
    packed = pack_everywhere(libraries, tmp_path, "--recipe", str(NAIVE), "--wrap", "mix")
    started = subprocess.run(
        [sys.executable, str(packed), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert started.returncode == 0, started.stderr[-2000:]
    assert "section.key=value" in started.stdout
    assert ENTRY.name in started.stdout
