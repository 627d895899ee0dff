"""The artifact file: a frame of checked lengths around a JSON header and compressed streams. No pickle.

Layout: magic, version, header lengths, header (zlib JSON), streams back to back, first 16 bytes of the
SHA-256 of all before them. The header holds "recipe", "tokenizer_sha256", "tensors" and
"streams", a row (name, stored bytes, raw bytes) for each. Lengths are checked before anything is allocated.
The recipe names the streams' codec; with "best" each stream has its own, named by its first byte.
"""

import hashlib
import importlib.util
import json
import lzma
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from common import UserError

ARTIFACT_MAGIC = b"PGOLF\n"
ARTIFACT_VERSION = 2
ARTIFACT_PREFIX = struct.Struct("<6sHII")  # magic, version, header bytes stored, header bytes raw
CHECKSUM_BYTES = 16
LARGEST_FILE = 1 << 30  # bytes: far beyond any model of the contest
MAX_HEADER_BYTES = 1 << 20
MAX_STREAM_BYTES = 1 << 32
PLANES, MOST_PLANES = (0, 1, 2), 1 << 20  # logarithms of widths tried, on streams below so many bytes
# Codes of weights have no context that literals or positions could tell.
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


class ArtifactError(UserError):
    """An artifact that is not whole, not ours, or contradicts itself."""


class Stream(NamedTuple):
    """A compressed stream and the length it must have when decompressed."""

    stored: bytes
    raw_bytes: int


def require_codec(codec: str) -> None:
    """Raise before any work is done when the artifact's compressor is not installed."""
    for package in CODEC_PACKAGES.get(codec, ()):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"quant.codec={codec}: the package {package} is missing. Install it or set quant.codec=lzma."
            )


def keep_stream(raw: bytes) -> bytes:
    """Store as it is: a stream that is coded already."""
    return raw


def cut_stream(stored: bytes, limit: int) -> bytes:
    """Return at most `limit` bytes of what was stored as it is."""
    return stored[:limit]


def compress_zlib(raw: bytes) -> bytes:
    """Compress with zlib."""
    return zlib.compress(raw, level=9)


