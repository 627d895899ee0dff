"""Odd inputs of every command that reads text: an answer, or one sentence that says what to do; never a loss.

One table. A row is what lies in a folder, the command line and what the answer must say; "" is an answer
without complaint. Damaged files that can be read after all must have given the text that was written.
"""

import contextlib
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow
import pytest
import zstandard
from fixtures_data import small_texts
from fixtures_model import ROOT
from pyarrow import parquet

from common import UserError
from data import builtin, download, prepare, tokenizer
from data.codecs import load_codec
from data.codecs.raw import BYTES_FILE
from data.documents import MAX_LINE_BYTES, check_unchanged, read_documents, read_lines, snapshot, split_lines
from data.loader import LOADERS, LoaderSettings, make_loader
from data.shards import read_manifest, write_shard
from data.validation import read_validation
from eval.domains import parse_domains, read_domain

TEXTS = small_texts(12, seed=3)
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
HALF = len(gzip.compress(LINES, mtime=0)) // 2
GZIP, ZSTD = gzip.compress(LINES, mtime=0), zstandard.compress(LINES)
LONGEST = 700  # characters of a message: two sentences and a name


def to_parquet(column, name: str = "text", **how) -> bytes:
    """Write one column as a parquet file."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({name: column}), file, **how)
    return file.getvalue()


PARQUET = to_parquet(TEXTS, row_group_size=5, compression="none")
CHECKED = to_parquet(
    ["abcdefgh" * 9],
    compression="none",
    use_dictionary=False,
    write_statistics=False,
    write_page_checksum=True,
)


def flipped(content: bytes, place: float) -> bytes:
    """Turn over one byte at a place from 0 to 1."""
    at = min(int(place * len(content)), len(content) - 1)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


class Input(NamedTuple):
    """A file beside a good one, and what data.prepare must say of it."""

    name: str
    content: bytes
    says: str


def line(value: str) -> bytes:
    """Write a good line, then one of this text."""
    return b'{"text": "good"}\n' + value.encode("utf-8", "surrogatepass") + b"\n"


NO_TEXT, NO_JSON = r"bad\.jsonl:2: expected a JSON object with a string", r"bad\.jsonl:2: not valid JSON"
INPUTS = [
    # Text files.
    Input("bad.txt", b"\xff\xfeh\x00i\x00", r"bad\.txt:1: not UTF-8"),
    Input("bad.txt", b"a\nb\n\xc3", r"bad\.txt:3: not UTF-8"),
    Input("bad.txt", b"\xed\xa0\x80", r"bad\.txt:1: not UTF-8"),
    Input("bad.txt", b"\xc0\x80", r"bad\.txt:1: not UTF-8"),
    Input("bad.txt", b"\xf5\x80\x80\x80", r"bad\.txt:1: not UTF-8"),
    Input("bad.txt", b"\xef\xbb\xbfwith a mark", ""),
    Input("bad.txt", b"\0\0\0", ""),
    Input("bad.txt", b"\r\n\r\r\n", ""),
    Input("bad.txt", "\u2581 \u2581\ufeff\ufffd\U0010ffff".encode(), ""),
    Input("bad.txt", b"", ""),
    Input("bad.txt", b"a" * 3_000_000, ""),
    Input("bad.txt", b" " * 3_000_000, ""),
    Input("bad.txt", "\u4e2d".encode() * 1_500_000, ""),
    # Lines of JSON.
    Input("bad.jsonl", b"", ""),
    Input("bad.jsonl", b"\n \n\t\n", ""),
    Input("bad.jsonl", b'{"text": "no newline at the end"}', ""),
    Input("bad.jsonl", b'{"text": "windows"}\r\n{"text": "lines"}\r\n', ""),
    Input("bad.jsonl", line('{"text": ""}'), ""),
    Input("bad.jsonl", line('{"text": "a", "score": NaN, "other": -Infinity}'), ""),
    Input("bad.jsonl", line('{"text": "a", "id": "\\ud800"}'), ""),
    Input("bad.jsonl", line('{"text": "\\ud83d\\ude00 \\u0000"}'), ""),
    Input("bad.jsonl", line('{"text": "a", "meta": {"text": 7, "deep": [[[[]]]]}}'), ""),
    Input("bad.jsonl", line('  {"text" : "a"}  '), ""),
    Input("bad.jsonl", line('{"text": "' + "\U0001f600\u00e9x" * 400_000 + '"}'), ""),
    Input("bad.jsonl", line('{"text": "' + "\\u00e9\u00e9 \\n" * 200_000 + '"}'), ""),
    Input("bad.jsonl", line('{"text": "' + "\\ud83d\\ude00 \u00e9" * 200_000 + '"}'), ""),
    Input("bad.jsonl", line('{"text": "' + "a" * 2_000_000 + '\\udcc3\\udca9"}'), "half of a surrogate pair"),
    Input("bad.jsonl", line('{"text": "' + "a" * 2_000_000 + '", "id": "\\udcc3"}'), ""),
    Input("bad.jsonl", line('{"text": "' + "a" * 2_000_000)[:-1] + b'\xc3"}\n', r"bad\.jsonl:2: .*not UTF-8"),
    Input("bad.jsonl", line('{"text": "' + "a" * 2_000_000 + '", "text": ""}'), "a key twice"),
    Input("bad.jsonl", b'{"text": ' + b"7" * 2_000_000 + b"}", r"4300 digits"),
    Input("bad.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', ""),
    Input("bad.jsonl", '{"text": "a"}\n'.encode("utf-16"), "can't decode"),
    Input("bad.jsonl", b'{"text": "a\xff"}\n', "can't decode"),
    Input("bad.jsonl", line('{"text": "a"'), NO_JSON),
    Input("bad.jsonl", line("{'text': 'a'}"), NO_JSON),
    Input("bad.jsonl", line('{"text": "a"},'), NO_JSON),
    Input("bad.jsonl", line('{"text": "a"}{"text": "b"}'), NO_JSON),
    Input("bad.jsonl", line('{"text": "a", }'), NO_JSON),
    Input("bad.jsonl", line('{"text": "tab\there"}'), NO_JSON),
    Input("bad.jsonl", line('{"text": "\\x41"}'), NO_JSON),
    Input("bad.jsonl", line('{"text": "\\u12"}'), NO_JSON),
    Input("bad.jsonl", line("text"), NO_JSON),
    Input("bad.jsonl", line("\0"), NO_JSON),
    Input("bad.jsonl", line("[" * 100_000), "recursion depth"),
    Input("bad.jsonl", line('{"a":' * 100_000), "recursion depth"),
    Input("bad.jsonl", line('{"text": "a", "b": ' + "[" * 90_000 + "]" * 90_000 + "}"), "recursion depth"),
    Input("bad.jsonl", line('{"text": "a", "id": ' + "9" * 5_000 + "}"), "4300 digits"),
    Input("bad.jsonl", line('{"text": "a", "id": -' + "9" * 5_000 + "}"), "4300 digits"),
    Input("bad.jsonl", line('{"text": "a", "text": "b"}'), "a key twice"),
    Input("bad.jsonl", line('{"text": "\\ud800"}'), r"bad\.jsonl:2: .* half of a surrogate pair"),
    Input("bad.jsonl", line('{"text": "\\udc00\\ud800"}'), r"bad\.jsonl:2: .* half of a surrogate pair"),
    Input("bad.jsonl", line("[]"), NO_TEXT + ".* found list"),
    Input("bad.jsonl", line('"text"'), NO_TEXT + ".* found str"),
    Input("bad.jsonl", line("null"), NO_TEXT + ".* found NoneType"),
    Input("bad.jsonl", line("7"), NO_TEXT + ".* found int"),
    Input("bad.jsonl", line("{}"), NO_TEXT),
    Input("bad.jsonl", line('{"Text": "a"}'), NO_TEXT + r".*\['Text'\]"),
    Input("bad.jsonl", line('{"text": null}'), NO_TEXT),
    Input("bad.jsonl", line('{"text": ["a"]}'), NO_TEXT),
    Input("bad.jsonl", line('{"text": {"text": "a"}}'), NO_TEXT),
    Input("bad.jsonl", line('{"text": true}'), NO_TEXT),
    Input("bad.jsonl", line(json.dumps({f"key{i}": i for i in range(9000)})), "and 8,988 more"),
    Input("bad.jsonl", line(json.dumps({"k" * 100_000: 1})), NO_TEXT),
    Input("bad.jsonl", b"[\n" + LINES, r"bad\.jsonl:1: not valid JSON"),
    Input("bad.jsonl", GZIP, "can't decode"),
    # Compressed lines.
    Input("bad.jsonl.gz", b"", ""),
    Input("bad.jsonl.gz", GZIP, ""),
    Input("bad.jsonl.gz", GZIP + GZIP, ""),
    Input("bad.jsonl.gz", GZIP + b"\0" * 100, ""),
    Input("bad.jsonl.gz", gzip.compress(b""), ""),
    Input("bad.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * 5_000_000 + b'"}'), ""),
    Input("bad.jsonl.gz", GZIP + b"rubbish", r"bad\.jsonl\.gz: not a whole gzip file"),
    Input("bad.jsonl.gz", GZIP + GZIP[:20], r"bad\.jsonl\.gz: not a whole gzip file"),
    Input("bad.jsonl.gz", LINES, r"bad\.jsonl\.gz: not a whole gzip file"),
    Input("bad.jsonl.gz", ZSTD, r"bad\.jsonl\.gz: not a whole gzip file"),
    Input("bad.jsonl.gz", gzip.compress(b"\xff"), "can't decode"),
    *(
        Input("bad.jsonl.gz", GZIP[:size], "not a whole gzip file")
        for size in (1, 9, 20, HALF, len(GZIP) - 1)
    ),
    Input("bad.jsonl.zst", b"", ""),
    Input("bad.jsonl.zst", ZSTD, ""),
    Input("bad.jsonl.zst", ZSTD + ZSTD, ""),
    Input("bad.jsonl.zst", zstandard.compress(b""), ""),
    Input("bad.jsonl.zst", zstandard.compress(b'{"text": "' + b"a" * 5_000_000 + b'"}'), ""),
    Input("bad.jsonl.zst", ZSTD + b"rubbish", r"bad\.jsonl\.zst: not a zstd file"),
    Input("bad.jsonl.zst", ZSTD + ZSTD[:20], r"bad\.jsonl\.zst: the zstd file is cut off"),
    Input("bad.jsonl.zst", LINES, r"bad\.jsonl\.zst: not a zstd file"),
    Input("bad.jsonl.zst", GZIP, r"bad\.jsonl\.zst: not a zstd file"),
    *(Input("bad.jsonl.zst", ZSTD[:size], "cut off") for size in (1, 9, 100, len(ZSTD) - 1)),
    # Parquet.
    Input("bad.parquet", PARQUET, ""),
    Input("bad.parquet", CHECKED, ""),
    Input("bad.parquet", CHECKED.replace(b"hab", b"hXb", 1), r"bad\.parquet: row group 0 is damaged.*CRC"),
    Input("bad.parquet", to_parquet(pyarrow.array(TEXTS, pyarrow.large_string())), ""),
    Input("bad.parquet", to_parquet(pyarrow.array(TEXTS * 3).dictionary_encode()), ""),
    Input("bad.parquet", to_parquet(pyarrow.array([], pyarrow.string())), ""),
    Input("bad.parquet", to_parquet(["", "a"]), ""),
    Input("bad.parquet", to_parquet(["a", None]), r"bad\.parquet:2: expected a string .* NoneType"),
    Input("bad.parquet", to_parquet([None, None]), r"bad\.parquet: expected strings .* found null"),
    Input("bad.parquet", to_parquet([1, 2]), "found int64"),
    Input("bad.parquet", to_parquet([1.5]), "found double"),
    Input("bad.parquet", to_parquet([True]), "found bool"),
    Input("bad.parquet", to_parquet([b"a"]), "found binary"),
    Input("bad.parquet", to_parquet([["a"]]), "found list"),
    Input("bad.parquet", to_parquet([{"text": "a"}]), "found struct"),
    Input("bad.parquet", to_parquet(pyarrow.array([7, 7]).dictionary_encode()), "found (dictionary|int64)"),
    Input("bad.parquet", to_parquet(["a"], "body"), r"expected a column \"text\", found \['body'\]"),
    Input("bad.parquet", to_parquet(["a"], "TEXT"), r"expected a column \"text\", found \['TEXT'\]"),
    Input("bad.parquet", to_parquet([b"\xff"], "body"), "expected a column"),
    Input("bad.parquet", b"", "not a parquet file"),
    Input("bad.parquet", b"PAR1", "not a parquet file"),
    Input("bad.parquet", b"PAR1PAR1", "not a parquet file"),
    Input("bad.parquet", LINES, "not a parquet file"),
    Input("bad.parquet", PARQUET[:-1], "not a parquet file"),
    Input("bad.parquet", PARQUET[100:], r"bad\.parquet: "),
    Input("bad.parquet", PARQUET[: len(PARQUET) // 2], "not a parquet file"),
    # Names.
    Input("bad.csv", b"a", "unknown suffix '.csv'. Expected one of .txt"),
    Input("bad.json", b"{}", "unknown suffix"),
    Input("bad", b"{}", "unknown suffix ''"),
    Input("bad.jsonl.bz2", b"{}", "unknown suffix"),
    Input("bad.TXT", b"a", "unknown suffix '.TXT'"),
    Input("a b\u00e9\u4e2d'\"$(x);&.txt", b"text", ""),
    Input("-bad.txt", b"text", ""),
    Input("new\nline.txt", b"text", ""),
    Input("%s{0}.jsonl", b"}", "not valid JSON"),
]
# Places of one byte that is turned over: read as written, or refused, never something else.
FLIPS = [0.0, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999]


@pytest.fixture(scope="module")
def bytes_file(tmp_path_factory) -> Path:
    """The byte tokenizer, which is quick and counts exactly."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    path.write_text(json.dumps(BYTES_FILE))
    return path


