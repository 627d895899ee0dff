"""Pictures of curves without a library: what they show, what they survive, and who writes them."""

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from fixtures_runs import write_run

from eval.__main__ import draw_losses
from formats.curves import MOST_POINTS, SMOOTHED_FROM, draw_curves, event_curves, find_axis, smooth, thin

LONG = [(float(i), 5 + math.sin(i)) for i in range(3000)]


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def lines(svg: str) -> list[list[tuple[float, float]]]:
    found = [node for node in parse(svg).iter() if node.tag.endswith("polyline")]
    return [
        [tuple(map(float, point.split(","))) for point in node.attrib["points"].split()] for node in found
    ]


def test_short_curves_are_drawn_as_they_are():
    """A point for every value, left to right and lower for less."""
    (line,) = lines(draw_curves("title", {"a": [(1, 5.0), (2, 4.0), (3, 2.0)]}))
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted(y for _, y in line)  # down the page


def test_long_curves_are_smoothed_over_their_raw_selves():
    """Two lines of at most MOST_POINTS; the smoothed one moves less."""
    raw, smoothed = lines(draw_curves("title", {"a": LONG}))
    assert len(raw) == len(smoothed) == MOST_POINTS

    def swing(line):
        return sum(abs(b[1] - a[1]) for a, b in pairwise(line[10:]))

    assert swing(smoothed) < 0.5 * swing(raw)


def test_a_constant_stays_what_it_is_when_smoothed():
    """The first values weigh as much as the others."""
    assert [y for _, y in smooth([(i, 3.0) for i in range(50)])] == pytest.approx([3.0] * 50)


def test_thinning_keeps_both_ends_and_the_mean():
    """A curve of a hundred thousand steps makes no picture of megabytes."""
    points = thin(LONG, 100)
    assert (len(points), points[0], points[-1]) == (100, LONG[0], LONG[-1])
    assert sum(y for _, y in points) / 100 == pytest.approx(5, abs=0.05)
    assert thin(LONG[:5]) == LONG[:5]


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 1e-7], [-5.0, 1e9], [2.99, 3.01, 3.005]])
def test_axes_hold_all_values_between_round_ticks(values):
    """From four to a dozen ticks, spelled apart."""
    axis = find_axis("x", values, is_rounded=True)
    assert all(axis.low <= value <= axis.high for value in values)
    assert 4 <= len(axis.ticks) <= 14
    assert len({axis.spell(tick) for tick in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize(
    "curves",
    [{}, {"a": []}, {"a": [(1, 2.0)]}, {"a": [(1, math.nan), (2, 3.0)]}, {"a": [(1, math.inf)]},
     {f"seed {i}": [(1, 2.0), (2, 1.0)] for i in range(40)}, {"<&\u00e9>": [(0, 0), (1, 1)] * SMOOTHED_FROM}],
)  # fmt: skip
def test_any_curves_make_a_picture(curves):
    """Empty, single, not finite, many, and names that are markup."""
    svg = draw_curves("a < b & c", curves)
    title = next(node for node in parse(svg).iter() if node.tag.endswith("title"))
    assert title.text == "a < b & c" and "nan" not in svg and "inf" not in svg


def test_the_picture_is_for_light_and_dark_and_for_those_who_cannot_see_it():
    """It stands in READMEs."""
    svg = draw_curves("title", {"a": [(1, 5.0), (2, 4.25)]}, ("step", "bits"))
    assert "prefers-color-scheme: dark" in svg and 'role="img"' in svg
    assert "4.25 at 2" in svg and ">step<" in svg and ">bits<" in svg


def test_events_become_two_curves():
    """Losses of training and validation."""
    events = [{"kind": "train", "step": 1, "train_loss": 3.0}, {"kind": "val", "step": 1, "val_loss": 2.0}]
    assert event_curves([*events, {"kind": "train", "step": 2}]) == {
        "training": [(1, 3.0)], "validation": [(1, 2.0)]
    }  # fmt: skip


def test_scoring_writes_the_picture_and_never_fails_for_it(tmp_path, capsys):
    """A folder that cannot be written, or events of another shape, are a note."""
    folder = write_run(tmp_path / "a", 7, 2.25)
    draw_losses(folder)
    assert len(lines((folder / "loss.svg").read_text())) == 3  # raw and smoothed, and validation
    (folder / "loss.svg").unlink()
    (folder / "loss.svg").mkdir()
    draw_losses(folder)
    assert "no picture of the losses" in capsys.readouterr().err
    draw_losses(tmp_path)  # no events: nothing to draw
    assert not (tmp_path / "loss.svg").exists()
