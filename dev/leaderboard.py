"""Write the leaderboard of records/: tables by track, progress over dates, bytes against bits a byte.

    python -m dev.leaderboard                      docs/leaderboard.html
    python -m dev.leaderboard --json               one JSON object: the records with their scores

Every number is a record's own: scores of its seeds from the artifacts, bytes of its submission. A recipe that
was not run here is listed without a score.
"""

import math
import os
import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

from common import CommandParser, UserError, atomic_file, run_command
from dev.desk import charts
from dev.desk.extras import require
from dev.desk.runs import RunFacts, check_page, find_folders, is_record, read_record
from eval.stats import Sample, json_text, summarize

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDS, PAGE = REPOSITORY / "records", REPOSITORY / "docs" / "leaderboard.html"
FOLDER_NAME = re.compile(r"(\d{4}-\d\d-\d\d)_(.+)")
NOT_RUN = "not run here"


class Entry(NamedTuple):
    """A record, or a recipe that waits for one."""

    track: str
    day: str  # YYYY-MM-DD; "" where the folder's name has none
    name: str
    folder: Path
    sample: Sample | None  # of val_bpb over its seeds
    num_bytes: int | None  # code + artifact, the largest of the seeds; None where that is not known
    notes: tuple[str, ...]

    def facts(self) -> dict:
        """Return what --json says."""
        sample = self.sample._asdict() if self.sample else None
        return self._asdict() | {"folder": str(self.folder), "sample": sample, "notes": list(self.notes)}


def read_entries(root: Path) -> list[Entry]:
    """Read all records of a folder by track, the best first, what has no scores last."""
    folders = [folder for folder in find_folders(root) if is_record(folder)] if root.is_dir() else []
    if not folders:
        raise UserError(f"{root}: expected records (recipe.toml and README.md in a folder each), found none.")
    entries = [read_entry(folder, read_record(folder)) for folder in folders]
    ranked = {one.track for one in entries if one.sample}

    def place(one: Entry) -> tuple:
        return (
            one.track not in ranked,
            one.track,
            one.sample.mean if one.sample else math.inf,
            one.day,
            one.name,
        )

    return sorted(entries, key=place)


def read_entry(folder: Path, seeds: list[RunFacts]) -> Entry:
    """Sum up the seeds of a record."""
    scores = [run.val_bpb for run in seeds if run.val_bpb is not None]
    named = FOLDER_NAME.fullmatch(folder.name)
    day, name = named.groups() if named else ("", folder.name)
    sample = summarize(scores) if scores else None
    notes = tuple(dict.fromkeys(note for run in seeds for note in run.notes if run.result))
    size = max((sum(run.ledger.values()) for run in seeds), default=0) or None
    return Entry(folder.parent.name, day, name, folder, sample, size, notes)


def draw_progress(track: str, entries: list[Entry]) -> str:
    """Draw the scores over the dates and the best until then."""
    rows = sorted((day, one.sample.mean, one.name) for one in entries if (day := read_day(one.day)))
    if not rows:
        return ""
    said = "; ".join(f"{day}: {name} {bpb:.4f}" for day, bpb, name in rows)
    with charts.chart(f"Progress: {track}", "val_bpb, bits a byte", f"Scores by date. {said}.") as drawn:
        best = [min(bpb for other, bpb, _ in rows if other <= day) for day, *_ in rows]
        drawn.ax.step([day for day, *_ in rows], best, where="post", color=charts.colour(0))
        drawn.ax.plot([day for day, *_ in rows], [row[1] for row in rows], "o", color=charts.colour(0))
        for day, bpb, name in rows:
            drawn.ax.annotate(
                name, (day, bpb), (5, 4), textcoords="offset points", fontsize=charts.LETTERS - 2
            )
        dates = require("matplotlib.dates")
        drawn.ax.set_xticks(sorted({day for day, *_ in rows})[-5:])
        drawn.ax.xaxis.set_major_formatter(dates.DateFormatter("%Y-%m-%d"))
        drawn.ax.margins(x=0.3, y=0.15)
    return drawn.svg


def read_day(text: str) -> date | None:
    """Read a date as folders have it; None for one that the calendar does not know."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


def draw_sizes(track: str, entries: list[Entry]) -> str:
    """Draw bytes against bits a byte: the lower left is better."""
    rows = [(one.num_bytes, one.sample.mean, one.name) for one in entries if one.num_bytes]
    if not rows:
        return ""
    said = "; ".join(f"{name}: {size:,} bytes, {bpb:.4f}" for size, bpb, name in rows)
    title = f"Bytes against score: {track}"
    with charts.chart(title, "val_bpb, bits a byte", f"{title}. {said}.") as drawn:
        drawn.ax.plot([row[0] for row in rows], [row[1] for row in rows], "o", color=charts.colour(1))
        for size, bpb, name in rows:
            drawn.ax.annotate(
                name, (size, bpb), (5, 4), textcoords="offset points", fontsize=charts.LETTERS - 2
            )
        drawn.ax.set_xlabel("bytes of code and artifact")
        drawn.ax.xaxis.set_major_formatter(charts.short_number)
        drawn.ax.margins(x=0.3, y=0.15)
    return drawn.svg


def render(entries: list[Entry], beside: Path) -> str:
    """Return the page; links are relative to its folder."""
    from dev.report.page import Block, Section, Table, number, render_page

    markup, sections = require("markupsafe").Markup, []
    for track in dict.fromkeys(one.track for one in entries):
        found = [one for one in entries if one.track == track]
        scored = [one for one in found if one.sample]
        rows = []
        for one in found:
            link = markup('<a href="{}">{}</a>').format(
                os.path.relpath(one.folder / "README.md", beside), one.name
            )
            mean, std, n = (one.sample.mean, one.sample.std, one.sample.n) if one.sample else (None, None, 0)
            score = f"{mean:.4f}" if one.sample else NOT_RUN
            rows.append([link, one.day, score, number(std, ".4f"), n, number(one.num_bytes)])
        head = ["record", "date", "val_bpb", "std", "n", "most bytes"]
        figures = [svg for svg in (draw_progress(track, scored), draw_sizes(track, scored)) if svg]
        blocks = [Block("table", Table(head, rows)), *([Block("figures", figures)] if figures else [])]
        blocks += [Block("warning", note) for one in found for note in one.notes]
        sections.append(Section(track, track, blocks))
    subtitle = (
        "Means over seeds, measured from the artifacts. Tracks score different text: they do not compare."
    )
    return render_page("Leaderboard", subtitle, sections)


def main(argv: list[str] | None = None) -> None:
    """Write the leaderboard."""
    parser = CommandParser(prog="python -m dev.leaderboard", description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (records/)")
    parser.add_argument("--out", type=Path, default=PAGE, help="file to write (docs/leaderboard.html)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and write no file")
    args = parser.parse_args(argv)
    check_page(args.out)
    entries = read_entries(args.records)
    if args.json:
        print(json_text({"records": [one.facts() for one in entries]}))
        return
    page = render(entries, args.out.resolve().parent)
    with atomic_file(args.out) as file:
        file.write(page.encode())
    print(args.out)


if __name__ == "__main__":
    run_command(main)
