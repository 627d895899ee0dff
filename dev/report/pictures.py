"""The charts of a report, each an SVG string; runs are drawn in their group's colour, seeds in dashes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dev.desk import charts
from dev.desk.runs import RunFacts
from dev.report.costs import Costs
from dev.report.series import Series, find_speed
from dev.report.sizes import TensorSize
from eval.breakdown import BreakdownRow
from formats.curves import Point, smooth, thin

SKIPPED = 0.03  # share of a curve's points at its start that do not decide how high a chart is
MOST_TENSORS = 18
SMALL_PART = 0.004  # of all bytes: parts below it are drawn as one
SPEED_LOOK = {"drawstyle": "steps-mid"}


class Drawn(NamedTuple):
    """A run as charts show it."""

    run: RunFacts
    series: Series
    look: dict  # colour and dashes

    @property
    def name(self) -> str:
        return self.run.name


def draw_lines(title: str, axes: tuple[str, str], curves: list[tuple[str, list[Point], dict]]) -> str:
    """Draw curves (label, points, look); empty for no points at all."""
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return ""
    ends = "; ".join(f"{label}: {points[-1][1]:.4g} at {points[-1][0]:.4g}" for label, points, _ in curves)
    with charts.chart(title, axes[1], f"{title}, {axes[1]} over {axes[0]}. At the end: {ends}.") as drawn:
        for label, points, look in curves:
            drawn.ax.plot(*zip(*thin(points)), label=charts.label(label, len(curves)), **look)
        drawn.ax.set_xlabel(axes[0])
    return drawn.svg


def draw_losses(rows: list[Drawn], axis: str, column: str) -> str:
    """Draw smoothed training losses over one of the columns of a series; a single run's raw ones, too."""
    curves = [(row.name, list(zip(getattr(row.series, column), row.series.loss)), row.look) for row in rows]
    curves = [
        (name, [p for p in points if np.isfinite(p[1])], look) for name, points, look in curves if points
    ]
    if not curves:
        return ""
    title = f"Training loss over {axis.split(',')[0]}"
    ends = "; ".join(f"{name}: {smooth(points)[-1][1]:.3f}" for name, points, _ in curves)
    with charts.chart(title, "nats a token, smoothed", f"{title}. At the end, smoothed: {ends}.") as drawn:
        tops = []
        for name, points, look in curves:
            smoothed = smooth(points)
            if len(curves) == 1:
                drawn.ax.plot(*zip(*thin(points)), **look | {"alpha": 0.3, "linewidth": 0.8})
            drawn.ax.plot(*zip(*thin(smoothed)), label=charts.label(name, len(curves)), **look)
            tops.append(max(y for _, y in smoothed[int(SKIPPED * len(smoothed)) :]))
        low, high = drawn.ax.get_ylim()
        drawn.ax.set_ylim(low, min(high, max(tops) + 0.05 * (max(tops) - low)))
        drawn.ax.set_xlabel(axis)
        drawn.ax.xaxis.set_major_formatter(charts.short_number)
    return drawn.svg


def draw_validations(rows: list[Drawn]) -> str:
    """Draw the bits a byte of the weights in training, and of what was scored in the end as a large mark."""
    shown = [row for row in rows if row.series.validations or row.run.val_bpb is not None]
    if not shown:
        return ""
    said = "; ".join(f"{row.name}: {row.run.val_bpb:.4f}" for row in shown if row.run.val_bpb is not None)
    about = f"Validation over steps. Scores in the end: {said or 'none yet'}."
    with charts.chart("Validation; large marks: the score", "bits a byte", about) as drawn:
        for i, row in enumerate(rows):
            points, label = row.series.validations, charts.label(row.name, len(rows))
            last = row.series.steps[-1] if len(row.series.steps) else 0
            steps = (row.run.result or {}).get("steps", last)
            if points:
                drawn.ax.plot(*zip(*points), marker=charts.marker(i), markersize=4, label=label, **row.look)
            if row.run.val_bpb is not None:
                mark = {"color": row.look["color"], "marker": charts.marker(i), "linestyle": "none"}
                mark |= {"markersize": 8, "markeredgecolor": charts.MARKS["ink"]}
                drawn.ax.plot([steps], [row.run.val_bpb], label=None if points else label, **mark)
        drawn.ax.set_xlabel("step")
    return drawn.svg


