"""README: prove that val_bpb is right. A leading space is counted twice (2.28a, #1698).

Legal: bytes of the text itself, token by token, another way to the same sum.
"""

import toy
from toy import load, main, score, train

LEGAL = False


def count_twice(text, tokens):
    names = [text.pieces.id_to_piece(i) for i in range(text.vocab_size)]
    baked = sum(names[token].startswith("\u2581") for token in tokens[1:].tolist())
    return toy.count_bytes(text, tokens) + baked


def count_once(text, tokens):
    total, previous = 0, int(tokens[0])
    for token in tokens[1:].tolist():
        name = text.pieces.id_to_piece(token)
        if not text.pieces.is_control(token):
            size = len(name.replace("\u2581", " ").encode())
            total += size - (name.startswith("\u2581") and text.pieces.is_control(previous))
        previous = token
    return total


if __name__ == "__main__":
    main(train, load, score, count_once if LEGAL else count_twice)
