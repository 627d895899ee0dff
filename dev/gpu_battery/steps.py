"""Training steps of the contest's recipes: compile time, milliseconds, share of the peak, memory, kernels."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size, load_recipe
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


class Bench:
    """A recipe made ready to step, and a batch that lies on the device."""

    def __init__(self, job: Job, cfg: Config, ranks: Ranks, passes: int):
        self.job, self.device = job, ranks.device
        self.training = Training(cfg, ranks, BOS_ID)
        self.phase = Phase(get_stages(cfg)[0], passes, False)
        stage = self.phase.stage
        self.num_tokens = stage.batch_tokens // stage.micro_batches  # of a micro-batch
        job.measure("what", self.describe)
        self.batch = next_batch(self.training.loader, stage, ranks, cfg.model.attn_in_document)
        self.training.model.train()

    def flops(self) -> float:
        """Operations of a micro-batch, forward and backward; attention as if no document ended."""
        cfg, named = self.training.cfg, dict(self.training.model.named_parameters())
        visits = [step.layer for step in layer_plan(cfg.model, self.phase.passes)]
        return flops_per_token(cfg, named, visits) * self.num_tokens

    def describe(self) -> dict:
        """Say what is measured."""
        training, passes = self.training, self.phase.passes
        return {
            "tokens": self.num_tokens,
            "seq_len": self.phase.stage.seq_len,
            "passes": passes,
            "visits": len(layer_plan(training.cfg.model, passes)),
            "attention": training.model.attention,
            "passed_over": training.model.passed_over,
            "compute_dtype": str(training.model.compute_dtype),
            "compiled": training.is_compiled,
            "tflop": self.flops() / 1e12,
        }

    def forward_backward(self) -> None:
        """Add the batch's gradient, with the loss that the training loop uses."""
        self.training.loss(self.training.model, self.batch, self.phase.passes).backward()

    def whole_step(self) -> None:
        """Make one step as the loop does."""
        self.training.accumulate(self.phase, lambda: False)
        self.training.update(0.0)

    def free_step(self) -> None:
        """Make one step from the batch on the device; nothing waits for anything."""
        for _ in range(self.phase.stage.micro_batches):
            self.forward_backward()
        self.training.update(0.0)

    def profile(self, action: Callable[[], object]) -> None:
        """Profile some calls of a step or a part of one."""
        self.job.measure("profile", lambda: profile(action, self.device, Path(self.job.work) / "traces"))


def run_1061_low(job: Job) -> None:
    """One micro-batch of the 1.0611 recipe as it starts: every layer once."""
    run_micro_batch(job, passes=1, compiled="on")


def run_1061_full(job: Job) -> None:
    """The same with all passes of the recurrent segment."""
    passes = load_recipe(job, "1061").model.recur_passes
    run_micro_batch(job, passes, get_size(job, "compile"))


def make_1061(job: Job, passes: int, compiled: str) -> Bench:
    """Make the 1.0611 recipe ready."""
    changes = {"data.data_path": write_tokens(job, load_recipe(job, "1061")), "run.compile": compiled}
    return Bench(job, load_recipe(job, "1061", **changes), open_ranks(job.rehearse), passes)


def make_naive(job: Job) -> Bench:
    """Make the naive recipe ready."""
    changes = {
        "run.iterations": WARM_STEPS + get_size(job, "naive_steps"),
        "run.max_wallclock_seconds": 0,
        "run.val_loss_every": -1,
        "run.train_log_every": 0,
        "run.compile": get_size(job, "compile"),
        "data.data_path": write_tokens(job, load_recipe(job, "naive")),
    }
    return Bench(job, load_recipe(job, "naive", **changes), open_ranks(job.rehearse), passes=1)


def compile_1061_ahead(job: Job) -> None:
    """Fill the compilers' caches for the parts on the 1.0611 recipe."""
    all_passes = load_recipe(job, "1061").model.recur_passes
    for passes, compiled in ((all_passes, get_size(job, "compile")), (1, "on")):
        compile_or_fall_back(make_1061(job, passes, compiled))


