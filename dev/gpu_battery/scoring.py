"""Scorers on the 1.0611 architecture with random weights: tokens a second and memory."""

import math
from functools import partial

import numpy as np

from data.validation import ValidationText
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size, load_recipe
from dev.gpu_battery.text import BOS_ID, draw_tokens
from dev.gpu_battery.timing import measure_fitting, memory_gib, open_ranks, times_ms
from formats.recipe import with_values
from kernels.machine import resolve_compile
from scoring.adaptive import Callbacks, ScoringRun, SgdTrainer, WindowSettings, restored
from scoring.modes import Scoring
from scoring.sliding import ScoreOptions
from train_gpt import GPT, Config, Ranks, build_model, score_model

LORA = {"eval.mode": "lora-ttt", "eval.lora_warm_lanes": 0}


def run(job: Job) -> None:
    """Measure the scorers: eager ones from short to long, then what must compile."""
    ranks = open_ranks(job.rehearse)
    cfg = load_recipe(job, "1061", **{"model.out_init": "depth"})  # zeros would be multiplied faster
    model = build_model(cfg, ranks.device).eval()
    job.record("what", {"attention": model.attention, "batch_tokens": batch_tokens(cfg)})

    def measure(name: str, changes: dict, tokens: np.ndarray, warms_up: bool = True) -> None:
        changed = with_values(cfg, {"run.compile": "off"} | changes, "battery")
        sizes = np.ones(len(tokens) - 1, dtype=np.int64)  # a byte each
        text = ValidationText(tokens, sizes, BOS_ID, "", "", "", None)
        action = partial(score_text, model, changed, text, ranks, warms_up)
        found = measure_fitting(job, name, action, ranks.device) or {}
        if not 0 < found.get("nats", 1.0) < 2 * math.log(cfg.data.vocab_size) + 5:
            job.fault(name, f"expected the loss of random weights, found {found['nats']} nats a token")

    tokens = draw_tokens(get_size(job, "window_tokens") + 1, cfg.data.vocab_size, seed=1)
    measure("chunked", {"eval.mode": "chunked"}, tokens)
    measure("lora_first", LORA, draw_documents(job, cfg, 2 * cfg.eval.lora_chunk_tokens), False)
    for length in get_size(job, "lora_lengths"):
        measure(f"lora_{length}", LORA, draw_documents(job, cfg, length), False)
    measure_fitting(job, "sgd", lambda: sgd_steps(job, model, cfg, ranks), ranks.device)
    measure("sliding", {"eval.mode": "sliding"}, tokens[: get_size(job, "sliding_targets") + 1])
    if resolve_compile(get_size(job, "compile"), ranks.device):
        measure("chunked_compiled", {"eval.mode": "chunked", "run.compile": "on"}, tokens)
    else:
        job.record("chunked_compiled", "not compiled")


def batch_tokens(cfg: Config) -> int:
    """Return the tokens of a scoring batch, as train_gpt.score_options has them."""
    return cfg.run.val_batch_tokens // cfg.data.micro_batches


def score_text(model: GPT, cfg: Config, text: ValidationText, ranks: Ranks, warms_up: bool) -> dict:
    """Score a text as a run does; its clock starts after the warm-up."""
    score = score_model(model, cfg, text, ranks, Scoring(warms_up=warms_up))
    found = {"seconds": score.seconds, "targets": score.num_tokens, "nats": score.val_loss}
    return found | {"tokens_per_second": score.num_tokens / score.seconds} | memory_gib(ranks.device)


def draw_documents(job: Job, cfg: Config, length: int) -> np.ndarray:
    """Draw one batch of documents of nearly equal length, and the BOS that ends the last."""
    rng = np.random.default_rng(length)
    count = max(1, min(get_size(job, "lora_docs"), batch_tokens(cfg) // length))
    lengths = rng.integers(max(length * 9 // 10, 2), length + 1, count)
    tokens = rng.integers(BOS_ID + 1, cfg.data.vocab_size, lengths.sum() + 1)
    tokens[np.concatenate([[0], np.cumsum(lengths)])] = BOS_ID
    return tokens.astype(np.uint16)


def sgd_steps(job: Job, model: GPT, cfg: Config, ranks: Ranks) -> dict:
    """Time SGD steps on all weights, rows of the context's length."""
    length, num_rows = cfg.data.seq_len, cfg.eval.sgd_batch_seqs
    tokens = draw_tokens(num_rows * length + 1, cfg.data.vocab_size, seed=2)
    inputs, targets = (part.reshape(-1, length) for part in (tokens[:-1], tokens[1:]))
    options = ScoreOptions(BOS_ID, batch_tokens(cfg), ranks.device)
    session = ScoringRun(tokens, WindowSettings(length, cfg.eval.stride), options, ranks, Callbacks())
    with restored(model):
        trainer = SgdTrainer(model, cfg.eval, session)
        trainer.step(inputs, targets)
        times = times_ms(lambda: trainer.step(inputs, targets), ranks.device, get_size(job, "sgd_steps"))
    ms = sum(times) / len(times)
    found = {"ms": ms, "steps": len(times), "rows": num_rows}
    return found | {"tokens_per_second": 1000 * inputs.size / ms} | memory_gib(ranks.device)
