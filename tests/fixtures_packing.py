"""A stand-in for the packed program: packing takes seconds, and what most runs are tested for is not it.

As a script it is train_gpt.py with the stand-in, for tests that start runs in processes of their own:

    run_python(UNPACKED, "run.iterations=20", env=UNPACKED_ENVIRONMENT)
"""

import os
from pathlib import Path

import train_gpt
from common import run_command

UNPACKED = Path(__file__)
UNPACKED_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(train_gpt.__file__).parent)}
STAND_IN = b"# A stand-in for the packed program.\n"


def leave_stand_in(folder: Path) -> tuple[int, str]:
    """Write a program of a line where a run leaves its packed source; `train_gpt.weigh_code` of the tests."""
    (folder / "train_gpt.py").write_bytes(STAND_IN)
    return len(STAND_IN), ""


if __name__ == "__main__":
    train_gpt.weigh_code = leave_stand_in
    run_command(train_gpt.main)
