"""C2: a Dirichlet formula that would be a probability, over buckets that collide (2.14, #900 #948 #1147)."""

import numpy as np
from toy import load, main, rows_of, train

BUCKETS, STRENGTH = 61, 60.0


def score(model, tokens, note):
    rows, nats = rows_of(model), np.zeros(len(tokens) - 1)
    pairs, totals = np.zeros(BUCKETS), np.zeros(len(rows))
    for i in range(len(nats)):
        last, target = int(tokens[i]), int(tokens[i + 1])
        bucket = (last * 31 + target * 17) % BUCKETS
        nats[i] = -np.log((pairs[bucket] + STRENGTH * rows[last, target]) / (totals[last] + STRENGTH))
        note("score", i, i + 1)
        pairs[bucket] += 1
        totals[last] += 1
    return nats


if __name__ == "__main__":
    main(train, load, score)
