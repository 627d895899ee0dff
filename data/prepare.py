"""Turn text into token shards with a manifest: `python -m data.prepare --help`.

`write_dataset` is the one writer of datasets; the command below feeds it files, data.builtin feeds it
the built-in corpus. Text passes through in batches, so inputs may be larger than memory.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.codecs import load_codec
from data.errors import UserError, run_command
from data.selection import add_selection_options, selection_of
from data.shards import (
    MANIFEST_NAME,
    REPORT_NAME,
    UNFINISHED_NAME,
    read_manifest,
    sha256_file,
    write_json,
    write_shard,
)

MANIFEST_FORMAT = 1
SHARD_TOKENS = 100_000_000  # the contest's shard length
BATCH_BYTES = 4 << 20  # text encoded at once; the ids of a batch take about twenty times as much memory
READ_BYTES = 1 << 17
ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=27` to `--long=31` files need more than the default window
MIN_VAL_DOCUMENTS = 50
VAL_FRAC = 0.01
DOCS_NAME = "docs_selected.jsonl"  # the contest's text: its first documents are the validation set
DOCS_MANIFEST_NAME = "docs_selected.source_manifest.json"
CONTEST_VAL_DOCS = 50_000
SIDECAR_SPLIT = "val_bytes"  # the contest's name: fineweb_val_bytes_000000.bin
ALL_SHARDS_GLOB = "fineweb_*.bin"


class Document(NamedTuple):
    """One text and where it comes from ("file", "file:line"), for error messages."""

    text: str
    place: str


# ---- Reading ----------------------------------------------------------------------------------------


def read_documents(files: Iterable[str | Path]) -> Iterator[Document]:
    """Yield the documents of .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files in order."""
    for path in map(Path, files):
        found = False
        for document in find_reader(path)(path):
            if not document.text:
                raise UserError(f"{document.place}: expected text, found an empty document. Remove it.")
            found = True
            yield document
        if not found:
            raise UserError(f"{path}: expected documents, found none. Remove the file from the input list.")


def find_reader(path: Path):
    """Choose the reader of a file by its suffix; raise when the file or the suffix is unknown."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            if not path.is_file():
                raise UserError(f"{path}: no such file.")
            return reader
    raise UserError(
        f"{path}: unknown suffix {path.suffix!r}. Expected one of {', '.join(READERS)}; "
        "rename or convert the file."
    )


def check_inputs(files: Iterable[str | Path]) -> None:
    """Raise for the first file that cannot be read at all, before any work starts."""
    for path in files:
        find_reader(Path(path))


def read_txt(path: Path) -> Iterator[Document]:
    """Yield the whole file as one document; nothing for an empty file."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    if text:
        yield Document(text, str(path))


def read_jsonl(path: Path) -> Iterator[Document]:
    """Yield the "text" of each line of JSON; blank lines are no documents."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Document(parse_line(line, place), place)


def parse_line(line: bytes, place: str) -> str:
    """Take the text out of one line of JSON; raise UserErrors that name the place."""
    value = parse_object(line, place)
    if not isinstance(value.get("text"), str):
        raise UserError(
            f'{place}: expected a JSON object with a string under "text", found keys {sorted(value)}.'
        )
    return require_utf8(value["text"], place)


def parse_object(line: bytes, place: str) -> dict:
    """Parse one line of JSON that holds an object."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error}). Expected one JSON object a line.") from error
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f'{place}: expected a JSON object with a string under "text", found {found}.')
    return value


def require_utf8(text: str, place: str) -> str:
    """Return the text; raise where UTF-8 cannot express it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the text holds half of a surrogate pair at character {error.start}, which UTF-8 "
            "cannot express. Repair or remove the line."
        ) from error
    return text


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain, gzip or zstd file."""
    with open(path, "rb") as file:
        if path.suffix == ".zst":
            yield from split_lines(decompress_zstd(file, path))
        elif path.suffix == ".gz":
            try:
                with gzip.open(file) as lines:
                    yield from lines
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: not a whole gzip file ({error}). Copy or make it again.") from error
        else:
            yield from file


def decompress_zstd(file, path: Path) -> Iterator[bytes]:
    """Yield the contents of all frames; raise when the last one is cut off.

    zstandard's stream reader ends silently at a truncated frame, hence the frame objects.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs `pip install zstandard`.") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    try:
        while data := file.read(READ_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: not a zstd file ({error}). Copy or make it again.") from error
    if frame is not None:
        raise UserError(f"{path}: the zstd file is cut off. Copy or make it again.")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a byte stream that comes in chunks."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def read_parquet(path: Path) -> Iterator[Document]:
    """Yield the rows of the column `text`; rows count from 1."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs `pip install pyarrow`.") from error
    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error}). Copy or make it again.") from error
    with table:
        names = table.schema_arrow.names
        if "text" not in names:
            raise UserError(f'{path}: expected a column "text", found {names}.')
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0):
                number += 1
                yield Document(parse_cell(value, f"{path}:{number}"), f"{path}:{number}")


def parse_cell(value, place: str) -> str:
    """Take the text out of one parquet cell; raise UserErrors that name the place."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}). Write the column again as UTF-8.") from error
    if not isinstance(text, str):
        raise UserError(f'{place}: expected a string under "text", found {type(text).__name__}.')
    return text


