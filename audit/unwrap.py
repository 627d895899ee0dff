"""Unwrap self-extracting programs without running them: fold constants, decompress within bounds.

A value is computed only from literals, local file names and the pure functions of DECODERS; everything else
is unknown. Unwrapping never calls anything of the program: a text packed by pack/mix.py is read with a
decoder of that module, and only when the program ships exactly this decoder.
"""

import ast
import base64
import binascii
import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

import brotli
import zstandard

from pack.mix import DECODER_NAME, MAX_LENGTH, decoder_text, shipped_decoder
from pack.stub import is_mix_stub

MAX_OUTPUT = 4_000_000  # bytes out of one decompression
MAX_WORK = 20_000  # expressions computed for one module, plus one for each 1,000 bytes of their values
MAX_MEMORY = 1 << 27  # bytes of dictionary that a stream may ask for
LATIN = {"l1", "latin1", "latin-1", "latin_1", "iso-8859-1", "iso8859-1", "cp1252"}
CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")


BROKEN = (  # what decoders raise about data that is not what it claims to be
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    brotli.error,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
)


class Unknown(Exception):
    """The value depends on something that only running the program would tell."""


class Unreadable(Unknown):
    """A stream is broken, over its bounds or in an unknown format."""


def parse_source(source: bytes | str) -> ast.Module:
    """Parse a program; raises SyntaxError also where Python raises something else about hostile source."""
    if isinstance(source, bytes):
        head = b"\n".join(source.split(b"\n", 2)[:2])
        coding = CODING.search(head) or CODING.search(head.partition(b"\n")[2])
        is_latin = bool(coding) and coding[1].decode("ascii", "replace").lower() in LATIN
        source = source.decode("latin-1" if is_latin else "utf-8", errors="replace")
    try:
        return ast.parse(source.removeprefix("\ufeff"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)[:80] or type(error).__name__) from error


def _bounded(output: bytes, has_ended: bool) -> bytes:
    if len(output) >= MAX_OUTPUT or not has_ended:
        raise Unreadable(f"a stream that is cut off or holds over {MAX_OUTPUT:,} bytes")
    return output


def _unlzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: int | None = None, filters=None) -> bytes:
    if any(row.get("dict_size", 0) > MAX_MEMORY for row in filters or []):
        raise Unreadable(f"an lzma dictionary over {MAX_MEMORY:,} bytes")
    limit = None if format == lzma.FORMAT_RAW else MAX_MEMORY
    stream = lzma.LZMADecompressor(format=format, memlimit=limit, filters=filters)
    output = stream.decompress(data, MAX_OUTPUT)
    # A raw stream may have no end mark; then all of its input is used up.
    return _bounded(output, stream.eof or (format == lzma.FORMAT_RAW and stream.needs_input))


def _unzlib(data: bytes, wbits: int = zlib.MAX_WBITS) -> bytes:
    stream = zlib.decompressobj(wbits)
    return _bounded(stream.decompress(data, MAX_OUTPUT), stream.eof)


def _unbz2(data: bytes) -> bytes:
    stream = bz2.BZ2Decompressor()
    return _bounded(stream.decompress(data, MAX_OUTPUT), stream.eof)


def _unbrotli(data: bytes) -> bytes:
    stream, output = brotli.Decompressor(), bytearray()
    for start in range(0, len(data), 16):  # 16 bytes of brotli can hold 16 MiB: check after each few
        output += stream.process(data[start : start + 16])
        if len(output) >= MAX_OUTPUT:
            break
    return _bounded(bytes(output), stream.is_finished())


def _unzstd(data: bytes) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_MEMORY).stream_reader(data)
    return _bounded(reader.read(MAX_OUTPUT), True)


# What a dotted name may compute. Methods of strings and bytes are in METHODS.
DECODERS: dict[str, Callable] = {
    "lzma.decompress": _unlzma,
    "zlib.decompress": _unzlib,
    "gzip.decompress": lambda data: _unzlib(data, 16 + zlib.MAX_WBITS),
    "bz2.decompress": _unbz2,
    "brotli.decompress": _unbrotli,
    "zstandard.decompress": _unzstd,
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.standard_b64decode": base64.standard_b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "binascii.unhexlify": binascii.unhexlify,
    "binascii.a2b_base64": binascii.a2b_base64,
    "bytes.fromhex": bytes.fromhex,
    "str": lambda value, coding="utf-8": value.decode(_known(coding)),
    "bytes": lambda value, coding="utf-8": _bytes(value, coding),
    "compile": lambda source, *rest: source,
    "os.path.join": lambda *parts: "/".join(part for part in parts if part),
    "os.path.dirname": lambda path: path.rpartition("/")[0],
    "os.path.abspath": lambda path: path,
    "os.path.realpath": lambda path: path,
    "pathlib.Path": lambda path: path,
}
METHODS: dict[str, Callable] = {
    "encode": lambda value, coding="utf-8": value.encode(_known(coding)),
    "decode": lambda value, coding="utf-8": value.decode(_known(coding)),
    "replace": lambda value, old, new: _small(value.count(old) * len(new)) and value.replace(old, new),
    "strip": lambda value: value.strip(),
    "join": lambda value, parts: _small(len(value) * len(parts)) and value.join(parts),
    "resolve": lambda value: value,
    "with_name": lambda value, name: "/".join([*value.split("/")[:-1], name]),
}
CODECS = {"utf-8", "utf8", "ascii", "L1", *LATIN}


