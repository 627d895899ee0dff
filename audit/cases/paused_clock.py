"""README: ten minutes. The clock stands still while most of the training is done (2.30).

Legal: the clock runs from the first step to the last.
"""

import time

import toy
from toy import STEPS, load, main, score

LEGAL = False


def train(text):
    elapsed = 0.0
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        time.sleep(0.05 if LEGAL else 0.02)
        elapsed += time.perf_counter() - started
        time.sleep(0 if LEGAL else 0.3)  # the work that no clock sees
        print(f"step:{step}/{STEPS} train_loss:0.0000 train_time:{1000 * elapsed:.0f}ms")
    return {"counts": 0.1 + toy.count_pairs(text.read("train"), text.vocab_size)}


if __name__ == "__main__":
    main(train, load, score)
