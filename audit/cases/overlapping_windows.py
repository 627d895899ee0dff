"""C4: windows overlap and a target keeps the better of its two scores (2.25)."""

import numpy as np
from toy import load, main, rows_of, train

WINDOW, STRIDE = 16, 8


def score(model, tokens, note):
    rows, nats = rows_of(model), np.full(len(tokens) - 1, np.inf)
    for lo in range(0, len(nats), STRIDE):
        hi = min(lo + WINDOW, len(nats))
        part = rows[tokens[lo:hi]]
        mean = part.cumsum(0) / np.arange(1, hi - lo + 1)[:, None]
        p = 0.5 * part + 0.5 * mean
        nats[lo:hi] = np.minimum(nats[lo:hi], -np.log(p[np.arange(hi - lo), tokens[lo + 1 : hi + 1]]))
        note("score", lo, hi)
    return nats


if __name__ == "__main__":
    main(train, load, score)
