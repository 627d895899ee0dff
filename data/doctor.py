"""Examine a dataset folder and name what is wrong with it: `python -m data.doctor DIR`.

Every check reads the shards themselves and compares them with the manifest, the tokenizer and each other.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import CommandParser, UserError, run_command, sha256_file
from data.accounts import open_account, stated_counts
from data.codecs import TokenCodec, read_codec
from data.prepare import CONTEST_VAL_DOCS
from data.shards import (
    ALL_SHARDS_GLOB,
    MANIFEST_NAME,
    RECORD_NAME,
    check_in_place,
    read_manifest,
    read_shard,
    stated_hashes,
)

SPLITS = ("train", "val")
SIDECAR_MARK = "_bytes_"
WINDOW = 64  # tokens of a shingle
ROUNDS = WINDOW.bit_length() - 1  # doublings from one token to a window
BASE = 0x9E3779B97F4A7C15  # odd, of 64 random-looking bits
FILTER_BITS = 20
BLOCK_TOKENS = 1 << 22
OVERLAP_SHARE = 0.5  # of a document's windows; below it a passage is common, not the document
NUM_NAMED = 5  # places that a finding names
# The contest's validation set: its first 50,000 documents, whatever the tokenizer.
CONTEST_BYTES = (151_060_000, 151_100_000)


class ShardFinding(NamedTuple):
    """The outcome of one check: ok, FAIL, skipped, labelled (as scores are), or note (no fault)."""

    check: str
    state: str
    detail: str


def judge(check: str, problems: list[str], good: str) -> ShardFinding:
    """Make a finding of a list of problems; an empty one is good."""
    more = f" and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
    return ShardFinding(check, "FAIL" if problems else "ok", "; ".join(problems[:NUM_NAMED]) + more or good)


class Dataset:
    """The shards of a folder that can be read, by split, with its manifest and tokenizer."""

    def __init__(self, folder: Path, codec: TokenCodec | None):
        self.folder, self.codec = folder, codec
        self.manifest = read_manifest(folder)
        self.unreadable: list[str] = []
        self.shards = {split: self.read(f"fineweb_{split}_*.bin", False) for split in SPLITS}
        self.sidecars = self.read("fineweb_val_bytes_*.bin", True)
        stated = (self.manifest or {}).get("tokenizer", {})
        self.vocab_size = codec.vocab_size if codec else stated.get("vocab_size")
        self.bos_id = codec.bos_id if codec else stated.get("bos_id", 1)

    def read(self, pattern: str, is_sidecar: bool) -> dict[str, np.ndarray]:
        """Map the shards of a pattern; what cannot be read is remembered and left out."""
        found = {}
        for path in sorted(self.folder.glob(pattern)):
            if (SIDECAR_MARK in path.name) != is_sidecar:
                continue
            try:
                found[path.name] = read_shard(path)
            except UserError as error:
                self.unreadable.append(str(error))
        return found

    def stated(self, split: str) -> dict:
        """Take a split's part of the manifest."""
        return (self.manifest or {}).get(split, {})

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Yield (N,) uint32 blocks that begin with BOS and hold whole documents."""
        waiting = np.zeros(0, dtype=np.uint32)
        for shard in self.shards[split].values():
            for first in range(0, shard.size, BLOCK_TOKENS):
                waiting = np.concatenate([waiting, shard[first : first + BLOCK_TOKENS].astype(np.uint32)])
                starts = np.flatnonzero(waiting == self.bos_id)
                if starts.size and starts[-1] > 0:
                    yield waiting[: starts[-1]]
                    waiting = waiting[starts[-1] :]
        if waiting.size:
            yield waiting


# ---- Files ------------------------------------------------------------------------------------------


def check_files(dataset: Dataset) -> ShardFinding:
    """Every shard has a whole header and as many tokens as it says; both splits have one."""
    problems = list(dataset.unreadable)
    try:
        check_in_place(dataset.folder)
    except UserError as error:
        problems.append(str(error))
    problems += [f"no {split} shard" for split in SPLITS if not dataset.shards[split]]
    count = sum(len(shards) for shards in dataset.shards.values()) + len(dataset.sidecars)
    return judge("files", problems, f"{count} shards")


def check_manifest(dataset: Dataset) -> ShardFinding:
    """The shards are those of the manifest or, without one, of data.download's record, byte for byte."""
    try:
        stated = stated_hashes(dataset.folder)
    except UserError as error:
        return judge("manifest", [str(error)], "")
    hashes = {name: sha256 for name, sha256 in stated.items() if Path(name).match(ALL_SHARDS_GLOB)}
    if dataset.manifest is None and not hashes:
        return ShardFinding("manifest", "skipped", f"neither {MANIFEST_NAME} nor {RECORD_NAME}")
    present = {path.name for path in dataset.folder.glob(ALL_SHARDS_GLOB)}
    problems = []
    for name, sha256 in hashes.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif sha256_file(dataset.folder / name) != sha256:
            problems.append(f"{name} is not the file that was written (sha256)")
    problems += [f"{name} is not in the manifest" for name in sorted(present - hashes.keys())]
    return judge("manifest", problems, f"{len(hashes)} files as written")


