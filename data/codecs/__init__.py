"""Text codecs: the only owner of text -> token ids -> original bytes.

A codec has: kind, path, vocab_size, bos_id, lossless, digest (sha256 of its file or files), encode(text)
-> ids, encode_batch(texts) -> list of ids, decode(ids) -> bytes, token_bytes(ids) -> original bytes of
each; loses: what it drops of a text that the contest's own tokenizers keep, so that its scores compare with
no other, "" for nothing; and needs_sidecar: CaseOps over a model that normalises has encode_with_bytes(text)
-> ids and the exact bytes of each, which lie beside the shards because the ids alone do not tell them.
"""

from pathlib import Path

from common import UserError, read_json
from data.codecs.bese import BESE_TYPE, BeseCodec
from data.codecs.bytelevel import ByteLevelCodec
from data.codecs.caseops import CASE_OPERATORS, CaseOpsCodec
from data.codecs.pieces import PieceCodec
from data.codecs.ranks import RanksCodec
from data.codecs.raw import BYTES_TYPE, BytesCodec
from data.codecs.spm import SentencePieceCodec

TokenCodec = SentencePieceCodec | PieceCodec


def load_codec(path: str | Path, vocab_size: int | None = None, kind: str = "") -> TokenCodec:
    """Load the tokenizer file at `path`, or in the folder; raise when size or kind is not the expected one.

    A program that always names the same kind needs no other codec.
    """
    path = min(Path(path).glob("tokenizer.*"), default=Path(path))  # of a folder, the file in it
    if not path.is_file():
        raise UserError(
            f"{path}: no such tokenizer file. `make run` makes the built-in corpus and trains on it; "
            f"`make data VOCAB={vocab_size or 1024}` makes that corpus with a tokenizer of as many entries, "
            "`python -m data.tokenizer train` makes one from your text, `python -m data.download --variant "
            "sp1024` fetches the contest's. TOKENIZER_PATH or data.tokenizer_path names another file, or a "
            "folder with tokenizer.model or tokenizer.json."
        )
    try:
        found = find_kind(path, kind)
        if kind and found != kind:
            raise UserError(
                f"{path}: expected a tokenizer of kind {kind}, found {found}. Choose another file, or name "
                "its kind by data.tokenizer_kind."
            )
        codec = open_codec(path, kind or found)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: expected a tokenizer, found a damaged file ({error!r}).") from error
    if vocab_size is not None and codec.vocab_size != vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {codec.vocab_size} entries, the model's vocabulary has {vocab_size}. "
            f"Set VOCAB_SIZE={codec.vocab_size} or choose the tokenizer of the shards."
        )
    return codec


def find_kind(path: Path, expected: str = "") -> str:
    """Tell the kind of a tokenizer by the file's suffix and content; the suffix alone rules out a .model."""
    if path.suffix == ".model":
        return "caseops" if SentencePieceCodec(path).has_pieces(CASE_OPERATORS) else "sentencepiece"
    if expected in ("sentencepiece", "caseops"):
        return f"a {path.suffix} file"
    if path.suffix == ".tiktoken":
        return "tiktoken"
    if path.suffix != ".json":
        raise UserError(
            f"{path}: expected a SentencePiece .model, vocab.json with merges.txt, tokenizer.json, a "
            f".tiktoken file, or a BESE or byte .json, found suffix {path.suffix!r}."
        )
    content = read_json(path)
    stated = content.get("tokenizer_type") if isinstance(content, dict) else None
    if stated == BESE_TYPE:
        return "bese"
    return "bytes" if stated == BYTES_TYPE else "bytelevel"


def open_codec(path: Path, kind: str) -> TokenCodec:
    """Open a file of a known kind; branches, not a table, so that the packer can leave codecs out."""
    if kind == "bytes":
        return BytesCodec(path)
    if kind == "bytelevel":
        return ByteLevelCodec(path)
    if kind == "tiktoken":
        return RanksCodec(path)
    if kind == "bese":
        return BeseCodec(path)
    if kind == "caseops":
        return CaseOpsCodec(path)
    return SentencePieceCodec(path)
