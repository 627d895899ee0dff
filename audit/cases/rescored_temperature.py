"""C4: a temperature fitted on all scores, then every target is scored again with it (2.10, #991)."""

import numpy as np
from toy import load, main, rows_of, train


def charge(logs, tokens, temperature):
    scaled = logs / temperature
    return (np.log(np.exp(scaled).sum(1)))[tokens[:-1]] - scaled[tokens[:-1], tokens[1:]]


def score(model, tokens, note):
    logs = np.log(rows_of(model))
    note("score", 0, len(tokens) - 1)
    best = min(np.linspace(0.5, 1.5, 201), key=lambda t: charge(logs, tokens, t).sum())
    note("score", 0, len(tokens) - 1)
    return charge(logs, tokens, best)


if __name__ == "__main__":
    main(train, load, score)