@pytest.fixture
def good(tmp_path) -> Path:
    """A file of documents without fault."""
    path = tmp_path / "good.jsonl"
    path.write_bytes(LINES)
    return path


def said(capsys, action: Callable, *arguments) -> str:
    """Return what a command complains about, "" for nothing; other exceptions would be tracebacks."""
    try:
        action(*arguments)
        return ""
    except UserError as error:
        message = str(error)
    except SystemExit as error:
        assert error.code == 2
        message = capsys.readouterr().err
    except OSError as error:  # common.run_command words these
        assert error.filename is not None
        message = f"{error.filename}: {error.strerror}"
    assert 20 < len(message) < LONGEST + (1500 if "usage:" in message else 0)
    return message


def check(found: str, expected: str) -> None:
    """Compare a complaint with a pattern."""
    assert bool(found) == bool(expected), found
    assert re.search(expected, found), found


@pytest.mark.parametrize("case", INPUTS, ids=range(len(INPUTS)))
def test_a_file_is_read_whole_or_refused_in_one_sentence(tmp_path, good, bytes_file, capsys, case):
    """Beside a good file; where nothing is complained about every byte of its text is in the shards."""
    path = tmp_path / case.name
    path.write_bytes(case.content)
    paths = ["--tokenizer", str(bytes_file), "--out", str(tmp_path / "out"), "--num-threads", "1"]
    found = said(capsys, prepare.main, [*paths, "--input", str(good), str(path), "--val-docs", "5"])
    check(found, case.says)
    if found:
        assert not (tmp_path / "out" / "manifest.json").exists()
        return
    texts = [document.text for document in read_documents([good, path])]
    manifest = read_manifest(tmp_path / "out")
    left_out = sum(len(text.encode()) for text in texts[5:] if text in texts[:5])
    total = manifest["train"]["raw_bytes"] + manifest["val"]["raw_bytes"] + left_out
    assert total == sum(len(text.encode()) for text in texts)
    assert manifest["train"]["token_bytes"] == manifest["train"]["raw_bytes"]


