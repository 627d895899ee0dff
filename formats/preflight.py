"""What can be known before a training is checked before it: settings, memory, disk, folders, launchers.

`cfg` is a whole config of train_gpt.py. What artifacts were made with is not asked of them: they load.
Packed programs leave this out.
"""

import difflib
import fnmatch
import math
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import UserError
from formats.help import RECIPES
from formats.memory import memory_advice
from formats.recipe import config_value, read_recipe

LEAST_FILES = 1 << 18  # bytes of log, recipe and packed code
CODED_SHARE = 64  # trained weights are never coded to less than this part of their estimate


class Sizes(NamedTuple):
    """What a model has and its training keeps, without making it."""

    numels: dict[str, int]  # of every parameter
    stacked: int  # of them updated by an optimizer with one moment, shared out among the ranks
    item_bytes: int  # of a weight: 4, or 8 in float64
    compute_bytes: int  # of an activation
    artifact_bytes: int  # estimated
    whole_logits: bool  # whether a micro-batch's logits are kept at once, not in blocks

    @property
    def num_params(self) -> int:
        """Return how many numbers the model has."""
        return sum(self.numels.values())

    def state_numel(self, cfg, world_size: int) -> int:
        """Count the weights, moments and averages that one of so many ranks keeps."""
        averages = cfg.average.ema_decay > 0 or cfg.average.swa_every > 0
        moments = 2 * (self.num_params - self.stacked) + math.ceil(self.stacked / world_size)
        return self.num_params * (1 + averages) + moments


def new_run_rules(cfg) -> list[tuple]:
    """Return rows (field, whether the rule holds, what must hold) of what no new run may be told to do.

    With scale_floor the steps of weights below 1 are 1 / largest code: at 4 bits most of them become 0.
    """
    quant = cfg.quant
    allocates = quant.method == "gptq" and quant.target_bytes > 0  # from 2 bits on
    least = min(quant.matrix_bits, quant.embed_bits, quant.mlp_bits or 8, 2 if allocates else 8)
    floor_fits = not quant.scale_floor or quant.method == "water_fill" or least == 8
    return [
        (
            "quant.scale_floor",
            floor_fits,
            f"destroys weights of {least} bits: set quant.scale_floor=0, or 8 bits throughout",
        )
    ]


def check_recipe_path(path: str, option: str = "--recipe") -> None:
    """Raise for a recipe that is not there, naming the nearest in records/, or no file."""
    place = Path(path)
    if place.is_file() or place.is_fifo() or (place / "recipe.toml").is_file():
        return
    found = "no file or folder of a recipe" if place.exists() else "no such recipe"
    known = {
        folder.name: folder for folder in sorted(path.parent for path in RECIPES.glob("*/*/recipe.toml"))
    }
    short = {name.rpartition("_")[2]: name for name in known}
    word = (place.parent if place.suffix == ".toml" else place).name
    near = difflib.get_close_matches(word, [*known, *short], n=1)
    meant = known.get(short.get(near[0], near[0])) if near else None
    hint = (
        f"Did you mean {meant.relative_to(RECIPES.parent)}?"
        if meant
        else "Recipes are records/*/*/recipe.toml."
    )
    raise UserError(f"{option} {path:.200}: {found}. {hint}")


def check_recipe(path: str, recipe: dict) -> None:
    """Raise for a recipe that says nothing: it is a mistake, whatever it was meant to change."""
    if not recipe:
        raise UserError(
            f"{path}: expected [section] and key = value, found an empty recipe. Leave --recipe out for the "
            "contest's naive baseline."
        )


def check_new_run(cfg) -> None:
    """Raise naming field, value and constraint where a new run should not be told so."""
    for name, holds, constraint in new_run_rules(cfg):
        if not holds:
            raise UserError(f"{name}={config_value(cfg, name)!s:.60} {constraint}.")


def check_memory(cfg, stages: list, sizes: Sizes, ranks: tuple[int, int], device: tuple[int, str]) -> None:
    """Raise where an update, or the forward pass of one micro-batch, surely needs more memory than there is.

    ranks: all, and those that share this memory; device: its bytes (0: unknown) and name. What else a step
    keeps is not counted: a run that is not refused may still not fit.
    """
    world_size, sharing = ranks
    total, name = device
    tokens = max(
        stage.batch_tokens // stage.micro_batches if stage.micro_batches else stage.seq_len
        for stage in stages
    )
    kept = sharing * sizes.item_bytes * sizes.state_numel(cfg, world_size)
    # Of stacked parameters a gradient is there twice.
    gradients = sharing * sizes.item_bytes * (sizes.num_params + sizes.stacked)
    channels = cfg.model.model_dim + cfg.data.vocab_size * sizes.whole_logits
    batch = sharing * tokens * (16 + sizes.compute_bytes * channels)  # tokens and targets are 8 bytes each
    if not total or kept + max(gradients, batch) <= total:
        return
    largest = max(sizes.numels, key=sizes.numels.__getitem__)
    what = f"the gradients of {sizes.num_params:,} parameters"
    advice = f"Lower the model's sizes: {largest} has {sizes.numels[largest]:,}"
    if kept + gradients <= total:
        what = f"a micro-batch of {tokens:,} tokens"
        advice = "Lower data.seq_len"
        if all(stage.micro_batches for stage in stages):
            advice = f"For it, {memory_advice(cfg, stages, world_size)}"
    raise UserError(
        f"expected at least {in_words(kept + max(gradients, batch))} of memory, {in_words(kept)} for weights "
        f"and moments and the rest for {what}, found {in_words(total)} of this {name}. {advice}."
    )


