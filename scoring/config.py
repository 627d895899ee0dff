"""The [eval] section of a recipe: how an artifact is scored."""

from dataclasses import dataclass

from formats.recipe import option

# The scorers and what they do; each has its row in scoring/modes.py.
EVAL_MODES = {
    "chunked": "windows side by side, as the contest validates while it trains",
    "sliding": "windows that overlap: each scores its last `stride` targets",
    "doc": "windows that overlap and stay in their document",
    "sgd-ttt": "sliding; SGD on all weights after each scored chunk",
    "lora-ttt": "document by document, each with low-rank adapters that learn from what is scored",
    "phased": "lora-ttt with phases of SGD on what is scored, between batches of documents",
    "legacy_pre_eval": "system C: trains on the whole text before it scores it; invalid",
}


@dataclass(frozen=True)
class EvalConfig:
    """How the artifact is scored and how long that may take."""

    mode: str = option("chunked", "", "how the scorer plans windows and adapts", choices=EVAL_MODES)
    context_len: int = option(0, "", "tokens a window may see; 0: data.seq_len", low=0)
    stride: int = option(64, "EVAL_STRIDE", "targets a sliding window scores", low=1)
    keep_tail: bool = option(False, "", "score the targets past the last whole window too")
    tail_legacy: bool = option(False, "", "systems B, C: the last targets count many times; invalid")
    deadline_s: float = option(
        0.0,
        "",
        "end adaptation so that scoring takes at most this; 0: 95 % of limit_seconds; -1: never",
        low=-1,
    )
    tilt_online: float = option(0.0, "", "strength of hints from the text scored so far, times share", low=0)
    tilt_static_entries: int = option(
        0, "", "most n-grams of training text in the artifact, for hints; 0: none", low=0
    )
    tilt_static_lengths: tuple = option((3,), "", "tokens of these n-grams' prefixes")
    tilt_static_strength: float = option(1.0, "", "strength of n-gram hints", low=0)
    tilt_static_tokens: int = option(10_000_000, "", "training tokens that n-grams are counted on", low=2)
    tilt_legacy: bool = option(False, "", "system B: n-gram hints guess the token just seen; invalid")
    counted_entries: int = option(
        0, "", "most n-grams of training text in the artifact that the score is mixed with; 0: none", low=0
    )
    counted_prefix: int = option(3, "", "tokens of their longest prefix", low=1, high=4)
    counted_share: float = option(0.5, "", "share of the counted n-grams in the mixture", low=0, high=0.99)
    running_lengths: tuple = option(
        (), "", "contexts of so many tokens are counted in the text scored so far"
    )
    running_escape: float = option(
        10.0, "", "weight of the mixture against a running count, for each kind of continuation", low=0.01
    )
    fit_scales: bool = option(False, "", "scale logits by sign, fitted to training text after training")
    sgd_lr: float = option(0.005, "TTT_LR", "learning rate of sgd-ttt and of phases", low=0)
    sgd_momentum: float = option(0.9, "TTT_MOMENTUM", "momentum of sgd-ttt and of phases", low=0, high=1)
    sgd_epochs: int = option(3, "TTT_EPOCHS", "passes of SGD over a scored chunk", low=1)
    sgd_chunk_tokens: int = option(32_768, "TTT_CHUNK_TOKENS", "targets scored, then trained on", low=1)
    sgd_batch_seqs: int = option(32, "", "rows of an SGD step, all ranks together", low=1)
    sgd_clip_norm: float = option(1.0, "TTT_GRAD_CLIP", "largest gradient norm of SGD; 0: any", low=0)
    sgd_freeze_blocks: int = option(0, "TTT_FREEZE_BLOCKS", "first blocks that SGD leaves alone", low=0)
    lora_rank: int = option(80, "TTT_LORA_RANK", "rank of a document's adapters; 0: none", low=0)
    lora_alpha: float = option(144.0, "TTT_LORA_ALPHA", "adapters are scaled by alpha / rank", low=0)
    lora_sites: str = option("q,k,v,o,mlp,head", "", "where adapters go: of q, k, v, o, mlp, head")
    lora_lr: float = option(1e-4, "TTT_LORA_LR", "AdamW learning rate of adapters", low=0)
    lora_lr_fall: float = option(
        0.0, "", "a document's update k, from 0, has the learning rate lora_lr / sqrt(1 + k * this)", low=0
    )
    lora_beta2: float = option(
        0.99, "TTT_BETA2", "AdamW beta2 of adapters (beta1 is 0)", low=0, high=1 - 1e-9
    )
    lora_weight_decay: float = option(0.5, "TTT_WEIGHT_DECAY", "weight decay of adapters", low=0)
    lora_chunk_tokens: int = option(48, "TTT_CHUNK_SIZE", "targets of a document between updates", low=1)
    lora_short_chunks: tuple = option((), "", "length:chunk rows: chunks of documents up to a length, rising")
    lora_batch_docs: int = option(64, "TTT_BATCH_SIZE", "most documents adapted side by side", low=1)
    lora_warm_lanes: int = option(0, "", "batch i starts from batch i - n's mean A; 0: noise", low=0)
    lora_max_doc_tokens: int = option(0, "", "longer documents are cut; 0: never", low=0)
    lora_graphs: bool = option(
        False, "", "adapters learn in compiled graphs, where run.compile resolves to on"
    )
    lora_seed: int = option(0, "", "seed of the adapters' first values", low=0, high=2**64 - 1)
    phase_docs: int = option(2500, "PHASED_TTT_PREFIX_DOCS", "documents before the last SGD phase", low=0)
    phase_count: int = option(1, "PHASED_TTT_NUM_PHASES", "SGD phases", low=1)
    limit_seconds: float = option(600.0, "", "scoring time budget", low=0)
    limit_text_bytes: int = option(
        0, "", "text that limit and deadline are for; others in proportion; 0: any", low=0
    )