@pytest.mark.parametrize("place", FLIPS)
@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl.gz", GZIP), ("x.jsonl.zst", ZSTD), ("x.parquet", PARQUET)]
)
def test_a_damaged_byte_is_noticed_or_did_no_harm(tmp_path, capsys, name, content, place):
    """Checksums find it in compressed files; parquet without them may give other text, but no traceback."""
    (tmp_path / name).write_bytes(flipped(content, place))
    read: list[str] = []
    found = said(capsys, lambda: read.extend(one.text for one in read_documents([tmp_path / name])))
    assert found or read == TEXTS or name == "x.parquet"


# ---- Options ----------------------------------------------------------------------------------------

HUGE = "9" * 5000
PREPARE = [  # options beside --input GOOD --tokenizer BYTES --out OUT, of which the last stands
    ("", ""),
    ("--val-docs 12", "at least one document for train"),
    ("--val-docs 13", "at least one document for train"),
    ("--val-docs 1000000000000", "at least one document for train"),
    (f"--val-docs {HUGE}", "--val-docs: expected a whole number from 1 on"),
    ("--val-docs 99999999999999999999", "--val-docs: expected a whole number from 1 on"),
    ("--val-docs 0", "--val-docs: expected a whole number"),
    ("--val-docs -1", "--val-docs"),
    ("--val-docs 1.5", "--val-docs: expected a whole number"),
    ("--val-docs 5 --val-docs 6", ""),
    ("--val-docs \u0665", ""),
    ("--val-docs", "--val-docs: expected one argument"),
    ("--val-docs 5 --shard-tokens 1000", ""),
    ("--val-docs 5 --shard-tokens 2147483647", ""),
    ("--val-docs 5 --shard-tokens 2147483648", "--shard-tokens: expected at most 2,147,483,647"),
    (f"--val-docs 5 --shard-tokens {HUGE}", "--shard-tokens: expected a whole number"),
    ("--val-docs 5 --shard-tokens 0x10", "--shard-tokens: expected a whole number"),
    ("--val-docs 5 --num-threads 1000000", ""),
    (f"--val-docs 5 --num-threads {HUGE}", "--num-threads: expected a whole number"),
    ("--val-docs 5 --val-input GOOD", "not allowed with"),
    ("--val-input GOOD", "at least one document for train"),
    ("--val-input OTHER", ""),
    ("--val-input EMPTY", r"empty.txt: expected documents, found none"),
    ("--val-input FOLDER", "expected a file, found a folder"),
    ("--val-input NONE", r"none.jsonl: no such file"),
    ("--val-docs 5 --input GOOD GOOD", ""),
    ("--val-docs 5 --input GOOD EMPTY", ""),
    ("--val-docs 5 --input EMPTY GOOD", ""),
    ("--val-docs 5 --input EMPTY EMPTY", "expected documents, found none"),
    ("--val-docs 5 --input FOLDER", "expected a file, found a folder"),
    ("--val-docs 5 --input NONE", r"none.jsonl: no such file"),
    ("--val-docs 5 --input SOCKET", r"socket.txt: found a pipe, socket or device"),
    ("--val-docs 5 --input PIPE", r"pipe.jsonl: found a pipe, socket or device"),
    ("--val-docs 5 --input LOOP", r"loop.txt"),
    ("--val-docs 5 --input DANGLING", r"dangling.txt: no such file"),
    ("--val-docs 5 --input LONG", r"(no such file|too long)"),
    ("--val-docs 5 --input NUL", "no such file"),
    ("--val-docs 5 --input LATIN", "the name is not UTF-8"),
    ("--val-docs 5 --input", "--input: expected at least one argument"),
    ("--val-docs 5 --out GOOD", "this is a file that is read"),
    ("--val-docs 5 --out BYTES", "File exists|Not a directory"),
    ("--val-docs 5 --out GOOD/out", "Not a directory|File exists"),
    ("--val-docs 5 --out NOTHING", "--out: expected a name"),
    ("--val-docs 5 --out LATIN", "the name is not UTF-8"),
    ("--val-docs 5 --out LONG", "too long"),
    ("--val-docs 5 --out FOLDER", ""),
    ("--val-docs 5 --tokenizer NONE", "no such tokenizer file"),
    ("--val-docs 5 --tokenizer GOOD", r"good.jsonl: expected a SentencePiece .model"),
    ("--val-docs 5 --tokenizer FOLDER", "no such tokenizer file"),
    ("--train-filter none", "invalid choice: 'none'"),
    ("--val-docs 5 --train-filter quality", ""),
    ("--val-docs 5 --train-order difficulty --train-docs 3", ""),
    ("--val-docs 5 --train-docs 0", "--train-docs: expected a whole number"),
    ("--val-docs 5 --val-filter quality", "validation documents are scored whole"),
    ("--val-dosc 5", "unrecognized arguments: --val-dosc 5. Did you mean --val-docs"),
    ("--val 5", "unrecognized arguments: --val 5"),
    ("--val-docs=5 extra", "unrecognized arguments: extra"),
]
TOKENIZER = [
    ("train --kind bytes --input GOOD --out new.json", ""),
    (
        "train --kind bytes --input GOOD --vocab-size 261 --out new.json",
        "gives 260",
    ),
    ("train --kind bytes --input GOOD --out new.model", "expected a name that ends in .json"),
    ("train --kind bytes --input GOOD --out FOLDER", "expected a name that ends in .json"),
    ("train --kind bytes --input EMPTY --out new.json", "expected documents, found none"),
    ("train --kind bytes --input NONE --out new.json", "no such file"),
    ("train --kind bytes --input SOCKET --out new.json", "found a pipe, socket or device"),
    ("train --kind byte --input GOOD --out new.json", "invalid choice: 'byte'"),
    ("train --kind bytes --input GOOD --out NOTHING", ""),
    (
        "train --kind bytes --input GOOD --vocab-size 0 --out new.json",
        "--vocab-size: expected a whole number",
    ),
    (f"train --kind bytes --input GOOD --vocab-size {HUGE} --out new.json", "--vocab-size: expected a whole"),
    ("train --kind bytes --input GOOD --transition 300 --out new.json", "for --kind superbpe only"),
    ("train --kind bytelevel --input GOOD --vocab-size 10 --out new.json", "needs at least 257 entries"),
    ("train --kind bese --input GOOD --vocab-size 10 --out new.json", "(10|40) entries"),
    ("verify --tokenizer BYTES --input GOOD --num-threads 1", ""),
    ("verify --tokenizer BYTES --input EMPTY", "expected documents, found none"),
    ("verify --tokenizer BYTES --input GOOD --out BYTES", "this is a file that is read"),
    ("verify --tokenizer BYTES --input GOOD --out GOOD", "this is a file that is read"),
    ("verify --tokenizer BYTES --input GOOD --out FOLDER", "directory|denied"),
    ("verify --tokenizer NONE --input GOOD", "no such tokenizer file"),
    ("verify --tokenizer GOOD --input GOOD", "expected a SentencePiece .model"),
    ("report --tokenizer BYTES --input GOOD", ""),
    ("report --tokenizer BYTES BYTES --input EMPTY", "expected documents, found none"),
    ("report --tokenizer BYTES NONE --input GOOD", "no such tokenizer file"),
    ("report --tokenizer BYTES --input GOOD --model-dim 0", "--model-dim: expected a whole number"),
    ("report --tokenizer BYTES --input GOOD --bits x", "--bits"),
    ("repotr --tokenizer BYTES --input GOOD", "invalid choice: 'repotr'"),
    ("build nothing", "nothing: expected some of"),
]


