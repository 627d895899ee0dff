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

import copy
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

# Threads that wait give up their core after microseconds, not milliseconds: beside another process, waiting
# ones made a step 2 to 40 times slower (dev/LOG.md, "a neighbour on the machine"). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import (
    CommandParser,
    UserError,
    append_text,
    atomic_file,
    parse_json,
    run_command,
    sha256_file,
    split_numbers,
)
from data.codecs import TokenCodec, check_stated, read_codec
from data.intact import ShardVerifier, val_summary
from data.loader import LOADERS, LoaderSettings, TokenLoader, make_loader
from data.shards import TRAIN_GLOB, VAL_GLOB, digest_of_data, read_report, stated_tokenizer
from data.validation import ValidationText, account_validation, read_validation, scored_tokens
from durable.lock import lock_folder
from durable.peers import (
    FIRST_MEET_S,
    LOST,
    MEET_S,
    OWN,
    PeerError,
    Peers,
    check_launch,
    end_explained,
    waiting_told,
)
from durable.seals import last_seal, seal_event, write_sealed
from durable.stops import DAMAGED, Stopped, Stops
from formats.artifact import ArtifactError, Stream, pack_artifact, read_artifact, require_codec
from formats.checkpoints import (
    METRICS_NAME,
    NUMBERED,
    NUMBERED_GLOB,
    RESULT_NAME,
    FoundCheckpoint,
    check_identity,
    cut_metrics,
    drop_checkpoints,
    find_unfinished,
    newest_checkpoint,
    read_newest,
    read_result,
    set_aside,
)
from formats.events import EVENTS_NAME, append_scalars
from formats.hardware import project
from formats.help import FieldParser, check_names, describe_sections, format_description, near_misses
from formats.memory import counts_to_try, memory_message, read_auto
from formats.preflight import (
    Sizes,
    check_disk,
    check_limit,
    check_memory,
    check_new_run,
    check_patterns,
    check_recipe,
    check_recipe_path,
    check_spent,
    check_text,
)
from formats.recipe import (
    changed_recipe,
    check_ranges,
    config_fields,
    config_value,
    environment_values,
    flatten_recipe,
    get_recipe,
    option,
    parse_overrides,
    read_recipe,
    recipe_hash,
    seal_recipe,
    with_values,
)
from formats.rules import (
    average_rules,
    clip_rules,
    clock_rules,
    extent_rules,
    model_rules,
    row_rules,
    scorer_rules,
    stage_rules,
)
from formats.state import map_leaves, write_state
from kernels.attention import (
    BACKENDS,
    AttentionMask,
    Choice,
    Extent,
    MaskSpec,
    attend,
    build_mask,
    extent_of,
    has_usual_docs,
    resolve_attention,
)
from kernels.context import ContextRule, attend_compressed, feature_projection
from kernels.fp8 import Fp8Gemm, Fp8Rule, Fp8State, require_fp8
from kernels.fused import HeadGate, exclude_and_gate, head_loss, norm_rotate, rotate, square_mlp
from kernels.fused_choice import FusedShape, resolve_fused
from kernels.machine import (
    ACCELERATORS,
    check_device,
    copy_to_device,
    hidden_gpus,
    keep_freed_memory,
    machine_facts,
    peak_memory,
    resolve_compile,
    resolve_device,
    resolve_dtype,
    why_float32,
    wide_dtype,
)
from kernels.memory import fits_memory, is_out_of_memory, total_memory
from kernels.norm import rms_norm
from quantizers.config import QuantConfig
from quantizers.gptq import Calibrated, CalibrationStats, calibrate, collect_stats, combine_roles
from quantizers.grid import Grid, Quantized, check_weight, stored_weights
from quantizers.methods import QUANTIZERS, build_grids, check_codes
from quantizers.storage import (
    TensorRow,
    check_numel,
    estimate_bytes,
    frame_codec,
    pack_tensors,
    repair_rows,
    repaired_names,
    take_streams,
    unpack_tensors,
    with_factors,
)
from scoring.adaptive import Callbacks, ScoringRun, WindowSettings, find_sites
from scoring.bpb import BpbMeter
from scoring.budget import BYTES, SCORING, TRAINING, BudgetError, Ledger, not_valid, overruns
from scoring.config import EvalConfig
from scoring.generate import Sampling, draw_tokens, last_logits, stream_text
from scoring.modes import (
    SCORERS,
    ScorerState,
    Scoring,
    build_scorer_state,
    deadline_note,
    read_scorer_state,
    score_session,
    score_tail_again,
    scored_stride,
    scorer_state_limits,
    scoring_cost,
    scoring_deadline,
    scoring_limit,
    scoring_rules,
    warm_up_scorer,
    write_scorer_state,
)
from scoring.sliding import (
    CompiledWindows,
    ProgressLines,
    ScoreOptions,
    newton_step,
    plain_cost,
    plan_windows,
    scale_sums,
    score_windows,
)

# pack/program.py puts here what a packed program's recipe changes, and environment names of what it fixes.
PACKED_RECIPE: dict | None = None
PACKED_ENVIRONMENT = ""

CLOCK_PARTS = {"training": "train_ms", "calibration and n-grams": "calibration_ms"}  # of result.json
ARTIFACT_NAME, LOG_NAME, RECIPE_NAME = "artifact.bin", "train.log", "recipe.toml"
TOKENIZER_KINDS = ("sentencepiece", "caseops", "bytes", "bytelevel", "tiktoken", "bese")

# What training may run, for the code's hash.
ROOMS = ("data/**", "durable", "formats", "kernels", "quantizers", "scoring")
SOURCES = ("train_gpt.py", "common.py", *(f"{room}/*.py" for room in ROOMS))

CALIBRATION_TOKENS = 1 << 15  # that pass through the model at once: each visit's activations are kept
READ_EVERY_MS = 1000.0  # how long the clock of a GPU goes on without being read

HOLDER_WAIT_S = 60.0  # for a stopped run that still saves
PEER_TIMEOUT_S = 120.0  # of a collective in which another rank does not answer
JOIN_S = 5.0  # that a launcher's store may take to answer when something went wrong

NEWTON_STEPS = 2  # of fit_scales: the cost is nearly a parabola there

# Arithmetic of activations and products; masters are float32, or float64 with it.
DTYPES = ("float32", "bfloat16", "float64")

# Where positions enter: what turns the embeddings, what turns queries and keys. "head" turns rope_dims of
# each head, "width" all of model_dim as one head, "interleaved" is a published form that is no rotation.
POSITIONS = {
    "heads": (None, "head"),
    "embed_heads": ("width", "head"),
    "bwetaf06": ("width", "width"),
    "bwetaf051": ("interleaved", None),
    "none": (None, None),
}

# What may compute in 8 bits: queries, keys, values, output, gate and up, down. Embeddings, norms, head and
# softmax stay in the compute dtype; masters, optimizer state, gradient sums and the loss in float32.
FP8_MODULES = ("blocks.*.attn.[qkv]", "blocks.*.attn.out", "blocks.*.mlp.up", "blocks.*.mlp.down")

