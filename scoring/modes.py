"""The scorers by name: from a recipe's [eval] section to the nats of every target."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common import UserError
from scoring.adaptive import (
    ADAPTER_SITES,
    Callbacks,
    ScoringResult,
    ScoringRun,
    WindowSettings,
    choose_chunk_tokens,
    learns_in_graphs,
    plan_document_windows,
    plan_documents,
    score_lora,
    score_phased,
    score_pre_eval,
    score_sgd,
    weights_digest,
)
from scoring.config import EvalConfig
from scoring.counted import (
    CountedModel,
    MixedCost,
    build_counted,
    count_running,
    counted_chances,
    counted_limits,
    read_counted,
    write_counted,
)
from scoring.ngram import (
    KEY_DTYPE,
    LEGACY_ALIGNMENT,
    NEXT_DTYPE,
    NgramTable,
    build_table,
    join_tilts,
    online_tilt,
    read_table,
    static_tilt,
    write_table,
)
from scoring.sliding import Cost, Logits, ScaledCost, plain_cost, plan_windows, score_batch

SCALE_DTYPE = np.dtype("<f4")
NOT_STORED = ": expected what it needs in the artifact, found nothing. Train with it or set it to 0 here."
LEGACY_TAIL = "the text's last targets count more than once, as in systems B and C (contest rule C4)"

LONGEST_PREFIX = 1000  # tokens: far beyond what repeats
NARROW_RULE = "needs data.vocab_size of at most 65,536"
LENGTHS_RULE = f"must be whole numbers from 1 to {LONGEST_PREFIX}"

# Adaptation ends in time for so much of the limit: what is left pays for a last unit slower than expected.
DEADLINE_FRAC = 0.95


class Scoring(NamedTuple):
    """What a scoring may be given besides model, config and text."""

    reports: Callbacks = Callbacks()
    switch_at: int = -1  # replay: units that adapt; -1: cfg.deadline_s decides
    warms_up: bool = True  # before the clock starts; compiled graphs need it


class ScorerState(NamedTuple):
    """What an artifact holds for its scorer beside the weights."""

    table: NgramTable | None = None  # where cfg.tilt_static_entries asks for one
    scales: tuple[float, ...] = ()  # factors of positive and of negative logits, where fit_scales does
    counted: CountedModel | None = None  # where cfg.counted_entries asks for one


def build_scorer_state(
    cfg: EvalConfig, vocab_size: int, shards: list[np.ndarray], num_tokens: int
) -> ScorerState:
    """Count what a recipe asks for in the first num_tokens training tokens."""
    parts, left = [], num_tokens
    for shard in shards:
        parts.append(np.asarray(shard[:left]))
        left -= len(parts[-1])
    tokens, table, counted = np.concatenate(parts), None, None
    if cfg.tilt_static_entries:
        table = build_table(tokens, cfg.tilt_static_lengths, cfg.tilt_static_entries)
    if cfg.counted_entries:
        counted = build_counted(tokens, vocab_size, cfg.counted_prefix, cfg.counted_entries)
    return ScorerState(table, (), counted)


def write_scorer_state(state: ScorerState) -> dict[str, bytes]:
    """Lay out what there is as named byte strings for the artifact."""
    streams = {} if state.table is None else write_table(state.table)
    streams |= {} if state.counted is None else write_counted(state.counted)
    return streams | ({"logit scales": np.array(state.scales, SCALE_DTYPE).tobytes()} if state.scales else {})


def scorer_state_limits(cfg: EvalConfig, vocab_size: int) -> dict[str, int]:
    """Return the most bytes of each of the streams that write_scorer_state makes under these cfg."""
    limits, entries = {}, cfg.tilt_static_entries
    if entries:
        limits |= {"ngram keys": KEY_DTYPE.itemsize * entries, "ngram tokens": NEXT_DTYPE.itemsize * entries}
    if cfg.counted_entries:
        limits |= counted_limits(vocab_size, cfg.counted_prefix, cfg.counted_entries)
    return limits | ({"logit scales": 2 * SCALE_DTYPE.itemsize} if cfg.fit_scales else {})


def read_scorer_state(streams: dict[str, bytes], cfg: EvalConfig, vocab_size: int) -> ScorerState:
    """Restore what write_scorer_state laid out, as the recipe says that it is."""
    table, counted = None, None
    if cfg.tilt_static_entries:
        table = read_table(streams, cfg.tilt_static_lengths, cfg.tilt_static_entries, vocab_size)
    if cfg.counted_entries:
        counted = read_counted(streams, vocab_size, cfg.counted_prefix, cfg.counted_entries)
    scales = np.frombuffer(streams.get("logit scales", b""), SCALE_DTYPE)
    return ScorerState(table, tuple(scales.tolist()), counted)


def scoring_cost(cfg: EvalConfig, tokens: np.ndarray, state: ScorerState) -> Cost:
    """Build what charges the targets: the negative log softmax, scaled and tilted as the recipe says."""
    if cfg.tilt_static_entries and state.table is None:
        raise UserError("eval.tilt_static_entries" + NOT_STORED)
    if cfg.counted_entries and state.counted is None:
        raise UserError("eval.counted_entries" + NOT_STORED)
    if cfg.fit_scales and not state.scales:
        raise UserError("eval.fit_scales" + NOT_STORED)
    tilts = []
    if cfg.tilt_static_entries:
        tilts.append(static_tilt(state.table, tokens, cfg.tilt_static_strength, cfg.tilt_legacy))
    if cfg.tilt_online > 0:
        tilts.append(online_tilt(tokens, cfg.tilt_online))
    is_tilted = cfg.tilt_static_entries or cfg.tilt_online > 0
    cost = join_tilts(*tilts) if is_tilted else plain_cost
    if cfg.counted_entries or cfg.running_lengths:
        share, chances = 0.0, np.zeros(0)
        if cfg.counted_entries:
            share, chances = cfg.counted_share, counted_chances(state.counted, tokens)
        cost = MixedCost(cost, share, chances, cfg.running_escape, count_running(tokens, cfg.running_lengths))
    return ScaledCost(*state.scales, cost) if cfg.fit_scales else cost


def plan_chunked(cfg: EvalConfig, context_len: int, tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Plan windows side by side."""
    return plan_windows(len(tokens) - 1, context_len)