@pytest.fixture
def place(tmp_path, good, bytes_file) -> Callable[[str], list[str]]:
    """A folder of good and odd files; returns the function that puts their paths into a command line."""
    names = {name: str(tmp_path / file) for name, file in {
        "OTHER": "other.jsonl", "EMPTY": "empty.txt", "FOLDER": "folder", "NONE": "none.jsonl",
        "SOCKET": "socket.txt", "PIPE": "pipe.jsonl", "LOOP": "loop.txt", "DANGLING": "dangling.txt",
        "LONG": "x" * 300 + ".txt", "NUL": "a\0b.txt", "LATIN": os.fsdecode(b"\xe9.txt"), "OUT": "out",
    }.items()} | {"GOOD": str(good), "BYTES": str(bytes_file), "NOTHING": ""}  # fmt: skip
    Path(names["OTHER"]).write_text('{"text": "other"}\n')
    Path(names["EMPTY"]).touch()
    Path(names["FOLDER"]).mkdir()
    if sys.platform != "win32":
        os.mkfifo(names["PIPE"])
        short = socket.socket(socket.AF_UNIX)
        with contextlib.chdir(tmp_path):  # the system bounds the lengths of sockets' names
            short.bind("socket.txt")
        short.close()
        Path(names["LOOP"]).symlink_to(names["LOOP"])
        Path(names["DANGLING"]).symlink_to(names["NONE"])
        Path(tmp_path / "latin").write_bytes(LINES)
        os.rename(tmp_path / "latin", names["LATIN"])

    def fill(words: str) -> list[str]:
        found = []
        for word in words.split():
            name, slash, rest = word.partition("/")
            found.append(names.get(name, name) + slash + rest)
        return found

    return fill


