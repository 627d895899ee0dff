"""The old name of `python -m audit`."""

import runpy
import sys

if __name__ == "__main__":
    print("python -m eval.audit is called python -m audit now", file=sys.stderr)
    runpy.run_module("audit", run_name="__main__", alter_sys=True)
