"""Load, save, publish and sample trained models.

    from eval.hub import load, generate, save, push, summary, parameters, structure

    loaded = load("runs/ID")             a run folder, an artifact, a checkpoint, a saved folder or a hub id
    generate(loaded, "Once upon", Sampling(max_tokens=40, temperature=0.8, top_k=50, seed=1))
    save(loaded, "my_model"); push(loaded, "me/my_model")

    python -m eval.hub summary|structure|save|push SOURCE [TARGET]

A saved folder has config.json (the recipe), model.safetensors (weights by name), stats.json and loss.svg
(loss curves), README.md (the model card), the tokenizer's files and, where asked for, optimizer.safetensors.
Nothing in it runs code.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import (
    CommandParser,
    UserError,
    atomic_file,
    parse_json,
    read_json,
    run_command,
    sha256_file,
    write_json,
)
from data.download import first_line
from durable.seals import check_digest, write_sealed
from eval.card import CARD_NAME, read_facts, write_card
from eval.decode import decoding
from formats.checkpoints import newest_checkpoint, read_metrics, read_result
from formats.curves import CURVES_NAME, draw_curves
from formats.recipe import config_hash, flatten_recipe, get_recipe, read_recipe, with_values
from formats.state import map_leaves, read_state, safetensors_library, write_state
from scoring.generate import Sampling, draw_tokens, stream_text
from train_gpt import (
    ARTIFACT_NAME,
    GPT,
    Config,
    Environment,
    Ranks,
    check_config,
    load_artifact,
    make_gpt,
    only_live,
    open_tokenizer,
    read_environment,
    run_progress,
    stage_at,
)

CONFIG_NAME, WEIGHTS_NAME, STATS_NAME = "config.json", "model.safetensors", "stats.json"
OPTIMIZER_NAME = "optimizer.safetensors"
FORMAT = "parameter golf model 2"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILE_NAME = re.compile(r"\w[\w.-]*")


class Loaded(NamedTuple):
    """A model with what belongs to it."""

    model: GPT
    cfg: Config
    stats: (
        dict  # name, num_params, total_tokens, total_seconds, loss and val_loss: [[step, nats], ...], facts
    )
    tokenizer_sha256: str = ""  # "" where its source does not say
    optimizer: dict | None = None  # the optimizers' state, where a checkpoint or a saved folder has it


class ModelSource(NamedTuple):
    """What a file or folder says about a model."""

    cfg: Config
    weights: dict[str, Tensor]
    tokenizer_sha256: str = ""
    optimizer: dict | None = None


# ---- Loading ----------------------------------------------------------------------------------------


def load(source: str | Path, dtype: str = "", tokenizer: str = "", device: str = "auto") -> Loaded:
    """Load a model from a run folder, an artifact, a checkpoint, a saved folder or a hub id OWNER/NAME.

    dtype is that of activations and products (default: the recipe's); tokenizer a file or folder, where
    it moved.
    """
    path = Path(source) if Path(source).exists() else fetch(str(source))
    file = main_file(path) if path.is_dir() else path
    opened = OPENERS.get(file.suffix, open_artifact)(file)
    changes = {"run.device": device, "model.compute_dtype": dtype, "data.tokenizer_path": tokenizer}
    cfg = with_values(opened.cfg, {name: value for name, value in changes.items() if value}, "load")
    check_config(cfg)
    model = make_gpt(cfg, Ranks(Environment({}), device).device)
    check_weights(opened.weights, model, file)
    model.load_state_dict(opened.weights)
    model = model.to(Ranks(Environment({}), device).device).eval()
    saved_stats = file.with_name(STATS_NAME)
    stats = read_json(saved_stats) if saved_stats.is_file() else run_stats(file, cfg, model)
    return Loaded(model, cfg, stats, opened.tokenizer_sha256, opened.optimizer)


def main_file(folder: Path) -> Path:
    """Return the file of a folder that holds the model: saved, packed or a checkpoint, in this order."""
    for path in (folder / CONFIG_NAME, folder / ARTIFACT_NAME, newest_checkpoint(folder)):
        if path and path.is_file():
            return path
    raise UserError(
        f"{folder}: expected {CONFIG_NAME}, {ARTIFACT_NAME} or a checkpoint, found none. Name a run folder "
        "that is complete or was run with run.save_every=N, or one that eval.hub.save wrote."
    )


def run_settings(folder: Path) -> Config:
    """Return a run folder's config; the places are the run's own, or the environment's where it has none."""
    cfg = with_values(Config(), read_environment().overrides, "environment")
    if (folder / "recipe.toml").is_file():
        cfg = with_values(cfg, read_recipe(folder / "recipe.toml"), str(folder))
    if (folder / "result.json").is_file():
        cfg = with_values(cfg, read_result(folder)["places"], str(folder))
    return cfg


def open_artifact(path: Path) -> ModelSource:
    """Read an artifact; recipe and weights come from its bytes."""
    model, cfg, header = load_artifact(path, only_live(run_settings(path.parent)), torch.device("cpu"))
    return ModelSource(cfg, model.state_dict(), header["tokenizer_sha256"])


def open_checkpoint(path: Path) -> ModelSource:
    """Read a run's checkpoint; the recipe is that of its run folder."""
    state, facts = read_state(path)
    if not path.with_name("recipe.toml").is_file():
        raise UserError(f"{path}: expected recipe.toml beside it, found none. Copy it from the run folder.")
    cfg = with_values(run_settings(path.parent), parse_json(facts["places"], path), str(path))
    if facts.get("config_hash") != config_hash(cfg):
        raise UserError(
            f"{path}: expected a checkpoint of recipe {config_hash(cfg)}, that of recipe.toml beside it, "
            f"found one of {facts.get('config_hash')}. Put it beside the recipe.toml of its own run."
        )
    weights = map_leaves(state["model"], np.ndarray, torch.from_numpy)
    return ModelSource(cfg, weights, optimizer=state["optimizers"])


def open_saved(path: Path) -> ModelSource:
    """Read a folder that `save` wrote, by its config.json."""
    config, library = read_config(path), safetensors_library()
    check_saved(path.parent, config)
    cfg = with_values(Config(), flatten_recipe(config["recipe"], str(path)), str(path))
    tokenizer = path.with_name(config["tokenizer_files"][0])
    cfg = with_values(cfg, {"data.tokenizer_path": str(tokenizer)}, str(path))
    weights = path.with_name(WEIGHTS_NAME)
    try:
        arrays = library.numpy.load(weights.read_bytes())
    except (OSError, ValueError, library.SafetensorError) as error:
        raise UserError(f"{weights}: expected weights, found none that can be read: {error}.") from error
    optimizer = path.with_name(OPTIMIZER_NAME)
    state = read_state(optimizer)[0] if optimizer.is_file() else None
    tensors = map_leaves(arrays, np.ndarray, torch.from_numpy)
    return ModelSource(cfg, tensors, config["tokenizer_sha256"], state)


def read_config(path: Path) -> dict:
    """Read a saved folder's config.json, which may come from anybody."""
    config = read_json(path)
    keys = {"format": str, "recipe": dict, "tokenizer_files": list, "tokenizer_sha256": str, "sha256": dict}
    whole = isinstance(config, dict) and all(isinstance(config.get(key), kind) for key, kind in keys.items())
    if not whole or config["format"] != FORMAT or not config["tokenizer_files"]:
        raise UserError(f"{path}: expected the config of a saved model, found another JSON file.")
    check_digest(path, config, "Fetch or save the model again.")
    for name in config["tokenizer_files"]:
        if not FILE_NAME.fullmatch(str(name)):
            raise UserError(f"{path}: expected names of files beside it, found {name!r}. Do not trust it.")
    return config


def check_saved(folder: Path, config: dict) -> None:
    """Raise unless the files of a saved folder are those that its config states."""
    for name in (WEIGHTS_NAME, STATS_NAME, *config["tokenizer_files"]):
        stated, found = config["sha256"].get(name), sha256_file(folder / name)
        if found != stated:
            raise UserError(
                f"{folder / name}: expected sha256 {stated}, found {found}. Fetch or save the model again."
            )


OPENERS: dict[str, Callable[[Path], ModelSource]] = {".safetensors": open_checkpoint, ".json": open_saved}


def check_weights(weights: dict[str, Tensor], model: GPT, path: Path) -> None:
    """Raise unless names and shapes are those of the recipe's model."""
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if found != expected:
        odd = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise UserError(
            f"{path}: expected {odd[0]} of shape {expected.get(odd[0])}, found {found.get(odd[0])}: these "
            "are not the weights of this recipe. Take config and weights from one folder."
        )


def open_codec(loaded: Loaded):
    """Open the tokenizer; refuses another one than the model was trained with."""
    data = loaded.cfg.data
    if not Path(data.tokenizer_path).exists():
        raise UserError(
            f"{data.tokenizer_path}: expected the model's {data.tokenizer_kind} vocabulary of "
            f"{data.vocab_size} entries, found no such file. Name it: load(..., tokenizer=FILE) or "
            "--tokenizer FILE."
        )
    codec = open_tokenizer(data)
    if loaded.tokenizer_sha256 not in ("", codec.digest):
        raise UserError(
            f"{data.tokenizer_path}: expected the tokenizer with sha256 {loaded.tokenizer_sha256[:16]}, "
            f"found {codec.digest[:16]}. Name the right one: load(..., tokenizer=FILE), or --tokenizer FILE."
        )
    return codec


# ---- Reading ----------------------------------------------------------------------------------------


def run_stats(file: Path, cfg: Config, model: nn.Module) -> dict:
    """Sum up what a run folder says of the file in it that holds the model; without metrics no curves."""
    folder = file.parent
    events = read_metrics(folder)
    trained = {event["step"]: event for event in events if event["kind"] == "train"}  # a resumed run repeats
    total_tokens, elapsed_ms = 0, 0.0
    for step, event in sorted(trained.items()):
        total_tokens += stage_at(cfg, step - 1, run_progress(cfg, step - 1, elapsed_ms)).batch_tokens
        elapsed_ms = event["train_ms"]
    return {
        "name": folder.resolve().name,
        "num_params": sum(param.numel() for param in model.parameters()),
        "total_tokens": total_tokens,
        "total_seconds": elapsed_ms / 1000,
        "loss": [[step, event["train_loss"]] for step, event in sorted(trained.items())],
        "val_loss": [[event["step"], event["val_loss"]] for event in events if event["kind"] == "val"],
        "facts": read_facts(file),
    }


def parameters(loaded: Loaded) -> dict[str, Tensor]:
    """Return every trained tensor by name."""
    return {name: param.detach() for name, param in loaded.model.named_parameters()}


def structure(loaded: Loaded) -> str:
    """Return the tree of modules as text."""
    return str(loaded.model)


def summary(loaded: Loaded) -> str:
    """Return a table: parameters of each part of the model, their total, and what it was trained on."""
    counts: dict[str, int] = {}
    for name, param in parameters(loaded).items():
        part = ".".join(name.split(".")[: 3 if name.startswith("blocks.") else 1])
        counts[part] = counts.get(part, 0) + param.numel()
    stats = loaded.stats
    rows = [*counts.items(), ("total", sum(counts.values())), ("trained tokens", stats["total_tokens"])]
    lines = [f"{name:<28}{count:>14,}" for name, count in rows]
    for name in ("loss", "val_loss"):
        if stats[name]:
            lines.append(f"{'last ' + name:<28}{stats[name][-1][1]:>14.4f} nats a token")
    return "\n".join(lines)


def generate(
    loaded: Loaded,
    prompt: str,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt; on_text is given each piece as soon as it is there."""
    codec, pieces = open_codec(loaded), []
    tokens = [codec.bos_id, *codec.encode(prompt).tolist()]
    with decoding(loaded.model, codec, loaded.cfg.data.seq_len) as next_logits:
        drawn = draw_tokens(next_logits, tokens, sampling or Sampling(), codec.bos_id)
        for piece in stream_text(codec, prompt, drawn):
            pieces.append(piece)
            if on_text:
                on_text(piece)
    return "".join(pieces)


# ---- Saving and the hub -----------------------------------------------------------------------------


def save(loaded: Loaded, folder: str | Path, with_optimizer: bool = False, hub_id: str = "") -> Path:
    """Write config, weights, stats, curves, card and tokenizer into a folder; the optimizers' state if asked.

    hub_id is where the card says that the model is.
    """
    folder, library = Path(folder), safetensors_library()
    if with_optimizer and loaded.optimizer is None:
        raise UserError(
            "with_optimizer: expected a checkpoint's model. Load a run's checkpoint, not its artifact."
        )
    codec = open_codec(loaded)
    merges = codec.path.with_name("merges.txt")
    files = [codec.path, *([merges] if codec.path.name == "vocab.json" else [])]
    place = folder / CONFIG_NAME
    if folder.is_dir() and any(folder.iterdir()) and not (place.is_file() and read_config(place)):
        raise UserError(
            f"{folder}: expected a new or empty folder, or a saved model's, found files of others."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    arrays = {name: tensor.cpu().contiguous().numpy() for name, tensor in loaded.model.state_dict().items()}
    with atomic_file(folder / WEIGHTS_NAME) as out:
        out.write(library.numpy.save(arrays, metadata={"format": "pt"}))
    (folder / OPTIMIZER_NAME).unlink(missing_ok=True)
    if with_optimizer and loaded.optimizer is not None:
        write_state(folder / OPTIMIZER_NAME, loaded.optimizer, {"config_hash": config_hash(loaded.cfg)})
    stats = loaded.stats
    write_json(folder / STATS_NAME, stats)
    curves = {"training": stats["loss"], "validation": stats["val_loss"]}
    (folder / CURVES_NAME).write_text(draw_curves(f"{stats['name']}: nats a token", curves), encoding="utf-8")
    card = write_card(loaded.cfg, stats, codec.digest, hub_id or "FOLDER")
    with atomic_file(folder / CARD_NAME) as out:
        out.write(card.encode())
    config: dict = {"format": FORMAT, "recipe": get_recipe(loaded.cfg), "tokenizer_sha256": codec.digest}
    config["tokenizer_files"] = [file.name for file in files]
    names = (WEIGHTS_NAME, STATS_NAME, *config["tokenizer_files"])
    config["sha256"] = {name: sha256_file(folder / name) for name in names}
    write_sealed(place, config)  # last: a folder with it is whole
    return folder


def hub_library():
    """Import the hub's client, which only publishing and fetching need."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs a package: pip install huggingface_hub") from error
    return huggingface_hub


def fetch(hub_id: str) -> Path:
    """Download a saved model into the hub's cache; returns the folder. Every failure is a UserError."""
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f"{hub_id}: expected a file, a folder or a hub id OWNER/NAME, found none of them.")
    config = fetch_file(hub_id, CONFIG_NAME)
    for name in (WEIGHTS_NAME, STATS_NAME, *read_config(config)["tokenizer_files"]):
        fetch_file(hub_id, name)
    return config.parent


def fetch_file(hub_id: str, name: str) -> Path:
    """Download one file of a model repository; returns its place in the hub's cache."""
    hub = hub_library()
    try:
        return Path(hub.hf_hub_download(hub_id, name))
    except hub.errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{hub_id}: no such folder here, and the hub cannot be reached ({first_line(error)}). Check "
            "the network, set HF_ENDPOINT to a mirror, or name a local folder."
        ) from error
    except (hub.errors.EntryNotFoundError, hub.errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{hub_id}: the hub has no {name} of that id ({first_line(error)}). Check the spelling; a "
            "private one needs HF_TOKEN."
        ) from error
    except Exception as error:  # the HTTP library behind it differs between versions of huggingface_hub
        raise UserError(
            f"{hub_id}: fetching {name} failed ({type(error).__name__}: {first_line(error)})."
        ) from error


