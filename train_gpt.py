"""Train a small language model, pack it into an artifact, score the artifact in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                     the contest's naive baseline
    python train_gpt.py --recipe records/track_cpu/NAME/recipe.toml           a recipe
    python train_gpt.py --recipe R model.num_layers=9 run.seed=7              with overrides

A run is one recipe: dataclass defaults (the naive baseline) < recipe.toml < environment variables under
the contest's names < section.key=value. It leaves runs/<run_id>/ with the log, the resolved recipe, the
packed source, the artifact and the score that was measured from the artifact's bytes.

Map: 1 constants, 2 config, 3 ranks, clock, log, 4 data, 5 model, 6 optimizers, 7 schedules, 8 averaging,
9 quantization, 10 artifact, 11 training loop, 12 main. A section calls only sections above it.

Shapes: B batch, T time, D model, H query heads, G kv heads, K head dim, F mlp hidden, V vocabulary.
"""

# ----------------------------------------------------------------------------------------------------------
# 1 imports and constants
# ----------------------------------------------------------------------------------------------------------

import argparse
import copy
import dataclasses
import difflib
import fnmatch
import hashlib
import importlib.util
import json
import lzma
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.codecs import load_codec
from data.errors import UserError, run_command
from data.shards import (
    TRAIN_GLOB,
    VAL_GLOB,
    atomic_file,
    check_token_ids,
    find_shards,
    read_manifest,
    read_shard,
    sha256_file,
    write_json,
)
from eval.bpb import BpbMeter
from eval.budget import LIMIT_BYTES, check_bytes, format_ledger
from eval.sliding import plan_windows, score_windows

PACKED_RECIPE: dict | None = None  # dev/pack.py puts the recipe of a packed program here

# ----------------------------------------------------------------------------------------------------------
# 2 config
# ----------------------------------------------------------------------------------------------------------
# Frozen dataclasses, one a section. The defaults are the contest's naive baseline. A field carries the
# contest's environment name, one line of help, and whether it stays free in a packed program ("live").


def option(default, env: str = "", text: str = "", live: bool = False):
    """Declare a config field."""
    return field(default=default, metadata={"env": env, "help": text, "live": live})


@dataclass(frozen=True)
class RunConfig:
    run_id: str = option("", "RUN_ID", "name of the run folder; empty: date and time", live=True)
    out_dir: str = option("runs", "", "where run folders go", live=True)
    seed: int = option(1337, "SEED", "seed of the initial weights", live=True)
    device: str = option("auto", "", "auto | cpu | cuda", live=True)
    compile: str = option("auto", "", "torch.compile: auto | on | off", live=True)
    iterations: int = option(20_000, "ITERATIONS", "most optimizer steps", live=True)
    max_wallclock_seconds: float = option(
        600.0, "MAX_WALLCLOCK_SECONDS", "training clock; 0: no limit", live=True
    )
    warmup_steps: int = option(
        20, "WARMUP_STEPS", "steps before the clock starts; state is restored", live=True
    )
    val_loss_every: int = option(
        1000, "VAL_LOSS_EVERY", "validate every so many steps; 0: only at the end, -1: never", live=True
    )
    train_log_every: int = option(200, "TRAIN_LOG_EVERY", "log the loss every so many steps", live=True)
    val_batch_tokens: int = option(
        524_288, "VAL_BATCH_SIZE", "tokens per scoring batch, all ranks", live=True
    )


@dataclass(frozen=True)
class DataConfig:
    data_path: str = option(
        "./data/datasets/fineweb10B_sp1024", "DATA_PATH", "folder of the token shards", live=True
    )
    tokenizer_path: str = option(
        "./data/tokenizers/fineweb_1024_bpe.model", "TOKENIZER_PATH", "tokenizer file", live=True
    )
    vocab_size: int = option(1024, "VOCAB_SIZE", "entries of the tokenizer")
    seq_len: int = option(1024, "TRAIN_SEQ_LEN", "tokens a training row")
    batch_tokens: int = option(524_288, "TRAIN_BATCH_TOKENS", "tokens a step, all ranks together")
    micro_batches: int = option(8, "", "micro-batches a step, all ranks together; the world size divides it")


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = option(9, "NUM_LAYERS", "transformer blocks")
    model_dim: int = option(512, "MODEL_DIM", "width of the residual stream")
    num_heads: int = option(8, "NUM_HEADS", "query heads")
    num_kv_heads: int = option(4, "NUM_KV_HEADS", "key and value heads; divides num_heads")
    mlp_mult: float = option(2.0, "MLP_MULT", "mlp hidden size as a multiple of model_dim")
    leaky_slope: float = option(
        0.0, "LEAKY_SLOPE", "mlp activation max(x, slope * x)^2; 0 is ReLU^2", live=False
    )
    tie_embeddings: bool = option(True, "TIE_EMBEDDINGS", "output head = token embedding")
    embed_init_std: float = option(
        0.005, "TIED_EMBED_INIT_STD", "standard deviation of the initial tied embedding"
    )
    rope_base: float = option(10_000.0, "ROPE_BASE", "RoPE base")
    q_gain_init: float = option(1.5, "QK_GAIN_INIT", "initial gain of the normalised queries")
    unet_skips: bool = option(True, "", "add first-half outputs to second-half inputs, last to first")
    smear_gate: bool = option(False, "SMEAR_GATE", "add a gated copy of the previous token's embedding")
    logit_softcap: float = option(30.0, "LOGIT_SOFTCAP", "logits are cap * tanh(logits / cap)")
    compute_dtype: str = option("auto", "", "auto | float32 | bfloat16: activations and matrix products")


@dataclass(frozen=True)
class OptimConfig:
    matrix_lr: float = option(0.04, "MATRIX_LR", "Muon learning rate of the block matrices")
    embed_lr: float = option(0.6, "EMBED_LR", "AdamW learning rate of an untied embedding")
    tied_embed_lr: float = option(0.05, "TIED_EMBED_LR", "AdamW learning rate of a tied embedding")
    head_lr: float = option(0.008, "HEAD_LR", "AdamW learning rate of an untied head")
    scalar_lr: float = option(0.04, "SCALAR_LR", "AdamW learning rate of gains, scales and gates")
    matrix_weight_decay: float = option(0.0, "MUON_WD", "decoupled weight decay of the block matrices")
    embed_weight_decay: float = option(0.0, "EMBED_WD", "decoupled weight decay of embedding and head")
    scalar_weight_decay: float = option(0.0, "ADAM_WD", "decoupled weight decay of gains, scales and gates")
    muon_momentum: float = option(0.95, "MUON_MOMENTUM", "Muon momentum after its warm-up")
    muon_momentum_warmup_start: float = option(0.85, "MUON_MOMENTUM_WARMUP_START", "Muon momentum at step 0")
    muon_momentum_warmup_steps: int = option(500, "MUON_MOMENTUM_WARMUP_STEPS", "length of that warm-up")
    num_ns_steps: int = option(5, "MUON_BACKEND_STEPS", "Newton-Schulz iterations")
    beta1: float = option(0.9, "BETA1", "AdamW beta1")
    beta2: float = option(0.95, "BETA2", "AdamW beta2")
    adam_eps: float = option(1e-8, "ADAM_EPS", "AdamW epsilon")
    grad_clip_norm: float = option(0.0, "GRAD_CLIP_NORM", "clip the reduced gradient's global norm; 0: off")


@dataclass(frozen=True)
class ScheduleConfig:
    warmdown_iters: int = option(1200, "WARMDOWN_ITERS", "linear decay over the last so many steps' time")
    warmdown_frac: float = option(0.0, "WARMDOWN_FRAC", "decay over this last fraction instead, when > 0")
    min_lr_frac: float = option(0.0, "MIN_LR", "floor of the decay")


@dataclass(frozen=True)
class AverageConfig:
    ema_decay: float = option(0.0, "EMA_DECAY", "exponential moving average of all weights; 0: off")


@dataclass(frozen=True)
class QuantConfig:
    matrix_bits: int = option(8, "", "bits of the block matrices, 2 to 8, one scale a row")
    embed_bits: int = option(8, "", "bits of the embedding and head rows")
    clip_quantile: float = option(
        0.9999984, "", "quantile of a row's magnitudes that maps to the largest code"
    )
    scale_floor: bool = option(True, "", "scales are at least 1 / largest code, as in the contest's baseline")
    codec: str = option("zlib", "", "compressor of the artifact's streams: zlib | lzma | zstd")
    limit_bytes: int = option(LIMIT_BYTES, "", "most bytes of code + artifact")


