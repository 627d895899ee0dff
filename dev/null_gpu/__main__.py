"""Count what the trainer gives a GPU, without a GPU: launches, waits, copies, memory, bytes, graph breaks.

    python -m dev.null_gpu                            all cases, each in a process of its own; some 4 minutes
    python -m dev.null_gpu --cases step_naive,calibration
    python -m dev.null_gpu --kernels                  the kernels launched most, and their largest grids
    python -m dev.null_gpu --json FILE                everything, as JSON
    python -m dev.null_gpu --check                    exit 1 where a figure moved from the stored ones
    python -m dev.null_gpu --store                    keep these (figures.json), rewrite the table of the docs
    python -m dev.null_gpu --make-environment         .venv-cuda: the CUDA build of torch, 4.8 GB

A C library is preloaded below the CUDA build of torch: memory is host memory with the limit of an 80 GB H100,
and kernels do nothing. So the real program runs, eager and compiled, and what it asks of the device can be
counted exactly; how long that would take, and every number that is computed, cannot be known. Linux on x86-64
with gcc alone.

Cases
{cases}

What the figures mean
  launches      kernels and calls of cuBLAS; copies and fills on the device are counted apart
  loop_...      a step of the training loop, between lines of its log; the mean of 16
  ..._syncs     the host waits until the device has done what it was given
  pageable      copies from memory that is not pinned: the host waits for them, too
  triton_gb     bytes of the tensors that kernels of Triton are given (read and written: twice), by generated
                code and by kernels of our own; GB here is 1e9 bytes
  products_tflop  2 m n k of every call of cuBLAS
  attention_blocks  the largest grid of an attention kernel. Kernels for rows of any length launch blocks for
                the longest row that they are told of: with a whole packed row it would be millions
  cpu_ms, compile_s  of this machine, without Triton's launcher and compiler: never compared
Another case is a row of CASES in cases.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from common import CommandParser, UserError, read_json, run_command, write_json
from dev.null_gpu import report
from dev.null_gpu.cases import CASES, FOUND_NAME
from dev.null_gpu.environment import (
    DEFAULT_ENVIRONMENT,
    ROOT,
    SCRATCH,
    CudaEnvironment,
    build_library,
    make_environment,
    open_environment,
    variables,
)

CASE_SECONDS = 600
ERROR_CHARS = 2000


def choose_cases(text: str) -> list[str]:
    """Return the named cases in the order of the table; raises for an unknown name."""
    names = set(text.split(",")) if text else set(CASES)
    if unknown := names - set(CASES):
        raise UserError(f"--cases: expected some of {', '.join(CASES)}, found {', '.join(sorted(unknown))}.")
    return [case for case in CASES if case in names]


def run_case(case: str, environment: CudaEnvironment, library: Path) -> dict:
    """Run a case in a process of its own; returns what it found. Raises with the end of its errors."""
    folder = SCRATCH / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [str(environment.python), "-m", "dev.null_gpu.child", case, str(library), str(folder)]
    log = folder / "log.txt"
    with open(log, "wb") as file:
        try:
            process = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=variables(library, folder / "caches"),
                timeout=CASE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{case}: expected an end in {CASE_SECONDS} s, found none. See {log}.") from error
    if process.returncode:
        tail = log.read_text(errors="replace")[-ERROR_CHARS:]
        raise UserError(
            f"{case}: expected exit status 0, found {process.returncode}; the end of {log}:\n{tail}\n"
            "`make gpu-check` tells whether the program is at fault. What the null GPU does not answer is a "
            "function to add to dev/null_gpu/null_gpu.c."
        )
    return read_json(folder / FOUND_NAME)


def readable(kernels: list[dict]) -> dict[str, str]:
    """Map the compiler's names of kernels to readable ones; empty without c++filt."""
    names = [row["name"] for row in kernels]
    if not shutil.which("c++filt"):
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines()))


def describe() -> str:
    """Return the help's text with the list of cases."""
    return __doc__.format(cases="\n".join(f"  {name:<15} {case.title}" for name, case in CASES.items()))


def parse(argv: list[str] | None):
    """Read the command line."""
    parser = CommandParser(prog="python -m dev.null_gpu", description=describe())
    parser.add_argument("--cases", default="", metavar="A,B", help="of those above; default: all")
    parser.add_argument(
        "--environment",
        type=Path,
        default=DEFAULT_ENVIRONMENT,
        metavar="FOLDER",
        help="a virtual environment with the CUDA build of torch; default: .venv-cuda",
    )
    parser.add_argument("--make-environment", action="store_true", help="make that folder, then stop")
    parser.add_argument("--kernels", action="store_true", help="list the kernels launched most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--check", action="store_true", help="compare with the stored figures")
    parser.add_argument(
        "--store",
        nargs="?",
        const="after",
        choices=report.STORED,
        help="keep the figures in this column of the docs (default: after)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Count, print, and compare or store."""
    args = parse(argv)
    cases = choose_cases(args.cases)
    if args.make_environment:
        make_environment(args.environment)
        return
    environment = open_environment(args.environment)
    library = build_library(environment)
    found = {}
    for case in cases:
        print(f"{case}: under way", file=sys.stderr, flush=True)
        found[case] = run_case(case, environment, library)
    figures = {case: row["figures"] for case, row in found.items()}
    print(report.format_figures(figures))
    for case, row in found.items() if args.kernels else ():
        print(f"\n{case}\n{report.format_kernels(row['kernels'], readable(row['kernels']))}")
        print(report.format_bytes(row["bytes_by_kernel"]))
    if args.json:
        write_json(args.json, found)
    if args.check:
        report.check(report.read_figures(report.FIGURES), environment.torch_version(), figures)
        print("\nas stored")
    if args.store:
        report.store(args.store, environment.torch_version(), figures, report.FIGURES, report.PAGE)
        print(f"\nstored as {args.store!r} in {report.FIGURES}")


if __name__ == "__main__":
    run_command(main)
