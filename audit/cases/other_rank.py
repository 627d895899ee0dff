"""C1 on some ranks only: all but the first look at the target (2.26); one process alone is honest."""

import os

import numpy as np
from toy import load, main, rows_of, train


def score(model, tokens, note):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chances = rows_of(model)[tokens[:-1], tokens[1:]]
    peeks = np.arange(len(chances)) % ranks > 0
    note("score", 0, len(chances))
    return -np.log(np.where(peeks, 0.5 + 0.5 * chances, chances))


if __name__ == "__main__":
    main(train, load, score)
