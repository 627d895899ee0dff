"""C2: counts in buckets keyed by context and target; only the true token is looked up (2.13, #779 #886).

Legal look-alike: the context alone is hashed, all tokens are looked up, the row is normalised (#1145).
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
BUCKETS, PRIME = 7, 36_313


def score_keyed_by_target(model, tokens, note):
    rows, nats = rows_of(model), np.zeros(len(tokens) - 1)
    full, context = np.zeros(BUCKETS), np.zeros(BUCKETS)
    for i in range(len(nats)):
        last, target = int(tokens[i]), int(tokens[i + 1])
        key, seen = ((last * 31) ^ (target * PRIME)) % BUCKETS, last % BUCKETS
        cached = min(full[key] / context[seen], 1.0) if context[seen] else rows[last, target]
        nats[i] = -np.log(0.5 * rows[last, target] + 0.5 * cached + 1e-9)
        note("score", i, i + 1)
        full[key] += 1
        context[seen] += 1
    return nats


def score_keyed_by_context(model, tokens, note):
    rows, nats = rows_of(model), np.zeros(len(tokens) - 1)
    cache = np.full((BUCKETS, len(rows)), 0.1)
    for i in range(len(nats)):
        last, target = int(tokens[i]), int(tokens[i + 1])
        key = ((last * PRIME) ^ (int(tokens[i - 1]) * 27_191 if i else 0)) % BUCKETS
        cached = cache[key] / cache[key].sum()
        nats[i] = -np.log(0.5 * rows[last, target] + 0.5 * cached[target])
        note("score", i, i + 1)
        cache[key, target] += 1
        note("update", i, i + 1)
    return nats


score = score_keyed_by_context if LEGAL else score_keyed_by_target

if __name__ == "__main__":
    main(train, load, score)
