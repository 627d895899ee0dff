"""Turn text into token shards with a manifest: `python -m data.prepare --help`.

`write_dataset` is the one writer of datasets; the command below feeds it files, data.builtin feeds it
the built-in corpus. Text passes through in batches, so inputs may be larger than memory.
"""

import argparse
import hashlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import CommandParser, UserError, at_least_one, atomic_file, check_output, run_command, sha256_file
from data.accounts import OTHER_TOKENIZER, ByteCounts, Encoded, add_counts, count_documents, open_account
from data.changes import find_changes, follows_contest
from data.codecs import TokenCodec, load_codec
from data.documents import (
    INPUT_HELP,
    LONG_BYTES,
    Document,
    batched,
    check_inputs,
    check_unchanged,
    read_documents,
    snapshot,
    utf8_chunks,
    utf8_size,
)
from data.seams import NOTED_BYTES, cut, encode_parts, find_seam, note_long
from data.selection import add_selection_options, build_selection
from data.shards import (
    ALL_SHARDS_GLOB,
    MANIFEST_NAME,
    narrow,
    read_manifest,
    write_narrow,
)
from data.staging import staged
from durable.seals import write_sealed

MANIFEST_FORMAT = 1
SHARD_TOKENS = 100_000_000  # the contest's shard length
PARTS_AT_ONCE = 4  # of a long document, in one batch
NUM_AHEAD = 2  # batches in work: one is encoded by the library's threads while Python lays out the other
MIN_VAL_DOCUMENTS = 50
VAL_FRAC = 0.01
DOCS_NAME = "docs_selected.jsonl"  # the contest's text: its first documents are the validation set
DOCS_MANIFEST_NAME = "docs_selected.source_manifest.json"
CONTEST_VAL_DOCS = 50_000
MAX_SHARDS = 10_000
MAX_THREADS = 256
MAX_SHARD_TOKENS = 2**31 - 1  # a shard's header holds no larger number
SIDECAR_SPLIT = "val_bytes"  # the contest's name: fineweb_val_bytes_000000.bin


# ---- Writing ----------------------------------------------------------------------------------------


