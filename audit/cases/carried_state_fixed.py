"""Legal: what is scored comes from the bytes on disk, coarse as they are."""

import numpy as np
import toy
from toy import load, main, score


def train(text):
    return {"counts": np.round(toy.train(text)["counts"] / 64) * 64 + 1}


if __name__ == "__main__":
    main(train, load, score)
