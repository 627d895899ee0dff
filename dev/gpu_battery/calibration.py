"""Calibration of the 1.0611 recipe: one batch's statistics, then GPTQ of the first layer's matrices."""

from functools import partial

from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import load_recipe
from dev.gpu_battery.text import BOS_ID, write_tokens
from dev.gpu_battery.timing import measure_fitting, memory_gib, open_ranks, wall_seconds
from quantizers.gptq import CalibrationStats, calibrate
from quantizers.methods import solve
from train_gpt import Config, Ranks, Training, collect_statistics, exported_grids

SHARES = (1, 2, 4)  # a micro-batch whole, then in halves and quarters where it does not fit
LAYER = "blocks.0."


def run(job: Job) -> None:
    """Calibrate, in the largest share of a micro-batch that fits, and quantize."""
    ranks = open_ranks(job.rehearse)
    base = load_recipe(job, "1061")
    places = {"data.data_path": write_tokens(job, base), "quant.calib_batches": 1}
    stats: dict[str, CalibrationStats] = {}
    for share in SHARES:
        changes = places | {"data.batch_tokens": base.data.batch_tokens // share}
        cfg = load_recipe(job, "1061", **changes)
        name = "batch" if share == 1 else f"batch_1_{share}"
        found = measure_fitting(job, name, partial(statistics, cfg, ranks, stats), ranks.device)
        if found is None or stats:
            break
    if stats:
        measure_fitting(job, "gptq_layer", lambda: quantize_layer(cfg, ranks, stats), ranks.device)


def statistics(cfg: Config, ranks: Ranks, stats: dict[str, CalibrationStats]) -> dict:
    """Collect the statistics of one batch into `stats`."""
    training = Training(cfg, ranks, BOS_ID)
    seconds = wall_seconds(lambda: stats.update(collect_statistics(training)[0]), ranks.device)
    tokens = cfg.data.batch_tokens // cfg.data.micro_batches
    return {"seconds": seconds, "tokens": tokens, "matrices": len(stats)} | memory_gib(ranks.device)


def quantize_layer(cfg: Config, ranks: Ranks, stats: dict[str, CalibrationStats]) -> dict:
    """Factorize and solve every matrix of a layer."""
    params = dict(Training(cfg, ranks, BOS_ID).model.named_parameters())
    found = {}
    for name, grid in exported_grids(cfg).items():
        if not name.startswith(LAYER):
            continue
        kept, made = stats[name], []
        factorize = partial(calibrate, name, params[name], kept.hessian, kept.row_weights, cfg.quant.damping)
        first = wall_seconds(lambda made=made, call=factorize: made.append(call()), ranks.device)
        second = wall_seconds(partial(solve, made[0], grid, cfg.quant), ranks.device)
        shape = " x ".join(map(str, params[name].shape))
        found[name.removeprefix(LAYER)] = {"shape": shape, "factorize_s": first, "solve_s": second}
    seconds = sum(row["factorize_s"] + row["solve_s"] for row in found.values())
    return {"seconds": seconds} | found | memory_gib(ranks.device)
