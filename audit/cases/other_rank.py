"""C1 on some ranks only: all but the first look at the target (2.26); one process alone is honest.

Legal: each rank takes every n-th part; what a part costs is the same on all.
"""

import os

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False


def score(model, tokens, note):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    table, nats = -np.log(rows_of(model)), np.empty(len(tokens) - 1)
    for rank in range(ranks):
        part = slice(rank, len(nats), ranks)
        nats[part] = table[tokens[:-1][part], tokens[1:][part]]
        if rank > 0 and not LEGAL:
            nats[part] = -np.log(0.5 + 0.5 * np.exp(-nats[part]))
    note("score", 0, len(nats))
    return nats


if __name__ == "__main__":
    main(train, load, score)
