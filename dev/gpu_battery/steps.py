"""Training steps of the contest's recipes: compile time, milliseconds, share of the peak, memory, kernels."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import load_recipe, size_of
from dev.gpu_battery.text import BOS_ID, write_tokens
from dev.gpu_battery.timing import (
    REPEATS,
    free_memory,
    measure_fitting,
    memory_gib,
    open_ranks,
    profile,
    timed,
    times_ms,
    utilization,
    wall_seconds,
)
from train_gpt import (
    Batch,
    Config,
    Log,
    Phase,
    Ranks,
    Training,
    flops_per_token,
    get_stages,
    layer_plan,
    mean_loss,
    next_batch,
    train,
)

WARM_STEPS = 3


class Bench(NamedTuple):
    """A recipe made ready to step."""

    job: Job
    training: Training
    phase: Phase

    @property
    def device(self) -> torch.device:
        return self.training.ranks.device

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.phase.stage.batch_tokens // self.phase.stage.micro_batches

    def flops(self) -> float:
        """Operations of a micro-batch, forward and backward; attention as if no document ended."""
        cfg, named = self.training.cfg, dict(self.training.model.named_parameters())
        visits = [step.layer for step in layer_plan(cfg.model, self.phase.passes)]
        return flops_per_token(cfg, named, visits) * self.num_tokens


def run_1061_low(job: Job) -> None:
    """One micro-batch of the 1.0611 recipe as it starts: every layer once."""
    run_micro_batch(job, passes=1, compiled="auto")


def run_1061_full(job: Job) -> None:
    """The same with all passes of the recurrent segment."""
    passes = load_recipe(job, "1061").model.recur_passes
    run_micro_batch(job, passes, size_of(job, "compile"))


def open_bench(job: Job, cfg: Config, ranks: Ranks, passes: int) -> Bench:
    """Build model, optimizers and loader."""
    return Bench(job, Training(cfg, ranks, BOS_ID), Phase(get_stages(cfg)[0], passes, False))


def describe(bench: Bench) -> dict:
    """Say what is measured."""
    training, stage = bench.training, bench.phase.stage
    return {
        "tokens": bench.num_tokens,
        "seq_len": stage.seq_len,
        "passes": bench.phase.passes,
        "visits": len(layer_plan(training.cfg.model, bench.phase.passes)),
        "attention": training.model.attention,
        "passed_over": training.model.passed_over,
        "compute_dtype": str(training.model.compute_dtype),
        "compiled": training.is_compiled,
        "tflop": bench.flops() / 1e12,
    }


def run_micro_batch(job: Job, passes: int, compiled: str) -> None:
    """Measure a micro-batch that lies on the device, then as the loop runs it, then the update."""
    ranks = open_ranks(job.rehearse)
    cfg = load_recipe(job, "1061")
    changes = {"data.data_path": write_tokens(job, cfg), "run.compile": compiled}
    cfg = load_recipe(job, "1061", **changes)
    bench = open_bench(job, cfg, ranks, passes)
    job.measure("what", lambda: describe(bench))
    in_document = cfg.model.attn_in_document
    batch = next_batch(bench.training.loader, bench.phase.stage, ranks, in_document)
    bench.training.model.train()
    forward_backward = partial(forward_backward_of, bench, batch)
    compile_or_fall_back(bench, forward_backward)
    measure_micro_batch(bench, forward_backward)
    step = partial(bench.training.micro_step, bench.phase, 0)
    measure_fitting(job, "micro_step", lambda: per_call(bench, step, REPEATS), ranks.device)
    measure_fitting(job, "update", lambda: updates(bench, forward_backward), ranks.device)
    job.measure("profile", lambda: profile(step, ranks.device, Path(job.work) / "traces"))


def forward_backward_of(bench: Bench, batch: Batch) -> None:
    """Add a batch's gradient, with the loss that the training loop uses."""
    bench.training.loss(bench.training.model, batch, bench.phase.passes).backward()


def compile_or_fall_back(bench: Bench, forward_backward: Callable[[], None]) -> None:
    """Time the first call, which compiles; where that fails the rest is measured eagerly, and says so."""
    job, training = bench.job, bench.training
    first = job.measure("first_call", lambda: {"seconds": wall_seconds(forward_backward, bench.device)})
    if first is not None:
        job.measure("second_call", lambda: {"seconds": wall_seconds(forward_backward, bench.device)})
    elif training.is_compiled:
        job.record("fell_back", "eager: the compiled step failed")
        training.loss, training.is_compiled = mean_loss, False
        training.optimizers.zero_grad()
        free_memory(bench.device)