posix_only = pytest.mark.skipif(sys.platform == "win32", reason="pipes, sockets and links of POSIX")


@posix_only
@pytest.mark.parametrize(("words", "says"), PREPARE, ids=range(len(PREPARE)))
def test_options_of_prepare_are_followed_or_refused(tmp_path, place, monkeypatch, capsys, words, says):
    """Before an hour of work, and before anything is written."""
    monkeypatch.chdir(tmp_path)
    few = ["--val-docs", "5"] if not words else []
    options = place("--input GOOD --tokenizer BYTES --out OUT --num-threads 1")
    check(said(capsys, prepare.main, [*options, *few, *place(words)]), says)
    outs = [tmp_path / "out", tmp_path / "folder"]
    assert any((out / "manifest.json").is_file() for out in outs) == (not says)


@posix_only
@pytest.mark.parametrize(("words", "says"), TOKENIZER, ids=range(len(TOKENIZER)))
def test_options_of_the_tokenizer_command_are_followed_or_refused(
    tmp_path, place, bytes_file, monkeypatch, capsys, words, says
):
    """What is read stays as it is."""
    monkeypatch.chdir(tmp_path)
    words = words.replace(" NOTHING", " ./new.json")
    check(said(capsys, tokenizer.main, place(words)), says)
    assert json.loads(bytes_file.read_text()) == BYTES_FILE
    assert (tmp_path / "good.jsonl").read_bytes() == LINES


