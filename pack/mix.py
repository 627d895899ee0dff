"""Context mixing: compress program text with a decoder small enough to travel inside the program.

    payload = encode(text)
    decode(payload, len(text)) == text

A character is seven binary decisions. For each decision every context (the last characters, the word so far,
the open bracket, the shape of the last tokens, what followed the longest repeat) has its own probability; a
logistic mixture weighs them, learns from its error, and an arithmetic coder spends -log2(p) bits
(Mahoney, "Adaptive weighing of context models for lossless data compression", 2005). What ships is the text
of `contexts`, `rebuild` and `decode` themselves, so encoder and decoder cannot drift apart. They use integers
and the floats' + - * / alone, which give the same bits on every machine and Python.

Decoding is what every rank waits for before it starts. A table a context is a quarter faster than one for
all, and a chance that is a level, whose logit and successors are looked up, another; of two bits in five the
chance was right by 0.01, and they teach nothing (dev/LOG.md).

The payload's digits have base 253 and are characters that a string literal of a latin-1 source holds
unescaped: all but NUL, CR and the backslash.
"""

import ast
import inspect
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256

from common import UserError

BASE = 253  # digits of a payload
MAX_LENGTH = 1 << 18  # characters; decoding takes 0.03 ms each
DECODER_NAME = "D"  # what `decode` is called where it ships
# Decoders that programs packed before today's ship, by the sha256 of their text.
FORMER_DECODERS = {
    "d4da40d9b82edc44764f69314ca361eb9e1253f13cd3c2d764414aee2663e3d8",  # to 2026-11-27
    "71053fe09ec2313e783a537b58547f9a69267294f808ac3e283c4c968bf286b9",  # to 2026-11-28
}


def contexts():
    """Yield the contexts of the next character; receive it."""
    text = word = shape = guess = quote = ""
    brackets = [""]  # open ones, each with the word before it
    places = {}  # last 5 characters -> where they stood last
    match = run = 0
    while True:
        near = brackets[-1]
        character = yield [
            "",
            text[-3:],
            text[-4:-1],
            word,
            word + quote + text[-1:],
            shape[-5:] + text[-1:],
            quote + text[-1:] + near[-1:] + chr(len(brackets)),
            near + shape[-2:] + word,
            guess + chr(min(run, 15)),
            text[-2:] + guess + chr(run > 5),
        ]
        text += character
        if ("a" + character).isidentifier():
            word += character
            shape = shape.rstrip("a") + "a"
        else:
            if character in "([{":
                brackets += [word + character]
            elif character in ")]}":
                brackets = brackets[:-1] or [""]
            if character in "'\"" and quote in ("", character):
                quote = character[len(quote) :]
            word = ""
            shape = shape[-4:] + character
        run = run + 1 if guess == character else 0
        match += 1
        if run == 0:
            match = places.get(text[-5:], 0)
            run = match > 0
        places[text[-5:]] = len(text)
        guess = text[match] if run else ""


