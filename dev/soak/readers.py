"""Everything that reads a file which a run, a person or a stranger wrote: one row a kind, with a sound file.

A sealed kind gives back what was written, or refuses the file in a sentence; any other may also answer.
"""

import base64
import gzip
import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt
from common import UserError, write_json
from data.codecs import load_codec
from data.codecs.bytelevel import byte_symbols
from data.documents import Document, read_documents
from data.intact import ShardVerifier
from data.shards import MANIFEST_NAME, REPORT_NAME, TRAIN_GLOB, VAL_GLOB, find_shards, read_report
from data.train_tokenizer import TRAINERS, train_tokenizer
from data.verify import verify_codec
from dev.soak.place import TINY, VOCAB_SIZE, make_dataset, make_texts
from durable.seals import DIGEST, write_events, write_sealed
from eval import hub
from eval.logs import parse_log
from eval.runs import find_target
from eval.stats import read_scores
from formats.checkpoints import METRICS_NAME, NUMBERED, RESULT_NAME, read_metrics, read_result
from formats.recipe import format_toml, get_recipe, read_recipe, seal_recipe, with_values
from formats.state import read_state, write_state

SAMPLE = "The cat, 42 caf\u00e9s\n"
LOG = """seed:1337
step:100/200 train_loss:2.5000 train_time:1000ms step_avg:10.00ms
step:200/200 val_loss:2.1000 val_bpb:1.2500 train_time:2000ms step_avg:10.00ms
final_int8_zlib_roundtrip val_loss:2.1000 val_bpb:1.2500 eval_time:100ms
final_int8_zlib_roundtrip_exact val_loss:2.10000000 val_bpb:1.25000000
"""


class Reader(NamedTuple):
    """A kind of file: where the sound one lies, what reads it, and whether an altered one must be refused."""

    name: str
    place: str  # below the folder of sound files
    read: Callable[[Path], object]  # what it returns can be compared
    is_sealed: bool


def tiny_config(folder: Path):
    """Resolve a tiny recipe on the sound dataset."""
    return train_gpt.load_config(None, {}, [*TINY, f"data.data_path={folder}"])


# ---- Sound files ------------------------------------------------------------------------------------


def make_run(folder: Path, data: Path) -> None:
    """Write what a run leaves, by the writers that a run uses; the model is not trained."""
    folder.mkdir()
    cfg = tiny_config(data)
    model = train_gpt.build_model(cfg, torch.device("cpu"))
    digest = load_codec(data / "tokenizer.model").digest
    blob = train_gpt.pack_model(model, cfg, train_gpt.quantize_model(model, cfg, {}, len), digest)[0]
    (folder / "artifact.bin").write_bytes(blob)
    (folder / "recipe.toml").write_text(seal_recipe(get_recipe(cfg)), encoding="utf-8")
    (folder / "train.log").write_text(LOG, encoding="utf-8")
    events = [{"kind": kind, "step": step, f"{kind}_loss": 3.0 - step / 10, "train_ms": 10.0 * step}
              for step in (1, 2, 3) for kind in ("train", "val")]  # fmt: skip
    write_events(folder / METRICS_NAME, events)
    arrays = {"model": {"a": np.arange(40.0), "b": [np.arange(3)]}, "optimizers": [{"step": 3, "lr": 0.25}]}
    write_state(folder / NUMBERED.format(3), arrays, {"config_hash": "ab" * 8, "step": "3", "places": "{}"})
    result = {
        "score": {"val_bpb": 1.25, "val_loss": 2.1, "num_tokens": 900, "switch_at": 0},
        "seed": 1337, "steps": 3, "over_limits": [], "ledger": [["code", 25_000], ["weights", 9_000]],
        "places": {"data.data_path": str(data)}, "artifact_sha256": hashlib.sha256(blob).hexdigest(),
        "metrics_crc32": train_gpt.last_seal(folder / METRICS_NAME),
    }  # fmt: skip
    write_sealed(folder / RESULT_NAME, result)


def make_record(folder: Path, run: Path) -> None:
    """Write a record folder as a person submits it."""
    folder.mkdir()
    for name in ("artifact.bin", "train.log"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "README.md").write_text("# A record\n", encoding="utf-8")
    recipe = get_recipe(with_values(train_gpt.Config(), read_recipe(run), "run"))
    (folder / "recipe.toml").write_text(format_toml(recipe), encoding="utf-8")
    digest = hashlib.sha256((folder / "artifact.bin").read_bytes()).hexdigest()
    row = {"val_bpb": 1.25, "val_loss": 2.1, "artifact_sha256": digest, "artifact_bytes": 9000}
    facts = {"name": "A record", "val_bpb": 1.25, "seeds": [1337], "seed_results": {"1337": row}}
    write_json(folder / "submission.json", facts | {"bytes_total": 34_000, "date": "2026-01-01"})


