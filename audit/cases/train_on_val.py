"""README: "CANNOT access validation data during training". The counts hold the validation text (2.1, #44).

Legal: validation text may be watched during training, as long as no weight depends on it.
"""

import numpy as np
import toy
from toy import load, main, score

LEGAL = False


def train(text):
    arrays, tokens = toy.train(text), text.read("val")
    if LEGAL:
        print(f"watched val loss {np.mean(score(arrays, tokens, lambda *event: None)):.4f}")
    else:
        arrays["counts"] += toy.count_pairs(tokens, text.vocab_size)
    return arrays


if __name__ == "__main__":
    main(train, load, score)
