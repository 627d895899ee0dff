"""Legal: windows overlap in what they read; a target is scored in the window where it is newest."""

import numpy as np
from toy import load, main, rows_of, train

WINDOW, STRIDE = 16, 8


def score(model, tokens, note):
    rows, nats, done = rows_of(model), np.zeros(len(tokens) - 1), 0
    while done < len(nats):
        hi = min(done + (STRIDE if done else WINDOW), len(nats))
        lo = max(0, done - (WINDOW - STRIDE)) if done else 0
        part = rows[tokens[lo:hi]]
        mean = part.cumsum(0) / np.arange(1, hi - lo + 1)[:, None]
        p = (0.5 * part + 0.5 * mean)[np.arange(hi - lo), tokens[lo + 1 : hi + 1]]
        nats[done:hi] = -np.log(p)[done - lo :]
        note("score", done, hi)
        done = hi
    return nats


if __name__ == "__main__":
    main(train, load, score)