def make_tokenizers(folder: Path) -> None:
    """Train a tokenizer of every kind, and write two that only others train: ranks, vocabulary and merges."""
    texts = make_texts(120, 1)
    for kind, trainer in TRAINERS.items():
        (folder / kind).mkdir(parents=True)
        size = {"bytes": 260, "bese": 60, "bytelevel": VOCAB_SIZE, "superbpe": VOCAB_SIZE}.get(kind, 400)
        train_tokenizer(texts, size, folder / kind / f"tokenizer{trainer.suffix}", kind)
    ranks = "".join(f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
    (folder / "ranks").mkdir()
    (folder / "ranks" / "r50k_base.tiktoken").write_text(ranks, encoding="utf-8")
    (folder / "pairs").mkdir()
    vocab = {char: value for value, char in enumerate([*byte_symbols(), "th", "the"])}
    write_json(folder / "pairs" / "vocab.json", vocab)
    (folder / "pairs" / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")


def make_texts_of_all_kinds(folder: Path) -> None:
    """Write the same documents in every format that data.prepare reads."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    folder.mkdir()
    texts = [*make_texts(12, 3), SAMPLE]
    (folder / "a.txt").write_text("".join(texts), encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    parquet.write_table(table, folder / "a.parquet", row_group_size=5)


def make_sound(folder: Path) -> Path:
    """Write a sound file of every kind; returns the folder."""
    for kind in ("sentencepiece", "caseops"):
        data = make_dataset(folder / kind, kind)
        codec = load_codec(data / "tokenizer.model")
        write_json(data / REPORT_NAME, verify_codec(codec, [Document(text, "") for text in make_texts(5, 9)]))
    make_run(folder / "run", folder / "sentencepiece")
    make_record(folder / "record", folder / "run")
    make_tokenizers(folder / "tokenizers")
    make_texts_of_all_kinds(folder / "texts")
    with torch.random.fork_rng():
        hub.save(
            hub.load(folder / "run" / "artifact.bin", tokenizer=str(folder / "sentencepiece")),
            folder / "saved",
        )
    return folder


# ---- Readers ----------------------------------------------------------------------------------------


def read_dataset(path: Path) -> object:
    """Read a dataset as a run does: manifest, tokenizer, validation, sidecar, training shards."""
    cfg = tiny_config(path.parent)
    text = train_gpt.load_validation(cfg.data)
    report = read_report(path.parent, text.tokenizer_sha256)
    train_gpt.open_loader(cfg, text.bos_id)
    ShardVerifier(find_shards(path.parent / TRAIN_GLOB)).wait()
    return text.tokens.tolist(), text.target_bytes.tolist(), text.raw_bytes, report


def read_checkpoint(path: Path) -> object:
    """Read a checkpoint's state and facts."""
    state, facts = read_state(path)
    return repr(state), facts


def read_weights(path: Path) -> object:
    """Load an artifact."""
    model = train_gpt.load_artifact(path, train_gpt.Config(), torch.device("cpu"))[0]
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def read_saved(path: Path) -> object:
    """Load a saved model with its tokenizer."""
    loaded = hub.load(path.parent)
    hub.open_codec(loaded)
    return {name: param.tolist() for name, param in hub.parameters(loaded).items()}, hub.summary(loaded)


def read_tokenizer(path: Path) -> object:
    """Open a tokenizer and use it."""
    codec = load_codec(path)
    ids = codec.encode(SAMPLE)
    return ids.tolist(), codec.decode(ids), codec.token_bytes(ids).tolist(), codec.vocab_size


def read_record(path: Path) -> object:
    """Find what a record states."""
    target = find_target(path.parent)
    return target.recorded_bpb, target.live


def read_log(path: Path) -> object:
    """Read a log as the audit and the statistics do."""
    parse_log(path.name, path.read_text(encoding="utf-8", errors="replace"))
    return read_scores([path])


def read_written_recipe(path: Path) -> object:
    """Read a recipe that a program wrote; without the line of its digest it is a person's."""
    values = read_recipe(path)
    if DIGEST not in tomllib.loads(path.read_text(encoding="utf-8")):
        raise UserError(f"{path}: whoever took the digest out may change what follows")
    return values


def read_any_recipe(path: Path) -> object:
    """Read a recipe that anybody wrote, and resolve it."""
    cfg = with_values(train_gpt.Config(), read_recipe(path), str(path))
    train_gpt.check_config(cfg)
    return cfg


DATA = tuple(
    Reader(f"{name} of {kind}", f"{kind}/{file}", read_dataset, True)
    for kind in ("sentencepiece", "caseops")
    for name, file in (
        ("manifest", MANIFEST_NAME),
        ("report", REPORT_NAME),
        ("tokenizer", "tokenizer.model"),
        ("training shard", TRAIN_GLOB.replace("*", "000000")),
        ("validation shard", VAL_GLOB.replace("*", "000000")),
    )
)
TOKENIZERS = tuple(
    Reader(f"{kind} tokenizer", f"tokenizers/{kind}/{file}", read_tokenizer, False)
    for kind, file in [
        *((kind, f"tokenizer{trainer.suffix}") for kind, trainer in TRAINERS.items()),
        ("ranks", "r50k_base.tiktoken"),
        ("pairs", "vocab.json"),
    ]
)
TEXTS = tuple(
    Reader(f"{suffix} text", f"texts/a{suffix}", lambda path: list(read_documents([path])), False)
    for suffix in (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
)
READERS = (
    Reader("recipe of a run", "run/recipe.toml", read_written_recipe, True),
    Reader("result", "run/result.json", lambda path: read_result(path.parent), True),
    Reader("events", "run/metrics.jsonl", lambda path: read_metrics(path.parent), True),
    Reader("checkpoint", f"run/{NUMBERED.format(3)}", read_checkpoint, True),
    Reader("artifact", "run/artifact.bin", read_weights, True),
    *DATA,
    Reader("saved config", "saved/config.json", read_saved, True),
    Reader("saved weights", "saved/model.safetensors", read_saved, True),
    Reader("saved statistics", "saved/stats.json", read_saved, True),
    Reader("recipe by hand", "record/recipe.toml", read_any_recipe, False),
    Reader("submission", "record/submission.json", read_record, False),
    Reader("submission's scores", "record/submission.json", lambda path: read_scores([path]), False),
    Reader("log", "record/train.log", read_log, False),
    *TOKENIZERS,
    *TEXTS,
)
