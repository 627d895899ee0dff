"""Slow, obvious scorers in float64, one target at a time: the oracle."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from scoring.adaptive import (
    choose_chunk_tokens,
    phase_ends,
    plan_doc_batches,
    plan_documents,
)
from scoring.config import EvalConfig


def visible_start(target: int, num_targets: int, context_len: int, stride: int) -> int:
    """Say at which token the context of a target begins, straight from the definition of the modes."""
    if stride == 0:
        return target // context_len * context_len
    end = context_len
    while end <= target:
        end += stride
    return max(min(end, num_targets) - context_len, 0)


@torch.no_grad()
def score_reference(logits, tokens: np.ndarray, context_len: int, stride: int, bos_id: int) -> np.ndarray:
    """Return the nats of each target, (N,) float64, from one float64 softmax per target."""
    num_targets = len(tokens) - 1
    nats = np.zeros(num_targets)
    for target in range(num_targets):
        start = visible_start(target, num_targets, context_len, stride)
        context = torch.from_numpy(tokens[start : target + 1].astype(np.int64))[None]
        row = logits(context, context == bos_id, 0)[0, -1].double().numpy()
        top = row.max()
        nats[target] = top + np.log(np.exp(row - top).sum()) - row[int(tokens[target + 1])]
    return nats


def contest_windows(num_targets: int, context_len: int, stride: int) -> np.ndarray:
    """List (start, end, first) of the windows that the contest's early scripts scored.

    A window starts at every multiple of stride, also where an earlier one reached the end already: the
    last targets are scored context_len / stride times. Never a score; for counts and comparisons.
    """
    starts = np.arange(0, num_targets, stride)
    lengths = np.minimum(context_len, num_targets - starts)
    first = np.where(starts == 0, 0, np.maximum(lengths - stride, 0))
    return np.stack([starts, starts + lengths, first], axis=1)


# Adaptive scorers: `model` is in float64 and stays changed


class Slow(NamedTuple):
    """What the slow scorers share. Scales and hints change what a target is charged, not what it teaches."""

    model: nn.Module
    tokens: np.ndarray  # (N + 1,)
    bos_id: int
    context_len: int
    stride: int
    hints: list[list[tuple[int, float]]]  # of each target: (token, added to its logit)
    scales: tuple[float, float] = (1.0, 1.0)  # of positive and negative logits

    def row(self, start: int, target: int) -> torch.Tensor:
        """Return the logits of a target that sees tokens[start : target + 1], (V,)."""
        context = torch.from_numpy(self.tokens[start : target + 1].astype(np.int64))[None]
        return self.model(context, context == self.bos_id, 0)[0, -1]

    def loss(self, start: int, target: int) -> torch.Tensor:
        """Return the nats of a target as learning sees them."""
        return -self.row(start, target).log_softmax(0)[int(self.tokens[target + 1])]

    def charge(self, start: int, target: int) -> float:
        """Return the nats of a target, hints included."""
        with torch.no_grad():
            row = self.row(start, target)
            row = row * torch.where(row > 0, *self.scales)
            for token, strength in self.hints[target]:
                row[token] += strength
            return float(-row.log_softmax(0)[int(self.tokens[target + 1])])


def learn_sgd(slow: Slow, cfg: EvalConfig, targets: list[int], lr: float, speeds: list[torch.Tensor]) -> None:
    """Take SGD steps on the losses of targets, cut into rows of context_len that see nothing before them."""
    params = list(slow.model.parameters())
    length = min(slow.context_len, len(targets))
    rows = [targets[at : at + length] for at in range(0, len(targets) - length + 1, length)]
    for _ in range(cfg.sgd_epochs):
        for start in range(0, len(rows), cfg.sgd_batch_seqs):
            losses = []
            for row in rows[start : start + cfg.sgd_batch_seqs]:
                inputs, nexts = (
                    torch.from_numpy(slow.tokens[np.array(row) + i].astype(np.int64)) for i in (0, 1)
                )
                logits = slow.model(inputs[None], inputs[None] == slow.bos_id, 0)[0]
                losses.append(nn.functional.cross_entropy(logits, nexts))
            grads = torch.autograd.grad(sum(losses) / len(losses), params, allow_unused=True)
            grads = [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads)]
            norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
            with torch.no_grad():
                for param, grad, speed in zip(params, grads, speeds):
                    speed.mul_(cfg.sgd_momentum).add_(grad * min(1.0, cfg.sgd_clip_norm / norm))
                    param.sub_(lr * speed)


def cosine(index: int, count: int) -> float:
    """From 1 at the first of count to 0 at the last."""
    return 0.5 + 0.5 * math.cos(math.pi * index / max(count - 1, 1))


def score_slow_plain(slow: Slow, spans: np.ndarray) -> np.ndarray:
    """Score stretches of text (lo, hi), none of which sees another."""
    places = [(lo, hi, target) for lo, hi in spans.tolist() for target in range(lo, hi)]
    starts = [
        lo + visible_start(target - lo, hi - lo, slow.context_len, slow.stride) for lo, hi, target in places
    ]
    return np.array([slow.charge(start, target) for start, (_, _, target) in zip(starts, places)])


def score_slow_sgd(slow: Slow, cfg: EvalConfig) -> np.ndarray:
    """Score chunks of sliding windows; each trains all weights before the next is scored."""
    num_targets = len(slow.tokens) - 1
    chunks: dict[int, list[int]] = {}
    for target in range(num_targets):  # a window belongs to the chunk of the first target that it scores
        windows = max(target - slow.context_len, -1) // slow.stride + 1
        first = slow.context_len + (windows - 1) * slow.stride if windows else 0
        chunks.setdefault(first // cfg.sgd_chunk_tokens, []).append(target)
    nats, speeds = np.zeros(num_targets), [torch.zeros_like(param) for param in slow.model.parameters()]
    for index, targets in enumerate(chunks.values()):
        for target in targets:
            start = visible_start(target, num_targets, slow.context_len, slow.stride)
            nats[target] = slow.charge(start, target)
        if index + 1 < len(chunks):
            learn_sgd(slow, cfg, targets, cfg.sgd_lr * cosine(index, len(chunks)), speeds)
    return nats


class SlowAdapter:
    """A document's correction of one module, added to its output: scale * x down up, AdamW written out."""

    def __init__(self, module: nn.Module, start: torch.Tensor, cfg: EvalConfig):
        self.cfg, self.steps, self.visit = cfg, 0, 0
        ups = start.new_zeros(len(start), cfg.lora_rank, module.out_features)
        self.factors = [part.double().clone().requires_grad_() for part in (start, ups)]
        self.squares = [torch.zeros_like(factor) for factor in self.factors]
        self.handle = module.register_forward_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        down, up = (factor[self.visit] for factor in self.factors)
        self.visit = (self.visit + 1) % len(self.factors[0])
        return output + self.cfg.lora_alpha / self.cfg.lora_rank * (inputs[0] @ down @ up)

    def step(self, grads: list[torch.Tensor]) -> None:
        """Take one step of AdamW without momentum."""
        rate = self.cfg.lora_lr / (1 + self.steps * self.cfg.lora_lr_fall) ** 0.5
        self.steps += 1
        with torch.no_grad():
            for factor, square, grad in zip(self.factors, self.squares, grads):
                square.mul_(self.cfg.lora_beta2).add_((1 - self.cfg.lora_beta2) * grad**2)
                root = (square / (1 - self.cfg.lora_beta2**self.steps)).sqrt() + 1e-10
                factor.mul_(1 - rate * self.cfg.lora_weight_decay).sub_(rate * grad / root)


