"""Which settings of a recipe cannot stand together: rows (field, whether the rule holds, what must hold).

`cfg` is a whole config of train_gpt.py; the range and the choices of a single field are in its declaration.
"""

from collections.abc import Iterator

from formats.recipe import config_fields, config_value

LARGEST_SIZE, LARGEST_DEPTH = 1 << 20, 256  # far beyond any model of the contest; artifacts state no more
LARGEST_STEP = 1 << 40  # tokens
LARGEST_RANK = 1 << 14  # of adapters, of which a batch of documents has dozens
UNBOUNDED = ("model.rope_base",)  # numbers of the model that are no size


def are_numbers(items: tuple) -> bool:
    """Whether no item of a list is a row of its own."""
    return not any(isinstance(item, tuple) for item in items)


def row_rules(cfg, tables: dict[str, dict]) -> list[tuple]:
    """Return the rules that a choice has its row in the table that says what it does."""
    return [
        (
            name,
            config_value(cfg, name) in table,
            f"has no row in its table, which has {', '.join(table)}: add one",
        )
        for name, table in tables.items()
    ]


def extent_rules(cfg) -> Iterator[tuple]:
    """Yield the rules that a model can be described in a second, and that numbers fit a machine's."""
    for name, item in config_fields(cfg).items():
        is_size = name == "data.vocab_size" or (name.startswith("model.") and name not in UNBOUNDED)
        most = LARGEST_SIZE if is_size else 2**64 - 1 if item.type is int else 1e30
        if item.type in (int, float):
            yield name, -most <= config_value(cfg, name) <= most, f"must be from {-most:,} to {most:,}"
    visits = cfg.model.num_layers * max(1, cfg.model.recur_passes)
    advice = f"with model.recur_passes gives more than {LARGEST_DEPTH} visits of layers"
    yield "model.num_layers", visits <= LARGEST_DEPTH, advice


def layers_fit(cfg, layers: tuple) -> bool:
    """Whether these layers exist."""
    return all(isinstance(layer, int) and 0 <= layer < cfg.model.num_layers for layer in layers)


def stage_rules(cfg, stages: list) -> list[tuple]:
    """Return the rules that stages follow each other and that a step divides into rows and micro-batches."""
    name = "schedule.stages" if cfg.schedule.stages else "data.batch_tokens"
    starts = [stage.start for stage in stages]
    fits = starts[0] == 0 and len({s < 1 for s in starts[1:]}) < 2 and starts == sorted(set(starts))
    rules = [("schedule.stages", fits, "must start at 0 and rise, by steps or by fractions of the run")]
    by_hand = cfg.data.micro_batches > 0 or not cfg.schedule.stages
    rules.append(("data.micro_batches", by_hand, "is auto: expected a number beside schedule.stages"))
    for stage in stages:
        is_sane = max(stage.seq_len, stage.batch_tokens) <= LARGEST_STEP
        rules.append((name, is_sane, f"must be at most {LARGEST_STEP:,} tokens"))
        rates = stage.lr_mul >= 0 and stage.grad_clip_norm >= 0
        rules.append(("schedule.stages", rates, "must have lr_mul and grad_clip_norm from 0 on"))
        micro_tokens, rest = divmod(stage.batch_tokens, stage.micro_batches or 1)
        whole = micro_tokens >= 1 and micro_tokens % stage.seq_len == 0
        rows = f"/ micro_batches={stage.micro_batches} must be a multiple of data.seq_len={stage.seq_len}"
        rules += [
            (name, rest == 0, f"must be a multiple of data.micro_batches={stage.micro_batches}"),
            (name, whole, rows),
        ]
    return rules


