"""Fetch the contest's published shards and tokenizer: `python -m data.download --help`.

Every file is checked by size, header and SHA-256 before it takes its name, and again before a later
run trusts it. Files take the contest's layout below --out: datasets/NAME/, tokenizers/, manifest.json, and
docs_selected.jsonl, the text itself.
"""

import argparse
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from common import (
    CommandParser,
    UserError,
    atomic_file,
    check_output,
    parse_json,
    read_json,
    run_command,
    sha256_file,
    write_json,
)
from data.prepare import CONTEST_VAL_DOCS, DOCS_MANIFEST_NAME, DOCS_NAME, MAX_SHARDS
from data.shards import MANIFEST_NAME, RECORD_NAME, read_shard
from durable.lock import lock_folder

DEFAULT_REPO_ID = "willdepueoai/parameter-golf"
DEFAULT_ROOT_PREFIX = "datasets"
DATASET_PREFIX = "fineweb10B_"
DEFAULT_TRAIN_SHARDS = 80  # the contest's own default: 8 billion tokens
NUM_WORKERS = 4
NUM_TRIES = 2
VARIANT = re.compile(r"sp[0-9]+|byte260|caseops8192")
SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub's name for a large file; small ones go by a shorter git hash


class HubSource(NamedTuple):
    """Where a variant was published, under which name, and whether byte sidecars lie beside validation."""

    repo_id: str = DEFAULT_REPO_ID
    name: str = ""  # after DATASET_PREFIX; default: the variant's own
    has_sidecars: bool = False


# The contest's own repository publishes the others.
SOURCES = {
    "sp4096": HubSource("kevclark/parameter-golf"),
    "sp8192": HubSource("kevclark/parameter-golf"),
    "caseops8192": HubSource(
        "romeerp/parameter-golf-caseops-v1", "sp8192_lossless_caps_caseops_v1_reserved", True
    ),
}


def find_source(variant: str) -> HubSource:
    """Return where a variant is published; raise for a name that could be no variant's."""
    if not VARIANT.fullmatch(variant):
        raise UserError(
            f"--variant: expected a name such as caseops8192, sp1024, sp8192 or byte260, found {variant!r}."
        )
    source = SOURCES.get(variant, HubSource())
    return source._replace(name=source.name or variant)


class Hub(NamedTuple):
    """The dataset repository and the folder of it that holds the contest's files."""

    repo_id: str
    prefix: str


class Item(NamedTuple):
    """One file: its name below the prefix, its place below --out, and whether it is a token shard."""

    remote: str
    local: str
    is_shard: bool


def hub_from_environment(repo_id: str) -> Hub:
    """Read the contest's own two variables, the repository's being repo_id unless one says otherwise.

    The only reader of the environment here.
    """
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_ROOT_PREFIX)
    return Hub(os.environ.get("MATCHED_FINEWEB_REPO_ID", repo_id), prefix.strip("/"))


# ---- Fetching ---------------------------------------------------------------------------------------


def hub_fetch(hub: Hub, remote: str, *, force: bool = False) -> Path:
    """Download one file into the hub's cache; returns its path there. Every failure is a UserError."""
    try:
        from huggingface_hub import errors, hf_hub_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise UserError(
            "downloading needs `pip install huggingface_hub`. `make data` needs no network."
        ) from error
    disable_progress_bars()  # one bar over all files says more than one for each of four at once
    name = "/".join(filter(None, (hub.prefix, remote)))
    try:
        return Path(hf_hub_download(hub.repo_id, name, repo_type="dataset", force_download=force))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: cannot reach the hub for dataset {hub.repo_id} ({first_line(error)}). Check the "
            "network, or set HF_ENDPOINT to a mirror, and run this again: finished files are kept. "
            "`make data` needs no network."
        ) from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: not found in dataset {hub.repo_id} ({first_line(error)}). "
            "MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another place; --with-docs "
            "fetches the text, and data.prepare makes shards of it."
        ) from error
    except Exception as error:  # the HTTP library behind it differs between versions of huggingface_hub
        raise UserError(
            f"{name}: the download from dataset {hub.repo_id} failed ({type(error).__name__}: "
            f"{first_line(error)}). Run this again: finished files are kept."
        ) from error


def first_line(error: Exception) -> str:
    """Shorten an error of the hub, which may go on for a page, to its first line."""
    return str(error).strip().partition("\n")[0]


def find_fault(path: Path, sha256: str, item: Item) -> str | None:
    """Say what is wrong with a file that should have this SHA-256, or None."""
    found = sha256_file(path)
    if found != sha256:
        return f"expected sha256 {sha256}, found {found}"
    if item.is_shard:
        try:
            read_shard(path)
        except UserError as error:
            return str(error)
    return None