def draw_schedule(rows: list[Drawn], title: str, label: str, pick: Callable[[Series], list[float]]) -> str:
    """Draw what a schedule says, a value for each of its steps; empty where it says the same all the time."""
    found = [(row.name, row.series.schedule.steps, pick(row.series), row.look) for row in rows]
    if len({value for _, _, values, _ in found for value in values}) < 2:
        return ""
    curves = [(name, list(zip(steps, values)), look) for name, steps, values, look in found]
    return draw_lines(title, ("step", label), curves)


def draw_speed(rows: list[Drawn]) -> str:
    """Draw tokens a second over the training time."""
    curves = [(row.name, list(zip(*find_speed(row.series))), row.look | SPEED_LOOK) for row in rows]
    return draw_lines("Speed", ("seconds of training", "tokens a second"), curves)


def draw_parts(runs: list[RunFacts], limit: int) -> str:
    """Draw the bytes of submissions by part as stacked bars, with the limit as a line."""
    ledgers = [run.ledger for run in runs]
    most = max(sum(ledger.values()) for ledger in ledgers)
    names = dict.fromkeys(name for ledger in ledgers for name in ledger)
    large = [name for name in names if max(one.get(name, 0) for one in ledgers) > SMALL_PART * most]
    parts = {name: [one.get(name, 0) for one in ledgers] for name in large}
    small = [sum(amount for name, amount in one.items() if name not in large) for one in ledgers]
    parts |= {"everything smaller": small} if any(small) else {}
    totals = "; ".join(f"{run.name}: {sum(one.values()):,}" for run, one in zip(runs, ledgers))
    about = f"Bytes by part. Totals: {totals}. The limit: {limit:,}."
    return draw_stacks("Bytes by part", "bytes", [run.name for run in runs], (parts, limit, about))


def draw_stacks(title: str, label: str, names: list[str], drawing: tuple[dict, float, str]) -> str:
    """Draw a horizontal bar a name, stacked of parts {part: [amount of each]}, with a limit."""
    parts, limit, about = drawing
    with charts.chart(title, "", about, height=1.6 + 0.3 * len(names) + 0.12 * len(parts)) as drawn:
        left = np.zeros(len(names))
        for i, (part, amounts) in enumerate(parts.items()):
            hatch = "" if i < len(charts.COLOURS) else "////"
            look = {
                "color": charts.colour(i),
                "hatch": hatch,
                "edgecolor": charts.MARKS["paper"],
                "linewidth": 0.4,
            }
            drawn.ax.barh(names, amounts, left=left, label=part, **look)
            left += amounts
        if limit:
            drawn.ax.axvline(limit, color=charts.MARKS["ink"], linewidth=1, linestyle=":", label="limit")
        drawn.ax.invert_yaxis()
        drawn.ax.set_xlabel(label)
        drawn.ax.xaxis.set_major_formatter(charts.short_number)
        drawn.ax.grid(visible=False, axis="y")
    return drawn.svg


def draw_tensors(name: str, sizes: list[TensorSize]) -> str:
    """Draw the largest tensors of an artifact by bytes, with their bits a weight."""
    rows = sorted(sizes, key=lambda row: -row.num_bytes)
    shown, rest = rows[:MOST_TENSORS], rows[MOST_TENSORS:]
    bars = [(row.name, row.num_bytes, f"{row.bits:.1f} bits") for row in shown]
    if rest:
        bars.append((f"{len(rest)} others", sum(row.num_bytes for row in rest), ""))
    largest = "; ".join(f"{name}: {size:,.0f} bytes" for name, size, _ in bars[:5])
    with charts.chart(
        f"Bytes by tensor: {name}", "", f"Largest: {largest}.", 0.9 + 0.17 * len(bars)
    ) as drawn:
        drawn.ax.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=charts.colour(0))
        for i, (_, size, bits) in enumerate(bars):
            drawn.ax.text(
                size, i, f" {bits}", va="center", fontsize=charts.LETTERS - 1.5, color=charts.MARKS["pale"]
            )
        drawn.ax.margins(x=0.16)
        drawn.ax.invert_yaxis()
        drawn.ax.set_xlabel("bytes")
        drawn.ax.xaxis.set_major_formatter(charts.short_number)
        drawn.ax.grid(visible=False, axis="y")
    return drawn.svg