def push(loaded: Loaded, hub_id: str, with_optimizer: bool = False, private: bool = True) -> str:
    """Publish a model under OWNER/NAME; returns its address. The hub's client finds the token."""
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f"{hub_id}: expected a hub id OWNER/NAME.")
    hub = hub_library()
    with tempfile.TemporaryDirectory() as folder:
        save(loaded, folder, with_optimizer, hub_id)
        upload = {"folder_path": folder, "commit_message": "Publish a trained model"}
        try:
            api = hub.HfApi()
            api.create_repo(hub_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=hub_id, **upload))
        except Exception as error:  # as in fetch_file
            raise UserError(
                f"{hub_id}: publishing failed ({type(error).__name__}: {first_line(error)}). Log in "
                "with `hf auth login` or set HF_TOKEN to a token that may write there."
            ) from error


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(prog="python -m eval.hub", description=__doc__)
    parser.add_argument("action", choices=("summary", "structure", "save", "push"))
    parser.add_argument("source", help="run folder, artifact, checkpoint, saved folder or hub id")
    parser.add_argument("target", nargs="?", help="save: a folder; push: a hub id")
    parser.add_argument("--tokenizer", default="", help="tokenizer file or folder; default: that of the run")
    parser.add_argument("--with-optimizer", action="store_true", help="add the optimizers' state")
    args = parser.parse_args(argv)
    if args.action in ("save", "push") and not args.target:
        raise UserError(f"{args.action}: expected a target after {args.source}. `--help` says which.")
    loaded = load(args.source, tokenizer=args.tokenizer)
    if args.action in ("save", "push"):
        write = save if args.action == "save" else push
        print(write(loaded, args.target, args.with_optimizer))
    else:
        print(summary(loaded) if args.action == "summary" else structure(loaded))


if __name__ == "__main__":
    run_command(main)