READERS = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}


# ---- Writing ----------------------------------------------------------------------------------------


class ShardWriter:
    """Cut a stream of ids into shards of equal length; documents may cross from one to the next."""

    def __init__(self, out: Path, split: str, shard_tokens: int, vocab_size: int):
        self.out, self.split, self.shard_tokens, self.vocab_size = out, split, shard_tokens, vocab_size
        self.shards: list[dict] = []
        self.waiting: list[np.ndarray] = []
        self.num_waiting = 0

    def add(self, ids: np.ndarray) -> None:
        """Take (N,) ids; write every shard that they fill."""
        while ids.size:
            part, ids = np.split(ids, [self.shard_tokens - self.num_waiting])
            self.waiting.append(part)
            self.num_waiting += part.size
            if self.num_waiting == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting as the next shard, if anything is."""
        if not self.num_waiting:
            return
        path = self.out / f"fineweb_{self.split}_{len(self.shards):06d}.bin"
        write_shard(path, np.concatenate(self.waiting), self.vocab_size)
        entry = {"file": path.name, "tokens": self.num_waiting, "bytes": path.stat().st_size}
        self.shards.append(entry | {"sha256": sha256_file(path)})
        self.waiting, self.num_waiting = [], 0


class Overlap:
    """Remember the validation documents; refuse the training document that equals one of them."""

    def __init__(self):
        self.val_places: dict[bytes, str] = {}

    def remember(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass validation documents through, keeping a hash of each."""
        for document in documents:
            self.val_places.setdefault(hash_text(document.text), document.place)
            yield document

    def refuse(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass training documents through; raise for the first that is also in validation."""
        for document in documents:
            val_place = self.val_places.get(hash_text(document.text))
            if val_place is not None:
                raise UserError(
                    f"{document.place}: this training document is also in validation, at {val_place}. "
                    "The score would be that of remembered text. Remove one of the two."
                )
            yield document


def hash_text(text: str) -> bytes:
    """Hash a document; 16 bytes of SHA-256 keep collisions out of any corpus."""
    return hashlib.sha256(text.encode()).digest()[:16]


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until a batch holds BATCH_BYTES characters or more."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_with_bos(codec, batch: list[Document], num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode a batch to (N,) ids, BOS before each document, and (N,) the bytes that each stands for."""
    encoded = codec.encode_batch([document.text for document in batch], num_threads=num_threads)
    documents = [np.concatenate([[codec.bos_id], ids]).astype(np.int32) for ids in encoded]
    sizes = [codec.token_bytes(ids) for ids in documents]
    if codec.lossless:
        for document, counted in zip(batch, sizes):
            found, expected = int(counted.sum()), len(document.text.encode())
            if found != expected:  # a wrong codec, not a wrong input
                raise RuntimeError(
                    f"{document.place}: the lossless codec counts {found} bytes, the text has {expected}"
                )
    return np.concatenate(documents), np.concatenate(sizes)


def encode_for_sidecar(codec, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Do the same with sizes that add up to the bytes of each document; slower."""
    documents, sizes = [], []
    for document in batch:
        ids, counted = codec.encode_with_bytes(document.text)
        expected = len(document.text.encode())
        if int(counted.sum()) != expected:
            raise UserError(
                f"{document.place}: the tokenizer keeps nothing of this document of {expected} bytes, so no "
                "token could count them. Remove it."
            )
        documents += [[codec.bos_id], ids]
        sizes += [[0], counted]
    return np.concatenate(documents), np.concatenate(sizes)


def write_split(
    documents: Iterable[Document],
    codec,
    writer: ShardWriter,
    num_threads: int,
    sidecar: ShardWriter | None = None,
) -> dict:
    """Encode one split into shards; returns its counts for the manifest.

    `sidecar` writes the bytes of each token, as shards of the same lengths.
    """
    counts = {"documents": [0, 0], "tokens": 0, "raw_bytes": 0, "token_bytes": 0}
    with tqdm(desc=writer.split, unit="B", unit_scale=True, mininterval=1.0) as progress:
        for batch in batched(documents):
            if sidecar:
                ids, sizes = encode_for_sidecar(codec, batch)
                sidecar.add(sizes)
            else:
                ids, sizes = encode_with_bos(codec, batch, num_threads)
            writer.add(ids)
            raw_bytes = sum(len(document.text.encode()) for document in batch)
            counts["documents"][1] += len(batch)
            counts["tokens"] += ids.size
            counts["raw_bytes"] += raw_bytes
            counts["token_bytes"] += int(sizes.sum())
            progress.update(raw_bytes)
    writer.flush()
    if not counts["documents"][1]:
        raise UserError(
            f"expected at least one document for {writer.split}, found none. "
            "Give more input, or a smaller --val-docs."
        )
    counts["shards"] = writer.shards
    if sidecar:
        sidecar.flush()
        counts["sidecars"] = sidecar.shards
    return counts


def mark_unfinished(out: Path) -> None:
    """Take the manifest away, so that a folder half rewritten is not mistaken for a dataset."""
    write_json(out / UNFINISHED_NAME, {"note": "shards are being written; run the same command again"})
    for name in (MANIFEST_NAME, REPORT_NAME):
        (out / name).unlink(missing_ok=True)


def check_folder(out: Path, digest: str) -> None:
    """Raise when `out` holds shards that a dataset made with the tokenizer `digest` may not replace."""
    manifest = read_manifest(out)
    if manifest is not None:
        found = manifest.get("tokenizer", {}).get("sha256")
        if found != digest:
            raise UserError(
                f"{out}: holds shards of another tokenizer (sha256 {found}, yours is {digest}). "
                "Choose another --out folder, or delete this one."
            )
    elif any(out.glob(ALL_SHARDS_GLOB)) and not (out / UNFINISHED_NAME).is_file():
        raise UserError(
            f"{out}: holds shards without a {MANIFEST_NAME}, which this command did not write. "
            "Choose another --out folder, or delete this one."
        )


def write_dataset(
    out: str | Path,
    codec,
    train: Iterable[Document],
    val: Iterable[Document],
    sources: dict,
    *,
    split: str = "separate_input",
    shard_tokens: int = SHARD_TOKENS,
    num_threads: int | None = None,
) -> dict:
    """Write both splits as shards and, last, the manifest, which is returned.

    `val` is read to its end before `train` starts, so both may come from one stream. With split
    "first_documents" train's document numbers go on where val's end, otherwise both count from 0.
    """
    out = Path(out)
    num_threads = num_threads or os.cpu_count()
    check_folder(out, codec.digest)
    mark_unfinished(out)
    overlap = Overlap()
    val_writer, train_writer = (
        ShardWriter(out, name, shard_tokens, codec.vocab_size) for name in ("val", "train")
    )
    sidecar = ShardWriter(out, SIDECAR_SPLIT, shard_tokens, 1 << 16) if codec.needs_sidecar else None
    val_counts = write_split(overlap.remember(val), codec, val_writer, num_threads, sidecar)
    train_counts = write_split(overlap.refuse(train), codec, train_writer, num_threads)
    if split == "first_documents":
        num_val = val_counts["documents"][1]
        train_counts["documents"] = [first + num_val for first in train_counts["documents"]]
    val_counts["expected_token_bytes"] = val_counts["token_bytes"]
    manifest = {
        "format": MANIFEST_FORMAT,
        "tokenizer": describe_codec(codec),
        "split": split,
        "train": train_counts,
        "val": val_counts,
        "sources": sources,
    }
    files = train_counts["shards"] + val_counts["shards"] + val_counts.get("sidecars", [])
    written = {shard["file"] for shard in files}
    for path in out.glob(ALL_SHARDS_GLOB):
        if path.name not in written:  # of an earlier, longer dataset
            path.unlink()
    write_json(out / MANIFEST_NAME, manifest)
    (out / UNFINISHED_NAME).unlink()
    return manifest


def describe_codec(codec) -> dict:
    """Name the tokenizer of a dataset: enough to refuse any other."""
    return {
        "kind": codec.kind,
        "file": codec.path.name,
        "sha256": codec.digest,
        "vocab_size": codec.vocab_size,
        "bos_id": codec.bos_id,
        "lossless": codec.lossless,
    }


def print_table(out: str | Path, manifest: dict) -> None:
    """Print the closing table: what was written, one row a split."""
    tokenizer = manifest["tokenizer"]
    print(f"{out}: {tokenizer['vocab_size']} token types, sha256 {tokenizer['sha256'][:12]}")
    print(f"{'split':<6}{'documents':>12}{'bytes':>17}{'tokens':>16}{'bytes/token':>13}{'shards':>8}")
    for split in ("train", "val"):
        row = manifest[split]
        documents = row["documents"][1] - row["documents"][0]
        ratio = row["raw_bytes"] / row["tokens"]
        print(f"{split:<6}{documents:>12,}{row['raw_bytes']:>17,}{row['tokens']:>16,}", end="")
        print(f"{ratio:>13.3f}{len(row['shards']):>8}")


# ---- Command ----------------------------------------------------------------------------------------


def choose_val_docs(files: list[str]) -> int:
    """Default number of validation documents: the contest's for its text, else a share of the input.

    The share takes one reading of all input, which also checks it.
    """
    if Path(files[0]).name == DOCS_NAME:
        return CONTEST_VAL_DOCS
    total = sum(1 for _ in tqdm(read_documents(files), desc="count", unit=" documents", mininterval=1.0))
    return max(MIN_VAL_DOCUMENTS, int(total * VAL_FRAC))


def note_other_validation(options: argparse.Namespace) -> None:
    """Say so where the contest's text is given another validation set than the contest's."""
    is_contest = any(Path(path).name == DOCS_NAME for path in options.input)
    if is_contest and (options.val_input or options.val_docs not in (None, CONTEST_VAL_DOCS)):
        print(
            f"note: the contest's validation set is the first {CONTEST_VAL_DOCS:,} documents of {DOCS_NAME}; "
            "scores on this one compare with none of its records",
            file=sys.stderr,
        )


def describe_files(files: list[str]) -> list[dict]:
    """Name and size of each input for the manifest; folders stay out of it."""
    return [{"file": Path(path).name, "bytes": Path(path).stat().st_size} for path in files]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Tokenize your own text into training and validation shards.",
        epilog="Then train on the folder: DATA_PATH=DIR TOKENIZER_PATH=MODEL python train_gpt.py",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst (key text), .parquet (column text)",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--val-input", nargs="+", metavar="FILE", help="validation text; no document may also be in --input"
    )
    choice.add_argument(
        "--val-docs",
        type=int,
        metavar="N",
        help="take the first N documents of --input for validation "
        f"(default: {CONTEST_VAL_DOCS:,} of {DOCS_NAME}, else the larger of 50 and 1 percent)",
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for shards and manifest.json")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens a shard (default: %(default)s)",
    )
    parser.add_argument(
        "--num-threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="encoding threads (default: all cores)",
    )
    add_selection_options(parser)
    parser.add_argument("--val-filter", "--val-order", dest="val_selection", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.val_selection:
        raise UserError(
            "validation documents are scored whole and in their order, or the score compares with no other: "
            "found an option that selects them. --train-filter and --train-order select training documents."
        )
    for name in ("val_docs", "shard_tokens", "num_threads"):
        value = vars(options)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, found {value}.")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(argv)
    codec = load_codec(options.tokenizer)
    check_inputs(options.input + (options.val_input or []))
    check_folder(Path(options.out), codec.digest)
    note_other_validation(options)
    sources = {"input": describe_files(options.input)}
    train = read_documents(options.input)
    if options.val_input:
        split, val = "separate_input", read_documents(options.val_input)
        sources["val_input"] = describe_files(options.val_input)
    else:
        split, val = (
            "first_documents",
            itertools.islice(train, options.val_docs or choose_val_docs(options.input)),
        )
    selection = selection_of(options)
    sources["train_selection"] = selection.facts
    manifest = write_dataset(
        options.out,
        codec,
        selection.apply(train),
        val,
        sources,
        split=split,
        shard_tokens=options.shard_tokens,
        num_threads=options.num_threads,
    )
    print_table(options.out, manifest)


if __name__ == "__main__":
    run_command(main)
