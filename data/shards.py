"""Token shards in the contest's file format, and their manifest.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) and then the tokens,
little-endian: uint16 in version 1, the contest's; uint32 in version 2, for vocabularies above 65,536.
Each document in it starts with the tokenizer's BOS id.
"""

import glob
from pathlib import Path

import numpy as np

from common import UserError, atomic_file, read_json
from durable.seals import digest_of, read_sealed

SHARD_MAGIC = 20240520
SHARD_DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # version -> tokens; the narrowest first
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
TRAIN_GLOB = "fineweb_train_*.bin"
VAL_GLOB = "fineweb_val_*.bin"
ALL_SHARDS_GLOB = "fineweb_*.bin"
MANIFEST_FIELDS = {"kind": "tokenizer_kind", "vocab_size": "vocab_size"}  # its key -> data field
MANIFEST_NAME = "manifest.json"
RECORD_NAME = "download.json"  # what data.download fetched and checked
READY_NAME = ".ready"  # holds a finished dataset while data.staging puts its files in place
REPORT_NAME = "tokenizer_report.json"  # what `python -m data.tokenizer verify --out` found, beside shards


def shard_version(vocab_size: int) -> int:
    """Choose the narrowest version whose tokens hold every id of a vocabulary."""
    return next(version for version, dtype in SHARD_DTYPES.items() if vocab_size <= np.iinfo(dtype).max + 1)


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int = 65_536) -> None:
    """Write (N,) token ids below vocab_size as one shard, whole or not at all."""
    write_narrow(path, [narrow(np.asarray(tokens), vocab_size, path)])


def narrow(tokens: np.ndarray, vocab_size: int, path: str | Path) -> np.ndarray:
    """Return (N,) token ids as a shard stores them; raise, naming the shard, for one beyond vocab_size."""
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise UserError(
            f"{path}: token ids must be in [0, {vocab_size - 1}] for a vocabulary of {vocab_size:,}, "
            f"found [{tokens.min()}, {tokens.max()}]. Write them with the tokenizer that made them."
        )
    return tokens.astype(SHARD_DTYPES[shard_version(vocab_size)], order="C")


def write_narrow(path: str | Path, parts: list[np.ndarray]) -> None:
    """Write what `narrow` returned, one or more, as one shard."""
    version = next(version for version, dtype in SHARD_DTYPES.items() if dtype == parts[0].dtype)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, version, sum(part.size for part in parts)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        for part in parts:
            file.write(part.data)


def read_shard(path: str | Path) -> np.ndarray:
    """Map a shard's tokens into memory: (N,) uint16 or uint32, read-only. Header and size are checked."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such shard. Make it with `make data` or data.download.")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    again = "Delete it and make or download it again."
    if header.size != HEADER_INTS:
        raise UserError(
            f"{path}: expected {HEADER_BYTES} header bytes, found {path.stat().st_size} in all. {again}"
        )
    magic, version, num_tokens = (int(value) for value in header[:3])
    if magic != SHARD_MAGIC or version not in SHARD_DTYPES:
        raise UserError(
            f"{path}: expected shard magic {SHARD_MAGIC} version {' or '.join(map(str, SHARD_DTYPES))}, "
            f"found {magic} version {version}. This is not a token shard. {again}"
        )
    dtype = SHARD_DTYPES[version]
    expected = HEADER_BYTES + num_tokens * dtype.itemsize
    found = path.stat().st_size
    if num_tokens < 0 or found != expected:
        raise UserError(
            f"{path}: expected {num_tokens:,} tokens = {expected:,} bytes, found {found:,}. {again}"
        )
    if num_tokens == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def check_token_ids(tokens: np.ndarray, vocab_size: int, where: str | Path) -> None:
    """Raise when an id does not fit the vocabulary (tokens of another tokenizer)."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where}: token id {int(tokens[at])} at position {at} is not below the vocabulary size "
            f"{vocab_size}. The shard was made with another tokenizer; set VOCAB_SIZE or DATA_PATH to match."
        )


def check_stated_shards(files: list[Path], split: str) -> None:
    """Raise unless shards are those of the manifest beside them, by name and size; cheap, reads no token."""
    stated = (read_manifest(files[0].parent) or {}).get(split, {}).get("shards")
    if stated is None:
        return
    expected = {str(entry.get("file")): entry.get("bytes") for entry in stated}
    found = {path.name: path.stat().st_size for path in files}
    for name in sorted(expected.keys() | found.keys()):
        wanted, size = expected.get(name, "none by the manifest"), found.get(name, "none")
        if wanted != size:
            raise UserError(
                f"{files[0].with_name(name)}: expected bytes: {wanted}, found: {size}. `python -m "
                f"data.doctor {files[0].parent}` says more; make the data again."
            )


