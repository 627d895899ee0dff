"""The scorers by name: from a recipe's [eval] settings to per-target nats.

`settings` is any object with the fields that a mode reads: options of a scorer carry its name as a prefix.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common import UserError
from scoring.adaptive import (
    Callbacks,
    LoraOptions,
    PhaseOptions,
    ScoringResult,
    ScoringRun,
    SgdOptions,
    plan_document_windows,
    plan_documents,
    score_lora,
    score_plain,
    score_pre_eval,
    score_sgd,
    weights_digest,
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
PLAIN_MODES = ("chunked", "sliding", "doc")
EVAL_MODES = (*PLAIN_MODES, "sgd-ttt", "lora-ttt", "phased", "legacy_pre_eval")
LEGACY_TAIL = "the text's last targets count more than once, as in systems B and C (contest rule C4)"


class Scoring(NamedTuple):
    """What a scoring may be given besides model, settings and text."""

    reports: Callbacks = Callbacks()
    switch_at: int = -1  # replay: units that adapt; -1: settings.deadline_s decides
    warms_up: bool = True  # before the clock starts; compiled graphs need it


def sgd_options(settings) -> SgdOptions:
    """Return the settings of SGD on scored text."""
    return SgdOptions(
        lr=settings.sgd_lr,
        momentum=settings.sgd_momentum,
        epochs=settings.sgd_epochs,
        chunk_tokens=settings.sgd_chunk_tokens,
        batch_seqs=settings.sgd_batch_seqs,
        clip_norm=settings.sgd_clip_norm,
        frozen=tuple(f"blocks.{i}.*" for i in range(settings.sgd_freeze_blocks)),
    )


def lora_options(settings) -> LoraOptions:
    """Return the settings of documents' adapters."""
    return LoraOptions(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        sites=tuple(settings.lora_sites.split(",")),
        lr=settings.lora_lr,
        beta2=settings.lora_beta2,
        weight_decay=settings.lora_weight_decay,
        chunk_tokens=settings.lora_chunk_tokens,
        short_chunks=settings.lora_short_chunks,
        batch_docs=settings.lora_batch_docs,
        warm_lanes=settings.lora_warm_lanes,
        max_doc_tokens=settings.lora_max_doc_tokens,
        seed=settings.lora_seed,
    )


class ScorerState(NamedTuple):
    """What an artifact holds for its scorer beside the weights."""

    table: NgramTable | None = None  # where settings.tilt_static_entries asks for one
    scales: tuple[float, ...] = ()  # factors of positive and of negative logits, where fit_scales does


def build_ngram_table(settings, shards: list[np.ndarray]) -> NgramTable:
    """Build the table that the settings ask for from the first of the training tokens."""
    parts, left = [], settings.tilt_static_tokens
    for shard in shards:
        parts.append(np.asarray(shard[:left]))
        left -= len(parts[-1])
    return build_table(np.concatenate(parts), settings.tilt_static_lengths, settings.tilt_static_entries)


def write_scorer_state(state: ScorerState) -> dict[str, bytes]:
    """Lay out what there is as named byte strings for the artifact."""
    streams = {} if state.table is None else write_table(state.table)
    return streams | ({"logit scales": np.array(state.scales, SCALE_DTYPE).tobytes()} if state.scales else {})


def scorer_state_limits(settings) -> dict[str, int]:
    """Return the most bytes of each of the streams that write_scorer_state makes under these settings."""
    entries = settings.tilt_static_entries
    table = {"ngram keys": KEY_DTYPE.itemsize * entries, "ngram tokens": NEXT_DTYPE.itemsize * entries}
    return (table if entries else {}) | (
        {"logit scales": 2 * SCALE_DTYPE.itemsize} if settings.fit_scales else {}
    )


def read_scorer_state(streams: dict[str, bytes], settings, vocab_size: int) -> ScorerState:
    """Restore what write_scorer_state laid out, as the settings say that it is."""
    table = None
    if settings.tilt_static_entries:
        table = read_table(streams, settings.tilt_static_lengths, settings.tilt_static_entries, vocab_size)
    scales = np.frombuffer(streams.get("logit scales", b""), SCALE_DTYPE)
    return ScorerState(table, tuple(scales.tolist()))


