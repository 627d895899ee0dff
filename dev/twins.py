"""Train the scaled-down twins of the reference systems on the built-in corpus.

    python -m dev.twins             all of them, one after the other
    python -m dev.twins A E-mem9    system A, and E with the curriculum mem9
    python -m dev.twins --data      only collect the text, train the tokenizers, write the shards

A twin has its system's switches at a size that two cores train in a minute, and a tokenizer of its kind.
It learned something when its loss is below the entropy of single tokens of the validation text. Each is one
JSON object: parameters, losses, what quantization cost, how the bytes add up, milliseconds a step.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt
from common import CommandParser, UserError, parse_json, read_json, run_command
from data.builtin import collect_documents, describe_sources, fill_with_tokenizer, find_modules
from data.prepare import Document
from data.shards import VAL_GLOB, find_shards, read_manifest, read_shard
from data.staging import staged
from data.train_tokenizer import TRAINERS
from formats.recipe import read_recipe, with_values
from train_gpt import (
    ARTIFACT_NAME,
    Config,
    Environment,
    Ranks,
    check_config,
    load_artifact,
    load_validation,
    validate,
)

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ROOT / "records" / "reference_systems"
TRAIN_BYTES, VAL_BYTES = 6_000_000, 100_000  # of text, whole documents, the last one past the mark


class Twin(NamedTuple):
    """A system's folder, the kind of its tokenizer and the twin's vocabulary."""

    folder: str
    kind: str
    vocab_size: int


TWINS = {
    "A": Twin("A_bwetaf53", "bytelevel", 1021),
    "B": Twin("B_bese288", "bese", 288),
    "C": Twin("C_pr281", "contest", 1024),
    "D": Twin("D_exp01", "bytelevel", 1021),
    "E": Twin("E_yxanul197_ultra10", "superbpe", 1024),
    "E-mem9": Twin("E_yxanul270_mem9", "superbpe", 1024),
    "E-mem6": Twin("E_yxanul270_mem6", "superbpe", 1024),
}


def twin_config(name: str, data: Path, out_dir: Path | str = "runs") -> Config:
    """Resolve a twin's recipe with its data below the folder `data`."""
    twin, dataset = TWINS[name], dataset_folder(TWINS[name], data)
    places = {"data.data_path": str(dataset), "run.out_dir": str(out_dir), "run.run_id": f"twin_{name}"}
    places |= {"run.overwrite": True}
    places["data.tokenizer_path"] = str(dataset / tokenizer_name(twin))
    cfg = with_values(Config(), read_recipe(SYSTEMS / twin.folder / "recipe.small.toml"), twin.folder)
    cfg = with_values(cfg, places, "twin")
    check_config(cfg)
    return cfg


def dataset_folder(twin: Twin, data: Path) -> Path:
    """Name the dataset of a tokenizer: twins of one kind share it."""
    return data / f"builtin_{twin.kind}{twin.vocab_size}"


def tokenizer_name(twin: Twin) -> str:
    """Name the tokenizer's file."""
    return f"tokenizer{TRAINERS[twin.kind].suffix}"


def first_bytes(documents: list[Document], num_bytes: int) -> list[Document]:
    """Take documents until they have so many bytes."""
    sizes = np.cumsum([len(document.text.encode()) for document in documents])
    return documents[: int(np.searchsorted(sizes, num_bytes)) + 1]


def prepare(names: list[str], data: Path) -> None:
    """Write the datasets of these twins that are not there yet; the corpus is read at most once."""
    missing = []
    for twin in {dataset_folder(TWINS[name], data): TWINS[name] for name in names}.values():
        manifest = read_manifest(dataset_folder(twin, data)) or {}
        if manifest.get("sources") != describe_sources(twin.vocab_size):
            missing.append(twin)
    if not missing:
        return
    train, val = map(first_bytes, collect_documents(find_modules()), (TRAIN_BYTES, VAL_BYTES))
    for twin in missing:
        with staged(dataset_folder(twin, data)) as staging:
            tokenizer, sources = staging / tokenizer_name(twin), describe_sources(twin.vocab_size)
            fill_with_tokenizer(tokenizer, train, val, sources, twin.kind)


def unigram_entropy(dataset: Path) -> float:
    """Return the entropy of single validation tokens in nats: the loss of the best model without context."""
    tokens = np.concatenate([read_shard(path) for path in find_shards(dataset / VAL_GLOB)])[1:]
    probs = np.bincount(tokens) / len(tokens)
    probs = probs[probs > 0]
    return float(-(probs * np.log(probs)).sum())


def train_twin(name: str, data: Path, out_dir: Path | str = "runs") -> dict:
    """Train a twin and return what its README states: parameters, losses, sizes, times."""
    cfg = twin_config(name, data, out_dir)
    train_gpt.run(cfg, Environment({}))
    folder = Path(cfg.run.out_dir) / cfg.run.run_id
    result = read_json(folder / "result.json")
    metrics = folder / "metrics.jsonl"
    events = [parse_json(line, metrics) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = [event for event in events if event["kind"] == "val"][-1]
    ranks = Ranks(Environment({}), "cpu")
    model, stored_cfg, header = load_artifact(folder / ARTIFACT_NAME, cfg, ranks.device)
    stored_loss = validate(model, stored_cfg, load_validation(cfg.data), ranks).val_loss
    (_, code_bytes), *parts = result["ledger"]
    return {
        "twin": name,
        "parameters": sum(param.numel() for param in model.parameters()),
        "steps": result["steps"],
        "val_loss": round(last["val_loss"], 4),  # of the live weights, whole rows
        "quantization_gap": round(stored_loss - last["val_loss"], 4),  # the stored weights', the same rows
        "artifact_loss": round(result["score"]["val_loss"], 4),  # the stored weights', scored as recipes say
        "val_bpb": round(result["score"]["val_bpb"], 4),
        "unigram_entropy": round(unigram_entropy(Path(cfg.data.data_path)), 4),
        "payload_bytes": sum(raw for _, _, raw in header["streams"]),  # codes and scales, not compressed
        "artifact_bytes": sum(size for _, size in parts),
        "code_bytes": code_bytes,
        "total_bytes": code_bytes + (folder / ARTIFACT_NAME).stat().st_size,
        "step_ms": round(result["train_ms"] / result["steps"], 1),
        "train_seconds": round(result["train_ms"] / 1000, 1),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command: one JSON object a twin."""
    parser = CommandParser(prog="python -m dev.twins", description=__doc__)
    parser.add_argument("twins", nargs="*", metavar="TWIN", help=f"of {', '.join(TWINS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("data/datasets"), help="default: %(default)s")
    parser.add_argument("--data", action="store_true", help="make the data and stop")
    args = parser.parse_args(argv)
    names = args.twins or list(TWINS)
    for name in names:
        if name not in TWINS:
            raise UserError(f"{name}: expected a twin of {', '.join(TWINS)}.")
    prepare(names, args.folder)
    for name in [] if args.data else names:
        print(json.dumps(train_twin(name, args.folder)), flush=True)


if __name__ == "__main__":
    run_command(main)
