"""Artifacts taken apart and put together again with a checksum that is right: what a forger does."""

import hashlib
import json
import zlib
from pathlib import Path

from formats.artifact import ARTIFACT_MAGIC, ARTIFACT_PREFIX, ARTIFACT_VERSION, CHECKSUM_BYTES
from train_gpt import pack_model


def take_apart(blob: bytes) -> tuple[dict, bytes]:
    """Return an artifact's header and its streams back to back."""
    _, _, stored, _ = ARTIFACT_PREFIX.unpack_from(blob)
    header = json.loads(zlib.decompress(blob[ARTIFACT_PREFIX.size : ARTIFACT_PREFIX.size + stored]))
    return header, blob[ARTIFACT_PREFIX.size + stored : -CHECKSUM_BYTES]


def sign(body: bytes) -> bytes:
    """Add the checksum that a body asks for."""
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def put_together(header: dict, streams: bytes) -> bytes:
    """Return a file of this header and these streams with lengths and checksum made right."""
    raw = json.dumps(header).encode()
    packed = zlib.compress(raw, 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed), len(raw))
    return sign(prefix + packed + streams)


def write_artifact(model, cfg, quantized, tokenizer_sha256: str, path: Path) -> list[tuple[str, int]]:
    """Write a quantized model as a run does; returns the ledger [(part, bytes)]."""
    blob, ledger = pack_model(model, cfg, quantized, tokenizer_sha256)
    path.write_bytes(blob)
    return ledger
