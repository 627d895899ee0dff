"""Prove on given text what a tokenizer keeps and that every byte counts once; compare tokenizers.

What a codec should do is stated here a second time, slowly and from the tokenizer's own file, so that an
error in a codec cannot excuse itself.
"""

import base64
import hashlib
import heapq
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import read_json
from data.accounts import count_documents, open_account
from data.changes import find_changes
from data.codecs import TokenCodec
from data.codecs.caseops import CASE_OPERATORS, from_case_operators
from data.documents import Document, batched
from data.prepare import describe_codec
from data.train_tokenizer import HOSTILE_TEXTS
from durable.seals import digest_of

NUM_WORST = 5  # documents that the report names
COUNTED = (
    "documents",
    "raw_bytes",
    "token_bytes",
    "tokens",
    "mismatched_documents",
    "round_trip_failures",
    "undeclared_losses",
)
SPACE = "\u2581"  # as SentencePiece writes it
BESE_KEPT = set("abcdefghijklmnopqrstuvwxyz0123456789 .,\n?'")


# ---- What a codec declares to lose ------------------------------------------------------------------


def sentencepiece_model(codec):
    """Load the codec's model file once more, without the codec."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(codec.path))


def normalised_text(codec) -> Callable[[str], bytes]:
    """Give the function text -> bytes of the text that a normalising model sees."""
    model = sentencepiece_model(codec)

    def normalise(text: str) -> bytes:
        return model.normalize(text).replace(SPACE, " ").encode()

    if codec.kind == "caseops":
        return lambda text: from_case_operators(normalise(codec.transform(text)))
    return normalise


def bese_text(codec) -> Callable[[str], bytes]:
    """Give the function text -> bytes that BESE keeps: lower case, one quote, 0x1A for each other byte."""

    def spell(char: str) -> str:
        lower = "'" if char == '"' else char.lower()
        return lower if char.isascii() and lower in BESE_KEPT else "\x1a" * len(char.encode())

    return lambda text: "".join(map(spell, text)).encode()


def declared_text(codec: TokenCodec) -> Callable[[str], bytes]:
    """Give the function text -> bytes that decode(encode(text)) must be."""
    makers = {"bese": bese_text, "sentencepiece": normalised_text, "caseops": normalised_text}
    if codec.lossless or codec.kind not in makers:
        return str.encode
    return makers[codec.kind](codec)


def expected_bytes(codec: TokenCodec, text: str, declared: bytes) -> int:
    """Count the bytes that the tokens must add up to.

    Those of the text; for a model that normalises, by the contest's rule, those of the normalised text,
    and none for a text that normalises to nothing: it has no tokens, even with a sidecar.
    """
    if not codec.lossless and (codec.kind == "sentencepiece" or not declared):
        return len(declared)
    return len(text.encode())


# ---- What each token must count ---------------------------------------------------------------------


def sentencepiece_sizes(codec) -> list[int]:
    """Size every piece from the model itself: text pieces by their UTF-8, byte pieces 1, others 0."""
    model = sentencepiece_model(codec)
    sizes = []
    for token in range(model.vocab_size()):
        piece = model.id_to_piece(token)
        is_text = not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token))
        if model.is_byte(token):
            size = 1
        elif not is_text or (codec.kind == "caseops" and piece in CASE_OPERATORS):
            size = 0
        elif codec.lossless:
            size = len(piece.replace(SPACE, " ").encode())
        else:  # the contest's rule
            size = piece.startswith(SPACE) + len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        sizes.append(size)
    return sizes


def byte_level_sizes(codec) -> list[int]:
    """Size every entry from the vocabulary file: one byte a character; special entries 0."""
    content = read_json(codec.path)
    if codec.path.name == "vocab.json":
        content = {"model": {"vocab": content}, "added_tokens": []}
    sizes = [0] * codec.vocab_size
    for name, token in content["model"]["vocab"].items():
        sizes[token] = len(name)
    for entry in content["added_tokens"]:
        sizes[entry["id"]] = 0 if entry["special"] else len(entry["content"].encode())
    sizes[codec.bos_id] = 0
    return sizes


def bese_sizes(codec) -> list[int]:
    """Size every id from the file: letters and signs 1, special ids and group marks 0, merges their sum."""
    content = read_json(codec.path)
    sizes = [0] * 4 + [1] * 11 + [0] * 4 + [1] * 21
    for (left, right), _ in content["merges"]:
        sizes.append(sizes[left] + sizes[right])
    return sizes


def byte_sizes(codec) -> list[int]:
    """Size the ids of the byte tokenizer."""
    return [0] * (codec.vocab_size - 256) + [1] * 256


def ranked_sizes(codec) -> list[int]:
    """Size every rank of a .tiktoken file from its base64; the special ids after the ranks as 0."""
    lines = codec.path.read_bytes().split()
    sizes = [len(base64.b64decode(token)) for token in lines[0::2]]
    return sizes + [0] * (codec.vocab_size - len(sizes))


TOKEN_SIZES = {
    "sentencepiece": sentencepiece_sizes,
    "caseops": sentencepiece_sizes,
    "bytelevel": byte_level_sizes,
    "tiktoken": ranked_sizes,
    "bese": bese_sizes,
    "bytes": byte_sizes,
}


def byte_table_errors(codec: TokenCodec) -> list[dict]:
    """List the ids whose size, after an ordinary token, is not what the tokenizer's file says."""
    expected = np.array(TOKEN_SIZES[codec.kind](codec))
    ids = np.empty(2 * codec.vocab_size, dtype=np.int32)
    ordinary = next((ids[0] for ids in map(codec.encode, "ae0.x") if ids.size), codec.bos_id)
    ids[0::2], ids[1::2] = ordinary, np.arange(codec.vocab_size)
    counted = codec.token_bytes(ids)[1::2]
    wrong = np.flatnonzero(counted != expected).tolist()
    return [{"id": i, "expected": int(expected[i]), "counted": int(counted[i])} for i in wrong]


