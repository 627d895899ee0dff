"""Charts by matplotlib as SVG that follows the page: its colours, its width, words for its readers.

with charts.chart("Loss", "nats a token") as drawn:
    drawn.ax.plot(xs, ys, **charts.style(0))
html = drawn.svg                     # inline in a page that has charts.VARIABLES
file = charts.standalone(drawn.svg)  # a file of its own
"""

import io
import re
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from dev.desk.extras import require
from formats.curves import COLOURS, GRID, PAPER

SIZE = (4.6, 3.0)  # inches of 72 points: less wide than a phone, so that letters can be read there
LETTERS = 9  # points
TITLE_LETTERS = 38  # of a line
# Colours that stand for a variable of the page, and what it is in the light and in the dark.
VARIABLES = {"paper": PAPER["paper"], "ink": PAPER["ink"], "pale": PAPER["pale"], "grid": GRID}
VARIABLES |= {f"series-{i}": pair for i, pair in enumerate(COLOURS)}
MARKS = {name: f"#fe{i:02x}dc" for i, name in enumerate(VARIABLES)}
MOST_LABELS = 3  # runs that a chart's own legend names; of more, a page has one for several charts
MARKERS = dict(zip("os^DvPX", "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716"))  # a letter for each
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "desk", "font.size": LETTERS, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.edgecolor": MARKS["grid"], "axes.labelcolor": MARKS["ink"],
    "grid.color": MARKS["grid"], "grid.linewidth": 0.6, "text.color": MARKS["ink"],
    "xtick.color": MARKS["pale"], "ytick.color": MARKS["pale"], "legend.frameon": False,
    "legend.fontsize": LETTERS - 1, "legend.labelcolor": MARKS["ink"], "lines.linewidth": 1.4,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@dataclass
class Chart:
    """A chart in the making; `svg` is there once its block ends."""

    title: str
    description: str  # what it shows, for those who cannot see it
    figure: Any
    ax: Any
    svg: str = ""
    legend: dict = field(default_factory=dict)  # settings of the legend, below the axes where there are many


def colour(i: int) -> str:
    """Return the colour of the i-th series."""
    return MARKS[f"series-{i % len(COLOURS)}"]


def style(i: int, member: int = 0) -> dict:
    """Return colour and dashes of a line: the i-th group's, its member of that number."""
    return {"color": colour(i), "linestyle": DASHES[member % len(DASHES)]}


def marker(i: int) -> str:
    """Return the mark of the i-th run's points."""
    return list(MARKERS)[i % len(MARKERS)]


def label(name: str, count: int) -> str | None:
    """Return what a legend calls a run among so many; None where the chart needs no legend, or has none."""
    return name if 1 < count <= MOST_LABELS else None


def swatch(look: dict) -> str:
    """Draw the line of a run for a legend, as style made its look."""
    _, dashes = look["linestyle"] if isinstance(look["linestyle"], tuple) else (0, ())
    stroke = next(f"var(--{name})" for name, mark in MARKS.items() if mark == look["color"])
    dashed = f' stroke-dasharray="{" ".join(str(2 * part) for part in dashes)}"' if dashes else ""
    line = f'<line x1="0" y1="4" x2="30" y2="4" style="stroke: {stroke}; stroke-width: 3"{dashed}/>'
    return f'<svg viewBox="0 0 30 8" role="img"><title>line</title><desc>of the run</desc>{line}</svg>'


@contextmanager
def chart(title: str, unit: str = "", about: str = "", height: float = SIZE[1]) -> Iterator[Chart]:
    """Yield a chart with axes, whose vertical one has a label; lines with labels get a legend."""
    matplotlib = require("matplotlib")
    svg = require("matplotlib.backends.backend_svg")
    figures = require("matplotlib.figure")
    with matplotlib.rc_context(SETTINGS):
        figure = figures.Figure(figsize=(SIZE[0], height), layout="constrained")
        drawn = Chart(title, about or title, figure, figure.add_subplot())
        words = textwrap.fill(title, TITLE_LETTERS)
        figure.suptitle(words, x=0.01, ha="left", fontsize=LETTERS + 1, fontweight="bold")
        drawn.ax.set_ylabel(unit)
        yield drawn
        handles, labels = drawn.ax.get_legend_handles_labels()
        if handles:
            drawn.legend = {"loc": "outside lower center", "ncols": 1 if max(map(len, labels)) > 20 else 2}
            figure.legend(handles, labels, **drawn.legend)
        figure.get_layout_engine().execute(figure)  # once: savefig lays out and draws twice
        figure.set_layout_engine("none")
        text = io.StringIO()
        svg.FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
        drawn.svg = follow_page(text.getvalue(), drawn)


def short_number(value: float, _=None) -> str:
    """Spell a number for a tick."""
    size, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / size:g}{unit}"


def follow_page(svg: str, drawn: Chart) -> str:
    """Make an SVG by matplotlib part of a page: variables for colours, its width, title and description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", svg, flags=re.DOTALL
    )
    for name, mark in MARKS.items():
        svg = svg.replace(mark, f"var(--{name})")
    svg = re.sub(r"font-family: [^;]*", "font-family: system-ui, sans-serif", svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    key = f"c{zlib.crc32(svg.encode()):08x}"  # names of parts must differ between the charts of a page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", svg)
    words = f"<title>{escape(drawn.title)}</title><desc>{escape(drawn.description)}</desc>"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} {box} role="img">'
    return re.sub(r"\n\s*", "\n", head + words + svg[svg.index(">") + 1 :]).strip()


def variables(dark: bool) -> str:
    """Spell the page's colours as CSS."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in VARIABLES.items())


def standalone(svg: str) -> str:
    """Make a chart a file of its own, on paper, light or dark as the reader's system is."""
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {variables(True)} }} }}"
    sheet = f"<style>svg {{ {variables(False)} }} {dark}</style>"
    paper = f'<rect width="{width}" height="{height}" rx="6" style="fill: var(--paper)"/>'
    head, rest = svg.split(">", 1)
    return f'{head} width="{width}" height="{height}">{sheet}{paper}{rest}\n'
