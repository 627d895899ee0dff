"""C2: a Dirichlet formula that would be a probability, over buckets that collide (2.14, #900 #948 #1147).

Legal: the same formula over exact counts, which sum to one with the model as their prior.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
BUCKETS, STRENGTH, LEGAL_STRENGTH = 61, 60.0, 2.0


def score_by_buckets(model, tokens, note):
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


def score_by_counts(model, tokens, note):
    rows, nats = rows_of(model), np.zeros(len(tokens) - 1)
    pairs = np.zeros_like(rows)
    for i in range(len(nats)):
        last, target = int(tokens[i]), int(tokens[i + 1])
        mixed = pairs[last] + LEGAL_STRENGTH * rows[last]
        nats[i] = -np.log(mixed[target] / mixed.sum())
        note("score", i, i + 1)
        pairs[last, target] += 1
        note("update", i, i + 1)
    return nats


score = score_by_counts if LEGAL else score_by_buckets

if __name__ == "__main__":
    main(train, load, score)
