"""Measure this project on a GPU with one command that ends in time: parts in processes of their own, JSON.

    python -m dev.gpu_battery --out FOLDER                    all parts, at most 480 s
    python -m dev.gpu_battery --out FOLDER --parts machine,backends
    python -m dev.gpu_battery --out FOLDER --rehearse         the same code in miniature on a CPU
    python -m dev.gpu_battery --show FOLDER/results.json      a Markdown table of what was found
    python -m dev.gpu_battery --enter FOLDER/results.json     its main figures into docs/gpu-measurements.md

FOLDER/results.json is rewritten after each part and is whole at any time; scratch (shards, runs, compilers'
caches) goes to FOLDER.work beside it, so that FOLDER stays small enough to copy. A part that fails, hangs or
runs out of time costs its own numbers only. The exit status is 0 when all parts are ok.

Another part is a row of PARTS and a function of a Job (job.py); parts at the end are the first to be dropped.
"""

from argparse import ArgumentTypeError
from pathlib import Path

from common import CommandParser, UserError, choose_named, existing, read_json, run_command
from dev.gpu_battery.driver import FORMAT, RESULTS_NAME, BatteryPart, BatterySettings, run_battery
from dev.gpu_battery.measurements import PAGE, enter
from dev.gpu_battery.report import format_markdown, format_plain

ALL_SECONDS = 480
HEAD = {"rehearsal": bool, "card": str, "commit": str, "started": str}  # what every results.json says
AHEAD = ("dev.gpu_battery.steps:compile_1061_ahead", "dev.gpu_battery.steps:compile_naive_ahead")
PARTS = (
    BatteryPart("train_small", 90, "train_gpt.py, shards to score", "dev.gpu_battery.whole_run:run", True),
    BatteryPart("gpu_tests", 60, "pytest -m gpu", "dev.gpu_battery.gpu_tests:run", True),
    BatteryPart("machine", 40, "versions, card, bandwidth, matrix products", "dev.gpu_battery.machine:run"),
    BatteryPart("step_1061_low", 80, "1.0611 recipe, recurrence off", "dev.gpu_battery.steps:run_1061_low"),
    BatteryPart("step_1061_full", 110, "1.0611 recipe, recurrence on", "dev.gpu_battery.steps:run_1061_full"),
    BatteryPart("step_naive", 70, "naive recipe, the training loop", "dev.gpu_battery.steps:run_naive"),
    BatteryPart("backends", 60, "attention: errors and speed by kernel", "dev.gpu_battery.backends:run"),
    BatteryPart("fused", 60, "fused kernels against their plain forms", "dev.gpu_battery.fused:run"),
    BatteryPart("scoring", 60, "scorers of the 1.0611 architecture", "dev.gpu_battery.scoring:run"),
    BatteryPart("calibration", 45, "calibration and GPTQ of 1.0611", "dev.gpu_battery.calibration:run"),
    BatteryPart("contest_naive", 70, "the contest's train_gpt.py", "dev.gpu_battery.contest:run_naive"),
    BatteryPart("contest_1061", 200, "the 1.0611 record's script", "dev.gpu_battery.contest:run_1061"),
)


def choose_parts(text: str) -> list[BatteryPart]:
    """Return the named parts in the order of the table; raises for an unknown name."""
    return choose_named(PARTS, text, "--parts")


def seconds(text: str) -> float:
    """Read a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ArgumentTypeError(f"expected seconds above 0, found {text!r}")
    return value


def folder(text: str) -> Path:
    """Read the name of a folder."""
    if not text:
        raise ArgumentTypeError("expected a folder, found an empty name")
    return Path(text).resolve()


def read_results(path: Path) -> dict:
    """Read what a battery wrote; raises for another file."""
    if path.is_dir():
        path = path / RESULTS_NAME
    report = read_json(path)
    parts = report.get("parts") if isinstance(report, dict) and report.get("format") == FORMAT else None
    whole = isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values())
    whole = whole and all(isinstance(part.get("status"), str) for part in parts.values())
    if not whole or not all(isinstance(report.get(key), kind) for key, kind in HEAD.items()):
        raise UserError(f"{path}: expected the {RESULTS_NAME} of a battery, found another JSON file.")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run the battery, or show what one found."""
    parser = CommandParser(prog="python -m dev.gpu_battery", description=__doc__)
    parser.add_argument("--out", type=folder, default="runs/gpu_battery", help="folder (%(default)s)")
    parser.add_argument("--seconds", type=seconds, default=ALL_SECONDS, help="in all (%(default)s)")
    parser.add_argument("--parts", default="", metavar="A,B", help="of the table; default: all")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--data", type=existing, metavar="FOLDER", help="a dataset for train_small")
    parser.add_argument("--carried", type=existing, metavar="FOLDER", help="contest scripts (contest.py)")
    parser.add_argument("--no-ahead", action="store_true", help="compile nothing in the background")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a results.json as Markdown")
    parser.add_argument("--enter", type=Path, metavar="FILE", help="enter a results.json into the docs")
    args = parser.parse_args(argv)
    if args.show:
        print(format_markdown(read_results(args.show)))
        return 0
    if args.enter:
        found = enter(args.enter, read_results(args.enter))
        print(f"{PAGE}: {found['card']}, {found['date']}, commit {found['commit']}")
        return 0
    parts = choose_parts(args.parts)
    data, carried = (str(path.resolve()) if path else "" for path in (args.data, args.carried))
    work = args.out.with_name(args.out.name + ".work")
    ahead = () if args.no_ahead else AHEAD
    settings = BatterySettings(args.out, work, args.seconds, args.rehearse, data, carried, ahead)
    try:
        report = run_battery(parts, settings)
    except OSError as error:
        raise UserError(f"--out {args.out}: expected a folder to write to, found {error}.") from error
    print(f"\n{format_plain(report)}\n{args.out / RESULTS_NAME}")
    return int(any(part["status"] != "ok" for part in report["parts"].values()))


if __name__ == "__main__":
    run_command(main)