def plan_sliding(cfg: EvalConfig, context_len: int, tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Plan windows that overlap."""
    return plan_windows(len(tokens) - 1, context_len, cfg.stride)


def plan_in_documents(cfg: EvalConfig, context_len: int, tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Plan windows that overlap and stay in their document."""
    return plan_document_windows(plan_documents(tokens, bos_id), context_len, cfg.stride)


class Scorer(NamedTuple):
    """How a mode scores."""

    plan: Callable | None  # (cfg, context_len, tokens, bos_id) -> (W, 3) windows; None: by document
    adapt: Callable | None = None  # (model, scoring run, cfg) -> ScoringResult; None: weights stay
    overlaps: bool = True  # windows score cfg.stride targets each, not all


SCORERS = {
    "chunked": Scorer(plan_chunked, overlaps=False),
    "sliding": Scorer(plan_sliding),
    "doc": Scorer(plan_in_documents),
    "sgd-ttt": Scorer(plan_sliding, score_sgd),
    "lora-ttt": Scorer(None, score_lora),
    "phased": Scorer(None, score_phased),
    "legacy_pre_eval": Scorer(plan_sliding, score_pre_eval),
}


def scored_stride(cfg: EvalConfig) -> int:
    """Return the targets that a window scores; 0: all of them."""
    return cfg.stride if SCORERS[cfg.mode].overlaps else 0


def are_lengths(values: tuple) -> bool:
    """Whether all are numbers of tokens that a context may have."""
    return all(isinstance(value, int) and 1 <= value <= LONGEST_PREFIX for value in values)


def scoring_rules(cfg: EvalConfig, context_len: int, vocab_size: int) -> list[tuple]:
    """Return rows (field, whether the rule holds, what must hold) of what cannot be scored together."""
    whole_strides = context_len % cfg.stride == 0 and context_len > cfg.stride
    repeats = cfg.mode == "sliding" and not cfg.keep_tail and whole_strides
    hints_fit = bool(cfg.tilt_static_lengths) and are_lengths(cfg.tilt_static_lengths)
    carries = cfg.mode == "phased" or (cfg.mode == "lora-ttt" and cfg.lora_warm_lanes)
    known_sites = set(cfg.lora_sites.split(",")) <= set(ADAPTER_SITES)
    narrow = vocab_size <= 1 << 16
    no_later = cfg.deadline_s <= cfg.limit_seconds or not cfg.limit_seconds
    return [
        ("eval.deadline_s", cfg.deadline_s == -1 or cfg.deadline_s >= 0, "must be -1, 0 or seconds"),
        ("eval.deadline_s", no_later, f"must be at most eval.limit_seconds={cfg.limit_seconds:g}"),
        ("eval.stride", scored_stride(cfg) <= context_len, f"must be at most the context of {context_len}"),
        (
            "eval.tail_legacy",
            repeats or not cfg.tail_legacy,
            "needs eval.mode=sliding, eval.keep_tail=0 and a context of several whole strides",
        ),
        (
            "eval.tilt_online",
            not (cfg.tilt_online and carries),
            "must be 0 with phases or warm lanes: hints would read text that is scored by what they helped",
        ),
        (
            "eval.running_lengths",
            not (cfg.running_lengths and carries),
            "must be empty with phases or warm lanes: counts would read text that they help to score",
        ),
        ("eval.running_lengths", are_lengths(cfg.running_lengths), LENGTHS_RULE),
        ("eval.tilt_static_lengths", hints_fit, LENGTHS_RULE),
        ("eval.lora_sites", known_sites, f"must be some of {', '.join(ADAPTER_SITES)}"),
        ("eval.tilt_static_entries", not cfg.tilt_static_entries or narrow, NARROW_RULE),
        ("eval.counted_entries", not cfg.counted_entries or narrow, NARROW_RULE),
    ]


def plan_tail(num_targets: int, context_len: int, stride: int) -> np.ndarray:
    """Plan the windows that start after the first one that reaches the text's end, as in systems B and C.

    Each scores the last `stride` of num_targets once more; (W, 3) int64 rows (start, end, first), W =
    context_len / stride - 1 (contest pull requests 281, 1666).
    """
    starts = np.arange(num_targets - context_len + stride, num_targets, stride, dtype=np.int64)
    return np.stack([starts, np.full_like(starts, num_targets), num_targets - stride - starts], axis=1)


def score_tail_again(model: Logits, session: ScoringRun, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Score the windows of plan_tail, on every rank alike; returns the targets' positions and nats, (R,)."""
    plan = plan_tail(session.num_targets, session.settings.context_len, stride)
    parts = [score_batch(model, session.tokens, row[None], session.options) for row in plan]
    return tuple(torch.cat(column).numpy() for column in zip(*parts))


def broken_rules(cfg: EvalConfig) -> str:
    """Say why a score that repeats a system's mistake is invalid; empty for all others."""
    alignment = LEGACY_ALIGNMENT if cfg.tilt_static_entries and cfg.tilt_legacy else ""
    tail = LEGACY_TAIL if cfg.tail_legacy else ""
    return f"{alignment}; {tail}" if alignment and tail else alignment or tail


def seconds_for(cfg: EvalConfig, seconds: float, num_bytes: int) -> float:
    """Scale seconds that are meant for cfg.limit_text_bytes of text to so many bytes."""
    return seconds * num_bytes / cfg.limit_text_bytes if cfg.limit_text_bytes else seconds


def scoring_limit(cfg: EvalConfig, num_bytes: int) -> float:
    """Return the seconds that scoring so many bytes of text may take; 0: any."""
    return seconds_for(cfg, cfg.limit_seconds, num_bytes)


def scoring_deadline(cfg: EvalConfig, num_bytes: int) -> float:
    """Return the seconds in which adaptation should let scoring of so many bytes end; 0: it never stops."""
    if not cfg.deadline_s:
        return DEADLINE_FRAC * scoring_limit(cfg, num_bytes)
    return seconds_for(cfg, max(cfg.deadline_s, 0.0), num_bytes)


def deadline_note(cfg: EvalConfig, score, how: str = "by the clock") -> str:
    """Say where a score's adaptation ended early, and what to change; empty where it did not end early."""
    if score.switch_at >= score.num_units:
        return ""
    limit = scoring_deadline(cfg, score.num_bytes)
    aim = f", to end within {limit:.1f} s" if limit else ""
    return (
        f"deadline: adapted {score.switch_at} of {score.num_units} units, {how}, and scored the rest "
        f"plainly: {score.seconds:.1f} s{aim}. To adapt further: a faster machine, more ranks, cheaper "
        "adaptation, a higher eval.limit_seconds, or eval.deadline_s=-1, which may pass the limit."
    )


def rehearsal_lengths(session: ScoringRun, cfg: EvalConfig) -> list[int]:
    """Return lengths of documents that need every graph that the text's will: for each chunk the longest.

    Beyond a whole window all passes are alike.
    """
    spans = plan_documents(session.tokens, session.options.bos_id, cfg.lora_max_doc_tokens)
    longest: dict[int, int] = {}
    for length in np.unique(spans[:, 1] - spans[:, 0]).tolist():
        chunk = choose_chunk_tokens(length, cfg)
        enough = session.settings.context_len + 2 * chunk
        longest[chunk] = enough if length > enough and choose_chunk_tokens(enough, cfg) == chunk else length
    return list(longest.values())


def rehearse_graphs(model: nn.Module, session: ScoringRun, cfg: EvalConfig, vocab_size: int) -> None:
    """Make the graphs of adaptive passes, each rank by itself, on random documents of the text's lengths."""
    options = session.options._replace(cost=plain_cost, rank=0, world_size=1)
    starts = np.cumsum([0, *rehearsal_lengths(session, cfg)])
    tokens = np.random.default_rng(0).integers(0, vocab_size, starts[-1] + 1)
    tokens[tokens == options.bos_id] = (options.bos_id + 1) % vocab_size
    tokens[starts] = options.bos_id
    settings = WindowSettings(session.settings.context_len, session.settings.stride)
    rehearsal = ScoringRun(tokens.astype(session.tokens.dtype), settings, options, session.ranks, Callbacks())
    SCORERS[cfg.mode].adapt(model, rehearsal, cfg)


def warm_up_scorer(
    model: nn.Module, scorer: Logits, session: ScoringRun, cfg: EvalConfig, vocab_size: int
) -> None:
    """Score random tokens as cfg.mode will the text: what is built at first use is built here.

    `session` is the text's, which stays as it is; so do the model's weights, or it raises.
    """
    context_len, options = session.settings.context_len, session.options._replace(cost=plain_cost)
    num_tokens = 2 * context_len + 1
    if SCORERS[cfg.mode].adapt is None:  # a whole batch
        num_tokens += options.batch_tokens // context_len * (scored_stride(cfg) or context_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, min(num_tokens, len(session.tokens)))
    tokens = tokens.astype(session.tokens.dtype)
    before = weights_digest(model)
    # Its clock is not the text's: a deadline would end the rehearsal where compiling takes long.
    settings = WindowSettings(context_len, session.settings.stride)
    rehearsal = ScoringRun(tokens, settings, options, session.ranks, Callbacks())
    if SCORERS[cfg.mode].plan is None and learns_in_graphs(cfg, options):
        try:
            rehearse_graphs(model, session, cfg, vocab_size)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as problem:
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
            warnings.warn(f"adapters learn without graphs: {reason}", stacklevel=2)
            session.options = session.options._replace(compiles=False)
            rehearsal.options = options._replace(compiles=False)
    if not learns_in_graphs(cfg, session.options):
        score_session(scorer, rehearsal, cfg)
    if weights_digest(model) != before:
        raise ValueError("warming up moved the model's weights")
    session.checker.event("load", 0, 0)


def adapt_session(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """Score a text and learn from it; what was not rehearsed is not compiled: that takes minutes."""
    if not learns_in_graphs(cfg, session.options):
        return SCORERS[cfg.mode].adapt(model, session, cfg)
    with torch.compiler.set_stance("eager_on_recompile"):
        return SCORERS[cfg.mode].adapt(model, session, cfg)


def score_session(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """Score a session's text as cfg.mode says."""
    session.checker.invalid = broken_rules(cfg)
    if SCORERS[cfg.mode].adapt is not None:
        return adapt_session(model, session, cfg)
    context_len, bos_id = session.settings.context_len, session.options.bos_id
    session.score_windows(model, SCORERS[cfg.mode].plan(cfg, context_len, session.tokens, bos_id))
    return session.outcome(0, 0)
