"""Legal look-alike: hints for all targets are computed first, but each from the tokens before it (#2135)."""

from itertools import pairwise

import numpy as np
from toy import load, main, rows_of, train


def sweep(tokens, vocab_size):
    counts, hints = np.zeros((vocab_size, vocab_size)), []
    for last, target in pairwise(tokens.tolist()):
        hints.append(counts[last].argmax() if counts[last].any() else -1)
        counts[last, target] += 1
    return np.array(hints)


def score(model, tokens, note):
    rows, hints = rows_of(model), sweep(tokens, len(model["counts"]))
    note("precompute", 0, len(hints))
    p, says = rows[tokens[:-1], tokens[1:]], hints >= 0
    raised = np.where(says, rows[tokens[:-1], hints], 0.0)  # Z = 1 + p(h) (e^d - 1) with e^d = 2
    note("score", 0, len(hints))
    return -np.log(p * np.where(says & (hints == tokens[1:]), 2.0, 1.0) / (1 + raised))


if __name__ == "__main__":
    main(train, load, score)
