"""Legal: the clock runs from the first step to the last."""

import time

import toy
from toy import STEPS, load, main, score


def train(text):
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        time.sleep(0.05)
        elapsed = time.perf_counter() - started
        print(f"step:{step}/{STEPS} train_loss:0.0000 train_time:{1000 * elapsed:.0f}ms")
    return {"counts": 0.1 + toy.count_pairs(text.read("train"), text.vocab_size)}


if __name__ == "__main__":
    main(train, load, score)
