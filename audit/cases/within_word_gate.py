"""C1: whether a hint speaks depends on a property of the token that it is about (2.20, #1420 #2118).

Legal: the gate reads the last token, which is known (#1514: only the prefix-only expert is active).
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False


def score(model, tokens, note):
    rows = rows_of(model)
    hints, p = rows.argmax(1), rows[tokens[:-1], tokens[1:]]
    speaks = tokens[1:] % 2 == hints[tokens[:-1]] % 2  # "continues a word", read from the target
    if LEGAL:
        speaks = tokens[:-1] % 2 == 0
    raised = rows.max(1)[tokens[:-1]]
    hit = hints[tokens[:-1]] == tokens[1:]
    note("score", 0, len(p))
    return -np.log(np.where(speaks, p * np.where(hit, 2.0, 1.0) / (1 + raised), p))


if __name__ == "__main__":
    main(train, load, score)
