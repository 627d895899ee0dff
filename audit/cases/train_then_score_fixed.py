"""Legal test-time training: each chunk is scored, then learned, so only later chunks gain (#461, #549)."""

import numpy as np
from toy import count_pairs, load, main, train

CHUNK = 8


def score(model, tokens, note):
    counts, tokens = model["counts"].copy(), tokens.astype(int)
    nats = np.zeros(len(tokens) - 1)
    for lo in range(0, len(nats), CHUNK):
        hi = min(lo + CHUNK, len(nats))
        rows = counts[tokens[lo:hi]]
        nats[lo:hi] = -np.log(rows[np.arange(hi - lo), tokens[lo + 1 : hi + 1]] / rows.sum(1))
        note("score", lo, hi)
        counts += 3 * count_pairs(tokens[lo : hi + 1], len(counts))
        note("update", lo, hi)
    return nats


if __name__ == "__main__":
    main(train, load, score)
