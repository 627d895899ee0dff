"""The past of one layer for decoding token by token with a compressed context (kernels/context.py).

Kept: the first chunks, one mean of each chunk far back, and the tokens of the chunks between, which are
averaged anew whenever a chunk begins, because they grow coarser with distance. At 8,192 tokens a query sees
862 entries and 942 are stored, instead of 8,192.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.context import ContextRule


class ContextCache:
    """Keys and values, (2, B, T, G, K): `seen` is what every query of this chunk reads, `recent` tokens."""

    def __init__(self, rule: ContextRule):
        self.rule = rule
        self.length = 0  # tokens so far
        self.first = rule.keep  # the chunk that `recent` starts with
        self.sink = self.old = self.recent = self.seen = None
        self.near_from = 0  # tokens of `recent` that are in `seen` already, averaged

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add one token's (B, 1, G, K) key and value."""
        token = torch.stack((k, v))
        if self.length == 0:
            self.sink = self.old = self.recent = token[:, :, :0]
        chunk, place = divmod(self.length, self.rule.ratio)
        self.length += 1
        if chunk < self.rule.keep:
            self.seen = self.sink = torch.cat((self.sink, token), dim=2)
            return
        self.recent = torch.cat((self.recent, token), dim=2)
        if place == 0:
            self.compress(chunk - self.rule.keep)

    def compress(self, nearest: int) -> None:
        """Average the chunks up to `nearest`, the newest that is no longer exact."""
        ratio, ratio_min, _ = self.rule
        while self.first <= nearest - (ratio - ratio_min):
            self.old = torch.cat((self.old, self.recent[:, :, :ratio].mean(2, keepdim=True)), dim=2)
            self.recent = self.recent[:, :, ratio:]
            self.first += 1
        parts = [self.sink, self.old]
        for chunk in range(self.first, nearest + 1):
            tokens = self.recent[:, :, (chunk - self.first) * ratio :][:, :, :ratio]
            parts += [part.mean(2, keepdim=True) for part in tokens.split(ratio_min + nearest - chunk, dim=2)]
        self.seen = torch.cat(parts, dim=2)
        self.near_from = max(nearest + 1 - self.first, 0) * ratio

    def attend(self, q: Tensor) -> Tensor:
        """Attend from the newest token's (B, 1, H, K) query; (B, 1, H, K)."""
        entries = torch.cat((self.seen, self.recent[:, :, self.near_from :]), dim=2)
        keys, values = entries.transpose(2, 3)
        grouped = q.size(2) != keys.size(1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, scale=1 / math.sqrt(q.size(3)), enable_gqa=grouped
        )
        return y.transpose(1, 2)

    def sizes(self) -> tuple[int, int]:
        """Return how many entries the newest query sees and how many are stored."""
        exact = self.recent.size(2)
        seen = self.seen.size(2) + exact - self.near_from
        return seen, self.sink.size(2) + self.old.size(2) + exact + self.averaged()

    def averaged(self) -> int:
        """Return how many means of `recent` chunks lie in `seen`."""
        return self.seen.size(2) - self.sink.size(2) - self.old.size(2)
