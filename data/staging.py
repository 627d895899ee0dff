"""Replace a dataset as a whole: its files are built in OUT/.staging and moved into place when finished.

The move has one moment of decision, a rename of .staging to .ready. Before it OUT is as it was, whatever
happens; after it the files take their places one by one, and readers of shards refuse the folder until
.ready is gone. The next writer completes a move that was cut off, and so does `python -m data.staging DIR`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import CommandParser, UserError, read_json, run_command, sync_folder, write_json
from data.shards import ALL_SHARDS_GLOB, MANIFEST_NAME, READY_NAME, REPORT_NAME
from durable.lock import lock_folder

STAGING_NAME = ".staging"
FILES_NAME = ".files.json"  # in .ready: the names of all new files in the order in which they are moved
REPLACED_GLOBS = (ALL_SHARDS_GLOB, REPORT_NAME)  # what new files do not name goes; other files stay


@contextmanager
def staged(out: str | Path, wait_s: float = 0.0) -> Iterator[Path]:
    """Yield the folder to build in, `out` being locked; its files replace those of `out` when the block ends.

    The manifest is moved after all others; a block that writes none changes nothing. Raises a UserError
    where another process writes to `out` and does so for wait_s more seconds.
    """
    out = Path(out)
    staging = out / STAGING_NAME
    with lock_folder(out, wait_s):
        settle(out)
        staging.mkdir()
        try:
            yield staging
            names = sorted(path.name for path in staging.iterdir() if path.name != MANIFEST_NAME)
            if (staging / MANIFEST_NAME).is_file():
                write_json(staging / FILES_NAME, [*names, MANIFEST_NAME])
                os.rename(staging, out / READY_NAME)
                sync_folder(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already where all went well
        settle(out)


def settle(out: Path) -> None:
    """Complete a move that was cut off and remove what was never finished. `out` is locked by the caller."""
    ready = out / READY_NAME
    if (ready / FILES_NAME).is_file():
        names = read_json(ready / FILES_NAME)
        for name in names[:-1]:
            move(ready / name, out)
        for path in (path for pattern in REPLACED_GLOBS for path in out.glob(pattern)):
            if path.name not in names:  # of an earlier, longer dataset
                path.unlink()
        sync_folder(out)
        move(ready / names[-1], out)
        sync_folder(out)
        (ready / FILES_NAME).unlink()
    for rest in (ready, out / STAGING_NAME):
        if rest.is_dir():
            shutil.rmtree(rest)


def move(path: Path, out: Path) -> None:
    """Move a file into `out` over what is there, unless an earlier try has."""
    try:
        if path.is_file():
            os.replace(path, out / path.name)
    except PermissionError as error:  # Windows: a program reads the old file
        raise UserError(
            f"{out / path.name}: not replaced ({error.strerror}). Close the program that uses it; then "
            f"`python -m data.staging {out}` puts the finished files in place."
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    summary = "Put the files of a finished dataset in place after its writer was cut off."
    parser = CommandParser(prog="python -m data.staging", description=summary)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the dataset")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    with lock_folder(folder):
        found = (folder / READY_NAME).is_dir()
        settle(folder)
    print(f"{folder}: {'the finished files are in place' if found else 'nothing to put in place'}")


if __name__ == "__main__":
    run_command(main)
