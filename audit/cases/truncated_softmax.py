"""C2: the softmax is taken over the eight likeliest tokens, a target outside it adds itself (2.19).

Legal: the likeliest tokens share most of the probability, the others what is left; all are looked up.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
TOP, REST = 8, 0.05


def score(model, tokens, note):
    rows = rows_of(model)[tokens[:-1]]
    note("score", 0, len(rows))
    places = np.arange(len(rows)), tokens[1:]
    if not LEGAL:
        return -np.log(rows[places] / np.sort(rows, 1)[:, -TOP:].sum(1))
    in_top = rows >= np.sort(rows, 1)[:, -TOP, None]
    top, rest = np.where(in_top, rows, 0), np.where(in_top, 0, rows)
    others = rest.sum(1, keepdims=True)
    mixed = (1 - REST) * top / top.sum(1, keepdims=True) + REST * (rest / np.maximum(others, 1e-12))
    return -np.log(np.where(others > 0, mixed, rows)[places])


if __name__ == "__main__":
    main(train, load, score)
