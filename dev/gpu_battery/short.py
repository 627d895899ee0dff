"""The battery in under three minutes, for a person: what this machine does, against stored references."""

from pathlib import Path
from statistics import fmean

import torch

from common import UserError
from dev.gpu_battery.__main__ import choose_parts
from dev.gpu_battery.driver import BatterySettings, run_battery
from dev.gpu_battery.measurements import MICRO_BATCHES, check_measured, collect_figures, is_same
from dev.gpu_battery.sizes import RECIPES, ROOT
from formats.hardware import PUBLISHED, PUBLISHED_SCORING_S, Work, count_steps, read_measurements, read_work
from train_gpt import describe, load_config

OUT = Path("runs/gpu_bench")
SECONDS = 170
PARTS = "machine,step_1061_full,step_naive,scoring"
LOW, FULL, NAIVE = PUBLISHED.values()  # milliseconds a step of 8xH100 SXM
AS_FAST = 0.05  # a difference that repeated runs have as well
CONTEST = "the contest's 8xH100 SXM"


def run_short() -> list[str]:
    """Measure the first card; returns lines for people. Raises where there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            "--gpu: expected a GPU that torch finds, found none. Run `make bench`, which measures a CPU, or "
            "`make doctor`, which says what torch sees."
        )
    settings = BatterySettings(OUT, OUT.with_name(OUT.name + ".work"), SECONDS)
    report = run_battery(choose_parts(PARTS), settings)
    check_measured(OUT, report)
    found = describe(load_config(str(ROOT / RECIPES["1061"]), {}, []), [0], [0.0])
    figures = collect_figures(report)
    return [
        *report_lines(figures, torch.cuda.device_count(), read_work(found)),
        *compare_entries(figures, read_measurements()),
    ]


def used_cards(cards: int) -> int:
    """Return how many of a machine's cards can share a step's micro-batches evenly."""
    return max(count for count in range(1, min(cards, MICRO_BATCHES) + 1) if MICRO_BATCHES % count == 0)


def compare(ours: float, theirs: float) -> str:
    """Say how many times slower or faster ours is, both in units of time."""
    ratio = ours / theirs
    if abs(ratio - 1) <= AS_FAST:
        return "as fast as"
    return f"{ratio:.1f}x slower than" if ratio > 1 else f"{1 / ratio:.1f}x faster than"


def report_lines(figures: dict, cards: int, work: Work) -> list[str]:
    """Say what a machine of so many such cards does; the exchange between cards is not measured."""
    used = used_cards(cards)
    lines = [f"{'card':<24}{figures['card']}; {cards} in this machine, {used} share a step"]
    micro, update = figures["micro_step_1061_ms"], figures["update_1061_ms"]
    if micro is None or update is None:
        lines.append(f"{'1.0611 recipe':<24}not measured: {OUT}/results.json says why")
    else:
        step = MICRO_BATCHES / used * micro + update
        steps, seconds = count_steps(work, {work.parts[0][1]: step * LOW / FULL, work.visits: step})
        lines += [
            f"{'1.0611 recipe':<24}{step:,.1f} ms a step, {quality(figures, '1061')}",
            f"{'steps in 600 s':<24}some {steps:,} in {seconds:,.0f} s of training",
            f"{'':<24}this machine is {compare(step, FULL)} {CONTEST}, {FULL} ms",
        ]
    if figures["step_naive_ms"] is not None:
        step = figures["step_naive_ms"] / used
        lines += [
            f"{'naive recipe':<24}{step:,.1f} ms a step, {quality(figures, 'naive')}",
            f"{'':<24}this machine is {compare(step, NAIVE)} {CONTEST}, {NAIVE} ms",
        ]
    rates = [rate for name, rate in figures["scoring_tokens_per_second"].items() if is_lora(name)]
    if rates:
        seconds = work.scoring[1] * fmean(1 / rate for rate in rates) / cards
        low, high = PUBLISHED_SCORING_S
        lines += [
            f"{'scoring with LoRA':<24}some {seconds:,.0f} s for the contest's text",
            f"{'':<24}this machine is {compare(seconds, (low + high) / 2)} {CONTEST}, {low} to {high} s",
        ]
    return lines


def is_lora(name: str) -> bool:
    """Whether a measurement of scoring is of documents of one length; the first of all compiles."""
    return name.startswith("lora_") and name != "lora_first"


def quality(figures: dict, recipe: str) -> str:
    """Name the share of the peak and the memory where they are known."""
    mfu, peak = figures[f"mfu_{recipe}"], figures[f"peak_gib_{recipe}"]
    shares = "MFU unknown" if mfu is None else f"MFU {100 * mfu:.1f} %"
    return f"{shares}, {'memory unknown' if peak is None else f'{peak:.1f} GiB'}"


def compare_entries(figures: dict, entries: list[dict]) -> list[str]:
    """Hold one card against every other that was entered."""
    lines = []
    for entry in entries:
        ours, theirs = figures["step_1061_ms"], entry["step_1061_ms"]
        if ours and theirs and not is_same(entry, figures):
            place = f"{entry['card']} of {entry['date']}"
            lines.append(f"{'one card':<24}this card is {compare(ours, theirs)} {place}")
    return lines
