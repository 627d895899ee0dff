"""Tables of documentation that a command makes: a block of a page between two marks."""

import re
from pathlib import Path

from common import UserError, atomic_file

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKS = "<!-- made by `{command}`: not edited by hand -->", "<!-- end of what `{command}` makes -->"


def with_block(text: str, command: str, block: str) -> str:
    """Return a page's text with another block between the marks of a command; raises where there are none."""
    first, last = (mark.format(command=command) for mark in MARKS)
    pattern = re.compile(f"{re.escape(first)}\n.*?{re.escape(last)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"expected the lines {first!r} and {last!r} once each. Put them back.")
    return pattern.sub(lambda _: f"{first}\n{block}\n{last}", text)


def write_block(page: Path, command: str, block: str) -> None:
    """Put a command's block into its page."""
    try:
        text = with_block(page.read_text(encoding="utf-8"), command, block)
    except UserError as error:
        raise UserError(f"{page}: {error}") from error
    with atomic_file(page) as file:
        file.write(text.encode())
