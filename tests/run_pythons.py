"""Find Python 3.11 to 3.14 on this machine, or fetch those that are missing, to pack under each of them.

    python -m tests.run_pythons            what is at hand
    python -m tests.run_pythons --fetch    fetch the rest into .pythons/

uv fetches native builds; where its server is out of reach, npm fetches CPython compiled to WebAssembly
(Pyodide), which Node runs. Packing needs no more of a Python than its standard library.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common import run_command

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / ".pythons"
PYODIDE = {"3.11": "0.25.1", "3.12": "0.27.7", "3.13": "0.29.4", "3.14": "314.0.7"}  # releases on npm
NODE_SCRIPT = Path(__file__).with_name("pyodide.mjs")


def interpreters() -> dict[str, list[str]]:
    """Map the versions at hand to commands that run them like `python`; the running one is always there."""
    running = "{}.{}".format(*sys.version_info)
    found = {running: [sys.executable]}
    for version in VERSIONS:
        if version != running:
            usable = next(filter(_runs, _candidates(version)), None)
            found |= {version: usable} if usable else {}
    return dict(sorted(found.items()))


def _candidates(version: str) -> Iterator[list[str]]:
    """Yield commands that may be a Python of this version, the best first."""
    places = {FOLDER: f"cpython-{version}.*/bin", Path.home() / ".pyenv" / "versions": f"{version}.*/bin"}
    yield [f"python{version}"]
    for folder, pattern in places.items():
        yield from ([str(path / f"python{version}")] for path in sorted(folder.glob(pattern)))
    packages = FOLDER / f"pyodide-{version}"
    if (packages / "node_modules").is_dir():
        yield ["node", str(NODE_SCRIPT), str(packages)]


def _runs(command: list[str]) -> bool:
    """Whether a command is there and runs a program: a shim of a version manager may not."""
    if not shutil.which(command[0]):
        return False
    return subprocess.run([*command, "-c", "pass"], capture_output=True, check=False).returncode == 0


def fetch(version: str) -> str:
    """Fetch a version; returns how, or why not."""
    folder = str(FOLDER / f"pyodide-{version}")
    commands = {
        "uv": [sys.executable, "-m", "uv", "python", "install", version, "--install-dir", str(FOLDER)],
        "npm": ["npm", "install", "--no-save", "--prefix", folder, f"pyodide@{PYODIDE[version]}"],
    }
    reasons = []
    for tool, command in commands.items():
        if not shutil.which(command[0]):
            reasons.append(f"{tool}: not installed")
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return f"fetched by {tool}"
        reasons.append(f"{tool}: {(done.stderr.strip().splitlines() or ['failed'])[-1].strip()}")
    return f"not fetched ({'; '.join(reasons)})"


def main(argv: list[str] | None = None) -> None:
    """List the interpreters, fetching those that are missing if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.run_pythons",
        description=__doc__.partition("\n")[0] + " `make test-pythons` uses it.",
    )
    parser.add_argument("--fetch", action="store_true", help="fetch the missing versions into .pythons/")
    options = parser.parse_args(argv)
    found = interpreters()
    missing = [version for version in VERSIONS if version not in found]
    if options.fetch and missing:
        for version in missing:
            print(f"python {version}: fetching", flush=True)
            print(f"python {version}: {fetch(version)}", flush=True)
        found = interpreters()
    for version in VERSIONS:
        print(f"python {version}: {' '.join(found.get(version, ['missing']))}")


if __name__ == "__main__":
    run_command(main)