def has_space_token(codec: TokenCodec) -> bool:
    """Tell whether a lone space is one token; without one the contest's rule counts 3 bytes for it."""
    if codec.kind in ("sentencepiece", "caseops"):
        model = sentencepiece_model(codec)
        token = model.piece_to_id(SPACE)
        return not (model.is_unknown(token) or model.is_control(token) or model.is_unused(token))
    return len(codec.encode(" ")) == 1


# ---- Verification -----------------------------------------------------------------------------------


class Tally:
    """Counts over the documents seen so far."""

    def __init__(self, codec: TokenCodec):
        self.codec, self.declared = codec, declared_text(codec)
        self.counts = dict.fromkeys(COUNTED, 0)
        self.worst: list[tuple[int, str, int]] = []  # a heap of (distance, place, raw bytes)
        self.text_hash = hashlib.sha256()
        self.raw_sizes, self.counted_sizes = [], []

    def add(self, documents: list[Document], num_threads: int) -> None:
        """Encode, decode and count documents."""
        encoded = self.codec.encode_batch([document.text for document in documents], num_threads)
        for document, ids in zip(documents, encoded):
            self.add_document(document, ids)

    def add_document(self, document: Document, ids: np.ndarray) -> bool:
        """Compare one document with what comes back; returns whether all is as declared."""
        raw, decoded = document.text.encode(), self.codec.decode(ids)
        declared = self.declared(document.text)
        counted = count_bytes(self.codec, document.text, ids)
        is_counted = counted == expected_bytes(self.codec, document.text, declared)
        found = {
            "documents": 1,
            "raw_bytes": len(raw),
            "token_bytes": counted,
            "tokens": ids.size + 1,  # with BOS
            "mismatched_documents": not is_counted,
            "round_trip_failures": decoded != raw,
            "undeclared_losses": decoded != declared,
        }
        for key, value in found.items():
            self.counts[key] += int(value)
        self.raw_sizes.append(len(raw))
        self.counted_sizes.append(counted)
        self.text_hash.update(hashlib.sha256(raw).digest())
        if decoded != raw:
            heapq.heappush(self.worst, (byte_distance(raw, decoded), document.place, len(raw)))
            if len(self.worst) > NUM_WORST:
                heapq.heappop(self.worst)
        return is_counted and decoded == declared


