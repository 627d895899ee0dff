"""Legal: bytes of the text itself, token by token, another way to the same sum."""

from toy import load, main, score, train


def count_bytes(text, tokens):
    total, previous = 0, int(tokens[0])
    for token in tokens[1:].tolist():
        name = text.pieces.id_to_piece(token)
        if not text.pieces.is_control(token):
            size = len(name.replace("\u2581", " ").encode())
            total += size - (name.startswith("\u2581") and text.pieces.is_control(previous))
        previous = token
    return total


if __name__ == "__main__":
    main(train, load, score, count_bytes)
