"""Where a training step's time goes on this machine (`make profile`): torch's profiler over a few steps.

    python -m dev.profile --recipe R                 the stage that the recipe begins with
    python -m dev.profile --recipe R --at 0.7        the stage at that share of training
    python -m dev.profile --recipe R --shapes        operators by the shapes that they are given
    python -m dev.profile --recipe R --json          one JSON object

Times are milliseconds a step. Profiling adds some microseconds an operator: to compare two commits take
the times that are measured without it, on an idle machine and in turns.
"""

import json
from argparse import ArgumentTypeError
from statistics import median
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from common import CommandParser, format_table, run_command
from dev.gpu_battery.timing import wall_seconds
from train_gpt import Phase, Ranks, Training, load_config, load_validation, phase_at, read_environment

WARM_STEPS = 3
NAME_CHARS = 40
SHAPES_CHARS = 90


class OperatorTime(NamedTuple):
    """What one operator takes of a step."""

    operator: str
    ms: float  # without the operators that it calls
    share: float  # of all of them
    calls: float
    shapes: str  # empty: all together


class StepProfile(NamedTuple):
    """A step of one stage: without the profiler, then by operator, the longest first."""

    batch_tokens: int
    dtype: str
    attention: str
    compiled: bool
    forward_backward_ms: float
    update_ms: float
    calls: float  # of operators
    operators: list[OperatorTime]


def profile_step(training: Training, phase: Phase, steps: int, by_shape: bool) -> StepProfile:
    """Make steps of a phase: first to warm up, then timed by the clock, then profiled."""
    halves = [lambda: training.accumulate(phase, lambda: False), lambda: training.update(0.0)]
    for _ in range(WARM_STEPS):
        for half in halves:
            half()
    device = training.ranks.device
    times = [[1000 * wall_seconds(half, device) for half in halves] for _ in range(steps)]
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities, record_shapes=by_shape) as profiler:
        for half in halves * steps:
            half()
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = [event for event in profiler.key_averages(group_by_input_shape=by_shape) if getattr(event, key)]
    total = sum(getattr(event, key) for event in events)
    operators = [
        OperatorTime(
            event.key,
            getattr(event, key) / steps / 1000,
            getattr(event, key) / total,
            event.count / steps,
            str(event.input_shapes) if by_shape else "",
        )
        for event in sorted(events, key=lambda event: -getattr(event, key))
    ]
    return StepProfile(
        phase.stage.batch_tokens,
        str(training.model.compute_dtype).removeprefix("torch."),
        training.model.attention,
        training.is_compiled,
        *(median(column) for column in zip(*times)),
        sum(event.count for event in events) / steps,
        operators,
    )


def format_profile(found: StepProfile, rows: int) -> str:
    """Lay a profile out for a terminal."""
    how = f"{found.dtype}, attention {found.attention}, {'compiled' if found.compiled else 'eager'}"
    both = found.forward_backward_ms + found.update_ms
    lines = [
        f"step of {found.batch_tokens:,} tokens, {how}, {torch.get_num_threads()} threads",
        f"forward and backward {found.forward_backward_ms:.1f} ms, update {found.update_ms:.1f} ms, "
        f"{1000 * found.batch_tokens / both:,.0f} tokens a second",
        f"profiled: {found.calls:,.0f} operators a step",
        "",
    ]
    columns = {"operator": f"<{NAME_CHARS + 2}", "ms": ">8.2f", "share": ">8.1%", "calls": ">9.1f"}
    cells = [
        (one.operator[:NAME_CHARS], one.ms, one.share, one.calls, f"  {one.shapes[:SHAPES_CHARS]}")
        for one in found.operators[:rows]
    ]
    if any(one.shapes for one in found.operators):
        columns["  shapes"] = ""
    return "\n".join(lines) + format_table(columns, [row[: len(columns)] for row in cells])


def share_of_training(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"expected a share of training from 0 to 1, found {text!r}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Profile the recipe that the command line names."""
    parser = CommandParser(prog="python -m dev.profile", description=__doc__)
    parser.add_argument("--recipe", help="recipe.toml; default: the contest's naive baseline")
    parser.add_argument("--at", type=share_of_training, default=0.0, metavar="SHARE", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="that are profiled (%(default)s)")
    parser.add_argument("--rows", type=int, default=25, help="of the table (%(default)s)")
    parser.add_argument("--shapes", action="store_true", help="tell apart what an operator is given")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    environment = read_environment()
    cfg = load_config(args.recipe, environment.overrides, args.overrides)
    training = Training(cfg, Ranks(environment, cfg.run.device), load_validation(cfg.data).bos_id)
    phase = phase_at(cfg, round(args.at * cfg.run.iterations), args.at)
    found = profile_step(training, phase, max(args.steps, 1), args.shapes)
    if args.json:
        rows = [one._asdict() for one in found.operators[: args.rows]]
        print(json.dumps(found._asdict() | {"operators": rows}))
    else:
        print(format_profile(found, args.rows))


if __name__ == "__main__":
    run_command(main)
