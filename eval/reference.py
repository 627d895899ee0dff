"""Slow, obvious scorers in float64, one target at a time: the oracle of the tests."""

import numpy as np
import torch


def visible_start(target: int, num_targets: int, context_len: int, stride: int) -> int:
    """Say at which token the context of a target begins, straight from the definition of the modes."""
    if stride == 0:
        return target // context_len * context_len
    end = context_len
    while end <= target:
        end += stride
    return max(min(end, num_targets) - context_len, 0)


@torch.no_grad()
def score_reference(logits, tokens: np.ndarray, context_len: int, stride: int, bos_id: int) -> np.ndarray:
    """Return the nats of each target, (N,) float64, from one float64 softmax per target."""
    num_targets = len(tokens) - 1
    nats = np.zeros(num_targets)
    for target in range(num_targets):
        start = visible_start(target, num_targets, context_len, stride)
        context = torch.from_numpy(tokens[start : target + 1].astype(np.int64))[None]
        row = logits(context, context == bos_id, 0)[0, -1].double().numpy()
        top = row.max()
        nats[target] = top + np.log(np.exp(row - top).sum()) - row[int(tokens[target + 1])]
    return nats


def contest_windows(num_targets: int, context_len: int, stride: int) -> np.ndarray:
    """List (start, end, first) of the windows that the contest's early scripts scored.

    A window starts at every multiple of stride, also where an earlier one reached the end already: the
    last targets are scored context_len / stride times. Never a score; for counts and comparisons.
    """
    starts = np.arange(0, num_targets, stride)
    lengths = np.minimum(context_len, num_targets - starts)
    first = np.where(starts == 0, 0, np.maximum(lengths - stride, 0))
    return np.stack([starts, starts + lengths, first], axis=1)
