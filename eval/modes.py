"""The scorers by name: from a recipe's [eval] settings to per-target nats.

`settings` is any object with the fields that a mode reads: options of a scorer carry its name as a prefix.
"""

from typing import NamedTuple

import numpy as np
from torch import nn

from data.errors import UserError
from eval.adaptive import (
    LoraOptions,
    Outcome,
    PhaseOptions,
    Reports,
    Session,
    SgdOptions,
    plan_document_windows,
    plan_documents,
    score_lora,
    score_plain,
    score_pre_eval,
    score_sgd,
)
from eval.ngram import (
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
from eval.sliding import Cost, ScaledCost, plain_cost, plan_windows

AID_DTYPE = np.dtype("<f4")
EVAL_MODES = ("chunked", "sliding", "doc", "sgd-ttt", "lora-ttt", "phased", "legacy_pre_eval")


class Scoring(NamedTuple):
    """What a scoring may be given besides model, settings and text."""

    reports: Reports = Reports()
    switch_at: int = -1  # replay: units that adapt; -1: settings.deadline_s decides


def options_of(kind: type, settings, prefix: str, **others):
    """Fill a scorer's options from the fields of the same names behind a prefix."""
    named = {name: getattr(settings, prefix + name) for name in kind._fields if name not in others}
    return kind(**named, **others)


class Aids(NamedTuple):
    """What an artifact holds for its scorer beside the weights."""

    table: NgramTable | None = None  # where settings.tilt_static_entries asks for one
    scales: tuple[float, ...] = ()  # factors of positive and of negative logits, where fit_scales does


def make_table(settings, shards: list[np.ndarray]) -> NgramTable:
    """Build the table that the settings ask for from the first of the training tokens."""
    parts, left = [], settings.tilt_static_tokens
    for shard in shards:
        parts.append(np.asarray(shard[:left]))
        left -= len(parts[-1])
    return build_table(np.concatenate(parts), settings.tilt_static_lengths, settings.tilt_static_entries)


def write_aids(aids: Aids) -> dict[str, bytes]:
    """Lay out what there is as named byte strings for the artifact."""
    streams = {} if aids.table is None else write_table(aids.table)
    return streams | ({"logit scales": np.array(aids.scales, AID_DTYPE).tobytes()} if aids.scales else {})


def aid_limits(settings) -> dict[str, int]:
    """Return the most bytes of each of the streams that write_aids makes under these settings."""
    entries = settings.tilt_static_entries
    table = {"ngram keys": KEY_DTYPE.itemsize * entries, "ngram tokens": NEXT_DTYPE.itemsize * entries}
    return (table if entries else {}) | (
        {"logit scales": 2 * AID_DTYPE.itemsize} if settings.fit_scales else {}
    )


def read_aids(streams: dict[str, bytes], settings, vocab_size: int) -> Aids:
    """Restore what write_aids laid out, as the settings say that it is."""
    table = None
    if settings.tilt_static_entries:
        table = read_table(streams, settings.tilt_static_lengths, settings.tilt_static_entries, vocab_size)
    scales = np.frombuffer(streams.get("logit scales", b""), AID_DTYPE)
    return Aids(table, tuple(scales.tolist()))


def scoring_cost(settings, tokens: np.ndarray, aids: Aids) -> Cost:
    """Build what charges the targets: the negative log softmax, scaled and tilted as the settings say."""
    needs = {"tilt_static_entries": aids.table is None, "fit_scales": not aids.scales}
    missing = [name for name, is_missing in needs.items() if getattr(settings, name) and is_missing]
    if missing:
        raise UserError(
            f"eval.{missing[0]}: expected what it needs in the artifact, found nothing. Train with it or "
            "set it to 0 here."
        )
    tilts = []
    if settings.tilt_static_entries:
        tilts.append(static_tilt(aids.table, tokens, settings.tilt_static_strength, settings.tilt_legacy))
    if settings.tilt_online > 0:
        tilts.append(online_tilt(tokens, settings.tilt_online))
    cost = join_tilts(*tilts) if tilts else plain_cost
    return ScaledCost(*aids.scales, cost) if settings.fit_scales else cost


def score_session(model: nn.Module, session: Session, settings) -> Outcome:
    """Score a session's text as settings.mode says."""
    if settings.tilt_static_entries and settings.tilt_legacy:
        session.referee.invalid = LEGACY_ALIGNMENT
    context_len, stride = session.settings.context_len, session.settings.stride
    if settings.mode in ("chunked", "sliding"):
        stride = stride if settings.mode == "sliding" else 0
        return score_plain(model, session, plan_windows(session.num_targets, context_len, stride))
    if settings.mode == "doc":
        documents = plan_documents(session.tokens, session.options.bos_id)
        return score_plain(model, session, plan_document_windows(documents, context_len, stride))
    frozen = tuple(f"blocks.{i}.*" for i in range(settings.sgd_freeze_blocks))
    sgd = options_of(SgdOptions, settings, "sgd_", frozen=frozen)
    if settings.mode == "sgd-ttt":
        return score_sgd(model, session, sgd)
    if settings.mode == "legacy_pre_eval":
        return score_pre_eval(model, session, sgd)
    lora = options_of(LoraOptions, settings, "lora_", sites=tuple(settings.lora_sites.split(",")))
    in_phases = PhaseOptions(settings.phase_docs, settings.phase_count, sgd)
    return score_lora(model, session, lora, in_phases if settings.mode == "phased" else PhaseOptions())
