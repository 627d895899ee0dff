"""The library of miniature violations: `python -m audit --cases` prints the case x check matrix.

Each case in cases/ is a program that breaks one rule. Its twin, NAME_fixed, does the same thing legally: the
same file with LEGAL = True.
"""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from audit.checks import Finding
from audit.run import DYNAMIC, run_program

FOLDER = Path(__file__).resolve().parent / "cases"
MARKS = {"FAIL": "FAIL", "SUSPECT": "susp", "PASS": ".", "NOT RUN": "-"}


class MatrixRow(NamedTuple):
    """A violation and the checks each of which must fail it."""

    name: str
    checks: tuple[str, ...]


CASES = (
    MatrixRow("train_on_val", ("K11",)),
    MatrixRow("calibrate_on_val", ("K11",)),
    MatrixRow("paid_prefix", ("K11", "K22")),
    MatrixRow("warm_up_on_val", ("K11",)),
    MatrixRow("train_then_score", ("K12", "K13", "K15", "K22")),
    MatrixRow("later_epoch", ("K12", "K13", "K16")),
    MatrixRow("slot", ("K12", "K13")),
    MatrixRow("bias_before_score", ("K12", "K15")),
    MatrixRow("rescored_temperature", ("K13", "K16")),
    MatrixRow("hint_table", ("K13", "K14")),
    MatrixRow("hashed_cache", ("K12",)),
    MatrixRow("dirichlet_buckets", ("K12",)),
    MatrixRow("byte_spread", ("K12",)),
    MatrixRow("outcome_gate", ("K12",)),
    MatrixRow("truncated_softmax", ("K12",)),
    MatrixRow("within_word_gate", ("K12",)),
    MatrixRow("no_causal_mask", ("K13",)),
    MatrixRow("overlapping_windows", ("K12", "K16")),
    MatrixRow("dropped_targets", ("K16",)),
    MatrixRow("carried_state", ("K17",)),
    MatrixRow("train_data_at_eval", ("K17",)),
    MatrixRow("hidden_file", ("K17",)),
    MatrixRow("other_rank", ("K17",)),
    MatrixRow("network_call", ("K18",)),
    MatrixRow("spaces_twice", ("K9",)),
    MatrixRow("paused_clock", ("K23",)),
)


def program_text(name: str) -> str:
    """Return the program of a case, or as NAME_fixed that of its legal twin."""
    text = (FOLDER / f"{name.removesuffix('_fixed')}.py").read_text(encoding="utf-8")
    return text.replace("\nLEGAL = False\n", "\nLEGAL = True\n") if name.endswith("_fixed") else text


def run_case(name: str) -> dict[str, Finding]:
    """Attack one case, in a folder that holds it and toy.py alone."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FOLDER / "toy.py", folder)
        program = Path(folder) / f"{name}.py"
        program.write_text(program_text(name), encoding="utf-8")
        return run_program(program)


def print_matrix(rows: list[MatrixRow]) -> int:
    """Run cases and their twins and print a line each; returns 0 when all came out as expected, else 4."""
    print(f"{'case':<28}" + "".join(f"{check:>6}" for check in DYNAMIC) + "  as expected")
    num_wrong = 0
    for row in rows:
        for name, expected in ((row.name, set(row.checks)), (f"{row.name}_fixed", set())):
            found = run_case(name)
            marks = "".join(f"{MARKS[found[check].verdict]:>6}" for check in DYNAMIC)
            is_right = is_as_expected(found, expected)
            num_wrong += not is_right
            print(f"{name:<28}{marks}  {'yes' if is_right else 'NO'}", flush=True)
    print(f"{2 * len(rows) - num_wrong} of {2 * len(rows)} as expected; . PASS, - NOT RUN")
    return 4 if num_wrong else 0


def is_as_expected(found: dict[str, Finding], expected: set[str]) -> bool:
    """A violation fails all the checks that should catch it; a legal program fails none, nor is suspected."""
    failed = {check for check, finding in found.items() if finding.verdict == "FAIL"}
    is_clean = not failed and all(finding.verdict != "SUSPECT" for finding in found.values())
    return expected <= failed if expected else is_clean
