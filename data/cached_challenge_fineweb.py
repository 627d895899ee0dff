"""The contest's name for its download: `python data/cached_challenge_fineweb.py --variant sp1024`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import run_command
from data.download import main

if __name__ == "__main__":
    run_command(main)