def draw_breakdown(title: str, scored: list[tuple[Drawn, Costs]]) -> str:
    """Draw bits a byte by class of one of eval.breakdown's tables, a bar a run; all of the same tokens."""
    tables = [costs.tables[title] for _, costs in scored]
    names = list(dict.fromkeys(row.name for rows in tables for row in rows if row.num_bytes))
    names.sort(key=first_number)
    if not names:
        return ""
    about = f"Bits a byte by {title}. " + "; ".join(
        f"{row.name}: {row.bpb:.2f}" for row in tables[0] if row.num_bytes
    )
    with charts.chart(f"By {title}", "bits a byte", f"{about}.") as drawn:
        width, colours = 0.8 / len(scored), bar_colours([row for row, _ in scored])
        for i, ((row, _), rows) in enumerate(zip(scored, tables)):
            values = {found.name: found for found in rows}
            heights = [bpb_of(values.get(name)) for name in names]
            places = np.arange(len(names)) + (i - (len(scored) - 1) / 2) * width
            label = charts.label(row.name, len(scored))
            drawn.ax.bar(places, heights, width, color=colours[i], label=label)
        sizes = {row.name: row.num_bytes for row in tables[0]}
        titles = [f"{name} (n {count_short(sizes.get(name, 0))})" for name in names]
        drawn.ax.set_xticks(range(len(names)), titles, rotation=35, ha="right")
        drawn.ax.set_xlabel("n: bytes")
        drawn.ax.grid(visible=False, axis="x")
    return drawn.svg


def bar_colours(rows: list[Drawn]) -> list[str]:
    """Return the colours of runs as bars, which have no dashes to tell seeds of one recipe apart."""
    colours = [row.look["color"] for row in rows]
    return colours if len(set(colours)) == len(colours) else [charts.colour(i) for i in range(len(rows))]


def count_short(amount: float) -> str:
    """Spell a number of bytes in few letters."""
    return charts.short_number(round(amount) if amount < 1000 else float(f"{amount:.3g}"))


def first_number(name: str) -> int:
    """Order classes like "256-511" by where they begin; others stay in their order."""
    digits = name.partition("-")[0].rstrip("+").replace(",", "")
    return int(digits) if digits.isdecimal() else 0


def bpb_of(row: BreakdownRow | None) -> float:
    """Return the bits a byte of a class, 0 where there is nothing of it."""
    return (row.bpb or 0.0) if row else 0.0


def draw_seconds(runs: list[RunFacts]) -> str:
    """Draw the wall time of runs by phase."""
    named = dict.fromkeys(name for run in runs for name in run.result["seconds"])
    parts = {name: [run.result["seconds"].get(name, 0.0) for run in runs] for name in named}
    totals = "; ".join(f"{run.name}: {sum(run.result['seconds'].values()):,.0f} s" for run in runs)
    about = (parts, 0, f"Seconds by phase. Totals: {totals}.")
    return draw_stacks("Seconds by phase", "seconds", [run.name for run in runs], about)


def draw_quantization(name: str, report: dict) -> str:
    """Draw what quantizing one tensor alone costs in bits a byte, dearest first."""
    rows = sorted(report["tensors"], key=lambda row: -row["val_bpb_cost"])[:MOST_TENSORS]
    dearest = "; ".join(f"{row['name']}: {row['val_bpb_cost']:+.5f}" for row in rows[:5])
    title = f"Cost of quantizing one tensor: {name}"
    with charts.chart(title, "", f"Dearest: {dearest}.", 0.9 + 0.17 * len(rows)) as drawn:
        values = [row["val_bpb_cost"] for row in rows]
        drawn.ax.barh([row["name"] for row in rows], values, color=charts.colour(1))
        drawn.ax.invert_yaxis()
        drawn.ax.set_xlabel("bits a byte, with only this one quantized")
        drawn.ax.grid(visible=False, axis="y")
    return drawn.svg
