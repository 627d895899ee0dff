"""Read documents from text files: their names and lines are in every error.

Files pass through as streams, so they may be larger than memory; a line, or one document, must fit into it.
"""

import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from common import UserError, parse_json, require_utf8_name

INPUT_HELP = ".txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst (key text), .parquet (column text)"
BATCH_BYTES = 4 << 20  # text encoded at once; the ids of a batch take about twenty times as much memory
LONG_BYTES = 1 << 20  # a document from here on is a batch of its own, which may be encoded in parts
READ_BYTES = 1 << 17
MAX_LINE_BYTES = 1 << 30
LONG_LINE_BYTES = 1 << 20  # from here on a line is parsed so that it takes less memory
PARQUET_ROWS = 64  # read at once, at most
MANY_KEYS = 12  # in a message
ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=27` to `--long=31` files need more than the default window


class Document(NamedTuple):
    """One text and where it comes from ("file", "file:line"), for error messages."""

    text: str
    place: str


def utf8_chunks(text: str) -> Iterator[bytes]:
    """Yield the UTF-8 of a text, of a long one in pieces: a whole copy would take memory beside it."""
    for first in range(0, len(text), LONG_BYTES):
        yield text[first : first + LONG_BYTES].encode()


def utf8_size(text: str) -> int:
    """Count the UTF-8 bytes of a text."""
    return len(text) if text.isascii() else sum(map(len, utf8_chunks(text)))


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until a batch holds BATCH_BYTES or more; long ones stay alone."""
    batch, size = [], 0
    for document in documents:
        num_bytes = utf8_size(document.text)
        is_long = num_bytes >= LONG_BYTES
        if batch and (is_long or size >= BATCH_BYTES):
            yield batch
            batch, size = [], 0
        if is_long:
            yield [document]
        else:
            batch.append(document)
            size += num_bytes
    if batch:
        yield batch


@cache
def say_once(text: str) -> None:
    """Write a note to standard error, once a process however often the files are read."""
    print(f"note: {text}", file=sys.stderr)


def read_documents(files: Iterable[str | Path]) -> Iterator[Document]:
    """Yield the documents of .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files in order.

    Empty files and empty documents are left out, with a note; raises where nothing else is there.
    """
    files, num_found = list(map(Path, files)), 0
    for path in files:
        num_empty, first, num_before = 0, "", num_found
        for document in find_reader(path)(path):
            if document.text:
                num_found += 1
                yield document
            else:
                num_empty += 1
                first = first or document.place
        if num_empty:
            say_once(f"{path}: left out {num_empty:,} empty documents; the first: {first}")
        elif num_found == num_before:
            say_once(f"{path}: holds no document")
    if not num_found:
        names = " ".join(map(str, files[:MANY_KEYS]))
        raise UserError(f"{names}: expected documents, found none. Name files that hold text.")


def find_reader(path: Path):
    """Choose the reader of a file by its suffix; raise when the file or the suffix is unknown."""
    if path.is_dir():
        raise UserError(f"{path}: expected a file, found a folder. Name the files in it: {path}/*.txt.")
    reader = next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise UserError(
            f"{path}: unknown suffix {path.suffix!r}. Expected one of {', '.join(READERS)}; "
            "rename or convert the file."
        )
    if not path.is_file():
        what = "found a pipe, socket or device" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}. Name a file: it is read more than once.")
    return reader


def check_inputs(files: Iterable[str | Path]) -> None:
    """Raise for the first file that cannot be read at all, before any work starts."""
    for path in files:
        require_utf8_name(path)
        find_reader(Path(path))


def snapshot(files: Iterable[str | Path]) -> list[tuple]:
    """Return what tells whether files change while they are read: sizes and times of the last change."""
    return [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]


def check_unchanged(before: list[tuple]) -> None:
    """Raise where a file is no longer the one of a snapshot: parts of two versions may have been read."""
    for row, now in zip(before, snapshot(row[0] for row in before)):
        if row != now:
            raise UserError(
                f"{row[0]}: changed while it was read, from {row[1]:,} to {now[1]:,} bytes. Wait until it is "
                "finished, or copy it, and run this again."
            )


def read_txt(path: Path) -> Iterator[Document]:
    """Yield the whole file as one document; nothing for an empty file."""
    text = decode_file(path)
    if text:
        yield Document(text, str(path))


def decode_file(path: Path) -> str:
    """Read a file of UTF-8; raises a UserError that names the line where it is none."""
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error


def name_keys(value: dict) -> str:
    """List the keys of an object for a message, a few of many."""
    keys = sorted(key[:40] for key in value)
    return f"keys {keys[:MANY_KEYS]}" + (f" and {len(keys) - MANY_KEYS:,} more" if keys[MANY_KEYS:] else "")


def get_text(value: dict, place: str) -> str:
    """Take the text out of the object of one line; raise a UserError that names the place."""
    if not isinstance(value.get("text"), str):
        raise UserError(
            f'{place}: expected a JSON object with a string under "text", found {name_keys(value)}.'
        )
    return require_utf8(value["text"], place)


def parse_object(line: bytes, place: str, write: Callable[[dict, str], str]) -> str:
    """Parse one line of JSON that holds an object; return the text that `write` finds in it.

    A string of Python takes four bytes a character if one of them is an emoji, and parsing needs two of them.
    A long line is therefore parsed as ASCII in which each other byte stands for itself (surrogateescape).
    """
    is_long = len(line) >= LONG_LINE_BYTES and b"\\ud" not in line and b"\\uD" not in line
    source = line.decode("ascii", "surrogateescape") if is_long else line
    advice = "Expected one JSON object a line, as UTF-8."
    value = parse_json(source, place, strict=False, advice=advice)
    del source
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f'{place}: expected a JSON object with a string under "text", found {found}.')
    if is_long:
        for key in [key for key, part in value.items() if isinstance(part, str)]:
            value[key] = restore_utf8(value.pop(key), place, advice)
    return write(value, place)


def restore_utf8(text: str, place: str, advice: str) -> str:
    """Turn bytes that stand for themselves into the characters that they are of."""
    raw = text.encode("utf-8", "surrogateescape")
    del text
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not valid JSON (not UTF-8: {error.reason}). {advice}") from error


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
            yield Document(parse_object(line, place, write), place)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain, gzip or zstd file."""
    with open(path, "rb") as file:
        if path.suffix == ".zst":
            lines = split_lines(decompress_zstd(file, path))
        else:
            lines = decompress_gzip(file, path) if path.suffix == ".gz" else whole_lines(file)
        for line in lines:
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}: expected one JSON object a line, found a line of over {MAX_LINE_BYTES:,} "
                    "bytes. Write one document a line."
                )
            yield line


def whole_lines(file) -> Iterator[bytes]:
    """Yield lines, and of one that is too long its start."""
    return iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")


def decompress_gzip(file, path: Path) -> Iterator[bytes]:
    """Yield the lines of all members; raise where one is damaged or cut off, or something else follows."""
    try:
        with gzip.open(file) as lines:
            yield from whole_lines(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}). Copy or make it again.") from error


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
    """Yield the lines of a byte stream that comes in chunks, and of one that is too long its start."""
    started: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*started, end])
            started, size = [], 0
        started.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            break
    if size:
        yield b"".join(started)


def on_one_line(error: Exception) -> str:
    """Return what a library says, which may have several lines."""
    return " ".join(str(error).split())


def read_parquet(path: Path) -> Iterator[Document]:
    """Yield the rows of the column `text`, of any of the string types; rows count from 1."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs `pip install pyarrow`.") from error
    broken = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        table = parquet.ParquetFile(path, buffer_size=READ_BYTES, page_checksum_verification=True)
    except broken as error:
        raise UserError(
            f"{path}: not a parquet file ({on_one_line(error)}). Copy or make it again."
        ) from error
    with table:
        names = table.schema_arrow.names
        if names.count("text") != 1:
            raise UserError(f'{path}: expected a column "text", found {names[:MANY_KEYS]}.')
        check_column(table.schema_arrow.field("text").type, path)
        waiting: list[Document] = []
        for number, column in read_columns(table, path, broken):
            yield from waiting  # only now has the library freed the columns that they come from
            pyarrow.default_memory_pool().release_unused()
            places = [f"{path}:{number + row}" for row in range(1, len(column) + 1)]
            waiting = list(map(Document, map(parse_cell, column, places), places))
            column = None
        pyarrow.default_memory_pool().release_unused()
        yield from waiting


def read_columns(table, path: Path, broken: tuple) -> Iterator[tuple[int, Iterable]]:
    """Yield the column `text` a few rows at a time, and how many rows were before; `broken` are errors."""
    number = 0
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        row_bytes = max(facts.total_byte_size // max(facts.num_rows, 1), 1)
        num_rows = min(max(BATCH_BYTES // row_bytes, 1), PARQUET_ROWS)
        try:
            for batch in table.iter_batches(num_rows, [group], ["text"], use_threads=False):
                yield number, batch.column(0)
                number += len(batch)
        except broken as error:
            raise UserError(
                f"{path}: row group {group} is damaged, after row {number} ({on_one_line(error)}). Copy or "
                "make the file again."
            ) from error


def check_column(kind, path: Path) -> None:
    """Raise unless a column of this type holds strings; a dictionary of them is one way to store them."""
    found = str(kind)
    stored = str(getattr(kind, "value_type", "")) if found.startswith("dictionary") else found
    if stored not in ("string", "large_string", "string_view"):
        raise UserError(
            f'{path}: expected strings in the column "text", found {found[:80]}. Convert the column.'
        )


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
