"""The old name of `python -m pack`."""

import sys

from common import run_command
from pack.__main__ import main

if __name__ == "__main__":
    print("python -m dev.pack is called python -m pack now", file=sys.stderr)
    run_command(main)
