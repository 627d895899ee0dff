"""Data that a bare machine makes by itself: shards of made-up tokens, and a small dataset of real text."""

from pathlib import Path

import numpy as np

from data.builtin import collect_documents, find_standard_library
from data.codecs import load_codec
from data.documents import Document
from data.prepare import write_dataset
from data.shards import MANIFEST_NAME, read_manifest, write_shard
from data.train_tokenizer import train_tokenizer
from dev.gpu_battery.job import Job
from dev.gpu_battery.sizes import get_size
from train_gpt import Config

BOS_ID = 1
NUM_MODULES = 500  # of the standard library that are read for text
BYTES_VOCAB = 260
MEDIAN_TOKENS, SPREAD, SHORTEST, LONGEST = 400, 1.0, 16, 20_000  # of a document; web text in 8,192 pieces


def draw_lengths(rng: np.random.Generator, total: int) -> np.ndarray:
    """Draw lengths of documents that fill at least `total` tokens: lognormal, as the web's are."""
    count = total // SHORTEST + 1
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count), SHORTEST, LONGEST).astype(np.int64)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1]


def draw_tokens(num_tokens: int, vocab_size: int, seed: int) -> np.ndarray:
    """Draw documents of tokens whose frequencies fall as words' do, (num_tokens,) uint16."""
    rng = np.random.default_rng(seed)
    shares = 1.0 / (np.arange(vocab_size - BOS_ID - 1) + 10.0)
    bounds = np.cumsum(shares / shares.sum())
    drawn = np.minimum(np.searchsorted(bounds, rng.random(num_tokens)), len(shares) - 1)
    tokens = (drawn + BOS_ID + 1).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(draw_lengths(rng, num_tokens))])
    tokens[starts[starts < num_tokens]] = BOS_ID
    return tokens


def write_tokens(job: Job, cfg: Config) -> str:
    """Write a training shard for a recipe unless an earlier part did; returns its folder."""
    vocab_size = cfg.data.vocab_size
    folder = Path(job.work) / f"tokens_{vocab_size}"
    path = folder / "fineweb_train_000000.bin"
    if not path.is_file():  # two processes may write it at once: each its own, the same
        write_shard(path, draw_tokens(get_size(job, "shard_tokens"), vocab_size, seed=0), vocab_size)
    return str(folder)


def take_bytes(documents: list[Document], limit: int) -> list[Document]:
    """Take documents from the front up to so many bytes; the last is cut."""
    taken = []
    for document in documents:
        text = document.text.encode()[:limit].decode("utf-8", "ignore")
        if text:
            taken.append(document._replace(text=text))
        limit -= len(text.encode())
        if limit <= 0:
            break
    return taken


def write_text(job: Job) -> Path:
    """Write docstrings of the standard library as a dataset of bytes; returns its folder."""
    folder = Path(job.work) / "text"
    if (folder / MANIFEST_NAME).is_file():
        return folder
    documents = collect_documents(find_standard_library()[:NUM_MODULES])
    train, val = map(take_bytes, documents, get_size(job, "text_bytes"))
    tokenizer = folder / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer([], BYTES_VOCAB, tokenizer, "bytes")
    write_dataset(folder, load_codec(tokenizer), train, val, {"made_by": "dev.gpu_battery"})
    return folder


def data_settings(folder: Path) -> dict[str, str | int]:
    """Return the fields of a recipe that name a dataset folder, as its manifest describes it."""
    tokenizer = (read_manifest(folder) or {})["tokenizer"]
    return {
        "data.data_path": str(folder),
        "data.tokenizer_path": str(folder / tokenizer["file"]),
        "data.tokenizer_kind": tokenizer["kind"],
        "data.vocab_size": tokenizer["vocab_size"],
    }
