"""How many micro-batches a step may have, what one takes of the memory, what to lower when it is too much.

`cfg` is a whole config of train_gpt.py, a stage a row of its curriculum. Packed programs leave this out.
"""

import math

from common import UserError

AUTO = {"data.micro_batches": 0}  # whole numbers that may be written "auto", and what stands for it
USUAL_COUNT = 8  # of a step that nobody can try
STATE_BYTES = 16  # a parameter: float32 weight, gradient and two moments
KEPT_CHANNELS, KEPT_HIDDEN = 13, 3  # model_dims and mlp sizes that a visit of a block keeps, measured
LOGIT_BYTES = 16  # an entry of the vocabulary: logits, capped logits and their gradients


def read_auto(values: dict) -> dict:
    """Replace "auto" in {"section.key": value} by the number that stands for it."""
    return {name: AUTO[name] if value == "auto" and name in AUTO else value for name, value in values.items()}


def legal_counts(stage, world_size: int) -> list[int]:
    """List the numbers of micro-batches, of whole rows and shared by all ranks, that a step may have."""
    rows = stage.batch_tokens // stage.seq_len
    small = [count for count in range(1, math.isqrt(rows) + 1) if rows % count == 0]
    counts = sorted({*small, *(rows // count for count in small)})
    return [count for count in counts if count % world_size == 0]


def counts_to_try(stage, world_size: int, can_try: bool) -> list[int]:
    """List what data.micro_batches=auto tries, each at least twice the one before.

    Where nothing can be tried (a CPU, whose programs are killed rather than told) it is one number: 8 or the
    next that is legal.
    """
    legal = legal_counts(stage, world_size)
    if not legal:
        raise UserError(
            f"data.micro_batches=auto: expected the world size {world_size} to divide the "
            f"{stage.batch_tokens // stage.seq_len} rows of a step. Change data.batch_tokens."
        )
    if not can_try:
        return [next((count for count in legal if count >= USUAL_COUNT), legal[-1])]
    counts = legal[:1]
    while more := [count for count in legal if count >= 2 * counts[-1]]:
        counts.append(more[0])
    return counts


def estimate_bytes_of_step(cfg, tokens: int, num_params: int, item_bytes: int) -> int:
    """Estimate the bytes that a micro-batch of so many tokens needs, within a factor of about two."""
    model = cfg.model
    first, last = model.recur_layers or (0, -1)
    visits = model.num_layers + (model.recur_passes - 1) * (last - first + 1)
    visits -= visits // model.checkpoint_every if model.checkpoint_every else 0
    kept = (KEPT_CHANNELS + KEPT_HIDDEN * model.mlp_mult) * model.model_dim * item_bytes * visits
    return int(STATE_BYTES * num_params + tokens * (kept + LOGIT_BYTES * cfg.data.vocab_size))


def memory_advice(cfg, stages: list, world_size: int) -> str:
    """Say what to lower when a step does not fit the memory."""
    stage = max(stages, key=lambda row: row.batch_tokens / row.micro_batches)
    more = [count for count in legal_counts(stage, world_size) if count >= 2 * stage.micro_batches]
    if more and cfg.schedule.stages:
        return f"raise the fourth number of the rows of schedule.stages, here to {more[0]} (same batch)"
    if more:
        return f"set data.micro_batches={more[0]} (same batch) or auto"
    return "set model.checkpoint_every=1, or lower data.seq_len and data.batch_tokens"


def memory_message(cfg, stages: list, world_size: int, sizes: tuple) -> str:
    """Describe a step that does not fit; sizes: parameters, bytes of a number, the device's bytes and name.

    A config whose number is still auto has failed with the number that auto found.
    """
    if not all(stage.micro_batches for stage in stages):
        return (
            "out of memory although data.micro_batches=auto found a number that fits a step (see train.log): "
            "lower run.val_batch_tokens if it was in scoring, or set data.micro_batches to twice that number."
        )
    num_params, item_bytes, total, device = sizes
    tokens = max(stage.batch_tokens // stage.micro_batches for stage in stages)
    need = estimate_bytes_of_step(cfg, tokens, num_params, item_bytes)
    has = f" of the {total / 2**30:.1f} GiB" if total else ""
    return (
        f"out of memory: a micro-batch of {tokens:,} tokens and the model need about {need / 2**30:.1f} GiB"
        f"{has} of this {device}: {memory_advice(cfg, stages, world_size)}. If it was in scoring, lower "
        "run.val_batch_tokens."
    )
