"""Text codecs: the only owner of text -> token ids -> original bytes.

A codec has: kind, path, vocab_size, bos_id, lossless, digest (sha256 of its file or files), encode(text)
-> ids, encode_batch(texts) -> list of ids, decode(ids) -> bytes, token_bytes(ids) -> original bytes of
each; by_contest_rule: whether it changes and counts text as the contest's own models; and needs_sidecar:
CaseOps over a model that normalises has encode_with_bytes(text) -> ids and the exact bytes of each, which
lie beside the shards because the ids alone do not tell them. data.changes says what a codec changes.
"""

from pathlib import Path

from common import UserError, read_json, sha256_file
from data.codecs.bese import BESE_TYPE, BeseCodec
from data.codecs.bytelevel import ByteLevelCodec, pair_digest
from data.codecs.caseops import CASE_OPERATORS, CaseOpsCodec
from data.codecs.pieces import PieceCodec
from data.codecs.ranks import RanksCodec, ranks_digest
from data.codecs.raw import BYTES_TYPE, BytesCodec
from data.codecs.spm import SentencePieceCodec

# What may lie beside a tokenizer and state its digest, and where it does: a dataset's, and of tokenizers/.
STATEMENTS = {"manifest.json": ("tokenizer",), "report.json": ("verify", "tokenizer")}

TokenCodec = SentencePieceCodec | PieceCodec


def load_codec(path: str | Path, vocab_size: int | None = None, kind: str = "") -> TokenCodec:
    """Do as read_codec, and refuse another file than a manifest or report beside it states."""
    check_stated(path)
    return read_codec(path, vocab_size, kind)


def check_stated(path: str | Path) -> None:
    """Raise where what lies beside a tokenizer states another sha256 than its file has."""
    file = tokenizer_file(path)
    for name, stated in stated_digests(file).items() if file.is_file() else ():
        found = find_digest(file)
        if found != stated:
            raise UserError(
                f"{file}: expected sha256 {stated}, as {name} beside it states, found {found}: damaged or "
                f"replaced. Copy it again; where it is meant to be another, remove {name}."
            )


def tokenizer_file(path: str | Path) -> Path:
    """Return the file itself, of a folder the tokenizer in it."""
    return min(Path(path).glob("tokenizer.*"), default=Path(path))


def stated_digests(file: Path) -> dict[str, str]:
    """Return {file name: sha256} of what lies beside a tokenizer file and states its digest."""
    found = {}
    for name, keys in STATEMENTS.items():
        row = read_json(file.with_name(name)) if file.with_name(name).is_file() else None
        for key in keys:
            row = row.get(key) if isinstance(row, dict) else None
        if isinstance(row, dict) and row.get("file") == file.name and "sha256" in row:
            found[name] = str(row["sha256"])
    return found


def find_digest(file: Path) -> str:
    """Compute the digest that a file's codec has, without reading it as a tokenizer."""
    if file.name == "vocab.json":
        return pair_digest(file)
    return ranks_digest(file) if file.suffix == ".tiktoken" else sha256_file(file)


def read_codec(path: str | Path, vocab_size: int | None = None, kind: str = "") -> TokenCodec:
    """Load the tokenizer file at `path`, or in the folder; raise when size or kind is not the expected one.

    A program that always names the same kind needs no other codec.
    """
    path = tokenizer_file(path)
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
