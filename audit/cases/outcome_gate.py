"""C1, C2: the better of two experts, which only the outcome tells (2.18, #659 #1795)."""

import numpy as np
from toy import load, main, rows_of, train


def score(model, tokens, note):
    rows = rows_of(model)
    often = model["counts"].sum(0) / model["counts"].sum()
    note("score", 0, len(tokens) - 1)
    return -np.log(np.maximum(rows[tokens[:-1], tokens[1:]], often[tokens[1:]]))


if __name__ == "__main__":
    main(train, load, score)
