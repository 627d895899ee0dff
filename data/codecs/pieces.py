"""What codecs share whose every token stands for the same bytes wherever it occurs."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common import UserError, sha256_file

# Texts that tokenizers change: a codec that gives all of them back loses nothing.
HOSTILE_PROBES = (
    *(
        "",
        "a",
        " a",
        "a  b ",
        "\n\t\r\0",
        "\ufb01 \u212a e\u0301 \U0001f600",
        "\u3000x\u00a0",
        "\u2581 \u2581",
    ),
    *("\r\n\r\n  \t x", "it's 'LL 12345", "<s></s><unk><0x41><|endoftext|>", "\x7f\ufeff\ufffd\u0120\ue001"),
)
UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}  # the bytes that valid UTF-8 holds


def gives_back(codec) -> bool:
    """Tell whether every hostile probe comes back byte for byte."""
    return all(codec.decode(codec.encode(text)) == text.encode() for text in HOSTILE_PROBES)


@contextmanager
def panics_named(path: Path):
    """Turn a panic of a library in Rust, which is no Exception, into a UserError that names the tokenizer."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{path}: the tokenizer's library gave up ({why}). Take another tokenizer, or cut what is very "
            "long in the text, as a million spaces in a row."
        ) from None


class PieceCodec:
    """A table of token bytes. Subclasses load it and write `encode_batch`."""

    kind = ""
    needs_sidecar = by_contest_rule = False

    def __init__(self, path: str | Path, pieces: list[bytes], bos_id: int):
        self.path = Path(path)
        self.digest = sha256_file(path)
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.lossless = True
        self._pieces = pieces
        self._sizes = np.array([len(piece) for piece in pieces], dtype=np.int32)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Encode documents; each gives (N,) int32 ids, without BOS."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Encode one document to (N,) int32 ids, without BOS."""
        return self.encode_batch([text])[0]

    def decode(self, ids) -> bytes:
        """Join the bytes of the tokens."""
        return b"".join([self._pieces[token] for token in np.asarray(ids).tolist()])

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Count the original UTF-8 bytes that each of (N,) ids stands for: (N,) int32."""
        return self._sizes[np.asarray(ids, dtype=None if len(ids) else np.int32)]
