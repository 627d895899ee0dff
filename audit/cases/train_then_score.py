"""C3: adapt on all validation tokens, then score them (2.3, #152 #672): the same as training on them."""

import numpy as np
from toy import count_pairs, load, main, train


def score(model, tokens, note):
    counts = model["counts"] + 3 * count_pairs(tokens.astype(int), len(model["counts"]))
    note("update", 0, len(tokens) - 1)
    note("score", 0, len(tokens) - 1)
    return -np.log((counts / counts.sum(1, keepdims=True))[tokens[:-1], tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