def check_tokenizer(dataset: Dataset) -> ShardFinding:
    """The tokenizer is the one that the manifest names, and every id is one of its own."""
    problems = []
    stated = (dataset.manifest or {}).get("tokenizer", {})
    if dataset.codec and stated and stated.get("sha256") != dataset.codec.digest:
        problems.append(f"expected sha256 {stated.get('sha256')}, found {dataset.codec.digest}")
    if dataset.vocab_size is None:
        return ShardFinding("tokenizer", "skipped", "no manifest; give --tokenizer")
    for shards in dataset.shards.values():
        for name, shard in shards.items():
            if shard.size and int(shard.max()) >= dataset.vocab_size:
                problems.append(f"{name}: id {int(shard.max())} of {dataset.vocab_size}")
    return judge("tokenizer", problems, f"ids below {dataset.vocab_size}")


# ---- Documents --------------------------------------------------------------------------------------


def check_documents(dataset: Dataset, split: str) -> ShardFinding:
    """The split begins with BOS, no document is empty, and BOS are as many as documents."""
    problems, count, previous = [], 0, None
    for name, shard in dataset.shards[split].items():
        is_bos = shard == dataset.bos_id
        if previous is None and shard.size and not is_bos[0]:
            problems.append(f"{name} does not begin with BOS {dataset.bos_id}")
        doubled = np.flatnonzero(is_bos & np.concatenate([[bool(previous)], is_bos[:-1]]))
        problems += [f"{name}: BOS twice at token {at}" for at in doubled.tolist()]
        count += int(is_bos.sum())
        previous = is_bos[-1] if shard.size else previous
    if previous:
        problems.append("the last document is empty")
    first, last = dataset.stated(split).get("documents", (0, count))
    if count != last - first:
        problems.append(f"expected {last - first:,} documents, found {count:,} BOS")
    return judge(f"{split} documents", problems, f"{count:,}")


def count_split_bytes(dataset: Dataset, split: str) -> int | None:
    """Add up the bytes of a split's tokens, by the sidecar where there is one; None without a way to."""
    if split == "val" and dataset.sidecars:
        return sum(int(shard.sum(dtype=np.int64)) for shard in dataset.sidecars.values())
    if dataset.codec is None or (split == "val" and dataset.codec.needs_sidecar):
        return None
    total, last = 0, np.array([dataset.bos_id])
    for shard in dataset.shards[split].values():
        in_range = shard[shard < dataset.vocab_size].astype(np.int32)  # check_tokenizer reports the others
        total += int(dataset.codec.token_bytes(np.concatenate([last, in_range]))[1:].sum(dtype=np.int64))
        last = in_range[-1:] if in_range.size else last
    return total