def test_a_shard_of_one_token_is_refused_before_there_are_too_many_files(
    tmp_path, good, bytes_file, monkeypatch
):
    """Their names have six digits; a file a token would take hours."""
    monkeypatch.setattr(prepare, "MAX_SHARDS", 20)
    options = ["--input", str(good), "--tokenizer", str(bytes_file), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"expected at most 20 shards.* --shard-tokens more than 1"):
        prepare.main([*options, "--val-docs", "5", "--shard-tokens", "1"])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, good, bytes_file, monkeypatch):
    """A log that grows would be cut anywhere, and a file that is replaced be read in two versions."""
    fill = prepare.fill_dataset

    def append_and_fill(*arguments, **named):
        good.write_bytes(LINES + LINES)
        return fill(*arguments, **named)

    monkeypatch.setattr(prepare, "fill_dataset", append_and_fill)
    options = ["--input", str(good), "--tokenizer", str(bytes_file), "--out", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match=r"good\.jsonl: changed while it was read, from [\d,]+ to [\d,]+ bytes"
    ):
        prepare.main([*options, "--val-docs", "5"])
    assert not (tmp_path / "out" / "manifest.json").exists()
    good.write_bytes(LINES)
    before = snapshot([good])
    check_unchanged(before)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_a_line_without_end_is_refused(tmp_path, monkeypatch, name):
    """A few kilobytes of gzip may unpack to more than any memory; it is never held as a whole."""
    monkeypatch.setattr("data.documents.MAX_LINE_BYTES", 100_000)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(b"a" * 200_000))
    with pytest.raises(UserError, match="found a line of over 100,000 bytes"):
        list(read_lines(tmp_path / name))
    assert MAX_LINE_BYTES == 1 << 30