def model_rules(cfg) -> list[tuple]:
    """Return the rules that sizes fit each other."""
    model = cfg.model
    head_dim = model.model_dim // model.num_heads
    rotated = model.rope_dims or head_dim
    smear_fits = model.smear != "gated" or model.model_dim >= 12
    windowed = (model.attn_window > 0) == bool(model.window_layers)
    any_reach = model.context_axis == "features" or not (model.window_layers or model.attn_in_document)
    context_fits = not model.context_ratio or 1 <= model.context_ratio_min <= model.context_ratio
    segment = model.recur_layers or (0, 0)
    segment_fits = len(segment) == 2 and layers_fit(cfg, segment) and segment[0] <= segment[1]
    fracs = cfg.schedule.recur_start_fracs
    fracs_fit = (
        len(fracs) in (0, model.recur_passes - 1) and are_numbers(fracs) and list(fracs) == sorted(fracs)
    )
    layer_range = f"must lie in [0, {model.num_layers})"
    return [
        ("model.model_dim", model.model_dim % model.num_heads == 0, "must be a multiple of num_heads"),
        ("model.model_dim", head_dim % 2 == 0, f"gives head_dim {head_dim}, which must be even for RoPE"),
        ("model.model_dim", smear_fits, "must be at least 12 for model.smear"),
        ("model.num_kv_heads", model.num_heads % model.num_kv_heads == 0, "must divide num_heads"),
        ("model.mlp_mult", model.mlp_mult * model.model_dim >= 1, "gives an empty mlp"),
        ("model.rope_dims", rotated % 2 == 0 and rotated <= head_dim, f"must be even and at most {head_dim}"),
        ("model.xsa_last", model.xsa_last <= model.num_layers, "must be at most num_layers"),
        ("model.bigram_buckets", model.bigram_buckets != 1, "must be 0 or at least 2"),
        ("model.value_embed_layers", layers_fit(cfg, model.value_embed_layers), layer_range),
        ("model.window_layers", layers_fit(cfg, model.window_layers), layer_range),
        ("model.attn_window", windowed, "and model.window_layers go together"),
        ("model.context_ratio", context_fits, "must be at least context_ratio_min"),
        ("model.context_ratio", not model.context_ratio or any_reach, "excludes windows and documents"),
        ("model.asymmetric_softcap", model.logit_softcap > 0 or not model.asymmetric_softcap, "needs a cap"),
        ("model.norm_eps", model.norm != "layer" or model.norm_eps > 0, "must be above 0 for layer norm"),
        ("model.embed_dim", model.embed_dim <= model.model_dim, "must be at most model_dim"),
        ("model.recur_layers", segment_fits, f"must be a first and a last layer below {model.num_layers}"),
        ("model.recur_passes", model.recur_passes == 1 or model.recur_layers, "needs model.recur_layers"),
        ("schedule.recur_start_fracs", fracs_fit, "must have recur_passes - 1 rising entries, or none"),
    ]


def scorer_rules(cfg) -> list[tuple]:
    """Return the rules that an adaptive scorer, which starts after training, fits the model."""
    options, chunks = cfg.eval, cfg.eval.lora_short_chunks
    rows = all(isinstance(row, tuple) and len(row) == 2 and min(row) >= 1 for row in chunks)
    rising = rows and [row[0] for row in chunks] == sorted({row[0] for row in chunks})
    phases_fit = options.mode != "phased" or options.phase_count <= max(options.phase_docs, 1)
    frozen_fit = options.sgd_freeze_blocks <= cfg.model.num_layers
    return [
        ("eval.lora_short_chunks", rising, "must be rows length:chunk, numbers from 1 on, rising by length"),
        ("eval.lora_rank", options.lora_rank <= LARGEST_RANK, f"must be at most {LARGEST_RANK:,}"),
        ("eval.phase_count", phases_fit, f"must be at most eval.phase_docs={options.phase_docs}"),
        ("eval.sgd_freeze_blocks", frozen_fit, f"must be at most model.num_layers={cfg.model.num_layers}"),
    ]


def clip_rules(cfg) -> list[tuple]:
    """Return the rules that clips are numbers of their rule: a quantile lies between 0 and 1."""
    quant = cfg.quant
    most = 1.0 if quant.clip_rule == "quantile" else 1e6
    clips = {"quant.matrix_clip": quant.matrix_clip, "quant.embed_clip": quant.embed_clip}
    clips |= {"quant.mlp_clip": quant.mlp_clip or quant.matrix_clip}
    return [
        (
            name,
            0 < clip <= most,
            f"must be above 0 and at most {most:g} for quant.clip_rule={quant.clip_rule}",
        )
        for name, clip in clips.items()
    ]


def average_rules(cfg) -> list[tuple]:
    """Return the rule of averaging."""
    one_average = not (cfg.average.ema_decay > 0 and cfg.average.swa_every > 0)
    return [("average.swa_every", one_average, "excludes average.ema_decay: one average is applied")]


def clock_rules(cfg) -> list[tuple]:
    """Return the rules of how long a run may be."""
    clock, reserve = cfg.run.max_wallclock_seconds, cfg.quant.reserve_seconds
    ends = cfg.run.iterations > 0 or clock > 0
    return [
        ("run.iterations", ends, "needs a step or a clock"),
        (
            "run.max_wallclock_seconds",
            clock == 0 or reserve < clock,
            f"must be 0 or above {reserve:g} s, which quant.reserve_seconds keeps for calibration",
        ),
    ]
