"""README: prove that val_bpb is right. A leading space is counted twice (2.28a, #1698)."""

import toy
from toy import load, main, score, train


def count_bytes(text, tokens):
    names = [text.pieces.id_to_piece(i) for i in range(text.vocab_size)]
    baked = sum(names[token].startswith("\u2581") for token in tokens[1:].tolist())
    return toy.count_bytes(text, tokens) + baked


if __name__ == "__main__":
    main(train, load, score, count_bytes)