def check_totals(dataset: Dataset, split: str) -> ShardFinding:
    """Tokens and their bytes add up to the manifest's, or to the contest's 50,000 documents."""
    stated = dataset.stated(split)
    tokens = sum(shard.size for shard in dataset.shards[split].values())
    found = count_split_bytes(dataset, split)
    problems = []
    if stated and tokens != stated["tokens"]:
        problems.append(f"expected {stated['tokens']:,} tokens, found {tokens:,}")
    if stated and found is not None and found != stated["token_bytes"]:
        problems.append(f"expected {stated['token_bytes']:,} bytes, the tokens have {found:,}")
    if split == "val" and not stated and found is not None:
        documents = sum(int((shard == dataset.bos_id).sum()) for shard in dataset.shards[split].values())
        if documents == CONTEST_VAL_DOCS and not CONTEST_BYTES[0] <= found <= CONTEST_BYTES[1]:
            problems.append(f"the contest's 50,000 documents have 151.06 to 151.10 MB, found {found:,} bytes")
    size = "bytes not counted: give --tokenizer" if found is None else f"{found:,} bytes"
    return judge(f"{split} totals", problems, f"{tokens:,} tokens, {size}")


def check_account(dataset: Dataset) -> ShardFinding:
    """The validation tokens count no more bytes than their text has; what the tokenizer changes is named."""
    found = count_split_bytes(dataset, "val")
    if found is None or dataset.codec is None:
        return ShardFinding("byte account", "skipped", "bytes not counted: give --tokenizer")
    account = open_account(dataset.codec, stated_counts(dataset.stated("val"), found))
    state = "FAIL" if account.invalid else "labelled" if account.not_comparable else "ok"
    return ShardFinding("byte account", state, str(account))


def check_sidecars(dataset: Dataset) -> ShardFinding:
    """Sidecars are as long as their shards, count nothing at BOS and add up to the raw text."""
    if not dataset.sidecars:
        needed = dataset.codec is not None and dataset.codec.needs_sidecar
        return ShardFinding("sidecars", "FAIL" if needed else "skipped", "none beside the validation shards")
    problems = []
    for name, shard in dataset.shards["val"].items():
        sizes = dataset.sidecars.get(name.replace("val_", "val_bytes_"))
        if sizes is None or sizes.size != shard.size:
            found = "none" if sizes is None else f"{sizes.size:,}"
            problems.append(f"{name}: expected {shard.size:,} sizes, found {found}")
        elif sizes[shard == dataset.bos_id].any():
            problems.append(f"{name}: BOS counts bytes")
    total, raw_bytes = count_split_bytes(dataset, "val"), dataset.stated("val").get("raw_bytes")
    if raw_bytes is not None and total != raw_bytes:
        problems.append(f"expected {raw_bytes:,} bytes of text, found {total:,}")
    return judge("sidecars", problems, f"{total:,} bytes")


# ---- Overlap ----------------------------------------------------------------------------------------


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash the WINDOW tokens from each place of (N,) uint32 tokens: (N - WINDOW + 1,) uint64.

    A polynomial modulo 2**64 by doubling: the hash of 2k tokens is that of k, times BASE**k, plus that of
    the next k.
    """
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(BASE)
    for i in range(ROUNDS):
        factor = np.uint64(pow(BASE, 1 << i, 1 << 64))
        hashes = hashes[: -(1 << i)] * factor + hashes[1 << i :]
    return hashes * np.uint64(BASE)


def split_documents(block: np.ndarray, bos_id: int) -> list[np.ndarray]:
    """Cut a block at its BOS; each document without it."""
    starts = np.flatnonzero(block == bos_id)
    return [part[part != bos_id] for part in np.split(block, starts[starts > 0])]


def hash_document(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class ValidationIndex:
    """The validation documents: a hash of each, and of its windows one after the other."""

    def __init__(self, dataset: Dataset):
        self.places: dict[bytes, int] = {}
        windows, owners, self.count = [], [], 0
        for block in dataset.documents("val"):
            for tokens in split_documents(block, dataset.bos_id):
                self.places.setdefault(hash_document(tokens), self.count)
                if tokens.size >= WINDOW:
                    windows.append(window_hashes(tokens)[::WINDOW])
                    owners.append(np.full(windows[-1].size, self.count))
                self.count += 1
        flat = np.concatenate([np.zeros(0, np.uint64), *windows])
        self.hashes, self.inverse = np.unique(flat, return_inverse=True)
        self.owners = np.concatenate([np.zeros(0, np.int64), *owners])
        self.found = np.zeros(self.hashes.size, dtype=bool)
        self.filter = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.filter[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def look_up(self, block: np.ndarray) -> None:
        """Mark the validation windows that a block of training tokens holds at any place."""
        if block.size < WINDOW or not self.hashes.size:
            return
        hashes = window_hashes(block)
        hashes = hashes[self.filter[hashes >> np.uint64(64 - FILTER_BITS)]]
        at = np.minimum(np.searchsorted(self.hashes, hashes), self.hashes.size - 1)
        self.found[at[self.hashes[at] == hashes]] = True

    def shares(self) -> np.ndarray:
        """Tell which part of each validation document's windows was found: (documents,) float64."""
        totals = np.bincount(self.owners, minlength=self.count)
        found = np.bincount(self.owners, weights=self.found[self.inverse], minlength=self.count)
        return found / np.maximum(totals, 1)


