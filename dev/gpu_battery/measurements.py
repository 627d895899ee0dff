"""What batteries on GPUs found, entered by `--enter`: docs/gpu_measurements.json, and the page made from it.

The JSON file is the one source: `--describe --hardware`, `make bench GPU=1` and docs/gpu-measurements.md
read it. An entry is one battery; entering it again replaces it.
"""

from pathlib import Path

from common import UserError, write_json
from dev.gpu_battery.report import markdown_row, number
from dev.pages import DOCS, write_block
from formats.hardware import MEASUREMENTS, read_measurements

PAGE = DOCS / "gpu-measurements.md"
COMMAND = "python -m dev.gpu_battery --enter"
NOTHING = "Nothing has been measured on a GPU yet."
MICRO_BATCHES = 8  # of a step of the contest's recipes, all on the one card
NAMES = ("card", "date", "commit")  # what tells two batteries apart
COLUMNS = (
    "card", "date, commit", "torch, triton", "1.0611: ms a step, contest's, ratio",
    "naive: ms a step, contest's, ratio", "MFU 1.0611, naive", "peak GiB 1.0611, naive", "launch bubble ms",
    "scoring tokens/s", "calibration s", "attention",
)  # fmt: skip


def look_up(report: dict, part: str, *keys: str):
    """Return what a part found, or None where it did not get there."""
    value = report["parts"].get(part, {}).get("results", {})
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def look_up_number(report: dict, part: str, *keys: str) -> float | None:
    """Return a number that a part found; words, as where something did not fit, are none."""
    value = look_up(report, part, *keys)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole_step(report: dict, part: str) -> float | None:
    """Return the milliseconds of a step on one card: its micro-batches as the loop runs them, its update."""
    times = look_up_number(report, part, "micro_step", "ms"), look_up_number(report, part, "update", "ms")
    return None if None in times else MICRO_BATCHES * times[0] + times[1]


def over(value: float | None, other: float | None) -> float | None:
    """Divide where both are known."""
    return value / other if value is not None and other else None


def collect_figures(report: dict) -> dict:
    """Return the main figures of a battery; None stands for what it did not find."""
    full, naive = whole_step(report, "step_1061_full"), look_up_number(report, "step_naive", "loop", "ms")
    versions = look_up(report, "machine", "versions") or {}
    contest = look_up_number(report, "contest_1061", "full", "step_ms")
    contest_naive = look_up_number(report, "contest_naive", "steps", "step_ms")
    scoring = report["parts"].get("scoring", {}).get("results", {})
    rates = {name: look_up_number(report, "scoring", name, "tokens_per_second") for name in scoring}
    batches = [look_up_number(report, "calibration", name, "seconds")
               for name in ("batch", "batch_1_2", "batch_1_4")]  # fmt: skip
    return {
        "card": report["card"].partition(",")[0],
        "driver": report["card"].rpartition(", ")[2],
        "date": report["started"],
        "commit": report["commit"],
        "torch": versions.get("torch"),
        "triton": versions.get("triton"),
        "micro_step_1061_ms": look_up_number(report, "step_1061_full", "micro_step", "ms"),
        "update_1061_ms": look_up_number(report, "step_1061_full", "update", "ms"),
        "step_1061_ms": full,
        "step_1061_low_ms": whole_step(report, "step_1061_low"),
        "contest_1061_ms": contest,
        "ratio_1061": over(full, contest),
        "step_naive_ms": naive,
        "contest_naive_ms": contest_naive,
        "ratio_naive": over(naive, contest_naive),
        "mfu_1061": look_up_number(report, "step_1061_full", "micro_batch", "mfu"),
        "mfu_naive": look_up_number(report, "step_naive", "loop", "mfu"),
        "peak_gib_1061": look_up_number(report, "step_1061_full", "micro_batch", "peak_gib"),
        "peak_gib_naive": look_up_number(report, "step_naive", "loop", "peak_gib"),
        "bubble_ms": look_up_number(report, "step_naive", "bubble", "ms"),
        "scoring_tokens_per_second": {name: rate for name, rate in rates.items() if rate is not None},
        "calibration_s": next((seconds for seconds in batches if seconds is not None), None),
        "gptq_layer_s": look_up_number(report, "calibration", "gptq_layer", "seconds"),
        "attention": {
            rows: look_up(report, "backends", f"auto_{rows}", "takes") for rows in ("plain", "documents")
        },
        "not_ok": [name for name, part in report["parts"].items() if part["status"] != "ok"],
    }


def check_measured(path: Path, report: dict) -> None:
    """Raise for a battery that no GPU ran."""
    version = str(look_up(report, "machine", "versions", "torch"))
    if report["rehearsal"] or report["card"] == "none" or version.endswith("+cpu"):
        kind = "a rehearsal" if report["rehearsal"] else "one of a machine without a GPU"
        raise UserError(f"{path}: expected a battery of a GPU, found {kind}. Run `make gpu-battery` on one.")


def enter(path: Path, report: dict, store: Path = MEASUREMENTS, page: Path = PAGE) -> dict:
    """Put a battery's figures into the store and make the page's table again; returns the figures."""
    check_measured(path, report)
    found = collect_figures(report)
    others = [entry for entry in read_measurements(store) if not is_same(entry, found)]
    entries = sorted([*others, found], key=lambda entry: [entry[name] for name in NAMES])
    write_json(store, {"format": 1, "entries": entries})
    write_block(page, COMMAND, format_page(entries))
    return found


def is_same(entry: dict, other: dict) -> bool:
    """Whether two entries are of one battery."""
    return all(entry[name] == other[name] for name in NAMES)


def format_page(entries: list[dict]) -> str:
    """Lay the entries out as a Markdown table."""
    if not entries:
        return f"\n{NOTHING}\n"
    rows = [markdown_row(COLUMNS), "|" + "---|" * len(COLUMNS), *map(markdown_row, map(table_cells, entries))]
    return "\n" + "\n".join(rows) + "\n"


def show(*values, words: str = ", ") -> str:
    """Write values beside each other; a dash stands for what is not known."""
    return words.join("-" if one is None else one if isinstance(one, str) else number(one) for one in values)


def table_cells(entry: dict) -> list[str]:
    """Return an entry's cells, in the order of COLUMNS."""
    rates = (f"{name} {number(rate)}" for name, rate in entry["scoring_tokens_per_second"].items())
    return [
        show(entry["card"]),
        show(entry["date"], entry["commit"]),
        show(entry["torch"], entry["triton"]),
        show(entry["step_1061_ms"], entry["contest_1061_ms"], entry["ratio_1061"]),
        show(entry["step_naive_ms"], entry["contest_naive_ms"], entry["ratio_naive"]),
        show(entry["mfu_1061"], entry["mfu_naive"]),
        show(entry["peak_gib_1061"], entry["peak_gib_naive"]),
        show(entry["bubble_ms"]),
        "; ".join(rates) or "-",
        show(entry["calibration_s"]),
        ", ".join(f"{rows} {show(name)}" for rows, name in entry["attention"].items()),
    ]