def count_bytes(codec: TokenCodec, text: str, ids: np.ndarray) -> int:
    """Add up the token bytes of one document with its BOS; by the sidecar where the codec makes one."""
    if codec.needs_sidecar:
        return int(codec.encode_with_bytes(text)[1].sum())
    return int(codec.token_bytes(np.concatenate([[codec.bos_id], ids]).astype(np.int32)).sum())


def byte_distance(first: bytes, second: bytes) -> int:
    """Count the bytes, of any order, that one text has and the other has not: a lower bound of edits."""
    counts = [np.bincount(np.frombuffer(text, np.uint8), minlength=256) for text in (first, second)]
    return int(np.abs(counts[0] - counts[1]).sum())


def verify_codec(codec: TokenCodec, documents: Iterable[Document], num_threads: int = 1) -> dict:
    """Check a codec on documents and on hostile texts; `passed` is true only if all holds.

    A codec that is not lossless passes if what comes back is exactly what it declares to keep.
    """
    tally = Tally(codec)
    with tqdm(desc="verify", unit="B", unit_scale=True, mininterval=1.0) as progress:
        for batch in batched(documents):
            tally.add(batch, num_threads)
            progress.update(tally.counts["raw_bytes"] - progress.n)
    hostile = Tally(codec)
    broken = [one for one in HOSTILE_TEXTS if not hostile.add_document(Document(one, ""), codec.encode(one))]
    report = {"lossless": codec.lossless and not find_changes(codec)} | tally.counts
    account = open_account(codec, count_documents(tally.raw_sizes, tally.counted_sizes))
    report |= {
        "byte_account": account.facts(),
        "hostile_failures": [text[:40] for text in broken],
        "byte_table_errors": byte_table_errors(codec),
        "space_token": has_space_token(codec),
        "bos_bytes": int(codec.token_bytes(np.array([codec.bos_id]))[0]),
        "worst_documents": [
            {"place": place, "raw_bytes": size, "byte_distance": distance}
            for distance, place, size in sorted(tally.worst, reverse=True)
        ],
        "text_sha256": tally.text_hash.hexdigest(),
        "tokenizer": describe_codec(codec),
    }
    failures = ["mismatched_documents", "undeclared_losses", "hostile_failures", "byte_table_errors"]
    failures += ["bos_bytes", *(["round_trip_failures"] if codec.lossless else [])]
    is_sound = report["space_token"] and not account.invalid
    report["passed"] = is_sound and not any(report[key] for key in failures)
    return report | {"digest": digest_of(report)}


# ---- Comparison -------------------------------------------------------------------------------------


def compare_codec(codec: TokenCodec, texts: list[str], model_dim: int, bits: float) -> dict:
    """Measure a codec on texts: length, entropy of tokens, embedding size, speed on one thread."""
    started = time.perf_counter()
    encoded = codec.encode_batch(texts)
    seconds = time.perf_counter() - started
    counts = np.bincount(np.concatenate([*encoded, [codec.bos_id] * len(texts)]), minlength=codec.vocab_size)
    tokens = int(counts.sum())
    share = counts[counts > 0] / tokens
    entropy = float(-(share * np.log2(share)).sum())
    raw_bytes = sum(len(text.encode()) for text in texts)
    return {
        "tokenizer": str(Path(codec.path.parent.name, codec.path.name)),
        "kind": codec.kind,
        "lossless": not find_changes(codec),
        "vocab_size": codec.vocab_size,
        "tokens": tokens,
        "bytes_per_token": raw_bytes / tokens,
        "entropy_bits_per_token": entropy,
        "entropy_bits_per_byte": entropy * tokens / raw_bytes,
        "unused_entries": int((counts == 0).sum()),
        "embedding_bytes": int(np.ceil(codec.vocab_size * model_dim * bits / 8)),
        "tokens_per_second": tokens / seconds,
        "megabytes_per_second": raw_bytes / seconds / 1e6,
    }