def decompress_zlib(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes."""
    return zlib.decompressobj().decompress(stored, limit)


def compress_lzma(raw: bytes) -> bytes:
    """Compress with raw LZMA2: no container, no check value."""
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def decompress_lzma(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes."""
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(stored, limit)


def compress_zstd(raw: bytes) -> bytes:
    """Compress with zstd at its highest level."""
    import zstandard

    return zstandard.ZstdCompressor(level=22, write_content_size=False).compress(raw)


def decompress_zstd(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes; a stream reader, because a frame may declare any size."""
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(stored).read(limit)


def compress_brotli(raw: bytes) -> bytes:
    """Compress with brotli at its highest quality."""
    import brotli

    return brotli.compress(raw, quality=11, lgwin=24)


def decompress_brotli(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes, a buffer at a time."""
    import brotli

    decoder = brotli.Decompressor()
    raw = piece = decoder.process(stored, output_buffer_limit=limit)
    while piece and len(raw) < limit and not decoder.is_finished():
        piece = decoder.process(b"", output_buffer_limit=limit - len(raw))
        raw += piece
    return raw[:limit]


def to_planes(raw: bytes, width: int) -> bytes:
    """Sort the bytes of elements of so many bytes: all first ones, all second ones, ..."""
    return b"".join(raw[place::width] for place in range(width))


def from_planes(planes: bytes, width: int) -> bytes:
    """Undo to_planes; bytes that are no whole elements come back as they are."""
    if len(planes) % width:
        return planes
    raw, length = bytearray(len(planes)), len(planes) // width
    for place in range(width):
        raw[place::width] = planes[place * length : (place + 1) * length]
    return bytes(raw)


def compress_best(raw: bytes) -> bytes:
    """Compress with the plain codec of the fewest bytes; the first byte holds its place in PLAIN_CODECS.

    Its upper half is the logarithm of the width of byte planes, which floats are sorted into. Where bytes are
    all about as frequent the stream is coded already: zlib finds what there is, the slow codecs are spared.
    """
    widths = [log for log in PLANES if len(raw) % (1 << log) == 0 and (log == 0 or len(raw) < MOST_PLANES)]
    forms = {log: to_planes(raw, 1 << log) for log in widths}
    huffman = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    is_coded = len(huffman.compress(raw) + huffman.flush()) > 0.9 * len(raw)
    packers = [pack for pack, _ in PLAIN_CODECS.values()][: 2 if is_coded else None]
    return min(
        (
            bytes([log << 4 | place]) + pack(form)
            for log, form in forms.items()
            for place, pack in enumerate(packers)
        ),
        key=len,
    )


def decompress_best(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes as the first byte says."""
    log, place = divmod(stored[0], 16)
    return from_planes(list(PLAIN_CODECS.values())[place][1](stored[1:], limit), 1 << log)


# The order is part of the file format.
PLAIN_CODECS = {
    "none": (keep_stream, cut_stream),
    "zlib": (compress_zlib, decompress_zlib),
    "lzma": (compress_lzma, decompress_lzma),
    "zstd": (compress_zstd, decompress_zstd),
    "brotli": (compress_brotli, decompress_brotli),
}
LIMIT_BYTES = 16_000_000  # of a submission: decimal; code plus compressed model
STREAM_CODECS = PLAIN_CODECS | {"best": (compress_best, decompress_best)}
CODEC_PACKAGES = {"zstd": ("zstandard",), "brotli": ("brotli",), "best": ("zstandard", "brotli")}


@lru_cache(maxsize=16)
def compress(raw: bytes, codec: str) -> bytes:
    """Compress one stream as small as its codec can; rate control asks for many of them again."""
    return STREAM_CODECS[codec][0](raw)


def decompress(stream: Stream, codec: str) -> bytes:
    """Decompress one stream to exactly its raw length; never holds more than a byte beyond it."""
    try:
        raw = STREAM_CODECS[codec][1](stream.stored, stream.raw_bytes + 1)
    except Exception as error:  # each library has its own exception for damaged input
        raise ArtifactError(f"artifact: a {codec} stream is damaged ({error}).") from error
    if len(raw) != stream.raw_bytes:
        raise ArtifactError(
            f"artifact: expected a {codec} stream of {stream.raw_bytes} bytes, found {len(raw)} or more."
        )
    return raw


def pack_artifact(header: dict, streams: dict[str, bytes], codec: str) -> tuple[bytes, list[tuple[str, int]]]:
    """Return the file's bytes and its ledger [(part, bytes)], whose sum is the file's size."""
    stored = {name: compress(raw, codec) for name, raw in streams.items()}
    table = [[name, len(stored[name]), len(raw)] for name, raw in streams.items()]
    raw_header = json.dumps(header | {"streams": table}, separators=(",", ":")).encode()
    packed_header = zlib.compress(raw_header, 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed_header), len(raw_header))
    body = prefix + packed_header + b"".join(stored.values())
    frame = ("container and recipe", len(prefix) + len(packed_header) + CHECKSUM_BYTES)
    parts = [frame, *((f"weights: {name}", len(data)) for name, data in stored.items())]
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES], parts


def read_artifact(path: Path) -> tuple[dict, dict[str, Stream]]:
    """Read an artifact file: its header and its streams, still compressed."""
    if not path.is_file():
        raise UserError(f"{path}: no such artifact. Train one with `make run` or train_gpt.py.")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ArtifactError(f"{path}: expected at most {LARGEST_FILE:,} bytes, found {size:,}.")
    return unpack_artifact(path.read_bytes(), path)


def unpack_artifact(blob: bytes, path: Path) -> tuple[dict, dict[str, Stream]]:
    """Check a file's frame; returns its header and its streams, still compressed."""
    again = "Copy it again or retrain."
    smallest = ARTIFACT_PREFIX.size + CHECKSUM_BYTES
    if len(blob) < smallest:
        raise ArtifactError(f"{path}: an artifact has at least {smallest} bytes, found {len(blob)}. {again}")
    magic, version, stored_bytes, raw_bytes = ARTIFACT_PREFIX.unpack_from(blob)
    if (magic, version) != (ARTIFACT_MAGIC, ARTIFACT_VERSION):
        raise ArtifactError(
            f"{path}: expected an artifact of version {ARTIFACT_VERSION}, found {magic!r} {version}."
        )
    body = blob[:-CHECKSUM_BYTES]
    if hashlib.sha256(body).digest()[:CHECKSUM_BYTES] != blob[-CHECKSUM_BYTES:]:
        raise ArtifactError(f"{path}: the checksum does not match; the file is truncated or damaged. {again}")
    offset = ARTIFACT_PREFIX.size + stored_bytes
    if offset > len(body) or raw_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path}: the header's length {stored_bytes} does not fit the file. {again}")
    packed_header = Stream(body[ARTIFACT_PREFIX.size : offset], raw_bytes)
    try:
        header = json.loads(decompress(packed_header, "zlib"))
        table = [(str(name), int(stored), int(raw)) for name, stored, raw in header["streams"]]
        recipe_is_table = all(isinstance(section, dict) for section in header["recipe"].values())
        if not (recipe_is_table and isinstance(header["tokenizer_sha256"], str)):
            raise TypeError("recipe or tokenizer_sha256")
        if not isinstance(header["tensors"], list):
            raise TypeError("tensors")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path}: the header cannot be read ({error!r}). {again}") from error
    sane = all(stored >= 0 and 0 <= raw <= MAX_STREAM_BYTES for _, stored, raw in table)
    if not sane or sum(stored for _, stored, _ in table) != len(body) - offset:
        raise ArtifactError(f"{path}: the stream table {table[:8]} does not fit the file. {again}")
    streams = {}
    for name, stored, raw in table:
        streams[name] = Stream(body[offset : offset + stored], raw)
        offset += stored
    return header, streams