def in_words(size: float) -> str:
    """Write a number of bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def check_folder(name: str, folder: str | Path) -> Path:
    """Raise unless a folder can be made or written to; returns the nearest one that is there."""
    try:
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as error:
        raise UserError(
            f"{name}={folder!s:.100}: expected a folder that can be written, found: {error.strerror}. "
            f"Set {name} to another one."
        ) from error


def count_checkpoints(run, most: int) -> int:
    """Count the checkpoints that a run surely keeps: of one that a clock ends at most one."""
    if run.save_every <= 0:
        return 0
    return min(run.iterations // run.save_every, 1 if run.max_wallclock_seconds else most)


def check_disk(cfg, sizes: Sizes, is_new: bool) -> None:
    """Raise where what a run surely writes is more than the disk has left."""
    free = shutil.disk_usage(check_folder("run.out_dir", cfg.run.out_dir)).free
    count = count_checkpoints(cfg.run, cfg.watch.keep_checkpoints if is_new else 1)
    checkpoint = sizes.item_bytes * sizes.state_numel(cfg, 1)
    need = LEAST_FILES + sizes.artifact_bytes // CODED_SHARE + count * checkpoint
    if need > free:
        each = f" (of it {count} x {in_words(checkpoint)} for checkpoints)" if count else ""
        raise UserError(
            f"run.out_dir={cfg.run.out_dir}: expected at least {in_words(need)} free on its disk{each}, "
            f"found {in_words(free)}. Free space, lower watch.keep_checkpoints or the model's size, or set "
            "run.out_dir."
        )


def check_limit(cfg, sizes: Sizes) -> None:
    """Raise where the artifact alone is surely over the bytes that a valid run may have."""
    least, limit = sizes.artifact_bytes // CODED_SHARE, cfg.quant.limit_bytes
    if cfg.run.enforce_limits and 0 < limit < least:
        raise UserError(
            f"quant.limit_bytes={limit}: expected at least {least:,}, which {sizes.num_params:,} parameters "
            "take however they are coded. Lower the model's sizes, or set run.enforce_limits=0."
        )


def check_patterns(patterns: str, sizes: Sizes) -> None:
    """Raise for a pattern of quant.float16_names that names no parameter."""
    for pattern in filter(None, patterns.split(",")):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in sizes.numels):
            raise UserError(
                f"quant.float16_names={patterns:.100}: expected patterns of parameters, found "
                f"{pattern!r:.60}, which names none. `--describe` lists them by kind."
            )


def check_text(cfg, text) -> None:
    """Raise where a validation text is too short for one window of training's validation or of scoring."""
    lengths = {"data.seq_len": cfg.data.seq_len} if cfg.run.val_loss_every >= 0 else {}
    if not cfg.eval.keep_tail:
        field = "eval.context_len" if cfg.eval.context_len else "data.seq_len"
        lengths[field] = config_value(cfg, field)
    for field, length in lengths.items():
        if len(text.tokens) <= length:
            raise UserError(
                f"{text.pattern}: expected at least one window of {field}={length:,} + 1 validation tokens, "
                f"found {len(text.tokens):,}. Make the validation text longer or lower {field}."
            )


def check_spent(cfg, found, recipe: Path) -> None:
    """Raise where a run that goes on is given less time, or fewer steps, than it began with and has used.

    found: its checkpoint; recipe: what the run began with. One that is only to be scored keeps its numbers.
    """
    stated = read_recipe(recipe) if recipe.is_file() else {}
    spent = {
        "run.max_wallclock_seconds": float(found.facts["train_ms"]) / 1000,
        "run.iterations": int(found.facts["step"]),
    }
    for name, used in spent.items():
        now, before = config_value(cfg, name), stated.get(name)
        if before is not None and 0 < now < used and (before == 0 or now < before):
            raise UserError(
                f"{name}={now}: expected at least {used:.10g}, which the run has used by {found.path}. "
                f"Leave it at {before}, raise it, or start a new run."
            )
