"""What the data tests share: small and shared text, small tokenizers, and a hub on this machine."""

import base64
import hashlib
import http.server
import json
import os
import random
import re
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.train_tokenizer import TRAINERS, train_tokenizer

SMALL_VOCAB_SIZE = 400
SIZES = {"bytes": 260, "bytelevel": 400, "superbpe": 420, "caseops": 400, "caseops_spaced": 400, "bese": 120}
WORDS = (
    "the model reads bytes and writes tokens while a small budget of weights learns language from text "
    "def return import class value number 1024 16 = + ; "
    "caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600 e\u0301 x\u3000y"
)


needs_corpora = pytest.mark.skipif(
    "GOLF_CORPORA" not in os.environ, reason="GOLF_CORPORA does not name a folder of shared text"
)


def corpora() -> Path:
    """The folder of shared text and tokenizers, for tests that `needs_corpora` marks."""
    return Path(os.environ["GOLF_CORPORA"])


def shared(name: str) -> Path:
    """The path of a shared tokenizer."""
    return corpora() / "tokenizers" / name


def shared_texts() -> list[str]:
    """The documents of the shared validation text: 4.2 MB of C4."""
    with open(corpora() / "c4_val.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def small_texts(num_texts: int = 60, seed: int = 0) -> list[str]:
    """Make different texts with indents, newlines and characters outside ASCII."""
    rng = random.Random(seed)
    words = WORDS.split(" ")
    return [
        "".join(
            rng.choice(words) + rng.choice((" ", " ", " ", "  ", "\n", "\n    ", "\t")) for _ in range(80)
        )
        + f"end of text {seed}-{i}\n"
        for i in range(num_texts)
    ]


def train_small_tokenizer(folder: Path) -> Path:
    """Train a lossless tokenizer in a folder; takes a quarter of a second."""
    path = folder / "small.model"
    train_tokenizer(small_texts(), SMALL_VOCAB_SIZE, path)
    return path


def titled_texts() -> list[str]:
    """Make texts with capitals."""
    return [text.title() + text for text in small_texts()]


def train_small_kind(kind: str, folder: Path) -> Path:
    """Train a small tokenizer of one of the kinds of SIZES in a folder."""
    path = folder / f"{kind}{TRAINERS[kind].suffix}"
    transition = SIZES[kind] - 20 if kind == "superbpe" else None
    train_tokenizer(titled_texts(), SIZES[kind], path, kind, transition)
    return path


class FakeHub:
    """Serves `files` as every repository, and misbehaves on demand."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.flips: Counter = Counter()  # path -> how many more times it arrives with a flipped byte
        self.stalled_path = ""  # this file stops half way until `released`
        self.stalled, self.released = threading.Event(), threading.Event()
        self.posted: list[str] = []  # what was asked to be written
        self.bodies: Counter = Counter()  # path -> how many times its body was asked for
        hub = self

        class Handler(FakeHubHandler):
            owner = hub

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def etag(self, path: str) -> str:
        """Name a file as the hub does: large ones by SHA-256, others by a git hash."""
        large = path.endswith((".bin", ".model"))
        return (hashlib.sha256 if large else hashlib.sha1)(self.files[path]).hexdigest()


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for a file, HEAD then GET, and takes commits."""

    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Stay silent."""

    def start(self) -> tuple[str, bytes]:
        """Send the head of the answer; returns the file's path and what remains to be sent of it."""
        match = re.fullmatch(r"/(?:datasets/)?[^/]+/[^/]+/resolve/[^/]+/([^?]+).*", self.path)
        path = match[1] if match else ""
        if path not in self.owner.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return path, b""
        body = self.owner.files[path]
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{self.owner.etag(path)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - first))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        return path, body[first:]

    def do_HEAD(self):
        self.start()

    def answer(self, value: dict) -> None:
        """Send JSON."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        """Take a commit of files, which arrive as lines of JSON, without a store for large ones."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.owner.posted.append(self.path)
        if self.path.endswith("/preupload/main"):
            names = [row["path"] for row in json.loads(body)["files"]]
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name} | kinds for name in names]})
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    self.owner.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            where = f"{self.owner.endpoint}/someone/tiny/commit/{'c' * 40}"
            self.answer({"success": True, "commitOid": "c" * 40, "commitUrl": where, "hookOutput": ""})
        else:  # a new repository
            self.answer({"url": f"{self.owner.endpoint}/someone/tiny", "id": "1", "name": "someone/tiny"})

    def do_GET(self):
        path, body = self.start()
        self.owner.bodies[path] += 1
        if self.owner.flips[path] > 0:
            self.owner.flips[path] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        if path == self.owner.stalled_path and not self.owner.released.is_set():
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.owner.stalled.set()
            self.owner.released.wait(30)
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serve_fake_hub():
    """Run a hub on a free port of the loopback interface; no test needs another network."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
