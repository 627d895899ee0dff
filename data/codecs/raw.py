"""Raw bytes: one token a byte, after a few special ids (the contest's byte260)."""

from pathlib import Path

import numpy as np

from common import UserError, read_json
from data.codecs.pieces import PieceCodec

BYTES_TYPE = "pure_byte"
BYTES_FILE = {  # the contest's own file, value for value
    "tokenizer_type": BYTES_TYPE,
    "config": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256},
    "vocab_size": 260,
}


class BytesCodec(PieceCodec):
    """Ids `byte_offset` to `byte_offset` + 255 are the bytes; ids below are special and count none."""

    kind = "bytes"

    def __init__(self, path: str | Path):
        content = read_json(path)
        match content.get("config"):
            case {"byte_offset": int(offset), "bos_id": int(bos_id), "byte_count": 256}:
                self._offset = offset
            case _:
                self._offset = bos_id = -1
        if not 0 <= bos_id < self._offset or content.get("vocab_size") != self._offset + 256:
            raise UserError(
                f"{path}: expected a BOS id below byte_offset, byte_count 256 and vocab_size byte_offset "
                f"+ 256, found {content.get('config')} and {content.get('vocab_size')}. "
                "`python -m data.tokenizer train --kind bytes` writes such a file."
            )
        pieces = [b""] * self._offset + [bytes([value]) for value in range(256)]
        super().__init__(path, pieces, bos_id)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]:
        """Shift the bytes of each text; num_threads is not needed."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._offset for text in texts]
