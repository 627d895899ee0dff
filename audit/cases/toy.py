"""The smallest program of the contest's shape: a table of bigram counts, trained, written, reloaded, scored.

The cases beside it replace one part each. What they share with a real train_gpt.py: settings from the
environment under the contest's names, shards, an artifact on disk, the contest's log lines. What they offer
beyond it: `load(path)` and `score(model, tokens, note)` at their top level, the audit's protocol. `score`
returns the nats of tokens[1:] and calls note("score" or "update", lo, hi) as it scores and learns targets.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

ARTIFACT = "final_model.npz"
STEPS = 4


class Text:
    """The data folder."""

    def __init__(self):
        self.folder, tokenizer = Path(os.environ["DATA_PATH"]), os.environ["TOKENIZER_PATH"]
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        self.vocab_size = self.pieces.vocab_size()

    def read(self, split: str) -> np.ndarray:
        files = sorted(self.folder.glob(f"fineweb_{split}_*.bin"))
        return np.concatenate([np.fromfile(file, "<u2")[512:] for file in files]).astype(int)


def count_pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count each token after each token: (V, V) float64."""
    counts = np.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
    return counts.reshape(vocab_size, vocab_size).astype(float)


def train(text: Text) -> dict[str, np.ndarray]:
    """Count the training text in a few steps, with the contest's log lines; returns the artifact's arrays."""
    counts, started = np.full((text.vocab_size, text.vocab_size), 0.1), time.perf_counter()
    for step, part in enumerate(np.array_split(text.read("train"), STEPS), start=1):
        counts += count_pairs(part, text.vocab_size)
        elapsed = 1000 * (time.perf_counter() - started)
        print(f"step:{step}/{STEPS} train_loss:0.0000 train_time:{elapsed:.0f}ms")
    return {"counts": counts}


def load(path: str) -> dict[str, np.ndarray]:
    """Load an artifact."""
    with np.load(path) as arrays:
        return dict(arrays)


def rows_of(model: dict[str, np.ndarray]) -> np.ndarray:
    """Return the probabilities of each token after each token: (V, V)."""
    return model["counts"] / model["counts"].sum(1, keepdims=True)


def score(model: dict[str, np.ndarray], tokens: np.ndarray, note: Callable) -> np.ndarray:
    """Charge every target by the table."""
    note("score", 0, len(tokens) - 1)
    return -np.log(rows_of(model)[tokens[:-1], tokens[1:]])


def count_bytes(text: Text, tokens: np.ndarray) -> int:
    """Count the bytes of the targets: a space is counted unless a document starts before it."""
    names = [text.pieces.id_to_piece(i) for i in range(text.vocab_size)]
    special = np.array([text.pieces.is_control(i) or text.pieces.is_unknown(i) for i in range(len(names))])
    size = np.where(special, 0, [len(name.lstrip("\u2581").encode()) for name in names])
    space = np.array([name.startswith("\u2581") for name in names])
    return int(size[tokens[1:]].sum() + (space[tokens[1:]] & ~special[tokens[:-1]]).sum())


def main(train: Callable, load: Callable, score: Callable, count_bytes: Callable = count_bytes) -> None:
    """Train, write the artifact, reload it, score, print."""
    text = Text()
    np.savez(ARTIFACT, **train(text))
    tokens = text.read("val")
    nats = score(load(ARTIFACT), tokens, lambda kind, lo, hi: None)
    loss = float(np.sum(nats)) / len(nats)
    bpb = loss * len(nats) / math.log(2) / count_bytes(text, tokens)
    print(f"final_toy_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


if __name__ == "__main__":
    main(train, load, score)
