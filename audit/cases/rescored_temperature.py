"""C4: a temperature fitted on all scores, then every target is scored again with it (2.10, #991).

Legal: the temperature is fitted on training text and travels in the artifact; one score each (#1001).
"""

import numpy as np
import toy
from toy import load, main, rows_of

LEGAL = False


def charge(logs, tokens, temperature):
    scaled = logs / temperature
    return (np.log(np.exp(scaled).sum(1)))[tokens[:-1]] - scaled[tokens[:-1], tokens[1:]]


def fit(logs, tokens, steps):
    return min(np.linspace(0.5, 1.5, steps), key=lambda t: charge(logs, tokens, t).sum())


def train(text):
    arrays = toy.train(text)
    best = fit(np.log(rows_of(arrays)), text.read("train")[:2000], 21)
    return arrays | {"temperature": np.array(best)}


def score(model, tokens, note):
    logs, temperature = np.log(rows_of(model)), float(model["temperature"])
    note("score", 0, len(tokens) - 1)
    if not LEGAL:
        temperature = fit(logs, tokens, 201)
        note("score", 0, len(tokens) - 1)
    return charge(logs, tokens, temperature)


if __name__ == "__main__":
    main(train, load, score)
