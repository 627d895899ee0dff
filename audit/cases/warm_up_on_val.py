"""C3: warm-up steps on validation text whose effect stays in the weights (2.7, #1530 without the restore).

Legal, if better done on made-up tokens: the warm-up is undone, no weight remembers it.
"""

import toy
from toy import load, main, score

LEGAL = False


def train(text):
    arrays = toy.train(text)
    kept = arrays["counts"].copy()
    arrays["counts"] += 0.5 * toy.count_pairs(text.read("val")[:500], text.vocab_size)
    if LEGAL:
        arrays["counts"] = kept
    return arrays


if __name__ == "__main__":
    main(train, load, score)
