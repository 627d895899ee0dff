"""Try to lose something: kill runs, damage files, fill disks, let writers meet; on tiny models, from a seed.

    python -m dev.soak                                   everything, 18 minutes on two cores
    python -m dev.soak --only kills,flips --minutes 5    a part of it
    python -m dev.soak --json FILE                       also as JSON
    python -m dev.soak --enter FILE                      its table into docs/nothing-lost.md

A row of CAMPAIGNS is a campaign; a case of it works in a temporary folder with one or two ranks, on the CPU,
without network. After each case no process of it may be left and none may have printed a traceback. The exit
status is 0 only when everything that was asked for was tried and survived.
"""

import argparse
import signal
from pathlib import Path

from common import CommandParser, UserError, choose_named, run_command, write_json
from dev.soak import disk_full, flips, kills, mutations, restarts, signals, writers
from dev.soak.driver import Campaign, Settings, run_campaigns
from dev.soak.report import PAGE, enter, format_plain, make_report

CAMPAIGNS = (
    Campaign(
        "kills", "killed anywhere, a third inside a write: same losses, artifact, weights", kills.case, 100
    ),
    Campaign("flips", "a damaged file is refused in a sentence", flips.case, 1000),
    Campaign(
        "mutations",
        "any file, mutated, loads equal or is refused in a sentence",
        mutations.case,
        2000,
    ),
    Campaign(
        "signals", "a stopped run says so, keeps its step, goes on to the same artifact", signals.case, 20
    ),
    Campaign("restarts", "torchrun restarts lost ranks: same artifact; none outlives it", restarts.case, 10),
    Campaign(
        "disk-full", "one sentence, last good files stay, goes on once there is room", disk_full.case, 8
    ),
    Campaign("writers", "one writer a folder: nothing mixed, nothing overwritten", writers.case, 8),
)


def count(text: str) -> int:
    """Read how many cases; 0 leaves a campaign out."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """Read a time limit in minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, found {text!r}")
    return value


def choose(options: argparse.Namespace) -> list[tuple[Campaign, int]]:
    """Return the campaigns that are asked for, with their numbers of cases; raises for an unknown name."""
    chosen = choose_named(CAMPAIGNS, options.only, "--only")
    asked = [(one, getattr(options, one.name.replace("-", "_"))) for one in chosen]
    return [(one, tries) for one, tries in asked if tries]


def main(argv: list[str] | None = None) -> int:
    """Run campaigns, or enter what they found."""
    parser = CommandParser(prog="python -m dev.soak", description=__doc__)
    for one in CAMPAIGNS:
        parser.add_argument(
            f"--{one.name}", type=count, default=one.tries, metavar="N", help=f"{one.holds} (%(default)s)"
        )
    parser.add_argument(
        "--minutes", type=minutes, default=0, metavar="M", help="at most; shared by campaigns"
    )
    parser.add_argument(
        "--seed", type=count, default=1, metavar="S", help="of everything drawn (%(default)s)"
    )
    parser.add_argument("--only", default="", metavar="A,B", help="campaigns; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--enter", type=Path, metavar="FILE", help="enter a report into the docs")
    options = parser.parse_args(argv)
    if options.enter:
        report = enter(options.enter)
        print(f"{PAGE}: {report['date']}, {report['status']}")
        return 0
    if not Path("/proc/self/environ").is_file():
        raise UserError(
            "expected Linux, whose /proc shows what a kill has left running, found another system."
        )
    # So that what was started is ended; and what is started ignores no signal that a background job, or one
    # under nohup, was told to ignore.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    settings = Settings(options.seed, 60 * options.minutes, options.keep)
    rows, notes = run_campaigns(choose(options), settings)
    report = make_report([row.as_json() for row in rows], options.seed, notes)
    if options.json:
        write_json(options.json, report)
    print(format_plain(report))
    return int(report["status"] != "passed")


if __name__ == "__main__":
    run_command(main)