@dataclass(frozen=True)
class EvalConfig:
    mode: str = option("chunked", "", "chunked | sliding")
    context_len: int = option(0, "", "tokens a window may see; 0: data.seq_len")
    stride: int = option(64, "EVAL_STRIDE", "targets a sliding window scores")
    keep_tail: bool = option(False, "", "score the targets past the last whole window too")
    limit_seconds: float = option(600.0, "", "scoring time budget")


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig = AverageConfig()
    quant: QuantConfig = QuantConfig()
    eval: EvalConfig = EvalConfig()


class Environment(NamedTuple):
    """What is read from the process environment: config overrides and the rank layout of torchrun."""

    overrides: dict[str, str]  # "section.key" -> text
    rank: int
    local_rank: int
    world_size: int


def config_fields() -> dict[str, dataclasses.Field]:
    """Map "section.key" to its dataclass field, in order."""
    return {
        f"{section.name}.{item.name}": item
        for section in dataclasses.fields(Config)
        for item in dataclasses.fields(section.type)
    }


def read_environment() -> Environment:
    """Read the environment: the one place that does."""
    overrides = {
        name: os.environ[item.metadata["env"]]
        for name, item in config_fields().items()
        if item.metadata["env"] and item.metadata["env"] in os.environ
    }
    layout = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return Environment(overrides, *layout)


def parse_value(name: str, text, kind: type):
    """Convert text or a TOML value to a field's type; raise when it does not fit."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[str(text).lower()]
        if kind is int and not isinstance(text, int):
            return int(str(text).replace("_", ""))
        if (kind is str) != isinstance(text, str) and not isinstance(text, (str, int, float)):
            raise ValueError
        return kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}: expected {kind.__name__}, found {text!r}.") from error


def with_values(cfg: Config, values: dict, source: str) -> Config:
    """Return cfg with {"section.key": value} applied; an unknown name is an error with a suggestion."""
    known = config_fields()
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else " `--help` lists all fields."
            raise UserError(f"{source}: unknown field {name!r}.{hint}")
        section, key = name.split(".")
        changed = dataclasses.replace(
            getattr(cfg, section), **{key: parse_value(name, value, known[name].type)}
        )
        cfg = dataclasses.replace(cfg, **{section: changed})
    return cfg


def flatten_recipe(recipe: dict, source: str) -> dict:
    """Turn {section: {key: value}} into {"section.key": value}."""
    stray = [key for key, value in recipe.items() if not isinstance(value, dict)]
    if stray:
        raise UserError(
            f"{source}: {stray[0]!r} stands outside a section; expected [section] and key = value."
        )
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def read_recipe(path: str | Path) -> dict:
    """Read a recipe.toml as {"section.key": value}."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such recipe. Recipes are records/*/*/recipe.toml.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error
    return flatten_recipe(recipe, str(path))


def live_config(recipe_path: Path | None, environment: dict[str, str]) -> Config:
    """Return the defaults with only the live fields (paths, device) of a recipe and of the environment."""
    values = (read_recipe(recipe_path) if recipe_path else {}) | environment
    fields = config_fields()
    live = {name: value for name, value in values.items() if name in fields and fields[name].metadata["live"]}
    return with_values(Config(), live, str(recipe_path or "environment"))


def load_config(recipe_path: str | None, environment: dict[str, str], overrides: list[str]) -> Config:
    """Resolve a config: defaults < recipe < environment < "section.key=value" overrides; then check it."""
    cfg = with_values(Config(), flatten_recipe(PACKED_RECIPE or {}, "packed recipe"), "packed recipe")
    if recipe_path:
        cfg = with_values(cfg, read_recipe(recipe_path), recipe_path)
    cfg = with_values(cfg, environment, "environment")
    pairs = [text.partition("=") for text in overrides]
    bad = [text for text, equals, _ in pairs if not equals]
    if bad:
        raise UserError(f"command line: expected section.key=value, found {bad[0]!r}.")
    cfg = with_values(cfg, {name: value for name, _, value in pairs}, "command line")
    check_config(cfg)
    return cfg


def check_config(cfg: Config) -> None:
    """Raise naming field, value and constraint when settings cannot work together."""
    model, data, quant = cfg.model, cfg.data, cfg.quant
    head_dim = model.model_dim // max(model.num_heads, 1)
    micro_tokens = data.batch_tokens // max(data.micro_batches, 1)
    multiple = f"/ micro_batches={data.micro_batches} must be a multiple of data.seq_len={data.seq_len}"
    choices = {
        "run.device": ("auto", "cpu", "cuda"),
        "run.compile": ("auto", "on", "off"),
        "model.compute_dtype": ("auto", "float32", "bfloat16"),
        "quant.codec": ("zlib", "lzma", "zstd"),
        "eval.mode": ("chunked", "sliding"),
    }
    rules = [
        ("model.num_layers", model.num_layers >= 1, "must be at least 1"),
        ("model.num_heads", model.num_heads >= 1, "must be at least 1"),
        (
            "model.model_dim",
            model.model_dim % max(model.num_heads, 1) == 0,
            "must be a multiple of num_heads",
        ),
        ("model.model_dim", head_dim % 2 == 0, f"gives head_dim {head_dim}, which must be even for RoPE"),
        ("model.num_kv_heads", model.num_kv_heads >= 1, "must be at least 1"),
        ("model.num_kv_heads", model.num_heads % max(model.num_kv_heads, 1) == 0, "must divide num_heads"),
        ("model.mlp_mult", model.mlp_mult * model.model_dim >= 1, "gives an empty mlp"),
        ("model.logit_softcap", model.logit_softcap > 0, "must be positive"),
        ("data.vocab_size", 2 <= data.vocab_size <= 65_536, "must be in [2, 65536]: shards are uint16"),
        ("data.seq_len", data.seq_len >= 2, "must be at least 2"),
        ("data.micro_batches", data.micro_batches >= 1, "must be at least 1"),
        (
            "data.batch_tokens",
            micro_tokens * data.micro_batches == data.batch_tokens,
            "must be a multiple of micro_batches",
        ),
        ("data.batch_tokens", micro_tokens >= 1 and micro_tokens % max(data.seq_len, 1) == 0, multiple),
        ("quant.matrix_bits", 2 <= quant.matrix_bits <= 8, "must be in [2, 8]"),
        ("quant.embed_bits", 2 <= quant.embed_bits <= 8, "must be in [2, 8]"),
        ("quant.clip_quantile", 0 < quant.clip_quantile <= 1, "must be in (0, 1]"),
        (
            "eval.stride",
            1 <= cfg.eval.stride <= (cfg.eval.context_len or data.seq_len),
            "must be in [1, context]",
        ),
        ("schedule.warmdown_frac", 0 <= cfg.schedule.warmdown_frac <= 1, "must be in [0, 1]"),
        ("average.ema_decay", 0 <= cfg.average.ema_decay < 1, "must be in [0, 1)"),
        ("optim.num_ns_steps", cfg.optim.num_ns_steps >= 1, "must be at least 1"),
        ("run.max_wallclock_seconds", cfg.run.max_wallclock_seconds >= 0, "must not be negative"),
    ]
    for name, allowed in choices.items():
        value = config_value(cfg, name)
        rules.append((name, value in allowed, f"must be one of {', '.join(allowed)}"))
    for name, holds, constraint in rules:
        if not holds:
            raise UserError(f"{name}={config_value(cfg, name)} {constraint}.")


def config_value(cfg: Config, name: str):
    """Read a field by its "section.key" name."""
    section, key = name.split(".")
    return getattr(getattr(cfg, section), key)


def recipe_of(cfg: Config, live: bool = False) -> dict[str, dict]:
    """Return {section: {key: value}} of every field that a recipe fixes, or with live all fields."""
    recipe: dict[str, dict] = {}
    for name, item in config_fields().items():
        if live or not item.metadata["live"]:
            section, key = name.split(".")
            recipe.setdefault(section, {})[key] = config_value(cfg, name)
    return recipe


def config_hash(cfg: Config) -> str:
    """Hash what a recipe fixes: equal for all seeds, machines and paths of one configuration."""
    return hashlib.sha256(json.dumps(recipe_of(cfg), sort_keys=True).encode()).hexdigest()[:16]


