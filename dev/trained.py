"""Trained weights for the tools: those of a run folder's last checkpoint, or what an artifact stands for."""

from pathlib import Path
from typing import NamedTuple

from common import UserError, read_json
from data.validation import ValidationText
from formats.recipe import read_recipe, with_values
from train_gpt import (
    CHECKPOINT_NAME,
    Config,
    Ranks,
    Training,
    load_artifact,
    load_validation,
    only_live,
    read_environment,
    resume,
)


class Trained(NamedTuple):
    """A model with its average applied, the text that it is scored on, and where the weights come from."""

    training: Training
    text: ValidationText
    source: Path


def live_settings(folder: Path | None) -> Config:
    """Return the defaults with the environment's live fields and the places that a run folder recorded."""
    live = only_live(with_values(Config(), read_environment().overrides, "environment"))
    if folder is not None and (folder / "result.json").is_file():
        live = with_values(live, read_json(folder / "result.json")["places"], str(folder))
    return with_values(live, {"run.compile": "off"}, "tool")


def open_checkpoint(folder: Path, ranks: Ranks) -> Trained:
    """Load the float weights of a run folder's last checkpoint."""
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        raise UserError(
            f"{path}: no float weights: the artifact alone does not tell what quantization costs. "
            f"Train with run.save_every=N, N a number of steps: the last checkpoint stays in the run folder."
        )
    cfg = live_settings(folder)
    recipe = {key: value for key, value in read_recipe(folder / "recipe.toml").items() if key[:4] != "run."}
    cfg = with_values(cfg, recipe, str(folder / "recipe.toml"))
    text = load_validation(cfg.data)
    training = Training(cfg, ranks, text.bos_id)
    resume(training, path)
    if training.average:
        training.average.apply()
    return Trained(training, text, path)


def open_stored(path: Path, ranks: Ranks) -> Trained:
    """Load the weights that an artifact stands for; they lie on its grid."""
    model, cfg, header = load_artifact(path, live_settings(None), ranks.device)
    text = load_validation(cfg.data, tokenizer_sha256=header["tokenizer_sha256"])
    training = Training(cfg, ranks, text.bos_id)
    training.model.load_state_dict(model.state_dict())
    return Trained(training, text, path)


def open_trained(target: Path, ranks: Ranks) -> Trained:
    """Load a run folder with a checkpoint, or an artifact file."""
    return open_checkpoint(target, ranks) if target.is_dir() else open_stored(target, ranks)
