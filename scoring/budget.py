"""The two ledgers of a submission: bytes against the artifact limit, seconds against the clock."""

from common import UserError
from formats.artifact import LIMIT_BYTES


class BudgetError(UserError):
    """A submission is over its byte or time limit."""


def format_ledger(parts: list[tuple[str, float]], limit: float | None, unit: str) -> str:
    """Lay out (part, amount) rows with their total and, under a limit, what is left of it."""
    total = sum(amount for _, amount in parts)
    number = "{:>14,}" if unit == "bytes" else "{:>14,.1f}"
    rows = [*parts, ("total", total)] + ([("limit", limit), ("left", limit - total)] if limit else [])
    return "\n".join(f"  {name:<28} {number.format(amount)} {unit}" for name, amount in rows)


def check_seconds(name: str, seconds: float, limit: float) -> None:
    """Raise BudgetError when a phase took longer than its limit."""
    if seconds > limit:
        raise BudgetError(
            f"{name} took {seconds:.1f} s: {seconds - limit:.1f} over the limit of {limit:.1f}. "
            "Raise eval.stride, lower eval.context_len or use eval.mode=chunked."
        )


def check_bytes(parts: list[tuple[str, int]], limit: int = LIMIT_BYTES) -> int:
    """Return the total of (part, bytes) rows; raise BudgetError naming the heaviest parts when over."""
    total = sum(size for _, size in parts)
    if total > limit:
        heaviest = sorted(parts, key=lambda part: -part[1])[:5]
        raise BudgetError(
            f"code + artifact is {total:,} bytes: {total - limit:,} over the limit of {limit:,}.\n"
            + "".join(f"  {name:<28} {size:>14,}\n" for name, size in heaviest)
            + "Lower quant.matrix_bits or the model's size; `make size` shows the code's share."
        )
    return total
