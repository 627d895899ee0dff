"""Legal: the table is made in training and paid for in the artifact."""

import numpy as np
from toy import count_pairs, load, main, score


def train(text):
    return {"counts": 0.1 + np.round(count_pairs(text.read("train"), text.vocab_size))}


if __name__ == "__main__":
    main(train, load, score)
