"""Legal look-alike: the context alone is hashed, all tokens are looked up, the row is normalised (#1145)."""

import numpy as np
from toy import load, main, rows_of, train

BUCKETS, PRIME = 7, 36_313


def score(model, tokens, note):
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


if __name__ == "__main__":
    main(train, load, score)