class ShardWriter:
    """Cut a stream of ids into shards of equal length; documents may cross from one to the next."""

    def __init__(self, out: Path, split: str, shard_tokens: int, vocab_size: int):
        self.out, self.split, self.shard_tokens, self.vocab_size = out, split, shard_tokens, vocab_size
        self.shards: list[dict] = []
        self.waiting: list[np.ndarray] = []  # of the shard's own width: a shard of them is held in memory
        self.num_waiting = 0

    def next_path(self) -> Path:
        """Name the shard that is being filled; raise where there are too many for their names to sort."""
        if len(self.shards) >= MAX_SHARDS:
            raise UserError(
                f"{self.out}: expected at most {MAX_SHARDS:,} shards, found more text than they hold. Give "
                f"--shard-tokens more than {self.shard_tokens:,}."
            )
        return self.out / f"fineweb_{self.split}_{len(self.shards):06d}.bin"

    def add(self, ids: np.ndarray) -> None:
        """Take (N,) ids; write every shard that they fill."""
        while ids.size:
            part, ids = np.split(ids, [self.shard_tokens - self.num_waiting])
            self.waiting.append(narrow(part, self.vocab_size, self.next_path()))
            self.num_waiting += part.size
            if self.num_waiting == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting as the next shard, if anything is."""
        if not self.num_waiting:
            return
        path = self.next_path()
        write_narrow(path, self.waiting)
        entry = {"file": path.name, "tokens": self.num_waiting, "bytes": path.stat().st_size}
        self.shards.append(entry | {"sha256": sha256_file(path)})
        self.waiting, self.num_waiting = [], 0


class Overlap:
    """Remember the validation documents; leave out the training documents that equal one of them.

    Crawls repeat themselves, so a few are natural; a model that trained on them would be scored on what it
    remembers.
    """

    def __init__(self):
        self.val_places: dict[bytes, str] = {}
        self.num_left_out, self.first = 0, ""

    def remember(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass validation documents through, keeping a hash of each."""
        for document in documents:
            self.val_places.setdefault(hash_text(document.text), document.place)
            yield document

    def leave_out(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass the training documents through that are not in validation; count the others."""
        for document in documents:
            val_place = self.val_places.get(hash_text(document.text))
            if val_place is None:
                yield document
            else:
                self.num_left_out += 1
                self.first = self.first or f"{document.place} is {val_place}"


def hash_text(text: str) -> bytes:
    """Hash a document; 16 bytes of SHA-256 keep collisions out of any corpus."""
    digest = hashlib.sha256()
    for chunk in utf8_chunks(text):
        digest.update(chunk)
    return digest.digest()[:16]


def encode_documents(codec: TokenCodec, num_threads: int, batch: list[Document]) -> Encoded:
    """Encode a batch of whole documents."""
    encoded = codec.encode_batch([document.text for document in batch], num_threads)
    bos = np.array([codec.bos_id], dtype=np.int32)
    ids = np.concatenate([part for document_ids in encoded for part in (bos, document_ids)])
    sizes = codec.token_bytes(ids)
    ends = np.cumsum([document_ids.size + 1 for document_ids in encoded])
    counted = np.diff(np.cumsum(sizes, dtype=np.int64)[ends - 1], prepend=0).tolist()
    raw = [len(document.text.encode()) for document in batch]
    check_counts(codec, [document.place for document in batch], raw, counted)
    return Encoded(ids, sizes, count_documents(raw, counted))


def check_counts(codec: TokenCodec, places: list[str], raw: list[int], counted: list[int]) -> None:
    """Raise where a codec that should change nothing miscounts the bytes of a document."""
    if counted != raw and not find_changes(codec):
        at = next(i for i in range(len(raw)) if raw[i] != counted[i])
        raise UserError(
            f"{places[at]}: the tokenizer gives every probe back, but counts {counted[at]} bytes of "
            f"this document of {raw[at]}. {OTHER_TOKENIZER}"
        )


def encode_for_sidecar(codec: TokenCodec, batch: list[Document]) -> Encoded:
    """Encode a batch with sizes that add up to the bytes of each document; slower."""
    documents, sizes, raw = [], [], []
    for document in batch:
        ids, counted = codec.encode_with_bytes(document.text)
        raw.append(len(document.text.encode()))
        if int(counted.sum()) != raw[-1]:
            raise UserError(
                f"{document.place}: the tokenizer keeps nothing of this document of {raw[-1]} bytes, so no "
                "token could count them. Remove it."
            )
        documents += [[codec.bos_id], ids]
        sizes += [[0], counted]
    return Encoded(np.concatenate(documents), np.concatenate(sizes), count_documents(raw, raw))


def plan_jobs(
    codec: TokenCodec, documents: Iterable[Document], num_threads: int, with_bytes: bool
) -> Iterator[tuple[list[Document], Callable]]:
    """Yield documents and what encodes them, in order; a long one has several jobs and ends with the last."""
    whole = partial(encode_documents, codec, num_threads)
    encode = partial(encode_for_sidecar, codec) if with_bytes else whole
    for batch in batched(documents):
        place, text = batch[0].place, batch[0].text
        num_bytes = utf8_size(text)
        parts = cut(text, find_seam(codec) if num_bytes >= LONG_BYTES else None)
        group, is_start = list(itertools.islice(parts, PARTS_AT_ONCE)), True
        if len(group) == 1:  # not cut, as most are not
            if num_bytes >= NOTED_BYTES:
                note_long(place, codec.kind)
            yield batch, partial(encode, batch)
            continue
        while group:
            if max(map(utf8_size, group)) >= NOTED_BYTES:
                note_long(place, codec.kind)
            following = list(itertools.islice(parts, PARTS_AT_ONCE))
            done = [] if following else batch
            yield done, partial(encode_parts, codec, num_threads, with_bytes, group, is_start)
            group, is_start = following, False


def encode_ahead(
    codec: TokenCodec, documents: Iterable[Document], num_threads: int, with_bytes: bool = False
) -> Iterator[Encoded]:
    """Yield documents as tokens, in order, while the next ones are encoded.

    A long document comes in several rows, of which the last counts it. with_bytes: sizes are the codec's
    exact count, for its sidecar.
    """
    waiting, raw, counted = deque(), 0, 0  # of a long document so far

    def finish() -> Encoded:
        nonlocal raw, counted
        batch, encoded = waiting.popleft()
        found = encoded.result()
        if found.counts.documents:
            return found
        raw, counted = raw + found.counts.raw_bytes, counted + found.counts.token_bytes
        if not batch:
            return found
        check_counts(codec, [batch[0].place], [raw], [counted])
        ended = count_documents([raw], [counted])._replace(
            raw_bytes=found.counts.raw_bytes, token_bytes=found.counts.token_bytes
        )
        raw = counted = 0
        return found._replace(counts=ended)

    with ThreadPoolExecutor(NUM_AHEAD) as pool:
        for batch, encode in plan_jobs(codec, documents, num_threads, with_bytes):
            waiting.append((batch, pool.submit(encode)))
            if len(waiting) > NUM_AHEAD:
                yield finish()
        while waiting:
            yield finish()


def write_split(
    documents: Iterable[Document],
    codec: TokenCodec,
    writer: ShardWriter,
    num_threads: int,
    sidecar: ShardWriter | None = None,
) -> dict:
    """Encode one split into shards; returns its counts for the manifest.

    `sidecar` writes the bytes of each token, as shards of the same lengths.
    """
    num_tokens, counted = 0, [ByteCounts(0, 0, 0, 0, 0)]
    with tqdm(desc=writer.split, unit="B", unit_scale=True, mininterval=1.0) as progress:
        for ids, sizes, found in encode_ahead(codec, documents, num_threads, sidecar is not None):
            writer.add(ids)
            if sidecar:
                sidecar.add(sizes)
            num_tokens += ids.size
            counted.append(found)
            progress.update(found.raw_bytes)
    writer.flush()
    total = add_counts(counted)
    if not total.documents:
        raise UserError(
            f"expected at least one document for {writer.split}, found none that is kept. "
            "Give more input, or a smaller --val-docs."
        )
    account = open_account(codec, total)
    if writer.split == "val" and account.invalid:
        raise UserError(f"{codec.path}: {account.invalid}. {OTHER_TOKENIZER}")
    counts = {"documents": [0, total.documents], "tokens": num_tokens}
    counts = total._asdict() | counts | {"byte_account": str(account), "shards": writer.shards}
    if sidecar:
        sidecar.flush()
        counts["sidecars"] = sidecar.shards
    return counts


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
    elif any(out.glob(ALL_SHARDS_GLOB)):
        raise UserError(
            f"{out}: holds shards without a {MANIFEST_NAME}, which this command did not write. "
            "Choose another --out folder, or delete this one."
        )


def write_dataset(
    out: str | Path, codec, train: Iterable[Document], val: Iterable[Document], sources: dict, **settings
) -> dict:
    """Do what `fill_dataset` does and replace the dataset that `out` may hold; returns the manifest."""
    with staged(out) as staging:
        check_folder(Path(out), codec.digest)
        return fill_dataset(staging, codec, train, val, sources, **settings)


def fill_dataset(
    out: Path,
    codec,
    train: Iterable[Document],
    val: Iterable[Document],
    sources: dict,
    *,
    split: str = "separate_input",
    shard_tokens: int = SHARD_TOKENS,
    num_threads: int | None = None,
) -> dict:
    """Write both splits as shards and, last, the manifest, which is returned; `out` is an empty folder.

    `val` is read to its end before `train` starts, so both may come from one stream. With split
    "first_documents" train's document numbers continue where val's end, otherwise both count from 0.
    """
    num_threads = min(num_threads or os.cpu_count(), MAX_THREADS)
    overlap = Overlap()
    writers = [ShardWriter(out, name, shard_tokens, codec.vocab_size) for name in ("val", "train")]
    sidecar = ShardWriter(out, SIDECAR_SPLIT, shard_tokens, 1 << 16) if codec.needs_sidecar else None
    val_counts = write_split(overlap.remember(val), codec, writers[0], num_threads, sidecar)
    train_counts = write_split(overlap.leave_out(train), codec, writers[1], num_threads)
    train_counts["left_out"] = overlap.num_left_out
    if overlap.num_left_out:
        print(
            f"note: left out {overlap.num_left_out:,} training documents that are also in validation; "
            f"the first: {overlap.first}",
            file=sys.stderr,
        )
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
    with atomic_file(out / codec.path.name) as file:
        file.write(codec.path.read_bytes())
    return write_manifest(out, manifest)


def write_manifest(out: Path, manifest: dict) -> dict:
    """Write a dataset's manifest with its own digest; returns both."""
    return write_sealed(out / MANIFEST_NAME, manifest)


def describe_codec(codec) -> dict:
    """Name the tokenizer of a dataset: enough to refuse any other."""
    return {
        "kind": codec.kind,
        "file": codec.path.name,
        "sha256": codec.digest,
        "vocab_size": codec.vocab_size,
        "bos_id": codec.bos_id,
        "lossless": not find_changes(codec),
        "by_contest_rule": follows_contest(codec),
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
    for split in ("train", "val"):
        print(f"{split:<6}{manifest[split].get('byte_account', 'not accounted for, an older manifest')}")


# ---- Command ----------------------------------------------------------------------------------------


def is_contest_text(file: str) -> bool:
    """Tell whether a file is the contest's text, compressed or not."""
    return Path(file).name.startswith(DOCS_NAME)


def choose_val_docs(files: list[str]) -> int:
    """Default number of validation documents: the contest's for its text, else a share of the input.

    The share takes one reading of all input, which also checks it.
    """
    if is_contest_text(files[0]):
        return CONTEST_VAL_DOCS
    total = sum(1 for _ in tqdm(read_documents(files), desc="count", unit=" documents", mininterval=1.0))
    return max(MIN_VAL_DOCUMENTS, int(total * VAL_FRAC))


def note_other_validation(options: argparse.Namespace) -> None:
    """Say so where the contest's text is given another validation set than the contest's."""
    is_contests = is_contest_text(options.input[0]) and options.val_docs in (None, CONTEST_VAL_DOCS)
    if any(map(is_contest_text, options.input)) and (options.val_input or not is_contests):
        print(
            f"note: the contest's validation set is the first {CONTEST_VAL_DOCS:,} documents of {DOCS_NAME}; "
            "scores on this one compare with none of its records",
            file=sys.stderr,
        )


def describe_files(files: list[str]) -> list[dict]:
    """Name and size of each input for the manifest; folders stay out of it."""
    return [{"file": Path(path).name, "bytes": Path(path).stat().st_size} for path in files]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m data.prepare",
        description="Tokenize your own text into training and validation shards.",
        epilog="Then train on the folder, which has the tokenizer too: DATA_PATH=DIR python train_gpt.py",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    choice = parser.add_mutually_exclusive_group()
    kept = "validation text; what is also in --input is left out"
    choice.add_argument("--val-input", nargs="+", metavar="FILE", help=kept)
    first = (
        "take the first N documents of --input for validation "
        f"(default: {CONTEST_VAL_DOCS:,} of {DOCS_NAME}, else the larger of 50 and 1 percent)"
    )
    choice.add_argument("--val-docs", type=at_least_one, metavar="N", help=first)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer file or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for shards and manifest.json")
    counts = {"shard-tokens": (SHARD_TOKENS, "tokens a shard"), "num-threads": (os.cpu_count(), "threads")}
    for name, (default, meaning) in counts.items():
        text = f"{meaning} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=at_least_one, default=default, metavar="N", help=text)
    add_selection_options(parser)
    parser.add_argument("--val-filter", "--val-order", dest="val_selection", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.shard_tokens > MAX_SHARD_TOKENS:
        parser.error(f"argument --shard-tokens: expected at most {MAX_SHARD_TOKENS:,}")
    if options.val_selection:
        raise UserError(
            "validation documents are scored whole and in their order, or the score compares with no other: "
            "found an option that selects them. --train-filter and --train-order select training documents."
        )
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(argv)
    files = options.input + (options.val_input or [])
    check_inputs(files)
    check_output(options.out, files)
    codec = load_codec(options.tokenizer)
    note_other_validation(options)
    with staged(options.out) as staging:  # from here on, so that a second writer is refused before it reads
        check_folder(Path(options.out), codec.digest)
        manifest = prepare(options, codec, staging)
    print_table(options.out, manifest)


def prepare(options: argparse.Namespace, codec: TokenCodec, staging: Path) -> dict:
    """Do what the options say in an empty folder; returns the manifest."""
    files = snapshot(options.input + (options.val_input or []))
    sources = {"input": describe_files(options.input)}
    train = read_documents(options.input)
    if options.val_input:
        split, val = "separate_input", read_documents(options.val_input)
        sources["val_input"] = describe_files(options.val_input)
    else:
        num_val = options.val_docs or choose_val_docs(options.input)
        split, val = "first_documents", itertools.islice(train, num_val)
    selection = build_selection(options)
    sources["train_selection"] = selection.facts
    sizes = {"shard_tokens": options.shard_tokens, "num_threads": options.num_threads}
    manifest = fill_dataset(staging, codec, selection.apply(train), val, sources, split=split, **sizes)
    check_unchanged(files)
    return manifest


if __name__ == "__main__":
    run_command(main)
