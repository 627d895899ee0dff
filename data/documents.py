"""Read documents from text files: their names and lines are in every error.

Files pass through as streams, so they may be larger than memory.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import UserError, parse_json

INPUT_HELP = ".txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst (key text), .parquet (column text)"
BATCH_BYTES = 4 << 20  # text encoded at once; the ids of a batch take about twenty times as much memory
READ_BYTES = 1 << 17
ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=27` to `--long=31` files need more than the default window


class Document(NamedTuple):
    """One text and where it comes from ("file", "file:line"), for error messages."""

    text: str
    place: str


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
    if path.is_dir():
        raise UserError(f"{path}: expected a file, found a folder. Name the files in it: {path}/*.txt.")
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


def get_text(value: dict, place: str) -> str:
    """Take the text out of the object of one line; raise a UserError that names the place."""
    if not isinstance(value.get("text"), str):
        raise UserError(
            f'{place}: expected a JSON object with a string under "text", found keys {sorted(value)}.'
        )
    return require_utf8(value["text"], place)


def parse_object(line: bytes, place: str) -> dict:
    """Parse one line of JSON that holds an object."""
    value = parse_json(line, place, strict=False, advice="Expected one JSON object a line, as UTF-8.")
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


def read_jsonl(path: Path, write: Callable[[dict, str], str] = get_text) -> Iterator[Document]:
    """Yield the text that `write` finds in the object of each line; blank lines are no documents."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Document(write(parse_object(line, place), place), place)


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
