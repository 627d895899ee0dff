"""Run campaigns: cases from a seed until all are tried or the time is over; count what survived."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from common import UserError
from dev.soak.place import Bench, Place
from dev.soak.process import GRACE_SECONDS, Miss, kill_marked, split_tracebacks, wait_until_gone

PROGRESS_SECONDS = 5
MOST_MISSES = 50  # sentences that a row keeps


class Campaign(NamedTuple):
    """A row of the table: what is tried, what must hold, and one case of it."""

    name: str
    holds: str
    # (rng, bench, place, tries that are left) -> tries that it made
    case: Callable[[Random, Bench, Place, int], int]
    tries: int  # by default


class Settings(NamedTuple):
    """How campaigns are run."""

    seed: int
    seconds: float  # in all; 0: until all is tried
    keep: bool  # folders of cases that missed


class Row:
    """What a campaign has found so far."""

    def __init__(self, campaign: Campaign, asked: int):
        self.campaign, self.asked = campaign, asked
        self.tried = self.survived = self.walls = 0
        self.misses: list[str] = []
        self.started = self.shown = time.monotonic()
        self.seconds = 0.0

    def add(self, tries: int, miss: str) -> None:
        """Count a case."""
        self.seconds = time.monotonic() - self.started
        self.tried += tries
        self.survived += 0 if miss else tries
        if miss:
            self.misses.append(miss)
            print(f"{self.campaign.name}: MISS: {miss}", file=sys.stderr)
        if self.tried >= self.asked or time.monotonic() - self.shown > PROGRESS_SECONDS:
            self.shown = time.monotonic()
            left = self.seconds * (self.asked - self.tried) / max(self.tried, 1)
            print(
                f"{self.campaign.name}: {self.tried}/{self.asked} survived:{self.survived} "
                f"seconds:{self.seconds:.0f} seconds_left:{max(left, 0):.0f}",
                file=sys.stderr,
            )

    def as_json(self) -> dict:
        """Return the row of the report."""
        return {
            "campaign": self.campaign.name,
            "holds": self.campaign.holds,
            "asked": self.asked,
            "tried": self.tried,
            "survived": self.survived,
            "misses": self.misses[:MOST_MISSES],
            "launcher_tracebacks": self.walls,
            "seconds": round(self.seconds, 1),
        }


def settle(place: Place) -> tuple[str, int]:
    """End what a case has left; returns what is wrong with that, or "", and the launcher's tracebacks."""
    left = wait_until_gone(place.mark, GRACE_SECONDS) if place.jobs else {}
    kill_marked(place.mark, place.jobs)
    tracebacks, walls = split_tracebacks("".join(job.text for job in place.jobs))
    if tracebacks:
        return f"a traceback: {tracebacks[0][:160]}", walls
    if left:
        return f"a process is left: {next(iter(left.values()))[:120]}", walls
    return "", walls


def run_case(row: Row, rng: Random, bench: Bench, keep: bool) -> None:
    """Run the next case and count it."""
    place = bench.open_place(row.campaign.name, row.tried)
    left = row.asked - row.tried
    try:
        tries, miss = row.campaign.case(rng, bench, place, left), ""
    except Miss as error:
        tries, miss = 1, str(error)
    except (OSError, UserError) as error:  # files that are not there: what should have been written
        tries, miss = 1, f"{type(error).__name__}: {error}"
    except BaseException:
        kill_marked(place.mark, place.jobs)
        raise
    wrong, walls = settle(place)
    row.walls += walls
    row.add(tries, miss or wrong)
    if not (keep and (miss or wrong)):
        place.close()


def run_campaigns(asked: list[tuple[Campaign, int]], settings: Settings) -> tuple[list[Row], dict[str, str]]:
    """Run campaigns one after another, each with an equal share of the time that is left."""
    end = time.monotonic() + settings.seconds
    rows = []
    bench = Bench(Path(tempfile.mkdtemp(prefix="soak_")) / "bench", settings.seed)
    try:
        for index, (campaign, tries) in enumerate(asked):
            row = Row(campaign, tries)
            rows.append(row)
            share = (end - time.monotonic()) / (len(asked) - index)
            rng = Random(f"{settings.seed} {campaign.name}")
            while row.tried < tries and (not settings.seconds or row.seconds < share):
                run_case(row, rng, bench, settings.keep)
    finally:
        if settings.keep:
            print(f"kept: {bench.folder}", file=sys.stderr)
        else:
            bench.close()
    return rows, {name: str(note) for name, note in bench.notes.items()}


def status_of(rows: list[dict]) -> str:
    """Say how it ended: passed only when everything was tried and survived."""
    if any(row["survived"] < row["tried"] for row in rows):
        return "failed"
    untried = [row for row in rows if row["tried"] < row["asked"]]
    if untried:
        parts = ", ".join(f"{row['campaign']} {row['tried']} of {row['asked']}" for row in untried)
        return f"not all was tried: {parts}"
    return "passed"
