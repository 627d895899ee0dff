"""System B, BESE-288: its data path, its compat fields, and what an audit says of its claim."""

import numpy as np
import pytest

from data.errors import UserError
from eval.modes import LEGACY_TAIL, broken_rules, plan_tail
from eval.ngram import LEGACY_ALIGNMENT
from eval.reference import contest_windows
from eval.sliding import ScoreOptions, plan_windows, score_windows
from formats.recipe import with_values
from train_gpt import check_config, load_validation, score_model

SLIDING = {"eval.mode": "sliding", "eval.stride": 4, "eval.keep_tail": False}


# Compat fields


@pytest.mark.reference("B17")
def test_the_compat_tail_counts_what_system_b_counted(tiny_config, tiny_model, alone):
    """Each target once by default; with the compat field context - stride more, as its loop scored them."""
    cfg = with_values(tiny_config, SLIDING, "test")
    text = load_validation(cfg.data)
    once = score_model(tiny_model, cfg, text, alone)
    again = score_model(tiny_model, with_values(cfg, {"eval.tail_legacy": True}, "test"), text, alone)
    assert (again.num_tokens, once.invalid, again.invalid) == (once.num_tokens + 16 - 4, "", LEGACY_TAIL)
    nats, num_bytes = 0.0, 0
    for start, end, first in contest_windows(once.num_tokens, 16, 4).tolist():
        window = np.array([[start, end, first]])
        found = score_windows(tiny_model, text.tokens, window, ScoreOptions(text.bos_id, 64))
        nats += float(found[start + first : end].double().sum())
        num_bytes += int(text.target_bytes[start + first : end].sum())
    assert again.num_bytes == num_bytes > once.num_bytes
    assert again.val_loss == pytest.approx(nats / again.num_tokens, rel=1e-6) != once.val_loss


@pytest.mark.reference("B17")
def test_the_published_text_has_1984_targets_too_many():
    """74,582,016 targets in windows of 2,048 by 64: ours and the repeated ones are the contest's list."""
    num_targets = 74_582_016
    ours, repeated = plan_windows(num_targets, 2048, 64), plan_tail(num_targets, 2048, 64)
    assert (repeated[:, 1] - repeated[:, 0] - repeated[:, 2]).sum() == 1_984
    assert np.array_equal(np.concatenate([ours, repeated]), contest_windows(num_targets, 2048, 64))


def test_compat_fields_add_up_in_the_label(tiny_config):
    """A score may break several rules; a tilt without hints breaks none; only whole strides repeat."""
    legacy = {"eval.tail_legacy": True, "eval.tilt_legacy": True}
    cfg = with_values(tiny_config, SLIDING | legacy, "test")
    check_config(cfg)
    assert broken_rules(cfg.eval) == LEGACY_TAIL
    hinted = with_values(cfg, {"eval.tilt_static_entries": 9}, "test")
    assert broken_rules(hinted.eval) == f"{LEGACY_ALIGNMENT}; {LEGACY_TAIL}"
    wrong = {"eval.keep_tail": True}, {"eval.mode": "chunked"}, {"eval.stride": 3}, {"eval.stride": 16}
    for values in wrong:
        with pytest.raises(UserError, match=r"eval\.tail_legacy"):
            check_config(with_values(cfg, values, "test"))
