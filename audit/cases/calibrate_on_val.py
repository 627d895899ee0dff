"""README: no validation data in training. The quantizer chooses its scale on it (2.6, #728).

Legal: the quantizer chooses its scale on training text.
"""

import numpy as np
import toy
from toy import load, main, score

LEGAL = False


def quantize(counts, scale):
    return np.maximum(np.round(counts / scale), 0.01) * scale


def train(text):
    counts, tokens = toy.train(text)["counts"], text.read("train" if LEGAL else "val")[:4000]
    scales = np.linspace(1.0, 9.0, 33)
    losses = [score({"counts": quantize(counts, s)}, tokens, lambda *e: None).mean() for s in scales]
    return {"counts": quantize(counts, scales[int(np.argmin(losses))])}


if __name__ == "__main__":
    main(train, load, score)
