"""Curves as an SVG picture, without a plotting library: light and dark, with axes, legend and smoothing."""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 64, 48  # margins
MIN_TICKS, LETTER, LINE = 4, 6.4, 18  # intervals of an axis at least, width of a letter, height of a line
SMOOTHED_FROM = 24  # points: a curve of fewer is drawn as it is
HALF_LIFE = 0.02  # of the smoothing, as a share of the points
MOST_POINTS = 400  # of a curve that is drawn; more are averaged
COLOURS = (  # in the light, in the dark
    ("#0969da", "#4493f8"), ("#bc4c00", "#f0883e"), ("#1a7f37", "#3fb950"), ("#8250df", "#ab7df8"),
    ("#bf3989", "#db61a2"), ("#7d6200", "#d29922"), ("#0e7490", "#39c5cf"), ("#57606a", "#9198a1"),
)  # fmt: skip
CURVES_NAME = "loss.svg"  # of a run folder
PAPER = {"paper": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#f0f6fc"), "pale": ("#59636e", "#9198a1")}
GRID = ("#d1d9e0", "#3d444d")

Point = tuple[float, float]


class Axis(NamedTuple):
    """What an axis shows: its words, its ends and the distance of its ticks."""

    label: str
    low: float
    high: float
    step: float

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [self.step * i for i in range(first, last + 1)]

    def spell(self, value: float) -> str:
        """Spell a tick with the digits that its step needs."""
        digits = next(n for n in range(300) if abs(round(self.step, n) / self.step - 1) < 1e-6)
        return f"{value:,.{digits}f}"


def find_axis(label: str, values: list[float], is_rounded: bool) -> Axis:
    """Choose round ticks for the values; an axis that is rounded goes on to the next tick at both ends."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / MIN_TICKS))
    step = max(size * power for size in (1, 2, 2.5, 5) if size * power * MIN_TICKS <= high - low)
    if is_rounded:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(label, low, high, step)


def smooth(points: list[Point], half_life: float = HALF_LIFE) -> list[Point]:
    """Average each value with those before it, half as much weight per half_life of all points."""
    keep = 0.5 ** (1 / max(half_life * len(points), 1e-9))
    weight = total = 0.0
    found = []
    for x, y in points:
        weight, total = keep * weight + 1, keep * total + y
        found.append((x, total / weight))
    return found


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """Average neighbours such that at most so many points are left; the first and the last stay."""
    if len(points) <= most:
        return points
    inner, count = points[1:-1], most - 2
    groups = (inner[i * len(inner) // count : (i + 1) * len(inner) // count] for i in range(count))
    means = [tuple(math.fsum(column) / len(column) for column in zip(*group)) for group in groups]
    return [points[0], *means, points[-1]]


def finite_points(points: list[Point]) -> list[Point]:
    """Leave out what no picture can show."""
    return [point for point in points if all(map(math.isfinite, point))]


def draw_curves(
    title: str, curves: dict[str, list[Point]], axes: tuple[str, str] = ("step", "nats a token")
) -> str:
    """Draw named curves of (x, y) points; long ones are smoothed, over themselves in a pale line.

    Without any points there is a picture that says so.
    """
    curves = {name: kept for name, points in curves.items() if (kept := finite_points(points))}
    sides = [
        find_axis(label, [point[i] for points in curves.values() for point in points], is_rounded=i == 1)
        for i, label in enumerate(axes)
    ]
    place = Place(*sides)
    described = "; ".join(
        f"{name}: {points[0][1]:.4g} at {axes[0]} {points[0][0]:,.4g}, {points[-1][1]:.4g} at "
        f"{points[-1][0]:,.4g}"
        for name, points in curves.items()
    )
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(described or 'no points yet')}</desc>",
        f"<style>{style_sheet(len(curves))}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        words(LEFT, 26, title, "ink", "start"),
        *draw_axes(place),
    ]
    parts = draw_legend(list(curves))
    for i, points in enumerate(curves.values()):
        parts += draw_curve(points, f"c{i % len(COLOURS)}", place)
    if not curves:
        parts.append(words(WIDTH / 2, HEIGHT / 2, "no points yet", "pale"))
    return "\n".join([*head, *parts, "</svg>\n"])


class Place(NamedTuple):
    """Where the axes put a point."""

    x: Axis
    y: Axis

    def __call__(self, x: float, y: float) -> Point:
        across, up = (
            (x - self.x.low) / (self.x.high - self.x.low),
            (y - self.y.low) / (self.y.high - self.y.low),
        )
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return round(left, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)


def words(x: float, y: float, text: str, look: str, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def style_sheet(num_curves: int) -> str:
    """Colour everything for light and for dark paper."""

    def rules(dark: int) -> str:
        fills = [f".{name} {{ fill: {pair[dark]} }}" for name, pair in PAPER.items()]
        curves = [f".c{i} {{ color: {pair[dark]} }}" for i, pair in enumerate(COLOURS[:num_curves])]
        return " ".join([*fills, f".grid {{ stroke: {GRID[dark]} }}", *curves])

    lines = "polyline { fill: none; stroke: currentColor; stroke-width: 2 } circle { fill: currentColor }"
    pale = ".key { stroke: currentColor } .raw { opacity: 0.35; stroke-width: 1 }"
    return f"{lines} {pale} {rules(0)} @media (prefers-color-scheme: dark) {{ {rules(1)} }}"


def draw_axes(place: Place) -> list[str]:
    """Draw a line a tick with its number, and the words of both axes."""
    parts = []
    for tick in place.y.ticks:
        _, y = place(place.x.low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(words(LEFT - 8, y + 4, place.y.spell(tick), "pale", "end"))
    for tick in place.x.ticks:
        x, _ = place(tick, place.y.low)
        parts.append(words(x, HEIGHT - BOTTOM + 18, place.x.spell(tick), "pale"))
    parts.append(words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, place.x.label, "ink"))
    turned = words(0, 0, place.y.label, "ink").replace('x="0.0" y="0.0"', "")
    return [*parts, f'<g transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{turned}</g>']


def draw_curve(points: list[Point], look: str, place: Place) -> list[str]:
    """Draw a curve: dots and a line for few points, a pale and a smoothed line for many."""

    def line(points: list[Point], more: str = "") -> str:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        return f'<polyline class="{look}{more}" points="{path}"/>'

    if len(points) >= SMOOTHED_FROM:
        return [line(thin(points), " raw"), line(thin(smooth(points)))]
    centres = (place(*point) for point in points)
    return [line(points), *(f'<circle class="{look}" cx="{x}" cy="{y}" r="3"/>' for x, y in centres)]


def draw_legend(names: list[str]) -> list[str]:
    """Name the curves in their colours below the title, as many as fit."""
    parts, x = [], float(LEFT)
    for i, name in enumerate(names if len(names) > 1 else []):
        width = LETTER * len(name) + 34
        if x + width > WIDTH - RIGHT:
            parts.append(words(x, TOP - 14, f"and {len(names) - i} more", "pale", "start"))
            break
        parts.append(f'<path class="key c{i % len(COLOURS)}" stroke-width="3" d="M{x:.1f} {TOP - 18}h16"/>')
        parts.append(words(x + 21, TOP - 14, name, "ink", "start"))
        x += width
    return parts


def event_curves(events: list[dict]) -> dict[str, list[Point]]:
    """Return the losses of a log of events by step: of training, and of validation where there is any."""
    kinds = {"training": ("train", "train_loss"), "validation": ("val", "val_loss")}
    return {
        name: [(event["step"], event[key]) for event in events if event["kind"] == kind and key in event]
        for name, (kind, key) in kinds.items()
    }
