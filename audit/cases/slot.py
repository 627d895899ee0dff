"""C1, C3: a bias fitted to the very targets of a window, which are then scored (2.8, #1084 #1229, #1240).

Legal in its causality: the bias of a window is fitted to the windows before it, whose scores are given.
"""

import numpy as np
from toy import load, main, rows_of, train

LEGAL = False
WINDOW = 16


def score(model, tokens, note):
    logs = np.log(rows_of(model))[tokens[:-1]]  # (N, V)
    bias, nats = np.zeros(logs.shape[1]), np.zeros(len(logs))
    for lo in range(0, len(logs), WINDOW):
        rows, targets = logs[lo : lo + WINDOW], tokens[1 + lo : 1 + lo + WINDOW]
        fitted = 2.0 * (np.bincount(targets, minlength=len(bias)) / len(targets) - np.exp(rows).mean(0))
        tilted = rows + (bias if LEGAL else fitted)
        tilted -= np.log(np.exp(tilted).sum(1, keepdims=True))
        nats[lo : lo + WINDOW] = -tilted[np.arange(len(rows)), targets]
        note("score", lo, lo + len(rows))
        bias = fitted
        if LEGAL:
            note("update", lo, lo + len(rows))
    return nats


if __name__ == "__main__":
    main(train, load, score)
