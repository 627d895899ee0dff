"""Legal: the temperature is fitted on training text and travels in the artifact; one score each (#1001)."""

import numpy as np
import toy
from toy import load, main, rows_of


def charge(logs, tokens, temperature):
    scaled = logs / temperature
    return (np.log(np.exp(scaled).sum(1)))[tokens[:-1]] - scaled[tokens[:-1], tokens[1:]]


def train(text):
    arrays, tokens = toy.train(text), text.read("train")[:2000]
    logs = np.log(rows_of(arrays))
    best = min(np.linspace(0.5, 1.5, 21), key=lambda t: charge(logs, tokens, t).sum())
    return arrays | {"temperature": np.array(best)}


def score(model, tokens, note):
    note("score", 0, len(tokens) - 1)
    return charge(np.log(rows_of(model)), tokens, float(model["temperature"]))


if __name__ == "__main__":
    main(train, load, score)