# Newton-Schulz coefficients (a, b, c) by iteration; the last row repeats.
NS_TABLES = {
    "classic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (  # minimax for five iterations, arXiv 2505.16932
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

# Initial output projections: their factor in a model of so many layers.
OUT_INITS = {
    "zero": lambda num_layers: 0.0,
    "plain": lambda num_layers: 1.0,
    "depth": lambda num_layers: (2 * num_layers) ** -0.5,
}

# ----------------------------------------------------------------------------------------------------------
# 2 config
# ----------------------------------------------------------------------------------------------------------
# Frozen dataclasses, one a section; the defaults are the contest's naive baseline. A field carries its
# environment name in the contest, a line of help, its range, and whether it stays free in a packed program.


@dataclass(frozen=True)
class RunConfig:
    """Where, how long and how loud; never part of the recipe's hash."""

    run_id: str = option("", "RUN_ID", "name of the run folder; empty: time and seed", live=True)
    out_dir: str = option("runs", "", "where run folders go", live=True)
    seed: int = option(1337, "SEED", "seed of the initial weights", live=True, low=-(2**63), high=2**64 - 1)
    device: str = option("auto", "", "where to compute", live="auto", choices=("auto", "cpu", *ACCELERATORS))
    compile: str = option("auto", "", "torch.compile", live="auto", choices=("auto", "on", "off"))
    attention: str = option("auto", "", "attention backend", live="auto", choices=("auto", *BACKENDS))
    iterations: int = option(20_000, "ITERATIONS", "most optimizer steps", live=True, low=0)
    max_wallclock_seconds: float = option(
        600.0, "MAX_WALLCLOCK_SECONDS", "training time; 0: no limit", live=True, low=0
    )
    enforce_limits: bool = option(
        True, "", "a run over its bytes, training or scoring time ends with status 1", live=True
    )
    warmup_steps: int = option(
        20, "WARMUP_STEPS", "steps before the clock; state is restored", live=True, low=0
    )
    val_loss_every: int = option(
        1000, "VAL_LOSS_EVERY", "steps between validations; 0: at the end, -1: never", live=True, low=-1
    )
    train_log_every: int = option(
        200, "TRAIN_LOG_EVERY", "log the loss every so many steps", live=True, low=0
    )
    save_every: int = option(
        0, "", "steps between checkpoints; 0: only at a stop; -1: never", live="source",
        low=-1,
    )  # fmt: skip
    resume: str = option(
        "off", "", "auto: go on with an unfinished run of this recipe, seed and data",
        live="source", choices=("off", "auto"),
    )  # fmt: skip
    overwrite: bool = option(
        False, "", "replace an old run of run.run_id, not take a new name", live="source"
    )
    val_batch_tokens: int = option(
        524_288, "VAL_BATCH_SIZE", "scoring batch; data.micro_batches share it", live=True, low=1
    )


@dataclass(frozen=True)
class DataConfig:
    """Shards, tokenizer and the shape of a step."""

    data_path: str = option("./data/datasets/fineweb10B_sp1024", "DATA_PATH", "token shards", live=True)
    tokenizer_path: str = option(
        "./data/tokenizers/fineweb_1024_bpe.model", "TOKENIZER_PATH", "tokenizer file or folder", live=True
    )
    tokenizer_kind: str = option("sentencepiece", "", "codec of the tokenizer", choices=TOKENIZER_KINDS)
    vocab_size: int = option(1024, "VOCAB_SIZE", "entries of the tokenizer", low=2)
    allow_extra_bytes: bool = option(
        False, "", "score a text that counts more bytes than it has; the score is invalid", live="source"
    )
    loader: str = option("sequential", "", "order of the training tokens", choices=tuple(LOADERS))
    seq_len: int = option(1024, "TRAIN_SEQ_LEN", "tokens a training row", low=2)
    batch_tokens: int = option(524_288, "TRAIN_BATCH_TOKENS", "tokens a step, all ranks together", low=1)
    micro_batches: int = option(
        8, "", "a step's micro-batches; the world size divides them; auto or 0: the fewest that fit", low=0
    )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    num_layers: int = option(9, "NUM_LAYERS", "transformer blocks", low=1)
    model_dim: int = option(512, "MODEL_DIM", "width of the residual stream", low=1)
    num_heads: int = option(8, "NUM_HEADS", "query heads", low=1)
    num_kv_heads: int = option(4, "NUM_KV_HEADS", "key and value heads; divides num_heads", low=1)
    mlp_mult: float = option(2.0, "MLP_MULT", "mlp hidden size / model_dim", low=0)
    mlp: str = option("square", "", "activation of the mlp", choices=("square", "swiglu", "gelu"))
    leaky_slope: float = option(0.0, "LEAKY_SLOPE", "square is max(x, slope * x)^2; 0: ReLU^2")
    biases: str = option("none", "", "which Linears have a bias", choices=("none", "outputs", "all"))
    norm: str = option(
        "rms", "", "normalisation of block inputs and of the output", choices=("rms", "rms_gain", "layer")
    )
    norm_eps: float = option(0.0, "", "epsilon of norm; 0: the dtype's", low=0)
    final_norm: bool = option(True, "", "normalise what the head reads")
    embed_norm: bool = option(True, "", "RMS-normalise the embedding")
    qk_norm: bool = option(True, "", "RMS-normalise queries and keys, with a gain a query head")
    channel_scales: bool = option(True, "", "scales a channel on stream, embedding, attention and mlp")
    value_residual: bool = option(False, "", "blend the first layer's values into all others")
    dropout: float = option(0.0, "", "of attention's output, in training", low=0, high=0.99)
    attn_window: int = option(0, "", "tokens back that window_layers see", low=0)
    window_layers: tuple = option((), "", "layers with windowed attention")
    attn_in_document: bool = option(False, "", "attention stays in the token's document")
    context_axis: str = option("time", "", "what context_ratio compresses", choices=("time", "features"))
    context_ratio: int = option(0, "", "tokens a chunk, or factor of the features; 0: full attention", low=0)
    context_ratio_min: int = option(2, "", "where compression is least", low=1)
    context_keep: int = option(2, "", "chunks, or layers, at either end that stay exact", low=1)
    tie_embeddings: bool = option(True, "TIE_EMBEDDINGS", "output head = token embedding")
    vocab_pad: int = option(0, "", "rows of the token tables beyond the tokenizer's entries", low=0)
    embed_dim: int = option(0, "", "width of a factorised embedding; 0: model_dim", low=0)
    embed_init_std: float = option(
        0.005, "TIED_EMBED_INIT_STD", "deviation of a tied embedding's first weights", low=0
    )
    untied_embed_init_std: float = option(1.0, "", "deviation of an untied embedding's weights", low=0)
    embed_proj_init_std: float = option(0.02, "", "deviation of a factorised projection", low=0)
    positions: str = option("heads", "", "where RoPE turns", choices=tuple(POSITIONS))
    rope_base: float = option(10_000.0, "ROPE_BASE", "RoPE base", low=1)
    q_gain_init: float = option(1.5, "QK_GAIN_INIT", "initial gain of the normalised queries")
    rope_dims: int = option(0, "ROPE_DIMS", "rotated dimensions of a head; 0: all", low=0)
    rope_ref_len: int = option(0, "", "NTK-scale the RoPE base for longer rows; 0: never", low=0)
    init: str = option(
        "default", "", "first weights of the matrices", choices=("default", "orthogonal", "normal")
    )
    init_std: float = option(0.02, "", "deviation of init=normal", low=0)
    out_init: str = option(
        "zero",
        "",
        "first weights of output projections; depth: / sqrt(2 num_layers)",
        choices=tuple(OUT_INITS),
    )
    unet_skips: bool = option(True, "", "add first-half outputs to second-half inputs, last to first")
    skip_gates: bool = option(False, "SKIP_GATES_ENABLED", "blend skips in by a sigmoid gate a channel")
    ln_scale: bool = option(False, "LN_SCALE", "scale normed inputs of block l by 1 / sqrt(l + 1)")
    xsa_last: int = option(0, "XSA_LAST_N", "exclusive self-attention in the last so many layers", low=0)
    attn_gate: str = option("none", "", "gate of heads' outputs", choices=("none", "out", "sparse", "dense"))
    smear: str = option("none", "", "mix in the previous token", choices=("none", "gated", "channel"))
    bigram_buckets: int = option(0, "BIGRAM_VOCAB_SIZE", "rows of the hashed bigram table; 0: none", low=0)
    bigram_dim: int = option(128, "BIGRAM_DIM", "width of the hashed bigram table", low=1)
    bigram_proj_scale: float = option(1.0, "", "factor of the bigram projection's initial weights", low=0)
    value_embed_layers: tuple = option((), "VE_LAYERS", "layers whose values get a token embedding")
    value_embed_dim: int = option(128, "VE_DIM", "width of the value embedding", low=1)
    recur_layers: tuple = option((), "", "first and last layer of the recurrent segment; empty: none")
    recur_passes: int = option(1, "", "runs of that segment when recurrence is fully on", low=1)
    recur_skips: str = option(
        "all_visits", "", "visits that skips join", choices=("all_visits", "first_pass")
    )
    parallel: str = option("none", "", "attention and mlp side by side", choices=("none", "gptj", "two_lane"))
    parallel_start: int = option(0, "PARALLEL_START_LAYER", "first layer that is parallel", low=0)
    logit_softcap: float = option(30.0, "LOGIT_SOFTCAP", "cap * tanh(logits / cap); 0: none", low=0)
    asymmetric_softcap: bool = option(False, "", "learned caps of positive and of negative logits")
    checkpoint_every: int = option(0, "", "recompute every n-th visit in backward; 0: none", low=0)
    compute_dtype: str = option(
        "auto", "", "dtype of activations and matrix products", choices=("auto", *DTYPES)
    )
    fused: str = option(
        "off", "", "training on a GPU: off, auto or some of qk,mlp,xsa,loss as one kernel each"
    )
    fp8: str = option(
        "off", "", "8-bit products in training; emulate: anywhere", choices=("off", "emulate", "gemm")
    )
    fp8_margin: int = option(0, "", "octaves of headroom of 8-bit scales", low=0)
    fp8_history: int = option(16, "", "steps whose amax 8-bit scales remember", low=1)
    fp8_amax: str = option(
        "max", "", "which amax of the history sets 8-bit scales", choices=("max", "most_recent")
    )
    fp8_calibration_steps: int = option(0, "", "first steps without 8-bit products, which only record", low=0)
    fp8_lr_mul: float = option(1.0, "", "factor of every learning rate with 8-bit products", low=0)


# The optimizers of the block matrices and what they do; each has its row in MATRIX_OPTIMIZERS.
UPDATE_RULES = {
    "muon": "momentum, orthogonalized by Newton-Schulz",
    "adamw": "AdamW, together with all other parameters",
}


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and decays by group (see PARAM_RULES), Muon and AdamW."""

    matrix_optimizer: str = option("muon", "", "optimizer of the block matrices", choices=UPDATE_RULES)
    matrix_lr: float = option(0.04, "MATRIX_LR", "Muon learning rate of the block matrices", low=0)
    embed_lr: float = option(0.6, "EMBED_LR", "AdamW learning rate of an untied embedding", low=0)
    tied_embed_lr: float = option(0.05, "TIED_EMBED_LR", "AdamW learning rate of a tied embedding", low=0)
    head_lr: float = option(0.008, "HEAD_LR", "AdamW learning rate of an untied head", low=0)
    scalar_lr: float = option(0.04, "SCALAR_LR", "AdamW learning rate of gains, scales and gates", low=0)
    matrix_weight_decay: float = option(0.0, "MUON_WD", "decoupled decay of the block matrices", low=0)
    embed_weight_decay: float = option(0.0, "EMBED_WD", "decoupled decay of embedding and head", low=0)
    scalar_weight_decay: float = option(0.0, "ADAM_WD", "decoupled decay of gains, scales, gates", low=0)
    muon_momentum: float = option(0.95, "MUON_MOMENTUM", "Muon momentum after its warm-up", low=0, high=1)
    muon_momentum_warmup_start: float = option(
        0.85, "MUON_MOMENTUM_WARMUP_START", "Muon momentum at step 0", low=0, high=1
    )
    muon_momentum_warmup_steps: int = option(
        500, "MUON_MOMENTUM_WARMUP_STEPS", "steps until muon_momentum", low=0
    )
    bigram_proj: str = option("muon", "", "optimizer of the bigram projection", choices=("muon", "adamw"))
    num_ns_steps: int = option(5, "MUON_BACKEND_STEPS", "Newton-Schulz iterations", low=1, high=100)
    ns_table: str = option("classic", "", "coefficients of Newton-Schulz", choices=tuple(NS_TABLES))
    row_norm: bool = option(
        False, "MUON_ROW_NORMALIZE", "normalise update rows before Newton-Schulz (MuonEq-R)"
    )
    normuon_beta2: float = option(
        0.0, "", "mean of row scales after Newton-Schulz (NorMuon); 0: off", low=0, high=1
    )
    decay_taper_start: float = option(1.0, "", "progress where the matrices' decay starts to fall", high=1)
    decay_taper_end: float = option(0.5, "", "factor of the matrices' decay at the end", low=0, high=1)
    beta1: float = option(0.9, "BETA1", "AdamW beta1", low=0, high=1 - 1e-9)
    beta2: float = option(0.95, "BETA2", "AdamW beta2", low=0, high=1 - 1e-9)
    adam_eps: float = option(1e-8, "ADAM_EPS", "AdamW epsilon", low=1e-30)
    grad_clip_norm: float = option(
        0.0, "GRAD_CLIP_NORM", "largest global norm of the reduced gradient; 0: any", low=0
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, depth and shape of the steps over the run."""

    shape: str = option("warmdown", "", "course of the learning rate", choices=("warmdown", "cosine"))
    lr_warmup_iters: int = option(0, "", "steps over which the learning rate rises from 0", low=0)
    lr_hold_iters: int = option(1, "", "steps for which a value of the cosine is held", low=1)
    warmdown_iters: int = option(1200, "WARMDOWN_ITERS", "linear decay over so many steps' time", low=0)
    warmdown_frac: float = option(0.0, "WARMDOWN_FRAC", "decay over this fraction instead", low=0, high=1)
    min_lr_frac: float = option(
        0.0, "MIN_LR", "least factor of the learning rate in its decay", low=0, high=1
    )
    recur_start_fracs: tuple = option((), "", "progress at which each further pass is switched on")
    stages: tuple = option(
        (), "", "start:seq_len:batch_tokens:micro_batches:lr_mul:grad_clip_norm,...; start < 1 is progress"
    )


@dataclass(frozen=True)
class AverageConfig:
    """Weight averaging: one of the two, or none."""

    ema_decay: float = option(0.0, "EMA_DECAY", "exponential moving average; 0: off", low=0, high=0.999999)
    swa_every: int = option(0, "SWA_EVERY", "steps between snapshots of a plain average; 0: off", low=0)
    swa_below: float = option(0.5, "SWA_START_FRAC", "snapshots while the lr factor is below", low=0, high=1)


@dataclass(frozen=True)
class WatchConfig:
    """What a run shows and keeps on its way. Part of the recipe, so that a packed program leaves it out."""

    tensorboard: bool = option(False, "", "write TensorBoard events: tensorboard --logdir runs")
    keep_checkpoints: int = option(3, "", "checkpoints to keep: the best and the newest", low=3)
    sample_every: int = option(0, "", "steps between printed samples; 0: none", low=0)
    sample_tokens: int = option(64, "", "most tokens of a sample", low=1)


@dataclass(frozen=True)
class Config:
    """All sections."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig = AverageConfig()
    quant: QuantConfig = QuantConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()


# Live fields that say where somebody keeps things: they stay out of what is packed and weighed.
PLACE_FIELDS = ("run.run_id", "run.out_dir", "data.data_path", "data.tokenizer_path")
ONCE_FIELDS = ("run.resume", "run.overwrite")  # said of one start, no part of a run folder's recipe


class Stage(NamedTuple):
    """A row of the curriculum: shape and rates of the steps from `start` on."""

    start: float  # a step, or below 1 a fraction of the run
    seq_len: int
    batch_tokens: int
    micro_batches: int
    lr_mul: float = 1.0
    grad_clip_norm: float = 0.0


def get_stages(cfg: Config) -> list[Stage]:
    """List the curriculum; without one, the only stage is that of the data section."""
    data = cfg.data
    if not cfg.schedule.stages:
        return [Stage(0, data.seq_len, data.batch_tokens, data.micro_batches, 1.0, cfg.optim.grad_clip_norm)]
    for row in cfg.schedule.stages:
        if not isinstance(row, tuple) or len(row) != len(Stage._fields) or min(row[1:4]) < 1:
            raise UserError(f"schedule.stages: expected rows of {', '.join(Stage._fields)}, found {row}.")
    return [Stage(*row) for row in cfg.schedule.stages]


class Environment(NamedTuple):
    """What is read from the process environment: config overrides and the rank layout of torchrun."""

    overrides: dict[str, str]  # "section.key" -> text
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    misspelled: tuple[str, ...] = ()  # sentences on variables that look like mistakes
    local_world_size: int = 1  # processes on this machine
    restarts: int = 0  # how often torchrun has started all processes anew
    launched: bool = False  # by torchrun, which is then the parent
    stops: Stops | None = None  # where signals are noted; not of a packed program
    master: str = ""  # host and port where ranks meet


def read_environment() -> Environment:
    """Read the environment: the one place that does."""
    if PACKED_RECIPE is None:
        check_launch(os.environ)
    layout = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
    numbers = {key: int(os.environ[env]) for key, env in layout.items() if env in os.environ}
    fixed = {name: os.environ[name] for name in PACKED_ENVIRONMENT.split() if name in os.environ}
    if PACKED_RECIPE is None:
        hidden = hidden_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        numbers["misspelled"] = near_misses(Config, os.environ) + hidden
        numbers["local_world_size"] = int(os.environ.get("LOCAL_WORLD_SIZE", numbers.get("world_size", 1)))
        numbers["restarts"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        numbers["launched"] = "TORCHELASTIC_RUN_ID" in os.environ
        numbers["master"] = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return Environment(environment_values(Config, os.environ) | fixed, **numbers)


def load_config(
    recipe_path: str | None, environment: dict[str, str], overrides: list[str], places: dict | None = None
) -> Config:
    """Resolve a config: defaults < recipe < environment < "section.key=value" overrides; then check it.

    A resumed run's places count as the recipe's. What none of these says of the tokenizer, the dataset's
    manifest does. A packed program has the recipe's values as its defaults, and only live fields.
    """
    changes = parse_overrides(overrides)
    if PACKED_RECIPE is not None:
        free = config_fields(Config)
        for name in (*environment, *changes):
            if name not in free:
                raise UserError(
                    f"{name} is fixed in this packed program, or unknown; free are {', '.join(free)}. For "
                    "the rest change the recipe and pack it again."
                )
    cfg = Config()
    if PACKED_RECIPE is None:
        check_names(Config, changes)
        changes = read_auto(changes)
        recipe = {}
        if recipe_path is not None:
            check_recipe_path(recipe_path)
            recipe = read_auto(read_recipe(recipe_path))
            check_recipe(recipe_path, recipe)
        recipe |= places or {}
        cfg = with_values(cfg, recipe, recipe_path)
    cfg = with_values(cfg, environment, "environment")
    cfg = with_values(cfg, changes, "command line")
    if PACKED_RECIPE is None:
        cfg = follow_data(cfg, recipe.keys(), environment.keys() | changes.keys())
    check_config(cfg)
    if PACKED_RECIPE is None and places is None:
        check_new_run(cfg)
    return cfg


def follow_data(cfg: Config, recipe: Set[str], typed: Set[str]) -> Config:
    """Take from the dataset's manifest what neither the recipe names of the tokenizer nor a person has typed.

    With a data folder that is typed, the recipe's path of a tokenizer is another dataset's.
    """
    folder = cfg.data.data_path
    if "data.data_path" in typed:
        recipe = recipe - {"data.tokenizer_path"}
        if not Path(folder).is_dir():
            raise UserError(
                f"data.data_path={folder}: no such folder. `make data` writes the built-in corpus, "
                "`python -m data.prepare` your own text, `python -m data.download --variant sp1024` the "
                "contest's."
            )
    stated = stated_tokenizer(folder)
    free = {name: value for name, value in stated.items() if name not in recipe | typed}
    return with_values(cfg, free, f"manifest of {folder}")


def fixed_recipe(cfg: Config) -> dict[str, dict]:
    """Return {section: {key: value}} of what a recipe fixes to other values than the defaults.

    A packed program has it as data.
    """
    return changed_recipe(cfg) if PACKED_RECIPE is None else PACKED_RECIPE


def fixed_hash(cfg: Config) -> str:
    """Hash what a recipe changes; a packed program has it as data."""
    return recipe_hash(fixed_recipe(cfg))


def whole_recipe(cfg: Config) -> dict[str, dict]:
    """Return {section: {key: value}} of all fields."""
    fixed, rest = fixed_recipe(cfg), get_recipe(cfg, live=True)
    return {section: fixed.get(section, {}) | rest.get(section, {}) for section in {**rest, **fixed}}


def fixed_rules(cfg: Config) -> Iterator[tuple]:
    """Yield the rules that a packed program passed when it was packed; later ones rely on earlier ones."""
    rows = {"quant.method": QUANTIZERS, "eval.mode": SCORERS, "optim.matrix_optimizer": MATRIX_OPTIMIZERS}
    yield from row_rules(cfg, rows)
    yield from extent_rules(cfg)
    yield from model_rules(cfg)
    yield from stage_rules(cfg, get_stages(cfg))
    yield from average_rules(cfg)
    yield from clip_rules(cfg)
    yield from scorer_rules(cfg)
    yield from QUANTIZERS[cfg.quant.method].rules(cfg.quant)
    yield from scoring_rules(cfg.eval, cfg.eval.context_len or cfg.data.seq_len, cfg.data.vocab_size)


def name_rules(run: RunConfig) -> list[tuple]:
    """Return the rules that a run's id is a name in every file system, no path, and that it has a place."""
    is_name = not re.search(r'[/\\:*?"<>|]|^\.|[. ]$', run.run_id) and len(run.run_id.encode()) < 200
    advice = 'must be a name without / \\ : * ? " < > |, no dot first, below 200 bytes; see run.out_dir'
    return [
        ("run.run_id", is_name, advice),
        ("run.out_dir", bool(run.out_dir), "must name a folder, as `runs` or `.`"),
    ]


def check_config(cfg: Config) -> None:
    """Raise naming field, value and constraint when settings cannot work together."""
    check_ranges(cfg)
    rules = clock_rules(cfg)
    if PACKED_RECIPE is None:
        rules = itertools.chain(fixed_rules(cfg), rules, name_rules(cfg.run))
    for name, holds, constraint in rules:
        if not holds:
            raise UserError(f"{name}={config_value(cfg, name)!s:.60} {constraint}.")


def only_live(cfg: Config) -> Config:
    """Return the defaults with the live fields (paths, clock, device) of cfg."""
    fields = config_fields(Config)
    live = {name: config_value(cfg, name) for name, item in fields.items() if item.metadata["live"]}
    return with_values(Config(), live, "live fields")


# ----------------------------------------------------------------------------------------------------------
# 3 ranks, clock, log
# ----------------------------------------------------------------------------------------------------------
# All talk between processes goes through Ranks. There is one training clock, rank 0's, and every decision
# that depends on time reads it, so ranks agree by construction.


class Abandoned(Exception):
    """Work that nobody needs any more."""


class AsyncWork(NamedTuple):
    """A tensor on its way between ranks."""

    tensor: Tensor
    work: object | None = None  # torch.distributed's handle
    scale: float = 1.0
    source: Tensor | None = None  # kept alive while it is read

    def wait(self) -> Tensor:
        """Return the tensor when it is there."""
        if self.work is None:
            return self.tensor
        self.work.wait()
        return self.tensor if self.scale == 1.0 else self.tensor.mul_(self.scale)


def open_store(environment: Environment, timeout_s: float = MEET_S, names: str = "") -> dist.Store:
    """Connect to the launcher's store, which outlives processes that it starts anew.

    Names are, unless given, those of this start: under older ones are addresses of processes that are gone.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return dist.PrefixStore(names or f"start_{environment.restarts}_of_{environment.world_size}", store)


def speak_once(error: Exception, environment: Environment) -> None:
    """Of several ranks let one say an error, and end this one; returns where its caller should raise it."""
    if environment.world_size == 1:
        return
    broke = isinstance(error, RuntimeError) and "gloo" in str(error)  # which has no class for it
    kind = LOST if broke or isinstance(error, (PeerError, dist.DistError)) else OWN

    def join() -> Peers:
        return Peers(open_store(environment, JOIN_S), environment.rank, environment.world_size)

    if environment.rank > 0 or kind == LOST:
        end_explained(error, kind, environment.rank, join)
    with suppress(RuntimeError, ValueError):  # without a launcher nobody listens
        join().tell("error", kind)


class Ranks:
    """The processes of a run: one a GPU with nccl, or plain CPU processes with gloo."""

    def __init__(self, environment: Environment, device: str):
        self.rank, self.world_size = environment.rank, environment.world_size
        if PACKED_RECIPE is None:
            self.stops, self.reason = environment.stops or Stops(), 0
        self.device = resolve_device(device, environment.local_rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world_size > 1:
            # Ranks wait for rank 0 while it quantizes and compresses: longer than the default ten minutes.
            settings = {"timeout": timedelta(hours=1)}
            if PACKED_RECIPE is None:
                settings = self.meet_peers(environment)
            dist.init_process_group(
                dist.get_default_backend_for_device(self.device),
                device_id=None if self.device.type == "cpu" else self.device,
                **settings,
            )

    def meet_peers(self, environment: Environment) -> dict:
        """Wait for all ranks, begin to watch the next one, and return how to make the process group."""
        others = f"the other ranks of {self.world_size} at {environment.master}; this is rank {self.rank}"
        with waiting_told(others):
            self.peers = Peers(open_store(environment, FIRST_MEET_S), self.rank, self.world_size)
            self.peers.tell("place", f"host:{socket.gethostname()} device:{self.device}")
            # Before collectives give up: nccl's end the process, and nobody would say who is missing.
            self.peers.start(5 / 6 * PEER_TIMEOUT_S)
            self.peers.meet()
        places = {"store": open_store(environment), "rank": self.rank, "world_size": self.world_size}
        return places | {"timeout": timedelta(seconds=PEER_TIMEOUT_S)}

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and lines."""
        return self.rank == 0

    def broadcast(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box.item())

    def agree(self, value: float) -> float:
        """Return rank 0's value on every rank; `reason` is then why one of them has to stop, 0 for not."""
        reason = self.stops.reason()
        if self.world_size > 1:
            mine = [value if self.is_main else -math.inf, reason]
            box = torch.tensor(mine, dtype=torch.float64, device=self.device)
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
            value, reason = box.tolist()
        self.reason = int(reason)
        return value

    def heed(self, *_) -> None:
        """Raise Abandoned where a signal came and is only noted: what is at work here can be left out."""
        if self.stops.signum and self.stops.defers:
            raise Abandoned

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
            dist.all_reduce(flat)
            flat *= 1 / self.world_size
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(one) for one, part in zip(tensors, parts)])

    def start_scatter_average(self, stack: Tensor) -> AsyncWork:
        """Begin to average a (world * n, ...) stack over ranks; this rank will get its (n, ...) share."""
        if self.world_size == 1:
            return AsyncWork(stack)
        share = stack.new_empty(stack.shape[0] // self.world_size, *stack.shape[1:])
        work = dist.reduce_scatter_tensor(share, stack, async_op=True)
        return AsyncWork(share, work, 1 / self.world_size, stack)

    def start_gather(self, share: Tensor) -> AsyncWork:
        """Begin to concatenate every rank's (n, ...) share into (world * n, ...)."""
        if self.world_size == 1:
            return AsyncWork(share)
        share = share.contiguous()  # NCCL refuses transposed views
        stack = share.new_empty(share.shape[0] * self.world_size, *share.shape[1:])
        return AsyncWork(stack, dist.all_gather_into_tensor(stack, share, async_op=True), source=share)

    def barrier(self) -> None:
        """Wait for all ranks, up to an hour; a collective would give up while one of them works alone."""
        if self.world_size > 1:
            if PACKED_RECIPE is None:
                self.synchronize()
                self.peers.meet()
            else:
                dist.barrier()

    def layout(self) -> str:
        """Return a line a rank: its host and device; nothing for one process."""
        if self.world_size == 1:
            return ""
        return "\n".join(f"rank:{rank} {place}" for rank, place in self.peers.told("place").items())

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def close(self) -> None:
        """Leave the process group, all ranks together."""
        if self.world_size > 1:
            self.barrier()  # a rank that leaves early takes its connections from the others
            if PACKED_RECIPE is None:
                self.peers.stop()
            dist.destroy_process_group()


class KeepingRanks(Ranks):
    """Ranks that keep the last sum: after a scoring the costs of all targets, (N,) nats."""

    def sum(self, tensor: Tensor) -> Tensor:
        self.kept = super().sum(tensor)
        return self.kept


class Clock:
    """The training clock in milliseconds: rank 0's, the same on every rank, stopped while validating.

    To read it is to wait for the device. A tick is a micro-batch: a CPU's clock is read at every one, a GPU's
    about once a second and, towards the limit, after half the ticks that may be left; in between it goes on
    at the pace of the last ticks, the same on every rank.
    """

    def __init__(self, ranks: Ranks, total_ms: float = 0.0, limit_ms: float = math.inf):
        self.ranks = ranks
        self.total_ms = total_ms
        self.limit_ms = limit_ms
        self.started = 0.0
        self.read_at = self.shown_ms = total_ms  # when it was read last, what it showed last
        self.pace = 0.0  # ms a tick
        self.ticks, self.due = 0, 1  # since it was read, and at which it is read again
        self.has_waited = False  # whether it was read since somebody set this to False

    def start(self) -> None:
        """Start the clock."""
        self.ranks.synchronize()
        self.started = time.perf_counter()
        self.read_at, self.ticks, self.due = self.total_ms, 0, 1

    def tick(self) -> float:
        """Count a micro-batch and return the time; has_waited says of a reading."""
        self.ticks += 1
        is_due = self.ticks >= self.due
        now = self.read_ms() if is_due else self.read_at + self.ticks * self.pace
        if is_due:
            self.pace = (now - self.read_at) / self.ticks
            self.read_at, self.ticks, self.has_waited = now, 0, True
            wait_ms = min(READ_EVERY_MS, (self.limit_ms - now) / 2)
            on_cpu = self.ranks.device.type == "cpu"
            self.due = 1 if on_cpu else max(int(wait_ms / max(self.pace, 1e-3)), 1)
        self.shown_ms = max(self.shown_ms, now)
        return self.shown_ms

    def read_ms(self) -> float:
        """Return rank 0's training time so far, after what the device has been given is done."""
        self.ranks.synchronize()
        mine = self.total_ms + 1000.0 * (time.perf_counter() - self.started)
        return self.ranks.agree(mine) if PACKED_RECIPE is None else self.ranks.broadcast(mine)

    def stop(self) -> float:
        """Stop the clock and return its time."""
        self.total_ms = self.read_ms()
        return self.total_ms


class Log:
    """The run's log: lines for people and the contest's patterns, events for programs. Rank 0 writes."""

    def __init__(self, folder: Path, is_main: bool, tensorboard: bool = False):
        self.folder = folder
        self.is_main = is_main
        self.tensorboard = tensorboard
        self.seal = 0  # of the events so far

    def line(self, text: str, console: bool = True) -> None:
        """Write a line to train.log and, unless told otherwise, to standard output; nothing if empty."""
        if self.is_main and text:
            if console:
                print(text, flush=True)
            append_text(self.folder / "train.log", text + "\n")

    def event(self, **values) -> None:
        """Append one JSON object to metrics.jsonl."""
        if self.is_main:
            line, self.seal = seal_event(values, self.seal)
            append_text(self.folder / METRICS_NAME, line)
            if self.tensorboard:
                append_scalars(self.folder / EVENTS_NAME, time.time(), values)


# ----------------------------------------------------------------------------------------------------------
# 4 data
# ----------------------------------------------------------------------------------------------------------
# data/loader.py deals a step's micro-batches to the ranks, so any number of them sees the same global batch.


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the next tokens
    starts_doc: Tensor  # (B, T) bool: nothing before this token belongs to its text
    extent: Extent | None = None  # of the documents, where attention stays in them


def open_loader(cfg: Config, bos_id: int) -> TokenLoader:
    """Open the training shards in the order that data.loader names; refuses data smaller than a step."""
    settings = LoaderSettings(cfg.data.loader, cfg.data.vocab_size, bos_id, cfg.run.seed)
    loader = make_loader(Path(cfg.data.data_path) / TRAIN_GLOB, settings)
    for stage in get_stages(cfg):
        loader.check_step(stage.seq_len, stage.batch_tokens)
    return loader


def next_batch(loader: TokenLoader, stage: Stage, ranks: Ranks, in_document: bool = False) -> Batch:
    """Take the next micro-batch of every rank and put this rank's on its device.

    Where attention stays in_document, its documents are bounded too.
    """
    num_tokens = stage.batch_tokens // stage.micro_batches
    rows = loader.take(stage.seq_len, num_tokens, ranks.rank, ranks.world_size)
    extent = extent_of(rows.starts_segment, stage.seq_len) if in_document else None
    return Batch(*(copy_to_device(part, ranks.device) for part in rows), extent)


def in_pieces(batch: Batch, num_tokens: int) -> Iterator[Batch]:
    """Cut a batch into groups of rows of at most num_tokens, one row at least, or its only row into parts."""
    rows, seq_len = batch.tokens.shape
    size, dim = (max(num_tokens // seq_len, 1), 0) if rows > 1 else (num_tokens, 1)
    for parts in zip(*(part.split(size, dim) for part in batch[:3])):
        yield Batch(*parts, batch.extent)


def open_tokenizer(cfg: DataConfig) -> TokenCodec:
    """Open the tokenizer that a config names."""
    if PACKED_RECIPE is None:
        check_stated(cfg.tokenizer_path)
    return read_codec(cfg.tokenizer_path, cfg.vocab_size, cfg.tokenizer_kind)


def load_validation(cfg: DataConfig, chosen: str = "", tokenizer_sha256: str = "") -> ValidationText:
    """Load all validation shards, or the chosen ones; refuses another tokenizer than the one of this hash."""
    if PACKED_RECIPE is None:
        return account_validation(cfg, open_tokenizer(cfg), chosen, tokenizer_sha256)
    return read_validation(cfg, open_tokenizer(cfg), chosen, tokenizer_sha256)


# ----------------------------------------------------------------------------------------------------------
# 5 model
# ----------------------------------------------------------------------------------------------------------
# Weights are float32 masters; CastLinear casts them to the activations' dtype at the product. Training,
# validation and scoring call the same GPT.forward; layer_plan says as data which block runs when and how.


class Norm(nn.Module):
    """Normalise the last dimension as cfg.norm says: rms has no weights, layer a bias too."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.kind, self.eps = cfg.norm, cfg.norm_eps or None
        if self.kind != "rms":
            self.gain = nn.Parameter(torch.ones(cfg.model_dim))
        if self.kind == "layer":
            self.bias = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        if self.kind == "layer":
            return F.layer_norm(x, (x.size(-1),), self.gain.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return rms_norm(x, self.gain.to(x.dtype) if self.kind == "rms_gain" else None, self.eps)


class CastLinear(nn.Linear):
    """A Linear whose float32 weight and bias are cast to the input's dtype; adaptive scoring adds to it."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = False):
        super().__init__(in_dim, out_dim, bias=bias)
        self.adapter: nn.Module | None = None  # attached by scoring/adaptive.py while it scores, else None
        self.fp8: Callable | None = None  # attached by attach_fp8: the product in training

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.fp8 is not None and self.training:
            y = self.fp8(x, self.weight)
            return y if bias is None else y + bias
        y = F.linear(x, self.weight.to(x.dtype), bias)
        return y if self.adapter is None else y + self.adapter(x)


def rope_base_at(cfg: ModelConfig, seq_len: int) -> float:
    """Return the RoPE base for rows of seq_len tokens: NTK-scaled beyond rope_ref_len.

    base * (T / T_ref)^(d / (d - 2)) for d rotated dimensions; below or without a reference, the base.
    """
    dims = rope_dims(cfg)
    if not cfg.rope_ref_len or seq_len <= cfg.rope_ref_len:
        return cfg.rope_base
    return cfg.rope_base * (seq_len / cfg.rope_ref_len) ** (dims / (dims - 2))


def rope_dims(cfg: ModelConfig) -> int:
    """Return how many of a head's dimensions are rotated."""
    return cfg.rope_dims or cfg.model_dim // cfg.num_heads


def rope_tables(seq_len: int, dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * base^(-2i / dims), each (T, 1, dims / 2), in the dtype of `like`."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=like.device) / dims
    positions = torch.arange(seq_len, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, 1.0 / base**exponents)[:, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_interleaved(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + K / 2) of (B, T, H, K) by the angles of pairs (2i, 2i + 1), as system A does."""
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class ForwardContext(NamedTuple):
    """What all block visits of one forward pass read."""

    embedded: Tensor  # (B, T, D)
    rope: tuple[Tensor, Tensor] | None  # of queries and keys: cos and sin, (T, 1, d / 2)
    masks: dict[tuple[int, int], AttentionMask]  # (window, first query) -> what queries may see
    extra_values: dict[int, Tensor]  # layer -> (B, T, G * K), added to its values
    fused: Set[str] = frozenset()  # operations that are one GPU kernel, see model.fused


def fuses(cfg: ModelConfig, name: str, fused: Set[str]) -> bool:
    """Whether an operation is one GPU kernel; where the recipe asks for none, a packed program has none."""
    return cfg.fused != "off" and name in fused


class AttnGate(nn.Module):
    """Scale each head's output by a gate that reads the block's normed input.

    out: 2 sigmoid(W x[:12]), sparse: sigmoid(W x[:12] / 2), dense: sigmoid(W x). W starts at zero except in
    the dense form (N(0, 0.005^2)): the first is the identity then, the others halve.
    """

    WIDTH = 12

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.kind = cfg.attn_gate
        self.gate = CastLinear(cfg.model_dim if self.kind == "dense" else self.WIDTH, cfg.num_heads)

    def init_weights(self) -> None:
        nn.init.normal_(self.gate.weight, std=0.005 if self.kind == "dense" else 0.0)

    def forward(self, x: Tensor) -> HeadGate:  # (B, T, D)
        scale, slope = {"out": (2.0, 1.0), "sparse": (1.0, 0.5), "dense": (1.0, 1.0)}[self.kind]
        return HeadGate(x, self.gate.weight, scale, slope)


def context_rule(cfg: ModelConfig) -> ContextRule:
    """Return how attention compresses the context."""
    return ContextRule(cfg.context_ratio, cfg.context_ratio_min, cfg.context_keep)


class SelfAttention(nn.Module):
    """Grouped-query attention; qk_norm RMS-normalises queries and keys and gives each query head a gain."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.layer = layer
        self.head_dim = cfg.model_dim // cfg.num_heads
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.q = CastLinear(cfg.model_dim, cfg.model_dim, cfg.biases == "all")
        self.k = CastLinear(cfg.model_dim, kv_dim, cfg.biases == "all")
        self.v = CastLinear(cfg.model_dim, kv_dim, cfg.biases == "all")
        self.out = CastLinear(cfg.model_dim, cfg.model_dim, cfg.biases != "none")
        if cfg.qk_norm:
            self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.q_gain_init))
        if cfg.value_residual and layer > 0:
            self.value_mix = nn.Parameter(torch.zeros(()))
        self.xsa = cfg.xsa_last > 0 and layer >= cfg.num_layers - cfg.xsa_last
        self.window = cfg.attn_window if layer in cfg.window_layers else 0
        self.attn_gate = AttnGate(cfg) if cfg.attn_gate != "none" else None
        if cfg.context_ratio and cfg.context_axis == "features":  # a constant: neither weight nor buffer
            self.projection = feature_projection(context_rule(cfg), layer, cfg.num_layers, self.head_dim)

    def init_weights(self) -> None:
        self.out.weight.mul_(OUT_INITS[self.cfg.out_init](self.cfg.num_layers))

    def project(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of positions from `first` on, keys and values, each (B, T, its width).

        A compiled step makes one product of three: x is read once, its gradient is not added up in passes.
        """
        parts = (self.q, self.k, self.v)
        if not (self.training and torch.compiler.is_compiling()) or self.q.fp8 is not None:
            return self.q(x[:, first:]), self.k(x), self.v(x)
        weight = torch.cat([part.weight for part in parts]).to(x.dtype)
        bias = None if self.q.bias is None else torch.cat([part.bias for part in parts]).to(x.dtype)
        return F.linear(x, weight, bias).split([part.out_features for part in parts], dim=-1)

    def normalize_and_rotate(self, q: Tensor, k: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Normalise and rotate queries and keys: (B, T - first, H, K) and (B, T, G, K)."""
        if POSITIONS[self.cfg.positions][1] == "width":  # one head as wide as the model
            q, k = (rotate(part.unsqueeze(2), context.rope).squeeze(2) for part in (q, k))
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
        by_head = POSITIONS[self.cfg.positions][1] == "head"
        if by_head and self.cfg.qk_norm:
            fused = fuses(self.cfg, "qk", context.fused)
            return norm_rotate(q, context.rope, self.q_gain, fused), norm_rotate(k, context.rope, None, fused)
        if by_head:
            q, k = rotate(q, context.rope), rotate(k, context.rope)
        if self.cfg.qk_norm:
            q, k = rms_norm(q) * self.q_gain.to(q.dtype)[:, None], rms_norm(k)
        return q, k

    def forward(
        self, x: Tensor, context: ForwardContext, first_value: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return the output of positions from `first` on, (B, T - first, D), and all values (B, T, G, K)."""
        q, k, v = self.project(x, first)
        q, k = self.normalize_and_rotate(q, k, context)
        if self.cfg.value_embed_layers and self.layer in context.extra_values:
            v = v + context.extra_values[self.layer]
        v = v.unflatten(-1, (-1, self.head_dim))
        if self.cfg.value_residual and self.layer > 0:
            v = torch.lerp(v, first_value, self.value_mix.to(x.dtype))
        if self.cfg.context_ratio and self.cfg.context_axis == "time":
            y = attend_compressed(q, k, v, context_rule(self.cfg))
        elif self.cfg.context_ratio:
            projection = self.projection.to(q)
            y = attend(q @ projection, k, v @ projection, context.masks[self.window, first])
        else:
            y = attend(q, k, v, context.masks[self.window, first])
        if self.xsa or self.attn_gate is not None:
            own = v[:, first:] if self.xsa else None
            gate = self.attn_gate(x[:, first:]) if self.attn_gate is not None else None
            y = exclude_and_gate(y, own, gate, fuses(self.cfg, "xsa", context.fused))
        return self.out(y.flatten(2)), v


class MLP(nn.Module):
    """down(activation(up(x))); swiglu packs value and gate into up, in this order."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden_dim = round(cfg.mlp_mult * cfg.model_dim)
        self.cfg = cfg
        self.up = CastLinear(
            cfg.model_dim, hidden_dim * (2 if cfg.mlp == "swiglu" else 1), cfg.biases == "all"
        )
        self.down = CastLinear(hidden_dim, cfg.model_dim, cfg.biases != "none")

    def init_weights(self) -> None:
        self.down.weight.mul_(OUT_INITS[self.cfg.out_init](self.cfg.num_layers))

    def forward(self, x: Tensor, fused: Set[str]) -> Tensor:
        cfg = self.cfg
        is_plain = cfg.mlp == "square" and cfg.biases == "none" and cfg.fp8 == "off"
        if is_plain and fuses(cfg, "mlp", fused) and self.training:
            return square_mlp(x, self.up.weight, self.down.weight, cfg.leaky_slope, True)
        h = self.up(x)  # (B, T, F), swiglu (B, T, 2F)
        if self.cfg.mlp == "swiglu":
            value, gate = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(
            F.gelu(h) if self.cfg.mlp == "gelu" else F.leaky_relu(h, self.cfg.leaky_slope).square()
        )


class Step(NamedTuple):
    """One visit of a block in the forward pass."""

    layer: int
    push: bool = False  # keep the output for a later skip
    pop: int | None = None  # row of skip_weights that scales the newest kept output, added before the block
    kind: str = "serial"  # serial | gptj | two_lane
    first: int = 0  # positions before it give keys and values only: nobody reads their output


class Residual(NamedTuple):
    """The residual stream: one lane, or one for attention and one for the mlp."""

    attn: Tensor  # (B, T, D)
    mlp: Tensor | None = None
    first_value: Tensor | None = None  # (B, T, G, K) of the first visit, for value_residual


class Block(nn.Module):
    """Add attention and mlp to the residual stream, each from a normed input.

    With channel_scales the embedding is mixed in first and every term has a learned scale a channel. A
    parallel block feeds both from one norm; a two-lane block lets each read its own lane and write to both
    with learned weights (lane' = keep * lane + post . (attention, mlp)).
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.attn_norm, self.attn = Norm(cfg), SelfAttention(cfg, layer)
        self.mlp_norm, self.mlp = Norm(cfg), MLP(cfg)
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        if cfg.channel_scales:
            self.resid_scale = nn.Parameter(torch.ones(cfg.model_dim))
            self.embed_mix = nn.Parameter(torch.zeros(cfg.model_dim))
            self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
            self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        if cfg.parallel == "two_lane":
            self.lane_keep = nn.Parameter(torch.full((2,), 1.1))
            self.lane_post = nn.Parameter(torch.ones(2, 2))  # (from attention | mlp, to attn | mlp lane)

    def mix(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Mix the embedding into the stream."""
        if not self.cfg.channel_scales:
            return x
        return self.resid_scale.to(x.dtype) * x + self.embed_mix.to(x.dtype) * embedded

    def fed(self, normed: Tensor, fused: Set[str]) -> Tensor:
        """Return the scaled output of the mlp."""
        y = self.mlp(normed, fused)
        return self.mlp_scale.to(y.dtype) * y if self.cfg.channel_scales else y

    def forward(self, residual: Residual, context: ForwardContext, step: Step) -> Residual:
        x = residual.attn
        mixed = self.mix(x, context.embedded)  # (B, T, D)
        normed = self.attn_norm(mixed) * self.norm_scale
        attended, value = self.attn(normed, context, residual.first_value, step.first)
        x, mixed, normed = (part[:, step.first :] for part in (x, mixed, normed))
        attended = F.dropout(attended, self.cfg.dropout, self.training)
        if self.cfg.channel_scales:
            attended = self.attn_scale.to(x.dtype) * attended
        first_value = None
        if self.cfg.value_residual:
            first_value = value if residual.first_value is None else residual.first_value
        if step.kind == "serial":
            x = mixed + attended
            x = x + self.fed(self.mlp_norm(x) * self.norm_scale, context.fused)
            return Residual(x, None, first_value)
        if step.kind == "gptj":
            return Residual(mixed + attended + self.fed(normed, context.fused), None, first_value)
        mlp_lane = x if residual.mlp is None else residual.mlp[:, step.first :]
        fed = self.fed(self.mlp_norm(mlp_lane) * self.norm_scale, context.fused)
        keep, post = self.lane_keep.to(x.dtype), self.lane_post.to(x.dtype)
        return Residual(
            keep[0] * x + post[0, 0] * attended + post[1, 0] * fed,
            keep[1] * mlp_lane + post[0, 1] * attended + post[1, 1] * fed,
            first_value,
        )


class BigramHash(nn.Module):
    """Add a hashed embedding of the last two tokens (contest pull request 162).

    bucket = (36313 t_i xor 27191 t_(i-1)) mod (num_buckets - 1); the first of a row or document takes the
    last bucket. The table starts at zero: the module is the identity.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.table = nn.Embedding(cfg.bigram_buckets, cfg.bigram_dim)
        self.proj = CastLinear(cfg.bigram_dim, cfg.model_dim)
        self.proj_scale = cfg.bigram_proj_scale
        self.strength = nn.Parameter(torch.tensor(0.05))

    def init_weights(self) -> None:
        self.table.weight.zero_()
        self.proj.weight.mul_(self.proj_scale)

    def buckets(self, tokens: Tensor, starts_doc: Tensor) -> Tensor:
        """Hash (B, T) tokens to (B, T) bucket numbers; no bigram crosses a document's start."""
        last = self.table.num_embeddings - 1
        hashed = torch.bitwise_xor(36313 * tokens[:, 1:], 27191 * tokens[:, :-1]) % last
        return F.pad(hashed, (1, 0), value=last).masked_fill(starts_doc, last)

    def forward(self, tokens: Tensor, starts_doc: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.table(self.buckets(tokens, starts_doc)).to(dtype)  # (B, T, bigram_dim)
        return self.strength.to(dtype) * self.proj(rows)


class ValueEmbed(nn.Module):
    """Add a token embedding of its own to the values of chosen layers (contest pull request 374)."""

    def __init__(self, cfg: ModelConfig, vocab_size: int):
        super().__init__()
        kv_dim = cfg.num_kv_heads * cfg.model_dim // cfg.num_heads
        self.layers = cfg.value_embed_layers
        self.table = nn.Embedding(vocab_size, cfg.value_embed_dim)
        self.proj = CastLinear(cfg.value_embed_dim, kv_dim)
        self.strength = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def init_weights(self) -> None:
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Return {layer: (B, T, G * K)}, what to add to each chosen layer's values."""
        values = self.strength.to(dtype) * self.proj(self.table(tokens).to(dtype))
        return {layer: self.layer_scales[i].to(dtype) * values for i, layer in enumerate(self.layers)}


class ChannelSmear(nn.Module):
    """Blend each channel with the previous position's: x <- (1 - g) x_t + g x_(t-1), g = sigmoid(gamma).

    gamma starts at zero: an even mix. The first of a row, and with document starts masked the first of
    a document, blends with zeros.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor, starts_doc: Tensor) -> Tensor:  # (B, T, D), (B, T) bool
        gate = torch.sigmoid(self.gamma).to(x.dtype)
        before = F.pad(x, (0, 0, 1, -1)).masked_fill(starts_doc.unsqueeze(-1), 0.0)
        return x + gate * (before - x)


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


class TiedHead(nn.Module):
    """The product with the embedding's rows: a module, for calibration to watch and adapters to add to."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_features, self.out_features = in_dim, out_dim
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


def visit_order(cfg: ModelConfig, passes: int) -> list[int]:
    """List the layers in the order of their visits: recur_layers = (first, last) run `passes` times."""
    layers = list(range(cfg.num_layers))
    if not cfg.recur_layers:
        return layers
    first, last = cfg.recur_layers
    return layers[:first] + layers[first : last + 1] * passes + layers[last + 1 :]


def num_skips(cfg: ModelConfig) -> int:
    """Count the U-Net skips of the longest plan: one for each visit of its first half."""
    visits = cfg.num_layers if cfg.recur_skips == "first_pass" else len(visit_order(cfg, cfg.recur_passes))
    return visits // 2 if cfg.unet_skips else 0


def layer_plan(cfg: ModelConfig, passes: int = 1) -> list[Step]:
    """List the block visits of a forward pass in order: U-Net skips join the halves, innermost first.

    With recur_skips "all_visits" the halves are those of the visits; with "first_pass" those of the
    layers, and later passes of the recurrent segment take no part.
    """
    order = visit_order(cfg, passes)
    if cfg.recur_skips == "all_visits":
        ranks = list(range(len(order)))
    else:
        ranks = [layer if layer not in order[:i] else None for i, layer in enumerate(order)]
    half = (cfg.num_layers if cfg.recur_skips == "first_pass" else len(order)) // 2
    plan = []
    for layer, rank in zip(order, ranks):
        joins = cfg.unet_skips and rank is not None
        pop = rank - half if joins and half <= rank < 2 * half else None
        kind = cfg.parallel if cfg.parallel != "none" and layer >= cfg.parallel_start else "serial"
        plan.append(Step(layer, bool(joins and rank < half), pop, kind))
    return plan


class AsymmetricSoftcap(nn.Module):
    """Cap positive and negative logits by learned caps: cap * tanh(z / cap) (contest pull request 1923)."""

    def __init__(self, cap: float):
        super().__init__()
        self.caps = nn.Parameter(torch.full((2,), cap))  # of positive, of negative logits

    def forward(self, logits: Tensor) -> Tensor:
        positive, negative = self.caps.to(logits.dtype)
        cap = torch.where(logits > 0, positive, negative)
        return cap * torch.tanh(logits / cap)


class GPT(nn.Module):
    """A decoder-only transformer. forward returns the logits, (B, T - first, V), capped where cfg says so."""

    def __init__(
        self,
        cfg: ModelConfig,
        vocab_size: int,
        compute_dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ):
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = compute_dtype
        self.attention = attention
        self.passed_over: dict[str, str] = {}  # backends that auto tried before -> why they do not serve
        self.fused: Set[str] = frozenset()  # in training, what model.fused resolved to
        vocab_size += cfg.vocab_pad
        self.embed = nn.Embedding(vocab_size, cfg.embed_dim or cfg.model_dim)
        self.embed_proj = CastLinear(cfg.embed_dim, cfg.model_dim) if cfg.embed_dim else None
        self.bigram = BigramHash(cfg) if cfg.bigram_buckets else None
        self.value_embed = ValueEmbed(cfg, vocab_size) if cfg.value_embed_layers else None
        smears = {"none": lambda: None, "gated": SmearGate, "channel": lambda: ChannelSmear(cfg)}
        self.smear = smears[cfg.smear]()
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        if num_skips(cfg):
            self.skip_weights = nn.Parameter(torch.ones(num_skips(cfg), cfg.model_dim))
        if num_skips(cfg) and cfg.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips(cfg), cfg.model_dim))
        self.final_norm = Norm(cfg) if cfg.final_norm else nn.Identity()
        self.head = None if cfg.tie_embeddings else CastLinear(cfg.model_dim, vocab_size)
        self.readout = TiedHead(cfg.embed_dim or cfg.model_dim, vocab_size) if cfg.tie_embeddings else None
        self.softcap = AsymmetricSoftcap(cfg.logit_softcap) if cfg.asymmetric_softcap else None
        self.scorer_state = ScorerState()  # for the scorer; in the artifact beside the weights
        self.draw_weights()

    @torch.no_grad()
    def draw_weights(self) -> None:
        """Draw matrices as cfg.init says; then modules with an init_weights of their own set theirs."""
        cfg = self.cfg
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if cfg.init == "orthogonal" and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)
                if cfg.init == "normal":
                    nn.init.normal_(module.weight, std=cfg.init_std)
                if module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(
            self.embed.weight, std=cfg.embed_init_std if self.head is None else cfg.untied_embed_init_std
        )
        if self.embed_proj is not None:
            nn.init.normal_(self.embed_proj.weight, std=cfg.embed_proj_init_std)
        if self.head is not None and cfg.out_init == "zero":
            self.head.weight.zero_()
        for module in self.modules():
            if hasattr(module, "init_weights") and module is not self.value_embed:
                module.init_weights()
        if self.value_embed is not None:  # last: the order of random draws is part of what a seed means
            self.value_embed.init_weights()

    def embed_tokens(self, tokens: Tensor, starts_doc: Tensor) -> Tensor:
        """Embed (B, T) tokens with their neighbours: what enters the first block, (B, T, D)."""
        cfg = self.cfg
        x = self.embed(tokens).to(self.compute_dtype)
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        if self.bigram is not None:
            x = x + self.bigram(tokens, starts_doc, x.dtype)
        if cfg.smear == "gated":
            x = self.smear(x, starts_doc)
        if cfg.embed_norm:
            x = rms_norm(x)
        if cfg.smear == "channel":
            x = self.smear(x, starts_doc)
        turn = POSITIONS[cfg.positions][0]
        if turn is not None:
            table = rope_tables(tokens.size(1), cfg.model_dim, cfg.rope_base, x)
            turned = {"width": rotate, "interleaved": rotate_interleaved}[turn](x.unsqueeze(2), table)
            x = turned.squeeze(2)
        return x

    def share(
        self,
        tokens: Tensor,
        starts_doc: Tensor,
        embedded: Tensor,
        plan: list[Step],
        extent: Extent | None = None,
    ) -> ForwardContext:
        """Compute once what every block visit reads."""
        cfg, seq_len = self.cfg, tokens.size(1)
        turned = POSITIONS[cfg.positions][1]
        dims = {"head": rope_dims(cfg), "width": cfg.model_dim, None: 0}[turned]
        rope = rope_tables(seq_len, dims, rope_base_at(cfg, seq_len), embedded) if turned else None
        masks = {}
        for window, first in sorted({(self.blocks[step.layer].attn.window, step.first) for step in plan}):
            spec = MaskSpec(window, cfg.attn_in_document, extent)
            masks[window, first] = build_mask(spec, starts_doc, self.attention, embedded.dtype, first)
        extra_values = self.value_embed(tokens, embedded.dtype) if self.value_embed is not None else {}
        return ForwardContext(embedded, rope, masks, extra_values, self.fused)

    def join_skip(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        """Add a kept output with its weights, or blend it in with its sigmoid gate."""
        skip = self.skip_weights[row].to(x.dtype) * kept
        if self.cfg.skip_gates:
            return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[row]).to(x.dtype))
        return x + skip

    def before_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head multiplies: the states, (B, T, D) or (B, T, embed_dim), and its rows."""
        x = self.final_norm(x)
        if self.head is not None:
            return x, self.head.weight
        if self.embed_proj is not None:
            x = x @ self.embed_proj.weight.to(x.dtype)  # back to (B, T, embed_dim)
        return x, self.embed.weight

    def predict(self, x: Tensor) -> Tensor:
        """Turn the last hidden states, (B, T, D), into logits, (B, T, V)."""
        x, weight = self.before_head(x)
        logits = self.head(x) if self.head is not None else self.readout(x, weight)
        if self.softcap is not None or self.cfg.logit_softcap:  # in bfloat16 each step of it would round
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is not None:
            return self.softcap(logits)
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(
        self,
        tokens: Tensor,
        starts_doc: Tensor,
        first: int = 0,
        passes: int | None = None,
        extent: Extent | None = None,
    ) -> Tensor:
        """Predict the token after each of (B, T) tokens, for positions from `first` on.

        passes is how often the recurrent segment runs; None: cfg.recur_passes, as in scoring. extent bounds
        the documents of starts_doc; without it they are counted, which waits for the device.
        """
        return self.predict(self.hidden(tokens, starts_doc, first, passes, extent))

    def hidden(
        self,
        tokens: Tensor,
        starts_doc: Tensor,
        first: int = 0,
        passes: int | None = None,
        extent: Extent | None = None,
    ) -> Tensor:
        """Return the last block's output for positions from `first` on, (B, T - first, D)."""
        cfg = self.cfg
        x = self.embed_tokens(tokens, starts_doc)
        plan = layer_plan(cfg, cfg.recur_passes if passes is None else passes)
        last = 0 if cfg.context_ratio else first  # a compressed context is made for all queries
        plan[-1] = plan[-1]._replace(first=last)
        context = self.share(tokens, starts_doc, x, plan, extent)
        residual, kept = Residual(x), []
        for visit, step in enumerate(plan):
            if step.pop is not None:
                residual = residual._replace(attn=self.join_skip(residual.attn, kept.pop(), step.pop))
            block = self.blocks[step.layer]
            if self.training and cfg.checkpoint_every and visit % cfg.checkpoint_every == 0:
                residual = checkpoint(block, residual, context, step, use_reentrant=False)
            else:
                residual = block(residual, context, step)
            if step.push:
                kept.append(residual.attn)
        if cfg.parallel == "two_lane" and residual.mlp is not None:
            residual = Residual((residual.attn + residual.mlp) / 2)
        return residual.attn[:, first - last :]


def mean_loss(model: nn.Module, batch: Batch, passes: int | None = None) -> Tensor:
    """Mean cross-entropy of a batch in nats, from logits in float32 or the compute dtype if that is wider."""
    logits = model(batch.tokens, batch.starts_doc, 0, passes, batch.extent)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, 1), batch.targets.flatten())


