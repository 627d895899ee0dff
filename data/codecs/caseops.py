"""CaseOps: capitals as operators before lower-case words, over any SentencePiece model.

The transform is a bijection of texts. ASCII words are rewritten, with T, A, N, E the operators below:
Word -> T word, WORD -> A word, X -> T x, iPhoneX -> i N phone N x; an operator that the text itself holds
gets E before it (openai/parameter-golf pull request 1729). A model that holds CASE_BEFORE_SPACE wants T and
A before the space of their word, so that its pieces of space and word serve capitals too: " X" -> T " x".
"""

import re
from pathlib import Path

import numpy as np

from common import UserError
from data.codecs.pieces import gives_back
from data.codecs.spm import SentencePieceCodec

TITLE, ALL_CAPS, CAP_NEXT, CASE_ESCAPE = CASE_OPERATORS = "\ue001\ue002\ue003\ue004"
CASE_BEFORE_SPACE = "\ue000"  # an ordinary piece, whose presence says where operators stand
WORD_OR_OPERATOR = re.compile(f"[A-Za-z]+|[{CASE_OPERATORS}]")
SPACED_WORD = re.compile(f" ?[A-Za-z]+|[{CASE_OPERATORS}]")
CAPITAL_INSIDE = re.compile("[A-Z]")
OPERATED = re.compile(
    b"%b(\xee\x80[\x81-\x84])|%b( ?[a-z])|%b( ?[a-z]+)|%b([a-z])|\xee\x80[\x81-\x84]"
    % tuple(operator.encode() for operator in (CASE_ESCAPE, TITLE, ALL_CAPS, CAP_NEXT))
)


def lower_word(match: re.Match) -> str:
    """Write one word, or one operator of the text, with operators before it and its space."""
    if match[0].islower():
        return match[0]
    if match[0] in CASE_OPERATORS:
        return CASE_ESCAPE + match[0]
    word = match[0].lstrip(" ")
    space = match[0][: -len(word)]
    if word.isupper() and len(word) > 1:
        return ALL_CAPS + space + word.lower()
    first, rest = word[0], word[1:]
    start = TITLE + space + first.lower() if first.isupper() else space + first
    return start + CAPITAL_INSIDE.sub(lambda capital: CAP_NEXT + capital[0].lower(), rest)


def to_case_operators(text: str, before_space: bool = False) -> str:
    """Transform a text; `from_case_operators` gives it back."""
    return (SPACED_WORD if before_space else WORD_OR_OPERATOR).sub(lower_word, text)


def restore_case(match: re.Match) -> bytes:
    """Undo one operator; one that precedes nothing it could act on is dropped."""
    literal, title, word, letter = match.groups(b"")
    return literal or title.upper() or word.upper() or letter.upper()


def from_case_operators(text: bytes) -> bytes:
    """Undo the transform, on UTF-8 bytes."""
    return OPERATED.sub(restore_case, text)


def utf8_sizes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the code point of each character and the bytes that UTF-8 takes for it: (N,) int64 each."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    return points, 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)


def original_bytes(transformed: str) -> np.ndarray:
    """Count the original bytes before each character, and in all, of a transformed text: (N + 1,) int64."""
    points, sizes = utf8_sizes(transformed)
    is_operator = (points >= ord(TITLE)) & (points <= ord(CASE_ESCAPE))
    sizes[is_operator & ~follows_escape(points == ord(CASE_ESCAPE))] = 0
    return np.concatenate([[0], np.cumsum(sizes)])


def follows_escape(is_escape: np.ndarray) -> np.ndarray:
    """Tell which of (N,) entries an acting escape precedes: those after an odd run of escapes."""
    places = np.arange(is_escape.size)
    last_other = np.maximum.accumulate(np.where(is_escape, -1, places))
    run = places - last_other  # escapes that end here
    return np.concatenate([[False], run[:-1] % 2 == 1]) if places.size else is_escape


class CaseOpsCodec(SentencePieceCodec):
    """A SentencePiece model that holds the four operators as pieces of their own."""

    kind = "caseops"

    def __init__(self, path: str | Path):
        super().__init__(path)
        if len(self._byte_ids) < 256:
            raise UserError(
                f"{path}: expected byte fallback, found none: CaseOps could not count unknown bytes."
            )
        self._before_space = self.has_pieces(CASE_BEFORE_SPACE)
        self._operators = [self._sp.piece_to_id(operator) for operator in CASE_OPERATORS]
        pieces = [self._sp.id_to_piece(token) for token in range(self.vocab_size)]
        self._surface_bytes = np.array([len(piece.encode()) for piece in pieces])  # of normalised text
        self._surface_bytes[list(self._byte_ids)] = 1
        # What the model does to transformed text may differ from what it does to its own probes.
        self.lossless = self.lossless and gives_back(self)
        self.needs_sidecar = not self.lossless

    def transform(self, text: str) -> str:
        """Write a text as the model reads it."""
        return to_case_operators(text, self._before_space)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Transform and encode documents in parallel threads; each gives (N,) int32 ids, without BOS."""
        return super().encode_batch([self.transform(text) for text in texts], num_threads)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode one document to (N,) int32 ids and the original bytes of each, (N,) int32: the sidecar.

        Exact also where the model normalises: what it drops or joins counts at the token that covers it.
        """
        transformed = self.transform(text)
        ids = super().encode_batch([transformed])[0]
        before = original_bytes(transformed)
        if self.lossless or not ids.size:
            return ids, self.token_bytes(ids)
        normalised, places = self._sp.normalize(transformed, with_offsets=True)
        char_of_byte = np.repeat(np.arange(len(normalised)), utf8_sizes(normalised)[1])
        ends = np.cumsum(self._surface_bytes[ids])[:-1]
        bounds = before[np.array(places)[char_of_byte[ends]]]
        return ids, np.diff(bounds, prepend=0, append=before[-1]).astype(np.int32)

    def decode(self, ids) -> bytes:
        """Decode ids to text bytes with capitals: the original ones exactly if the model is lossless."""
        return from_case_operators(super().decode(ids))

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Count the UTF-8 bytes that each of (N,) consecutive ids stands for; an operator counts none.

        Where the model normalises this is the contest's rule, and `encode_with_bytes` the exact count.
        """
        ids = np.asarray(ids, dtype=None if len(ids) else np.int32)
        acts = np.isin(ids, self._operators) & ~follows_escape(ids == self._operators[-1])
        return np.where(acts, 0, super().token_bytes(ids)).astype(np.int32)
