"""Attention over blocks of queries with batched matrix products: on a CPU faster than torch's flash kernel.

That kernel computes the softmax weights again in the backward pass and multiplies many small matrices. Here
they are kept, a block of queries meets only the keys it can see, and the queries that share a key head
are rows of one matrix. One operator, so that torch.compile does not unroll the blocks.
Measured forward and backward (dev/LOG.md): no clear change at T 256 with heads of 32, 20 to 29 % less
time at T 512 or heads of 64, 33 to 85 % less with a window of 64.
"""

import math

import torch
from torch import Tensor

QUERY_BLOCKS = {2: 128, 4: 32, 8: 32}  # bytes of an element -> queries a block


def query_blocks(q: Tensor, window: int) -> list[tuple[int, int, int]]:
    """Cut the queries (B, T, H, K) into blocks: (first key, first query, end of queries and keys) of each."""
    seq_len, size = q.size(1), QUERY_BLOCKS[q.element_size()]
    return [
        (max(0, start - window) if window else 0, start, min(start + size, seq_len))
        for start in range(0, seq_len, size)
    ]


def weight_shapes(q: Tensor, k: Tensor, window: int) -> list[tuple[int, int, int]]:
    """Return the shape of each block's softmax weights: (B * G, H / G * S, keys)."""
    rows, _, num_heads, _ = q.shape
    num_kv_heads = k.size(2)
    blocks = query_blocks(q, window)
    return [(rows * num_kv_heads, num_heads // num_kv_heads * (b - a), b - low) for low, a, b in blocks]


def split_weights(kept: Tensor, q: Tensor, k: Tensor, window: int) -> list[Tensor]:
    """View the flat softmax weights as those of each block."""
    shapes = weight_shapes(q, k, window)
    return [part.view(shape) for part, shape in zip(kept.split([*map(math.prod, shapes)]), shapes)]


def by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """View (B, T, H, K) as (B, G, H / G, T, K)."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def fold_queries(x: Tensor) -> Tensor:
    """(B, G, H / G, S, K) -> (B * G, H / G * S, K): queries that share keys become rows of one matrix."""
    return x.flatten(2, 3).flatten(0, 1)


def fold_keys(x: Tensor) -> Tensor:
    """(B, T, G, K) -> (B * G, T, K)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_keys(x: Tensor, rows: int) -> Tensor:
    """(B * G, T, K) -> (B, T, G, K)."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2).contiguous()


@torch.library.custom_op("golf::blocked_attention", mutates_args=())
def blocked_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, K) and the softmax weights of all blocks, flat."""
    keys, values = fold_keys(k) * q.size(-1) ** -0.5, fold_keys(v)
    most = QUERY_BLOCKS[q.element_size()]
    future = torch.full((most, most), -math.inf, dtype=q.dtype).triu_(1)
    y, kept = torch.empty_like(q), q.new_empty(sum(map(math.prod, weight_shapes(q, k, window))))
    grouped_q, grouped_y = (by_group(x, k.size(2)) for x in (q, y))
    for weights, (low, start, end) in zip(split_weights(kept, q, k, window), query_blocks(q, window)):
        size = end - start
        queries = grouped_q[:, :, :, start:end]  # (B, G, H / G, S, K)
        scores = torch.bmm(fold_queries(queries), keys[:, low:end].mT)
        heads = scores.view(q.size(0), q.size(2), size, end - low)  # (B, H, S, keys), the same memory
        if bias is None:
            heads[..., start - low :].add_(future[:size, :size])
        else:
            heads += bias[:, :, start:end, low:end]
        torch.softmax(scores, -1, out=weights)
        grouped_y[:, :, :, start:end] = torch.bmm(weights, values[:, low:end]).view(queries.shape)
    return y, kept


@blocked_forward.register_fake
def _(q, k, v, bias, window):
    return torch.empty_like(q), q.new_empty(sum(map(math.prod, weight_shapes(q, k, window))))


@torch.library.custom_op("golf::blocked_attention_backward", mutates_args=())
def blocked_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    scale = q.size(-1) ** -0.5
    keys, values = fold_keys(k) * scale, fold_keys(v)
    dq, dkeys, dvalues = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    grouped_q, grouped_dy, grouped_dq = (by_group(x, k.size(2)) for x in (q, dy, dq))
    for weights, (low, start, end) in zip(split_weights(kept, q, k, window), query_blocks(q, window)):
        queries, dout = (fold_queries(x[:, :, :, start:end]) for x in (grouped_q, grouped_dy))
        dvalues[:, low:end].baddbmm_(weights.mT, dout)
        dweights = torch.bmm(dout, values[:, low:end].mT)
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dkeys[:, low:end].baddbmm_(dscores.mT, queries)
        dqueries = torch.bmm(dscores, keys[:, low:end])
        grouped_dq[:, :, :, start:end] = dqueries.view(grouped_dq[:, :, :, start:end].shape)
    return dq, unfold_keys(dkeys.mul_(scale), q.size(0)), unfold_keys(dvalues, q.size(0))


@blocked_backward.register_fake
def _(dy, q, k, v, kept, window):
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_blocked(ctx, inputs, output):
    q, k, v, _, ctx.window_len = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1])


def _blocked_gradients(ctx, dy, _):
    return *blocked_backward(dy, *ctx.saved_tensors, ctx.window_len), None, None


blocked_forward.register_autograd(_blocked_gradients, setup_context=_keep_blocked)