def test_lines_of_chunks_are_those_of_the_stream():
    """In linear time: a document of 50 MB comes in 400 chunks."""
    for text in (b"", b"\n", b"a", b"a\n", b"\n\na\nbc\n\n", b"abc\nd"):
        for size in (1, 2, 3, 10):
            chunks = (text[i : i + size] for i in range(0, len(text), size))
            assert list(split_lines(chunks)) == [line.rstrip(b"\n") for line in io.BytesIO(text)]


# ---- Domains, downloads, training -------------------------------------------------------------------

DOMAINS = [
    ("web=GOOD", ""),
    ("web=OTHER", ""),
    ("web=EMPTY", "empty.txt: expected documents, found none"),
    ("web=NONE", "no such file"),
    ("web=FOLDER", "found a folder"),
    ("web=SOCKET", "found a pipe, socket or device"),
    ("web=", "expected NAME=FILE"),
    ("=GOOD", "expected NAME=FILE"),
    ("GOOD", "expected NAME=FILE"),
    ("web=GOOD web=OTHER", "expected NAME=FILE with different names"),
    ("web=BAD", r"bad.jsonl:1: expected a JSON object with strings under text or question and answer"),
    ("web=DEEP", "recursion depth"),
]


@posix_only
@pytest.mark.parametrize(("words", "says"), DOMAINS, ids=range(len(DOMAINS)))
def test_domains_are_read_or_refused(tmp_path, place, bytes_file, capsys, words, says):
    """The same files, through `python -m eval --domains`."""
    (tmp_path / "bad.jsonl").write_text('{"question": "no answer"}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    choices = []
    for word in words.split():
        name, equals, file = word.partition("=")
        known = {"BAD": "bad.jsonl", "DEEP": "deep.jsonl"}
        file = str(tmp_path / known[file]) if file in known else "".join(place(file))
        choices.append(f"{name}{equals}{file}" if equals else "".join(place(name)))
    codec = load_codec(bytes_file)

    def read():
        for name, path in parse_domains(choices).items():
            domain = read_domain(name, path, codec)
            assert domain.target_bytes.sum() == sum(len(one.text.encode()) for one in read_documents([path]))

    check(said(capsys, read), says)


STATS = {"files_train": 3, "files_val": 1}
ENTRY = {"name": "fineweb10B_sp1024", "tokenizer_name": "t", "stats": STATS}
TOKENIZERS = [{"name": "t", "model_path": "tokenizers/t.model"}]
HUBS = [  # what the hub's manifest.json holds
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "recursion depth"),
    (b"[]", "unknown layout"),
    (b"{}", "not among the published datasets"),
    ({"datasets": 7}, "unknown layout"),
    ({"datasets": [7]}, "unknown layout"),
    ({"datasets": [{}]}, "not among the published datasets"),
    ({"datasets": [ENTRY]}, "not among the published tokenizers"),
    ({"datasets": [ENTRY | {"stats": None}], "tokenizers": TOKENIZERS}, "unknown layout"),
    ({"datasets": [ENTRY | {"stats": {}}], "tokenizers": TOKENIZERS}, "unknown layout"),
    (
        {"datasets": [ENTRY | {"stats": STATS | {"files_val": "x"}}], "tokenizers": TOKENIZERS},
        "unknown layout",
    ),
    (
        {"datasets": [ENTRY | {"stats": STATS | {"files_val": 10**9}}], "tokenizers": TOKENIZERS},
        "10,000 validation",
    ),
    (
        {"datasets": [ENTRY | {"stats": STATS | {"files_val": -1}}], "tokenizers": TOKENIZERS},
        "10,000 validation",
    ),
    ({"datasets": [ENTRY | {"stats": STATS | {"files_train": -1}}], "tokenizers": TOKENIZERS}, "asked for 1"),
    ({"datasets": [ENTRY], "tokenizers": [{"name": "t"}]}, "names no file"),
    ({"datasets": [ENTRY], "tokenizers": [{"name": "t", "path": "../../x"}]}, "leads out of the data folder"),
    ({"datasets": [ENTRY], "tokenizers": [{"name": "t", "path": "/etc/x"}]}, "leads out of the data folder"),
    ({"datasets": [ENTRY], "tokenizers": [{"name": "t", "path": "a\0b"}]}, "leads out of the data folder"),
    ({"datasets": [ENTRY], "tokenizers": [{"name": "t", "path": ["x"]}]}, "unknown layout"),
    ({"datasets": [ENTRY], "tokenizers": TOKENIZERS}, ""),
]
RECORDS = [b"", b"[]", b"{}", b'{"files": 7}', b'{"files": {"a": 7}}', b'{"files": {"a": {"bytes": "x"}}}']