def score_slow_document(slow: Slow, span: tuple[int, int], cfg: EvalConfig, adapters: list) -> np.ndarray:
    """Score a document (lo, hi) chunk by chunk; each chunk but the last trains the adapters."""
    lo, hi = span
    nats, chunk = np.zeros(hi - lo), choose_chunk_tokens(hi - lo, cfg)
    for start in range(lo, hi, chunk):
        begin, end = max(lo, start + chunk - slow.context_len), min(start + chunk, hi)
        nats[start - lo : end - lo] = [slow.charge(begin, target) for target in range(start, end)]
        if end < hi:
            loss = sum(slow.loss(begin, target) for target in range(start, end)) / chunk
            grads = torch.autograd.grad(loss, [factor for adapter in adapters for factor in adapter.factors])
            for adapter, pair in zip(adapters, zip(grads[::2], grads[1::2])):
                adapter.step(pair)
    return nats


def learn_phase(slow: Slow, cfg: EvalConfig, targets: list[int]) -> None:
    """Train on scored documents in the order of their scores, in rows that run on from one to the next."""
    length = min(slow.context_len, len(targets))
    size = max(1, cfg.sgd_chunk_tokens // length) * length
    targets = targets[: len(targets) // length * length]
    parts = [targets[at : at + size] for at in range(0, len(targets), size)]
    speeds = [torch.zeros_like(param) for param in slow.model.parameters()]
    for index, part in enumerate(parts):
        learn_sgd(slow, cfg, part, cfg.sgd_lr * cosine(index, len(parts)), speeds)


def score_slow_lora(
    slow: Slow, cfg: EvalConfig, batch_tokens: int, starts: dict[str, torch.Tensor]
) -> np.ndarray:
    """Score documents, longest first, with adapters that begin at `starts` or where their lane ended."""
    documents = plan_documents(slow.tokens, slow.bos_id, cfg.lora_max_doc_tokens)
    lengths = np.diff(documents).ravel()
    batches = plan_doc_batches(lengths, cfg, slow.context_len, batch_tokens)
    modules, carried = dict(slow.model.named_modules()), {}
    nats, done = np.zeros(len(slow.tokens) - 1), []
    for index, batch in enumerate(batches):
        lane = index % cfg.lora_warm_lanes if cfg.lora_warm_lanes else -1
        ended = []
        for doc in batch:
            lo, hi = documents[doc]
            begin = carried.get(lane, starts)
            adapters = [SlowAdapter(modules[name], begin[name], cfg) for name in starts]
            nats[lo:hi] = score_slow_document(slow, (lo, hi), cfg, adapters)
            ended.append({name: adapter.factors[0].detach() for name, adapter in zip(starts, adapters)})
            done += range(lo, hi)
            for adapter in adapters:
                adapter.handle.remove()
        if cfg.lora_warm_lanes:
            carried[lane] = {name: sum(part[name] for part in ended) / len(ended) for name in starts}
        if cfg.mode == "phased" and index + 1 in phase_ends(batches, cfg.phase_docs, cfg.phase_count):
            learn_phase(slow, cfg, done)
            carried = {}
    return nats
