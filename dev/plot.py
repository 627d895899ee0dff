"""Draw docs/progress.svg from the records of the CPU track: val_bpb of every seed, mean and deviation.

    python -m dev.plot                     the committed picture
    python -m dev.plot --out picture.svg   another file

Read are submission.json (scores from the artifacts) and the seeds' logs (scores of the trained weights, plain
windows side by side, before quantization and the record's own scorer). The same records give the same bytes.
"""

import math
import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from xml.sax.saxutils import escape

from common import CommandParser, UserError, atomic_file, read_json, run_command
from eval.stats import summarize
from formats.recipe import read_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
TRACK = REPOSITORY / "records" / "track_cpu"
PICTURE = REPOSITORY / "docs" / "progress.svg"
TRAINED = re.compile(r"^step:\d+/\d+ val_loss:\S+ val_bpb:(\d+\.\d+)", re.MULTILINE)

WIDTH, LEFT, RIGHT, TOP, BOTTOM, ROW = 760, 200, 40, 84, 66, 74  # pixels
TICK = 0.2  # bits per byte
STYLE = """
.paper { fill: #ffffff } .ink { fill: #1f2328 } .pale { fill: #59636e } .grid { stroke: #d1d9e0 }
.seed { fill: #0969da } .open { fill: none; stroke: #59636e; stroke-width: 1.5 }
.mean { stroke: #0969da; stroke-width: 2 } .link { stroke: #59636e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .pale { fill: #9198a1 } .grid { stroke: #3d444d }
  .seed { fill: #4493f8 } .open { stroke: #9198a1 } .mean { stroke: #4493f8 } .link { stroke: #9198a1 }
}
"""


class Entry(NamedTuple):
    """What the picture shows of a record."""

    name: str
    scores: list[float]  # val_bpb by seed, measured from the artifact
    trained: list[float]  # the same of the trained weights, chunked; as printed
    num_bytes: int  # code + artifact, the largest of the seeds
    seconds: float  # the training clock


def read_entries(track: Path = TRACK) -> list[Entry]:
    """Read the records of a track that hold results, highest score first."""
    entries = []
    for path in sorted(track.glob("*/submission.json")):
        seeds = read_json(path)["seed_results"]
        logs = [path.with_name(f"train_seed{seed}.log").read_text(encoding="utf-8") for seed in seeds]
        entries.append(
            Entry(
                path.parent.name.partition("_")[2],
                [row["val_bpb"] for row in seeds.values()],
                [float(found[-1]) for log in logs if (found := TRAINED.findall(log))],
                max(row["artifact_bytes"] for row in seeds.values()),
                read_recipe(path.with_name("recipe.toml"))["run.max_wallclock_seconds"],
            )
        )
    if not entries:
        raise UserError(f"{track}: expected records with a submission.json, found none. Run make record.")
    return sorted(entries, key=lambda entry: -fmean(entry.scores))


def text(x: float, y: float, words: str, look: str = "ink", anchor: str = "start", size: int = 12) -> str:
    """Return a line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} class="{look}">{escape(words)}</text>'


def draw(entries: list[Entry]) -> str:
    """Draw a row a record: a dot a seed, mean and deviation, rings where the trained weights stand."""
    values = [value for entry in entries for value in entry.scores + entry.trained]
    low = math.floor(min(values) / TICK - 0.5) * TICK  # half a tick of room for labels
    high = math.ceil(max(values) / TICK + 0.5) * TICK
    height = TOP + ROW * len(entries) + BOTTOM
    floor = height - BOTTOM

    def at(bpb: float) -> float:
        return LEFT + (bpb - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    title = "Bits per byte of the CPU track: two cores, minutes of training"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>',
        text(20, 30, title, size=16),
        text(20, 52, "dots: one seed each, from the artifact; bar: mean and standard deviation", "pale"),
        text(20, 68, "rings: the trained weights before quantization, without adaptive scoring", "pale"),
    ]
    for i in range(round((high - low) / TICK) + 1):
        x = at(low + i * TICK)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>')
        parts.append(text(x, floor + 18, f"{low + i * TICK:.1f}", "pale", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, floor + 40, "val_bpb, lower is better", "ink", "middle"))
    for i, entry in enumerate(entries):
        parts += draw_entry(entry, TOP + ROW * (i + 0.5), at)
    return "\n".join([*parts, "</svg>\n"])


def draw_entry(entry: Entry, y: float, at) -> list[str]:
    """Draw a record's row at height y; `at` places a score."""
    mean, std = (summarize(entry.scores)[i] for i in (1, 2))
    spread = "" if std is None else f" \u00b1 {std:.4f}"
    ends = [at(mean - (std or 0)), at(mean + (std or 0))]
    facts = f"{entry.seconds:.0f} s, {entry.num_bytes / 1000:,.0f} KB, n = {len(entry.scores)}"
    parts = [
        text(20, y - 2, entry.name, size=13),
        text(20, y + 15, facts, "pale"),
        text(at(mean), y - 17, f"{mean:.4f}{spread}", "ink", "middle"),
    ]
    trained = fmean(entry.trained or [mean])
    if abs(trained - mean) > TICK:
        parts.append(f'<path class="link" d="M{at(trained):.1f} {y}H{at(mean):.1f}"/>')
        parts.append(text(at(trained), y - 17, f"{trained:.4f}", "pale", "middle"))
    parts.append(f'<path class="mean" d="M{ends[0]:.1f} {y}H{ends[1]:.1f}"/>')
    parts += [f'<path class="mean" d="M{x:.1f} {y - 8}V{y + 8}"/>' for x in (*ends, at(mean))]
    parts += [f'<circle class="open" cx="{at(value):.1f}" cy="{y}" r="6"/>' for value in entry.trained]
    parts += [f'<circle class="seed" cx="{at(value):.1f}" cy="{y}" r="3.5"/>' for value in entry.scores]
    return parts


def main(argv: list[str] | None = None) -> None:
    """Draw the picture."""
    parser = CommandParser(prog="python -m dev.plot", description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="file to write (docs/progress.svg)")
    out = parser.parse_args(argv).out
    with atomic_file(out) as file:
        file.write(draw(read_entries()).encode("ascii", "xmlcharrefreplace"))
    print(out)


if __name__ == "__main__":
    run_command(main)
