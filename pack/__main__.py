"""Pack a recipe into the smallest file that runs: `python -m pack --help`."""

from common import run_command
from pack.program import main

if __name__ == "__main__":
    run_command(main)