def rebuild(length, answer):
    """Rebuild a text of `length` characters; `answer(p)` is its next bit, whose chance to be 1 is p."""
    squash = []  # logit in hundredths, + 1214 -> chance
    odds = 5.65e-6
    while odds < 177e3:
        squash += [odds / (1 + odds)]
        odds *= 1.01
    stretch = []  # level, a chance in 4000ths -> logit
    moves = [], []  # bit that came -> level -> level
    place = 0
    for level in range(4000):
        while squash[place] * 4000 < level + 0.5:
            place += 1
        stretch += [place / 100 - 12.14]
        moves[0].append(level * 3 // 4)
        moves[1].append(level * 3 // 4 + 1000)
    stretch += [0]  # 4000: nothing came yet
    moves[0].append(100)
    moves[1].append(3900)
    tables = [{} for place in range(10)]  # context -> bits of the character so far -> level
    weights = [[0.09] * 11 for place in range(256)]
    text = ""
    reader = contexts()
    texts = next(reader)
    while len(text) < length:
        rows = [table.setdefault(context, {}) for table, context in zip(tables, texts)]
        node = 1
        while node < 128:
            found = [row.get(node, 4000) for row in rows]
            inputs = [stretch[level] for level in found] + [0.3]
            ones = weights[node]
            twos = weights[128 + ord(text[-1:] or "\0")]
            total = 0
            for value, one, two in zip(inputs, ones, twos):
                total += value * (one + two)
            chance = squash[max(0, min(2428, int(total * 100 + 1214)))]
            bit = answer(chance)
            if abs(bit - chance) > 0.01:
                error = (bit - chance) * (0.001 + 2.5 / (500 + len(text)))
                for order, value in enumerate(inputs):
                    value *= error
                    ones[order] += value
                    twos[order] += value
                move = moves[bit]
                for row, level in zip(rows, found):
                    row[node] = move[level]
            node += node + bit
        text += chr(node - 128)
        texts = reader.send(text[-1])
    return text


def decode(payload, length, model=rebuild):
    """Return the text of `length` characters behind a payload of `encode`: `model` asks for its bits."""
    value, span = 0, 1
    digits = map(ord, payload)

    def answer(chance):
        nonlocal value, span
        while span < 2**32:
            digit = next(digits, 1)
            value = value * 253 + digit - 1 - (digit > 13) - (digit > 92)
            span *= 253
        part = int(span * chance)
        if value < part:
            span = part
            return 1
        value -= part
        span -= part
        return 0

    return model(length, answer)


def encode(text: str, report: Callable[[float], None] = lambda done: None) -> str:
    """Compress ASCII text; `report` hears the fraction done. That the payload decodes is proved, once."""
    if not text.isascii() or len(text) > MAX_LENGTH:
        raise UserError(
            f"mix: expected at most {MAX_LENGTH:,} characters of ASCII, found {len(text):,} or others. "
            "Spell the others as escapes, or compress with brotli."
        )
    digits: list[int] = []  # of the interval's low end, base 253, carries not yet taken
    chances: list[float] = []  # asked for by the model
    span = 1

    def bit_at(place: int) -> int:
        return ord(text[place // 7]) >> 6 - place % 7 & 1

    def answer(chance: float) -> int:
        nonlocal span
        while span < 2**32:
            digits.append(0)
            span *= BASE
        part = int(span * chance)
        bit = bit_at(len(chances))
        chances.append(chance)
        if bit:
            span = part
        else:
            digits[-1] += part
            span -= part
        if len(chances) % 7000 == 0 or len(chances) == 7 * len(text):
            report(len(chances) / 7 / len(text))
        return bit

    def is_spelled(_, read: Callable[[float], int]) -> bool:
        """Play the model's questions again, which depend on the bits alone, and look at the answers."""
        return all(read(chance) == bit_at(place) for place, chance in enumerate(chances))

    rebuild(len(text), answer)
    payload = _spell(digits, span)
    if not decode(payload, len(text), is_spelled):
        raise UserError("mix: expected a payload that decodes to the text, found another. Use --wrap lzma.")
    return payload


def _spell(digits: list[int], span: int) -> str:
    """Spell the number of [low, low + span) that ends in the most zero digits, without those."""
    number, step = 0, 1
    while step * BASE <= span:
        step *= BASE
    for digit in digits:
        number = number * BASE + digit
    number += -number % step
    characters = []
    for _ in digits:
        number, digit = divmod(number, BASE)
        characters.append(chr(digit + 1 + (digit > 11) + (digit > 89)))
    return "".join(reversed(characters)).rstrip(chr(1))


def decoder_text() -> str:
    """Return what ships: the three functions above under short names, without docstrings or spare blanks."""
    tree = ast.parse("\n".join(inspect.getsource(part) for part in (contexts, rebuild, decode)))
    bound: Counter = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                node.body[:1] = node.body[:1] if ast.get_docstring(node) is None else []
                bound[node.name] += 1
            case ast.arg():
                bound[node.arg] += 1
            case ast.Name(ctx=ast.Store()):
                bound[node.id] += 1
    names = dict(zip(bound, string.ascii_letters, strict=False)) | {"decode": DECODER_NAME}
    text = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), ast.unparse(tree))
    return "".join(_squeezed(text.splitlines())).lstrip()


def shipped_decoder(text: str) -> Callable[[str, int], str] | None:
    """Return what a decoder's text does, if we wrote it: today's or a former one. Other texts are not run."""
    if sha256(text.encode()).hexdigest() in FORMER_DECODERS:
        names: dict = {}
        exec(text, names)
        return names[DECODER_NAME]
    return decode if ast.dump(ast.parse(text)) == ast.dump(ast.parse(decoder_text())) else None


def _squeezed(lines: list[str]) -> Iterator[str]:
    """Yield lines of a program without spare blanks, simple statements of one block on one line."""
    before = -1, True
    for line in filter(None, lines):
        body = re.sub(r"\b0\.", ".", re.sub(r" ?([^\w ]+) ?", r"\1", line.strip()))
        here = len(line) - len(line.lstrip()), body.endswith(":")
        is_next = here[0] == before[0] and not here[1] and not before[1]
        yield (";" if is_next else "\n" + "\t" * (here[0] // 4)) + body
        before = here