def fetch_checked(hub: Hub, item: Item) -> tuple[Path, str]:
    """Download a file and check it, once more from scratch if it is damaged; returns path and SHA-256."""
    for attempt in range(NUM_TRIES):
        cached = hub_fetch(hub, item.remote, force=attempt > 0)
        promised = cached.resolve().name  # in the cache a large file is named by its SHA-256
        if not SHA256.fullmatch(promised):
            promised = sha256_file(cached)  # a small file: nothing to compare with
        fault = find_fault(cached, promised, item)
        if fault is None:
            return cached, promised
    raise UserError(
        f"{item.remote}: damaged {NUM_TRIES} times on its way: {fault}. "
        "Run this again later, or set HF_ENDPOINT to another mirror."
    )


def place(cached: Path, target: Path) -> None:
    """Give a cached file its name below --out: a hard link where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        os.link(cached.resolve(), temporary)
    except OSError:  # another file system, or one without links
        with open(cached, "rb") as source, atomic_file(target) as file:
            shutil.copyfileobj(source, file)
        return
    try:
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # a rename onto another link of the same file does nothing


def is_intact(target: Path, item: Item, recorded: dict | None) -> bool:
    """Tell whether an earlier run's file is still what that run recorded."""
    if recorded is None or not target.is_file() or target.stat().st_size != recorded["bytes"]:
        return False
    return find_fault(target, recorded["sha256"], item) is None


# ---- Planning ---------------------------------------------------------------------------------------


def fetch_manifest(hub: Hub) -> dict:
    """Fetch and parse the repository's manifest."""
    path = hub_fetch(hub, MANIFEST_NAME)
    return parse_json(path.read_bytes(), f"{MANIFEST_NAME} of dataset {hub.repo_id}")


def find_entry(manifest: dict, section: str, name: str) -> dict:
    """Find a manifest entry by its name; raise with the names that there are."""
    entries = {entry.get("name"): entry for entry in manifest.get(section, [])}
    if name not in entries:
        raise UserError(f"{name}: not among the published {section}: {', '.join(map(str, entries))}.")
    return entries[name]


