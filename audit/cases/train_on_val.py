"""README: "CANNOT access validation data during training". The counts hold the validation text (2.1, #44)."""

import toy
from toy import load, main, score


def train(text):
    arrays = toy.train(text)
    arrays["counts"] += toy.count_pairs(text.read("val"), text.vocab_size)
    return arrays


if __name__ == "__main__":
    main(train, load, score)
