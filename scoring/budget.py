"""The ledgers of a submission: bytes against the artifact limit, seconds against the clocks."""

from typing import NamedTuple

from common import UserError


class BudgetError(UserError):
    """A submission is over its byte or time limit."""


class Ledger(NamedTuple):
    """What is spent and how much there is; a limit of 0 is none."""

    title: str
    parts: list[tuple[str, float]]
    limit: float
    unit: str  # bytes | s

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return sum(amount for _, amount in self.parts)

    def format(self) -> str:
        """Lay out the parts with their total and, under a limit, what is left of it."""
        number = "{:>14,}" if self.unit == "bytes" else "{:>14,.1f}"
        rows = [*self.parts, ("total", self.total)]
        rows += [("limit", self.limit), ("left", self.limit - self.total)] if self.limit else []
        lines = [f"  {name:<28} {number.format(amount)} {self.unit}" for name, amount in rows]
        return "\n".join([self.title, *lines])


BYTES, TRAINING, SCORING = "bytes of the submission", "training clock", "scoring clock"
ADVICE = {
    BYTES: "Lower quant.matrix_bits, quant.target_bytes or the model's size; `make size` shows the code.",
    TRAINING: "Raise quant.reserve_seconds or lower data.batch_tokens: a step that has begun is finished.",
    SCORING: "Raise eval.stride, lower eval.context_len or use eval.mode=chunked.",
}


def overruns(ledgers: list[Ledger]) -> dict[str, str]:
    """Map what was spent of how much, where it is too much, to what can be changed."""
    found = {}
    for ledger in ledgers:
        if ledger.limit and ledger.total > ledger.limit:
            total = f"{ledger.total:,.1f}" if ledger.unit == "s" else f"{ledger.total:,}"
            spent = f"{total} {ledger.unit} of {ledger.limit:,.10g}"
            found[f"{ledger.title.removesuffix(' clock')} {spent}"] = ADVICE[ledger.title]
    return found


def not_valid(broken: dict[str, str]) -> str:
    """Return the last line of a run that is over a limit."""
    return f"NOT A VALID RUN: {'; '.join(broken)}"
