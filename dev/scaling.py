"""How a step of the 1.0611 recipe scales over cards, projected by formats/hardware.py, as Markdown.

    python -m dev.scaling                 the tables
    python -m dev.scaling --write         the same, into docs/scaling.md

The batch stays the recipe's; machines hold eight cards. Nothing of it is measured.
"""

from pathlib import Path

from common import CommandParser, run_command
from dev.gpu_battery.report import markdown_row
from dev.gpu_battery.sizes import RECIPES, ROOT
from dev.pages import DOCS, write_block
from formats.hardware import (
    CARDS_A_MACHINE,
    LINKS,
    StepShape,
    Work,
    exchanged_bytes,
    fitting_counts,
    parse_machine,
    read_work,
    step_parts,
)
from train_gpt import describe, load_config

PAGE = DOCS / "scaling.md"
COMMAND = "python -m dev.scaling --write"
CARD = "h100"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MOST = COUNTS[-1]
BATCH_FACTOR = 4


def read_recipe_work() -> Work:
    """Describe the 1.0611 recipe."""
    return read_work(describe(load_config(str(ROOT / RECIPES["1061"]), {}, []), [0], [0.0]))


def step_on(work: Work, count: int, link: str) -> dict[str, float]:
    """Return the parts of a step at all visits, in the fewest micro-batches that fit, milliseconds."""
    joined = f"@{link}" if count > CARDS_A_MACHINE else ""
    machine = parse_machine(f"{CARD}x{count}{joined}")
    return step_parts(work, machine, fitting_counts(work, machine)[0], work.visits)


def scaling_rows(work: Work) -> list[list[str]]:
    """Lay out a row a number of cards: milliseconds a step, the share of it that is exchange, efficiency."""
    alone = sum(step_on(work, 1, "ib400").values())
    rows = []
    for count in COUNTS:
        sent = sum(exchanged_bytes(work, count).values())
        row = [str(count), f"{sent / 1e6:,.0f}"]
        for link in LINKS:
            parts = step_on(work, count, link)
            total = sum(parts.values())
            row += [f"{total:,.0f}", f"{parts['exchange']:,.1f}", f"{100 * alone / (count * total):.0f} %"]
        rows.append(row)
    return rows


def variants(work: Work) -> dict[str, Work]:
    """Return what would change a large machine's step, one thing each."""
    stage = work.stages[0]
    larger = StepShape(stage.seq_len, BATCH_FACTOR * stage.batch_tokens, stage.micro_batches)
    return {
        "as it is": work,
        "gradients travel in bfloat16": work._replace(gradient_bytes=2),
        "a matrix has an owner in each machine: no padding to 64": work._replace(pads=False),
        "both": work._replace(gradient_bytes=2, pads=False),
        f"{BATCH_FACTOR} times the tokens a step": work._replace(stages=(larger,)),
    }


def variant_rows(work: Work) -> list[list[str]]:
    """Lay out a row a variant on the most cards: bytes a rank sends, milliseconds, tokens a second."""
    rows = []
    for name, changed in variants(work).items():
        row = [name, f"{sum(exchanged_bytes(changed, MOST).values()) / 1e6:,.0f}"]
        for link in LINKS:
            total = sum(step_on(changed, MOST, link).values())
            row += [f"{total:,.0f}", f"{changed.stages[0].batch_tokens / total / 1000:,.1f}"]
        rows.append(row)
    return rows


def format_tables(work: Work) -> str:
    """Return both tables as Markdown."""
    ms = [f"{title}: {what}" for title in (link.title for link in LINKS.values())
          for what in ("ms a step", "of it exchange", "efficiency")]  # fmt: skip
    speed = [f"{link.title}: {what}" for link in LINKS.values() for what in ("ms a step", "million tokens/s")]
    tables = (
        (["cards", "MB a rank sends", *ms], scaling_rows(work)),
        ([f"{MOST} cards", "MB a rank sends", *speed], variant_rows(work)),
    )
    made = ("\n".join(map(markdown_row, [head, ["---"] * len(head), *rows])) for head, rows in tables)
    return "\n" + "\n\n".join(made) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = CommandParser(prog="python -m dev.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args(argv)
    tables = format_tables(read_recipe_work())
    if options.write:
        write_block(Path(PAGE), COMMAND, tables)
    print(tables)


if __name__ == "__main__":
    run_command(main)