def check_overlap(dataset: Dataset) -> list[ShardFinding]:
    """No validation document is in training, whole or in most of its windows.

    Passages that both hold (licences, menus) are natural: they are a note.
    """
    index = ValidationIndex(dataset)
    copies, number = {}, 0
    for block in dataset.documents("train"):
        index.look_up(block)
        for tokens in split_documents(block, dataset.bos_id):
            place = index.places.get(hash_document(tokens))
            if place is not None:
                copies.setdefault(place, number)
            number += 1
    shares = index.shares()
    near = [place for place in np.flatnonzero(shares >= OVERLAP_SHARE).tolist() if place not in copies]
    pairs = sorted(copies.items())
    problems = [f"validation document {place} is training document {copy}" for place, copy in pairs]
    problems += [f"training holds {shares[place]:.0%} of validation document {place}" for place in near]
    passages = int(((shares > 0) & (shares < OVERLAP_SHARE)).sum())
    clean = f"none of {index.count:,} validation documents in {number:,} training documents"
    note = f"{passages:,} validation documents share a passage of {WINDOW} tokens with training"
    natural = [ShardFinding("natural duplicates", "note", note)] if passages else []
    return [judge("overlap", problems, clean), *natural]


# ---- Command ----------------------------------------------------------------------------------------


def examine(folder: Path, tokenizer: Path | None = None) -> list[ShardFinding]:
    """Run every check on a folder; those that need whole shards are left out where one is broken."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    manifest = read_manifest(folder) or {}
    beside = folder / manifest.get("tokenizer", {}).get("file", "tokenizer.model")
    tokenizer = tokenizer or (beside if beside.is_file() else None)
    dataset = Dataset(folder, read_codec(tokenizer) if tokenizer else None)
    findings = [check_files(dataset), check_manifest(dataset), check_tokenizer(dataset)]
    for split in SPLITS:
        if dataset.shards[split]:
            findings += [check_documents(dataset, split), check_totals(dataset, split)]
    findings += [check_account(dataset), check_sidecars(dataset)]
    return findings + check_overlap(dataset)


def main(argv: list[str] | None = None) -> int:
    """Run the command; status 1 if any check fails."""
    summary = "Examine a dataset folder and name what is wrong with it."
    parser = CommandParser(prog="python -m data.doctor", description=summary)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder with shards")
    add("--tokenizer", type=Path, metavar="FILE", help="file or folder (default: the one beside the shards)")
    add("--json", action="store_true", help="print one JSON object on one line")
    options: argparse.Namespace = parser.parse_args(argv)
    findings = examine(options.folder, options.tokenizer)
    failed = sum(finding.state == "FAIL" for finding in findings)
    if options.json:
        rows = [finding._asdict() for finding in findings]
        print(json.dumps({"folder": str(options.folder), "passed": not failed, "findings": rows}))
    else:
        for finding in findings:
            print(f"{finding.check:<20}{finding.state:<9}{finding.detail}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