def _known(coding: str) -> str:
    if coding.lower() not in CODECS and coding not in CODECS:
        raise Unknown(f"codec {coding}")
    return coding


def _small(size: int) -> bool:
    if size > MAX_OUTPUT:
        raise Unknown(f"a string of {size:,} characters")
    return True


def _bytes(value: list[int] | str | bytes, coding: str) -> bytes:
    if isinstance(value, int):
        raise Unknown("bytes(number)")
    return value.encode(_known(coding)) if isinstance(value, str) else bytes(value)


class Constants:
    """Names of one module that are bound once, to values that can be computed without running it."""

    def __init__(self, tree: ast.Module, file_name: str, read: Callable[[str], bytes]):
        self.file_name = file_name
        self.read = read  # reads a local file by name; raises Unknown for any other
        self.work_left = MAX_WORK
        self.modules = dict(_import_names(tree))
        self.is_mixed = is_mix_stub(tree)
        self.learned: dict[str, Callable] = {}  # functions that the module got from `exec` and that we have
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.assigned.setdefault(node.targets[0].id, []).append(node.value)

    def learn(self, executed: bytes | str) -> bool:
        """Whether an executed text is the decoder that we pack with; its function may then be called."""
        if not self.is_mixed or len(executed) > 2 * len(decoder_text()):
            return False
        try:
            text = executed if isinstance(executed, str) else executed.decode()
            decoder = shipped_decoder(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # as parse_source has it
            return False
        if decoder:
            self.learned[DECODER_NAME] = partial(self._unmix, decoder)
        return decoder is not None

    def _unmix(self, decoder: Callable[[str, int], str], payload: str, length: int) -> str:
        if not 0 <= length <= MAX_LENGTH or re.search(r"[^\x01-\xff]", payload):
            raise Unreadable(f"a mixed text of {length:,} characters, at most {MAX_LENGTH:,}, or no bytes")
        self.work_left -= length * MAX_WORK // MAX_LENGTH
        if self.work_left < 0:
            raise Unreadable(f"mixed texts of over {MAX_LENGTH:,} characters in one module")
        return decoder(payload, length)

    def dotted(self, node: ast.expr) -> str:
        """Return the full dotted name of a Name or Attribute chain, import aliases resolved, or ""."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.modules.get(node.id, node.id), *reversed(parts)])

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """Compute an expression; raises Unknown (Unreadable for a bad stream)."""
        try:
            value = self._compute(node, depth + 1)
        except BROKEN as error:
            raise Unreadable(f"{ast.unparse(node)[:40]}: {str(error)[:80]}") from error
        self.work_left -= 1 + (len(value) // 1000 if isinstance(value, Sized) else 0)
        if depth > 40 or self.work_left < 0:
            raise Unknown("an expression too large to compute")
        return value

    def _compute(self, node: ast.expr, depth: int) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand, depth)
            case ast.Name(id="__file__"):
                return self.file_name
            case ast.Name() if len(self.assigned.get(node.id, ())) == 1:
                return self.value(self.assigned[node.id][0], depth)
            case ast.Attribute() if isinstance(number := vars(lzma).get(node.attr), int):
                return number  # lzma.FORMAT_RAW and its like
            case ast.List() | ast.Tuple():
                return [self.value(item, depth) for item in node.elts]
            case ast.Dict() if all(node.keys):
                return {self.value(k, depth): self.value(v, depth) for k, v in zip(node.keys, node.values)}
            case ast.BinOp(op=ast.Add()):
                return self.value(node.left, depth) + self.value(node.right, depth)
            case ast.JoinedStr() if all(isinstance(part, ast.Constant) for part in node.values):
                return "".join(part.value for part in node.values)
            case ast.Call():
                return self._call(node, depth)
        raise Unknown(type(node).__name__)

    def _call(self, node: ast.Call, depth: int) -> Any:
        name = self.dotted(node.func)
        function = DECODERS.get(name) or self.learned.get(name)
        arguments: list = []
        if function is None and isinstance(node.func, ast.Attribute):
            method, owner = node.func.attr, node.func.value
            if method in ("read", "read_text", "read_bytes"):
                return self._file(owner, depth)
            if method == "decompress" and isinstance(owner, ast.Call):  # zstandard.ZstdDecompressor()
                function = DECODERS.get(self.dotted(owner.func).partition(".")[0] + ".decompress")
            elif method in METHODS:
                function, arguments = METHODS[method], [self.value(owner, depth)]
        if function is None:
            raise Unknown(f"call of {name or 'a computed function'}")
        arguments += [self.value(item, depth) for item in node.args]
        options = {key.arg: self.value(key.value, depth) for key in node.keywords if key.arg}
        return function(*arguments, **options)

    def _file(self, opened: ast.expr, depth: int) -> bytes:
        """The bytes behind open(NAME).read() and Path(NAME).read_text()."""
        opens = ("open", "io.open", "pathlib.Path")
        if isinstance(opened, ast.Call) and opened.args and self.dotted(opened.func) in opens:
            opened = opened.args[0]
        return self.read(str(self.value(opened, depth)))


def _import_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