@pytest.fixture
def folder_hub(tmp_path, monkeypatch) -> Path:
    """A folder in the place of the hub."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("tokenizers/t.model", "datasets/fineweb10B_sp1024/fineweb_val_000000.bin",
                 "datasets/fineweb10B_sp1024/fineweb_train_000000.bin"):  # fmt: skip
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(hub / name, np.arange(9))
    monkeypatch.setattr(download, "hub_fetch", lambda _, remote, force=False: hub / remote)
    return hub


@pytest.mark.parametrize(("manifest", "says"), HUBS, ids=range(len(HUBS)))
def test_what_the_hub_says_is_checked(tmp_path, folder_hub, capsys, manifest, says):
    """Its manifest decides which files are asked for and where they are put."""
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder_hub / "manifest.json").write_bytes(content)
    options = ["--train-shards", "1", "--out", str(tmp_path / "out")]
    check(said(capsys, download.main, options), says)


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_record_of_a_download_vouches_for_nothing(tmp_path, folder_hub, capsys, record):
    """Files are fetched again."""
    (folder_hub / "manifest.json").write_text(json.dumps({"datasets": [ENTRY], "tokenizers": TOKENIZERS}))
    path = tmp_path / "out" / "datasets" / "fineweb10B_sp1024" / "download.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(record)
    check(said(capsys, download.main, ["--train-shards", "1", "--out", str(tmp_path / "out")]), "")
    assert len(json.loads(path.read_text())["files"]) == 3


def test_sources_that_cannot_be_parsed_are_left_out_of_the_corpus(tmp_path):
    """Broken links, files of other versions of Python, and nesting that ends Python's parser."""
    for name, content in {
        "a.py": b"(" * 5000,
        "b.py": b"\0",
        "c.py": b"\xff",
        "d.py": b"x = " + b"-" * 200_000 + b"1",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("a.py", "b.py", "c.py", "d.py", "none.py"):
        assert builtin.parse_module(builtin.Module("m", tmp_path / name, False)) == []


@pytest.mark.parametrize("kind", LOADERS)
def test_training_data_without_documents_are_used_with_a_warning(tmp_path, capsys, kind):
    """Nothing in them tells where a document ends: attention and n-grams would cross borders in silence."""
    for bos_id, warned in ((1, True), (5, False)):
        write_shard(tmp_path / "fineweb_train_000000.bin", np.full(100, 5), 10)
        make_loader(tmp_path / "fineweb_train_*.bin", LoaderSettings(kind, 10, bos_id, 0))
        assert ("no BOS (1)" in capsys.readouterr().err) == warned


def test_validation_of_no_bytes_is_refused(tmp_path, bytes_file):
    """BOS alone has bits and no bytes: the score would divide by zero after an hour of training."""
    codec = load_codec(bytes_file)
    settings = SimpleNamespace(data_path=str(tmp_path), tokenizer_path=str(bytes_file), vocab_size=260)
    for tokens, is_text in ((np.full(40, codec.bos_id), False), (np.array([1, 70, 1, 71]), True)):
        write_shard(tmp_path / "fineweb_val_000000.bin", tokens, 260)
        if is_text:
            assert read_validation(settings, codec, "", "").target_bytes.sum() == 2
        else:
            with pytest.raises(UserError, match="expected tokens that stand for text, found 40 of no bytes"):
                read_validation(settings, codec, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("data.prepare", ["--tokenizer", "tokenizers/sp1024", "--out", "OUT", "--input", "BAD"]),
        ("data.prepare", ["--tokenizer", "BAD", "--out", "OUT", "--input", "BAD"]),
        ("data.tokenizer", ["verify", "--tokenizer", "tokenizers/sp1024", "--input", "BAD"]),
        ("data.download", ["--variant", "none", "--out", "OUT"]),
        ("data.staging", ["OUT"]),
    ],
)
def test_a_command_that_refuses_says_so_in_its_last_line(tmp_path, module, options):
    """As a process: one line on standard error, status 1, no traceback."""
    (tmp_path / "bad.jsonl").write_text("[" * 100_000)
    places = {"BAD": str(tmp_path / "bad.jsonl"), "OUT": str(tmp_path / "out")}
    command = [sys.executable, "-m", module, *(places.get(word, word) for word in options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: .+\.\n\Z", done.stderr, re.MULTILINE) and not done.stdout
