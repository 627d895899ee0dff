"""Error messages end with their first sentence: what is wrong; the advice behind it stays in the source."""

import ast
import re

from pack.names import walk

SENTENCE_END = re.compile(r"\.(?=\s)")


def shorten_errors(tree: ast.Module) -> None:
    """Cut what `raise` is given behind the first sentence of its message."""
    for node in walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(args=[ast.Constant(value=str(text)) as message, *_])):
                message.value = _first_sentence(text)
            case ast.Raise(exc=ast.Call(args=[ast.JoinedStr() as message, *_])):
                _shorten_parts(message)


def _first_sentence(text: str) -> str:
    found = SENTENCE_END.search(text)
    return text[: found.end()] if found else text


def _shorten_parts(message: ast.JoinedStr) -> None:
    """Cut a formatted text; what the parts behind the sentence would show goes, too."""
    for i, part in enumerate(message.values):
        if isinstance(part, ast.Constant) and _first_sentence(part.value) != part.value:
            part.value = _first_sentence(part.value)
            del message.values[i + 1 :]
            return
