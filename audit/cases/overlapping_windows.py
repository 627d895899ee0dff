"""C4: windows overlap and a target keeps the better of its two scores (2.25).

Legal: windows overlap in what they read; a target is scored in the window where it is newest.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
WINDOW, STRIDE = 16, 8


def score(model, tokens, note):
    rows, nats, done = rows_of(model), np.full(len(tokens) - 1, np.inf), 0
    for lo in range(0, len(nats), STRIDE):
        hi = min(lo + WINDOW, len(nats))
        part = rows[tokens[lo:hi]]
        mean = part.cumsum(0) / np.arange(1, hi - lo + 1)[:, None]
        p = (0.5 * part + 0.5 * mean)[np.arange(hi - lo), tokens[lo + 1 : hi + 1]]
        first = done if LEGAL else lo
        nats[first:hi] = np.minimum(nats[first:hi], -np.log(p[first - lo :]))
        if first < hi:
            note("score", first, hi)
        done = hi
    return nats


if __name__ == "__main__":
    main(train, load, score)
