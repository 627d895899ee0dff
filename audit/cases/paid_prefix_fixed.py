"""Legal: a piece of training text in the artifact, paid for in bytes, as a table of what follows what."""

import numpy as np
import toy
from toy import count_pairs, load, main


def train(text):
    return toy.train(text) | {"excerpt": text.read("train")[:200]}


def score(model, tokens, note):
    counts = model["counts"] + count_pairs(model["excerpt"], len(model["counts"]))
    note("score", 0, len(tokens) - 1)
    return -np.log((counts / counts.sum(1, keepdims=True))[tokens[:-1], tokens[1:]])


if __name__ == "__main__":
    main(train, load, score)
