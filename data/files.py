"""Files that are never half written."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

from data.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: str | Path):
    """Yield a binary file that takes the name `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # a fixed name: a killed writer's rest is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(
                f"{path}: not written, the disk is full. Free space and run this again."
            ) from error
        raise