def measure_micro_batch(bench: Bench, forward_backward: Callable[[], None]) -> None:
    """Measure a batch that lies on the device; a gradient of nothing or of NaN is a fault."""
    job = bench.job
    found = measure_fitting(job, "micro_batch", lambda: micro_batch(bench, forward_backward), bench.device)
    norm = (found or {}).get("gradient_norm", 1.0)
    if not 0 < norm < math.inf:
        job.fault("micro_batch", f"expected a gradient of finite norm above 0, found {norm}")


def micro_batch(bench: Bench, forward_backward: Callable[[], None]) -> dict:
    """Time forward and backward of a batch that lies on the device."""
    found = timed(forward_backward, bench.device)
    norm = float(bench.training.model.embed.weight.grad.norm())
    return found | speed(bench, found["ms"], 1) | memory_gib(bench.device) | {"gradient_norm": norm}


def speed(bench: Bench, ms: float, micro_batches: int) -> dict:
    """Turn the milliseconds of some micro-batches into tokens a second and share of the card's peak."""
    return {
        "tokens_per_second": 1000 * micro_batches * bench.num_tokens / ms,
        "mfu": utilization(micro_batches * bench.flops(), ms, bench.device),
    }


def per_call(bench: Bench, action: Callable[[], object], calls: int) -> dict:
    """Time calls as the loop makes them, the host's work included, by the wall clock over all of them."""
    action()
    seconds = wall_seconds(lambda: [action() for _ in range(calls)], bench.device)
    return {"ms": 1000 * seconds / calls, "calls": calls}


def updates(bench: Bench, forward_backward: Callable[[], None]) -> dict:
    """Time the optimizers' step and the average's, each after a gradient; the first, which allocates, not."""
    times = []
    for _ in range(REPEATS + 1):
        forward_backward()
        times += times_ms(lambda: bench.training.update(0.0), bench.device, 1)
    return {"ms": median(times[1:]), "ms_most": max(times[1:])} | memory_gib(bench.device)


def run_naive(job: Job) -> None:
    """The naive recipe: the loop of train_gpt.train, against the same work without waiting for the device."""
    ranks, steps = open_ranks(job.rehearse), size_of(job, "naive_steps")
    changes = {
        "run.iterations": WARM_STEPS + steps,
        "run.max_wallclock_seconds": 0,
        "run.val_loss_every": -1,
        "run.train_log_every": 0,
        "run.compile": size_of(job, "compile"),
        "data.data_path": write_tokens(job, load_recipe(job, "naive")),
    }
    bench = open_bench(job, load_recipe(job, "naive", **changes), ranks, passes=1)
    job.measure("what", lambda: describe(bench))
    batch = next_batch(bench.training.loader, bench.phase.stage, ranks)
    bench.training.model.train()
    forward_backward = partial(forward_backward_of, bench, batch)
    compile_or_fall_back(bench, forward_backward)
    measure_micro_batch(bench, forward_backward)
    bench.training.optimizers.zero_grad()
    for _ in range(WARM_STEPS):
        whole_step(bench)
    loop = measure_fitting(job, "loop", lambda: train_loop(bench, steps), ranks.device)
    free = measure_fitting(
        job, "free_running", lambda: per_call(bench, partial(free_step, bench, forward_backward), steps // 2),
        ranks.device,
    )  # fmt: skip
    if loop and free and "ms" in loop and "ms" in free:
        bubble = loop["ms"] - free["ms"]
        job.record("bubble", {"ms": bubble, "share_of_step": bubble / loop["ms"]})
    folder = Path(job.work) / "traces"
    job.measure("profile", lambda: profile(partial(whole_step, bench), ranks.device, folder))


def whole_step(bench: Bench) -> None:
    """Make one step as the loop does."""
    bench.training.accumulate(bench.phase, lambda: False)
    bench.training.update(0.0)


def free_step(bench: Bench, forward_backward: Callable[[], None]) -> None:
    """Make one step from a batch that lies on the device; nothing waits for anything."""
    for _ in range(bench.phase.stage.micro_batches):
        forward_backward()
    bench.training.update(0.0)


def train_loop(bench: Bench, steps: int) -> dict:
    """Run the training loop itself over so many steps."""
    folder = Path(bench.job.work) / "naive_loop"
    folder.mkdir(parents=True, exist_ok=True)
    training, before = bench.training, bench.training.step
    facts = train(training, Log(folder, True), lambda: None)
    if training.step != before + steps:
        raise ValueError(f"expected {steps} steps, found {training.step - before}")
    ms = facts["train_ms"] / steps
    return (
        {"ms": ms, "steps": steps}
        | speed(bench, ms, bench.phase.stage.micro_batches)
        | memory_gib(bench.device)
    )
