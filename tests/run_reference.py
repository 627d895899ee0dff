"""Run the checks of the reference systems and print a row a system.

    python -m tests.run_reference           the fast checks
    python -m tests.run_reference --slow    the slow ones too: initial losses, and every twin is trained
    python -m tests.run_reference C D       of these systems only

A check is a test marked `reference(id)`; the ids of each system are listed below. Those that are arithmetic
on published constants, with nothing of this project in them, are listed as such and not counted.
"""

import json
from collections import defaultdict
from typing import NamedTuple

import pytest

from common import CommandParser, UserError, run_command
from dev.twins import ROOT, SYSTEMS
from train_gpt import describe, load_config

NUM_CHECKS = {"A": 9, "B": 19, "C": 14, "D": 11, "E": 18}
ARITHMETIC = {  # on published constants only
    "A": (), "B": ("B13", "B14"), "C": ("C9", "C14"), "D": ("D8",), "E": ("E16",),
}  # fmt: skip
RECIPES = {
    "A": {"A_bwetaf53": 53_012_480},
    "B": {"B_bese288": 26_522_716},
    "C": {"C_pr281": 26_829_913},
    "D": {"D_exp01": 372_904_960},
    "E": {
        "E_yxanul197_ultra10": 196_398_464,
        "E_yxanul270_mem9": 273_284_480,
        "E_yxanul270_mem6": 273_284_480,
    },
}
NOT_MEASURED = {
    "A": "validation loss 3.7718 after 1.35e9 tokens",
    "B": "bits per byte on 8xH100; not comparable: the tokenizer is lossy",
    "C": "bits per byte on 8xH100, FlashAttention 2 and 3 against cuDNN",
    "D": "any loss: none was published; memory at batch 50",
    "E": "losses of 100 to 1,400 steps, tokens a second, 8-bit products of a GPU",
}


class ReferenceCheck(NamedTuple):
    """What happened to the tests of one id."""

    outcome: str  # passed | failed | skipped
    reason: str = ""


class Recorder:
    """A pytest plugin that keeps the outcome of every test marked reference(id), and twins' facts."""

    def __init__(self, systems: tuple[str, ...] = tuple(NUM_CHECKS)):
        self.systems = systems
        self.ids: dict[str, list[str]] = {}
        self.outcomes: dict[str, list[ReferenceCheck]] = defaultdict(list)
        self.twins: dict[str, dict] = {}

    def pytest_collection_modifyitems(self, items) -> None:
        """Drop what is no check of these systems."""
        marked = {item.nodeid: [m.args[0] for m in item.iter_markers("reference")] for item in items}
        self.ids = {node: ids for node, ids in marked.items() if any(i[0] in self.systems for i in ids)}
        items[:] = [item for item in items if item.nodeid in self.ids]

    def pytest_deselected(self, items) -> None:
        """Remember what the selection leaves out."""
        for mark in (mark for item in items for mark in item.iter_markers("reference")):
            self.outcomes[mark.args[0]].append(ReferenceCheck("skipped", "slow: --slow runs it"))

    def pytest_runtest_logreport(self, report) -> None:
        """Note a test's end, or what kept it from running."""
        if report.when != "call" and report.outcome == "passed":
            return
        reason = str(report.longrepr[2]) if report.skipped else ""
        for name in self.ids[report.nodeid]:
            self.outcomes[name].append(ReferenceCheck(report.outcome, reason))
        for key, value in report.user_properties:
            if key == "twin":
                facts = json.loads(value)
                self.twins[facts["twin"]] = facts


def verdict(checks: list[ReferenceCheck]) -> ReferenceCheck:
    """Sum up an id's tests: failed if one is, passed if one ran, else skipped."""
    for outcome in ("failed", "passed", "skipped"):
        found = [check for check in checks if check.outcome == outcome]
        if found:
            return found[0]
    return ReferenceCheck("skipped", "no test")


def sort_ids(system: str, outcomes: dict[str, list[ReferenceCheck]]) -> dict[str, list[str]]:
    """Sort a system's ids into passed, failed, skipped (with reason) and arithmetic."""
    rows: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "arithmetic": []}
    for number in range(1, NUM_CHECKS[system] + 1):
        name = f"{system}{number}"
        found = verdict(outcomes.get(name, []))
        if name in ARITHMETIC[system]:
            rows["arithmetic"].append(name)
        else:
            rows[found.outcome].append(f"{name} ({found.reason})" if found.reason else name)
    twins = [name for name in outcomes if name.startswith(system) and "twin" in name]
    rows["failed"] += [name for name in twins if verdict(outcomes[name]).outcome == "failed"]
    return rows


def count_parameters(folder: str) -> int:
    """Count a recipe's parameters, without memory."""
    cfg = load_config(str(SYSTEMS / folder / "recipe.toml"), {}, [])
    return describe(cfg, [0], [0.0])["num_params"]


def format_twin(name: str, facts: dict) -> str:
    """Write a trained twin's line."""
    return (
        f"{name}: loss {facts['artifact_loss']} nats a token, single tokens {facts['unigram_entropy']}, "
        f"quantization {facts['quantization_gap']:+}, {facts['payload_bytes']:,} bytes of weights -> "
        f"{facts['artifact_bytes']:,} + code {facts['code_bytes']:,} = {facts['total_bytes']:,}, "
        f"{facts['step_ms']} ms a step"
    )


def format_row(system: str, rows: dict[str, list[str]], twins: dict[str, dict]) -> str:
    """Write a system's block of lines."""
    lines = [f"system {system}"]
    for folder, expected in RECIPES[system].items():
        lines.append(f"  recipe        records/reference_systems/{folder}/recipe.toml")
        lines.append(f"  parameters    {count_parameters(folder):,} of {expected:,} expected")
    counted = NUM_CHECKS[system] - len(rows["arithmetic"])
    lines.append(f"  checks        {len(rows['passed'])} of {counted} passed")
    lines += [f"  {name:<14}{', '.join(ids)}" for name, ids in rows.items() if ids]
    found = [format_twin(name, facts) for name, facts in twins.items() if name[0] == system]
    lines += [f"  twin          {line}" for line in found or ["not run: --slow trains it"]]
    lines.append(f"  not measured  {NOT_MEASURED[system]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the checks; returns 1 when one fails."""
    parser = CommandParser(prog="python -m tests.run_reference", description=__doc__)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="of A, B, C, D, E; default: all")
    parser.add_argument("--slow", action="store_true", help="run the slow checks and train the twins")
    args = parser.parse_args(argv)
    systems = tuple(args.systems or NUM_CHECKS)
    for system in systems:
        if system not in NUM_CHECKS:
            raise UserError(f"{system}: expected a system of {', '.join(NUM_CHECKS)}.")
    selection = "not gpu" if args.slow else "not slow and not gpu"
    recorder = Recorder(systems)
    pytest.main(["-q", "-m", selection, "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[recorder])
    sorted_ids = {system: sort_ids(system, recorder.outcomes) for system in systems}
    print("\n\n".join(format_row(name, rows, recorder.twins) for name, rows in sorted_ids.items()))
    return int(any(rows["failed"] for rows in sorted_ids.values()))


if __name__ == "__main__":
    run_command(main)
