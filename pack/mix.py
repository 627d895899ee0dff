"""Context mixing: compress program text with a decoder small enough to travel inside the program.

    payload = encode(text)
    decode(payload, len(text)) == text

A character is seven binary decisions. For each decision every context (the last characters, the word so far,
the open bracket, the shape of the last tokens, what followed the longest repeat) has its own probability; a
logistic mixture weighs them, learns from its error, and an arithmetic coder spends -log2(p) bits
(Mahoney, "Adaptive weighing of context models for lossless data compression", 2005). What ships is the text
of `contexts`, `rebuild` and `decode` themselves, so encoder and decoder cannot drift apart. They use integers
and the floats' + - * / alone, which give the same bits on every machine and Python.

The payload's digits have base 253 and are characters that a string literal of a latin-1 source holds
unescaped: all but NUL, CR and the backslash.
"""

import ast
import inspect
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from zlib import crc32

from common import UserError

BASE = 253  # digits of a payload
MAX_LENGTH = 1 << 18  # characters; decoding takes 0.1 to 0.2 ms each
DECODER_NAME = "D"  # what `decode` is called where it ships


def contexts():
    """Yield (contexts, expected character, length of the repeat) of the next character; receive it."""
    text = word = shape = guess = quote = ""
    brackets = [""]  # open ones, each with the word before it
    places = {}  # last 5 characters -> where they stood last
    match = run = 0
    while True:
        near = brackets[-1]
        character = yield (
            [
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
            ],
            guess,
            run,
        )
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
    stretch = []  # chance in 256ths -> logit
    place = 0
    for chance in range(256):
        while squash[place] * 256 < chance + 0.5:
            place += 1
        stretch += [place / 100 - 12.14]
    chances = {}  # context and bits of the character so far -> chance that the next bit is 1
    weights = [[0.06] * 11 for place in range(300)]
    text = ""
    reader = contexts()
    texts, guess, run = next(reader)
    while len(text) < length:
        bases = [crc32(context.encode()) * 16 + order for order, context in enumerate(texts)]
        node = 1
        while node < 128:
            places = [base * 128 + node for base in bases]
            found = [chances.get(place, 0.5) for place in places]
            inputs = [stretch[int(chance * 256)] for chance in found] + [0.3]
            agrees = ord(guess or "\0") + 128 >> 8 - node.bit_length() == node
            ones = weights[min(run, 15) * agrees]
            twos = weights[16 + node]
            threes = weights[144 + ord(text[-1:] or "\0")]
            total = 0
            for value, one, two, three in zip(inputs, ones, twos, threes):
                total += value * (one + two + three)
            chance = squash[max(0, min(2428, int(total * 100 + 1214)))]
            bit = answer(chance)
            error = (bit - chance) * (0.001 + 2.5 / (500 + len(text)))
            for order, value in enumerate(inputs):
                value *= error
                ones[order] += value
                twos[order] += value
                threes[order] += value
            for place, chance in zip(places, found):
                chances[place] = chance + (bit - chance) * (0.95 if chance == 0.5 else 0.22)
            node += node + bit
        text += chr(node - 128)
        texts, guess, run = reader.send(text[-1])
    return text


def decode(payload, length):
    """Return the text of `length` characters behind a payload of `encode`."""
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

    return rebuild(length, answer)


def encode(text: str, report: Callable[[float], None] = lambda done: None) -> str:
    """Compress ASCII text; `report` hears the fraction done."""
    if not text.isascii() or len(text) > MAX_LENGTH:
        raise UserError(
            f"mix: expected at most {MAX_LENGTH:,} characters of ASCII, found {len(text):,} or others. "
            "Spell the others as escapes, or compress with brotli."
        )
    digits: list[int] = []  # of the interval's low end, base 253, carries not yet taken
    span, count = 1, 0

    def answer(chance: float) -> int:
        nonlocal span, count
        while span < 2**32:
            digits.append(0)
            span *= BASE
        part = int(span * chance)
        bit = ord(text[count // 7]) >> 6 - count % 7 & 1
        count += 1
        if bit:
            span = part
        else:
            digits[-1] += part
            span -= part
        if count % 7000 == 0 or count == 7 * len(text):
            report(count / 7 / len(text))
        return bit

    rebuild(len(text), answer)
    return _spell(digits, span)


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
    return "from zlib import crc32" + "".join(_squeezed(text.splitlines()))


def _squeezed(lines: list[str]) -> Iterator[str]:
    """Yield lines of a program without spare blanks, simple statements of one block on one line."""
    before = -1, True
    for line in filter(None, lines):
        body = re.sub(r"\b0\.", ".", re.sub(r" ?([^\w ]+) ?", r"\1", line.strip()))
        here = len(line) - len(line.lstrip()), body.endswith(":")
        is_next = here[0] == before[0] and not here[1] and not before[1]
        yield (";" if is_next else "\n" + "\t" * (here[0] // 4)) + body
        before = here
