"""Decode with the compressed context's cache: one token a forward pass, however long the text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.context_cache import ContextCache
from scoring.generate import last_logits
from train_gpt import GPT, ModelConfig, SelfAttention, context_rule

# What a token's representation may depend on besides its own layer inputs: with any of these the cache of
# keys and values would not be all of the past.
NEEDS_NEIGHBOURS = {"smear": "none", "bigram_buckets": 0, "positions": "none", "value_residual": False}
NEEDS_NEIGHBOURS |= {"value_embed_layers": (), "xsa_last": 0, "attn_gate": "none", "recur_passes": 1}
NEEDS_NEIGHBOURS |= {"context_axis": "time"}


class CachedAttention(nn.Module):
    """A layer's attention for one new token (B, 1, D), from its cache."""

    def __init__(self, attn: SelfAttention):
        super().__init__()
        self.attn, self.window = attn, attn.window
        self.cache = ContextCache(context_rule(attn.cfg))

    def forward(self, x: Tensor, shared, first_value: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        q, k, v = self.attn.project(x, first)
        q, k = self.attn.normalize_and_rotate(q, k, shared)
        v = v.unflatten(-1, (-1, self.attn.head_dim))
        self.cache.append(k, v)
        return self.attn.out(self.cache.attend(q).flatten(2)), v


def can_cache(cfg: ModelConfig) -> bool:
    """Whether the compressed cache is all that decoding needs of the past."""
    alone = all(getattr(cfg, key) == value for key, value in NEEDS_NEIGHBOURS.items())
    return cfg.context_ratio > 0 and alone


@contextmanager
def decoding(model: GPT, codec, context_len: int) -> Iterator[Callable[[list[int]], Tensor]]:
    """Yield what gives the (V,) logits after tokens: from the cache where there is one, else from a window.

    With the cache each call may only add tokens to those of the call before, and their number is free.
    """
    if not can_cache(model.cfg):
        yield last_logits(model, codec, context_len)
        return
    plain = [block.attn for block in model.blocks]
    for block in model.blocks:
        block.attn = CachedAttention(block.attn)
    try:
        yield cached_logits(model, codec)
    finally:
        for block, attn in zip(model.blocks, plain):
            block.attn = attn


def cached_logits(model: GPT, codec) -> Callable[[list[int]], Tensor]:
    """Feed a model whose attention is cached with what is new in each list of tokens."""
    device, fed = next(model.parameters()).device, []

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        assert tokens[: len(fed)] == fed and len(tokens) > len(fed)
        for token in tokens[len(fed) :]:
            row = torch.tensor([[token]], device=device)
            out = model(row, row == codec.bos_id)
            fed.append(token)
        return out[0, 0, : codec.vocab_size].float()

    return logits
