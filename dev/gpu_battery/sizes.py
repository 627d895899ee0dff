"""Sizes of the battery: on a GPU those of the recipes, in a rehearsal as small as the code allows."""

from pathlib import Path

from dev.gpu_battery.job import Job
from train_gpt import Config, load_config

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = {
    "1061": "records/track_10min_16mb/2026-04-27_SparseGate_TwoLane_SmearGate/recipe.toml",
    "naive": "records/track_10min_16mb/2026-03-17_NaiveBaseline/recipe.toml",
    "small": "records/track_cpu/2026-11-21_Sp2048_LoraScoring/recipe.toml",
}
SIZES = {  # name -> (full, miniature)
    "product_tokens": (98_304, 512),
    "product_width": (512, 64),
    "product_outputs": ((512, 2048, 8192), (64, 128)),
    "square": (8192, 256),
    "copy_bytes": (4 << 30, 16 << 20),
    "empty_blocks": (4_700_000, 1000),  # what a varlen kernel launches for one row of 98,304 tokens
    "attention_rows": ((8, 2048), (2, 128)),
    "attention_window": (512, 32),
    "packed_tokens": (98_304, 512),
    "packed_segment": (2048, 64),
    # tokens, D, (H, G, K), rope_dims, F, V, columns of the gate
    "fused_shape": ((98_304, 512, (8, 4, 64), 16, 2048, 8192, 12), (512, 64, (4, 2, 16), 8, 128, 512, 12)),
    "short_rows": ((64, 192), (4, 64)),
    "shard_tokens": (8_000_000, 60_000),
    "compile": ("auto", "off"),  # of all but step_1061_low: a busy CPU takes a minute for a graph
    "naive_steps": (30, 4),
    "text_bytes": ((2_000_000, 40_000), (200_000, 4_000)),  # of training and of validation
    "train_seconds": (15, 3),
    "window_tokens": (262_144, 4096),  # targets of the plain scorers
    "sliding_targets": (32_768, 512),
    "lora_docs": (64, 4),
    "lora_lengths": ((300, 1000, 2000), (40, 90)),
    "sgd_steps": (5, 2),
}
# What makes a recipe of the contest small; everything else of it stays switched on.
MINIATURE = {
    "data.vocab_size": 512,
    "data.seq_len": 64,
    "data.batch_tokens": 2048,
    "run.val_batch_tokens": 4096,
    "model.num_layers": 2,
    "model.model_dim": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.mlp_mult": 2,
    "model.compute_dtype": "float32",
    "quant.float16_numel": 0,
    "eval.lora_rank": 4,
    "eval.lora_batch_docs": 4,
    "eval.lora_chunk_tokens": 16,
    "eval.sgd_batch_seqs": 4,
}
MINIATURE_1061 = {
    "model.rope_dims": 8,
    "model.xsa_last": 2,
    "model.recur_layers": (0, 0),
    "model.parallel_start": 1,
}


def get_size(job: Job, name: str):
    """Look up a size."""
    return SIZES[name][job.rehearse]


def load_recipe(job: Job, name: str, **changes) -> Config:
    """Load a recipe, of the contest's in miniature for a rehearsal; the environment changes nothing."""
    values = {}
    if job.rehearse and name != "small":
        values = MINIATURE | (MINIATURE_1061 if name == "1061" else {})
    return load_config(str(ROOT / RECIPES[name]), values | changes, [])