def scoring_cost(settings, tokens: np.ndarray, state: ScorerState) -> Cost:
    """Build what charges the targets: the negative log softmax, scaled and tilted as the settings say."""
    if settings.tilt_static_entries and state.table is None:
        raise UserError("eval.tilt_static_entries" + NOT_STORED)
    if settings.fit_scales and not state.scales:
        raise UserError("eval.fit_scales" + NOT_STORED)
    tilts = []
    if settings.tilt_static_entries:
        tilts.append(static_tilt(state.table, tokens, settings.tilt_static_strength, settings.tilt_legacy))
    if settings.tilt_online > 0:
        tilts.append(online_tilt(tokens, settings.tilt_online))
    is_tilted = settings.tilt_static_entries or settings.tilt_online > 0
    cost = join_tilts(*tilts) if is_tilted else plain_cost
    return ScaledCost(*state.scales, cost) if settings.fit_scales else cost


def plan_plain(settings, context_len: int, tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Plan the windows of a mode without adapters."""
    if settings.mode == "doc":
        return plan_document_windows(plan_documents(tokens, bos_id), context_len, settings.stride)
    return plan_windows(len(tokens) - 1, context_len, 0 if settings.mode == "chunked" else settings.stride)


def plan_tail(num_targets: int, context_len: int, stride: int) -> np.ndarray:
    """Plan the windows that start after the first one that reaches the text's end, as in systems B and C.

    Each scores the last `stride` of num_targets once more; (W, 3) int64 rows (start, end, first), W =
    context_len / stride - 1 (contest pull requests 281, 1666).
    """
    starts = np.arange(num_targets - context_len + stride, num_targets, stride, dtype=np.int64)
    return np.stack([starts, np.full_like(starts, num_targets), num_targets - stride - starts], axis=1)


def score_tail_again(model: Logits, session: ScoringRun, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Score the windows of plan_tail, on every rank alike; returns places (R,) and nats (R,) of targets."""
    plan = plan_tail(session.num_targets, session.settings.context_len, stride)
    parts = [score_batch(model, session.tokens, row[None], session.options) for row in plan]
    return tuple(torch.cat(column).numpy() for column in zip(*parts))


def broken_rules(settings) -> str:
    """Say why a score under compat settings is invalid; empty without them."""
    is_misaligned = settings.tilt_static_entries and settings.tilt_legacy
    found = ((is_misaligned, LEGACY_ALIGNMENT), (settings.tail_legacy, LEGACY_TAIL))
    return "; ".join(reason for is_set, reason in found if is_set)


def warm_up_scorer(model: nn.Module, scorer: Logits, session: ScoringRun, settings, vocab_size: int) -> None:
    """Score random tokens as settings.mode will the text: what is built at first use is built here.

    `session` is the text's, which stays as it is; so do the model's weights, or it raises.
    """
    context_len, options = session.settings.context_len, session.options._replace(cost=plain_cost)
    num_tokens = 2 * context_len + 1
    if settings.mode in PLAIN_MODES:  # a whole batch
        stride = context_len if settings.mode == "chunked" else settings.stride
        num_tokens += options.batch_tokens // context_len * stride
    tokens = np.random.default_rng(0).integers(0, vocab_size, min(num_tokens, len(session.tokens)))
    tokens = tokens.astype(session.tokens.dtype)
    before = weights_digest(model)
    rehearsal = ScoringRun(tokens, session.settings, options, session.ranks, Callbacks())
    score_session(scorer, rehearsal, settings)
    if weights_digest(model) != before:
        raise ValueError("warming up moved the model's weights")
    session.checker.event("load", 0, 0)


def score_session(model: nn.Module, session: ScoringRun, settings) -> ScoringResult:
    """Score a session's text as settings.mode says."""
    session.checker.invalid = broken_rules(settings)
    context_len = session.settings.context_len
    if settings.mode in PLAIN_MODES:
        windows = plan_plain(settings, context_len, session.tokens, session.options.bos_id)
        return score_plain(model, session, windows)
    if settings.mode == "sgd-ttt":
        return score_sgd(model, session, sgd_options(settings))
    if settings.mode == "legacy_pre_eval":
        return score_pre_eval(model, session, sgd_options(settings))
    in_phases = settings.mode == "phased"
    phases = PhaseOptions(settings.phase_docs, settings.phase_count, sgd_options(settings))
    return score_lora(model, session, lora_options(settings), phases if in_phases else PhaseOptions())
