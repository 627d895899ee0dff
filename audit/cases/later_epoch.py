"""C3, C4: several passes over a chunk, and the score of the last one is reported (2.4, #568).

Legal: several passes over a chunk that has its score already (#549 merged with three).
"""

import numpy as np
from toy import count_pairs, load, main, train

LEGAL = False
CHUNK, EPOCHS = 8, 3


def score(model, tokens, note):
    counts, tokens = model["counts"].copy(), tokens.astype(int)
    nats = np.zeros(len(tokens) - 1)
    for lo in range(0, len(nats), CHUNK):
        hi = min(lo + CHUNK, len(nats))
        for epoch in range(EPOCHS):
            if epoch == 0 or not LEGAL:
                rows = counts[tokens[lo:hi]]
                nats[lo:hi] = -np.log(rows[np.arange(hi - lo), tokens[lo + 1 : hi + 1]] / rows.sum(1))
                note("score", lo, hi)
            counts += count_pairs(tokens[lo : hi + 1], len(counts))
            note("update", lo, hi)
    return nats


if __name__ == "__main__":
    main(train, load, score)
