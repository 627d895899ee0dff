"""C2: p^(1/n) for each byte is no distribution over bytes; mixing there gains nothing real (2.17, #1785)."""

import numpy as np
from toy import load, main, rows_of, train

BYTES, SHARE = 3, 0.3  # bytes a token, share of the byte model


def score(model, tokens, note):
    p = rows_of(model)[tokens[:-1], tokens[1:]]
    mixed = (1 - SHARE) * p ** (1 / BYTES) + SHARE * 0.5  # each byte: the spread token and a byte model
    note("score", 0, len(p))
    return -BYTES * np.log(mixed)


if __name__ == "__main__":
    main(train, load, score)