def check_in_place(folder: str | Path) -> None:
    """Raise for a folder that holds files of two datasets, because a move of data.staging was cut off."""
    if (Path(folder) / READY_NAME).is_dir():
        raise UserError(
            f"{folder}: a new dataset is being put in place. If this was cut off, `python -m data.staging "
            f"{folder}` completes it."
        )


def find_shards(pattern: str | Path) -> list[Path]:
    """List the shards of a glob pattern in name order; at least one. Byte sidecars are left out.

    Raises for a folder in which two datasets lie.
    """
    check_in_place(Path(pattern).parent)
    files = sorted(Path(name) for name in glob.glob(str(pattern)) if "_bytes_" not in Path(name).name)
    if not files:
        raise UserError(
            f"no shards match {pattern}. `make data` writes the built-in corpus, `python -m data.prepare` "
            "your own text, `python -m data.download` the contest's."
        )
    return files


def read_manifest(folder: str | Path) -> dict | None:
    """Read the manifest that lies beside a folder's shards; None where there is none.

    Raises for one that is not as data.prepare wrote it.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    return read_sealed(path, "Make the data again.")


def stated_hashes(folder: Path) -> dict[str, str]:
    """Return {name: sha256} of the shards of a folder, by its manifest or else data.download's record."""
    manifest, record = read_manifest(folder), folder / RECORD_NAME
    try:
        if manifest is not None:
            parts = [manifest.get(split, {}) for split in ("train", "val")]
            entries = [
                entry for part in parts for key in ("shards", "sidecars") for entry in part.get(key, [])
            ]
            rows = [(entry["file"], entry["sha256"]) for entry in entries]
        else:
            files = read_json(record)["files"] if record.is_file() else {}
            rows = [(Path(name).name, entry["sha256"]) for name, entry in files.items()]
        hashes = dict(rows)
    except (AttributeError, KeyError, TypeError):
        rows, hashes = [()], {}
    if len(hashes) < len(rows):
        raise UserError(
            f"{folder}: {MANIFEST_NAME} or {RECORD_NAME} does not state every shard once with its sha256. "
            "Make the data again."
        )
    return hashes


def hash_fault(path: Path, stated: str, found: str) -> str:
    """Say that a file is not the stated one; "" if it is."""
    return "" if found == stated else f"{path}: expected sha256 {stated}, found {found}. Make the data again."


def digest_of_data(folder: Path, pattern: str = TRAIN_GLOB) -> str:
    """Hash what the shards of a pattern are by name, size and stated sha256, and the stated tokenizer.

    Reads no shard; where nothing is stated, names and sizes alone must do.
    """
    hashes = stated_hashes(folder)
    shards = [
        [path.name, path.stat().st_size, hashes.get(path.name)] for path in find_shards(folder / pattern)
    ]
    tokenizer = (read_manifest(folder) or {}).get("tokenizer")
    return digest_of({"shards": shards, "tokenizer": tokenizer})


def stated_tokenizer(folder: str | Path) -> dict:
    """Return the data fields {name: value} that a folder's manifest and the tokenizer beside it state."""
    stated = (read_manifest(folder) or {}).get("tokenizer", {})
    fields = {f"data.{to}": stated[key] for key, to in MANIFEST_FIELDS.items() if key in stated}
    path = Path(folder) / str(stated.get("file", ""))
    return fields | ({"data.tokenizer_path": str(path)} if path.is_file() else {})


def read_report(folder: str | Path, tokenizer_sha256: str) -> str:
    """Return the digest of the tokenizer report beside shards; "none" where there is none.

    Raises for one that was altered, is of another tokenizer or found a fault.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return "none"
    again = "Make it again: python -m data.tokenizer verify --out."
    report = read_sealed(path, again)
    named = report["tokenizer"]["sha256"]
    if named != tokenizer_sha256 or not report["passed"]:
        raise UserError(
            f"{path}: expected a report that passed on tokenizer {tokenizer_sha256[:16]}, found one failed "
            f"or of tokenizer {named[:16]}. {again}"
        )
    return report["digest"]
