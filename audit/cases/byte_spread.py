"""C2: p^(1/n) for each byte is no distribution over bytes; mixing there gains nothing real (2.17, #1785).

Legal: two models of tokens are mixed as probabilities of tokens.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
BYTES, SHARE = 3, 0.3  # bytes a token, share of the other model


def score(model, tokens, note):
    rows = rows_of(model)
    note("score", 0, len(tokens) - 1)
    if LEGAL:
        often = model["counts"].sum(0) / model["counts"].sum()
        mixed = (1 - SHARE) * rows + SHARE * often
        return -np.log(mixed[tokens[:-1], tokens[1:]])
    p = rows[tokens[:-1], tokens[1:]]
    mixed = (1 - SHARE) * p ** (1 / BYTES) + SHARE * 0.5  # each byte: the spread token and a byte model
    return -BYTES * np.log(mixed)


if __name__ == "__main__":
    main(train, load, score)