def format_toml(recipe: dict[str, dict]) -> str:
    """Write {section: {key: value}} as TOML."""
    sections = []
    for section, keys in recipe.items():
        rows = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        sections.append("\n".join([f"[{section}]", *rows]))
    return "\n\n".join(sections) + "\n"


# ----------------------------------------------------------------------------------------------------------
# 3 ranks, clock, log
# ----------------------------------------------------------------------------------------------------------
# All talk between processes goes through Ranks. There is one training clock, rank 0's, and every decision
# that depends on time reads it, so ranks agree by construction.


class Ranks:
    """The processes of a run: one a GPU with nccl, or plain CPU processes with gloo."""

    def __init__(self, environment: Environment, device: str):
        self.rank, self.world_size = environment.rank, environment.world_size
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "run.device=cuda: expected a CUDA device, found none. Use run.device=auto or cpu."
            )
        use_cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", environment.local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
        if self.world_size > 1:
            dist.init_process_group(
                "nccl" if use_cuda else "gloo", device_id=self.device if use_cuda else None
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place."""
        if self.world_size > 1:
            on_device = tensor.to(self.device)
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def average(self, tensors: list[Tensor]) -> None:
        """Average tensors over all ranks in place, as one message."""
        if self.world_size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat, op=dist.ReduceOp.AVG)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def scatter_average(self, stack: Tensor) -> Tensor:
        """Average a (world * n, ...) stack over ranks and keep this rank's (n, ...) share."""
        if self.world_size == 1:
            return stack
        share = stack.new_empty(stack.shape[0] // self.world_size, *stack.shape[1:])
        dist.reduce_scatter_tensor(share, stack, op=dist.ReduceOp.AVG)
        return share

    def gather(self, share: Tensor) -> Tensor:
        """Concatenate every rank's (n, ...) share into (world * n, ...)."""
        if self.world_size == 1:
            return share
        stack = share.new_empty(share.shape[0] * self.world_size, *share.shape[1:])
        dist.all_gather_into_tensor(stack, share)
        return stack

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early takes its connections from the others
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        """Most memory used so far: the device's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Clock:
    """The training clock in milliseconds: rank 0's, the same on every rank, stopped while validating."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.total_ms = 0.0
        self.started = 0.0

    def start(self) -> None:
        self.ranks.synchronize()
        self.started = time.perf_counter()

    def read_ms(self) -> float:
        return self.ranks.agree(self.total_ms + 1000.0 * (time.perf_counter() - self.started))

    def stop(self) -> None:
        self.ranks.synchronize()
        self.total_ms = self.read_ms()


class Log:
    """The run's log: lines for people and the contest's patterns, events for programs. Rank 0 writes."""

    def __init__(self, folder: Path, is_main: bool):
        self.folder = folder
        self.is_main = is_main

    def line(self, text: str, console: bool = True) -> None:
        """Write a line to train.log and, unless told otherwise, to standard output."""
        if self.is_main:
            if console:
                print(text, flush=True)
            with open(self.folder / "train.log", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def event(self, **values) -> None:
        """Append one JSON object to metrics.jsonl."""
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


# ----------------------------------------------------------------------------------------------------------
# 4 data
# ----------------------------------------------------------------------------------------------------------
# A step's tokens are consecutive spans of one stream, dealt to micro-batches and ranks in order, so any
# number of ranks sees the same global batch.


class ShardStream:
    """Read the training shards in order, for ever."""

    def __init__(self, pattern: str | Path, vocab_size: int):
        self.files = find_shards(pattern)
        self.vocab_size = vocab_size
        self.shard = 0
        self.position = 0
        self.tokens = read_shard(self.files[0])
        if sum(read_shard(path).size for path in self.files) == 0:
            raise UserError(f"{pattern}: the training shards hold no tokens. Make the data again.")

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` tokens, (count,) uint16, going round after the last shard."""
        parts = []
        while count > 0:
            if self.position == self.tokens.size:
                self.shard = (self.shard + 1) % len(self.files)
                self.tokens, self.position = read_shard(self.files[self.shard]), 0
            part = self.tokens[self.position : self.position + count]
            self.position += part.size
            count -= part.size
            parts.append(part)
        tokens = np.concatenate(parts)
        check_token_ids(tokens, self.vocab_size, self.files[self.shard])
        return tokens

    def state_dict(self) -> dict:
        return {"shard": self.shard, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.shard, self.position = state["shard"], state["position"]
        self.tokens = read_shard(self.files[self.shard])


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the next tokens
    starts_doc: Tensor  # (B, T) bool: the token is a document's BOS


def next_batch(stream: ShardStream, cfg: DataConfig, bos_id: int, ranks: Ranks) -> Batch:
    """Take the next micro-batch of every rank from the stream and keep this rank's."""
    span = cfg.batch_tokens // cfg.micro_batches + 1  # one more: the last input's target
    start = ranks.rank * span
    local = stream.take(span * ranks.world_size)[start : start + span]
    chunk = torch.from_numpy(local.astype(np.int64)).to(ranks.device, non_blocking=True)
    tokens = chunk[:-1].view(-1, cfg.seq_len)
    return Batch(tokens, chunk[1:].view(-1, cfg.seq_len), tokens == bos_id)


class ValidationText(NamedTuple):
    tokens: np.ndarray  # (N + 1,) uint16
    target_bytes: np.ndarray  # (N,) original UTF-8 bytes of each target
    bos_id: int
    pattern: str


def load_validation(cfg: DataConfig, pattern: str = "", tokenizer_sha256: str = "") -> ValidationText:
    """Load all validation shards with the byte count of every target; refuses a wrong byte total.

    tokenizer_sha256 is that of the tokenizer which the model was trained with, where one is known.
    """
    codec = load_codec(cfg.tokenizer_path, cfg.vocab_size)
    pattern = pattern or str(Path(cfg.data_path) / VAL_GLOB)
    files = find_shards(pattern)
    manifest = read_manifest(files[0].parent) or {}
    made_with = tokenizer_sha256 or manifest.get("tokenizer", {}).get("sha256", codec.digest)
    if made_with != codec.digest:
        raise UserError(
            f"{cfg.tokenizer_path}: expected the tokenizer with sha256 {made_with[:16]}, "
            f"found {codec.digest[:16]}. Set TOKENIZER_PATH to it or make the data again."
        )
    tokens = np.concatenate([read_shard(path) for path in files])
    check_token_ids(tokens, cfg.vocab_size, pattern)
    if tokens.size < 2:
        raise UserError(
            f"{pattern}: expected 2 or more validation tokens, found {tokens.size}. Make the data again."
        )
    token_bytes = codec.token_bytes(tokens)
    expected = manifest.get("val", {}).get("expected_token_bytes", int(token_bytes.sum()))
    if expected != int(token_bytes.sum()):
        raise UserError(
            f"{pattern}: the manifest expects {expected:,} bytes, the tokens have {token_bytes.sum():,}. "
            "A bits-per-byte figure from them would be wrong; make the data again."
        )
    return ValidationText(tokens, token_bytes[1:], codec.bos_id, pattern)


# ----------------------------------------------------------------------------------------------------------
# 5 model
# ----------------------------------------------------------------------------------------------------------
# Weights are float32 masters; CastLinear casts them to the activations' dtype at the product. Training,
# validation and scoring call the same GPT.forward.


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; no gain."""
    return F.rms_norm(x, (x.size(-1),))


class CastLinear(nn.Linear):
    """A bias-free Linear whose float32 weight is cast to the input's dtype."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(seq_len: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * base^(-2i / head_dim), each (T, 1, K / 2), in the dtype of `like`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, 1.0 / base**exponents)[:, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to (B, T, H, K); pairs are (i, i + K / 2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over (B, T, H, K) queries and (B, T, G, K) keys and values; returns (B, T, H, K)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys and a learned gain a query head."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.q = CastLinear(cfg.model_dim, cfg.model_dim)
        self.k = CastLinear(cfg.model_dim, kv_dim)
        self.v = CastLinear(cfg.model_dim, kv_dim)
        self.out = CastLinear(cfg.model_dim, cfg.model_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.q_gain_init))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))
        q = rotate(rms_norm(q), rope) * self.q_gain.to(x.dtype)[:, None]  # (B, T, H, K)
        return self.out(attention(q, rotate(rms_norm(k), rope), v).flatten(2))


class MLP(nn.Module):
    """down(max(h, slope * h)^2) with h = up(x); slope 0 is ReLU^2, 0.5 the contest's LeakyReLU^2."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden_dim = int(cfg.mlp_mult * cfg.model_dim)
        self.slope = cfg.leaky_slope
        self.up = CastLinear(cfg.model_dim, hidden_dim)
        self.down = CastLinear(hidden_dim, cfg.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), self.slope).square())


class Block(nn.Module):
    """Mix in the embedding, then add attention and mlp, each with a learned scale a channel."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn = SelfAttention(cfg)
        self.mlp = MLP(cfg)
        self.resid_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.embed_mix = nn.Parameter(torch.zeros(cfg.model_dim))
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))

    def forward(self, x: Tensor, embedded: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = self.resid_scale.to(x.dtype) * x + self.embed_mix.to(x.dtype) * embedded  # (B, T, D)
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), rope)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class SmearGate(nn.Module):
    """Add a gated copy of the previous position: a one-token lookback for a dozen weights."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.width = width  # channels the gate may read
        self.gate = CastLinear(width, 1)
        self.strength = nn.Parameter(torch.zeros(()))  # 0 at init: the module is the identity

    def forward(self, x: Tensor, starts_doc: Tensor) -> Tensor:  # (B, T, D), (B, T) bool
        gate = self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[..., : self.width]))  # (B, T, 1)
        # A document's first token has no predecessor. Unmasked, packed rows leak text between
        # documents, which makes the score illegal.
        gate = gate.masked_fill(starts_doc.unsqueeze(-1), 0.0)
        return x + gate * F.pad(x, (0, 0, 1, -1))  # (B, T, D), shifted one step right


class Step(NamedTuple):
    """One visit of a block in the forward pass."""

    layer: int
    push: bool  # keep the output for a later skip
    pop: int | None  # row of skip_weights that scales the newest kept output, added before the block


def num_skips(cfg: ModelConfig) -> int:
    """Count the U-Net skips: one for each block of the first half."""
    return cfg.num_layers // 2 if cfg.unet_skips else 0


def layer_plan(cfg: ModelConfig) -> list[Step]:
    """List the block visits of a forward pass in order: U-Net skips join the halves, innermost first."""
    half = cfg.num_layers // 2
    pops = range(half, half + num_skips(cfg))
    return [
        Step(layer, push=layer < num_skips(cfg), pop=layer - half if layer in pops else None)
        for layer in range(cfg.num_layers)
    ]


class GPT(nn.Module):
    """A decoder-only transformer. forward returns softcapped logits, (B, T - first, V)."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = compute_dtype
        self.plan = layer_plan(cfg)
        self.embed = nn.Embedding(vocab_size, cfg.model_dim)
        self.smear = SmearGate() if cfg.smear_gate else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.skip_weights = (
            nn.Parameter(torch.ones(num_skips(cfg), cfg.model_dim)) if num_skips(cfg) else None
        )
        self.head = None if cfg.tie_embeddings else CastLinear(cfg.model_dim, vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero what writes into the residual stream or the logits; the rest keeps torch's defaults."""
        if self.head is None:
            nn.init.normal_(self.embed.weight, std=self.cfg.embed_init_std)
        else:
            self.head.weight.zero_()
        for block in self.blocks:
            block.attn.out.weight.zero_()
            block.mlp.down.weight.zero_()

    def forward(self, tokens: Tensor, starts_doc: Tensor, first: int = 0) -> Tensor:
        """Predict the token after each of (B, T) tokens, for positions from `first` on."""
        x = self.embed(tokens).to(self.compute_dtype)  # (B, T, D)
        if self.smear is not None:
            x = self.smear(x, starts_doc)
        x = embedded = rms_norm(x)
        rope = rope_tables(tokens.size(1), self.cfg.model_dim // self.cfg.num_heads, self.cfg.rope_base, x)
        kept: list[Tensor] = []
        for step in self.plan:
            if step.pop is not None:
                x = x + self.skip_weights[step.pop].to(x.dtype) * kept.pop()
            x = self.blocks[step.layer](x, embedded, rope)
            if step.push:
                kept.append(x)
        x = rms_norm(x[:, first:])
        weight = self.embed.weight if self.head is None else self.head.weight
        logits = F.linear(x, weight.to(x.dtype))  # (B, T - first, V)
        return self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch in nats, from float32 logits."""
    logits = model(batch.tokens, batch.starts_doc)
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Choose the compute dtype: auto is bfloat16 where the device multiplies it natively."""
    if requested != "auto":
        return getattr(torch, requested)
    native = device.type == "cuda" or any(
        torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16")
    )
    return torch.bfloat16 if native else torch.float32


def resolve_compile(requested: str, device: torch.device) -> bool:
    """Decide on torch.compile: auto needs a GPU, or a C++ compiler and Python's headers on a CPU."""
    if requested != "auto":
        return requested == "on"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return device.type == "cuda" or (
        headers.is_file() and any(shutil.which(c) for c in ("c++", "g++", "clang++"))
    )


def build_model(cfg: Config, device: torch.device) -> GPT:
    """Make a model on `device` with weights drawn on the CPU from run.seed, the same everywhere."""
    torch.manual_seed(cfg.run.seed)
    return GPT(cfg.model, cfg.data.vocab_size, resolve_dtype(cfg.model.compute_dtype, device)).to(device)


# ----------------------------------------------------------------------------------------------------------
# 6 optimizers
# ----------------------------------------------------------------------------------------------------------
# PARAM_RULES says for every parameter who updates it, at which rate, and how it is stored. Muon works on
# stacks of equal shapes: each rank averages, orthogonalizes and hands back its share of a stack.


class Rule(NamedTuple):
    pattern: str  # of the parameter's name; the first match wins
    optimizer: str  # muon | adamw
    lr: str  # field of OptimConfig
    weight_decay: str  # field of OptimConfig
    storage: str  # matrix | embed (quantized, bits from QuantConfig) | float32
    present: Callable[[ModelConfig], bool] = lambda cfg: True


PARAM_RULES = (
    Rule("embed.weight", "adamw", "tied_embed_lr", "embed_weight_decay", "embed", lambda m: m.tie_embeddings),
    Rule("embed.weight", "adamw", "embed_lr", "embed_weight_decay", "embed", lambda m: not m.tie_embeddings),
    Rule("head.weight", "adamw", "head_lr", "embed_weight_decay", "embed", lambda m: not m.tie_embeddings),
    Rule("blocks.*.attn.[qkvo]*.weight", "muon", "matrix_lr", "matrix_weight_decay", "matrix"),
    Rule("blocks.*.mlp.*.weight", "muon", "matrix_lr", "matrix_weight_decay", "matrix"),
    Rule("blocks.*.attn.q_gain", "adamw", "scalar_lr", "scalar_weight_decay", "float32"),
    Rule("blocks.*_scale", "adamw", "scalar_lr", "scalar_weight_decay", "float32"),
    Rule("blocks.*.embed_mix", "adamw", "scalar_lr", "scalar_weight_decay", "float32"),
    Rule("smear.*", "adamw", "scalar_lr", "scalar_weight_decay", "float32", lambda m: m.smear_gate),
    Rule("skip_weights", "adamw", "scalar_lr", "scalar_weight_decay", "float32", lambda m: num_skips(m) > 0),
)  # fmt: skip


def match_rules(cfg: ModelConfig, names: list[str]) -> dict[str, Rule]:
    """Give every parameter name its rule; a name or a present rule left over is an error."""
    rules = [rule for rule in PARAM_RULES if rule.present(cfg)]
    matched = {}
    for name in names:
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, rule.pattern)), None)
        if rule is None:
            raise ValueError(f"parameter {name} has no row in PARAM_RULES; add one beside its module's kin")
        matched[name] = rule
    unused = [rule.pattern for rule in rules if rule not in matched.values()]
    if unused:
        raise ValueError(
            f"PARAM_RULES row {unused[0]!r} matches no parameter; remove it or state when it is present"
        )
    return matched


def newton_schulz(stack: Tensor, num_steps: int) -> Tensor:
    """Push the singular values of every (r, c) matrix in (n, r, c) towards 1 (arXiv 2409.20325; Muon).

    X <- aX + (bA + cA^2)X with A = XX^T, from X / ||X||_F, in the stack's dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = stack.size(1) <= stack.size(2)
    x = stack if wide else stack.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Stack:
    """Equal-shaped matrices that Muon updates together; each rank owns an equal, padded share."""

    def __init__(self, params: list[nn.Parameter], ranks: Ranks):
        self.params = params
        self.ranks = ranks
        self.share_size = math.ceil(len(params) / ranks.world_size)
        self.momentum_buffer = torch.zeros(self.share_size, *params[0].shape, device=params[0].device)
        self.grad = self.momentum_buffer  # this rank's share of the averaged gradient, set by reduce

    def reduce(self) -> None:
        """Average the gradients over ranks and keep this rank's share."""
        grads = [param.grad for param in self.params]
        padding = self.share_size * self.ranks.world_size - len(grads)
        grads += [torch.zeros_like(grads[0])] * padding
        self.grad = self.ranks.scatter_average(torch.stack(grads))

    def update(self, momentum: float, num_ns_steps: int, dtype: torch.dtype) -> Tensor:
        """Return the orthogonalized Nesterov update of the whole stack, (n, r, c)."""
        self.momentum_buffer.mul_(momentum).add_(self.grad)
        nesterov = self.grad.add(self.momentum_buffer, alpha=momentum)
        share = newton_schulz(nesterov.to(dtype), num_ns_steps)
        rows, cols = self.params[0].shape
        return self.ranks.gather(share)[: len(self.params)] * max(1.0, rows / cols) ** 0.5


class Optimizers:
    """AdamW and Muon over one model, laid out by PARAM_RULES."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.cfg = cfg.optim
        self.ranks = ranks
        self.dtype = model.compute_dtype
        named = dict(model.named_parameters())
        groups: dict[Rule, list[nn.Parameter]] = {}
        shapes: dict[tuple, list[nn.Parameter]] = {}
        for name, rule in match_rules(cfg.model, list(named)).items():
            if rule.optimizer == "muon":
                shapes.setdefault((rule.lr, rule.weight_decay, named[name].shape), []).append(named[name])
            else:
                groups.setdefault(rule, []).append(named[name])
        self.adamw = torch.optim.AdamW(
            [
                {"params": params, "lr": getattr(cfg.optim, rule.lr), "base_lr": getattr(cfg.optim, rule.lr),
                 "weight_decay": getattr(cfg.optim, rule.weight_decay)}
                for rule, params in groups.items()
            ],
            betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.adam_eps, fused=True,
        )  # fmt: skip
        self.stacks = [
            (Stack(params, ranks), getattr(cfg.optim, lr), getattr(cfg.optim, decay))
            for (lr, decay, _), params in shapes.items()
        ]

    @torch.no_grad()
    def step(self, lr_mul: float, momentum: float) -> None:
        """Average gradients over ranks, clip their global norm, update every weight, drop the gradients."""
        adam_grads = [param.grad for group in self.adamw.param_groups for param in group["params"]]
        self.ranks.average(adam_grads)
        for stack, _, _ in self.stacks:
            stack.reduce()
        if self.cfg.grad_clip_norm > 0:
            self.clip(adam_grads)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_mul
        self.adamw.step()
        for stack, base_lr, weight_decay in self.stacks:
            update = stack.update(momentum, self.cfg.num_ns_steps, self.dtype).to(stack.params[0].dtype)
            torch._foreach_mul_(stack.params, 1.0 - base_lr * lr_mul * weight_decay)
            torch._foreach_add_(stack.params, list(update.unbind()), alpha=-base_lr * lr_mul)
        self.zero_grad()

    def clip(self, adam_grads: list[Tensor]) -> None:
        """Scale all gradients so that their global norm over all ranks is at most the limit."""
        shares = [stack.grad for stack, _, _ in self.stacks]
        total = self.ranks.sum(sum(share.double().square().sum() for share in shares)) if shares else 0.0
        total = total + sum(grad.double().square().sum() for grad in adam_grads)
        scale = (self.cfg.grad_clip_norm / (total.sqrt() + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_(adam_grads + shares, scale)

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        for stack, _, _ in self.stacks:
            for param in stack.params:
                param.grad = None

    def state_dict(self) -> dict:
        return {
            "adamw": self.adamw.state_dict(),
            "momentum": [stack.momentum_buffer for stack, _, _ in self.stacks],
        }

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for (stack, _, _), buffer in zip(self.stacks, state["momentum"]):
            stack.momentum_buffer.copy_(buffer)


# ----------------------------------------------------------------------------------------------------------
# 7 schedules
# ----------------------------------------------------------------------------------------------------------
# Pure functions of the step and the one clock.


def learning_rate_mul(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Return the factor of every learning rate before step `step`: 1, then a linear warmdown.

    With a clock the warmdown fills the last warmdown_frac of it, or the time that warmdown_iters steps
    take at the average pace so far (the contest's rule); without one it counts steps.
    """
    schedule, run = cfg.schedule, cfg.run
    if run.max_wallclock_seconds > 0:
        total, done = 1000.0 * run.max_wallclock_seconds, elapsed_ms
        warmdown = schedule.warmdown_iters * elapsed_ms / max(step, 1)
    else:
        total, done, warmdown = float(run.iterations), float(step), float(schedule.warmdown_iters)
    if schedule.warmdown_frac > 0:
        warmdown = schedule.warmdown_frac * total
    left = max(total - done, 0.0)
    return max(left / warmdown, schedule.min_lr_frac) if left < warmdown else 1.0


def muon_momentum(cfg: OptimConfig, step: int) -> float:
    """Return Muon's momentum at a step: linear from its warm-up start to its final value."""
    frac = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps > 0 else 1.0
    return (1.0 - frac) * cfg.muon_momentum_warmup_start + frac * cfg.muon_momentum


# ----------------------------------------------------------------------------------------------------------
# 8 averaging
# ----------------------------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of all weights in float32, from the initial weights on."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = list(model.parameters())
        self.averages = [param.detach().clone().float() for param in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights: average <- decay * average + (1 - decay) * weight."""
        torch._foreach_lerp_(
            self.averages, [param.detach().float() for param in self.params], 1.0 - self.decay
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by their averages."""
        torch._foreach_copy_(self.params, self.averages)

    def state_dict(self) -> dict:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.averages, state["averages"])


# ----------------------------------------------------------------------------------------------------------
# 9 quantization
# ----------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    codes: Tensor  # (rows, cols) int8
    scales: Tensor  # (rows,) float16


def quantize_rows(weight: Tensor, bits: int, cfg: QuantConfig) -> Quantized:
    """Round (rows, cols) weights to symmetric integer codes with one float16 scale a row.

    The scale maps the clip_quantile of the row's magnitudes to the largest code, 2^(bits - 1) - 1. With
    scale_floor it is at least 1 / that code. Codes are taken against the float16 scale that is stored.
    """
    largest = 2 ** (bits - 1) - 1
    weight = weight.detach().float()
    clip = torch.quantile(weight.abs(), cfg.clip_quantile, dim=1)
    scales = (clip / largest).clamp_min(1.0 / largest if cfg.scale_floor else 2.0**-20).half()
    codes = torch.round(weight / scales.float()[:, None]).clamp_(-largest, largest)
    return Quantized(codes.to(torch.int8), scales)


def dequantize_rows(quantized: Quantized) -> Tensor:
    """Return the float32 weights that codes and scales stand for."""
    return quantized.codes.float() * quantized.scales.float()[:, None]


# ----------------------------------------------------------------------------------------------------------
# 10 artifact
# ----------------------------------------------------------------------------------------------------------
# One file: magic, version, lengths, header (zlib JSON: recipe, tokenizer sha256, tensor table, stream
# table), compressed streams, sha256 of all before it. Every length is checked before anything is allocated.

ARTIFACT_MAGIC = b"PGOLF\n"
ARTIFACT_VERSION = 1
ARTIFACT_PREFIX = struct.Struct("<6sHII")  # magic, version, header bytes stored, header bytes raw
CHECKSUM_BYTES = 16
MAX_HEADER_BYTES = 1 << 24
MAX_RAW_BYTES = 1 << 32
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
# Raw streams, in file order, and the numpy dtype of their elements.
STREAM_DTYPES = {"codes": np.dtype("i1"), "scales": np.dtype("<f2"), "floats": np.dtype("<f4")}


class ArtifactError(UserError):
    """An artifact that is not whole, not ours, or contradicts itself."""


def require_codec(codec: str) -> None:
    """Raise before any work is done when the artifact's compressor is not installed."""
    if codec == "zstd" and importlib.util.find_spec("zstandard") is None:
        raise UserError(
            "quant.codec=zstd: the package zstandard is missing. Install it or set quant.codec=lzma."
        )


def compress(raw: bytes, codec: str) -> bytes:
    """Compress one stream as small as its codec can."""
    if codec == "zlib":
        return zlib.compress(raw, level=9)
    if codec == "lzma":
        return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    import zstandard

    return zstandard.ZstdCompressor(level=22, write_content_size=False).compress(raw)


def decompress(stored: bytes, codec: str, raw_bytes: int) -> bytes:
    """Decompress one stream to exactly raw_bytes bytes; never allocates more than one byte beyond them."""
    try:
        if codec == "zlib":
            raw = zlib.decompressobj().decompress(stored, raw_bytes + 1)
        elif codec == "lzma":
            raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(
                stored, raw_bytes + 1
            )
        else:
            import zstandard

            raw = zstandard.ZstdDecompressor().stream_reader(stored).read(raw_bytes + 1)
    except Exception as error:  # each library has its own exception for damaged input
        raise ArtifactError(f"artifact: a {codec} stream is damaged ({error}).") from error
    if len(raw) != raw_bytes:
        raise ArtifactError(
            f"artifact: a {codec} stream holds {len(raw)} bytes or more, expected {raw_bytes}."
        )
    return raw


class TensorRow(NamedTuple):
    """A row of the artifact's tensor table."""

    name: str
    shape: list[int]
    storage: str  # rows (codes and scales) | float32


def write_artifact(model: GPT, cfg: Config, tokenizer_sha256: str, path: Path) -> list[tuple[str, int]]:
    """Quantize and write a model; returns the ledger [(part, bytes)] whose sum is the file's size."""
    rules = match_rules(cfg.model, [name for name, _ in model.named_parameters()])
    table: list[TensorRow] = []
    raw: dict[str, list[bytes]] = {name: [] for name in STREAM_DTYPES}
    for name, param in model.named_parameters():
        storage = rules[name].storage
        if storage == "float32":
            raw["floats"].append(param.detach().float().cpu().numpy().tobytes())
        else:
            quantized = quantize_rows(param.cpu(), getattr(cfg.quant, f"{storage}_bits"), cfg.quant)
            raw["codes"].append(quantized.codes.numpy().tobytes())
            raw["scales"].append(quantized.scales.numpy().tobytes())
        table.append(TensorRow(name, list(param.shape), "float32" if storage == "float32" else "rows"))
    joined = {name: b"".join(parts) for name, parts in raw.items()}
    stored = {name: compress(data, cfg.quant.codec) for name, data in joined.items()}
    header = {
        "recipe": recipe_of(cfg),
        "tokenizer_sha256": tokenizer_sha256,
        "tensors": table,
        "streams": [[name, len(stored[name]), len(joined[name])] for name in STREAM_DTYPES],
    }
    header_raw = json.dumps(header, separators=(",", ":")).encode()
    header_stored = zlib.compress(header_raw, 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(header_stored), len(header_raw))
    body = prefix + header_stored + b"".join(stored.values())
    with atomic_file(path) as file:
        file.write(body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES])
    container = len(prefix) + len(header_stored) + CHECKSUM_BYTES
    return [
        ("container and recipe", container),
        *((f"weights: {name}", len(data)) for name, data in stored.items()),
    ]


def read_header(blob: bytes, path: Path) -> tuple[dict, int]:
    """Check an artifact's frame; returns its header and the offset of the first stream."""
    again = "Copy it again or retrain."
    smallest = ARTIFACT_PREFIX.size + CHECKSUM_BYTES
    if len(blob) < smallest:
        raise ArtifactError(f"{path}: an artifact has at least {smallest} bytes, found {len(blob)}. {again}")
    magic, version, stored_bytes, raw_bytes = ARTIFACT_PREFIX.unpack_from(blob)
    if magic != ARTIFACT_MAGIC or version != ARTIFACT_VERSION:
        raise ArtifactError(
            f"{path}: expected magic {ARTIFACT_MAGIC!r} version {ARTIFACT_VERSION}, found {magic!r} {version}"
        )
    if hashlib.sha256(blob[:-CHECKSUM_BYTES]).digest()[:CHECKSUM_BYTES] != blob[-CHECKSUM_BYTES:]:
        raise ArtifactError(f"{path}: the checksum does not match; the file is truncated or damaged. {again}")
    end = ARTIFACT_PREFIX.size + stored_bytes
    if end > len(blob) - CHECKSUM_BYTES or raw_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path}: the header's length {stored_bytes} does not fit the file. {again}")
    text = decompress(blob[ARTIFACT_PREFIX.size : end], "zlib", raw_bytes)
    try:
        header = json.loads(text)
        lengths = [(str(name), int(stored), int(raw)) for name, stored, raw in header["streams"]]
        header["tensors"] = [
            TensorRow(str(n), [int(d) for d in s], str(kind)) for n, s, kind in header["tensors"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: the header cannot be read ({error!r}). {again}") from error
    fits = sum(stored for _, stored, _ in lengths) == len(blob) - CHECKSUM_BYTES - end
    sane = all(stored >= 0 and 0 <= raw <= MAX_RAW_BYTES for _, stored, raw in lengths)
    if [name for name, _, _ in lengths] != list(STREAM_DTYPES) or not fits or not sane:
        raise ArtifactError(f"{path}: the stream table {lengths} does not fit the file. {again}")
    return header, end


def read_streams(blob: bytes, header: dict, offset: int, codec: str) -> dict[str, np.ndarray]:
    """Decompress the streams after checking their lengths against the tensor table."""
    rows, floats = (
        [row.shape for row in header["tensors"] if row.storage == storage] for storage in ("rows", "float32")
    )
    counts = {
        "codes": sum(math.prod(shape) for shape in rows),
        "scales": sum(shape[0] for shape in rows),
        "floats": sum(math.prod(shape) for shape in floats),
    }
    streams = {}
    for name, stored_bytes, raw_bytes in header["streams"]:
        dtype = STREAM_DTYPES[name]
        needed = counts[name] * dtype.itemsize
        if needed != raw_bytes:
            raise ArtifactError(
                f"artifact: stream {name} has {raw_bytes} bytes, the tensor table needs {needed}."
            )
        streams[name] = np.frombuffer(
            decompress(blob[offset : offset + stored_bytes], codec, raw_bytes), dtype
        )
        offset += stored_bytes
    return streams


def load_artifact(path: str | Path, live: Config, device: torch.device) -> tuple[GPT, Config, dict]:
    """Load a model from an artifact file.

    Model, quantizer and scoring settings come from the artifact; only live fields (paths, device) come
    from `live`. Returns the model, the merged config and the header.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such artifact. Train one with `make run` or train_gpt.py.")
    blob = path.read_bytes()
    header, offset = read_header(blob, path)
    cfg = with_values(live, flatten_recipe(header["recipe"], str(path)), str(path))
    check_config(cfg)
    with torch.device("meta"):
        expected = {
            name: list(param.shape) for name, param in GPT(cfg.model, cfg.data.vocab_size).named_parameters()
        }
    if {row.name: row.shape for row in header["tensors"]} != expected or len(header["tensors"]) != len(
        expected
    ):
        raise ArtifactError(f"{path}: the tensor table is not that of the recipe in it.")
    streams = read_streams(blob, header, offset, cfg.quant.codec)
    model = build_model(cfg, torch.device("cpu"))
    model.load_state_dict(unpack_tensors(header["tensors"], streams))
    model.compute_dtype = resolve_dtype(cfg.model.compute_dtype, device)
    return model.to(device), cfg, header


def unpack_tensors(table: list[TensorRow], streams: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Cut the streams into tensors in table order and dequantize them."""
    positions = dict.fromkeys(streams, 0)

    def cut(stream: str, shape: list[int]) -> Tensor:
        start = positions[stream]
        positions[stream] = start + math.prod(shape)
        return torch.from_numpy(streams[stream][start : positions[stream]].copy()).view(shape)

    tensors = {}
    for row in table:
        if row.storage == "rows":
            tensors[row.name] = dequantize_rows(
                Quantized(cut("codes", row.shape), cut("scales", row.shape[:1]))
            )
        else:
            tensors[row.name] = cut("floats", row.shape)
    return tensors


# ----------------------------------------------------------------------------------------------------------
# 11 training loop
# ----------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What scoring a text gave; sums are float64."""

    val_loss: float  # nats a token
    val_bpb: float
    num_tokens: int
    num_bytes: int
    mode: str
    context_len: int
    stride: int
    tail: str  # included | cut
    seconds: float


def score_model(model: Callable, cfg: Config, text: ValidationText, ranks: Ranks, progress=None) -> Score:
    """Score a validation text as cfg.eval says, with all ranks; every rank returns the same score."""
    settings = cfg.eval
    context_len = settings.context_len or cfg.data.seq_len
    stride = settings.stride if settings.mode == "sliding" else 0
    windows = plan_windows(len(text.tokens) - 1, context_len, stride, settings.keep_tail)
    if not len(windows):
        raise UserError(
            f"{text.pattern}: expected at least one window of {context_len} + 1 validation tokens, found "
            f"{len(text.tokens):,}. Make the validation set larger or eval.context_len smaller."
        )
    started = time.perf_counter()
    nats = score_windows(
        model,
        text.tokens,
        windows,
        bos_id=text.bos_id,
        batch_tokens=cfg.run.val_batch_tokens // cfg.data.micro_batches,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        progress=progress,
    )
    nats = ranks.sum(nats).numpy()
    meter = BpbMeter()
    meter.add(nats, text.target_bytes[: len(nats)])
    seconds = ranks.agree(time.perf_counter() - started)
    tail = "included" if settings.keep_tail else "cut"
    totals = (meter.val_loss, meter.val_bpb, meter.num_tokens, meter.num_bytes)
    return Score(*totals, settings.mode, context_len, stride, tail, seconds)


class Training:
    """Everything that a step changes, with one state_dict."""

    def __init__(self, cfg: Config, ranks: Ranks, bos_id: int):
        self.cfg, self.ranks, self.bos_id = cfg, ranks, bos_id
        self.model = build_model(cfg, ranks.device)
        self.optimizers = Optimizers(self.model, cfg, ranks)
        self.ema = Ema(self.model, cfg.average.ema_decay) if cfg.average.ema_decay > 0 else None
        self.stream = ShardStream(Path(cfg.data.data_path) / TRAIN_GLOB, cfg.data.vocab_size)
        self.loss = mean_loss
        if resolve_compile(cfg.run.compile, ranks.device):
            self.loss = torch.compile(mean_loss, dynamic=False, fullgraph=True)

    def state_dict(self) -> dict:
        parts = {"model": self.model, "optimizers": self.optimizers, "stream": self.stream}
        if self.ema:
            parts["ema"] = self.ema
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.stream.load_state_dict(state["stream"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    def accumulate(self, out_of_time: Callable[[], bool]) -> float | None:
        """Add up a step's gradients; returns the mean loss over ranks, or None when time ran out in it."""
        micro_steps = self.cfg.data.micro_batches // self.ranks.world_size
        total = torch.zeros((), device=self.ranks.device)
        for micro_step in range(micro_steps):
            if micro_step > 0 and out_of_time():
                self.optimizers.zero_grad()
                return None
            batch = next_batch(self.stream, self.cfg.data, self.bos_id, self.ranks)
            loss = self.loss(self.model, batch) / micro_steps
            loss.backward()
            total += loss.detach()
        return float(self.ranks.sum(total).item()) / self.ranks.world_size

    def update(self, step: int, elapsed_ms: float) -> None:
        """Change the weights with the accumulated gradients of step `step`."""
        self.optimizers.step(
            learning_rate_mul(self.cfg, step, elapsed_ms), muon_momentum(self.cfg.optim, step)
        )
        if self.ema:
            self.ema.update()


def warm_up(training: Training, log: Log) -> None:
    """Compile and time real steps before the clock starts, then restore all state; prints a projection."""
    cfg, ranks = training.cfg, training.ranks
    initial = copy.deepcopy(training.state_dict())
    marks: list[float] = []

    def mark() -> bool:
        ranks.synchronize()
        marks.append(time.perf_counter())
        return False

    for step in range(cfg.run.warmup_steps):
        marks.clear()
        mark()
        training.accumulate(mark)
        mark()
        training.update(step, 0.0)
        mark()
        log.line(f"warmup_step:{step + 1}/{cfg.run.warmup_steps}")
    training.load_state_dict(initial)
    if marks:
        # The last micro-batch runs compiled code even when the first step compiled it.
        micro, update = marks[-2] - marks[-3], marks[-1] - marks[-2]
        step_seconds = ranks.agree(micro * (len(marks) - 2) + update)
        limit = cfg.run.max_wallclock_seconds or math.inf
        total = min(limit, cfg.run.iterations * step_seconds)
        log.line(f"projected: {step_seconds:.3f} s a step, {total / step_seconds:.0f} steps in {total:.0f} s")


def train(training: Training, log: Log, validate: Callable[[], Score]) -> dict:
    """Run the training loop under the clock; returns steps, milliseconds and tokens per second."""
    cfg, ranks, run = training.cfg, training.ranks, training.cfg.run
    limit_ms = 1000.0 * run.max_wallclock_seconds if run.max_wallclock_seconds > 0 else math.inf
    clock = Clock(ranks)
    clock.start()
    step, elapsed_ms, stopped = 0, 0.0, False
    while True:
        done = stopped or step == run.iterations
        on_schedule = run.val_loss_every > 0 and step % run.val_loss_every == 0
        if on_schedule or (done and run.val_loss_every >= 0):
            clock.stop()
            score = validate()
            log.line(
                f"step:{step}/{run.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                f"train_time:{clock.total_ms:.0f}ms step_avg:{clock.total_ms / max(step, 1):.2f}ms"
            )
            log.event(
                kind="val", step=step, val_loss=score.val_loss, val_bpb=score.val_bpb, train_ms=clock.total_ms
            )
            clock.start()
        if done:
            break
        train_loss = training.accumulate(lambda: clock.read_ms() >= limit_ms)
        if train_loss is None:
            elapsed_ms, stopped = clock.read_ms(), True
            continue
        if not math.isfinite(train_loss):
            raise UserError(
                f"step {step + 1}: expected a finite train_loss, found {train_loss}; the log is kept. "
                "Lower optim.matrix_lr and optim.tied_embed_lr, or set optim.grad_clip_norm=1."
            )
        training.update(step, elapsed_ms)
        step += 1
        elapsed_ms = clock.read_ms()
        stopped = elapsed_ms >= limit_ms
        if run.train_log_every > 0 and (step <= 10 or step % run.train_log_every == 0 or stopped):
            log.line(
                f"step:{step}/{run.iterations} train_loss:{train_loss:.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )
        log.event(kind="train", step=step, train_loss=train_loss, train_ms=elapsed_ms)
    if stopped and step < run.iterations:
        log.line(f"stopping_early: wallclock_cap train_time:{elapsed_ms:.0f}ms step:{step}/{run.iterations}")
    tokens_per_second = 1000.0 * step * cfg.data.batch_tokens / max(elapsed_ms, 1e-9)
    return {"steps": step, "train_ms": elapsed_ms, "tokens_per_second": tokens_per_second}


# ----------------------------------------------------------------------------------------------------------
# 12 main
# ----------------------------------------------------------------------------------------------------------


def weigh_code(folder: Path, log: Log) -> int:
    """Write the run's packed source as folder/train_gpt.py and return its size in bytes.

    From a checkout dev/pack.py packs this file with the run's recipe; a packed program copies itself.
    """
    target = folder / "train_gpt.py"
    here = Path(__file__).resolve()
    if PACKED_RECIPE is not None:
        with atomic_file(target) as file:
            file.write(here.read_bytes())
        return target.stat().st_size
    command = [
        sys.executable,
        "-m",
        "dev.pack",
        "--recipe",
        str(folder.resolve() / "recipe.toml"),
        "--out",
        str(target.resolve()),
        "--json",
    ]
    result = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(
            f"packing the source failed; run `{' '.join(command[1:])}` to see why:\n{result.stderr.strip()}"
        )
    left_out = json.loads(result.stdout)["steps_left_out"]
    if left_out:
        log.line(f"code_packing: left out {', '.join(left_out)}; the size is that of the file as written")
    return target.stat().st_size


def log_setup(cfg: Config, training: Training, text: ValidationText, log: Log) -> None:
    """Log what runs, in the contest's lines where it has them."""
    ranks, optim, run = training.ranks, cfg.optim, cfg.run
    log.line(f"Running Python {sys.version}", console=False)
    log.line(f"Running PyTorch {torch.__version__}", console=False)
    log.line(f"config_hash:{config_hash(cfg)}")
    log.line(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.data.tokenizer_path}")
    name = Path(cfg.data.data_path).resolve().name
    log.line(f"train_loader:dataset:{name} train_shards:{len(training.stream.files)}")
    log.line(f"val_loader:shards pattern={text.pattern} tokens:{len(text.tokens) - 1}")
    log.line(f"model_params:{sum(param.numel() for param in training.model.parameters())}")
    log.line(f"world_size:{ranks.world_size} grad_accum_steps:{cfg.data.micro_batches // ranks.world_size}")
    compiled = "on" if training.loss is not mean_loss else "off"
    log.line(
        f"device:{ranks.device.type} compute_dtype:{str(training.model.compute_dtype)[6:]} compile:{compiled}"
    )
    log.line(f"attention_mode:gqa num_heads:{cfg.model.num_heads} num_kv_heads:{cfg.model.num_kv_heads}")
    token_lr = optim.tied_embed_lr if cfg.model.tie_embeddings else optim.embed_lr
    head_lr = 0.0 if cfg.model.tie_embeddings else optim.head_lr
    log.line(
        f"tie_embeddings:{cfg.model.tie_embeddings} embed_lr:{token_lr} head_lr:{head_lr} "
        f"matrix_lr:{optim.matrix_lr} scalar_lr:{optim.scalar_lr}"
    )
    log.line(
        f"train_batch_tokens:{cfg.data.batch_tokens} train_seq_len:{cfg.data.seq_len} "
        f"iterations:{run.iterations} warmup_steps:{run.warmup_steps} "
        f"max_wallclock_seconds:{run.max_wallclock_seconds:.3f}"
    )
    log.line(f"seed:{run.seed}")


def export(training: Training, tokenizer_sha256: str, folder: Path, log: Log) -> list[tuple[str, int]]:
    """Write artifact and packed source; returns the byte ledger and logs it in the contest's lines."""
    cfg = training.cfg
    artifact = folder / "artifact.bin"
    parts = write_artifact(training.model, cfg, tokenizer_sha256, artifact)
    code_bytes = weigh_code(folder, log)
    float_bytes = sum(4 * param.numel() for param in training.model.parameters())
    model_bytes = artifact.stat().st_size
    label = f"int{cfg.quant.matrix_bits}+{cfg.quant.codec}"
    log.line(f"Serialized model: {float_bytes} bytes")
    log.line(f"Code size: {code_bytes} bytes")
    log.line(f"Total submission size: {float_bytes + code_bytes} bytes")
    log.line(
        f"Serialized model {label}: {model_bytes} bytes (payload_ratio:{float_bytes / model_bytes:.2f}x)"
    )
    log.line(f"Total submission size {label}: {model_bytes + code_bytes} bytes")
    return [("code (packed train_gpt.py)", code_bytes), *parts]


def show_progress(write: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a progress callback that writes a line at each tenth of the batches, with the time left."""
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if total >= 20 and done * 10 // total > (done - 1) * 10 // total and done < total:
            left = (time.perf_counter() - started) * (total - done) / done
            write(f"scoring: {100 * done // total}% seconds_left:{left:.0f}")

    return progress


def run(cfg: Config, environment: Environment) -> None:
    """Do the main job: train, average, quantize, pack, reload, score, report."""
    started = time.perf_counter()
    require_codec(cfg.quant.codec)
    if cfg.data.micro_batches % environment.world_size:
        raise UserError(
            f"data.micro_batches={cfg.data.micro_batches} must be a multiple of the world size "
            f"{environment.world_size}, so that every number of ranks sees the same batch."
        )
    ranks = Ranks(environment, cfg.run.device)
    started_at = time.localtime(ranks.agree(time.time()))  # rank 0's, so that all ranks name one folder
    folder = Path(cfg.run.out_dir) / (cfg.run.run_id or time.strftime("%Y%m%d_%H%M%S", started_at))
    log = Log(folder, ranks.is_main)
    if ranks.is_main:
        prepare_folder(folder, cfg)
    text = load_validation(cfg.data)
    training = Training(cfg, ranks, text.bos_id)
    log_setup(cfg, training, text, log)
    for name, value in environment.overrides.items():
        log.line(f"environment_override: {name}={value}", console=False)
    warm_up(training, log)
    setup_seconds = time.perf_counter() - started

    plain = dataclasses.replace(cfg, eval=EvalConfig(context_len=cfg.data.seq_len, stride=cfg.data.seq_len))
    facts = train(training, log, lambda: score_model(training.model, plain, text, ranks))
    log.line(f"peak memory allocated: {ranks.peak_memory_mib()} MiB")

    export_started = time.perf_counter()
    if training.ema:
        training.ema.apply()
    ledger = export(training, sha256_file(cfg.data.tokenizer_path), folder, log) if ranks.is_main else []
    ranks.barrier()
    export_seconds = time.perf_counter() - export_started
    model, packed_cfg, header = load_artifact(folder / "artifact.bin", cfg, ranks.device)
    text = load_validation(packed_cfg.data, text.pattern, header["tokenizer_sha256"])
    score = score_model(model, packed_cfg, text, ranks, show_progress(log.line))
    label = f"final_int{cfg.quant.matrix_bits}_{cfg.quant.codec}_roundtrip"
    log.line(
        f"eval_mode:{score.mode} context_len:{score.context_len} stride:{score.stride} tail:{score.tail} "
        f"tokens:{score.num_tokens} bytes:{score.num_bytes}"
    )
    values = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}"
    log.line(f"{label} {values} eval_time:{1000 * score.seconds:.0f}ms")
    log.line(f"{label}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
    if ranks.is_main:
        seconds = {
            "set-up and warm-up": setup_seconds,
            "training": facts["train_ms"] / 1000,
            "quantize and pack": export_seconds,
            "scoring": score.seconds,
        }
        finish(folder, cfg, {**facts, "score": score._asdict(), "ledger": ledger, "seconds": seconds}, log)
    ranks.close()


def prepare_folder(folder: Path, cfg: Config) -> None:
    """Make the run folder and write the resolved recipe; an older run of the same name gives way."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.log", "metrics.jsonl", "result.json", "artifact.bin", "train_gpt.py"):
        (folder / name).unlink(missing_ok=True)
    with atomic_file(folder / "recipe.toml") as file:
        file.write(format_toml(recipe_of(cfg, live=True)).encode())


def finish(folder: Path, cfg: Config, result: dict, log: Log) -> None:
    """Print the ledgers and write result.json; raise when the submission is over its byte limit."""
    log.line("bytes of the submission")
    log.line(format_ledger(result["ledger"], cfg.quant.limit_bytes, "bytes"))
    log.line("seconds by phase")
    log.line("\n".join(f"  {name:<28} {value:>14,.1f} s" for name, value in result["seconds"].items()))
    result["artifact_sha256"] = sha256_file(folder / "artifact.bin")
    result["config_hash"] = config_hash(cfg)
    result["seed"] = cfg.run.seed
    write_json(folder / "result.json", result)
    log.line(f"run_folder:{folder}")
    check_bytes(result["ledger"], cfg.quant.limit_bytes)
    if result["score"]["seconds"] > cfg.eval.limit_seconds:
        raise UserError(
            f"scoring took {result['score']['seconds']:.0f} s, the budget is {cfg.eval.limit_seconds:.0f} s. "
            "Raise eval.stride or use eval.mode=chunked."
        )


def describe_fields() -> str:
    """List every config field with its default, environment name and meaning, for --help."""
    rows = []
    for name, item in config_fields().items():
        env = f" [{item.metadata['env']}]" if item.metadata["env"] else ""
        rows.append(f"  {name} = {item.default!r}{env}: {item.metadata['help']}")
    return "fields (default, [environment name], meaning):\n" + "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description="Train, quantize, pack and score a model as one recipe says.",
        epilog=describe_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", help="recipe.toml; default: the contest's naive baseline")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    args = parser.parse_args(argv)
    environment = read_environment()
    run(load_config(args.recipe, environment.overrides, args.overrides), environment)


if __name__ == "__main__":
    run_command(main)
