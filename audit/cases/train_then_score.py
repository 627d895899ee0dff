"""C3: adapt on all validation tokens, then score them (2.3, #152 #672): the same as training on them.

Legal test-time training: each chunk is scored, then learned, so only later chunks gain (#461, #549).
"""

import numpy as np
from toy import count_pairs, load, main, train

LEGAL = False
CHUNK = 8


def score(model, tokens, note):
    counts, tokens = model["counts"].copy(), tokens.astype(int)
    nats = np.zeros(len(tokens) - 1)
    chunk = CHUNK if LEGAL else len(nats)
    for lo in range(0, len(nats), chunk):
        hi = min(lo + chunk, len(nats))
        if not LEGAL:
            counts += 3 * count_pairs(tokens[lo : hi + 1], len(counts))
            note("update", lo, hi)
        rows = counts[tokens[lo:hi]]
        nats[lo:hi] = -np.log(rows[np.arange(hi - lo), tokens[lo + 1 : hi + 1]] / rows.sum(1))
        note("score", lo, hi)
        if LEGAL:
            counts += 3 * count_pairs(tokens[lo : hi + 1], len(counts))
            note("update", lo, hi)
    return nats


if __name__ == "__main__":
    main(train, load, score)