def compile_naive_ahead(job: Job) -> None:
    """Fill the compilers' caches for the part on the naive recipe."""
    compile_or_fall_back(make_naive(job))


def run_micro_batch(job: Job, passes: int, compiled: str) -> None:
    """Measure a micro-batch that lies on the device, then as the loop runs it, then the update."""
    bench = make_1061(job, passes, compiled)
    compile_or_fall_back(bench)
    measure_micro_batch(bench)
    step = partial(bench.training.micro_step, bench.phase, 0)
    measure_fitting(job, "micro_step", lambda: per_call(bench, step, REPEATS), bench.device)
    measure_fitting(job, "update", lambda: updates(bench), bench.device)
    bench.profile(step)


def compile_or_fall_back(bench: Bench) -> None:
    """Time the first call, which compiles; where that fails the rest is measured eagerly, and says so."""
    job, training = bench.job, bench.training

    def call() -> dict:
        return {"seconds": wall_seconds(bench.forward_backward, bench.device)}

    if job.measure("first_call", call) is not None:
        job.measure("second_call", call)
    elif training.is_compiled:
        job.record("fell_back", "eager: the compiled step failed")
        training.loss, training.is_compiled = mean_loss, False
        training.optimizers.zero_grad()
        free_memory(bench.device)


def measure_micro_batch(bench: Bench) -> None:
    """Time forward and backward of the batch; a gradient of nothing or of NaN is a fault."""

    def measure() -> dict:
        found = timed(bench.forward_backward, bench.device)
        norm = float(bench.training.model.embed.weight.grad.norm())
        return found | speed(bench, found["ms"], 1) | memory_gib(bench.device) | {"gradient_norm": norm}

    found = measure_fitting(bench.job, "micro_batch", measure, bench.device)
    norm = (found or {}).get("gradient_norm", 1.0)
    if not 0 < norm < math.inf:
        bench.job.fault("micro_batch", f"expected a gradient of finite norm above 0, found {norm}")


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


def updates(bench: Bench) -> dict:
    """Time the optimizers' step and the average's, each after a gradient; the first, which allocates, not."""
    times = []
    for _ in range(REPEATS + 1):
        bench.forward_backward()
        times += times_ms(lambda: bench.training.update(0.0), bench.device, 1)
    return {"ms": median(times[1:]), "ms_most": max(times[1:])} | memory_gib(bench.device)


def run_naive(job: Job) -> None:
    """The naive recipe: the loop of train_gpt.train, against the same work without waiting for the device."""
    steps, bench = get_size(job, "naive_steps"), make_naive(job)
    compile_or_fall_back(bench)
    measure_micro_batch(bench)
    bench.training.optimizers.zero_grad()
    for _ in range(WARM_STEPS):
        bench.whole_step()
    loop = measure_fitting(job, "loop", lambda: train_loop(bench, steps), bench.device)
    free_steps = partial(per_call, bench, bench.free_step, steps // 2)
    free = measure_fitting(job, "free_running", free_steps, bench.device)
    if loop and free and "ms" in loop and "ms" in free:
        bubble = loop["ms"] - free["ms"]
        job.record("bubble", {"ms": bubble, "share_of_step": bubble / loop["ms"]})
    bench.profile(bench.whole_step)


def train_loop(bench: Bench, steps: int) -> dict:
    """Run the training loop itself over so many steps."""
    folder = Path(bench.job.work) / "naive_loop"
    folder.mkdir(parents=True, exist_ok=True)
    training, before = bench.training, bench.training.step
    facts = train(training, Log(folder, True), lambda: None)
    if training.step != before + steps:
        raise ValueError(f"expected {steps} steps, found {training.step - before}")
    ms = facts["train_ms"] / steps
    found = {"ms": ms, "steps": steps} | speed(bench, ms, bench.phase.stage.micro_batches)
    return found | memory_gib(bench.device)
