"""Legal: how far the text has come is known."""

import numpy as np
from toy import load, main, rows_of, train


def score(model, tokens, note):
    rows = rows_of(model)[tokens[:-1]] ** (1 + 1 / (20 + np.arange(len(tokens) - 1)[:, None]))
    note("score", 0, len(rows))
    return -np.log((rows / rows.sum(1, keepdims=True))[np.arange(len(rows)), tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
