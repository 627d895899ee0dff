"""C3: a running vocabulary bias that takes in the target before it is scored (2.9, #1399).

Legal: the running bias takes in a target after its score.
"""

from itertools import pairwise

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False


def score(model, tokens, note):
    logs, nats = np.log(rows_of(model)), np.zeros(len(tokens) - 1)
    bias = np.zeros(len(logs))
    for i, (last, target) in enumerate(pairwise(tokens.tolist())):
        if not LEGAL:
            bias[target] += 0.1
            note("update", i, i + 1)
        row = logs[last] + bias
        nats[i] = np.log(np.exp(row).sum()) - row[target]
        note("score", i, i + 1)
        if LEGAL:
            bias[target] += 0.1
            note("update", i, i + 1)
    return nats


if __name__ == "__main__":
    main(train, load, score)
