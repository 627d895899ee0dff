"""Text codecs: the only owner of text -> token ids -> original bytes.

A codec has: kind, vocab_size, bos_id, lossless, digest (sha256 of its file), encode(text) -> ids,
encode_batch(texts) -> list of ids, decode(ids) -> bytes, token_bytes(ids) -> original bytes of each.
"""

from pathlib import Path

from data.codecs.spm import SentencePieceCodec
from data.errors import UserError


def load_codec(path: str | Path, vocab_size: int | None = None) -> SentencePieceCodec:
    """Load the tokenizer file at `path`; raise when its size is not the expected `vocab_size`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such tokenizer file. `make data` trains one on the built-in corpus; "
            "TOKENIZER_PATH or data.tokenizer_path names another."
        )
    if path.suffix != ".model":
        raise UserError(f"{path}: expected a SentencePiece .model file, found suffix {path.suffix!r}.")
    codec = SentencePieceCodec(path)
    if vocab_size is not None and codec.vocab_size != vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {codec.vocab_size} entries, the model's vocabulary has {vocab_size}. "
            f"Set VOCAB_SIZE={codec.vocab_size} or choose the tokenizer of the shards."
        )
    return codec
