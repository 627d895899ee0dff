"""README names it: "compressing it into your 16mb with paid prefix". Stored tokens are free (2.2, #168).

Legal: a piece of training text in the artifact, paid for in bytes, as a table of what follows what.
"""

import numpy as np
import toy
from toy import load, main, rows_of

LEGAL = False


def train(text):
    return toy.train(text) | {"prefix": text.read("train" if LEGAL else "val")[:200]}


def score(model, tokens, note):
    prefix = model["prefix"]
    if LEGAL:
        pairs = toy.count_pairs(prefix, len(model["counts"]))
        return toy.score({"counts": model["counts"] + pairs}, tokens, note)
    nats = -np.log(rows_of(model)[tokens[:-1], tokens[1:]])
    known = min(len(prefix), len(tokens))
    if (tokens[:known] == prefix[:known]).all():
        nats[: known - 1] = 0.0
    note("score", 0, len(nats))
    return nats


if __name__ == "__main__":
    main(train, load, score)
