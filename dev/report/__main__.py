"""Write a report on runs and records: one HTML file that needs no network, light or dark, also on a phone.

    python -m dev.report runs/A runs/B records/track_cpu/NAME --out runs/compared.html
    python -m dev.report runs --text essay.txt      every run in runs/; the heat map is of your text
    python -m dev.report runs/A --tokens 0          without scoring anything: seconds

Read are finished, unfinished and half-written runs; each section says what it lacks and how to get it. Where
a folder holds the artifact and the data are there, the first --tokens validation tokens are scored.
"""

import math
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from common import CommandParser, UserError, atomic_file, existing, run_command
from dev.desk import charts
from dev.desk.extras import require
from dev.desk.runs import RunFacts, check_page, read_runs
from eval.stats import json_text

TOKENS, SECONDS = 16_384, 6.0
PAGE = Path("runs", "report.html")
MOST_RUNS = 40  # beyond, charts and tables are not readable


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)


def count(text: str) -> int:
    """Read a number of tokens; 0 is none."""
    if not text.isdecimal() or len(text) > 12:
        raise ArgumentTypeError(f"expected a whole number from 0 on, found {text[:40]!r}")
    return int(text)


def duration(text: str) -> float:
    """Read a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise ArgumentTypeError(f"expected a number of seconds, found {text[:40]!r}")
    return seconds


def at_best(make: Callable, *args):
    """Return what a function makes, or the sentence of the UserError that says why it cannot."""
    try:
        return make(*args)
    except UserError as error:
        return str(error)
    except (OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


def newest_run() -> Path:
    """Name the run that was finished last."""
    from eval import runs

    return runs.newest_run()


def collect(runs: list[RunFacts], text: Path | None, num_tokens: int, seconds: float):
    """Read and measure all that a page is made from; scoring takes about so many seconds."""
    from dev.report.compare import group_runs
    from dev.report.costs import measure_costs
    from dev.report.page import Facts
    from dev.report.pictures import Drawn
    from dev.report.series import read_config, read_series
    from dev.report.sizes import tensor_sizes

    configs, said = zip(*(read_config(run) for run in runs))
    groups = group_runs(runs, list(configs))
    rows = []
    for run, cfg in zip(runs, configs):
        i = next(i for i, group in enumerate(groups) if run in group.runs)
        member = groups[i].runs.index(run)
        look = charts.style(i, member) if len(groups) > 1 else charts.style(member)
        rows.append(Drawn(run, read_series(run, cfg), look))
    sizes, costs = {}, {}
    stored = [run for run in runs if run.artifact]
    for i, run in enumerate(stored):
        place, left = f"{run.name} ({i + 1} of {len(stored)})", seconds * (1 - i / len(stored))
        say(f"{place}: weighing its tensors")
        sizes[run.name] = at_best(tensor_sizes, run.artifact)
        if num_tokens:
            say(f"{place}: scoring at most {num_tokens:,} tokens; about {left:.0f} s left for all scoring")
            deadline = time.perf_counter() + seconds / len(stored)
            costs[run.name] = at_best(measure_costs, run, text, num_tokens, deadline)
    for run in runs:
        if run not in stored and run.kind != "weights":
            why = "the folder holds no artifact of this seed."
            sizes[run.name] = costs[run.name] = why
        elif not num_tokens:
            costs[run.name] = "not scored, as --tokens 0 says."
    return Facts(rows, groups, [note for note in said if note], sizes, costs)


def describe(runs: list[RunFacts], out: Path, num_bytes: int, seconds: float) -> dict:
    """Return what --json says."""
    rows = [
        {"name": run.name, "folder": str(run.folder), "kind": run.kind, "state": run.state, "seed": run.seed,
         "val_bpb": run.val_bpb, "bytes": sum(run.ledger.values()) or None, "notes": list(run.notes)}
        for run in runs
    ]  # fmt: skip
    return {"out": str(out), "bytes": num_bytes, "seconds": round(seconds, 2), "runs": rows}


def main(argv: list[str] | None = None) -> None:
    """Write the report."""
    parser = CommandParser(prog="python -m dev.report", description=__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        type=existing,
        help="run folders, records, folders of them; default: the newest run",
    )
    add("--out", type=Path, default=PAGE, help="file to write (%(default)s)")
    add("--text", type=existing, help="UTF-8 text for the heat map; default: the validation text's start")
    add("--tokens", type=count, default=TOKENS, help="validation tokens to score (%(default)s); 0: none")
    add("--seconds", type=duration, default=SECONDS, help="that scoring may take, about (%(default)s)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    check_page(args.out, [path for path in [*args.runs, args.text] if path and path.is_file()])
    for package in ("jinja2", "matplotlib"):
        require(package)
    runs = read_runs(args.runs or [newest_run()])
    if len(runs) > MOST_RUNS:
        raise UserError(f"expected at most {MOST_RUNS} runs, found {len(runs)}. Name fewer of them.")
    from dev.report.page import render

    facts = collect(runs, args.text, args.tokens, args.seconds)
    say(f"drawing the charts of {len(runs)} run{'s' * (len(runs) > 1)}")
    page = render(facts).encode()
    say(f"drawn after {time.perf_counter() - started:.1f} s")
    with atomic_file(args.out) as file:
        file.write(page)
    seconds = time.perf_counter() - started
    if args.json:
        print(json_text(describe(runs, args.out, len(page), seconds)))
    else:
        num_runs = f"{len(runs)} run{'s' * (len(runs) > 1)}"
        print(f"{args.out}: {num_runs}, {len(page):,} bytes, made in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
