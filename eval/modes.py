"""The scorers by name: from a recipe's [eval] settings to per-target nats.

`settings` is any object with the fields that a mode reads: options of a scorer carry its name as a prefix.
"""

from typing import NamedTuple

import numpy as np
from torch import nn

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
from eval.ngram import online_tilt
from eval.sliding import Cost, plain_cost, plan_windows

EVAL_MODES = ("chunked", "sliding", "doc", "sgd-ttt", "lora-ttt", "phased", "legacy_pre_eval")


class Scoring(NamedTuple):
    """What a scoring may be given besides model, settings and text."""

    reports: Reports = Reports()
    switch_at: int = -1  # replay: units that adapt; -1: settings.deadline_s decides


def options_of(kind: type, settings, prefix: str, **others):
    """Fill a scorer's options from the fields of the same names behind a prefix."""
    named = {name: getattr(settings, prefix + name) for name in kind._fields if name not in others}
    return kind(**named, **others)


def scoring_cost(settings, tokens: np.ndarray) -> Cost:
    """Build what charges the targets: the negative log softmax, tilted where the settings say so."""
    return online_tilt(tokens, settings.tilt_online) if settings.tilt_online > 0 else plain_cost


def score_session(model: nn.Module, session: Session, settings) -> Outcome:
    """Score a session's text as settings.mode says."""
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
