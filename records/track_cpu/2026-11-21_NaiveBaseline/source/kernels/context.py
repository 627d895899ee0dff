"""Attention over a compressed context: readings of a published model's "non-trainable projection 1/10".

R1, along time: the sequence is cut into chunks of `ratio` tokens. A query in chunk j attends token by token
to the first and the last `keep` chunks (its own included); every other past chunk i is replaced by the
means of up to rho = min(ratio, ratio_min + j - keep - i) consecutive keys and values: the further back, the
coarser, down to one vector a chunk. No parameters; only whole past chunks are pooled, so it is causal. Up
to 2 * keep chunks it is full attention.

R2, along the features of a head: queries, keys and values are seen through a fixed Gaussian P (K, K / rho),
rho growing with depth from ratio_min to ratio; the first and last `keep` layers stay exact. With
E[P P^T] = 1 scores are those of full attention on average: (q P) . (k P) = (q P P^T) . k, and the head's
output is a mean of v P P^T. One (K, K) product, so any attention backend serves; a cache needs k P and v P.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContextRule(NamedTuple):
    """How the context is compressed; along the features, chunks are layers."""

    ratio: int  # tokens a chunk, and most tokens behind one pooled key
    ratio_min: int  # tokens behind a pooled key of the nearest compressed chunk
    keep: int  # chunks at either end that stay exact


def pooling_rows(rule: ContextRule) -> list[tuple[int, int, int]]:
    """List the pooled entries of one chunk as (rho, start, stop) within it, for every rho."""
    rhos = range(rule.ratio_min, rule.ratio + 1)
    spans = ((rho, start) for rho in rhos for start in range(0, rule.ratio, rho))
    return [(rho, start, min(start + rho, rule.ratio)) for rho, start in spans]


def visible_entries(queries: Tensor, seq_len: int, rule: ContextRule) -> tuple[Tensor, Tensor]:
    """Say what queries at positions (N,) see of seq_len tokens: exact (N, T) and pooled (N, E) bool.

    Pooled entries come chunk by chunk, in the order of pooling_rows.
    """
    device = queries.device
    tokens = torch.arange(seq_len, device=device)
    own = (queries // rule.ratio)[:, None]  # (N, 1): j
    chunk = tokens // rule.ratio
    exact = (tokens <= queries[:, None]) & ((chunk < rule.keep) | (chunk > own - rule.keep))
    rows = pooling_rows(rule)
    rhos = torch.tensor([rho for rho, _, _ in rows], device=device)
    past = torch.arange(seq_len // rule.ratio, device=device)
    age = own - rule.keep - past  # (N, chunks), 0: the nearest compressed chunk
    wanted = (rule.ratio_min + age).clamp(max=rule.ratio)
    compressed = (age >= 0) & (past >= rule.keep)
    pooled = compressed[:, :, None] & (wanted[:, :, None] == rhos)
    return exact, pooled.flatten(1)


def pool(x: Tensor, rule: ContextRule) -> Tensor:
    """Average (B, T, G, K) keys or values into the pooled entries, (B, E, G, K)."""
    rows = pooling_rows(rule)
    weights = torch.zeros(len(rows), rule.ratio, dtype=x.dtype, device=x.device)
    for row, (_, start, stop) in enumerate(rows):
        weights[row, start:stop] = 1 / (stop - start)
    whole = x.size(1) // rule.ratio
    chunks = x[:, : whole * rule.ratio].unflatten(1, (whole, rule.ratio))  # (B, chunks, ratio, G, K)
    return torch.einsum("pr,bcrgk->bcpgk", weights, chunks).flatten(1, 2)


def attend_compressed(q: Tensor, k: Tensor, v: Tensor, rule: ContextRule) -> Tensor:
    """Attend from (B, T, H, K) queries to exact and pooled keys and values (B, T, G, K); (B, T, H, K)."""
    seq_len = q.size(1)
    mask = torch.cat(visible_entries(torch.arange(seq_len, device=q.device), seq_len, rule), dim=1)
    keys, values = (torch.cat((x, pool(x, rule)), dim=1).transpose(1, 2) for x in (k, v))
    grouped = q.size(2) != k.size(2)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=1 / math.sqrt(q.size(3)), enable_gqa=grouped
    )
    return y.transpose(1, 2)


def projected_dim(rule: ContextRule, layer: int, num_layers: int, head_dim: int) -> int:
    """Return how many features a layer keeps of a head: all at the ends, then ever fewer with depth."""
    last = num_layers - 1 - rule.keep
    if not rule.keep <= layer <= last:
        return head_dim
    depth = (layer - rule.keep) / max(last - rule.keep, 1)
    return max(round(head_dim / (rule.ratio_min + depth * (rule.ratio - rule.ratio_min))), 1)


def feature_projection(rule: ContextRule, layer: int, num_layers: int, head_dim: int) -> Tensor:
    """Return a layer's P P^T, (K, K) float32 on the CPU, drawn from the layer's number: no state."""
    kept = projected_dim(rule, layer, num_layers, head_dim)
    if kept == head_dim:
        return torch.eye(head_dim, device="cpu")
    generator = torch.Generator().manual_seed(layer)
    drawn = torch.randn(head_dim, kept, generator=generator, device="cpu") / math.sqrt(kept)
    return drawn @ drawn.T