def mean_loss_in_blocks(model: GPT, batch: Batch, passes: int | None = None) -> Tensor:
    """Mean cross-entropy as mean_loss has it, without whole logits: faster on a CPU, and fused on a GPU."""
    x, rows = model.before_head(model.hidden(batch.tokens, batch.starts_doc, 0, passes, batch.extent))
    fused = fuses(model.cfg, "loss", model.fused)
    return head_loss(x.flatten(0, 1), rows, batch.targets.flatten(), model.cfg.logit_softcap, fused)


def fp8_linears(model: GPT) -> dict[str, CastLinear]:
    """Return the Linears whose products may be 8-bit: those of attention and mlp; all else stays wider."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in FP8_MODULES)
    }


def attach_fp8(model: GPT, cfg: ModelConfig, device: torch.device) -> Fp8State:
    """Give the blocks' Linears 8-bit products with one shared state; refuses what the device cannot do."""
    rule = Fp8Rule(cfg.fp8, cfg.fp8_margin, cfg.fp8_history, cfg.fp8_amax, cfg.fp8_calibration_steps)
    linears = fp8_linears(model)
    require_fp8(rule, {name: tuple(module.weight.shape) for name, module in linears.items()}, device)
    state = Fp8State(len(linears), rule, device)
    for index, module in enumerate(linears.values()):
        module.fp8 = Fp8Gemm(state, index)
    return state


