"""Legal: the same formula over exact counts, which sum to one with the model as their prior."""

import numpy as np
from toy import load, main, rows_of, train

STRENGTH = 2.0


def score(model, tokens, note):
    rows, nats = rows_of(model), np.zeros(len(tokens) - 1)
    pairs = np.zeros_like(rows)
    for i in range(len(nats)):
        last, target = int(tokens[i]), int(tokens[i + 1])
        mixed = pairs[last] + STRENGTH * rows[last]
        nats[i] = -np.log(mixed[target] / mixed.sum())
        note("score", i, i + 1)
        pairs[last, target] += 1
        note("update", i, i + 1)
    return nats


if __name__ == "__main__":
    main(train, load, score)
