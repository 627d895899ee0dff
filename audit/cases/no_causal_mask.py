"""C1: attention without a mask: a target's row takes in what follows it in its window (2.24).

Legal: the same average over the positions so far.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
WINDOW = 16


def score(model, tokens, note):
    rows = rows_of(model)[tokens[:-1]]
    for lo in range(0, len(rows), WINDOW):
        part = rows[lo : lo + WINDOW]
        so_far = part.cumsum(0) / np.arange(1, len(part) + 1)[:, None]
        rows[lo : lo + WINDOW] = part + (so_far if LEGAL else part.mean(0))
    rows /= rows.sum(1, keepdims=True)
    note("score", 0, len(rows))
    return -np.log(rows[np.arange(len(rows)), tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
