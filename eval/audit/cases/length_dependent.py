"""C1: the length of the text is known only at its end; here it sharpens every score."""

import numpy as np
from toy import load, main, rows_of, train


def score(model, tokens, note):
    rows = rows_of(model) ** (1 + 20 / len(tokens))
    note("score", 0, len(tokens) - 1)
    return -np.log((rows / rows.sum(1, keepdims=True))[tokens[:-1], tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
