"""The old name of `python -m tests.run_reference`."""

import runpy
import sys

if __name__ == "__main__":
    print("python -m dev.reference_table is called python -m tests.run_reference now", file=sys.stderr)
    runpy.run_module("tests.run_reference", run_name="__main__", alter_sys=True)
