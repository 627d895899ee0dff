"""Train one recipe at several weight decays: how decay moves the bytes, and which one meets a size.

    python -m dev.decay_sweep --recipe R --decays 0,0.04,0.08
    python -m dev.decay_sweep --recipe R --target-bytes 400000 --high 2 --rounds 5 run.iterations=100

With quant.scale_floor=1, for codes of 8 bits, rows whose largest weight is below 1 share one step, so smaller
weights take fewer bytes (contest pull request 281: "weight decay as a size knob"). One number is the decay of
matrices, embedding and scalars alike. --target-bytes halves the interval [0, high] of decays and keeps the
smallest one whose code + artifact fits; sizes are noisy, so it is a knob, no guarantee. Every training is a
run folder below --out; one that is complete is not repeated, so the command can be stopped and started again.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import train_gpt
from common import CommandParser, UserError, format_table, run_command, split_numbers
from formats.checkpoints import read_result
from formats.recipe import config_hash, with_values
from scoring.budget import BudgetError
from train_gpt import Config, Environment, load_config, place_values, read_environment

KNOBS = ("optim.matrix_weight_decay", "optim.embed_weight_decay", "optim.scalar_weight_decay")
COLUMNS = {"decay": ">10.5g", "bytes": ">12,", "artifact": ">12,", "val_loss": ">10.4f", "val_bpb": ">10.4f"}
COLUMNS |= {"": ""}  # an arrow
PLACES = ("data.data_path", "data.tokenizer_path")  # what a finished run must share besides its recipe


class Point(NamedTuple):
    """What a decay led to."""

    decay: float
    total_bytes: int  # code + artifact
    model_bytes: int  # the artifact alone
    val_loss: float  # of the artifact, nats a token
    val_bpb: float


def measure_decay(cfg: Config, decay: float, folder: Path) -> Point:
    """Train with a decay into folder/decay_<number>, unless that run is there already."""
    cfg = with_values(cfg, dict.fromkeys(KNOBS, decay), "decay")
    run_id = f"decay_{decay:g}_{cfg.run.seed}_{cfg.run.iterations}"
    places = {"run.out_dir": str(folder), "run.run_id": run_id, "run.overwrite": True}
    cfg = with_values(cfg, places, "decay")
    if not is_done(folder / run_id, cfg):
        # Over budget is no error here: the table tells the size, and result.json is written by then.
        with redirect_stdout(sys.stderr), suppress(BudgetError):
            train_gpt.run(cfg, Environment({}))
    result = read_result(folder / run_id)
    (_, code_bytes), *parts = result["ledger"]
    model_bytes = sum(size for _, size in parts)
    score = result["score"]
    return Point(decay, code_bytes + model_bytes, model_bytes, score["val_loss"], score["val_bpb"])


def is_done(folder: Path, cfg: Config) -> bool:
    """Whether a folder holds the result of this recipe on this data."""
    if not (folder / "result.json").is_file():
        return False
    found = read_result(folder)
    same_places = all(found["places"][name] == place_values(cfg)[name] for name in PLACES)
    return same_places and found["config_hash"] == config_hash(cfg)


def bisect_decay(measure: Callable[[float], Point], target_bytes: int, high: float, rounds: int) -> Point:
    """Return the smallest decay found in [0, high] whose code + artifact takes at most target_bytes."""
    start, best = measure(0.0), measure(high)
    if start.total_bytes <= target_bytes:
        return start
    if best.total_bytes > target_bytes:
        raise UserError(
            f"--target-bytes {target_bytes:,}: expected it in reach, found {start.total_bytes:,} bytes at "
            f"decay 0 and {best.total_bytes:,} at {high:g}. Raise --high, set quant.scale_floor=1, or lower "
            "quant.matrix_bits."
        )
    low = start.decay
    for _ in range(rounds):
        middle = measure((low + best.decay) / 2)
        if middle.total_bytes <= target_bytes:
            best = middle
        else:
            low = middle.decay
    return best


def format_points(points: list[Point], best: Point | None) -> str:
    """Lay out the points by decay; the one that bisection chose has an arrow."""
    return format_table(COLUMNS, [(*point, " <-" if point == best else "") for point in sorted(set(points))])


def main(argv: list[str] | None = None) -> None:
    """Run the command: runs log as always, the table comes last."""
    parser = CommandParser(prog="python -m dev.decay_sweep", description=__doc__)
    parser.add_argument("--recipe", required=True, help="recipe.toml to train")
    parser.add_argument("--decays", default="", help="decays to train, with commas between")
    parser.add_argument("--target-bytes", type=int, help="bisect to the smallest decay that fits")
    parser.add_argument("--high", type=float, default=1.0, help="largest decay tried; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="halvings; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--json", action="store_true", help="print the points as one JSON object")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args(argv)
    if bool(args.decays) == (args.target_bytes is not None):
        raise UserError("expected either --decays or --target-bytes.")
    cfg = load_config(args.recipe, read_environment().overrides, args.overrides)
    decays = split_numbers(args.decays, "--decays") if args.decays else []
    points: list[Point] = []

    def measure(decay: float) -> Point:
        print(f"decay {decay:g}: training {len(points) + 1}", file=sys.stderr, flush=True)
        points.append(measure_decay(cfg, decay, args.out))
        return points[-1]

    best = None
    for decay in decays:
        measure(decay)
    if not decays:
        best = bisect_decay(measure, args.target_bytes, args.high, args.rounds)
    rows = {"points": [point._asdict() for point in points], "best": best and best._asdict()}
    print(json.dumps(rows) if args.json else format_points(points, best))


if __name__ == "__main__":
    run_command(main)
