"""The tables of docs/scaling.md are those that the command makes, and their sentences are true."""

import re
from functools import cache

import pytest

from common import UserError
from dev import scaling
from dev.pages import MARKS, with_block


@cache
def work():
    return scaling.read_recipe_work()


def test_the_page_holds_what_the_command_makes():
    """After a change of the model: python -m dev.scaling --write."""
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert with_block(text, scaling.COMMAND, scaling.format_tables(work())) == text


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    """Between the marks, and nothing else."""
    page = tmp_path / "page.md"
    first, last = (mark.format(command=scaling.COMMAND) for mark in MARKS)
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    monkeypatch.setattr(scaling, "PAGE", page)
    scaling.main([])
    assert "old" in page.read_text()
    scaling.main(["--write"])
    text = page.read_text()
    assert text.startswith(f"before\n{first}\n\n| cards |") and text.endswith(f"{last}\nafter\n")
    assert "old" not in text and "| 64 | " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nothing", "\n".join(mark.format(command="c") for mark in MARKS) * 2])
def test_a_page_without_its_marks_is_refused(text):
    """A block would be lost, or stand twice."""
    with pytest.raises(UserError, match="once each"):
        with_block(text, "c", "block")


def test_the_sentences_of_the_page_are_what_the_numbers_say():
    """Inside a machine, by InfiniBand to 32 cards, by Ethernet never; a larger batch and fewer bytes."""
    totals = {link: [sum(scaling.step_on(work(), count, link).values()) for count in scaling.COUNTS]
              for link in scaling.LINKS}  # fmt: skip
    assert scaling.step_on(work(), 8, "ib400")["exchange"] < 1
    fast, slow = totals["ib400"], totals["eth25"]
    assert fast[4] < 0.7 * fast[3] and fast[5] < 0.7 * fast[4] and fast[6] > 0.8 * fast[5]
    assert slow[4] > slow[3]
    page = scaling.PAGE.read_text(encoding="utf-8")
    last = scaling.step_on(work(), 64, "ib400")
    assert (
        f"kernels take {last['kernels']:.0f} ms" in page and f"the exchange {last['exchange']:.0f} ms" in page
    )
    rows = {row[0]: row for row in scaling.variant_rows(work())}
    plain, larger = rows["as it is"], rows["4 times the tokens a step"]
    assert float(larger[3]) / float(plain[3]) == pytest.approx(2, abs=0.2)
    assert float(larger[5]) / float(plain[5]) > 3
    assert float(rows["gradients travel in bfloat16"][1]) / float(plain[1]) == pytest.approx(2 / 3, abs=0.03)
    assert re.search(r"exchanges 255 MB", page) and scaling.scaling_rows(work())[3][1] == "255"