def build_model(cfg: Config, device: torch.device) -> GPT:
    """Make a model on `device` with weights drawn on the CPU from run.seed, the same everywhere."""
    torch.manual_seed(cfg.run.seed)
    return make_gpt(cfg, device).to(device)


def resolve_backend(cfg: Config, device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the attention backend for a recipe's heads and masks."""
    model = cfg.model
    heads = (model.num_heads, model.num_kv_heads, model.model_dim // model.num_heads)
    spec = MaskSpec(model.attn_window, model.attn_in_document)
    return resolve_attention(cfg.run.attention, device, dtype, heads, spec)


def make_gpt(cfg: Config, device: torch.device, weights_on: str = "cpu") -> GPT:
    """Make a model that computes on `device`, in that dtype and with that attention backend."""
    if PACKED_RECIPE is None:
        check_device(cfg, device)
    dtype = resolve_dtype(cfg.model.compute_dtype, device)
    choice = resolve_backend(cfg, device, dtype)
    with torch.device(weights_on):
        model = GPT(cfg.model, cfg.data.vocab_size, dtype, choice.backend)
    model.passed_over = choice.refused
    return model.double() if dtype == torch.float64 else model


# ----------------------------------------------------------------------------------------------------------
# 6 optimizers
# ----------------------------------------------------------------------------------------------------------
# PARAM_RULES says for every parameter who updates it, at which rate, and how it is stored. Muon works on
# stacks of equal shapes: each rank averages, orthogonalizes and all-gathers its share of a stack.


class Rule(NamedTuple):
    """How parameters of one kind are updated and stored; all masters are float32."""

    pattern: str  # of the parameter's whole name, see names_parameter; the first match wins
    optimizer: str  # matrix (optim.matrix_optimizer) | adamw
    lr: str  # field of OptimConfig
    weight_decay: str  # field of OptimConfig
    storage: str  # matrix | mlp | embed (quantized, bits from QuantConfig) | float32
    present: Callable[[Config], bool] = lambda cfg: True


# Shorthands for the rows below: what scalars, embeddings, small projections and matrices take.
SCALAR = ("adamw", "scalar_lr", "scalar_weight_decay", "float32")
TIED = ("adamw", "tied_embed_lr", "embed_weight_decay", "embed")
UNTIED = ("adamw", "embed_lr", "embed_weight_decay", "embed")
HEAD = ("adamw", "head_lr", "embed_weight_decay", "embed")
PROJ = ("adamw", "scalar_lr", "scalar_weight_decay", "matrix")
MATRIX = ("matrix", "matrix_lr", "matrix_weight_decay", "matrix")


def has_bigram(cfg: Config, optimizer: str = "") -> bool:
    """Whether there is a bigram table, and its projection is the named optimizer's."""
    return cfg.model.bigram_buckets > 0 and optimizer in ("", cfg.optim.bigram_proj)


def has_value_mix(cfg: Config) -> bool:
    """Whether any layer blends in the first one's values."""
    return cfg.model.value_residual and cfg.model.num_layers > 1


PARAM_RULES = (
    Rule("blocks.*.(attn.(q|k|v)|mlp.up).bias", *SCALAR, lambda cfg: cfg.model.biases == "all"),
    Rule("blocks.*.(attn.out|mlp.down).bias", *SCALAR, lambda cfg: cfg.model.biases != "none"),
    Rule("(final_norm|blocks.*.(attn|mlp)_norm).bias", *SCALAR, lambda cfg: cfg.model.norm == "layer"),
    Rule("(final_norm|blocks.*.(attn|mlp)_norm).gain", *SCALAR, lambda cfg: cfg.model.norm != "rms"),
    Rule("embed.weight", *TIED, lambda cfg: cfg.model.tie_embeddings),
    Rule("embed.weight", *UNTIED, lambda cfg: not cfg.model.tie_embeddings),
    Rule("head.weight", *HEAD, lambda cfg: not cfg.model.tie_embeddings),
    Rule("embed_proj.weight", *PROJ, lambda cfg: cfg.model.embed_dim > 0),
    Rule("blocks.*.attn.(q|k|v|out).weight", *MATRIX),
    Rule("blocks.*.mlp.(up|down).weight", *MATRIX[:3], "mlp"),
    Rule("blocks.*.attn.q_gain", *SCALAR, lambda cfg: cfg.model.qk_norm),
    Rule("blocks.*.attn.value_mix", *SCALAR, has_value_mix),
    Rule("blocks.*.attn.attn_gate.gate.weight", *SCALAR, lambda cfg: cfg.model.attn_gate != "none"),
    Rule("blocks.*.(resid|attn|mlp)_scale", *SCALAR, lambda cfg: cfg.model.channel_scales),
    Rule("blocks.*.embed_mix", *SCALAR, lambda cfg: cfg.model.channel_scales),
    Rule("blocks.*.lane_(keep|post)", *SCALAR, lambda cfg: cfg.model.parallel == "two_lane"),
    Rule("smear.(gamma|strength|gate.weight)", *SCALAR, lambda cfg: cfg.model.smear != "none"),
    Rule("bigram.table.weight", *TIED, has_bigram),
    Rule("bigram.proj.weight", *MATRIX, lambda cfg: has_bigram(cfg, "muon")),
    Rule("bigram.proj.weight", *PROJ, lambda cfg: has_bigram(cfg, "adamw")),
    Rule("bigram.strength", *SCALAR, has_bigram),
    Rule("value_embed.table.weight", *TIED, lambda cfg: bool(cfg.model.value_embed_layers)),
    Rule("value_embed.proj.weight", *PROJ, lambda cfg: bool(cfg.model.value_embed_layers)),
    Rule("value_embed.(strength|layer_scales)", *SCALAR, lambda cfg: bool(cfg.model.value_embed_layers)),
    Rule("skip_(weights|gates)", *SCALAR, lambda cfg: num_skips(cfg.model) > 0),
    Rule("softcap.caps", *SCALAR, lambda cfg: cfg.model.asymmetric_softcap),
)


def names_parameter(pattern: str, name: str) -> bool:
    """Whether a row's pattern names a parameter: * is one part of its path, (a|b) is either."""
    return re.fullmatch(pattern.replace(".", r"\.").replace("*", "[^.]+"), name) is not None


def match_rules(cfg: Config, names: list[str]) -> dict[str, Rule]:
    """Give every parameter name its rule; a name or a present rule left over is an error."""
    rules = [rule for rule in PARAM_RULES if rule.present(cfg)]
    matched = {}
    for name in names:
        rule = next((rule for rule in rules if names_parameter(rule.pattern, name)), None)
        if rule is None:
            raise ValueError(f"parameter {name} has no row in PARAM_RULES; add one beside its module's kin")
        matched[name] = rule
    unused = [rule.pattern for rule in rules if rule not in matched.values()]
    if unused:
        raise ValueError(
            f"PARAM_RULES row {unused[0]!r} matches no parameter; remove it or state when it is present"
        )
    return matched


class StepRates(NamedTuple):
    """What the schedules say about one optimizer step."""

    lr_mul: float  # factor of every learning rate
    momentum: float  # Muon's
    decay_mul: float = 1.0  # factor of the matrices' weight decay
    grad_clip_norm: float = 0.0


def newton_schulz(stack: Tensor, num_steps: int, table: str = "classic") -> Tensor:
    """Push the singular values of every (r, c) matrix in (n, r, c) towards 1 (arXiv 2409.20325; Muon).

    X <- aX + (bA + cA^2)X with A = XX^T, from X / ||X||_F, in the stack's dtype.
    """
    wide = stack.size(1) <= stack.size(2)
    x = stack if wide else stack.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    rows = NS_TABLES[table]
    for step in range(num_steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon:
    """Momentum, orthogonalized (arXiv 2409.20325; contest pull request 399), with MuonEq-R and NorMuon."""

    def __init__(self, cfg: OptimConfig, dtype: torch.dtype):
        self.cfg, self.dtype = cfg, dtype  # of the products

    def new_state(self, weights: Tensor) -> dict[str, Tensor]:
        """Return what survives a step of (n, r, c) weights, as (n, ...) tensors by name."""
        return {"momentum": torch.zeros_like(weights), "row_squares": torch.zeros_like(weights[:, :, :1])}

    def update(self, grad: Tensor, state: dict[str, Tensor], rates: StepRates, step: int) -> Tensor:
        """Return what to subtract from the weights, times the learning rate, in their `step`-th step."""
        momentum = state["momentum"]
        momentum.mul_(rates.momentum).add_(grad)
        direction = grad.add(momentum, alpha=rates.momentum)  # Nesterov
        if self.cfg.row_norm:  # MuonEq-R, arXiv 2603.28254
            direction /= direction.norm(dim=2, keepdim=True) + 1e-7
        update = newton_schulz(direction.to(self.dtype), self.cfg.num_ns_steps, self.cfg.ns_table)
        if self.cfg.normuon_beta2 > 0:
            update = self.even_rows(update, state["row_squares"], step)
        _, rows, cols = update.shape
        return update * max(1.0, rows / cols) ** 0.5

    def even_rows(self, update: Tensor, row_squares: Tensor, step: int) -> Tensor:
        """Divide rows by their running root mean squares, keeping the norm (NorMuon, arXiv 2510.05491)."""
        beta2 = self.cfg.normuon_beta2
        row_squares.lerp_(update.square().mean(2, keepdim=True).to(row_squares.dtype), 1 - beta2)
        scale = (row_squares / (1 - beta2**step)).add(1e-10).rsqrt()
        evened = update * scale.to(update.dtype)
        norms = [x.norm(dim=(1, 2), keepdim=True) for x in (update, evened)]
        return evened * (norms[0] / (norms[1] + 1e-7))


# Who updates the block matrices: a class like Muon, whose state a Stack shards and saves; None: AdamW.
MATRIX_OPTIMIZERS = {"muon": Muon, "adamw": None}


class Stack:
    """Equal-shaped matrices that one optimizer updates together; each rank owns an equal, padded share."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, optimizer, ranks: Ranks):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.optimizer, self.ranks = optimizer, ranks
        self.size = math.ceil(len(params) / ranks.world_size)
        self.state: dict[str, Tensor] = optimizer.new_state(params[0].new_zeros(self.size, *params[0].shape))
        self.num_updates = 0
        self.grad: Tensor | None = None  # this rank's share of the averaged gradient
        self.pending: AsyncWork | None = None

    def padded(self, tensors: list[Tensor]) -> Tensor:
        """Stack tensors, with zeros after them so that the ranks' shares are equal."""
        zeros = [torch.zeros_like(tensors[0])] * (self.size * self.ranks.world_size - len(tensors))
        return torch.stack([*tensors, *zeros])

    def start_reduce(self) -> None:
        """Begin to average the gradients over ranks."""
        self.pending = self.ranks.start_scatter_average(self.padded([param.grad for param in self.params]))

    def finish_reduce(self) -> Tensor:
        """Return this rank's share of the averaged gradient, (n, r, c)."""
        self.grad, self.pending = self.pending.wait(), None
        return self.grad

    def start_update(self, rates: StepRates) -> None:
        """Compute the update of this rank's share and begin to all-gather it."""
        self.num_updates += 1
        update = self.optimizer.update(self.grad, self.state, rates, self.num_updates)
        self.grad, self.pending = None, self.ranks.start_gather(update)

    def finish_update(self, rates: StepRates) -> None:
        """Take the step w <- w (1 - lr * decay) - lr * update."""
        updates = self.pending.wait()[: len(self.params)].to(self.params[0].dtype)
        self.pending = None
        lr = self.lr * rates.lr_mul
        torch._foreach_mul_(self.params, 1.0 - lr * rates.decay_mul * self.weight_decay)
        torch._foreach_add_(self.params, list(updates.unbind()), alpha=-lr)

    def state_dict(self) -> dict:
        """Collect the state of all ranks: it does not depend on how many there are."""
        gathered = {name: self.ranks.start_gather(share).wait() for name, share in self.state.items()}
        whole = {name: stack[: len(self.params)].clone() for name, stack in gathered.items()}
        return whole | {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        share = slice(self.ranks.rank * self.size, (self.ranks.rank + 1) * self.size)
        for name, mine in self.state.items():
            mine.copy_(self.padded(list(state[name].unbind()))[share])
        self.num_updates = state["num_updates"]


class Optimizers:
    """AdamW and the stacks of one model, laid out by PARAM_RULES."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        optim = cfg.optim
        self.ranks = ranks
        optimizer = MATRIX_OPTIMIZERS[optim.matrix_optimizer]
        named = dict(model.named_parameters())
        groups: dict[tuple, list[nn.Parameter]] = {}
        for name, rule in match_rules(cfg, list(named)).items():
            rates = getattr(optim, rule.lr), getattr(optim, rule.weight_decay)
            in_stack = optimizer is not None and rule.optimizer == "matrix"
            shape = named[name].shape if in_stack else None  # None: AdamW, shapes may differ
            groups.setdefault((shape, *rates), []).append(named[name])
        self.adamw = torch.optim.AdamW(
            [
                {"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay}
                for (shape, lr, decay), params in groups.items()
                if shape is None
            ],
            betas=(optim.beta1, optim.beta2),
            eps=optim.adam_eps,
            fused=True,
        )
        stacks = (
            []
            if optimizer is None
            else [
                Stack(params, lr, decay, optimizer(optim, model.compute_dtype), ranks)
                for (shape, lr, decay), params in groups.items()
                if shape is not None
            ]
        )
        # Largest first, in an order that is the same for any number of ranks: checkpoints list them in it.
        self.stacks = sorted(stacks, key=lambda stack: -len(stack.params) * stack.params[0].numel())

    @torch.no_grad()
    def step(self, rates: StepRates) -> None:
        """Average gradients over ranks, clip their global norm, update every weight, drop the gradients.

        Averaging runs while AdamW works, and a stack travels while the next one is orthogonalized.
        """
        params = [param for group in self.adamw.param_groups for param in group["params"]]
        adam_grads = [param.grad for param in params if param.grad is not None]  # a plan may leave some out
        for stack in self.stacks:
            stack.start_reduce()
        self.ranks.average(adam_grads)
        if rates.grad_clip_norm > 0:
            shares = [stack.finish_reduce() for stack in self.stacks]
            self.clip(adam_grads, shares, rates.grad_clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * rates.lr_mul
        self.adamw.step()
        for stack in self.stacks:
            if stack.pending is not None:
                stack.finish_reduce()
            stack.start_update(rates)
        for stack in self.stacks:
            stack.finish_update(rates)
        self.zero_grad()

    def clip(self, adam_grads: list[Tensor], shares: list[Tensor], limit: float) -> None:
        """Scale all gradients so that their global norm over all ranks is at most the limit."""
        wide = wide_dtype(self.ranks.device)
        total = torch.stack(torch._foreach_norm(adam_grads)).to(wide).square().sum()
        if shares:  # ranks hold other parts of them: in float64 their number changes nothing
            norms = torch.stack([torch.linalg.vector_norm(share, dtype=wide) for share in shares])
            total = total + self.ranks.sum(norms.square().sum())
        grads = adam_grads + shares
        torch._foreach_mul_(grads, (limit / (total.sqrt() + 1e-6)).clamp(max=1.0).to(grads[0].dtype))

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        for stack in self.stacks:
            for param in stack.params:
                param.grad = None

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "stacks": [stack.state_dict() for stack in self.stacks]}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for stack, part in zip(self.stacks, state["stacks"], strict=True):
            stack.load_state_dict(part)


# ----------------------------------------------------------------------------------------------------------
# 7 schedules
# ----------------------------------------------------------------------------------------------------------
# Pure functions of the step and the one clock.


class Phase(NamedTuple):
    """What a step does, besides its rates: the same from one change of the schedule to the next."""

    stage: Stage
    passes: int  # of the recurrent segment
    qat: bool  # gradients are taken at the weights as they will be stored


def phase_at(cfg: Config, step: int, progress: float) -> Phase:
    """Return the phase of a step."""
    qat = cfg.quant.qat_start < 1 and progress >= cfg.quant.qat_start
    return Phase(stage_at(cfg, step, progress), recur_passes_at(cfg, progress), qat)


def stage_at(cfg: Config, step: int, progress: float) -> Stage:
    """Return the last stage that has started."""
    stages = get_stages(cfg)
    return [stage for stage in stages if stage.start <= (progress if stage.start < 1 else step)][-1]


def training_ms(cfg: Config, reserve_ms: float = 0.0) -> float:
    """Return the clock that training may use: the limit less what other work needs; without one infinite.

    reserve_ms is measured in the warm-up, half of the clock at most; quant.reserve_seconds is its least.
    """
    limit_ms = 1000.0 * cfg.run.max_wallclock_seconds
    reserved = max(min(reserve_ms, limit_ms / 2), 1000.0 * cfg.quant.reserve_seconds)
    return max(limit_ms - reserved, 0.0) if limit_ms > 0 else math.inf


def run_progress(cfg: Config, step: int, elapsed_ms: float, reserve_ms: float = 0.0) -> float:
    """Return the fraction of the run that is over: of the clock, or without one of the steps."""
    if cfg.run.max_wallclock_seconds > 0:
        return elapsed_ms / training_ms(cfg, reserve_ms)
    return step / max(cfg.run.iterations, 1)


def learning_rate_mul(cfg: Config, step: int, elapsed_ms: float, reserve_ms: float = 0.0) -> float:
    """Return the factor of every learning rate before step `step`, of warm-up, shape, stage and FP8.

    Steps stand for time at the average pace so far where there is a clock (the contest's rule), for
    themselves where there is none; so a run of N steps is N long either way.
    """
    schedule = cfg.schedule
    if schedule.lr_warmup_iters > 0 and step < schedule.lr_warmup_iters:
        factor = step / schedule.lr_warmup_iters
    elif schedule.shape == "warmdown":
        factor = warmdown_mul(cfg, step, elapsed_ms, reserve_ms)
    else:
        factor = cosine_mul(cfg, step, elapsed_ms, reserve_ms)
    if cfg.model.fp8 != "off":
        factor *= cfg.model.fp8_lr_mul
    return factor * stage_at(cfg, step, run_progress(cfg, step, elapsed_ms, reserve_ms)).lr_mul


def warmdown_mul(cfg: Config, step: int, elapsed_ms: float, reserve_ms: float) -> float:
    """Return 1, then fall linearly over warmdown_frac of the run or the time that warmdown_iters take."""
    schedule, run = cfg.schedule, cfg.run
    if run.max_wallclock_seconds > 0:
        total, done = training_ms(cfg, reserve_ms), elapsed_ms
        warmdown = schedule.warmdown_iters * elapsed_ms / max(step, 1)
    else:
        total, done, warmdown = float(run.iterations), float(step), float(schedule.warmdown_iters)
    if schedule.warmdown_frac > 0:
        warmdown = schedule.warmdown_frac * total
    left = max(total - done, 0.0)
    return max(left / warmdown, schedule.min_lr_frac) if left < warmdown else 1.0


def cosine_mul(cfg: Config, step: int, elapsed_ms: float, reserve_ms: float) -> float:
    """Return half a cosine from 1 after the warm-up to min_lr_frac, held for lr_hold_iters steps."""
    schedule, run = cfg.schedule, cfg.run
    held = step - step % schedule.lr_hold_iters
    if run.max_wallclock_seconds > 0:
        steps = training_ms(cfg, reserve_ms) * step / max(elapsed_ms, 1e-9)  # at this pace
    else:
        steps = run.iterations
    done = min(max(held - schedule.lr_warmup_iters, 0) / max(steps - schedule.lr_warmup_iters, 1e-9), 1.0)
    return schedule.min_lr_frac + (1 - schedule.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))


def decay_mul(cfg: OptimConfig, progress: float) -> float:
    """Return the factor of the matrices' decay: 1, then linear to its end (contest pull request 1729)."""
    if cfg.decay_taper_start >= 1.0 or progress <= cfg.decay_taper_start:
        return 1.0
    frac = min((progress - cfg.decay_taper_start) / (1.0 - cfg.decay_taper_start), 1.0)
    return 1.0 + frac * (cfg.decay_taper_end - 1.0)


def step_rates(cfg: Config, step: int, elapsed_ms: float, reserve_ms: float = 0.0) -> StepRates:
    """Return what the optimizers need to know for step `step`."""
    progress = run_progress(cfg, step, elapsed_ms, reserve_ms)
    return StepRates(
        learning_rate_mul(cfg, step, elapsed_ms, reserve_ms),
        muon_momentum(cfg.optim, step),
        decay_mul(cfg.optim, progress),
        stage_at(cfg, step, progress).grad_clip_norm,
    )


def recur_passes_at(cfg: Config, progress: float) -> int:
    """Return how often the recurrent segment runs: one pass more at each of recur_start_fracs."""
    fracs = cfg.schedule.recur_start_fracs
    return 1 + sum(frac <= progress for frac in fracs) if fracs else cfg.model.recur_passes


def muon_momentum(cfg: OptimConfig, step: int) -> float:
    """Return Muon's momentum at a step: linear from its warm-up start to its final value."""
    frac = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps > 0 else 1.0
    return (1.0 - frac) * cfg.muon_momentum_warmup_start + frac * cfg.muon_momentum


# ----------------------------------------------------------------------------------------------------------
# 8 averaging
# ----------------------------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of all weights, from the initial weights on."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = list(model.parameters())
        self.averages = [param.detach().clone() for param in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights: average <- decay * average + (1 - decay) * weight."""
        torch._foreach_lerp_(self.averages, [param.detach() for param in self.params], 1.0 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by their averages."""
        torch._foreach_copy_(self.params, self.averages)

    def state_dict(self) -> dict:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.averages, state["averages"])


class Swa:
    """Plain average of snapshots of all weights, in float32 or wider."""

    def __init__(self, model: nn.Module):
        self.params = list(model.parameters())
        self.sums = [torch.zeros_like(param) for param in self.params]
        self.num_snapshots = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take a snapshot."""
        torch._foreach_add_(self.sums, [param.detach() for param in self.params])
        self.num_snapshots += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by the snapshots' mean, where there are any."""
        if self.num_snapshots:
            torch._foreach_copy_(self.params, torch._foreach_div(self.sums, self.num_snapshots))

    def state_dict(self) -> dict:
        return {"sums": self.sums, "num_snapshots": self.num_snapshots}

    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.sums, state["sums"])
        self.num_snapshots = state["num_snapshots"]


def takes_snapshot(cfg: AverageConfig, steps_done: int, lr_mul: float) -> bool:
    """Whether SWA takes a snapshot after so many steps, the last one with this learning-rate factor."""
    return cfg.swa_every > 0 and steps_done % cfg.swa_every == 0 and lr_mul < cfg.swa_below


# ----------------------------------------------------------------------------------------------------------
# 9 quantization
# ----------------------------------------------------------------------------------------------------------
# quantizers/ turns one matrix into codes; here is which matrices, with what statistics, into how many bytes.


@lru_cache(maxsize=2)  # a byte target packs one recipe many times
def tensor_table(cfg: Config, repaired: tuple[str, ...] = ()) -> tuple[TensorRow, ...]:
    """List the tensors that a recipe's model has, and factors after repaired ones, without making them."""
    with torch.device("meta"):
        named = list(GPT(cfg.model, cfg.data.vocab_size).named_parameters())
    rules, quant = match_rules(cfg, [name for name, _ in named]), cfg.quant
    coded = QUANTIZERS[quant.method].coded(quant)
    kept = [pattern for pattern in quant.float16_names.split(",") if pattern]
    rows = []
    for name, param in named:
        is_kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in kept)
        quantized = "float16" if is_kept or param.numel() <= quant.float16_numel else coded
        storage = "float32" if rules[name].storage == "float32" else quantized
        rows.append(TensorRow(name, list(param.shape), storage))
        if name in repaired and storage == coded and quant.repair_rank:
            rows += repair_rows(rows[-1], quant.repair_rank)
    return tuple(rows)


def quantized_names(cfg: Config) -> dict[str, str]:
    """Map every quantized parameter to its storage, matrix, mlp or embed, in parameter order."""
    table = tensor_table(cfg)
    rules = match_rules(cfg, [row.name for row in table])
    return {row.name: rules[row.name].storage for row in table if row.storage in ("rows", "steps")}


def exported_grids(cfg: Config) -> dict[str, Grid]:
    """Map every quantized parameter to the grid of its stored codes."""
    return build_grids(quantized_names(cfg), cfg.quant)


def calibrated_matrices(model: GPT, cfg: Config, stats: dict[str, CalibrationStats]) -> dict[str, Calibrated]:
    """Put weights and their statistics together, where any are needed; a tied embedding has two roles."""
    params, matrices = dict(model.named_parameters()), {}
    for name in quantized_names(cfg):
        if not QUANTIZERS[cfg.quant.method].needs_calibration:
            check_weight(params[name], name)
            matrices[name] = Calibrated(params[name].detach().float())
            continue
        kept = stats[name]
        roles = kept.hessian, kept.row_weights
        if name == "embed.weight" and "readout" in stats:
            roles = combine_roles(stats["readout"], kept)
        matrices[name] = calibrate(name, params[name], *roles, cfg.quant.damping)
    return matrices


def quantize_model(
    model: GPT, cfg: Config, stats: dict[str, CalibrationStats], size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Quantize every matrix as cfg.quant says; size_of weighs the code and the artifact of a result."""
    matrices = calibrated_matrices(model, cfg, stats)
    return QUANTIZERS[cfg.quant.method].quantize(matrices, quantized_names(cfg), cfg.quant, size_of)


# ----------------------------------------------------------------------------------------------------------
# 10 artifact
# ----------------------------------------------------------------------------------------------------------
# formats/artifact.py owns the file, quantizers/storage.py the streams of its tensors; here is what goes into
# it: what the recipe changes, the tokenizer's sha256, the tensors in parameter order, the scorer's aids.


def has_scorer_state(cfg: EvalConfig) -> bool:
    """Whether the scorer takes anything but weights from the artifact."""
    return has_ngrams(cfg) or cfg.fit_scales


def has_ngrams(cfg: EvalConfig) -> bool:
    """Whether the artifact holds n-grams of training text."""
    return cfg.tilt_static_entries > 0 or cfg.counted_entries > 0


def uses_training_text(cfg: Config) -> bool:
    """Whether anything but training reads training text: it belongs inside the training clock."""
    return QUANTIZERS[cfg.quant.method].needs_calibration or has_scorer_state(cfg.eval)


def pack_model(
    model: GPT, cfg: Config, quantized: dict[str, Quantized], tokenizer_sha256: str
) -> tuple[bytes, list[tuple[str, int]]]:
    """Return an artifact's bytes and its ledger [(part, bytes)], whose sum is the file's size."""
    if PACKED_RECIPE is None:
        check_codes(quantized, QUANTIZERS[cfg.quant.method].coded(cfg.quant))
    if cfg.quant.repair_rank:
        quantized = with_factors(quantized)
    table = tensor_table(cfg, repaired_names(quantized) if cfg.quant.repair_rank else ())
    streams = pack_tensors(table, quantized, dict(model.named_parameters()), cfg.quant.codec)
    if has_scorer_state(cfg.eval):
        streams |= write_scorer_state(model.scorer_state)
    header = {"recipe": fixed_recipe(cfg), "tokenizer_sha256": tokenizer_sha256, "tensors": table}
    return pack_artifact(header, streams, frame_codec(cfg.quant.codec))


def merge_recipe(header: dict, live: Config, path: Path) -> Config:
    """Merge the recipe in an artifact's header with the live fields of `live`."""
    if PACKED_RECIPE is not None:
        if header["recipe"] != PACKED_RECIPE:
            raise ArtifactError(
                f"{path}: made with another recipe than this program. `python -m eval` reads it."
            )
        return live
    recipe = flatten_recipe(header["recipe"], str(path))
    stray = [
        name
        for name in recipe
        if name in config_fields(Config) and config_fields(Config)[name].metadata["live"]
    ]
    if stray:
        raise ArtifactError(f"{path}: {stray[0]} is not an artifact's to set. The file is not one of ours.")
    try:
        cfg = with_values(only_live(live), recipe, str(path))
        check_config(cfg)
    except (ArithmeticError, TypeError) as error:  # rows where numbers belong, steps of no tokens
        raise ArtifactError(f"{path}: the recipe in it cannot be checked ({error}).") from error
    return cfg


def load_scorer_state(streams: dict[str, Stream], cfg: Config) -> ScorerState:
    """Take what the scorer needs out of the streams."""
    return read_scorer_state(
        take_streams(streams, scorer_state_limits(cfg.eval, cfg.data.vocab_size), cfg.quant.codec),
        cfg.eval,
        cfg.data.vocab_size,
    )


def load_artifact(
    path: str | Path, live: Config, device: torch.device, auto_dtype: str = ""
) -> tuple[GPT, Config, dict]:
    """Load a model from an artifact file.

    Model, quantizer and scoring settings come from the artifact; only live fields (paths, device) come
    from `live`. auto_dtype is what a compute_dtype of "auto" stands for; empty: what suits the device.
    Returns the model, the merged config and the header.
    """
    path = Path(path)
    header, streams = read_artifact(path)
    cfg = merge_recipe(header, live, path)
    repaired = ()
    if cfg.quant.repair_rank:
        rows = [row for row in header["tensors"] if isinstance(row, list) and row]
        repaired = repaired_names(dict.fromkeys(str(row[0]) for row in rows))
    table = tensor_table(cfg, repaired)
    if header["tensors"] != [list(row) for row in table]:
        raise ArtifactError(f"{path}: the tensor table is not that of the recipe in it.")
    check_numel(table, path.stat().st_size, path)
    scorer_state = load_scorer_state(streams, cfg) if has_scorer_state(cfg.eval) else ScorerState()
    tensors = unpack_tensors(streams, table, cfg.quant.codec, cfg.quant.repair_rank > 0)
    wild = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wild:
        raise ArtifactError(f"{path}: {wild[0]} has values that are not finite; it is damaged.")
    if auto_dtype and cfg.model.compute_dtype == "auto":
        cfg = with_values(cfg, {"model.compute_dtype": auto_dtype}, str(path))
    model = make_gpt(cfg, device, "meta").to_empty(device=device)  # no weights are drawn for nothing
    model.load_state_dict(tensors)
    model.scorer_state = scorer_state
    return model.eval(), cfg, header


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
    num_units: int  # chunks or batches of documents that could adapt
    switch_at: int  # of them that did
    invalid: str  # why the score cannot be part of a record; empty when it can
    not_comparable: str  # what the tokenizer drops of the text, which other scores pay for; empty for nothing


def score_options(cfg: Config, text: ValidationText, ranks: Ranks) -> ScoreOptions:
    """Return how a scoring is batched and which batches are this rank's."""
    batch_tokens = cfg.run.val_batch_tokens // cfg.data.micro_batches
    return ScoreOptions(text.bos_id, batch_tokens, ranks.device, ranks.rank, ranks.world_size)


def measure(nats: Tensor, text: ValidationText, ranks: Ranks) -> BpbMeter:
    """Put the ranks' nats of the first targets together, in bits per byte."""
    if PACKED_RECIPE is None:
        ranks.barrier()  # one may have scored for minutes longer than another
    nats = ranks.sum(nats).numpy()
    meter = BpbMeter()
    meter.add(nats, text.target_bytes[: len(nats)])
    return meter


def validate(model: nn.Module, cfg: Config, text: ValidationText, ranks: Ranks) -> BpbMeter:
    """Score whole rows of data.seq_len tokens, as the contest does while it trains."""
    tokens = scored_tokens(text, cfg.data.seq_len, keep_tail=False)
    windows, options = plan_windows(len(tokens) - 1, cfg.data.seq_len), score_options(cfg, text, ranks)
    args = (model.eval(), tokens, windows, options)
    nats = score_unless_stopped(args, ranks) if PACKED_RECIPE is None else score_windows(*args)
    return measure(nats, text, ranks)


def score_unless_stopped(args: tuple, ranks: Ranks) -> Tensor:
    """Score windows, or where a signal came return zeros: the ranks stop after this, together."""
    try:
        return score_windows(*args, ranks.heed)
    except Abandoned:
        return torch.zeros(len(args[1]) - 1)


def score_model(
    model: nn.Module, cfg: Config, text: ValidationText, ranks: Ranks, scoring: Scoring | None = None
) -> Score:
    """Score a validation text as cfg.eval says, with all ranks; every rank returns the same score."""
    settings, scoring = cfg.eval, scoring or Scoring()
    context_len = settings.context_len or cfg.data.seq_len
    tokens = scored_tokens(text, context_len, settings.keep_tail)
    options = score_options(cfg, text, ranks)
    num_bytes = int(text.target_bytes[: len(tokens) - 1].sum())
    windows = WindowSettings(
        context_len, settings.stride, scoring_deadline(settings, num_bytes), scoring.switch_at
    )
    compiles = scoring.warms_up and resolve_compile(cfg.run.compile, ranks.device)
    if settings.lora_graphs and compiles:  # blocked loops over T: a graph for each
        options = options._replace(compiles=model.attention != "blocked")
    session = ScoringRun(tokens, windows, options, ranks, scoring.reports)
    scorer = model.eval()
    if scoring.warms_up:
        if SCORERS[settings.mode].adapt is None and compiles:
            plan = SCORERS[settings.mode].plan(settings, context_len, tokens, text.bos_id)
            fits = (has_usual_docs,) if cfg.model.attn_in_document else ()
            scorer = CompiledWindows(model, plan, options.batch_tokens, *fits)
        warm_up_scorer(model, scorer, session, settings, cfg.data.vocab_size)
    ranks.synchronize()
    started = time.perf_counter()
    session.start(scoring_cost(settings, tokens, model.scorer_state))
    if session.options.cost is not plain_cost:
        session.checker.event("precompute", 0, len(tokens) - 1)  # hints: each reads its own prefix
    outcome = score_session(scorer, session, settings)
    meter = measure(outcome.nats, text, ranks)
    if settings.tail_legacy:
        positions, nats = score_tail_again(model, session, settings.stride)
        meter.add(nats, text.target_bytes[positions])
    seconds = ranks.broadcast(time.perf_counter() - started)
    totals = (meter.val_loss, meter.val_bpb, meter.num_tokens, meter.num_bytes)
    tail = "included" if settings.keep_tail else "cut"
    how = (settings.mode, context_len, scored_stride(settings), tail, seconds, *outcome[1:3])
    return Score(*totals, *how, "; ".join(filter(None, (outcome.invalid, text.invalid))), text.not_comparable)


def new_average(model: nn.Module, cfg: AverageConfig) -> Ema | Swa | None:
    """Make the average that a recipe asks for."""
    if cfg.ema_decay > 0:
        return Ema(model, cfg.ema_decay)
    return Swa(model) if cfg.swa_every > 0 else None


def choose_fused(
    model: GPT, cfg: Config, ranks: Ranks, is_compiled: bool
) -> tuple[frozenset[str], dict[str, str]]:
    """Find out which operations of model.fused are kernels on this card, and why others are not; rank 0's."""
    shape = cfg.model
    present = {
        "qk": shape.qk_norm and POSITIONS[shape.positions][1] == "head",
        "mlp": shape.mlp == "square" and shape.biases == "none" and shape.fp8 == "off",
        "xsa": shape.xsa_last > 0 or shape.attn_gate != "none",
        "loss": not shape.asymmetric_softcap,
    }
    found = resolve_fused(
        shape.fused,
        ranks.device,
        model.compute_dtype,
        FusedShape(
            max(stage.batch_tokens // stage.micro_batches for stage in get_stages(cfg)),
            shape.model_dim,
            (shape.num_heads, shape.num_kv_heads, shape.model_dim // shape.num_heads),
            rope_dims(shape),
            round(shape.mlp_mult * shape.model_dim),
            cfg.data.vocab_size + shape.vocab_pad,
            shape.model_dim if shape.attn_gate == "dense" else AttnGate.WIDTH,
            tuple(name for name, is_present in present.items() if not is_present),
        ),
        is_compiled,
    )
    tried = sorted({*found.names, *found.refused})
    return frozenset(name for name in tried if ranks.broadcast(name in found.names)), found.refused


def identity(cfg: Config) -> dict[str, str]:
    """Say which run this is: what a checkpoint must have in common with the run that goes on from it."""
    return {
        "config_hash": fixed_hash(cfg),
        "seed": str(cfg.run.seed),
        "data": digest_of_data(Path(cfg.data.data_path)),
        "tokenizer": open_tokenizer(cfg.data).digest,
    }


def code_digest(root: Path) -> str:
    """Hash the source files of a checkout that training may run."""
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in root.glob(name)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def origin(training: "Training") -> dict:
    """Say what a result depends on besides its recipe: data, tokenizer, code, number of ranks, machine."""
    ranks, folder = training.ranks, Path(training.cfg.data.data_path)
    facts = {"validation": digest_of_data(folder, VAL_GLOB), "code": training.code}
    return training.identity | facts | {"ranks": ranks.world_size, "machine": machine_facts(ranks.device)}


class Training:
    """Everything that a step changes, with one state_dict."""

    def __init__(self, cfg: Config, ranks: Ranks, bos_id: int):
        self.cfg, self.ranks = cfg, ranks
        self.step = 0
        self.train_ms = 0.0
        self.num_tokens = 0
        self.reserve_ms = 0.0  # of the clock, for what is left to do when training ends
        self.job_seconds: dict[str, float] = {}  # what each of jobs_in_the_clock is expected to take
        self.calibration_ms = 0.0  # what they took
        if PACKED_RECIPE is None:
            self.resumed_at: list[int] = []  # steps
            self.saved_at = 0  # step of the newest checkpoint
            self.identity, self.code = identity(cfg), code_digest(Path(__file__).resolve().parent)
            self.verifier: ShardVerifier | None = None  # until all shards are verified
        self.model = build_model(cfg, ranks.device)
        self.optimizers = Optimizers(self.model, cfg, ranks)
        self.average = new_average(self.model, cfg.average)
        self.loader = open_loader(cfg, bos_id)
        self.grids = exported_grids(cfg) if cfg.quant.qat_start < 1 else {}
        self.fp8 = None if cfg.model.fp8 == "off" else attach_fp8(self.model, cfg.model, ranks.device)
        self.is_compiled = resolve_compile(cfg.run.compile, ranks.device)
        if cfg.model.fused != "off":
            self.model.fused, self.not_fused = choose_fused(self.model, cfg, ranks, self.is_compiled)
        on_cpu = ranks.device.type == "cpu" and not self.is_compiled
        in_blocks = on_cpu or fuses(cfg.model, "loss", self.model.fused)
        self.loss = mean_loss_in_blocks if in_blocks and not cfg.model.asymmetric_softcap else mean_loss
        if self.is_compiled:
            torch._dynamo.config.recompile_limit = 8 + 8 * len(get_phases(cfg))  # eight extents of documents
            self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)

    def parts(self) -> dict:
        """Name the parts whose state survives a step."""
        parts = {"model": self.model, "optimizers": self.optimizers, "loader": self.loader}
        parts |= {"average": self.average} if self.average else {}
        return parts | {"fp8": self.fp8} if self.cfg.model.fp8 != "off" else parts

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {"step": self.step, "train_ms": self.train_ms, "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.train_ms, self.num_tokens = state["step"], state["train_ms"], state["num_tokens"]

    def must_stop(self) -> bool:
        """Whether a rank has a reason to stop, as of the clock's last reading; no packed program does."""
        return PACKED_RECIPE is None and self.ranks.reason != 0

    def micro_step(self, phase: Phase, index: int) -> Tensor:
        """Add this rank's micro-batch `index` of the step to the gradient; returns its share of the loss."""
        micro_steps = phase.stage.micro_batches // self.ranks.world_size
        batch = next_batch(self.loader, phase.stage, self.ranks, self.cfg.model.attn_in_document)
        if self.cfg.model.dropout > 0:  # noise by step and micro-batch, the same for any number of ranks
            number = index * self.ranks.world_size + self.ranks.rank
            entropy = (self.cfg.run.seed % 2**64, self.step, number)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        loss = self.loss(self.model, batch, phase.passes) / micro_steps
        loss.backward()
        return loss.detach()

    def accumulate(self, phase: Phase, out_of_time: Callable[[], bool]) -> Tensor | None:
        """Add up a step's gradients; returns this rank's mean loss, or None when time ran out in it."""
        self.model.train()
        if phase.qat:
            with stored_weights(self.model, self.grids, self.cfg.quant.qat_sharpness):
                return self.run_micro_steps(phase, out_of_time)
        return self.run_micro_steps(phase, out_of_time)

    def run_micro_steps(self, phase: Phase, out_of_time: Callable[[], bool]) -> Tensor | None:
        """Run a step's micro-batches of this rank."""
        total, before = torch.zeros((), device=self.ranks.device), self.loader.state_dict()
        for index in range(phase.stage.micro_batches // self.ranks.world_size):
            if index > 0 and out_of_time():  # all is again as before the step
                self.optimizers.zero_grad()
                self.loader.load_state_dict(before)
                if self.cfg.model.fp8 != "off":
                    self.fp8.seen.zero_()
                return None
            total += self.micro_step(phase, index)
        return total

    def update(self, elapsed_ms: float) -> None:
        """Change the weights with the accumulated gradients and count the step."""
        rates = step_rates(self.cfg, self.step, elapsed_ms, self.reserve_ms)
        self.optimizers.step(rates)
        if self.cfg.model.fp8 != "off":
            every = self.ranks.start_gather(self.fp8.seen[None].contiguous()).wait()
            self.fp8.roll(every.amax(0))
        self.step += 1
        if isinstance(self.average, Ema) or takes_snapshot(self.cfg.average, self.step, rates.lr_mul):
            self.average.update()


def get_phases(cfg: Config) -> list[Phase]:
    """List the phases that a run goes through, in order; each may be a compiled graph of its own."""
    steps = max(cfg.run.iterations, 1)
    starts = [stage.start if stage.start < 1 else stage.start / steps for stage in get_stages(cfg)]
    points = sorted({0.0, *starts, *cfg.schedule.recur_start_fracs, cfg.quant.qat_start})
    phases = [phase_at(cfg, round(point * steps), point) for point in points if point <= 1]
    return list(dict.fromkeys(phases))


def timed_batches(training: Training, seconds: float, in_document: bool = False) -> Iterator[Batch]:
    """Yield this rank's calibration batches: at least two, then as many as end within the seconds."""
    clock = Clock(training.ranks)
    clock.start()
    for taken in range(calibration_rounds(training)):
        if taken >= 2 and clock.read_ms() * (taken + 1) / taken > 1000 * seconds:
            return
        yield next_batch(training.loader, get_stages(training.cfg)[-1], training.ranks, in_document)


def calibration_rounds(training: Training) -> int:
    """Return how many batches each rank takes where time does not matter."""
    return -(-training.cfg.quant.calib_batches // training.ranks.world_size)


# Jobs that read training text after training: job(training, seconds) -> (result, units done, units in all).
# Each does what fits in the seconds; with 0 seconds its least, by which the warm-up knows its pace.


def collect_statistics(
    training: Training, seconds: float = math.inf
) -> tuple[dict[str, CalibrationStats], int, int]:
    """Pass training text through the model: what calibration keeps of every quantized matrix, all ranks."""
    model, cfg = training.model, training.cfg
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in quantized_names(cfg)}
    if cfg.model.tie_embeddings:
        modules["readout"] = model.readout
    model.eval()
    taken = 0

    def run_batches() -> None:
        nonlocal taken
        for batch in timed_batches(training, seconds, cfg.model.attn_in_document):
            for part in in_pieces(batch, CALIBRATION_TOKENS):
                (mean_loss(model, part) * part.targets.numel()).backward()
                training.optimizers.zero_grad()
            taken += 1

    stats = collect_stats(modules, run_batches)
    for kept in stats.values():
        kept.merge(training.ranks.sum)
    return stats, taken, calibration_rounds(training)


def count_ngrams(training: Training, seconds: float = math.inf) -> tuple[ScorerState | None, int, int]:
    """Count the n-grams of the first training tokens, on rank 0, which writes the artifact.

    The pace of a sixteenth of them says how many can be counted in the seconds.
    """
    cfg, shards = training.cfg, training.loader.shards
    whole = min(cfg.eval.tilt_static_tokens, sum(training.loader.sizes))
    if not training.ranks.is_main:
        return None, whole, whole
    count, started = whole if math.isinf(seconds) else max(whole // 16, 2), time.perf_counter()
    state = build_scorer_state(cfg.eval, cfg.data.vocab_size, shards, count)
    spent = time.perf_counter() - started
    # A token of the whole took 1.5 to 2.0 times as long as one of a sixteenth: sorting, and caches.
    fits = int(min(count * (seconds - spent) / spent / 2.2, whole))
    if count < fits:
        count, state = fits, build_scorer_state(cfg.eval, cfg.data.vocab_size, shards, fits)
    return state, count, whole


def fit_scales(training: Training, seconds: float = math.inf) -> tuple[tuple[float, ...], int, int]:
    """Fit the scorer's factors of positive and of negative logits to the next training text, all ranks."""
    model, batches = training.model.eval(), []
    scales = torch.ones(2, dtype=wide_dtype(training.ranks.device), device=training.ranks.device)
    for index in range(NEWTON_STEPS):
        sums = torch.zeros(6, dtype=scales.dtype, device=scales.device)
        for batch in batches or timed_batches(training, seconds / NEWTON_STEPS):
            if index == 0:
                batches.append(batch)
            with torch.no_grad():
                logits = model(batch.tokens, batch.starts_doc).flatten(0, 1)
            for part, targets in zip(logits.split(4096), batch.targets.flatten().split(4096)):
                sums += scale_sums(part.float(), targets, scales)  # in parts: it needs their size six times
        scales = newton_step(scales, training.ranks.sum(sums))
    return tuple(scales.tolist()), len(batches), calibration_rounds(training)


def jobs_in_the_clock(cfg: Config) -> dict[str, Callable]:
    """Name the jobs that a recipe asks for."""
    jobs = {}
    if QUANTIZERS[cfg.quant.method].needs_calibration:
        jobs["batches"] = collect_statistics
    if has_ngrams(cfg.eval):
        jobs["ngram_tokens"] = count_ngrams
    if cfg.eval.fit_scales:
        jobs["scale_batches"] = fit_scales
    return jobs


def expected_seconds(training: Training) -> dict[str, float]:
    """Time the least of each job, and say what the whole of it will take; rank 0's figures."""
    found = {}
    for name, job in jobs_in_the_clock(training.cfg).items():
        started = time.perf_counter()
        _, done, whole = job(training, 0.0)
        found[name] = training.ranks.broadcast((time.perf_counter() - started) * whole / done)
    return found


def do_jobs(training: Training, log: Log) -> dict[str, tuple]:
    """Do the jobs, each in its share of what is left of the clock; returns results, logs the time."""
    cfg, ranks, expected = training.cfg, training.ranks, dict(training.job_seconds)
    clock, found, notes = Clock(ranks, training.train_ms), {}, []
    limit_ms = 1000 * cfg.run.max_wallclock_seconds or math.inf
    log.line("calibrating:" + (f" seconds_left:{sum(expected.values()):.0f}" if expected else ""))
    clock.start()
    for name, job in jobs_in_the_clock(cfg).items():
        share = expected[name] / sum(expected.values()) if expected else 1.0
        found[name], done, whole = job(training, share * (limit_ms - clock.read_ms()) / 1000)
        expected.pop(name, None)
        notes.append(f" {name}:{done}/{whole}")
    training.calibration_ms = clock.stop() - training.train_ms
    limit_ms = training_ms(cfg, training.reserve_ms)
    reserve = 0.0 if math.isinf(limit_ms) else 1000 * cfg.run.max_wallclock_seconds - limit_ms
    log.line(f"calibration_time:{training.calibration_ms:.0f}ms reserve:{reserve:.0f}ms{''.join(notes)}")
    return found


def check_finite(training: Training) -> None:
    """Raise unless all weights and their averages are finite, on every rank alike."""
    averages = training.average.state_dict().values() if training.average else ()
    listed = [tensor for kept in averages if isinstance(kept, list) for tensor in kept]
    for tensor in (*training.model.state_dict().values(), *listed):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"step {training.step}: expected finite weights, found NaN or infinity: the run diverged; it "
                "was not saved, the checkpoint before stays. Lower optim.matrix_lr and optim.tied_embed_lr, "
                "or set optim.grad_clip_norm=1."
            )


def save_checkpoint(training: Training, path: Path) -> None:
    """Write all that a step changes, and whose it is; ranks put their parts together first."""
    check_finite(training)
    state = map_leaves(training.state_dict(), Tensor, lambda tensor: tensor.cpu().numpy())
    if training.ranks.is_main:
        facts = {
            "run_id": path.parent.name,
            "step": str(training.step),
            "train_ms": str(training.train_ms),
            "code": training.code,
            "places": json.dumps(place_values(training.cfg)),
            "working_folder": str(Path.cwd()),
            "resumed_at": json.dumps(training.resumed_at),
        }
        write_state(path, state, training.identity | facts)
    training.ranks.agree(0.0)  # all wait for the file, without the launcher's store: it may be gone


def await_verified(training: Training, log: Log) -> None:
    """Wait until all training shards are hashed, or a signal comes: what is kept comes from whole data."""
    ranks, verifier, polls = training.ranks, training.verifier, 0
    while verifier and not training.must_stop():
        verifier.hurry.set()
        verifier.thread.join(min(polls, 1) / 2)
        waits = ranks.sum(torch.tensor(float(verifier.thread.is_alive()))).item() > 0
        ranks.agree(0.0)
        if not waits:
            found = ranks.sum(torch.tensor(float(verifier.num_verified)))
            log.line(verifier.summary(int(found)))
            verifier = training.verifier = None
        log.line("waiting: until the training shards are verified" if waits and polls == 2 else "")
        polls += 1
    refuse_damaged(ranks)


def refuse_damaged(ranks: Ranks) -> None:
    """Raise where the ranks have agreed that a training shard is damaged; those that know it name it."""
    if ranks.reason == DAMAGED and not ranks.stops.fault():
        raise PeerError("another rank found a damaged training shard")
    if ranks.reason == DAMAGED:
        raise UserError(ranks.stops.fault())


def keep_checkpoint(training: Training, log: Log) -> None:
    """Save the run's state into its folder and drop older ones but those that are to stay."""
    path = log.folder / NUMBERED.format(training.step)
    save_checkpoint(training, path)
    if log.is_main:
        drop_checkpoints(log.folder, training.cfg.watch.keep_checkpoints)
        log.line(f"saved:{path}", console=False)
    training.saved_at = training.step
    training.ranks.stops.kept = f"{path} is kept; go on with --resume {log.folder}"


def restore(training: Training, found: FoundCheckpoint) -> None:
    """Continue from a checkpoint of the same recipe, seed and data, on any number of ranks."""
    check_identity(found.path, found.facts, training.identity)
    training.load_state_dict(map_leaves(found.state, np.ndarray, torch.from_numpy))
    training.resumed_at = [*parse_json(found.facts["resumed_at"], found.path), training.step]
    training.saved_at = training.step


def resume_lines(found: FoundCheckpoint, now: str) -> str:
    """Say from where a run goes on, and what is not as it was; `now` is the hash of the code that runs."""
    was = found.facts["code"]
    notes = [f"resume_passed_over:{sentence}" for sentence in found.passed_over]
    notes += [f"resume_other_code:{now}, the checkpoint was written by {was}"] if was != now else []
    return "\n".join([*notes, f"resumed:step {found.facts['step']} from {found.path}"])


def slow_note(training: Training) -> str:
    """Say of a CPU that it will take minutes for a step meant for GPUs; a packed program does not."""
    if PACKED_RECIPE is not None or training.ranks.device.type != "cpu":
        return ""
    num_params = sum(param.numel() for param in training.model.parameters())
    work = 6e-12 * num_params * training.cfg.data.batch_tokens
    advice = "minutes on a CPU; recipes in records/track_cpu are made for one"
    return f". A step takes {work:.0f} TFLOP: {advice}" if work > 10 else ""


def warm_up(training: Training, log: Log) -> None:
    """Compile and time real steps before the clock starts, then restore all state; prints a projection."""
    cfg, ranks = training.cfg, training.ranks
    initial = copy.deepcopy(training.state_dict())
    num_steps = min(cfg.run.warmup_steps, cfg.run.iterations // 4)  # a short run is not all warm-up
    log.line(f"warming up: {max(num_steps, 1)} steps in each phase, off the clock{slow_note(training)}")
    for phase in get_phases(cfg):
        for step in range(max(num_steps, 1)):
            training.accumulate(phase, lambda: False)
            if PACKED_RECIPE is None:
                ranks.barrier()  # rank 0 packs the code, and each compiles for itself
            training.update(0.0)
            if step < num_steps:
                log.line(f"warmup_step:{step + 1}/{num_steps}")
    clock = Clock(ranks)
    clock.start()
    training.micro_step(phase, 0)
    micro_ms = clock.read_ms()
    training.update(0.0)
    update_ms = clock.stop() - micro_ms
    if uses_training_text(cfg) and cfg.run.max_wallclock_seconds > 0:
        training.job_seconds = expected_seconds(training)
    training.load_state_dict(initial)
    # The last step may end after training's time: it is stopped only between micro-batches.
    training.reserve_ms = micro_ms + update_ms + 1100 * sum(training.job_seconds.values())
    step_seconds = (micro_ms * (phase.stage.micro_batches // ranks.world_size) + update_ms) / 1000
    seconds = min(training_ms(cfg, training.reserve_ms) / 1000, cfg.run.iterations * step_seconds)
    log.line(
        f"projected_step_seconds:{step_seconds:.3f} steps:{seconds / step_seconds:.0f} seconds:{seconds:.0f}"
    )


def validate_now(training: Training, log: Log, validate: Callable[[], BpbMeter]) -> None:
    """Score the validation text with the clock stopped and log the result."""
    score, step, train_ms = validate(), training.step, training.train_ms
    if PACKED_RECIPE is None:
        training.ranks.agree(0.0)
        if training.must_stop():
            return
    log.line(
        f"step:{step}/{training.cfg.run.iterations} val_loss:{score.val_loss:.4f} "
        f"val_bpb:{score.val_bpb:.4f} train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
    )
    log.event(kind="val", step=step, val_loss=score.val_loss, val_bpb=score.val_bpb, train_ms=train_ms)


def log_sample(training: Training, log: Log) -> None:
    """Draw text from a document's start and log it; the weights and their noise stay as they are."""
    cfg, model = training.cfg, training.model.eval()
    codec = open_tokenizer(cfg.data)
    sampling = Sampling(cfg.watch.sample_tokens, seed=training.step)
    drawn = draw_tokens(last_logits(model, codec, cfg.data.seq_len), [codec.bos_id], sampling, codec.bos_id)
    log.line(f"sample: step:{training.step} text:{json.dumps(''.join(stream_text(codec, '', drawn)))}")


class StepLoss(NamedTuple):
    """What a step leaves for the log."""

    step: int
    loss: Tensor  # (): this rank's mean
    elapsed_ms: float
    has_line: bool  # in the log; all have an event


def report_losses(training: Training, log: Log, losses: list[StepLoss]) -> None:
    """Log the losses that wait, then drop them: to read them waits for the device. Raises for NaN."""
    if not losses:
        return
    ranks, iterations = training.ranks, training.cfg.run.iterations
    means = ranks.sum(torch.stack([one.loss for one in losses])) / ranks.world_size
    for (step, _, elapsed_ms, has_line), mean in zip(losses, means.tolist()):
        if not math.isfinite(mean):
            raise UserError(
                f"step {step}: expected a finite train_loss, found {mean}; the log is kept. "
                "Lower optim.matrix_lr and optim.tied_embed_lr, or set optim.grad_clip_norm=1."
            )
        if has_line:
            log.line(
                f"step:{step}/{iterations} train_loss:{mean:.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )
        log.event(kind="train", step=step, train_loss=mean, train_ms=elapsed_ms)
    losses.clear()


def end_steps(training: Training, log: Log) -> None:
    """Save the last whole step, so that nothing after it can lose it; leave where ranks.reason says so."""
    ranks, stops = training.ranks, training.ranks.stops
    if not training.must_stop():
        await_verified(training, log)
    if training.must_stop():
        stops.reached()
    is_new = training.step > training.saved_at and ranks.reason != DAMAGED
    if is_new and training.cfg.run.save_every >= 0:
        keep_checkpoint(training, log)
    stops.defers = False
    ranks.agree(0.0)  # of signals that came until here
    refuse_damaged(ranks)
    if training.must_stop():
        stops.signum = ranks.reason  # of whichever rank
        log.line(stops.said(), console=False)
        with suppress(RuntimeError):  # the launcher may be gone, and its store with it
            ranks.close()
        raise Stopped(stops.signum)


def train(training: Training, log: Log, validate: Callable[[], BpbMeter]) -> dict:
    """Run the training loop under the clock, then apply the average; returns steps, time and speed."""
    cfg, run = training.cfg, training.cfg.run
    limit_ms = training_ms(cfg, training.reserve_ms)
    clock = Clock(training.ranks, training.train_ms, limit_ms)
    clock.start()
    elapsed_ms, phase = training.train_ms, None
    losses: list[StepLoss] = []  # that are still on the device
    tell = ProgressLines(log.line, "training")
    stopped = elapsed_ms >= limit_ms
    if PACKED_RECIPE is None:
        training.ranks.stops.defers = True
    while training.step < run.iterations and not stopped:
        step = training.step
        if run.val_loss_every > 0 and step % run.val_loss_every == 0:
            training.train_ms = clock.stop()
            elapsed_ms = max(elapsed_ms, training.train_ms)
            report_losses(training, log, losses)
            validate_now(training, log, validate)
            clock.start()
            if training.must_stop():
                break
        progress = run_progress(cfg, step, elapsed_ms, training.reserve_ms)
        before, phase = phase, phase_at(cfg, step, progress)
        if before not in (None, phase):
            clock.due = 1  # its steps have another pace
            log.line(
                f"phase: seq_len:{phase.stage.seq_len} batch_tokens:{phase.stage.batch_tokens} "
                f"passes:{phase.passes} qat:{phase.qat} step:{step} train_time:{elapsed_ms:.0f}ms"
            )
        train_loss = training.accumulate(phase, lambda: clock.tick() >= limit_ms or training.must_stop())
        if train_loss is None:
            stopped = True
            continue
        training.update(elapsed_ms)
        step, training.num_tokens = training.step, training.num_tokens + phase.stage.batch_tokens
        training.train_ms = elapsed_ms = clock.tick()
        stopped = elapsed_ms >= limit_ms or training.must_stop()
        has_line = run.train_log_every > 0 and (step <= 10 or step % run.train_log_every == 0 or stopped)
        losses.append(StepLoss(step, train_loss, elapsed_ms, has_line))
        saves = PACKED_RECIPE is None and run.save_every > 0 and step % run.save_every == 0
        if clock.has_waited or has_line or saves:
            clock.has_waited = False
            report_losses(training, log, losses)
            done = max(run_progress(cfg, step, elapsed_ms, training.reserve_ms), step / run.iterations)
            tell(int(10_000 * done), 10_000)
        if saves:
            clock.stop()
            await_verified(training, log)
            keep_checkpoint(training, log)
            clock.start()
        if cfg.watch.sample_every > 0 and step % cfg.watch.sample_every == 0:
            clock.stop()
            log_sample(training, log)
            clock.start()
    training.train_ms = clock.stop()
    report_losses(training, log, losses)
    if PACKED_RECIPE is None:
        end_steps(training, log)
    if training.step < run.iterations:
        log.line(
            f"stopping_early: wallclock_cap train_time:{training.train_ms:.0f}ms "
            f"step:{training.step}/{run.iterations}"
        )
    if cfg.average.swa_every > 0 and isinstance(training.average, Swa):
        log.line(f"swa_snapshots:{training.average.num_snapshots} (without any the last weights stay)")
    if training.average:
        training.average.apply()
    if run.val_loss_every >= 0:
        log.line("validating: the final weights, before they are quantized")
        validate_now(training, log, validate)
    speed = 1000.0 * training.num_tokens / max(training.train_ms, 1e-9)
    return {"steps": training.step, "train_ms": training.train_ms, "tokens_per_second": speed}


# ----------------------------------------------------------------------------------------------------------
# 12 main
# ----------------------------------------------------------------------------------------------------------


def weigh_code(folder: Path) -> tuple[int, str]:
    """Write the run's packed source as folder/train_gpt.py; returns its bytes and a note on steps left out.

    From a checkout pack/program.py packs this file with the run's recipe; a packed program copies itself.
    """
    target = folder / "train_gpt.py"
    here = Path(__file__).resolve()
    if PACKED_RECIPE is not None:
        program = here.read_bytes()
        with atomic_file(target) as file:
            file.write(program)
        return len(program), ""
    command = [sys.executable, "-m", "pack", "--recipe", f"{folder.resolve()}/recipe.toml"]
    command += ["--out", str(target.resolve()), "--cache", str(folder.resolve().parent / ".packed"), "--json"]
    shown = None if sys.stderr.isatty() else subprocess.PIPE  # its bars, for who can see them
    result = subprocess.run(
        command, cwd=here.parent, stdout=subprocess.PIPE, stderr=shown, text=True, check=False
    )
    if result.returncode != 0:
        said = f" says\n{result.stderr.strip()}" if result.stderr else " failed, see above"
        raise UserError(f"packing the source failed: `{' '.join(command[1:])}`{said}")
    left_out = parse_json(result.stdout, "python -m pack --json")["steps_left_out"]
    note = f"code_packing: left out {', '.join(left_out)}; the size is that of the file as written"
    return target.stat().st_size, note if left_out else ""


def fused_lines(training: Training) -> str:
    """Say which operations of model.fused are kernels, and why others are not; nothing where it is off."""
    if training.cfg.model.fused == "off":
        return ""
    passed_over = "".join(f"fused_passed_over:{name} {why}\n" for name, why in training.not_fused.items())
    return f"fused:{','.join(sorted(training.model.fused)) or 'none'}\n{passed_over}"


def log_setup(cfg: Config, training: Training, text: ValidationText, log: Log) -> None:
    """Log what runs, in the contest's lines where it has them."""
    ranks, optim, run, model = training.ranks, cfg.optim, cfg.run, training.model
    tied = cfg.model.tie_embeddings
    seen = len(text.target_bytes) // cfg.data.seq_len * cfg.data.seq_len  # as the contest counts them
    name = Path(cfg.data.data_path).resolve().name
    dtype = str(model.compute_dtype).removeprefix("torch.")
    reason = why_float32(cfg.model.compute_dtype, ranks.device) if PACKED_RECIPE is None else ""
    log.line(f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}", console=False)
    log.line(
        f"config_hash:{fixed_hash(cfg)}\n"
        f"val_bpb:enabled tokenizer_kind={text.tokenizer_kind} tokenizer_path={cfg.data.tokenizer_path}\n"
        f"train_loader:dataset:{name} train_shards:{len(training.loader.files)}\n"
        f"val_loader:shards pattern={text.pattern} tokens:{seen}\n"
        f"val_bytes:{text.target_bytes.sum()} raw_bytes:{text.raw_bytes or 'unknown, no manifest'}\n"
        f"tokenizer_report:{read_report(Path(text.pattern).parent, text.tokenizer_sha256)}\n"
        f"model_params:{sum(param.numel() for param in model.parameters())}\n"
        f"world_size:{ranks.world_size} grad_accum_steps:{cfg.data.micro_batches // ranks.world_size}\n"
        f"device:{ranks.device.type} compute_dtype:{dtype}{reason} compile:{training.is_compiled}\n"
        f"attention_mode:gqa backend:{model.attention} "
        f"num_heads:{cfg.model.num_heads} num_kv_heads:{cfg.model.num_kv_heads}\n"
        + "".join(f"attention_passed_over:{name} {why}\n" for name, why in model.passed_over.items())
        + fused_lines(training)
        + (f"{val_summary(text.pattern)}\n{ranks.layout()}" if PACKED_RECIPE is None else "")
        + f"tie_embeddings:{tied} embed_lr:{optim.tied_embed_lr if tied else optim.embed_lr} "
        f"head_lr:{0.0 if tied else optim.head_lr} matrix_lr:{optim.matrix_lr} scalar_lr:{optim.scalar_lr}\n"
        f"train_batch_tokens:{cfg.data.batch_tokens} train_seq_len:{cfg.data.seq_len} "
        f"iterations:{run.iterations} warmup_steps:{run.warmup_steps} "
        f"max_wallclock_seconds:{run.max_wallclock_seconds:.3f}\n"
        f"seed:{run.seed}"
    )
    if PACKED_RECIPE is None:
        log.line(f"byte_account:{text.account}\n{ranks.layout()}")


def log_sizes(cfg: Config, model: GPT, ledger: list[tuple[str, int]], log: Log) -> None:
    """Log code, model and total sizes in the contest's lines; the first total is of float32 weights."""
    float_bytes = sum(4 * param.numel() for param in model.parameters())
    (_, code_bytes), *parts = ledger
    model_bytes = sum(size for _, size in parts)
    label = f"int{cfg.quant.matrix_bits}+{cfg.quant.codec}"
    log.line(
        f"Serialized model: {float_bytes} bytes\n"
        f"Code size: {code_bytes} bytes\n"
        f"Total submission size: {float_bytes + code_bytes} bytes\n"
        f"Serialized model {label}: {model_bytes} bytes (payload_ratio:{float_bytes / model_bytes:.2f}x)\n"
        f"Total submission size {label}: {model_bytes + code_bytes} bytes"
    )


def log_score(cfg: Config, score: Score, log: Log) -> None:
    """Log the artifact's score in the contest's final lines; a sliding score also under its own name."""
    label = f"final_int{cfg.quant.matrix_bits}_{cfg.quant.codec}"
    exact = f"val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}"
    log.line(
        f"eval_mode:{score.mode} context_len:{score.context_len} stride:{score.stride} tail:{score.tail} "
        f"tokens:{score.num_tokens} bytes:{score.num_bytes} adapted:{score.switch_at}/{score.num_units}"
    )
    if score.invalid:
        log.line(f"invalid:{score.invalid}")
    if score.not_comparable:
        log.line(f"not_comparable:{score.not_comparable}")
    log.line(deadline_note(cfg.eval, score))
    if score.mode == "sliding":
        log.line(f"{label}_sliding_window_exact {exact} stride:{score.stride}")
    rounded = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}"
    log.line(f"{label}_roundtrip {rounded} eval_time:{1000 * score.seconds:.0f}ms")
    log.line(f"{label}_roundtrip_exact {exact}")


class Start(NamedTuple):
    """Where a run starts."""

    folder: Path | None = None  # that it goes on in; None for one of its own
    found: FoundCheckpoint | None = None  # that it goes on from; None for step 0


def new_folder(out_dir: str, run_id: str, ranks: Ranks) -> Path:
    """Make a run folder that nobody has: run_id, else run_id_2 and so on; the same on every rank."""
    number = 0
    while ranks.is_main:
        number += 1
        try:
            numbered_folder(out_dir, run_id, number).mkdir(parents=True)
            break
        except FileExistsError:
            continue
    return numbered_folder(out_dir, run_id, int(ranks.broadcast(number)))


def numbered_folder(out_dir: str, run_id: str, number: int) -> Path:
    """Name the folder of the number-th run of one id."""
    return Path(out_dir, f"{run_id}_{number}" if number > 1 else run_id)


def clear_folder(folder: Path) -> None:
    """Remove what an old run left in its folder."""
    for name in ("result*.json", "artifact*.bin", LOG_NAME, METRICS_NAME, EVENTS_NAME, "checkpoint_step*"):
        for path in folder.glob(name):
            path.unlink()


def keep_result(folder: Path) -> None:
    """Rename result and artifact of a run that is to go on: they are not lost if it fails."""
    if (folder / RESULT_NAME).is_file():
        steps = read_result(folder)["steps"]
        for path in (folder / ARTIFACT_NAME, folder / RESULT_NAME):
            if path.is_file():
                path.replace(path.with_stem(f"{path.stem}_step{steps:07d}"))


def hold_folder(folder: Path, start: Start, held: ExitStack) -> None:
    """Keep other writers out of a run folder and make it ready for the steps that follow `start`."""
    held.enter_context(lock_folder(folder))
    if start.folder is None:
        clear_folder(folder)
    else:
        append_text(folder / LOG_NAME, "\n")  # a kill may have cut off a line


def cut_folder(log: Log, start: Start) -> None:
    """Set aside what a run that goes on will make again: result, later log events, damaged checkpoints."""
    step = int(start.found.facts["step"]) if start.found else 0
    keep_result(log.folder)
    log.line(cut_metrics(log.folder, step))
    log.seal = last_seal(log.folder / METRICS_NAME)
    set_aside(log.folder, step)


def kept_note(folder: Path, start: Start) -> str:
    """Say what a stop leaves before the first step."""
    if start.found:
        return f"{start.found.path} is kept; go on with --resume {folder}"
    return f"No checkpoint is kept; {folder} has the log."


def write_recipe(folder: Path, cfg: Config) -> None:
    """Write a run's recipe into its folder, without the places."""
    recipe = whole_recipe(cfg)
    for section, key in (name.split(".") for name in (*PLACE_FIELDS, *ONCE_FIELDS)):
        recipe[section].pop(key, None)
    with atomic_file(folder / RECIPE_NAME) as file:
        file.write(seal_recipe(recipe).encode())


def draw_ledgers(cfg: Config, result: dict, seconds: float, num_bytes: int) -> list[Ledger]:
    """Draw up what a run spent, and scoring num_bytes of text in so many seconds."""
    clock = [(name, result[key] / 1000) for name, key in CLOCK_PARTS.items()]
    return [
        Ledger(BYTES, result["ledger"], cfg.quant.limit_bytes, "bytes"),
        Ledger(TRAINING, clock, cfg.run.max_wallclock_seconds, "s"),
        Ledger(SCORING, [("scoring", seconds)], scoring_limit(cfg.eval, num_bytes), "s"),
        Ledger("seconds by phase", list(result["seconds"].items()), 0, "s"),
    ]


def finish(folder: Path, cfg: Config, result: dict, log: Log) -> None:
    """Print the ledgers and write result.json; raise when the submission is over a limit."""
    ledgers = draw_ledgers(cfg, result, result["score"]["seconds"], result["score"]["num_bytes"])
    broken = overruns(ledgers)
    log.line("\n".join(ledger.format() for ledger in ledgers))
    result |= {
        "over_limits": list(broken),
        "artifact_sha256": sha256_file(folder / ARTIFACT_NAME),
        "config_hash": fixed_hash(cfg),
        "seed": cfg.run.seed,
        "places": place_values(cfg),
        "metrics_crc32": log.seal,
    }
    write_sealed(folder / RESULT_NAME, result)
    log.line(f"run_folder:{folder}")
    if broken:
        verdict = not_valid(broken)
        log.line("\n".join(broken.values()))
        log.line(verdict, console=not cfg.run.enforce_limits)
        if cfg.run.enforce_limits:
            raise BudgetError(verdict)


def place_values(cfg: Config) -> dict[str, str]:
    """Return {"section.key": value} of the fields that a run folder's recipe leaves out."""
    return {name: config_value(cfg, name) for name in PLACE_FIELDS}


def check_world_size(cfg: Config, world_size: int) -> None:
    """Raise unless the ranks can share every step's micro-batches."""
    for stage in get_stages(cfg):
        if stage.micro_batches % world_size:
            raise UserError(
                f"data.micro_batches={stage.micro_batches} must be a multiple of the world size "
                f"{world_size}, so that every number of ranks sees the same batch."
            )


def find_sizes(cfg: Config, device: torch.device) -> Sizes:
    """Count what a recipe's model has and its training keeps, without making it."""
    numels = {row.name: math.prod(row.shape) for row in tensor_table(cfg)}
    shares = MATRIX_OPTIMIZERS[cfg.optim.matrix_optimizer] is not None
    stacks = [name for name, rule in match_rules(cfg, list(numels)).items() if rule.optimizer == "matrix"]
    dtype = resolve_dtype(cfg.model.compute_dtype, device)
    blocked = device.type == "cpu" or cfg.model.fused != "off"
    return Sizes(
        numels=numels,
        stacked=sum(numels[name] for name in stacks) if shares else 0,
        item_bytes=max(dtype.itemsize, 4),
        compute_bytes=dtype.itemsize,
        artifact_bytes=estimate_artifact_bytes(cfg),
        whole_logits=not blocked,
    )


def check_start(cfg: Config, environment: Environment, start: Start) -> None:
    """Raise for what can be known before anything is made: memory, the folder and its disk, bytes."""
    check_world_size(cfg, environment.world_size)
    device = resolve_device(cfg.run.device, environment.local_rank)
    check_device(cfg, device)
    sizes = find_sizes(cfg, device)
    shared = device.type == "cpu" and environment.launched  # others do not say how many are on a machine
    ranks = environment.world_size, environment.local_world_size if shared else 1
    check_memory(cfg, get_stages(cfg), sizes, ranks, (total_memory(device), device.type))
    check_limit(cfg, sizes)
    resolve_backend(cfg, device, resolve_dtype(cfg.model.compute_dtype, device))
    check_patterns(cfg.quant.float16_names, sizes)
    if SCORERS[cfg.eval.mode].plan is None and cfg.eval.lora_rank:
        with torch.device("meta"):
            find_sites(GPT(cfg.model, cfg.data.vocab_size), cfg.eval.lora_sites.split(","))
    if environment.rank == 0:
        check_disk(cfg, sizes, start.folder is None)


def rehearse_step(cfg: Config, ranks: Ranks, bos_id: int) -> None:
    """Take a step's memory: weights, optimizer state, gradients and a micro-batch on top, in each phase."""
    training = Training(cfg, ranks, bos_id)
    for phase in get_phases(cfg):
        training.model.train()
        training.micro_step(phase, 0)
        training.update(0.0)
        training.accumulate(phase, iter((False, True)).__next__)


def resolve_micro_batches(cfg: Config, environment: Environment, ranks: Ranks, bos_id: int) -> Config:
    """Choose data.micro_batches=auto: the fewest of which one fits the memory of every rank's device."""
    # Alone, so that a rank without memory keeps none waiting; its optimizer state is whole, not a share.
    alone = Ranks(Environment({}, local_rank=environment.local_rank), cfg.run.device)
    can_try = ranks.device.type != "cpu"
    for count in counts_to_try(get_stages(cfg)[0], ranks.world_size, can_try):
        tried = with_values(cfg, {"data.micro_batches": count}, "auto")
        step = partial(rehearse_step, tried, alone, bos_id)
        fails = torch.tensor(0.0 if not can_try or fits_memory(step, alone.device) else 1.0)
        if ranks.sum(fails).item() == 0:
            return tried
        if ranks.is_main:
            print(f"data.micro_batches=auto: {count} need more memory than there is", flush=True)
    raise UserError(out_of_memory(tried, environment))


def out_of_memory(cfg: Config, environment: Environment) -> str:
    """Say what a step takes of this process's device, and what to lower."""
    device = resolve_device(cfg.run.device, environment.local_rank)
    with torch.device("meta"):
        num_params = sum(param.numel() for param in GPT(cfg.model, cfg.data.vocab_size).parameters())
    item_bytes = resolve_dtype(cfg.model.compute_dtype, device).itemsize
    sizes = (num_params, item_bytes, total_memory(device), device.type)
    return memory_message(cfg, get_stages(cfg), environment.world_size, sizes)


def open_run(
    cfg: Config, environment: Environment, text: ValidationText, start: Start, held: ExitStack
) -> tuple[Training, Log, int]:
    """Make ranks, model (from a checkpoint if there is one) and run folder; also weigh the packed source."""
    ranks = Ranks(environment, cfg.run.device)
    auto_note = ""
    if PACKED_RECIPE is None and not cfg.data.micro_batches:
        cfg = resolve_micro_batches(cfg, environment, ranks, text.bos_id)
        auto_note = f"data.micro_batches=auto: {cfg.data.micro_batches}"
    started_at = time.localtime(ranks.broadcast(time.time()))  # rank 0's, so that all ranks name one folder
    run_id = cfg.run.run_id or time.strftime("%Y%m%d_%H%M%S", started_at) + f"_seed{cfg.run.seed}"
    training = Training(cfg, ranks, text.bos_id)
    if PACKED_RECIPE is None and start.found:
        restore(training, start.found)
    if PACKED_RECIPE is None and start.folder:
        folder = start.folder
    elif PACKED_RECIPE is None and cfg.run.overwrite and cfg.run.run_id:
        folder = Path(cfg.run.out_dir, run_id)
    else:
        folder = new_folder(cfg.run.out_dir, run_id, ranks)
    log = Log(folder, ranks.is_main, cfg.watch.tensorboard)
    if PACKED_RECIPE is None:
        if ranks.is_main:
            hold_folder(folder, start, held)
        if ranks.is_main and start.folder is None:
            tell_folder(folder, environment)
        ranks.stops.is_silent, ranks.stops.kept = not ranks.is_main, kept_note(folder, start)
        if start.found:
            log.line(resume_lines(start.found, training.code))
    code_bytes, packing_note = 0, ""
    if ranks.is_main:
        write_recipe(folder, cfg)
        log.line("packing: the code that counts; a new recipe or source takes up to half a minute")
        code_bytes, packing_note = weigh_code(log.folder)
        broken = overruns([Ledger(BYTES, [("code", code_bytes)], cfg.quant.limit_bytes, "bytes")])
        if broken and cfg.run.enforce_limits:
            raise BudgetError(f"{not_valid(broken)}: the code alone, nothing was trained.")
    if PACKED_RECIPE is None:
        share = environment.local_rank, environment.local_world_size
        verifier = training.verifier = ShardVerifier(training.loader.files, share)
        ranks.stops.fault = lambda: verifier.fault
    log_setup(cfg, training, text, log)
    overrides = (f"environment_override:{key}={value}" for key, value in environment.overrides.items())
    for line in (packing_note, auto_note, *overrides):
        log.line(line, console=False)
    return training, log, code_bytes


def store_model(training: Training, log: Log, sha256: str, code_bytes: int) -> list[tuple[str, int]]:
    """Calibrate on all ranks, quantize and write the artifact on rank 0; returns the ledger.

    sha256 is the tokenizer's.
    """
    model, cfg = training.model, training.cfg
    found = do_jobs(training, log) if uses_training_text(cfg) else {}
    stats = found.get("batches", {})
    if has_scorer_state(cfg.eval):
        counted = found.get("ngram_tokens") or ScorerState()
        model.scorer_state = counted._replace(scales=found.get("scale_batches", ()))
    ledger = [("code (packed train_gpt.py)", code_bytes)]
    log.line(f"quantizing: {cfg.quant.method}")
    if training.ranks.is_main:
        packed: dict[int, tuple] = {}  # what was weighed, by identity: the chosen one is not packed again

        def pack(quantized: dict[str, Quantized]) -> tuple[bytes, list[tuple[str, int]]]:
            if id(quantized) not in packed:
                packed[id(quantized)] = quantized, *pack_model(model, cfg, quantized, sha256)
            return packed[id(quantized)][1:]

        def size_of(quantized: dict[str, Quantized]) -> int:
            size = code_bytes + len(pack(quantized)[0])
            log.line(f"quantizing: try:{len(packed)} bytes:{size}")
            return size

        blob, parts = pack(quantize_model(model, cfg, stats, size_of))
        with atomic_file(log.folder / ARTIFACT_NAME) as file:
            file.write(blob)
        ledger += parts
        log_sizes(cfg, model, ledger, log)
    training.ranks.barrier()
    return ledger


def run(cfg: Config, environment: Environment, start: Start | None = None) -> None:
    """Do the main job in a run folder that is held until the end."""
    with ExitStack() as held:
        train_and_score(cfg, environment, start or Start(), held)


def train_and_score(cfg: Config, environment: Environment, start: Start, held: ExitStack) -> None:
    """Train or resume training, average, quantize, pack, reload, score, report."""
    marks = [("", time.perf_counter())]

    def phase(name: str) -> None:
        marks.append((name, time.perf_counter()))

    require_codec(frame_codec(cfg.quant.codec))
    if PACKED_RECIPE is None:
        check_start(cfg, environment, start)
    else:
        check_world_size(cfg, environment.world_size)
    text = load_validation(cfg.data)
    if PACKED_RECIPE is None:
        check_text(cfg, text)
    training, log, code_bytes = open_run(cfg, environment, text, start, held)
    ranks = training.ranks
    if PACKED_RECIPE is None:
        cfg = training.cfg  # where auto has become a number
    warm_up(training, log)
    if PACKED_RECIPE is None and ranks.is_main and start.folder:
        cut_folder(log, start)
        tell_folder(log.folder, environment)
    phase("set-up and warm-up")

    facts = train(training, log, lambda: validate(training.model, cfg, text, ranks))
    used, held = (size >> 20 for size in peak_memory(ranks.device))
    log.line(f"peak memory allocated: {used} MiB reserved: {held} MiB")
    phase("training and validation")

    ledger = store_model(training, log, text.tokenizer_sha256, code_bytes)
    phase("quantize and write")
    model, packed_cfg, header = load_artifact(log.folder / ARTIFACT_NAME, cfg, ranks.device)
    tokens, text = text.tokens, load_validation(packed_cfg.data, text.pattern, header["tokenizer_sha256"])
    if PACKED_RECIPE is None and not np.array_equal(tokens, text.tokens):
        raise UserError(
            f"{text.pattern}: expected the validation text that the run began with, found another: it was "
            f"replaced in the meantime. `python -m eval {log.folder}` scores the artifact on the new one."
        )
    phase("reload")
    progress = ProgressLines(log.line, "scoring")
    score = score_model(model, packed_cfg, text, ranks, Scoring(Callbacks(progress=progress)))
    phase("scoring")
    log_score(cfg, score, log)
    ranks.close()
    if ranks.is_main:
        seconds = {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}
        result = {**facts, "score": score._asdict(), "ledger": ledger, "seconds": seconds}
        result["calibration_ms"] = training.calibration_ms
        if PACKED_RECIPE is None:
            result["resumed_at"] = training.resumed_at
            result["byte_account"] = text.account.facts()
            result["origin"] = origin(training)
        result["tokenizer_report"] = read_report(Path(text.pattern).parent, text.tokenizer_sha256)
        finish(log.folder, cfg, result, log)
        if PACKED_RECIPE is None and cfg.run.save_every == 0:
            for path in log.folder.glob(NUMBERED_GLOB):
                path.unlink()


def run_or_explain(cfg: Config, environment: Environment, start: Start | None = None) -> None:
    """Run; when memory is used up, say what to lower, and after a signal what is left."""
    try:
        run(cfg, environment, start)
    except Stopped:
        if not environment.stops.is_silent:
            print(environment.stops.said(), file=sys.stderr)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(cfg, environment)) from error


def job_store(environment: Environment) -> dist.Store:
    """Connect to what the launcher keeps over all its starts of one job."""
    return open_store(environment, JOIN_S, "job")


def tell_folder(folder: Path, environment: Environment) -> None:
    """Let a later start of this job by the launcher know the run folder."""
    if environment.launched:
        job_store(environment).set("folder", str(folder))


def told_folder(environment: Environment) -> Path | None:
    """Return the run folder of this job's earlier starts, None where there was none."""
    if environment.restarts == 0:
        return None
    store = job_store(environment)
    return Path(store.get("folder").decode()) if store.check(["folder"]) else None


def find_place(text: str, out_dir: str) -> Path:
    """Find what --resume names: a checkpoint, a run folder, or the id of a run."""
    for place in (Path(text), Path(out_dir, text)) if text else ():
        if place.is_file() or newest_checkpoint(place) or (place / RECIPE_NAME).is_file():
            return place
    raise UserError(
        f"--resume {text}: expected a run folder, the id of a run in {out_dir} or a checkpoint, found none. "
        "run.save_every=N writes a checkpoint every N steps, a signal (Ctrl-C) at any."
    )


def plan_run(args, environment: Environment) -> tuple[Config, Start]:
    """Resolve a run's config, and where it starts."""
    folder = told_folder(environment)  # of a job that the launcher starts anew
    goes_on = folder is not None and newest_checkpoint(folder) is not None
    if args.resume is None:
        cfg = load_config(args.recipe, environment.overrides, args.overrides)
        start = Start(folder) if folder else find_start(cfg) if cfg.run.resume == "auto" else Start()
        start = Start(folder, read_newest(folder)) if goes_on else start
    else:
        cfg, start = plan_resumed(args, environment, folder if goes_on else None)
        start = start._replace(folder=folder) if folder else start
    if folder and (folder / RESULT_NAME).is_file():
        end_finished(cfg, folder)
    if start.found:
        check_spent(cfg, start.found, start.found.path.parent / RECIPE_NAME)
    return cfg, start


def plan_resumed(args, environment: Environment, known: Path | None) -> tuple[Config, Start]:
    """Resolve the config of a run that --resume, or what is known of the job, names, and where it starts.

    It goes on in its folder, but a checkpoint that is not the folder's newest begins a run of its own.
    """
    typed = parse_overrides(args.overrides)
    place = known or find_place(args.resume, typed.get("run.out_dir", RunConfig.out_dir))
    folder = place if place.is_dir() else place.parent
    found, is_run = read_newest(place), (folder / RECIPE_NAME).is_file()
    if found is None:
        kept = "it is finished and kept none" if (folder / RESULT_NAME).is_file() else "found none"
        raise UserError(f"{place}: expected a run folder with a checkpoint, {kept}. Start the run anew.")
    if not is_run and not args.recipe:
        raise UserError(f"{place}: expected {RECIPE_NAME} beside it, found none. Name it: --recipe FILE.")
    own = {"run.run_id": folder.resolve().name, "run.out_dir": str(folder.resolve().parent)} if is_run else {}
    places = places_of(found) | own
    cfg = load_config(args.recipe or str(folder), environment.overrides, args.overrides, places)
    cfg = with_values(cfg, {name: value for name, value in own.items() if name not in typed}, "folder")
    is_newest = place.is_dir() or newest_checkpoint(folder) == place
    is_same = Path(cfg.run.out_dir, cfg.run.run_id).resolve() == folder.resolve()
    return cfg, Start(folder if is_same and is_newest else None, found)


def places_of(found: FoundCheckpoint) -> dict[str, str]:
    """Return where a checkpoint's run had its data; relative paths count from its folder, or from here."""
    places, origin = parse_json(found.facts["places"], found.path), Path(found.facts["working_folder"])
    paths = {name: path for name, path in places.items() if name.startswith("data.")}
    return places | {name: str(origin / path) for name, path in paths.items() if not Path(path).exists()}


def find_start(cfg: Config) -> Start:
    """Find the unfinished run that a config goes on with: that of its run_id, or the newest of its recipe."""
    folder = Path(cfg.run.out_dir, cfg.run.run_id)
    if not cfg.run.run_id:
        folder = find_unfinished(Path(cfg.run.out_dir), identity(cfg))
    if folder is None or not folder.is_dir():
        return Start()
    lock_folder(folder, HOLDER_WAIT_S).release()  # once a process that was stopped there has saved
    if (folder / RESULT_NAME).is_file():
        end_finished(cfg, folder)
    return Start(folder, read_newest(folder))


def end_finished(cfg: Config, folder: Path) -> NoReturn:
    """End with status 0 where a folder has this run's valid result, else with an error."""
    result = read_result(folder)
    expected, found = [fixed_hash(cfg), cfg.run.seed], [result.get("config_hash"), result.get("seed")]
    if found != expected:
        raise UserError(
            f"{folder}: expected a run of recipe {expected[0]} and seed {expected[1]}, found a finished one "
            f"of {found[0]} and seed {found[1]}. Choose another run.run_id."
        )
    if result["over_limits"] and cfg.run.enforce_limits:
        raise BudgetError(f"{folder}: NOT A VALID RUN: over its limit of {', '.join(result['over_limits'])}.")
    print(f"{folder}: the run is finished; --resume {folder} run.iterations=N makes it longer")
    raise SystemExit(0)


def score_file(path: Path, live: Config, environment: Environment) -> None:
    """Score an artifact and print the result as JSON; reads validation data only, and writes nothing."""
    ranks = Ranks(environment, live.run.device)
    model, cfg, header = load_artifact(path, live, ranks.device)
    text = load_validation(cfg.data, "", header["tokenizer_sha256"])
    score = score_model(model, cfg, text, ranks)
    ranks.close()
    if ranks.is_main:
        account = {} if PACKED_RECIPE is not None else {"byte_account": text.account.facts()}
        print(json.dumps(score._asdict() | account))


def open_scorer(path: str) -> tuple[dict, Callable[[list[int]], tuple[list[float], list]]]:
    """Offer an artifact's scorer to an audit: facts, and tokens -> nats of each target, events.

    audit/inside.py asks for it as `scorer`, in the source and in every packed program.
    """
    live = load_config(None, read_environment().overrides, [])
    ranks = KeepingRanks(Environment({}), "cpu")
    model, cfg, header = load_artifact(path, live, ranks.device)
    text = load_validation(cfg.data, "", header["tokenizer_sha256"])

    def score(stream: list[int]) -> tuple[list[float], list]:
        events: list[dict] = []
        tokens = np.array(stream, dtype=text.tokens.dtype)
        changed = ValidationText(tokens, np.ones(len(tokens) - 1, dtype=np.int64), *text[2:])
        score_model(model, cfg, changed, ranks, Scoring(Callbacks(events.append), len(stream)))  # no clock
        return ranks.kept.tolist(), [[event["kind"], event["lo"], event["hi"]] for event in events]

    window = cfg.eval.context_len or cfg.data.seq_len
    whole = 1 if cfg.eval.keep_tail else window
    facts = {"vocab_size": cfg.data.vocab_size, "window": window, "stride": cfg.eval.stride, "whole": whole}
    return facts, score


def describe(cfg: Config, steps: list[int], elapsed_ms: list[float]) -> dict:
    """Say what a config means without data, training or memory: counts, plan, costs, schedule."""
    with torch.device("meta"):
        named = dict(GPT(cfg.model, cfg.data.vocab_size).named_parameters())
    rules = match_rules(cfg, list(named))
    by_rule: dict[str, int] = {}
    for name, rule in rules.items():
        by_rule[rule.pattern] = by_rule.get(rule.pattern, 0) + named[name].numel()
    shapes = ["x".join(map(str, named[name].shape)) for name in rules if rules[name].optimizer == "matrix"]
    plan = layer_plan(cfg.model, cfg.model.recur_passes)
    rows = []
    for step, elapsed in zip(steps, elapsed_ms):
        progress = run_progress(cfg, step, elapsed)
        rates, phase = step_rates(cfg, step, elapsed), phase_at(cfg, step, progress)
        rows.append(
            {
                "step": step,
                "lr": getattr(cfg.optim, next(iter(rules.values())).lr) * rates.lr_mul,
                **rates._asdict(),
                "seq_len": phase.stage.seq_len,
                "batch_tokens": phase.stage.batch_tokens,
                "recur_passes": phase.passes,
                "qat": phase.qat,
            }
        )
    return {
        "config": whole_recipe(cfg),
        "config_hash": fixed_hash(cfg),
        "num_params": sum(param.numel() for param in named.values()),
        "params_by_rule": by_rule,
        "matrix_shapes": {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)},
        "layer_plan": [step._asdict() for step in layer_plan(cfg.model, 1)],
        "layer_plan_recurring": [step._asdict() for step in plan],
        "flops_per_token": flops_per_token(cfg, named, [step.layer for step in plan]),
        "estimated_artifact_bytes": estimate_artifact_bytes(cfg),
        "schedule": rows,
    }


def flops_per_token(cfg: Config, named: dict[str, Tensor], visits: list[int]) -> int:
    """Count forward and backward operations a token: 6 a weight and visit, 6 T D a visit for attention."""
    total = 6 * cfg.model.model_dim * (cfg.data.vocab_size + cfg.data.seq_len * len(visits))
    for name, param in named.items():
        if name.startswith("blocks.") and param.ndim == 2:
            total += 6 * param.numel() * visits.count(int(name.split(".")[1]))
    return total


def estimate_artifact_bytes(cfg: Config) -> int:
    """Estimate the stored bytes: the target if there is one, else what the tensors take before coding."""
    if cfg.quant.target_bytes:
        return cfg.quant.target_bytes
    estimate_bits = QUANTIZERS[cfg.quant.method].estimate_bits
    code_bits = {name: estimate_bits(kind, cfg.quant) for name, kind in quantized_names(cfg).items()}
    return estimate_bytes(tensor_table(cfg), code_bits)


def describe_to_stdout(args, environment: Environment) -> None:
    """Print what --describe, or --hardware, asks for."""
    steps = split_numbers(args.steps, "--steps", int)
    elapsed = split_numbers(args.elapsed_ms, "--elapsed-ms") if args.elapsed_ms else [0.0] * len(steps)
    if len(elapsed) != len(steps):
        raise UserError(f"--elapsed-ms: expected {len(steps)} times, one a step, found {len(elapsed)}.")
    cfg = load_config(args.recipe, environment.overrides, args.overrides)
    found = describe(cfg, steps, elapsed)
    if args.hardware is not None:
        words = (["--recipe", args.recipe] if args.recipe else []) + args.overrides
        found["hardware"] = project(found, args.hardware, words)
    print(json.dumps(found) if args.json or not sys.stdout.isatty() else format_description(found))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, resolve the config, run. A packed program takes live fields and actions."""
    fields = describe_sections(Config) if PACKED_RECIPE is None else " ".join(config_fields(Config))
    parser = (FieldParser if PACKED_RECIPE is None else CommandParser)(
        prog="train_gpt.py",
        description="Train, quantize, pack and score a model as one recipe says.",
        epilog=fields,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    parser.add_argument("--score", type=Path, metavar="FILE", help="score an artifact instead of training")
    if PACKED_RECIPE is None:
        parser.explain(Config)
        about = "go on: a run folder, the id of a run, or a checkpoint; recipe and places are the run's"
        parser.add_argument("--resume", metavar="RUN", help=about)
        parser.add_argument("--recipe", help="recipe.toml; default: the contest's naive baseline")
        parser.add_argument("--describe", action="store_true", help="print counts, plan and schedule")
        parser.add_argument(
            "--json", action="store_true", help="with --describe: JSON, as where output is no terminal"
        )
        parser.add_argument(
            "--steps", default="0", metavar="N,N,...", help="with --describe: steps to tabulate"
        )
        parser.add_argument("--elapsed-ms", default="", metavar="MS,...", help="with --describe: their times")
        about = "describe the run on such machines: h100x8,4090,t4,... (docs/scaling.md)"
        parser.add_argument("--hardware", metavar="NAME,...", help=about)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(sorted(words, key=lambda word: bool(re.match(r"\w+\.\w+=", word))))
    environment = read_environment()
    for sentence in environment.misspelled if environment.rank == 0 else ():
        print(f"warning: environment: {sentence}", file=sys.stderr)
    if PACKED_RECIPE is None and (args.describe or args.hardware is not None):
        if args.resume or args.score:
            parser.error(
                "--describe tells of a recipe: name a run's with --recipe RUN, not --resume or --score"
            )
        describe_to_stdout(args, environment)
        return
    try:
        if args.score or PACKED_RECIPE is not None:
            recipe_path = args.recipe if PACKED_RECIPE is None else None
            cfg = load_config(recipe_path, environment.overrides, args.overrides)
            score_file(args.score, cfg, environment) if args.score else run(cfg, environment)
        else:
            environment = environment._replace(stops=Stops())
            environment.stops.install(environment.launched)
            cfg, start = plan_run(args, environment)
            run_or_explain(cfg, environment, start)
    except Exception as error:
        if PACKED_RECIPE is None:
            speak_once(error, environment)
        elif environment.rank > 0 and isinstance(error, UserError):
            time.sleep(2.0)  # rank 0 has the same error: let it speak, once, before torchrun ends all ranks
            sys.exit(1)
        raise


if __name__ == "__main__":
    run_command(main)
elif __name__ == "audited":
    scorer = open_scorer