def plan_items(
    manifest: dict, dataset_name: str, num_train_shards: int, has_sidecars: bool = False
) -> list[Item]:
    """List the files of a dataset: all of validation, the first training shards, its tokenizer."""
    dataset = find_entry(manifest, "datasets", dataset_name)
    stats = dataset["stats"]
    num_published = int(stats["files_train"])
    if not 0 <= num_train_shards <= num_published:
        raise UserError(
            f"{dataset_name} has {num_published} training shards, asked for {num_train_shards}. "
            f"Choose --train-shards from 0 to {num_published}."
        )
    num_val = int(stats["files_val"])
    if not 0 < num_val <= MAX_SHARDS:
        raise UserError(f"{dataset_name}: expected 1 to {MAX_SHARDS:,} validation shards, found {num_val:,}.")
    counts = {"val": num_val, "val_bytes": num_val if has_sidecars else 0, "train": num_train_shards}
    folder = f"datasets/{dataset_name}"
    names = [f"{folder}/fineweb_{split}_{i:06d}.bin" for split, n in counts.items() for i in range(n)]
    tokenizer = find_entry(manifest, "tokenizers", dataset["tokenizer_name"])
    artifacts = [tokenizer[key] for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    if not artifacts:
        raise UserError(f"{dataset['tokenizer_name']}: the manifest names no file for this tokenizer.")
    files = [Item(name, local_path(name), False) for name in dict.fromkeys(artifacts)]
    return files + [Item(name, name, True) for name in names]


def local_path(artifact: str) -> str:
    """Place a tokenizer file of the manifest in tokenizers/; raise for a path that would lead out of it."""
    parts = PurePosixPath(artifact).parts
    if not parts or parts[0] == "/" or ".." in parts or not artifact.isprintable():
        raise UserError(f"{artifact!r}: the manifest's tokenizer path leads out of the data folder.")
    return str(PurePosixPath("tokenizers", *parts[parts[0] == "tokenizers" :]))


def read_record(path: Path) -> dict:
    """Read what earlier runs wrote and checked; an unreadable record vouches for nothing."""
    try:
        rows = read_json(path)["files"].items()
        return {name: {key: row[key] for key in ("bytes", "sha256")} for name, row in rows}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


class Download:
    """One dataset's files below `out`, with the record of those already checked."""

    def __init__(self, hub: Hub, dataset_name: str, out: Path):
        self.hub, self.out = hub, out
        self.record_path = out / "datasets" / dataset_name / RECORD_NAME
        self.record = read_record(self.record_path)

    def ensure(self, item: Item) -> dict | None:
        """Keep an intact file: None. Fetch any other: its entry for the record."""
        target = self.out / item.local
        if is_intact(target, item, self.record.get(item.local)):
            return None
        cached, sha256 = fetch_checked(self.hub, item)
        place(cached, target)
        return {"bytes": target.stat().st_size, "sha256": sha256}

    def remember(self, item: Item, entry: dict) -> None:
        """Add a file to the record. Called from one thread only."""
        self.record[item.local] = entry
        files = dict(sorted(self.record.items()))
        write_json(self.record_path, {"repo_id": self.hub.repo_id, "files": files})

    def run(self, items: list[Item]) -> int:
        """Handle several files at a time; the first error cancels the waiting ones. Counts the fetched."""
        num_fetched = 0
        with ThreadPoolExecutor(NUM_WORKERS) as pool, tqdm(total=len(items), unit=" files") as progress:
            running = {pool.submit(self.ensure, item): item for item in items}
            try:
                for future in as_completed(running):
                    entry = future.result()
                    if entry is not None:
                        self.remember(running[future], entry)
                        num_fetched += 1
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return num_fetched


def check_docs(docs: Path, stated: dict) -> None:
    """Raise unless the text is the one that its own description names, with the official validation."""
    if not isinstance(stated, dict):
        raise UserError(f"{DOCS_MANIFEST_NAME}: expected a JSON object. Delete it and run this again.")
    found = {"docs_sha256": sha256_file(docs), "docs_val": CONTEST_VAL_DOCS}
    for key, value in found.items():
        if stated.get(key) != value:
            raise UserError(
                f"{docs}: expected {key} {value}, {DOCS_MANIFEST_NAME} states {stated.get(key)}. "
                "Delete both files and run this again."
            )


def download(
    hub: Hub, variant: str, num_train_shards: int, out: Path, with_docs: bool = False
) -> tuple[int, int]:
    """Bring a variant's files below `out`; returns how many were fetched and how many kept."""
    source = find_source(variant)
    dataset_name = DATASET_PREFIX + source.name
    manifest = fetch_manifest(hub)
    try:
        items = plan_items(manifest, dataset_name, num_train_shards, source.has_sidecars)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{MANIFEST_NAME} of dataset {hub.repo_id}: unknown layout ({error!r:.80}). Name another dataset "
            "by MATCHED_FINEWEB_REPO_ID."
        ) from error
    docs = [DOCS_NAME, DOCS_MANIFEST_NAME] if with_docs else []
    items += [Item(name, name, False) for name in docs]
    with lock_folder(out / "datasets" / dataset_name):
        write_json(out / MANIFEST_NAME, manifest)
        num_fetched = Download(hub, dataset_name, out).run(items)
    if with_docs:
        check_docs(out / DOCS_NAME, read_json(out / DOCS_MANIFEST_NAME))
    return num_fetched, len(items) - num_fetched


# ---- Command ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(
        formatter_class=argparse.HelpFormatter,
        prog="python -m data.download",
        description="Download the contest's published token shards and tokenizer. Files are checked; run it "
        "again after an interruption and it continues where it stopped.",
        epilog="A training shard is about 200 MB, the text 48 GB. sp4096, sp8192 and caseops8192 come from "
        "the repositories that records used. The repository can be changed with MATCHED_FINEWEB_REPO_ID "
        "and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, the server with HF_ENDPOINT.",
    )
    add = parser.add_argument
    kinds = "tokenizer: sp1024, sp4096, sp8192, caseops8192, byte260 (default: %(default)s)"
    add("--variant", default="sp1024", help=kinds)
    add("--with-docs", action="store_true", help="also the text, docs_selected.jsonl, to tokenize anew")
    shards = "training shards to fetch, from the first on (default: %(default)s)"
    add("--train-shards", type=int, default=DEFAULT_TRAIN_SHARDS, metavar="N", help=shards)
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(argv)
    check_output(options.out, [])
    source = find_source(options.variant)
    hub = hub_from_environment(source.repo_id)
    wanted = options.variant, options.train_shards, options.out, options.with_docs
    num_fetched, num_kept = download(hub, *wanted)
    dataset = options.out / "datasets" / (DATASET_PREFIX + source.name)
    print(f"{dataset}: {num_fetched} files fetched, {num_kept} checked and kept")


if __name__ == "__main__":
    run_command(main)
