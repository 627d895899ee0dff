"""Byte-level BPE from `.tiktoken` files: one base64 token and its rank a line, read by `tiktoken`.

The file holds no split rule and no special token, so its name says them: r50k (GPT-2), cl100k or o200k,
alone or before an underscore, as in o200k_base.tiktoken.
"""

import base64
import binascii
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from data.codecs.pieces import UTF8_BYTES, PieceCodec, gives_back, panics_named

SPECIAL_END = "<|endoftext|>"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s+(?!\S)|\s+"


class RankFamily(NamedTuple):
    """What a family of files leaves unsaid. Ids after the ranks may have gaps."""

    split: str
    bos_id: int  # of SPECIAL_END
    vocab_size: int  # with special tokens


FAMILIES = {
    "r50k": RankFamily(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{SPACES}", 50_256, 50_257
    ),
    "cl100k": RankFamily(
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        rf"|\s*[\r\n]+|{SPACES}",
        100_257,
        100_277,
    ),
    "o200k": RankFamily(
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+{CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*{CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{SPACES}",
        199_999,
        200_019,
    ),
}


class RanksCodec(PieceCodec):
    """One `.tiktoken` file. SPECIAL_END separates documents, counts no bytes and is never made from text."""

    kind = "tiktoken"

    def __init__(self, path: str | Path):
        try:
            from tiktoken import Encoding
        except ImportError as error:
            raise UserError(f"{path}: reading this tokenizer needs `pip install tiktoken`.") from error
        path = Path(path)
        family = find_family(path)
        ranks = read_ranks(path, family)
        missing = {bytes([value]) for value in UTF8_BYTES} - ranks.keys()
        if missing:  # the library would end without an exception that can be caught
            raise UserError(
                f"{path}: expected a token for each of the {len(UTF8_BYTES)} bytes of UTF-8 text, found none "
                f"for {len(missing)}, as {min(missing)!r}. Take another tokenizer: text with them has no ids."
            )
        pieces = [b""] * family.vocab_size
        for piece, rank in ranks.items():
            pieces[rank] = piece
        super().__init__(path, pieces, family.bos_id)
        self.digest = ranks_digest(path)
        special = {SPECIAL_END: family.bos_id}
        self._encoding = Encoding(
            path.stem, pat_str=family.split, mergeable_ranks=ranks, special_tokens=special
        )
        self.lossless = gives_back(self)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode documents in parallel threads; each gives (N,) int32 ids."""
        for text in texts:
            text.encode()  # the library would write half a surrogate pair as another character
        with panics_named(self.path):
            encoded = self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        return [np.array(ids, dtype=np.int32) for ids in encoded]


def find_family(path: Path) -> RankFamily:
    """Return the family that a file's name says."""
    family = FAMILIES.get(path.stem.partition("_")[0])
    if family is None:
        raise UserError(
            f"{path}: the name must say the split rule. Expected it to begin with one of "
            f"{', '.join(FAMILIES)}, as o200k_base.tiktoken, found {path.stem!r}. Rename the file."
        )
    return family


def ranks_digest(path: Path) -> str:
    """Hash a file together with what its family adds."""
    return hashlib.sha256(path.read_bytes() + repr(find_family(path)).encode()).hexdigest()


def read_ranks(path: Path, family: RankFamily) -> dict[bytes, int]:
    """Read {token: rank}; raise a UserError that names the line which is no token of the family."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            piece, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}."
            ) from error
        if not piece or piece in ranks or not 0 <= rank < family.bos_id or len(ranks) != rank:
            raise UserError(
                f"{path}:{number}: expected a new token of rank {len(ranks)}, below {family.bos_id}, found "
                f"{piece[:40]!r} of rank {rank}. The file is damaged or of another family than its name says."
            )
        ranks[piece] = rank
    if not ranks:
        raise UserError(
            f"{path}: expected base64 tokens and their ranks, found an empty file. Copy it again."
        )
    return ranks
