"""C1, C2: the better of two experts, which only the outcome tells (2.18, #659 #1795).

Legal: the gate between two experts reads how sure they are, not what came.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False


def score(model, tokens, note):
    rows = rows_of(model)
    often = model["counts"].sum(0) / model["counts"].sum()
    is_sure = rows.max(1, keepdims=True) > often.max()
    mixed = np.where(is_sure, rows, 0.5 * rows + 0.5 * often) if LEGAL else np.maximum(rows, often)
    note("score", 0, len(tokens) - 1)
    return -np.log(mixed[tokens[:-1], tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
