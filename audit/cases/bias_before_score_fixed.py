"""Legal: the running bias takes in a target after its score."""

from itertools import pairwise

import numpy as np
from toy import load, main, rows_of, train

LEARNS_FIRST = False


def score(model, tokens, note):
    logs, nats = np.log(rows_of(model)), np.zeros(len(tokens) - 1)
    bias = np.zeros(len(logs))
    for i, (last, target) in enumerate(pairwise(tokens.tolist())):
        if LEARNS_FIRST:
            bias[target] += 0.1
            note("update", i, i + 1)
        row = logs[last] + bias
        nats[i] = np.log(np.exp(row).sum()) - row[target]
        note("score", i, i + 1)
        if not LEARNS_FIRST:
            bias[target] += 0.1
            note("update", i, i + 1)
    return nats


if __name__ == "__main__":
    main(train, load, score)
