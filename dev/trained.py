"""Trained weights for the tools: those of a run folder's last checkpoint, or what an artifact stands for."""

from pathlib import Path
from typing import NamedTuple

from common import UserError, parse_json
from data.validation import ValidationText
from formats.checkpoints import read_newest
from formats.recipe import read_recipe, with_values
from train_gpt import (
    Config,
    Ranks,
    Training,
    load_artifact,
    load_validation,
    only_live,
    read_environment,
    restore,
)


class Trained(NamedTuple):
    """A model with its average applied, the text that it is scored on, and where the weights come from."""

    training: Training
    text: ValidationText
    source: Path


def live_settings(places: dict | None = None) -> Config:
    """Return the defaults with the environment's live fields and a run's places."""
    live = only_live(with_values(Config(), read_environment().overrides, "environment"))
    live = with_values(live, places or {}, "run")
    return with_values(live, {"run.compile": "off"}, "tool")


def open_checkpoint(folder: Path, ranks: Ranks) -> Trained:
    """Load the float weights of a run folder's last checkpoint."""
    found = read_newest(folder)
    if found is None:
        raise UserError(
            f"{folder}: no float weights: the artifact alone does not tell what quantization costs. "
            f"Train with run.save_every=N, N a number of steps: the last checkpoint stays in the run folder."
        )
    cfg = live_settings(parse_json(found.facts["places"], found.path))
    stated = read_recipe(folder / "recipe.toml").items()
    recipe = {key: value for key, value in stated if key[:4] != "run." or key == "run.seed"}
    cfg = with_values(cfg, recipe, str(folder / "recipe.toml"))
    text = load_validation(cfg.data)
    training = Training(cfg, ranks, text.bos_id)
    restore(training, found)
    if training.average:
        training.average.apply()
    return Trained(training, text, found.path)


def open_stored(path: Path, ranks: Ranks) -> Trained:
    """Load the weights that an artifact stands for; they lie on its grid."""
    model, cfg, header = load_artifact(path, live_settings(), ranks.device)
    text = load_validation(cfg.data, tokenizer_sha256=header["tokenizer_sha256"])
    training = Training(cfg, ranks, text.bos_id)
    training.model.load_state_dict(model.state_dict())
    return Trained(training, text, path)


def open_trained(target: Path, ranks: Ranks) -> Trained:
    """Load a run folder with a checkpoint, or an artifact file."""
    return open_checkpoint(target, ranks) if target.is_dir() else open_stored(target, ranks)
