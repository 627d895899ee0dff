"""Train a small language model, pack it into an artifact, score the artifact in bits per byte.

The file that the recipe 2026-11-21_Sp2048_LoraScoring runs:
train_gpt.py and the modules that it imports, less what the recipe switches off. What it fixes is
written into the code.

    torchrun --standalone --nproc_per_node=8 FILE      on eight GPUs
    python FILE run.seed=7                             other values of the fields declared below

Map: 1 constants, 2 config, 3 ranks, clock, log, 4 data, 5 model, 6 optimizers, 7 schedules, 8 averaging,
9 quantization, 10 artifact, 11 training loop, 12 main. A section calls only sections above it.

Shapes: B batch, T time, D model, H query heads, G kv heads, K head dim, F mlp hidden, V vocabulary.
"""


# ----------------------------------------------------------------------------------------------------------
# 1 imports and constants
# ----------------------------------------------------------------------------------------------------------

import argparse
import copy
import dataclasses
import difflib
import errno
import fnmatch
import glob
import hashlib
import importlib.util
import itertools
import json
import lzma
import math
import os
import resource
import statistics
import struct
import sys
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from math import isqrt
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

# eval/sliding.py: Chunked and sliding-window scoring: every target exactly once, in the window where it is
# newest.


def plan_windows(num_targets: int, context_len: int, stride: int = 0) -> np.ndarray:
    """Lay windows over the targets; returns (W, 3) int64 rows (start, end, first).

    A window reads tokens[start:end] and scores targets [start + first, end); every target is scored in
    exactly one. stride 0 cuts the stream into chunks of context_len. With a stride, each later window
    scores the next `stride` targets with up to context_len tokens before their ends. Without keep_tail
    the targets past the last multiple of context_len are dropped, as the contest's baseline does.
    """
    if num_targets <= 0:
        return np.zeros((0, 3), dtype=np.int64)
    step = stride or context_len
    ends = np.arange(min(context_len, num_targets), num_targets + step, step, dtype=np.int64)
    ends = np.minimum(ends, num_targets)
    ends = ends[: np.searchsorted(ends, num_targets) + 1]  # the first window that reaches the end is the last
    scored_from = np.concatenate([[0], ends[:-1]])
    starts = np.maximum(ends - context_len, 0) if stride else scored_from
    return np.stack([starts, ends, scored_from - starts], axis=1)


def plan_batches(windows: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group windows of equal length and equal `first` into batches of at most batch_tokens tokens."""
    batches = []
    lengths = windows[:, 1] - windows[:, 0]
    kinds = np.stack([lengths, windows[:, 2]], axis=1)
    for length, first in np.unique(kinds, axis=0):
        rows = np.flatnonzero((kinds[:, 0] == length) & (kinds[:, 1] == first))
        size = max(1, batch_tokens // int(length))
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    return sorted(batches, key=lambda rows: int(rows[0]))


def plain_cost(scores: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Charge the negative log softmax of the target, whatever its place."""
    return F.cross_entropy(scores, targets, reduction="none")


class ScoreOptions(NamedTuple):
    """How windows are batched and charged, and which of the batches this process scores."""

    bos_id: int
    batch_tokens: int
    device: torch.device | str = "cpu"
    rank: int = 0
    world_size: int = 1
    cost: object = plain_cost


class Pace:
    """How long a job still takes, from its second report on: the first bears what starting costs."""

    def __init__(self):
        self.first: tuple[float, int] | None = None

    def seconds_left(self, done: int, total: int) -> float | None:
        """Return the time that the rest takes at the pace since the first report; None in that."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now, done
            return None
        started, done_before = self.first
        return (now - started) * (total - done) / max(done - done_before, 1)


class ProgressLines:
    """Write a line after the first percent and each tenth of the targets, with the time left."""

    def __init__(self, write: Callable[[str], None]):
        self.write, self.pace, self.percent = write, Pace(), 0

    def __call__(self, done: int, total: int) -> None:
        left = self.pace.seconds_left(done, total)
        percent = done * 10 // total * 10 or min(done * 100 // total, 1)
        if left is not None and percent > self.percent and done < total >= 20:
            self.write(f"scoring: {percent}% seconds_left:{left:.0f}")
            self.percent = percent


@torch.no_grad()
def score_batch(
    logits, tokens: np.ndarray, rows: np.ndarray, options: ScoreOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score windows of one shape; returns the places (R,) of their targets and the nats (R,), on the CPU."""
    length, first = int(rows[0, 1] - rows[0, 0]), int(rows[0, 2])
    span = rows[:, :1] + np.arange(length + 1)  # (B, T + 1)
    chunk = torch.from_numpy(tokens[span].astype(np.int64)).to(options.device)
    inputs, targets = chunk[:, :-1], chunk[:, 1 + first :]
    scores = logits(inputs, inputs == options.bos_id, first)  # (B, T - first, V)
    places = torch.from_numpy(span[:, first:-1].ravel())
    nats = options.cost(scores.float().flatten(0, 1), targets.flatten(), places)
    return places, nats.float().cpu()


def score_windows(logits, tokens: np.ndarray, windows: np.ndarray, options: ScoreOptions) -> torch.Tensor:
    """Score the windows of a token stream; returns the nats of each target, (N,) float32 on the CPU.

    Batches are dealt round-robin to the ranks and their composition does not depend on world_size: a
    target that another rank scores is 0 here, so a sum over ranks is exact and the same for any number.
    progress(done, total) is called with batch counts.
    """
    num_targets = int(windows[-1, 1]) if len(windows) else 0
    nats = torch.zeros(num_targets)
    batches = plan_batches(windows, options.batch_tokens)
    for index in range(options.rank, len(batches), options.world_size):
        places, costs = score_batch(logits, tokens, windows[batches[index]], options)
        nats[places] = costs
    return nats


# eval/adaptive.py: Score-first test-time training: a target is scored before any update reads it, exactly
# once.

# What a recipe calls a place for an adapter -> the attributes of the modules that take one.
ADAPTER_SITES = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("out",),
    "mlp": ("up", "down"),
    "head": ("head", "readout"),
}


class Settings(NamedTuple):
    """Windows of the scorer and its time limit."""

    context_len: int
    stride: int
    deadline_s: float = 0.0  # seconds in which scoring should end; 0: no limit
    switch_at: int = -1  # units that adapt before plain scoring takes over; -1: the clock decides


class Reports(NamedTuple):
    """Who is told what happens."""

    on_event: Callable[[dict], None] | None = None  # {seq, rank, kind, lo, hi, doc, seconds}
    progress: Callable[[int, int], None] | None = None  # targets done, targets in all


class SgdOptions(NamedTuple):
    """SGD on all weights: the contest's score-first form (contest pull request 549)."""

    lr: float = 0.005
    momentum: float = 0.9
    epochs: int = 3
    chunk_tokens: int = 32_768  # targets that are scored, then trained on
    batch_seqs: int = 32  # rows of an optimizer step, on all ranks together
    clip_norm: float = 1.0  # 0: off
    frozen: tuple[str, ...] = ()  # patterns of names of parameters that keep their values


class LoraOptions(NamedTuple):
    """One low-rank adapter per document, AdamW after each scored chunk (pull requests 1530, 1767)."""

    rank: int = 80  # 0: no adapters, documents are scored as they are
    alpha: float = 144.0  # the correction is scaled by alpha / rank
    sites: tuple[str, ...] = ("q", "k", "v", "o", "mlp")  # keys of ADAPTER_SITES
    lr: float = 1e-4
    beta2: float = 0.99
    weight_decay: float = 0.5
    chunk_tokens: int = 48
    short_chunks: tuple[tuple[int, int], ...] = ()  # rising rows (documents up to this length, chunk)
    batch_docs: int = 64
    warm_lanes: int = 0  # n: batch i starts from the A of batch i - n, mean over its documents; 0: from noise
    max_doc_tokens: int = 0  # longer documents are cut and adapt in parts; 0: never
    seed: int = 0


class PhaseOptions(NamedTuple):
    """SGD on what has been scored, between batches of documents (pull requests 1610, 1626)."""

    num_docs: int = 0  # the last phase follows the batch that completes so many documents; 0: no phases
    num_phases: int = 1
    sgd: SgdOptions = SgdOptions(lr=1e-3, epochs=1)


class Outcome(NamedTuple):
    """What one rank knows after scoring."""

    nats: torch.Tensor  # (N,) float32 on the CPU; 0 where another rank scored
    num_units: int  # chunks or batches of documents
    switch_at: int  # of them adapted; the rest was scored plainly
    invalid: str  # why the score breaks the rules; empty when it does not


class Referee:
    """Keep the event log and hold it to the rule: scored once, and before an update reads it.

    An update that reads unscored targets marks the whole result invalid, whichever scorer made it.
    """

    def __init__(self, num_targets: int, rank: int):
        self.scored = np.zeros(num_targets, dtype=bool)
        self.rank = rank
        self.started = time.perf_counter()
        self.invalid = ""

    def event(self, kind: str, lo: int, hi: int, doc: int = -1) -> None:
        """Report that targets [lo, hi) had something done to them."""

    def score(self, lo: int, hi: int, doc: int = -1, here: bool = True) -> None:
        """Note that targets [lo, hi) have their score; not `here`: on another rank, which reports it."""
        if self.scored[lo:hi].any():
            raise ValueError(f"targets [{lo}, {hi}) are scored twice")
        self.scored[lo:hi] = True

    def update(self, lo: int, hi: int, doc: int = -1) -> None:
        """Note that weights are about to change by what targets [lo, hi) say."""
        if not self.invalid and not self.scored[lo:hi].all():
            self.invalid = f"an update read targets [{lo}, {hi}) before they were scored (contest rule C3)"


class Session:
    """One scoring of N + 1 tokens: costs, referee, clock, and this rank's share of the work.

    ranks is asked for agree(value) -> rank 0's value and average(tensors) over ranks, in place.
    """

    def __init__(
        self, tokens: np.ndarray, settings: Settings, options: ScoreOptions, ranks, reports: Reports
    ):
        self.tokens, self.settings, self.options, self.ranks = tokens, settings, options, ranks
        self.num_targets = len(tokens) - 1
        self.nats = torch.zeros(self.num_targets)
        self.referee = Referee(self.num_targets, options.rank)
        self.progress = reports.progress
        self.num_done = 0
        self.checked_at = self.referee.started
        self.score_seconds, self.score_tokens = 0.0, 0  # of forward passes on this rank

    def start(self, cost) -> None:
        """Start the clock and charge targets by `cost` from here on."""
        self.options = self.options._replace(cost=cost)
        self.referee.started = self.checked_at = time.perf_counter()

    def is_mine(self, index: int) -> bool:
        """Whether this rank does unit `index`."""
        return index % self.options.world_size == self.options.rank

    def record(self, places: torch.Tensor, nats: torch.Tensor, started: float, num_read: int) -> None:
        """Keep the nats of targets and what a forward pass over num_read tokens took."""
        self.nats[places] = nats
        self.score_seconds += time.perf_counter() - started
        self.score_tokens += num_read

    def score_windows(self, model, windows: np.ndarray) -> None:
        """Score windows without adaptation, with all ranks."""
        for index, batch in enumerate(plan_batches(windows, self.options.batch_tokens)):
            rows = windows[batch]
            if self.is_mine(index):
                started = time.perf_counter()
                places, nats = score_batch(model, self.tokens, rows, self.options)
                self.record(places, nats, started, int((rows[:, 1] - rows[:, 0]).sum()))
            for lo, hi in scored_spans(rows):
                self.referee.score(lo, hi, here=self.is_mine(index))
            self.advance(int((rows[:, 1] - rows[:, 0] - rows[:, 2]).sum()))

    def advance(self, num_targets: int) -> None:
        """Report progress."""
        self.num_done += num_targets
        if self.progress:
            self.progress(self.num_done, self.num_targets)

    def may_adapt(self, unit: int, tokens_left: float) -> bool:
        """Decide, the same on every rank, whether `unit` adapts; plain scoring would read tokens_left.

        It does not when what the last unit took, once more, and then plain scoring would pass the deadline.
        """
        if self.settings.switch_at >= 0:
            return unit < self.settings.switch_at
        if not self.settings.deadline_s:
            return True
        now = time.perf_counter()
        last_unit, self.checked_at = now - self.checked_at, now
        pace = self.score_seconds / max(self.score_tokens, 1)
        finish = now - self.referee.started + last_unit + pace * tokens_left / self.options.world_size
        return self.ranks.agree(finish) < self.settings.deadline_s

    def outcome(self, num_units: int, switch_at: int) -> Outcome:
        """Close the session; every target must have its score."""
        if not self.referee.scored.all():
            raise ValueError(f"target {int(self.referee.scored.argmin())} was never scored")
        return Outcome(self.nats, num_units, switch_at, self.referee.invalid)


def scored_spans(windows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the (lo, hi) runs of targets that windows (start, end, first) score."""
    starts, ends = windows[:, 0] + windows[:, 2], windows[:, 1]
    cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    for part in np.split(np.arange(len(windows)), cuts):
        yield int(starts[part[0]]), int(ends[part[-1]])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give a model back its weights, gradient flags and empty adapters however the block ends."""
    kept = [(param, param.detach().clone(), param.requires_grad) for param in model.parameters()]
    try:
        yield
    finally:
        detach_adapters(model)
        with torch.no_grad():
            for param, values, learns in kept:
                param.copy_(values)
                param.requires_grad_(learns).grad = None


def weights_digest(model: nn.Module) -> str:
    """Hash names and values of all weights: equal digests prove that nothing moved."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode() + values.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


# Whole-weight SGD


class SgdTrainer:
    """SGD on all weights but the frozen, on rows of tokens; gradients are averaged over ranks."""

    def __init__(self, model: nn.Module, sgd: SgdOptions, session: Session):
        self.model, self.sgd, self.session = model, sgd, session
        named = dict(model.named_parameters())
        idle = [pattern for pattern in () if not fnmatch.filter(named, pattern)]
        if idle:
            raise UserError(
                f"frozen weights: expected a pattern of parameter names, found {idle[0]!r}, which matches "
                f"none. The first name is {next(iter(named))}."
            )
        frozen = {name for pattern in () for name in fnmatch.filter(named, pattern)}
        self.params = [param.requires_grad_(name not in frozen) for name, param in named.items()]
        self.params = [param for param in self.params if param.requires_grad]
        self.optimizer = torch.optim.SGD(self.params, lr=sgd.lr, momentum=0.9)

    def train(self, inputs: np.ndarray, targets: np.ndarray, lr_mul: float) -> None:
        """Run all epochs over (R, T) rows of inputs and targets."""
        self.optimizer.param_groups[0]["lr"] = self.sgd.lr * lr_mul
        for _ in range(self.sgd.epochs):
            for start in range(0, len(inputs), 32):
                rows = slice(start, start + 32)
                self.step(inputs[rows], targets[rows])

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Make one update from the mean loss of (R, T) rows, dealt to the ranks."""
        options = self.session.options
        for param in self.params:
            param.grad = torch.zeros_like(param)
        mine = np.arange(options.rank, len(inputs), options.world_size)
        size = max(1, options.batch_tokens // inputs.shape[1])
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            x, y = (
                torch.from_numpy(part[rows].astype(np.int64)).to(options.device) for part in (inputs, targets)
            )
            logits = self.model(x, x == options.bos_id, 0)
            losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
            (losses * (options.world_size / inputs.size)).backward()
        self.session.ranks.average([param.grad for param in self.params])
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


def chunk_lr_mul(index: int, count: int) -> float:
    """Fall from 1 at index 0 to 0 at index count - 1 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * index / max(count - 1, 1)))


def cut_rows(inputs: np.ndarray, targets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut (n,) inputs and targets into rows of seq_len; a rest shorter than a row is left out."""
    seq_len = min(seq_len, len(inputs))
    kept = len(inputs) // seq_len * seq_len
    return inputs[:kept].reshape(-1, seq_len), targets[:kept].reshape(-1, seq_len)


# Documents


def plan_documents(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Cut the N targets of N + 1 tokens into documents; (D, 2) int64 rows (lo, hi) in the order of the text.

    A document reads tokens[lo:hi] and scores targets [lo, hi): its last target is the next document's BOS.
    Text before the first BOS is a document too. Longer ones than max_tokens (0: any) are cut.
    """
    num_targets = len(tokens) - 1
    bounds = np.unique(np.concatenate([[0], np.flatnonzero(tokens[:-1] == bos_id), [num_targets]]))
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def plan_document_windows(documents: np.ndarray) -> np.ndarray:
    """Lay sliding windows over each document by itself; (W, 3) rows as plan_windows makes them."""
    plans = [plan_windows(int(hi - lo), 192, 64) + [lo, lo, 0] for lo, hi in documents]
    return np.concatenate([np.zeros((0, 3), dtype=np.int64), *plans])


def chunk_tokens_of(length: int) -> int:
    """Choose a document's chunk by its length."""
    return next((chunk for limit, chunk in () if length <= limit), 48)


def plan_doc_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group documents of like length and equal chunk, longest first; returns their numbers.

    A row of a batch reads up to row_tokens tokens, all rows together up to batch_tokens.
    """
    batches: list[list[int]] = []
    for doc in np.argsort(-lengths, kind="stable"):
        batch = batches[-1] if batches else []
        longest = int(lengths[batch[0]]) if batch else 0
        most = min(64, max(1, batch_tokens // max(1, min(longest, 192))))
        chunk = chunk_tokens_of(int(lengths[doc]))
        if not batch or len(batch) >= most or chunk != chunk_tokens_of(longest):
            batches.append(batch := [])
        batch.append(int(doc))
    return [np.array(batch) for batch in batches]


def phase_ends(batches: list[np.ndarray], phases: PhaseOptions) -> list[int]:
    """Return after how many batches each SGD phase comes; none where nothing would be left to score."""
    done = np.cumsum([len(batch) for batch in batches])
    goals = [phases.num_docs * (i + 1) // 1 for i in range(1)]
    ends = {int(np.searchsorted(done, goal)) + 1 for goal in goals if goal > 0}
    return sorted(end for end in ends if end < len(batches))


# Adapters


class DocumentLora(nn.Module):
    """A low-rank correction of one module for each document of a batch and each visit of a forward pass.

    Visit k of a forward pass adds scale * (x down_k) up_k to the module's output; row b of x (B, T, in) is
    document b. A forward pass visits its module len(down) times, so `visit` is 0 between passes.
    """

    def __init__(self, start: torch.Tensor, num_docs: int, out_dim: int):
        super().__init__()
        visits, _, rank = start.shape
        self.down = nn.Parameter(start.unsqueeze(1).repeat(1, num_docs, 1, 1))  # (visits, B, in, rank)
        self.up = nn.Parameter(start.new_zeros(visits, num_docs, rank, out_dim))  # 0: the identity
        self.visit = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = (part[self.visit, : x.size(0)].to(x.dtype) for part in (self.down, self.up))
        self.visit = (self.visit + 1) % len(self.down)
        return x @ down * 8.0 @ up  # the scale on the narrow side


class VisitCounter(nn.Module):
    """Count how often a forward pass calls a module; adds nothing."""

    def __init__(self):
        super().__init__()
        self.visits = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.visits += 1
        return x.new_zeros(())


def detach_adapters(model: nn.Module) -> None:
    """Empty all places for adapters."""
    for module in model.modules():
        if hasattr(module, "adapter"):
            module.adapter = None


def find_sites(model: nn.Module, chosen: tuple[str, ...]) -> dict[str, nn.Module]:
    """Find the modules that take the chosen adapters, by name; raises UserError for a choice without any."""
    places = {name: module for name, module in model.named_modules() if hasattr(module, "adapter")}
    found = {}
    for site in chosen:
        here = {n: m for n, m in places.items() if n.rpartition(".")[2] in ADAPTER_SITES.get(site, ())}
        if not here:
            known = [key for key, leaves in ADAPTER_SITES.items() if any(n.endswith(leaves) for n in places)]
            raise UserError(
                f"adapters on {site!r}: expected one of {', '.join(known)}, found no such module. "
                "Change the list of sites."
            )
        found |= here
    return found


@torch.no_grad()
def count_visits(model: nn.Module, sites: dict[str, nn.Module], device: torch.device | str) -> list[int]:
    """Say how often one forward pass calls each site: more than once for layers that recur."""
    probe = torch.zeros(1, 1, dtype=torch.long, device=device)
    for module in sites.values():
        module.adapter = VisitCounter()
    model(probe, probe > 0, 0)
    visits = [module.adapter.visits for module in sites.values()]
    detach_adapters(model)
    return visits


class LoraScorer:
    """Score batches of documents, each document with adapters of its own that learn as it goes by."""

    def __init__(self, model: nn.Module, session: Session, lora: LoraOptions):
        if 0 % session.options.world_size:
            raise UserError(f"warm_lanes=0: expected a multiple of {session.options.world_size} ranks.")
        longest = max([48, *(chunk for _, chunk in ())])
        if longest > 192:
            raise UserError(
                f"chunk of {longest} tokens: expected at most the context of 192. Lower the chunk or "
                "raise the context."
            )
        self.model, self.session, self.lora = model, session, lora
        device = session.options.device
        self.sites = find_sites(model, lora.sites)
        self.starts = []
        generator = torch.Generator().manual_seed(0)
        for module, visits in zip(self.sites.values(), count_visits(model, self.sites, device)):
            noise = torch.rand(visits, module.in_features, 32, generator=generator)
            self.starts.append(((2 * noise - 1) / math.sqrt(module.in_features)).to(device))
        self.documents = plan_documents(session.tokens, session.options.bos_id)
        self.carried: dict[int, list[torch.Tensor]] = {}  # lane -> A of its last batch, mean over documents

    def score(self, batch: np.ndarray, index: int) -> None:
        """Score and learn documents, longest first, chunk by chunk."""
        params, optimizer = [], None
        for module, start in zip(self.sites.values(), self.carried.get(0, self.starts)):
            module.adapter = DocumentLora(start, len(batch), module.out_features)
            params += [module.adapter.down, module.adapter.up]
        if params:
            rates = {"lr": 0.003, "weight_decay": 0.5, "eps": 1e-10, "fused": True}
            optimizer = torch.optim.AdamW(params, betas=(0.0, 0.9), **rates)
        lengths = np.diff(self.documents[batch]).ravel()
        chunk = chunk_tokens_of(int(lengths[0]))
        for start in range(0, int(lengths[0]), chunk):
            self.score_chunk(batch[lengths > start], start, chunk, optimizer)
        detach_adapters(self.model)

    def score_chunk(self, docs: np.ndarray, start: int, chunk: int, optimizer) -> None:
        """Score targets [start, start + chunk) of each document, then learn those of documents that go on.

        All rows share one window, so a document's score does not depend on its company; rows that end
        early are filled on the right, which no earlier position can see.
        """
        options = self.session.options
        lo, hi = self.documents[docs].T[:, :, None]
        goes_on = (hi - lo > start + chunk).ravel()
        learns = optimizer is not None and bool(goes_on.any())
        begin = max(0, start + chunk - 192)
        end = min(start + chunk, int((hi - lo).max()))
        span = np.minimum(lo + np.arange(begin, end + 1), hi)  # (B, T + 1)
        first = start - begin
        began = time.perf_counter()
        tokens = torch.from_numpy(self.session.tokens[span].astype(np.int64)).to(options.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1 + first :]
        with torch.set_grad_enabled(learns):
            scores = self.model(inputs, inputs == options.bos_id, first).float()  # (B, T - first, V)
            losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
            losses = losses.view_as(targets)
        places = torch.from_numpy(span[:, first:-1])
        real = places < torch.from_numpy(hi)
        chosen = real.to(options.device)
        nats = losses.detach()[chosen]
        if options.cost is not plain_cost:
            nats = options.cost(scores.detach()[chosen], targets[chosen], places[real])
        self.session.record(places[real], nats.float().cpu(), began, inputs.numel())
        for doc, (low, high) in zip(docs, np.minimum(np.hstack([lo + start, lo + end]), hi)):
            self.session.referee.score(low, high, doc)
        if learns:
            for doc, low in zip(docs[goes_on], lo[goes_on, 0] + start):
                self.session.referee.update(low, low + chunk, doc)
            rows = torch.from_numpy(goes_on).to(options.device)
            optimizer.zero_grad()
            (losses[rows].sum() / chunk).backward()  # documents share no weight: a sum keeps them independent
            optimizer.step()

    def learn_phase(self, docs: np.ndarray, sgd: SgdOptions) -> None:
        """Train all weights on scored documents, with all ranks; adapters start afresh."""
        tokens, spans = self.session.tokens, self.documents[docs]
        for doc, (lo, hi) in zip(docs, spans):
            self.session.referee.update(lo, hi, doc)
        inputs = np.concatenate([tokens[lo:hi] for lo, hi in spans])
        targets = np.concatenate([tokens[lo + 1 : hi + 1] for lo, hi in spans])
        inputs, targets = cut_rows(inputs, targets, 192)
        trainer = SgdTrainer(self.model, sgd, self.session)
        size = max(1, 32768 // inputs.shape[1])
        starts = range(0, len(inputs), size)
        for i, start in enumerate(starts):
            rows = slice(start, start + size)
            trainer.train(inputs[rows], targets[rows], chunk_lr_mul(i, len(starts)))
        self.model.requires_grad_(False).zero_grad()
        self.carried.clear()


def score_lora(model: nn.Module, session: Session, lora: LoraOptions, phases: PhaseOptions) -> Outcome:
    """Score documents with adapters of their own, longest first; with phases, SGD on those done so far."""
    options, settings = session.options, session.settings
    with restored(model):
        model.requires_grad_(False)
        scorer = LoraScorer(model, session, lora)
        lengths = np.diff(scorer.documents).ravel()
        batches = plan_doc_batches(lengths, options.batch_tokens)
        over = np.maximum(lengths - 192, 0)
        costs = lengths - over + -(-over // 64) * 192  # tokens of plain windows
        left = np.cumsum([int(costs[batch].sum()) for batch in batches][::-1])[::-1]
        ends = phase_ends(batches, phases)
        told = {settings.switch_at} & set(range(1, len(batches)))
        rounds = [  # a batch for each rank; none crosses a phase or the switch that was asked for
            range(start, min(start + options.world_size, hi))
            for lo, hi in pairwise(sorted({0, *ends, *told, len(batches)}))
            for start in range(lo, hi, options.world_size)
        ]
        switch_at = len(batches)
        for turn in rounds:
            if not session.may_adapt(turn.start, float(left[turn.start])):
                switch_at = turn.start
                break
            score_round(scorer, batches, turn)
            if turn.stop in ends:
                scorer.learn_phase(np.concatenate(batches[: turn.stop]), phases.sgd)
        rest = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *batches[switch_at:]]))
        if len(rest):
            plain = plan_document_windows(scorer.documents[rest])
            session.score_windows(model, plain)
    return session.outcome(len(batches), switch_at)


def score_round(scorer: LoraScorer, batches: list[np.ndarray], turn: range) -> None:
    """Score this rank's batch of a round and note that the others score theirs."""
    for index in turn:
        batch = batches[index]
        if scorer.session.is_mine(index):
            scorer.score(batch, index)
        else:
            for doc in batch:
                scorer.session.referee.score(*scorer.documents[doc], doc, here=False)
        scorer.session.advance(int(np.diff(scorer.documents[batch]).sum()))


# eval/bpb.py


class BpbMeter:
    """Add up the cost of scored targets.

    val_loss is nats per token; val_bpb = val_loss / ln 2 * tokens / bytes, where bytes are those of the
    original UTF-8 text that the scored targets stand for.
    """

    def __init__(self):
        self.nats = 0.0
        self.num_tokens = 0
        self.num_bytes = 0

    def add(self, nats: np.ndarray, target_bytes: np.ndarray) -> None:
        """Add (N,) nats and the (N,) byte counts of the same targets."""
        if nats.shape != target_bytes.shape:
            raise ValueError(
                f"expected as many nats as byte counts, found {nats.shape} and {target_bytes.shape}"
            )
        if not np.isfinite(nats).all():
            at = int(np.flatnonzero(~np.isfinite(nats))[0])
            raise UserError(
                f"expected finite costs, found {nats[at]} for target {at}: the model's logits are not finite "
                "there. It diverged; lower the learning rates and train again."
            )
        self.nats += float(nats.sum(dtype=np.float64))
        self.num_tokens += nats.size
        self.num_bytes += int(target_bytes.sum(dtype=np.int64))

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2.0) / self.num_bytes


# data/errors.py


class UserError(ValueError):
    """Bad input. The message says what was expected, what was found and what to do next.

    Commands print it without a traceback and exit with status 1; everything else is a bug and keeps
    its traceback.
    """


# eval/budget.py: The two ledgers of a submission: bytes against the artifact limit, seconds against the
# clock.


class BudgetError(UserError):
    """A submission is over its byte or time limit."""


def format_ledger(parts: list[tuple[str, float]], limit: float | None, unit: str) -> str:
    """Lay out (part, amount) rows with their total and, under a limit, what is left of it."""
    total = sum(amount for _, amount in parts)
    number = "{:>14,}" if unit == "bytes" else "{:>14,.1f}"
    rows = [*parts, ("total", total)] + ([("limit", limit), ("left", limit - total)] if limit else [])
    return "\n".join(f"  {name:<28} {number.format(amount)} {unit}" for name, amount in rows)


def check_seconds(seconds: float, limit: float) -> None:
    """Raise BudgetError when a phase took longer than its limit."""
    if seconds > limit:
        raise BudgetError(
            f"scoring took {seconds:.1f} s: {seconds - limit:.1f} over the limit of {limit:.1f}. "
            "Raise eval.stride, lower eval.context_len or use eval.mode=chunked."
        )


def check_bytes(parts: list[tuple[str, int]]) -> int:
    """Return the total of (part, bytes) rows; raise BudgetError naming the heaviest parts when over."""
    total = sum(size for _, size in parts)
    if total > 1000000:
        heaviest = sorted(parts, key=lambda part: -part[1])[:5]
        raise BudgetError(
            (f"code + artifact is {total:,} bytes: {total - 1000000:,} over the limit of {1000000:,}.\n")
            + "".join((f"  {name:<28} {size:>14,}\n" for name, size in heaviest))
            + "Lower quant.matrix_bits or the model's size; `make size` shows the code's share."
        )
    return total


# eval/ngram.py: Prefix-only n-gram tilt of next-token logits, in closed form.

NO_HINT = -1
HASH_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
KEY_DTYPE, NEXT_DTYPE = np.dtype("<u4"), np.dtype("<u2")  # of a table's keys and continuations
TAG_BITS = 4  # by which a table's keys are longer than its numbers of entries need
LEGACY_ALIGNMENT = "static hints are misaligned as in system B: they guess the token just seen"


class NgramTable(NamedTuple):
    """The likely continuations of frequent prefixes, found by the first bits of the prefix's hash.

    A prefix that is not in it finds a stranger's hint once in about 2^TAG_BITS: legal, because it reads the
    prefix alone, and cheap, because an unlikely token that gets likelier takes little from the others.
    """

    lengths: tuple[int, ...]  # tokens of its prefixes
    key_bits: int
    keys: np.ndarray  # (M,) KEY_DTYPE, ascending
    tokens: np.ndarray  # (M,) NEXT_DTYPE: the continuation of each key


class OnlineRule(NamedTuple):
    """When a context of the text scored so far may speak."""

    order: int  # tokens of context
    min_share: float  # of the context's occurrences that the likeliest continuation must have
    min_count: int  # occurrences of the context


ONLINE_RULES = (
    OnlineRule(16, 0.5, 2),
    OnlineRule(14, 0.5, 2),
    OnlineRule(12, 0.6, 2),
    OnlineRule(10, 0.7, 3),
    OnlineRule(8, 0.7, 3),
)


class Tilt(NamedTuple):
    """Hints of N targets, up to K each; a cost for the scorers."""

    hints: np.ndarray  # (N, K) int32, NO_HINT where there is none
    strengths: np.ndarray  # (N, K) float32

    def __call__(self, scores: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Charge (R,) targets at `places` under tilted (R, V) logits; returns nats (R,)."""
        hints = torch.from_numpy(self.hints[places.numpy()].astype(np.int64)).to(scores.device)
        strengths = torch.from_numpy(self.strengths[places.numpy()]).to(scores.device)
        return tilted_nats(scores, targets, hints, strengths)


def tilted_nats(
    scores: torch.Tensor, targets: torch.Tensor, hints: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """Charge (R,) targets under (R, V) logits tilted to (R, K) hints: nats' = nats + ln Z - d [y = h]."""
    nats = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    present = hints != NO_HINT
    strengths = strengths * present
    same = hints[:, :, None] == hints[:, None, :]  # (R, K, K)
    total = (same * strengths[:, None, :]).sum(-1)  # (R, K) joint strength of a hint's token
    counted = present & ~same.tril(-1).any(-1)  # a token that two hints name enters Z once
    logs = scores.gather(-1, hints.clamp_min(0)) - scores.logsumexp(-1, keepdim=True)
    raised = (counted * logs.exp() * total.expm1()).sum(-1)  # Z - 1
    return nats + raised.log1p() - (strengths * (hints == targets[:, None])).sum(-1)


def join_tilts(*tilts: Tilt) -> Tilt:
    """Let several sources of hints speak about the same targets; their strengths add up."""
    return Tilt(*(np.concatenate(columns, axis=1) for columns in zip(*tilts)))


def hash_contexts(tokens: np.ndarray, order: int) -> np.ndarray:
    """Hash the `order` tokens that end at positions order - 1, order, ...; uint64, a polynomial mod 2^64."""
    count = max(len(tokens) - order + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(order):
        hashes = hashes * np.uint64(HASH_MULTIPLIER) + tokens[offset : offset + count].astype(np.uint64) + 1
    return hashes


def key_bits_of() -> int:
    """Return the bits of a key in a table of up to max_entries."""
    return (29999).bit_length() + TAG_BITS


def prefix_keys(hashes: np.ndarray, key_bits: int) -> np.ndarray:
    """Shorten (n,) uint64 hashes to keys; the product carries the last token into the first bits."""
    return (hashes * np.uint64(HASH_MULTIPLIER) >> np.uint64(64 - key_bits)).astype(KEY_DTYPE)


def count_of(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Count how often each of (m,) wanted is among (n,) values, which hold all of them; int64."""
    distinct, counts = np.unique(values, return_counts=True)
    return counts[np.searchsorted(distinct, wanted)]


def rank_continuations(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hash, likeliest continuation and worth of the prefixes of `length` tokens; each (m,).

    worth = n KL(share || s), n the prefix's count, share its continuation's, discounted for what a few
    counts overstate, s that share after the prefix without its first token and elsewhere: the nats that
    a reader of the shorter prefix would save. Prefixes with less than min_count such pairs are left out.
    """
    prefixes, pairs = hash_contexts(tokens[:-1], length), hash_contexts(tokens, length + 1)
    _, first, hits = np.unique(pairs, return_index=True, return_counts=True)
    order = np.lexsort((tokens[first + length], -hits, prefixes[first]))
    leads = np.ones(len(order), dtype=bool)
    leads[1:] = np.diff(prefixes[first][order]) != 0
    best = order[leads & (hits[order] >= 2)]
    first, hits = first[best], hits[best]
    seen = count_of(prefixes, prefixes[first])
    short_pairs, short = hash_contexts(tokens, length), hash_contexts(tokens[:-1], length - 1)
    other_hits = count_of(short_pairs, short_pairs[first + 1]) - hits
    others = count_of(short, short[first + 1]) - seen
    share, expected = (hits - 0.6) / (seen + 0.5), (other_hits + 0.5) / (others + 50)
    saved = share * np.log(share / expected) + (1 - share) * np.log((1 - share) / (1 - expected))
    worth = np.where(share > expected, seen * saved, 0.0)
    return prefixes[first], tokens[first + length], worth


def build_table(tokens: np.ndarray) -> NgramTable:
    """Count training tokens; keep the max_entries prefixes of these lengths that are worth most.

    Equal worth goes to the shorter prefix. Needs about 100 bytes a token.
    """
    ranked = [rank_continuations(tokens, length) for length in (3,)]
    hashes, nexts, worth = (np.concatenate(parts) for parts in zip(*ranked))
    best = np.argsort(-worth, kind="stable")[:30000]
    key_bits = key_bits_of()
    keys, first = np.unique(prefix_keys(hashes[best], key_bits), return_index=True)
    return NgramTable((3,), key_bits, keys, nexts[best][first].astype(NEXT_DTYPE))


def write_table(table: NgramTable) -> dict[str, bytes]:
    """Lay a table out as named byte strings for the artifact; keys as differences, which compress."""
    steps = np.diff(table.keys, prepend=KEY_DTYPE.type(0))
    return {"ngram keys": steps.tobytes(), "ngram tokens": table.tokens.tobytes()}


def read_table(streams: dict[str, bytes]) -> NgramTable:
    """Restore what write_table laid out; raises UserError where the bytes are no such table."""
    keys, nexts = streams["ngram keys"], streams["ngram tokens"]
    if KEY_DTYPE.itemsize * len(nexts) != NEXT_DTYPE.itemsize * len(keys) or len(keys) % KEY_DTYPE.itemsize:
        raise UserError(
            f"n-gram table: expected {KEY_DTYPE.itemsize} bytes of keys and {NEXT_DTYPE.itemsize} of tokens "
            f"an entry, found {len(keys)} and {len(nexts)}. The artifact is damaged; write it again."
        )
    steps, tokens = np.frombuffer(keys, KEY_DTYPE).astype(np.int64), np.frombuffer(nexts, NEXT_DTYPE)
    key_bits, rising = (key_bits_of(), steps.cumsum())
    if (steps[1:] <= 0).any() or (rising >= 1 << key_bits).any() or (tokens >= 2048).any():
        raise UserError(
            f"n-gram table: expected rising keys of {key_bits} bits and tokens below 2048, found "
            "others. The table belongs to another recipe; write the artifact again."
        )
    return NgramTable((3,), key_bits, rising.astype(KEY_DTYPE), tokens)


def static_tilt(table: NgramTable, tokens: np.ndarray) -> Tilt:
    """Look up the table for each of the N targets of N + 1 tokens; a column of hints a prefix length.

    The hint for target i, which is tokens[i + 1], reads a prefix that ends at tokens[i]. legacy_alignment
    reproduces system B (contest pull request 1666): there it reads the prefix that ends one token
    earlier, and so guesses the token just seen.
    """
    hints = np.full((len(tokens) - 1, 1), NO_HINT, dtype=np.int32)
    for column, length in enumerate((3,)):
        wanted = prefix_keys(hash_contexts(tokens[:-1], length), table.key_bits)
        if len(table.keys) and len(wanted):
            at = np.searchsorted(table.keys, wanted).clip(max=len(table.keys) - 1)
            found = np.where(table.keys[at] == wanted, table.tokens[at].astype(np.int32), NO_HINT)
            hints[length - 1 :, column] = found
    return Tilt(hints, np.full(hints.shape, 0.8, dtype=np.float32))


def group_starts(values: np.ndarray) -> np.ndarray:
    """Return for each of (M,) sorted values the index at which its run of equal values starts."""
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))


def running_best(contexts: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the likeliest earlier outcome of each (M,) context, how often it came, and out of how many.

    Position m sees occurrences before m only, as a table that is updated after each look-up; an outcome
    takes the lead when its count exceeds the leader's. All (M,) int64; the counts are 0 at first sight.
    """
    index = np.arange(len(contexts))
    order = np.argsort(contexts, kind="stable")  # runs of one context, each in the order of the text
    starts, outcomes = group_starts(contexts[order]), outcomes[order].astype(np.int64)
    pairs = starts * (outcomes.max(initial=0) + 1) + outcomes
    by_pair = np.argsort(pairs, kind="stable")
    counts = np.empty_like(index)
    counts[by_pair] = index - group_starts(pairs[by_pair]) + 1  # occurrences of the pair up to here
    leads = np.maximum.accumulate(starts * (len(index) + 1) + counts) - starts * (len(index) + 1)
    took_lead = np.ones(len(index), dtype=bool)
    took_lead[1:] = (index == starts)[1:] | (leads[1:] > leads[:-1])
    leaders = outcomes[np.maximum.accumulate(np.where(took_lead, index, 0))]
    seen = index - starts
    found = np.zeros((3, len(index)), dtype=np.int64)
    found[:, order[1:]] = np.where(seen[1:] > 0, (leaders[:-1], leads[:-1], seen[1:]), 0)
    return found[0], found[1], found[2]


def online_tilt(tokens: np.ndarray, rules: tuple[OnlineRule, ...] = ONLINE_RULES) -> Tilt:
    """Hint each of the N targets of N + 1 tokens at what followed its context earlier in the text.

    The first rule that holds speaks, with strength boost * share of the context's occurrences. Every hint
    equals that of a table filled in one pass, updated after the look-up. Needs about 100 bytes a token.
    """
    hints = np.full(len(tokens) - 1, NO_HINT, dtype=np.int32)
    strengths = np.zeros(len(tokens) - 1, dtype=np.float32)
    for rule in rules:
        contexts = hash_contexts(tokens[:-1], rule.order)
        if not len(contexts):
            continue
        leader, lead, seen = running_best(contexts, tokens[rule.order :])
        share = lead / np.maximum(seen, 1)
        open_hints, open_strengths = hints[rule.order - 1 :], strengths[rule.order - 1 :]
        speaks = (open_hints == NO_HINT) & (seen >= rule.min_count) & (share >= rule.min_share)
        open_hints[speaks] = leader[speaks]
        open_strengths[speaks] = 2.0 * share[speaks]
    return Tilt(hints[:, None], strengths[:, None])


# eval/modes.py: The scorers by name: from a recipe's [eval] settings to per-target nats.

AID_DTYPE = np.dtype("<f4")
NOT_STORED = ": expected what it needs in the artifact, found nothing. Train with it or set it to 0 here."
LEGACY_TAIL = "the text's last targets count more than once, as in systems B and C (contest rule C4)"


class Scoring(NamedTuple):
    """What a scoring may be given besides model, settings and text."""

    reports: Reports = Reports()
    switch_at: int = -1  # replay: units that adapt; -1: settings.deadline_s decides
    warms_up: bool = True  # before the clock starts; compiled graphs need it


def sgd_options() -> SgdOptions:
    """Return the settings of SGD on scored text."""
    return SgdOptions(
        lr=0.005, momentum=0.9, epochs=3, chunk_tokens=32768, batch_seqs=32, clip_norm=1.0, frozen=()
    )


def lora_options() -> LoraOptions:
    """Return the settings of documents' adapters."""
    return LoraOptions(
        rank=32,
        alpha=256.0,
        sites=tuple("mlp,head".split(",")),
        lr=0.003,
        beta2=0.9,
        weight_decay=0.5,
        chunk_tokens=48,
        short_chunks=(),
        batch_docs=64,
        warm_lanes=0,
        max_doc_tokens=0,
        seed=0,
    )


class Aids(NamedTuple):
    """What an artifact holds for its scorer beside the weights."""

    table: NgramTable | None = None  # where settings.tilt_static_entries asks for one
    scales: tuple[float, ...] = ()  # factors of positive and of negative logits, where fit_scales does


def make_table(shards: list[np.ndarray]) -> NgramTable:
    """Build the table that the settings ask for from the first of the training tokens."""
    parts, left = ([], 10000000)
    for shard in shards:
        parts.append(np.asarray(shard[:left]))
        left -= len(parts[-1])
    return build_table(np.concatenate(parts))


def write_aids(aids: Aids) -> dict[str, bytes]:
    """Lay out what there is as named byte strings for the artifact."""
    streams = {} if aids.table is None else write_table(aids.table)
    return streams | ({"logit scales": np.array(aids.scales, AID_DTYPE).tobytes()} if aids.scales else {})


def aid_limits() -> dict[str, int]:
    """Return the most bytes of each of the streams that write_aids makes under these settings."""
    table = {"ngram keys": KEY_DTYPE.itemsize * 30000, "ngram tokens": NEXT_DTYPE.itemsize * 30000}
    return table | {}


def read_aids(streams: dict[str, bytes]) -> Aids:
    """Restore what write_aids laid out, as the settings say that it is."""
    table = None
    table = read_table(streams)
    scales = np.frombuffer(streams.get("logit scales", b""), AID_DTYPE)
    return Aids(table, tuple(scales.tolist()))


def scoring_cost(tokens: np.ndarray, aids: Aids):
    """Build what charges the targets: the negative log softmax, scaled and tilted as the settings say."""
    if aids.table is None:
        raise UserError("eval.tilt_static_entries" + NOT_STORED)
    tilts = []
    tilts.append(static_tilt(aids.table, tokens))
    tilts.append(online_tilt(tokens))
    cost = join_tilts(*tilts)
    return cost


def broken_rules() -> str:
    """Say why a score under compat settings is invalid; empty without them."""
    found = ((False, LEGACY_ALIGNMENT), (False, LEGACY_TAIL))
    return "; ".join(reason for is_set, reason in found if is_set)


def rehearse(model: nn.Module, scorer, session: Session) -> None:
    """Score random tokens as settings.mode will the text: what is built at first use is built here.

    `session` is the text's, which stays as it is; so do the model's weights, or it raises.
    """
    context_len, options = (192, session.options._replace(cost=plain_cost))
    tokens = np.random.default_rng(0).integers(0, 2048, min(385, len(session.tokens)))
    tokens = tokens.astype(session.tokens.dtype)
    before = weights_digest(model)
    rehearsal = Session(tokens, session.settings, options, session.ranks, Reports())
    score_session(scorer, rehearsal)
    if weights_digest(model) != before:
        raise ValueError("warming up moved the model's weights")


def score_session(model: nn.Module, session: Session) -> Outcome:
    """Score a session's text as settings.mode says."""
    session.referee.invalid = broken_rules()
    phases = PhaseOptions(2500, 1, sgd_options())
    return score_lora(model, session, lora_options(), PhaseOptions())


# train_gpt.py

# dev/pack.py puts here what a packed program's recipe changes, and environment names of what it fixes.
PACKED_RECIPE: dict | None = {
    "data": {"vocab_size": 2048, "seq_len": 256, "batch_tokens": 4096, "micro_batches": 1},
    "model": {
        "num_layers": 4,
        "model_dim": 128,
        "num_heads": 2,
        "num_kv_heads": 2,
        "mlp_mult": 3.0,
        "leaky_slope": 0.5,
        "smear": "gated",
        "bigram_buckets": 65536,
        "bigram_dim": 32,
    },
    "optim": {
        "matrix_lr": 0.02,
        "tied_embed_lr": 0.02,
        "scalar_lr": 0.01,
        "matrix_weight_decay": 0.05,
        "muon_momentum_warmup_steps": 100,
        "bigram_proj": "adamw",
        "grad_clip_norm": 1.0,
    },
    "schedule": {
        "warmdown_frac": 0.6,
        "stages": [
            [0, 256, 512, 1, 0.7, 1],
            [0.08, 256, 1024, 1, 1, 1],
            [0.25, 256, 2048, 1, 1.2, 1],
            [0.6, 256, 4096, 1, 1.4, 1],
        ],
    },
    "average": {"ema_decay": 0.98},
    "quant": {
        "method": "water_fill",
        "target_bytes": 998000,
        "calib_batches": 8,
        "reserve_seconds": 14.0,
        "float16_numel": 0,
        "scale_floor": False,
        "codec": "rans",
        "limit_bytes": 1000000,
        "code_wrap": "mix",
    },
    "eval": {
        "mode": "lora-ttt",
        "context_len": 192,
        "keep_tail": True,
        "tilt_online": 2.0,
        "tilt_static_entries": 30000,
        "tilt_static_strength": 0.8,
        "lora_rank": 32,
        "lora_alpha": 256.0,
        "lora_sites": "mlp,head",
        "lora_lr": 0.003,
        "lora_beta2": 0.9,
        "limit_seconds": 180.0,
        "limit_text_bytes": 500000,
    },
}
PACKED_ENVIRONMENT = (
    "VOCAB_SIZE TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS NUM_LAYERS MODEL_DIM NUM_HEADS "
    "NUM_KV_HEADS MLP_MULT LEAKY_SLOPE TIE_EMBEDDINGS TIED_EMBED_INIT_STD ROPE_BASE "
    "QK_GAIN_INIT ROPE_DIMS SKIP_GATES_ENABLED LN_SCALE XSA_LAST_N BIGRAM_VOCAB_SIZE "
    "BIGRAM_DIM VE_LAYERS VE_DIM PARALLEL_START_LAYER LOGIT_SOFTCAP MATRIX_LR EMBED_LR "
    "TIED_EMBED_LR HEAD_LR SCALAR_LR MUON_WD EMBED_WD ADAM_WD MUON_MOMENTUM "
    "MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_BACKEND_STEPS "
    "MUON_ROW_NORMALIZE BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM WARMDOWN_ITERS WARMDOWN_FRAC "
    "MIN_LR EMA_DECAY SWA_EVERY SWA_START_FRAC EVAL_STRIDE TTT_LR TTT_MOMENTUM TTT_EPOCHS "
    "TTT_CHUNK_TOKENS TTT_GRAD_CLIP TTT_FREEZE_BLOCKS TTT_LORA_RANK TTT_LORA_ALPHA "
    "TTT_LORA_LR TTT_BETA2 TTT_WEIGHT_DECAY TTT_CHUNK_SIZE TTT_BATCH_SIZE "
    "PHASED_TTT_PREFIX_DOCS PHASED_TTT_NUM_PHASES"
)

ARTIFACT_NAME, CHECKPOINT_NAME = "artifact.bin", "checkpoint.safetensors"

# ----------------------------------------------------------------------------------------------------------
# 2 config
# ----------------------------------------------------------------------------------------------------------
# Frozen dataclasses, one a section; the defaults are the contest's naive baseline. A field carries its
# environment name in the contest, a line of help, its range, and whether it stays free in a packed program.


# formats/recipe.py: Recipes: a config as frozen dataclasses, one a section, filled from TOML, environment and
# command line.


def option(default, env: str = "", text: str = "", *, live=False, low=None, high=None, choices=()):
    """Declare a config field: default, contest environment name, help, and the values that it may take.

    A live field (paths, seed, clock, logging) stays free in a packed program, one with live="auto" while the
    recipe leaves it at its default; the others are the recipe.
    """
    metadata = {"env": env, "help": text, "live": live, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def config_fields(config) -> dict[str, dataclasses.Field]:
    """Map "section.key" to its field, in order; `config` is a config class or an instance of it."""
    return {
        f"{section.name}.{item.name}": item
        for section in dataclasses.fields(config)
        for item in dataclasses.fields(section.type)
    }


def config_value(config, name: str):
    """Read a field by its "section.key" name."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def parse_value(value, kind: type):
    """Convert text or a TOML value to a field's type; raises ValueError when it does not fit."""
    if kind is bool:
        words = {"1": True, "true": True, "0": False, "false": False}
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if kind is tuple:
        items = [item for item in value.split(",") if item] if isinstance(value, str) else value
        return tuple(parse_item(item) for item in items)
    if kind is int and isinstance(value, str):
        return int(value.replace("_", ""))
    if isinstance(value, (dict, list)) or (kind is int and value != int(value)):
        raise ValueError
    converted = kind(value)
    if kind is float and not math.isfinite(converted):
        raise ValueError
    return converted


def parse_item(value):
    """Convert an item of a tuple: a number, or a row of numbers written a:b:c or as a list."""
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and ":" in value):
        return tuple(parse_number(part) for part in (value.split(":") if isinstance(value, str) else value))
    return parse_number(value)


def parse_number(value) -> int | float:
    """Convert text or a number to an int where it is one, else to a finite float."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return int(number) if number.is_integer() else number


def with_values(config, values: dict, source: str):
    """Return config with {"section.key": value} applied; an unknown name is an error with a suggestion."""
    known = config_fields(config)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}?" if near else "`python train_gpt.py --help` lists all fields."
            raise UserError(f"{source}: unknown field {name!r}. {hint}")
        section, key = name.split(".")
        try:
            changed = {key: parse_value(value, known[name].type)}
        except (ValueError, TypeError, OverflowError) as error:
            env = known[name].metadata["env"]
            alias = f" ({env})" if env else ""
            kind = known[name].type.__name__
            raise UserError(f"{source}: {name}{alias}: expected {kind}, found {value!r}.") from error
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changed)}
        )
    return config


def check_ranges(config) -> None:
    """Raise for the first field whose value is outside the range or the choices of its declaration."""
    for name, item in config_fields(config).items():
        value, limits = config_value(config, name), item.metadata
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(f"{name}={value} must be one of {', '.join(limits['choices'])}.")
        for bound, word, broken in (
            (limits["low"], "least", lambda value, bound: value < bound),
            (limits["high"], "most", lambda value, bound: value > bound),
        ):
            if bound is not None and broken(value, bound):
                raise UserError(f"{name}={value} must be at {word} {bound}.")


def environment_values(config, environ: Mapping[str, str]) -> dict[str, str]:
    """Pick the fields that an environment sets under their contest names."""
    named = {name: item.metadata["env"] for name, item in config_fields(config).items()}
    return {name: environ[env] for name, env in named.items() if env and env in environ}


def parse_overrides(texts: list[str]) -> dict[str, str]:
    """Split "section.key=value" arguments."""
    bad = [text for text in texts if "=" not in text]
    if bad:
        raise UserError(f"command line: expected section.key=value, found {bad[0]!r}.")
    return dict(text.split("=", 1) for text in texts)


def recipe_of(config) -> dict[str, dict]:
    """Return {section: {key: value}} of every field that a recipe fixes, or with live of all fields."""
    recipe: dict[str, dict] = {}
    for name, item in config_fields(config).items():
        section, key = name.split(".")
        recipe.setdefault(section, {})[key] = config_value(config, name)
    return recipe


def recipe_hash(recipe: dict[str, dict]) -> str:
    """Hash what a recipe changes: equal for all seeds, machines and paths of one configuration."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def format_toml(recipe: dict[str, dict]) -> str:
    """Write {section: {key: value}} as TOML; JSON spells these values alike."""
    sections = [
        "\n".join([f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())])
        for section, keys in recipe.items()
    ]
    return "\n\n".join(sections) + "\n"


# formats/rules.py


def clock_rules(cfg) -> list[tuple]:
    """Return the rules of how long a run may be."""
    clock = cfg.run.max_wallclock_seconds
    ends = cfg.run.iterations > 0 or clock > 0
    return [
        ("run.iterations", ends, "needs a step or a clock"),
        ("run.max_wallclock_seconds", clock == 0 or 14.0 < clock, "must be 0 or above 14.0 reserved"),
    ]


# kernels/attention.py: All attention of a model goes through `attend`; which kernel does the work is chosen
# once, by name.


class AttentionMask(NamedTuple):
    """A Reach in the form that one backend reads; made once per forward, used in every layer."""

    backend: str
    window: int = 0
    segments: Tensor | None = None  # (B, T) int32: number of the document in its row
    bias: Tensor | None = None  # (B or 1, 1, T - first, T) 0 or -inf, added to the scores
    offsets: Tensor | None = None  # (max_docs + 1,) int32: where documents start in B * T, then B * T
    blocks: object | None = None  # FlexAttention's BlockMask


FULL = (torch.float32, torch.float64)


# The choice


HALF = (torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """One way to compute attention: what it needs, and in which form it reads a mask."""

    run: Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
    form: str  # of its mask: bias, offsets, segments or blocks
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = HALF + FULL
    probe: Callable | None = None  # what the self-test calls instead of run


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend block by block of queries; sdpa where no backward pass follows, or too much is to be kept."""
    weight_bytes = q.size(0) * q.size(2) * q.size(1) ** 2 // 2 * q.element_size()
    if not torch.is_grad_enabled() or weight_bytes > KEPT_BYTES:
        return sdpa(q, k, v, mask)
    return blocked_forward(q, k, v, mask.bias, mask.window)[0]


def cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The same, asking cuDNN before torch's flash kernel; what it refuses goes on to the others."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(q, k, v, mask)


def cudnn_only(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The same without the others: what the self-test calls."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, mask)


def fa2(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use flash-attn 2."""
    return flash2(q, k, v, mask.window)


def fa3(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlashAttention 3."""
    return flash3(q, k, v, mask.window)


def fa4(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlashAttention 4."""
    return flash4(q, k, v, mask.window)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use FlexAttention, which torch.compile turns into a kernel for this mask."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compiler.is_compiling()
    kernel = flex_attention if compiled else torch.compile(flex_attention, dynamic=False)
    grouped = q.size(2) != k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return kernel(q, k, v, block_mask=mask.blocks, enable_gqa=grouped).transpose(1, 2)


# The oracle


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute softmax(q k^T / sqrt(K) + mask) v as it is written, in float32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.size(2) // k.size(2)
    wide_q, wide_k, wide_v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, K)
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    visible = visible_keys(q.size(1), mask.window, q.device)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ wide_v).transpose(1, 2).to(q.dtype)


# What is part of torch


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use torch's scaled_dot_product_attention; without a bias it skips what causality hides."""
    bias, grouped = mask.bias, q.size(2) != k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Use torch's own flash kernel for rows of any length (torch >= 2.11): windows, documents, no package."""
    from torch.nn.attention.varlen import varlen_attn

    rows, seq_len, num_heads, _ = q.shape
    offsets, options = (None, {"window_size": (mask.window or -1, 0)})
    if offsets is None:
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * seq_len
    if VARLEN_TAKES_GROUPS:
        options["enable_gqa"] = num_heads != k.size(2)
    else:
        k, v = (x.repeat_interleave(num_heads // k.size(2), dim=2) for x in (k, v))
    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, K)
    return varlen_attn(q_flat, k_flat, v_flat, offsets, offsets, seq_len, seq_len, **options).view_as(q)


BACKENDS = {
    "fa3": Backend(fa3, "offsets", ("cuda",), HALF),
    "fa4": Backend(fa4, "offsets", ("cuda",), HALF),
    "fa2": Backend(fa2, "offsets", ("cuda",), HALF),
    "cudnn": Backend(cudnn_first, "bias", ("cuda",), HALF, cudnn_only),
    "varlen": Backend(torch_varlen, "offsets", ("cuda",), HALF),
    "flex": Backend(flex, "blocks", ("cuda",)),  # on a CPU it has no backward pass
    "blocked": Backend(blocked, "bias", ("cpu",), FULL),
    "sdpa": Backend(sdpa, "bias"),
    "math": Backend(math_attention, "segments"),
}

# train_gpt.py


@dataclass(frozen=True)
class RunConfig:
    """Where, how long and how loud; never part of the recipe's hash."""

    run_id: str = option("", "RUN_ID", "name of the run folder; empty: time and seed", live=True)
    out_dir: str = option("runs", "", "where run folders go", live=True)
    seed: int = option(1337, "SEED", "seed of the initial weights", live=True)
    device: str = option("auto", "", "where to compute", live="auto", choices=("auto", "cpu", "cuda"))
    compile = "off"  # torch.compile
    attention: str = option("auto", "", "attention backend", live="auto", choices=("auto", *BACKENDS))
    iterations: int = option(20_000, "ITERATIONS", "most optimizer steps", live=True, low=0)
    max_wallclock_seconds: float = option(180.0, "MAX_WALLCLOCK_SECONDS", "0: no limit", live=True, low=0)
    warmup_steps: int = option(2, "WARMUP_STEPS", "before the clock; state is restored", live=True, low=0)
    val_loss_every: int = option(0, "VAL_LOSS_EVERY", "steps; 0: at the end, -1: never", live=True, low=-1)
    train_log_every: int = option(
        100, "TRAIN_LOG_EVERY", "log the loss every so many steps", live=True, low=0
    )
    val_batch_tokens: int = option(
        16384, "VAL_BATCH_SIZE", "scoring batch; data.micro_batches share it", live=True, low=1
    )


@dataclass(frozen=True)
class DataConfig:
    """Shards, tokenizer and the shape of a step."""

    data_path: str = option("data/datasets/builtin_sp2048", "DATA_PATH", "token shards", live=True)
    tokenizer_path: str = option(
        "data/datasets/builtin_sp2048/tokenizer.model", "TOKENIZER_PATH", "tokenizer file", live=True
    )
    tokenizer_kind = "sentencepiece"  # codec of the tokenizer
    vocab_size = 2048  # entries of the tokenizer
    loader = "sequential"  # order of the training tokens
    seq_len = 256  # tokens a training row
    batch_tokens = 4096  # tokens a step, all ranks together
    micro_batches = 1  # a step's micro-batches; the world size divides them


@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    mlp = "square"  # activation of the mlp
    norm = "rms"  # of block inputs and output
    final_norm = True  # normalise what the head reads
    dropout = 0.0  # of attention's output, in training
    init = "default"  # of the matrices
    smear = "gated"  # mix in the previous token
    compute_dtype = "auto"  # of activations and matrix products


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates and decays by group (see PARAM_RULES), Muon and AdamW."""

    matrix_lr = 0.02  # Muon learning rate of the block matrices
    tied_embed_lr = 0.02  # AdamW learning rate of a tied embedding
    scalar_lr = 0.01  # AdamW learning rate of gains, scales and gates
    matrix_weight_decay = 0.05  # decoupled decay of the block matrices
    embed_weight_decay = 0.0  # decoupled decay of embedding and head
    scalar_weight_decay = 0.0  # decoupled decay of gains, scales, gates
    grad_clip_norm = 1.0  # of the reduced gradient, global; 0: off


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, depth and shape of the steps over the run."""

    shape = "warmdown"  # of the learning rate
    stages = (
        (0, 256, 512, 1, 0.7, 1),
        (0.08, 256, 1024, 1, 1, 1),
        (0.25, 256, 2048, 1, 1.2, 1),
        (0.6, 256, 4096, 1, 1.4, 1),
    )  # start:seq_len:batch_tokens:micro_batches:lr_mul:grad_clip_norm,...; start < 1 is progress


@dataclass(frozen=True)
class AverageConfig:
    """Weight averaging: one of the two, or none."""


@dataclass(frozen=True)
class QuantConfig:
    """How weights are stored and how many bytes they may take."""

    step = 0.4  # water_fill: steps of the median matrix, in deviations
    target_bytes = 998000  # code + artifact: water_fill fits step, gptq bits; 0: free


@dataclass(frozen=True)
class EvalConfig:
    """How the artifact is scored and how long that may take."""

    mode = "lora-ttt"  # windows and adaptation of the scorer
    context_len = 192  # tokens a window may see; 0: data.seq_len
    stride = 64  # targets a sliding window scores
    deadline_s = 0.0  # end adaptation so that scoring takes at most this; 0: never
    tilt_static_entries = 30000  # most n-grams of training text in the artifact; 0: none


@dataclass(frozen=True)
class WatchConfig:
    """What a run shows and keeps on its way. Part of the recipe, so that a packed program leaves it out."""


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


class Stage(NamedTuple):
    """A row of the curriculum: shape and rates of the steps from `start` on."""

    start: float  # a step, or below 1 a fraction of the run
    seq_len: int
    batch_tokens: int
    micro_batches: int
    lr_mul: float = 1.0
    grad_clip_norm: float = 0.0


def stages_of(cfg: Config) -> list[Stage]:
    """List the curriculum; without one, the only stage is that of the data section."""
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


def read_environment() -> Environment:
    """Read the environment: the one place that does."""
    layout = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
    numbers = {key: int(os.environ[env]) for key, env in layout.items() if env in os.environ}
    fixed = {name: os.environ[name] for name in PACKED_ENVIRONMENT.split() if name in os.environ}
    return Environment(environment_values(Config, os.environ) | fixed, **numbers)


def load_config(environment: dict[str, str], overrides: list[str]) -> Config:
    """Resolve a config: defaults < recipe < environment < "section.key=value" overrides; then check it.

    A packed program has the recipe's values as its defaults, and only live fields.
    """
    changes = parse_overrides(overrides)
    free = config_fields(Config)
    for name in (*environment, *changes):
        if name not in free:
            raise UserError(
                f"{name} is fixed in this packed program, or unknown; free are {', '.join(free)}. For "
                "the rest change the recipe and pack it again."
            )
    cfg = Config()
    cfg = with_values(cfg, environment, "environment")
    cfg = with_values(cfg, changes, "command line")
    check_config(cfg)
    return cfg


def fixed_recipe() -> dict[str, dict]:
    """Return {section: {key: value}} of what a recipe fixes to other values than the defaults.

    A packed program has it as data.
    """
    return PACKED_RECIPE


def fixed_hash() -> str:
    """Hash what a recipe changes; a packed program has it as data."""
    return recipe_hash(fixed_recipe())


def whole_recipe(cfg: Config) -> dict[str, dict]:
    """Return {section: {key: value}} of all fields."""
    fixed, rest = (fixed_recipe(), recipe_of(cfg))
    return {section: fixed.get(section, {}) | rest.get(section, {}) for section in {**rest, **fixed}}


def check_config(cfg: Config) -> None:
    """Raise naming field, value and constraint when settings cannot work together (formats/rules.py)."""
    check_ranges(cfg)
    rules = clock_rules(cfg)
    for name, holds, constraint in rules:
        if not holds:
            raise UserError(f"{name}={config_value(cfg, name)} {constraint}.")


# ----------------------------------------------------------------------------------------------------------
# 3 ranks, clock, log
# ----------------------------------------------------------------------------------------------------------
# All talk between processes goes through Ranks. There is one training clock, rank 0's, and every decision
# that depends on time reads it, so ranks agree by construction.


# formats/events.py

EVENTS_NAME = "events.out.tfevents.0"  # TensorBoard looks for "tfevents" in names

# kernels/machine.py


def resolve_dtype(device: torch.device) -> torch.dtype:
    """Choose the compute dtype: auto is bfloat16 where the device multiplies it natively."""
    cpu_info = Path("/proc/cpuinfo")  # torch names these capabilities differently from version to version
    flags = cpu_info.read_text().split() if cpu_info.is_file() else []
    native = device.type == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


# kernels/muon.py


class Pending(NamedTuple):
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


# train_gpt.py


class Ranks:
    """The processes of a run: one a GPU with nccl, or plain CPU processes with gloo."""

    def __init__(self, environment: Environment, device: str):
        self.rank, self.world_size = environment.rank, environment.world_size
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "run.device=cuda: expected a CUDA device, found none. Use run.device=auto or cpu."
            )
        use_cuda = device != "cpu" and torch.cuda.is_available()
        if use_cuda and environment.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"expected a GPU for each process, found {torch.cuda.device_count()} for local rank "
                f"{environment.local_rank}. Lower --nproc_per_node."
            )
        self.device = torch.device("cuda", environment.local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            # Ranks wait for rank 0 while it quantizes and compresses: longer than the default ten minutes.
            settings = {"backend": "nccl" if use_cuda else "gloo", "timeout": timedelta(hours=1)}
            dist.init_process_group(**settings, device_id=self.device if use_cuda else None)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and lines."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box.item())

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
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def start_scatter_average(self, stack: Tensor) -> Pending:
        """Begin to average a (world * n, ...) stack over ranks; this rank will get its (n, ...) share."""
        if self.world_size == 1:
            return Pending(stack)
        share = stack.new_empty(stack.shape[0] // self.world_size, *stack.shape[1:])
        work = dist.reduce_scatter_tensor(share, stack, async_op=True)
        return Pending(share, work, 1 / self.world_size, stack)

    def start_gather(self, share: Tensor) -> Pending:
        """Begin to concatenate every rank's (n, ...) share into (world * n, ...)."""
        if self.world_size == 1:
            return Pending(share)
        share = share.contiguous()  # NCCL refuses transposed views
        stack = share.new_empty(share.shape[0] * self.world_size, *share.shape[1:])
        return Pending(stack, dist.all_gather_into_tensor(stack, share, async_op=True), source=share)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the process group, all ranks together."""
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early takes its connections from the others
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        """Most memory used so far: the device's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def reserved_memory_mib(self) -> int:
        """Most device memory held by the allocator; on a CPU the process's peak."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_reserved(self.device) >> 20 if on_gpu else self.peak_memory_mib()


class Clock:
    """The training clock in milliseconds: rank 0's, the same on every rank, stopped while validating."""

    def __init__(self, ranks: Ranks, total_ms: float = 0.0):
        self.ranks = ranks
        self.total_ms = total_ms
        self.started = 0.0

    def start(self) -> None:
        """Let the time run."""
        self.ranks.synchronize()
        self.started = time.perf_counter()

    def read_ms(self) -> float:
        """Return rank 0's training time so far, after what the device has been given is done."""
        self.ranks.synchronize()
        return self.ranks.agree(self.total_ms + 1000.0 * (time.perf_counter() - self.started))

    def stop(self) -> float:
        """Stop the time and return it."""
        self.total_ms = self.read_ms()
        return self.total_ms


class Log:
    """The run's log: lines for people and the contest's patterns, events for programs. Rank 0 writes."""

    def __init__(self, folder: Path, is_main: bool):
        self.folder = folder
        self.is_main = is_main

    def line(self, text: str, console: bool = True) -> None:
        """Write a line to train.log and, unless told otherwise, to standard output; nothing if empty."""
        if self.is_main and text:
            if console:
                print(text, flush=True)
            with open(self.folder / "train.log", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def event(self, **values) -> None:
        """Append one JSON object to metrics.jsonl."""
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


# ----------------------------------------------------------------------------------------------------------
# 4 data
# ----------------------------------------------------------------------------------------------------------
# data/loader.py deals a step's micro-batches to the ranks, so any number of them sees the same global batch.


# data/errors.py


def run_command(main: Callable[[], int | None]) -> None:
    """Run a module's `main` as the process: a UserError exits with 1, an interrupt with 130."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # 128 + SIGINT, as shells report it
    sys.exit(status)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes options by their whole names and suggests the nearest known one."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown options here: an action's parser knows the options near them, its caller's not."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after usage, message and suggestion."""
        known = [option for action in self._actions for option in action.option_strings]
        words = [word.split("=")[0].rstrip(":,") for word in message.split() if word.startswith("-")]
        unknown = [word for word in words if word not in known]
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        super().error(f"{message}. Did you mean {near[0]}?" if near else message)


# data/shards.py: Token shards in the contest's file format, their manifest, and files that are never half
# written.

SHARD_MAGIC = 20240520
SHARD_DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # version -> tokens; the narrowest first
HEADER_INTS = 256
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HEADER_BYTES = 1024
TRAIN_GLOB = "fineweb_train_*.bin"
VAL_GLOB = "fineweb_val_*.bin"
MANIFEST_NAME = "manifest.json"

# Marks a folder whose shards are being replaced. Without it, shards without a manifest are not ours.
UNFINISHED_NAME = "unfinished.json"
REPORT_NAME = "tokenizer_report.json"  # what `python -m data.tokenizer verify --out` found, beside shards


@contextmanager
def atomic_file(path: str | Path):
    """Yield a binary file that takes the name `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # a fixed name: a killed writer's rest is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(
                f"{path}: not written, the disk is full. Free space and run this again."
            ) from error
        raise


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_file(path: str | Path) -> str:
    """Hash a file of any size in constant memory; returns lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_shard(path: str | Path) -> np.ndarray:
    """Map a shard's tokens into memory: (N,) uint16 or uint32, read-only. Header and size are checked."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such shard. Make it with `make data` or data.download.")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    again = "Delete it and make or download it again."
    if header.size != HEADER_INTS:
        raise UserError(f"{path}: expected 1024 header bytes, found {path.stat().st_size} in all. {again}")
    magic, version, num_tokens = (int(value) for value in header[:3])
    if magic != SHARD_MAGIC or version not in SHARD_DTYPES:
        raise UserError(
            f"{path}: expected shard magic 20240520 version {' or '.join(map(str, SHARD_DTYPES))}, "
            f"found {magic} version {version}. This is not a token shard. {again}"
        )
    dtype = SHARD_DTYPES[version]
    expected = HEADER_BYTES + num_tokens * dtype.itemsize
    found = path.stat().st_size
    if num_tokens < 0 or found != expected:
        raise UserError(
            f"{path}: expected {num_tokens:,} tokens = {expected:,} bytes, found {found:,}. {again}"
        )
    if num_tokens == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def check_token_ids(tokens: np.ndarray, vocab_size: int, where: str | Path) -> None:
    """Raise when an id does not fit the vocabulary (tokens of another tokenizer)."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where}: token id {int(tokens[at])} at position {at} is not below the vocabulary size "
            f"{vocab_size}. The shard was made with another tokenizer; set VOCAB_SIZE or DATA_PATH to match."
        )


def check_stated_shards(files: list[Path]) -> None:
    """Raise unless shards are those of the manifest beside them, by name and size; cheap, reads no token."""
    stated = (read_manifest(files[0].parent) or {}).get("train", {}).get("shards")
    if stated is None:
        return
    expected = {entry["file"]: entry["bytes"] for entry in stated}
    found = {path.name: path.stat().st_size for path in files}
    for name in sorted(expected.keys() | found.keys()):
        wanted, size = expected.get(name, "none by the manifest"), found.get(name, "none")
        if wanted != size:
            raise UserError(
                f"{files[0].with_name(name)}: expected bytes: {wanted}, found: {size}. `python -m "
                f"data.doctor {files[0].parent}` says more; make the data again."
            )


def find_shards(pattern: str | Path) -> list[Path]:
    """List the shards of a glob pattern in name order; at least one. Byte sidecars are left out.

    Raises for a folder that a writer did not finish.
    """
    unfinished = Path(pattern).parent / UNFINISHED_NAME
    if unfinished.is_file():
        raise UserError(
            f"{unfinished}: expected a finished dataset, found one whose writing was cut off. Run the "
            "command that makes it again."
        )
    files = sorted(Path(name) for name in glob.glob(str(pattern)) if "_bytes_" not in Path(name).name)
    if not files:
        raise UserError(
            f"no shards match {pattern}. `make data` writes the built-in corpus, `python -m data.prepare` "
            "your own text, `python -m data.download` the contest's."
        )
    return files


def read_json(path: str | Path):
    """Read a JSON file; raises a UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Make it again.") from error


def read_manifest(folder: str | Path) -> dict | None:
    """Read the manifest that lies beside a folder's shards; None where there is none."""
    path = Path(folder) / MANIFEST_NAME
    return read_json(path) if path.is_file() else None


def digest_of_report(report: dict) -> str:
    """Hash all that a tokenizer report says but its digest: SHA-256 of its JSON with sorted keys."""
    stated = {key: value for key, value in report.items() if key != "digest"}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def read_report(folder: str | Path, tokenizer_sha256: str) -> str:
    """Return the digest of the tokenizer report beside shards; "none" where there is none.

    Raises for one that was altered, is of another tokenizer or found a fault.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        return "none"
    report = read_json(path)
    named = report.get("tokenizer", {}).get("sha256")
    if report.get("digest") != digest_of_report(report) or named != tokenizer_sha256 or not report["passed"]:
        raise UserError(
            f"{path}: expected a report that passed on tokenizer {tokenizer_sha256[:16]}, found one altered, "
            f"failed or of tokenizer {str(named)[:16]}. Make it again: python -m data.tokenizer verify --out."
        )
    return report["digest"]


# data/codecs/spm.py: SentencePiece models: the contest's own (normalising) and lossless ones (identity
# normalisation).

SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space as this character

# A model that gives all of these back byte for byte loses nothing: it neither normalises, nor trims
# or merges spaces, nor adds a dummy prefix, and bytes outside its alphabet fall back to byte tokens.
LOSSLESS_PROBES = ("a", " a", "a  b ", "\n\t\r\0", "\ufb01 \u212a e\u0301 \U0001f600", "\u3000x\u00a0")


class SentencePieceCodec:
    """One SentencePiece model file.

    `token_bytes` follows the contest's rule for its normalising models: a piece counts its UTF-8 bytes
    without the leading space symbol, plus one for that space unless the previous token is a boundary
    (control, unknown, unused) or absent. A lossless model counts every byte it writes.
    """

    kind = "sentencepiece"
    loses = ""  # the normalisation of the contest's models is no loss: everybody's score has it

    def __init__(self, path: str | Path):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"{path}: reading this tokenizer needs `pip install sentencepiece`.") from error
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}).") from error
        sp = self._sp
        self.path = Path(path)
        self.digest = sha256_file(path)
        self.vocab_size = sp.vocab_size()
        self.bos_id = sp.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{path}: the model has no BOS piece; documents could not be told apart.")
        byte_ids = [i for i in range(self.vocab_size) if sp.is_byte(i)]
        self._byte_ids = {i: bytes([int(sp.id_to_piece(i)[1:-1], 16)]) for i in byte_ids}  # pieces are <0x41>
        self._boundary = np.array(
            [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(self.vocab_size)]
        )
        self._pieces = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self.lossless = len(self._byte_ids) == 256 and all(
            self._join(sp.encode(text, out_type=int)) == text.encode() for text in LOSSLESS_PROBES
        )
        self._written_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        leading = [sp.id_to_piece(i).startswith(SPACE_SYMBOL) for i in range(self.vocab_size)]
        self._leading_space = np.array(leading) & ~self._boundary
        self._base_bytes = np.array([self._contest_bytes(i) for i in range(self.vocab_size)], dtype=np.int32)

    def has_pieces(self, pieces: str) -> bool:
        """Tell whether each of these characters is a piece of its own."""
        return all(not self._boundary[self._sp.piece_to_id(piece)] for piece in pieces)

    def _piece_bytes(self, token: int) -> bytes:
        if self._boundary[token]:
            return b""
        return self._byte_ids.get(token) or self._sp.id_to_piece(token).replace(SPACE_SYMBOL, " ").encode()

    def _contest_bytes(self, token: int) -> int:
        if self._boundary[token]:
            return 0
        if token in self._byte_ids:
            return 1
        return len(self._sp.id_to_piece(token).removeprefix(SPACE_SYMBOL).encode())

    def _join(self, ids) -> bytes:
        return b"".join(self._pieces[int(i)] for i in ids)

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Count the original UTF-8 bytes that each of (N,) consecutive ids stands for: (N,) int32."""
        ids = np.asarray(ids)
        if self.lossless:
            return self._written_bytes[ids]
        after_boundary = np.ones(ids.shape, dtype=bool)
        after_boundary[1:] = self._boundary[ids[:-1]]
        return self._base_bytes[ids] + (self._leading_space[ids] & ~after_boundary)


# data/codecs/caseops.py

TITLE, ALL_CAPS, CAP_NEXT, CASE_ESCAPE = CASE_OPERATORS = "\ue001\ue002\ue003\ue004"

# data/codecs/__init__.py: Text codecs: the only owner of text -> token ids -> original bytes.


def load_codec(path: str | Path, kind: str = ""):
    """Load the tokenizer file at `path`; raise when its size or its kind is not the expected one.

    A program that always names the same kind needs no other codec.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such tokenizer file. `make data` trains one on the built-in corpus; "
            "TOKENIZER_PATH or data.tokenizer_path names another."
        )
    found = find_kind(path)
    if found != kind:
        raise UserError(
            f"{path}: expected a tokenizer of kind sentencepiece, found {found}. Choose another file."
        )
    codec = open_codec(path)
    if codec.vocab_size != 2048:
        raise UserError(
            f"{path}: the tokenizer has {codec.vocab_size} entries, the model's vocabulary has "
            f"2048. Set VOCAB_SIZE={codec.vocab_size} or choose the tokenizer of the shards."
        )
    return codec


def find_kind(path: Path) -> str:
    """Tell the kind of a tokenizer by the file's suffix and content; the suffix alone rules out a .model."""
    if path.suffix == ".model":
        return "caseops" if SentencePieceCodec(path).has_pieces(CASE_OPERATORS) else "sentencepiece"
    return f"a {path.suffix} file"


def open_codec(path: Path):
    """Open a file of a known kind; branches, not a table, so that the packer can leave codecs out."""
    return SentencePieceCodec(path)


# data/loader.py: The order in which training tokens are read: four loaders over the same shards.

EDGE_TOKENS = 1048576  # of each shard are checked before work starts, the others when they are read


class LoaderSettings(NamedTuple):
    """What a loader needs to know beside its shards."""

    kind: str  # a key of LOADERS
    vocab_size: int
    bos_id: int
    seed: int


class Rows(NamedTuple):
    """One rank's micro-batch."""

    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64: the next tokens
    starts_segment: np.ndarray  # (B, T) bool: nothing before this token may be looked at


class TokenLoader:
    """Read training shards for ever; subclasses say in which order."""

    def __init__(self, pattern: str | Path, cfg: LoaderSettings):
        self.pattern, self.cfg = pattern, cfg
        self.files = find_shards(pattern)
        self.shards = [np.asarray(read_shard(path)) for path in self.files]  # mapped: a file handle each
        check_stated_shards(self.files)
        for path, shard in zip(self.files, self.shards):
            check_token_ids(shard[:EDGE_TOKENS], 2048, path)
        self.sizes = [shard.size for shard in self.shards]
        self.epoch = self.position = 0
        if sum(self.sizes) == 0:
            raise UserError(f"{pattern}: the training shards hold no tokens. Make the data again.")

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        """Take the next micro-batch of num_tokens for each rank; return this rank's, in rows of row_len."""
        raise NotImplementedError

    def epoch_tokens(self, row_len: int) -> int:
        """Count the tokens that an epoch holds in whole rows."""
        raise NotImplementedError

    def check_step(self, row_len: int, step_tokens: int) -> None:
        """Raise unless an epoch holds the tokens of one step, all ranks together."""
        found = self.epoch_tokens(row_len)
        if found < step_tokens:
            raise UserError(
                f"{self.pattern}: expected at least {step_tokens:,} training tokens, one step in rows of "
                f"{row_len}, found {found:,}. Lower data.batch_tokens or make more data."
            )

    def read(self, shard: int, first: int, count: int) -> np.ndarray:
        """Return up to `count` tokens of a shard, fewer at its end; their ids are checked."""
        part = self.shards[shard][first : first + count]
        check_token_ids(part, self.cfg.vocab_size, self.files[shard])
        return part

    def check_position(self, epoch_len: int) -> None:
        """Raise when a restored position lies outside the epoch."""
        if not 0 <= self.position < epoch_len:
            raise UserError(
                f"{self.pattern}: expected a position below {epoch_len:,}, found {self.position:,}. "
                "The checkpoint was written with other data; set DATA_PATH to them."
            )

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}


class StreamLoader(TokenLoader):
    """Read all shards as one stream: spans of num_tokens + 1, the ends of shards and epochs inside them.

    The one is the last input's target, so every token is read once an epoch. `position` is a token.
    """

    def __init__(self, pattern: str | Path, cfg: LoaderSettings):
        super().__init__(pattern, cfg)
        self.starts = [0, *accumulate(self.sizes)]  # of each shard in the stream; last, its length

    def take(self, row_len: int, num_tokens: int, rank: int, world_size: int) -> Rows:
        span = num_tokens + 1
        chunk = self.span_at(self.position + rank * span, span)
        rounds, self.position = divmod(self.position + world_size * span, self.starts[-1])
        self.epoch += rounds
        tokens = chunk[:-1].reshape(-1, row_len)
        return Rows(tokens, chunk[1:].reshape(-1, row_len), tokens == self.cfg.bos_id)

    def span_at(self, first: int, count: int) -> np.ndarray:
        """Copy `count` tokens of the endless stream: (count,) int64."""
        span, filled = np.empty(count, np.int64), 0
        while filled < count:
            place = (first + filled) % self.starts[-1]
            shard = bisect_right(self.starts, place) - 1
            part = self.read(shard, place - self.starts[shard], count - filled)
            span[filled : filled + part.size] = part
            filled += part.size
        return span

    def epoch_tokens(self, row_len: int) -> int:
        return (self.starts[-1] - 1) // row_len * row_len

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.check_position(self.starts[-1])


def make_loader(pattern: str | Path, cfg: LoaderSettings) -> TokenLoader:
    """Open the shards of a glob pattern with the loader of cfg.kind."""
    return StreamLoader(pattern, cfg)


# data/validation.py: Validation text as tokens, and how many bytes of the original text each of them stands
# for.


class ValidationText(NamedTuple):
    """The validation tokens and what they stand for."""

    tokens: np.ndarray  # (N + 1,) uint16
    target_bytes: np.ndarray  # (N,) original UTF-8 bytes of each target
    bos_id: int
    pattern: str
    tokenizer_kind: str
    tokenizer_sha256: str
    raw_bytes: int | None  # of the text itself, where a manifest states it
    loses: str = ""  # what of it the tokenizer drops, as the codec says


def check_tokenizer(settings, codec, expected_sha256: str) -> None:
    """Refuse a tokenizer that is not the one which data or model were made with."""
    if expected_sha256 != codec.digest:
        raise UserError(
            f"{settings.tokenizer_path}: expected the tokenizer with sha256 {expected_sha256[:16]}, "
            f"found {codec.digest[:16]}. Set TOKENIZER_PATH to it or make the data again."
        )


def read_validation(settings, codec, chosen: str, tokenizer_sha256: str) -> ValidationText:
    """Read all validation shards, or the chosen ones, with the byte count of every target.

    Refuses a byte total, or without a choice shards, that are not the manifest's. tokenizer_sha256 is that
    of the tokenizer which the model was trained with, where one is known.
    """
    pattern = chosen or str(Path(settings.data_path) / VAL_GLOB)
    files = find_shards(pattern)
    manifest = read_manifest(files[0].parent) or {}
    made_with = tokenizer_sha256 or manifest.get("tokenizer", {}).get("sha256", codec.digest)
    check_tokenizer(settings, codec, made_with)
    shards = [read_shard(path) for path in files]
    for path, shard in zip(files, shards):
        check_token_ids(shard, 2048, path)
    tokens = np.concatenate(shards)
    if tokens.size < 2:
        raise UserError(
            f"{pattern}: expected 2 or more validation tokens, found {tokens.size}. Make the data again."
        )
    token_bytes = codec.token_bytes(tokens)
    stated = manifest.get("val", {})
    expected = [shard["file"] for shard in stated.get("shards", [])]
    is_whole = expected == [path.name for path in files]
    if expected and not is_whole and not chosen:
        odd = min({*expected} ^ {path.name for path in files})
        raise UserError(
            f"{pattern}: expected the manifest's {len(expected)} shards, found {len(files)}; {odd} "
            "is in one list only. Make the data again, or name the shards: python -m eval --val."
        )
    if is_whole and stated["expected_token_bytes"] != token_bytes.sum():
        raise UserError(
            f"{pattern}: the manifest expects {stated['expected_token_bytes']:,} bytes, the tokens have "
            f"{token_bytes.sum():,}. A bits-per-byte figure from them would be wrong; make the data again."
        )
    raw_bytes = stated["raw_bytes"] if is_whole else None
    made_by = (codec.bos_id, pattern, codec.kind, codec.digest)
    return ValidationText(tokens, token_bytes[1:], *made_by, raw_bytes, "")


def scored_tokens(text: ValidationText, context_len: int, keep_tail: bool) -> np.ndarray:
    """Return the tokens to score, whole windows only unless the tail is kept; at least one window."""
    num_targets = len(text.tokens) - 1
    if not keep_tail:
        num_targets -= num_targets % context_len
    if num_targets < 1:
        raise UserError(
            f"{text.pattern}: expected at least one window of {context_len} + 1 validation tokens, found "
            f"{len(text.tokens):,}. Make the validation set larger or eval.context_len smaller."
        )
    return text.tokens[: num_targets + 1]


# train_gpt.py


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the next tokens
    starts_doc: Tensor  # (B, T) bool: nothing before this token belongs to its text


def open_loader(cfg: Config, bos_id: int) -> TokenLoader:
    """Open the training shards in the order that data.loader names; refuses data smaller than a step."""
    settings = LoaderSettings("sequential", 2048, bos_id, cfg.run.seed)
    loader = make_loader(Path(cfg.data.data_path) / TRAIN_GLOB, settings)
    for stage in stages_of(cfg):
        loader.check_step(stage.seq_len, stage.batch_tokens)
    return loader


def next_batch(loader: TokenLoader, stage: Stage, ranks: Ranks) -> Batch:
    """Take the next micro-batch of every rank and put this rank's on its device."""
    num_tokens = stage.batch_tokens // stage.micro_batches
    rows = loader.take(stage.seq_len, num_tokens, ranks.rank, ranks.world_size)
    return Batch(*(torch.from_numpy(part).to(ranks.device, non_blocking=True) for part in rows))


def tokenizer_of(cfg: DataConfig):
    """Open the tokenizer that a config names."""
    return load_codec(cfg.tokenizer_path, "sentencepiece")


def load_validation(cfg: DataConfig, chosen: str = "", tokenizer_sha256: str = "") -> ValidationText:
    """Load all validation shards, or the chosen ones; refuses another tokenizer than the one of this hash."""
    return read_validation(cfg, tokenizer_of(cfg), chosen, tokenizer_sha256)


# ----------------------------------------------------------------------------------------------------------
# 5 model
# ----------------------------------------------------------------------------------------------------------
# Weights are float32 masters; CastLinear casts them to the activations' dtype at the product. Training,
# validation and scoring call the same GPT.forward; layer_plan says as data which block runs when and how.


# kernels/blocked.py: Attention over blocks of queries with batched matrix products: on a CPU faster than
# torch's flash kernel.

QUERY_BLOCK = 32  # queries a block


def query_blocks(seq_len: int, window: int) -> list[tuple[int, int, int]]:
    """Cut the queries into blocks: (first key, first query, end of queries and keys) of each."""
    starts = range(0, seq_len, QUERY_BLOCK)
    return [(max(0, a - window) if window else 0, a, min(a + QUERY_BLOCK, seq_len)) for a in starts]


def weight_shapes(q: Tensor, k: Tensor, window: int) -> list[tuple[int, int, int]]:
    """Return the shape of each block's softmax weights: (B * G, H / G * S, keys)."""
    rows, seq_len, num_heads, _ = q.shape
    num_kv_heads = k.size(2)
    blocks = query_blocks(seq_len, window)
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
    future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -math.inf, dtype=q.dtype).triu_(1)
    y, kept = torch.empty_like(q), q.new_empty(sum(map(math.prod, weight_shapes(q, k, window))))
    grouped_q, grouped_y = (by_group(x, k.size(2)) for x in (q, y))
    for weights, (low, start, end) in zip(split_weights(kept, q, k, window), query_blocks(q.size(1), window)):
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
    for weights, (low, start, end) in zip(split_weights(kept, q, k, window), query_blocks(q.size(1), window)):
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
    q, k, v, _, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1])


def _blocked_gradients(ctx, dy, _):
    return *blocked_backward(dy, *ctx.saved_tensors, ctx.window), None, None


blocked_forward.register_autograd(_blocked_gradients, setup_context=_keep_blocked)

# kernels/flash.py: The packages of flash kernels behind one interface; each is imported when it is first
# called.


def call_flash(kernel: Callable, inputs: tuple, window: int) -> Tensor:
    """Call a kernel of flash-attn 2 or 3: with offsets it is the one for rows of any length."""
    q = inputs[0]
    lengths = flash_lengths(None, q.size(1))
    parts = inputs  # (B * T, heads, K)
    y = kernel(*parts, **lengths, causal=True, window_size=(window or -1, 0))
    return (y[0] if isinstance(y, tuple) else y).view_as(q)  # early builds of FA3 return (y, log-sum-exp)


def flash_lengths(offsets: Tensor | None, seq_len: int) -> dict:
    """Spell the documents' places for the kernels; nothing without offsets."""
    if offsets is None:
        return {}
    places = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)
    return places | dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), seq_len)


def flash2(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Use flash-attn 2 (package flash-attn)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    kernel = flash_attn_func
    return call_flash(kernel, (q, k, v), window)


def flash3(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Use FlashAttention 3 (requirements/flash.txt), for Hopper."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    kernel = flash_attn_func
    return call_flash(kernel, (q, k, v), window)


def flash4(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Use FlashAttention 4 (requirements/flash4.txt), for Hopper and Blackwell."""
    parts = (q, k, v)
    return flash4_forward(*parts, None, window, q.size(1))[0].view_as(q)


# The package has no hook for torch.compile, so its kernels are operators here. An operator is registered
# without the package; only calling it needs it.
@torch.library.custom_op("golf::flash4", mutates_args=())
def flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, window: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Return y and its log-sum-exp; with offsets the inputs are (B * T, heads, K)."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options = {"causal": True, "window_size": (window or None, 0), "return_lse": True}
    if offsets is None:
        return flash_attn_func(q, k, v, **options)
    return flash_attn_varlen_func(q, k, v, **flash_lengths(offsets, seq_len), **options)


@flash4_forward.register_fake
def _(q, k, v, offsets, window, seq_len):
    by_head = (q.size(1), q.size(0)) if offsets is not None else (q.size(0), q.size(2), q.size(1))
    return torch.empty_like(q), q.new_empty(by_head, dtype=torch.float32)


@torch.library.custom_op("golf::flash4_backward", mutates_args=())
def flash4_backward(
    dy: Tensor, saved: list[Tensor], offsets: Tensor | None, window: int, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from saved q, k, v, y and log-sum-exp."""
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, y, lse = saved
    lengths = flash_lengths(offsets, seq_len)
    options = {"causal": True, "window_size_left": window or None, "window_size_right": 0}
    return _flash_attn_bwd(q, k, v, y, dy.contiguous(), lse, **lengths, **options)


@flash4_backward.register_fake
def _(dy, saved, offsets, window, seq_len):
    return tuple(torch.empty_like(x) for x in saved[:3])


def _keep_flash4(ctx, inputs, output):
    q, k, v, offsets, ctx.window, ctx.seq_len = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, offsets)


def _flash4_gradients(ctx, dy, _):
    *saved, offsets = ctx.saved_tensors
    return *flash4_backward(dy, saved, offsets, ctx.window, ctx.seq_len), None, None, None


flash4_forward.register_autograd(_flash4_gradients, setup_context=_keep_flash4)

# kernels/attention.py


class Reach(NamedTuple):
    """Which earlier positions of its row a query may see."""

    window: int = 0  # at most so many positions back; 0: all
    documents: bool = False  # only those of its own document
    max_docs: int = 0  # most pieces of documents in a batch, rows' ends cut; 0: B + B * T / 128

    @property
    def is_plain(self) -> bool:
        """Whether nothing but causality limits it."""
        return self.window == 0 and True


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attend causally: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K), scores scaled by K^-1/2.

    q holds the positions that the mask was made for: all, or those from mask_of's `first` on.
    """
    return BACKENDS[mask.backend].run(q, k, v, mask)


def mask_of(
    reach: Reach, starts_doc: Tensor, backend: str, dtype: torch.dtype, first: int = 0
) -> AttentionMask:
    """Put a reach over rows whose documents start at starts_doc (B, T) bool into a backend's form.

    `first` above 0: for the queries of positions from there on alone. No kernel skips what they do not see,
    so they go to sdpa with a bias, whatever the backend.
    """
    backend = "sdpa" if first else backend
    mask = AttentionMask(backend, reach.window)
    form = BACKENDS[backend].form
    if form == "offsets" or (form == "bias" and reach.is_plain and not first):
        return mask
    if form == "segments":
        return mask._replace(segments=None)
    if form == "blocks":
        return mask._replace(blocks=flex_blocks(reach.window, starts_doc))
    visible = visible_keys(starts_doc.size(1), reach.window, starts_doc.device)[:, :, first:]
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask._replace(bias=bias.masked_fill(~visible, -math.inf))


def visible_keys(seq_len: int, window: int, device: torch.device) -> Tensor:
    """Say which keys each query sees: (B, 1, T, T) bool, or (1, 1, T, T) without segments (B, T)."""
    position = torch.arange(seq_len, device=device)
    back = position[:, None] - position  # (T, T): how far behind the query a key lies
    visible = (back >= 0)[None, None]
    if window:
        visible = visible & (back <= window)
    return visible


CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


VARLEN_TAKES_GROUPS = torch.__version__ >= (2, 12)  # before, keys and values are repeated for each query head


def flex_blocks(window: int, starts_doc: Tensor) -> object:
    """Make FlexAttention's block mask: blocks that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, seq_len = starts_doc.shape

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = i >= j
        if window:
            visible = visible & (i - j <= window)
        return visible

    return create_block_mask(sees, None, None, seq_len, seq_len, device=starts_doc.device)


# What the neighbouring modules hold


KEPT_BYTES = 1 << 28  # most bytes of softmax weights that a layer keeps for its backward pass

# What auto tries, best first, by device and whether windows or documents narrow the reach: a bias costs
# memory traffic of B * T * T, so kernels that skip what is hidden come before those that add one.
AUTO_ORDER = {
    ("cpu", False): ("blocked", "sdpa"),
    ("cpu", True): ("blocked", "sdpa"),
    ("hopper", False): ("fa3", "fa4", "cudnn", "sdpa"),
    ("hopper", True): ("fa3", "fa4", "varlen", "flex", "sdpa"),
    ("cuda", False): ("fa4", "fa2", "sdpa"),
    ("cuda", True): ("fa4", "fa2", "varlen", "flex", "sdpa"),
}


class Choice(NamedTuple):
    """The backend that computes attention, and why those that auto tried before it do not."""

    backend: str
    refused: dict[str, str]  # name -> reason


def resolve_attention(
    requested: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], reach: Reach
) -> Choice:
    """Choose and self-test a backend for heads (H, G, K); raise when the one asked for cannot do it."""
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"attention={requested}: expected auto or one of {', '.join(BACKENDS)}.")
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    order = AUTO_ORDER["hopper" if hopper else device.type, not reach.is_plain]
    refused = {}
    for name in order if requested == "auto" else [requested]:
        refused[name] = refusal(name, device, dtype, heads, reach)
        if not refused[name]:
            return Choice(name, {other: reason for other, reason in refused.items() if reason})
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    raise UserError(
        f"attention={requested}: expected a backend that works on {device.type} in {dtype}, found:{reasons}\n"
        "Use attention=auto, or install what is missing (requirements/flash.txt, requirements/flash4.txt)."
    )


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], reach: Reach
) -> str:
    """Say why a backend cannot be used; empty when it can."""
    backend = BACKENDS[name]
    if device.type not in backend.devices:
        return f"it trains on {' and '.join(backend.devices)} only"
    if dtype not in backend.dtypes:
        return f"it computes in {', '.join(map(str, backend.dtypes))} only"
    tolerance = 2e-2 if dtype in HALF else 1e-3  # of the largest element; a GPU may multiply in TF32
    try:
        error = self_test(name, device, dtype, heads, reach)
    except Exception as problem:  # what foreign kernels raise has no common class
        return f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
    return "" if error <= tolerance else f"it differs from math by {error:.2g} of the largest element"


def self_test(
    name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], reach: Reach
) -> float:
    """Compare outputs and gradients with `math` in float32; returns the largest relative difference."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 128, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    *inputs, dy = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    starts_doc = (torch.arange(128, device=device) == 50).expand(2, -1)
    small = reach._replace(window=min(reach.window, 20))
    results = []
    with torch.enable_grad():
        for tested, computed in ((name, dtype), ("math", torch.promote_types(dtype, torch.float32))):
            leaves = [x.detach().to(computed).requires_grad_() for x in inputs]
            kernel = BACKENDS[tested].probe or BACKENDS[tested].run
            y = kernel(*leaves, mask_of(small, starts_doc, tested, computed))
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(computed))])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


# kernels/loss.py: Cross-entropy of a large vocabulary in blocks of rows, so that logits stay in a CPU's
# cache.

BLOCK_LOGITS = 524288  # elements of a block: 2 MiB of float32


class BlockedLoss(torch.autograd.Function):
    """Mean of -log softmax(cap * tanh(x W^T / cap))[target]; the forward pass finds the gradients too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        table = weight.to(x.dtype)
        rows = max(BLOCK_LOGITS // len(weight), 1)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(table)
        for block, wanted, grad_rows in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            logits = (block @ table.mT).to(wide)
            if cap:
                logits.div_(cap).tanh_()
                slope = torch.addcmul(torch.ones((), dtype=wide), logits, logits, value=-1)
                logits.mul_(cap)
            total += F.cross_entropy(logits, wanted, reduction="sum")
            grad = torch.softmax(logits, dim=1)
            grad[torch.arange(len(wanted), device=x.device), wanted] -= 1
            if cap:
                grad.mul_(slope)
            grad = grad.to(x.dtype)
            torch.mm(grad, table, out=grad_rows)
            grad_weight.addmm_(grad.mT, block)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        share = grad / len(grad_x)
        return grad_x * share.to(grad_x.dtype), grad_weight * share.to(grad_weight.dtype), None, None


def blocked_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of (N, D) states, (V, D) head rows, (N,) targets; cap 0: none."""
    return BlockedLoss.apply(x, weight, targets, 30.0)


# kernels/muon.py: Muon over stacks of equal-shaped matrices that ranks share (arXiv 2409.20325; contest pull
# request 399).

STACK_STATE = ("momentum", "row_squares")  # tensors of a Stack that survive a step


class MuonSettings(NamedTuple):
    """How a direction becomes an update."""

    num_ns_steps: int
    ns_table: str  # a key of NS_TABLES
    row_norm: bool  # MuonEq-R
    normuon_beta2: float  # 0: no NorMuon


def newton_schulz(stack: Tensor) -> Tensor:
    """Push the singular values of every (r, c) matrix in (n, r, c) towards 1 (arXiv 2409.20325; Muon).

    X <- aX + (bA + cA^2)X with A = XX^T, from X / ||X||_F, in the stack's dtype.
    """
    wide = stack.size(1) <= stack.size(2)
    x = stack if wide else stack.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    rows = ((3.4445, -4.775, 2.0315),)
    for step in range(5):
        a, b, c = rows[min(step, 0)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Stack:
    """Equal-shaped matrices that Muon updates together; each rank owns an equal, padded share."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, ranks):
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.ranks = ranks
        rows, cols = params[0].shape
        self.size = math.ceil(len(params) / ranks.world_size)
        self.momentum = params[0].new_zeros(self.size, rows, cols)
        self.row_squares = params[0].new_zeros(self.size, rows, 1)  # NorMuon's running mean squares
        self.num_updates = 0
        self.grad: Tensor | None = None  # this rank's share of the averaged gradient
        self.pending: Pending | None = None

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

    def start_update(self, momentum: float, cfg: MuonSettings, dtype: torch.dtype) -> None:
        """Orthogonalize this rank's share of the Nesterov direction and begin to hand it to all ranks."""
        self.momentum.mul_(momentum).add_(self.grad)
        direction = self.grad.add(self.momentum, alpha=momentum)
        update = newton_schulz(direction.to(dtype))
        self.grad, self.pending = None, self.ranks.start_gather(update)

    def finish_update(self, lr_mul: float, decay_mul: float) -> None:
        """Take the step w <- w (1 - lr * decay) - lr * sqrt(max(1, r / c)) * update."""
        rows, cols = self.params[0].shape
        updates = self.pending.wait()[: len(self.params)] * max(1.0, rows / cols) ** 0.5
        self.pending = None
        lr = self.lr * lr_mul
        torch._foreach_mul_(self.params, 1.0 - lr * decay_mul * self.weight_decay)
        torch._foreach_add_(self.params, list(updates.to(self.params[0].dtype).unbind()), alpha=-lr)

    def state_dict(self) -> dict:
        """Collect the state of all ranks: it does not depend on how many there are."""
        gathered = {name: self.ranks.start_gather(getattr(self, name)).wait() for name in STACK_STATE}
        whole = {name: stack[: len(self.params)].clone() for name, stack in gathered.items()}
        return whole | {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        share = slice(self.ranks.rank * self.size, (self.ranks.rank + 1) * self.size)
        for name in STACK_STATE:
            whole = self.padded(list(state[name].unbind()))
            getattr(self, name).copy_(whole[share])
        self.num_updates = state["num_updates"]


# train_gpt.py


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; no gain."""
    return F.rms_norm(x, (x.size(-1),))


class Norm(nn.Module):
    """Normalise the last dimension as cfg.norm says: rms has no weights, layer a bias too."""

    def __init__(self):
        super().__init__()
        self.eps = None

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        return F.rms_norm(x, (x.size(-1),), None, None)


class CastLinear(nn.Linear):
    """A Linear whose float32 weight and bias are cast to the input's dtype; adaptive scoring adds to it."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, bias=False)
        self.adapter: nn.Module | None = None  # attached by eval/adaptive.py while it scores, else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        return y if self.adapter is None else y + self.adapter(x)


def rope_tables(seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * base^(-2i / dims), each (T, 1, dims / 2), in the dtype of `like`."""
    exponents = torch.arange(0, 64, 2, dtype=torch.float32, device=like.device) / 64
    positions = torch.arange(seq_len, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, 1.0 / 10000.0**exponents)[:, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to the first d dimensions of (B, T, H, K), those of the tables; pairs are (i, i + d / 2).

    The tables may be longer: x holds the last of their positions.
    """
    cos, sin = (table[-x.size(1) :] for table in rope)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Shared(NamedTuple):
    """What all block visits of one forward pass read."""

    embedded: Tensor  # (B, T, D)
    rope: tuple[Tensor, Tensor] | None  # of queries and keys: cos and sin, (T, 1, d / 2)
    masks: dict[tuple[int, int], AttentionMask]  # (window, first query) -> what queries may see
    extra_values: dict[int, Tensor]  # layer -> (B, T, G * K), added to its values


class SelfAttention(nn.Module):
    """Grouped-query attention; qk_norm RMS-normalises queries and keys and gives each query head a gain."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.q = CastLinear(128, 128)
        self.k = CastLinear(128, 128)
        self.v = CastLinear(128, 128)
        self.out = CastLinear(128, 128)
        self.q_gain = nn.Parameter(torch.full((2,), 1.5))
        self.window = 0

    def queries_and_keys(self, x: Tensor, shared: Shared, first: int = 0) -> tuple[Tensor, Tensor]:
        """Project, normalise and rotate: (B, T - first, H, K) and (B, T, G, K)."""
        q, k = self.q(x[:, first:]), self.k(x)
        q, k = (part.unflatten(-1, (-1, 64)) for part in (q, k))
        q, k = rms_norm(q), rms_norm(k)
        q, k = rotate(q, shared.rope), rotate(k, shared.rope)
        return (q * self.q_gain.to(x.dtype)[:, None], k)

    def forward(
        self, x: Tensor, shared: Shared, first_value: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return the output of positions from `first` on, (B, T - first, D), and all values (B, T, G, K)."""
        q, k = self.queries_and_keys(x, shared, first)
        v = self.v(x)
        v = v.unflatten(-1, (-1, 64))
        y = attend(q, k, v, shared.masks[self.window, first])
        return self.out(y.flatten(2)), v


class MLP(nn.Module):
    """down(activation(up(x))); swiglu packs value and gate into up, in this order."""

    def __init__(self):
        super().__init__()
        self.up = CastLinear(128, 384)
        self.down = CastLinear(384, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, F), swiglu (B, T, 2F)
        return self.down(F.leaky_relu(h, 0.5).square())


class Step(NamedTuple):
    """One visit of a block in the forward pass."""

    layer: int
    push: bool = False  # keep the output for a later skip
    pop: int | None = None  # row of skip_weights that scales the newest kept output, added before the block
    kind: str = "serial"  # serial | gptj | two_lane
    first: int = 0  # positions before it give keys and values only: nobody reads their output


class Lanes(NamedTuple):
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

    def __init__(self, layer: int):
        super().__init__()
        self.attn_norm, self.attn = (Norm(), SelfAttention(layer))
        self.mlp_norm, self.mlp = (Norm(), MLP())
        self.resid_scale = nn.Parameter(torch.ones(128))
        self.embed_mix = nn.Parameter(torch.zeros(128))
        self.attn_scale = nn.Parameter(torch.ones(128))
        self.mlp_scale = nn.Parameter(torch.ones(128))

    def mix(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Mix the embedding into the stream."""
        return self.resid_scale.to(x.dtype) * x + self.embed_mix.to(x.dtype) * embedded

    def fed(self, normed: Tensor) -> Tensor:
        """Return the scaled output of the mlp."""
        y = self.mlp(normed)
        return self.mlp_scale.to(y.dtype) * y

    def forward(self, lanes: Lanes, shared: Shared, step: Step) -> Lanes:
        x = lanes.attn
        mixed = self.mix(x, shared.embedded)  # (B, T, D)
        normed = self.attn_norm(mixed) * 1.0
        attended, value = self.attn(normed, shared, None, step.first)
        x, mixed, normed = (part[:, step.first :] for part in (x, mixed, normed))
        attended = F.dropout(attended, 0.0, self.training)
        attended = self.attn_scale.to(x.dtype) * attended
        x = mixed + attended
        return Lanes(x + self.fed(self.mlp_norm(x) * 1.0), None, None)


class BigramHash(nn.Module):
    """Add a hashed embedding of the last two tokens (contest pull request 162).

    bucket = (36313 t_i xor 27191 t_(i-1)) mod (num_buckets - 1); the first of a row or document takes the
    last bucket. The table starts at zero: the module is the identity.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(65536, 32)
        self.proj = CastLinear(32, 128)
        self.strength = nn.Parameter(torch.tensor(0.05))

    def buckets(self, tokens: Tensor, starts_doc: Tensor) -> Tensor:
        """Hash (B, T) tokens to (B, T) bucket numbers; no bigram crosses a document's start."""
        last = self.table.num_embeddings - 1
        hashed = torch.bitwise_xor(36313 * tokens[:, 1:], 27191 * tokens[:, :-1]) % last
        return F.pad(hashed, (1, 0), value=last).masked_fill(starts_doc, last)

    def forward(self, tokens: Tensor, starts_doc: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.table(self.buckets(tokens, starts_doc)).to(dtype)  # (B, T, bigram_dim)
        return self.strength.to(dtype) * self.proj(rows)


class SmearGate(nn.Module):
    """Add a gated copy of the previous position: a one-token lookback for a dozen weights."""

    def __init__(self):
        super().__init__()
        self.gate = CastLinear(12, 1)
        self.strength = nn.Parameter(torch.zeros(()))  # 0 at init: the module is the identity

    def forward(self, x: Tensor, starts_doc: Tensor) -> Tensor:  # (B, T, D), (B, T) bool
        gate = self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[..., :12]))  # (B, T, 1)
        # A document's first token has no predecessor. Unmasked, packed rows leak text between
        # documents, which makes the score illegal.
        gate = gate.masked_fill(starts_doc.unsqueeze(-1), 0.0)
        return x + gate * F.pad(x, (0, 0, 1, -1))  # (B, T, D), shifted one step right


class TiedHead(nn.Module):
    """The product with the embedding's rows: a module, for calibration to watch and adapters to add to."""

    def __init__(self, out_dim: int):
        super().__init__()
        self.in_features, self.out_features = (128, out_dim)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


def visit_order() -> list[int]:
    """List the layers in the order of their visits: recur_layers = (first, last) run `passes` times."""
    layers = list(range(4))
    return layers


def layer_plan() -> list[Step]:
    """List the block visits of a forward pass in order: U-Net skips join the halves, innermost first.

    With recur_skips "all_visits" the halves are those of the visits; with "first_pass" those of the
    layers, and later passes of the recurrent segment take no part.
    """
    order = visit_order()
    ranks = list(range(len(order)))
    half = len(order) // 2
    plan = []
    for layer, rank in zip(order, ranks):
        joins = rank is not None
        pop = rank - half if joins and half <= rank < 2 * half else None
        plan.append(Step(layer, bool(joins and rank < half), pop, "serial"))
    return plan


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
        vocab_size += 0
        self.embed = nn.Embedding(vocab_size, 128)
        self.bigram = BigramHash()
        self.smear = SmearGate()
        self.blocks = nn.ModuleList((Block(layer) for layer in range(4)))
        self.skip_weights = nn.Parameter(torch.ones(2, 128))
        self.final_norm = Norm()
        self.head = None
        self.readout = TiedHead(vocab_size)
        self.aids = Aids()  # for the scorer; in the artifact beside the weights
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices as cfg.init says, what writes into the stream or the logits as cfg.out_init says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(self.embed.weight, std=0.005)
        for block in self.blocks:
            block.attn.out.weight.mul_(0.0)
            block.mlp.down.weight.mul_(0.0)
        self.bigram.table.weight.zero_()
        self.bigram.proj.weight.mul_(1.0)

    def embed_tokens(self, tokens: Tensor, starts_doc: Tensor) -> Tensor:
        """Embed (B, T) tokens with their neighbours: what enters the first block, (B, T, D)."""
        x = self.embed(tokens).to(self.compute_dtype)
        x = x + self.bigram(tokens, starts_doc, x.dtype)
        x = self.smear(x, starts_doc)
        x = rms_norm(x)
        return x

    def share(self, tokens: Tensor, starts_doc: Tensor, embedded: Tensor, plan: list[Step]) -> Shared:
        """Compute once what every block visit reads."""
        cfg, seq_len = self.cfg, tokens.size(1)
        rope = rope_tables(seq_len, embedded)
        masks = {
            (window, first): mask_of(Reach(window, False), starts_doc, self.attention, embedded.dtype, first)
            for window, first in sorted({(self.blocks[step.layer].attn.window, step.first) for step in plan})
        }
        extra_values = {}
        return Shared(embedded, rope, masks, extra_values)

    def join_skip(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        """Add a kept output with its weights, or blend it in with its sigmoid gate."""
        skip = self.skip_weights[row].to(x.dtype) * kept
        return x + skip

    def before_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head multiplies: the states, (B, T, D) or (B, T, embed_dim), and its rows."""
        x = self.final_norm(x)
        return x, self.embed.weight

    def predict(self, x: Tensor) -> Tensor:
        """Turn the last hidden states, (B, T, D), into logits, (B, T, V)."""
        x, weight = self.before_head(x)
        logits = self.readout(x, weight)
        return 30.0 * torch.tanh(logits / 30.0)

    def forward(
        self, tokens: Tensor, starts_doc: Tensor, first: int = 0, passes: int | None = None
    ) -> Tensor:
        """Predict the token after each of (B, T) tokens, for positions from `first` on.

        passes is how often the recurrent segment runs; None: cfg.recur_passes, as in scoring.
        """
        return self.predict(self.hidden(tokens, starts_doc, first, passes))

    def hidden(self, tokens: Tensor, starts_doc: Tensor, first: int = 0, passes: int | None = None) -> Tensor:
        """Return the last block's output for positions from `first` on, (B, T - first, D)."""
        x = self.embed_tokens(tokens, starts_doc)
        plan = layer_plan()
        last = first  # a compressed context is made for all queries
        plan[-1] = plan[-1]._replace(first=last)
        shared = self.share(tokens, starts_doc, x, plan)
        lanes, kept = Lanes(x), []
        for visit, step in enumerate(plan):
            if step.pop is not None:
                lanes = lanes._replace(attn=self.join_skip(lanes.attn, kept.pop(), step.pop))
            block = self.blocks[step.layer]
            lanes = block(lanes, shared, step)
            if step.push:
                kept.append(lanes.attn)
        return lanes.attn[:, first - last :]


def mean_loss(model: nn.Module, batch: Batch, passes: int | None = None) -> Tensor:
    """Mean cross-entropy of a batch in nats, from logits in float32 or the compute dtype if that is wider."""
    logits = model(batch.tokens, batch.starts_doc, 0, passes)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, 1), batch.targets.flatten())


def mean_loss_in_blocks(model: GPT, batch: Batch, passes: int | None = None) -> Tensor:
    """Mean cross-entropy as mean_loss has it, without whole logits: faster on a CPU (kernels/loss.py)."""
    x, rows = model.before_head(model.hidden(batch.tokens, batch.starts_doc, 0, passes))
    return blocked_loss(x.flatten(0, 1), rows, batch.targets.flatten())


def build_model(cfg: Config, device: torch.device) -> GPT:
    """Make a model on `device` with weights drawn on the CPU from run.seed, the same everywhere."""
    torch.manual_seed(cfg.run.seed)
    return make_gpt(cfg, device).to(device)


def resolve_backend(cfg: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the attention backend for a recipe's heads and masks."""
    heads = (2, 2, 64)
    reach = Reach(0, False)
    return resolve_attention(cfg.run.attention, device, dtype, heads, reach).backend


def make_gpt(cfg: Config, device: torch.device, weights_on: str = "cpu") -> GPT:
    """Make a model that computes on `device`, in that dtype and with that attention backend."""
    dtype = resolve_dtype(device)
    backend = resolve_backend(cfg, device, dtype)
    with torch.device(weights_on):
        model = GPT(cfg.model, 2048, dtype, backend)
    return model.double() if dtype == torch.float64 else model


# ----------------------------------------------------------------------------------------------------------
# 6 optimizers
# ----------------------------------------------------------------------------------------------------------
# PARAM_RULES says for every parameter who updates it, at which rate, and how it is stored. Muon works on
# stacks of equal shapes: each rank averages, orthogonalizes and hands back its share of a stack.


class Rule(NamedTuple):
    """How parameters of one kind are updated and stored; all masters are float32."""

    pattern: str  # of the parameter's name; the first match wins
    optimizer: str  # matrix (optim.matrix_optimizer) | adamw
    lr: str  # field of OptimConfig
    weight_decay: str  # field of OptimConfig
    storage: str  # matrix | mlp | embed (quantized, bits from QuantConfig) | float32
    present: Callable[[Config], bool] = lambda cfg: True


# Shorthands for the rows below: what scalars, embeddings, small projections and matrices take.
SCALAR = ("adamw", "scalar_lr", "scalar_weight_decay", "float32")
TIED = ("adamw", "tied_embed_lr", "embed_weight_decay", "embed")
PROJ = ("adamw", "scalar_lr", "scalar_weight_decay", "matrix")
MATRIX = ("matrix", "matrix_lr", "matrix_weight_decay", "matrix")


def has_bigram(cfg: Config, optimizer: str = "") -> bool:
    """Whether there is a bigram table, and its projection is the named optimizer's."""
    return optimizer in ("", "adamw")


PARAM_RULES = (
    Rule("embed.weight", *TIED, lambda cfg: True),
    Rule("blocks.*.attn.[qkvo]*.weight", *MATRIX),
    Rule("blocks.*.mlp.*.weight", *MATRIX[:3], "mlp"),
    Rule("blocks.*.attn.q_gain", *SCALAR, lambda cfg: True),
    Rule("blocks.*_scale", *SCALAR, lambda cfg: True),
    Rule("blocks.*.embed_mix", *SCALAR, lambda cfg: True),
    Rule("smear.*", *SCALAR, lambda cfg: True),
    Rule("bigram.table.weight", *TIED, has_bigram),
    Rule("bigram.proj.weight", *PROJ, lambda cfg: True),
    Rule("bigram.strength", *SCALAR, has_bigram),
    Rule("skip_*", *SCALAR, lambda cfg: True),
)


def match_rules(cfg: Config, names: list[str]) -> dict[str, Rule]:
    """Give every parameter name its rule; a name or a present rule left over is an error."""
    rules = [rule for rule in PARAM_RULES if rule.present(cfg)]
    matched = {}
    for name in names:
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, rule.pattern)), None)
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


class Optimizers:
    """AdamW and Muon over one model, laid out by PARAM_RULES."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        optim = cfg.optim
        self.ranks = ranks
        self.dtype = model.compute_dtype
        self.muon = MuonSettings(5, "classic", False, 0.0)
        named = dict(model.named_parameters())
        groups: dict[tuple, list[nn.Parameter]] = {}
        for name, rule in match_rules(cfg, list(named)).items():
            rates = getattr(optim, rule.lr), getattr(optim, rule.weight_decay)
            in_stack = rule.optimizer == "matrix" and True
            shape = named[name].shape if in_stack else None  # None: AdamW, shapes may differ
            groups.setdefault((shape, *rates), []).append(named[name])
        self.adamw = torch.optim.AdamW(
            [
                {"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay}
                for (shape, lr, decay), params in groups.items()
                if shape is None
            ],
            betas=(0.9, 0.95),
            eps=1e-08,
            fused=True,
        )
        stacks = [
            Stack(params, lr, decay, ranks)
            for (shape, lr, decay), params in groups.items()
            if shape is not None
        ]
        self.stacks = sorted(stacks, key=lambda stack: -stack.momentum.numel())  # the longest way first

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
            stack.start_update(rates.momentum, self.muon, self.dtype)
        for stack in self.stacks:
            stack.finish_update(rates.lr_mul, 1.0)
        self.zero_grad()

    def clip(self, adam_grads: list[Tensor], shares: list[Tensor], limit: float) -> None:
        """Scale all gradients so that their global norm over all ranks is at most the limit."""
        total = self.ranks.sum(sum(share.double().square().sum() for share in shares)) if shares else 0.0
        total = total + sum(grad.double().square().sum() for grad in adam_grads)
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
        for stack, part in zip(self.stacks, state["stacks"]):
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
    return Phase(stage_at(cfg, step, progress), 1, False)


def stage_at(cfg: Config, step: int, progress: float) -> Stage:
    """Return the last stage that has started."""
    stages = stages_of(cfg)
    return [stage for stage in stages if stage.start <= (progress if stage.start < 1 else step)][-1]


def training_ms(cfg: Config) -> float:
    """Return the clock that training may use: the limit less calibration's share; without one infinite."""
    seconds = cfg.run.max_wallclock_seconds
    return 1000.0 * max(seconds - 14.0, 0.0) if seconds > 0 else math.inf


def run_progress(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Return the fraction of the run that is over: of the clock, or without one of the steps."""
    if cfg.run.max_wallclock_seconds > 0:
        return elapsed_ms / training_ms(cfg)
    return step / max(cfg.run.iterations, 1)


def learning_rate_mul(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Return the factor of every learning rate before step `step`, of warm-up, shape, stage and FP8.

    Steps stand for time at the average pace so far where there is a clock (the contest's rule), for
    themselves where there is none; so a run of N steps is N long either way.
    """
    factor = warmdown_mul(cfg, step, elapsed_ms)
    return factor * stage_at(cfg, step, run_progress(cfg, step, elapsed_ms)).lr_mul


def warmdown_mul(cfg: Config, step: int, elapsed_ms: float) -> float:
    """Return 1, then fall linearly over warmdown_frac of the run or the time that warmdown_iters take."""
    run = cfg.run
    if run.max_wallclock_seconds > 0:
        total, done = training_ms(cfg), elapsed_ms
        warmdown = 1200 * elapsed_ms / max(step, 1)
    else:
        total, done, warmdown = (float(run.iterations), float(step), 1200.0)
    warmdown = 0.6 * total
    left = max(total - done, 0.0)
    return max(left / warmdown, 0.0) if left < warmdown else 1.0


def step_rates(cfg: Config, step: int, elapsed_ms: float) -> StepRates:
    """Return what the optimizers need to know for step `step`."""
    progress = run_progress(cfg, step, elapsed_ms)
    return StepRates(
        learning_rate_mul(cfg, step, elapsed_ms),
        muon_momentum(step),
        1.0,
        stage_at(cfg, step, progress).grad_clip_norm,
    )


def muon_momentum(step: int) -> float:
    """Return Muon's momentum at a step: linear from its warm-up start to its final value."""
    frac = min(step / 100, 1.0)
    return (1.0 - frac) * 0.85 + frac * 0.95


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


# ----------------------------------------------------------------------------------------------------------
# 9 quantization
# ----------------------------------------------------------------------------------------------------------
# quantizers/ turns one matrix into codes; here is which matrices, with what statistics, into how many bytes.


# quantizers/grid.py: Integer grids for weights: scale rules, rounding, the one dequantizer, and its
# training-time twin.

SMALLEST_SCALE = 2.0**-20  # keeps the scale of an all-zero row positive in float16

# 2^(n / 8) for n in 0 .. 7: written out, because a computed power's last bit differs between platforms.
EIGHTH_OCTAVES = (1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081)
COLUMN_FACTORS = tuple(EIGHTH_OCTAVES[n % 8] * 2.0 ** (n // 8) for n in range(-128, 128))


class Quantized(NamedTuple):
    """A stored matrix: all that dequantize needs."""

    codes: Tensor  # (rows, cols) int8 or int16
    scales: Tensor  # (rows, groups) float16
    column_steps: Tensor | None = None  # (cols,) int8: a column's factor in eighths of an octave
    repair: "tuple[Quantized, Quantized] | None" = None  # (rank, rows) and (rank, cols): their product


def check_matrix(values: Tensor, name: str, next_step: str) -> None:
    """Refuse what is no finite matrix."""
    bad = int((~torch.isfinite(values)).sum())
    if values.ndim != 2 or bad:
        raise UserError(
            f"{name}: expected a finite matrix, found shape {list(values.shape)} with {bad} values that are "
            f"not finite. {next_step}"
        )


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a weight that cannot be quantized."""
    check_matrix(weight, name, "The run diverged: lower the learning rates or set optim.grad_clip_norm=1.")


def column_factors(column_steps: Tensor) -> Tensor:
    """Return 2^(n / 8) for int8 column steps n, (cols,) float32, the same on every platform."""
    return torch.tensor(COLUMN_FACTORS, device=column_steps.device)[column_steps.long() + 128]


def element_steps(scales: Tensor, column_steps: Tensor | None, num_cols: int) -> Tensor:
    """Spread scales (rows, groups) and column steps over the elements, (rows, cols) float32."""
    steps = scales.float().repeat_interleave(num_cols // scales.shape[1], dim=1)
    return steps if column_steps is None else steps * column_factors(column_steps)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the float32 weights (rows, cols) that a stored matrix stands for, exact on every platform."""
    codes = quantized.codes
    steps = element_steps(quantized.scales, quantized.column_steps, codes.shape[1])
    weight = codes.float() * steps
    if quantized.repair is not None:
        # One outer product at a time: a matrix product's order of summation is the library's choice.
        for left, right in zip(*(dequantize(factor) for factor in quantized.repair)):
            weight = weight + left[:, None] * right
    return weight


# quantizers/gptq.py: GPTQ with any steps, water-filled steps for entropy-coded weights, and low-rank repair.

BLOCK_COLS = 128  # columns rounded before their errors are moved into the rest at once
ROW_DAMPING = 0.05  # of the mean row weight


class Moments:
    """What calibration keeps of a matrix: the two sides of what an error of its weights does to the loss.

    An error E raises the loss by about sum_i row_weights_i e_i hessian e_i^T / 2 nats a token. For a Linear
    the hessian is the mean of x x^T over its inputs, row weights are the mean of g^2 over the loss's
    gradients at its outputs. An embedding is a Linear of one-hot inputs seen from the other side: the
    hessian is the mean of g g^T, row weights are how often a row is looked up.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}  # "gram" (cols, cols) and "rows" (rows,), flat, each with its count

    def add_gram(self, values: Tensor) -> None:
        """Add the Gram matrix of (..., cols) values, summed in float64."""
        values = values.detach().flatten(0, -2).float()
        self.add("gram", (values.mT @ values).double(), len(values))

    def add_rows(self, totals: Tensor, count: int) -> None:
        """Add what `count` tokens add to the row weights (rows,)."""
        self.add("rows", totals.detach().double(), count)

    def add_squares(self, gradients: Tensor) -> None:
        """Add the squares of (..., rows) gradients to the row weights."""
        gradients = gradients.flatten(0, -2).double()
        self.add_rows(gradients.square().sum(dim=0), len(gradients))

    def add(self, kind: str, total: Tensor, count: int) -> None:
        """Add to one of the sums and to its count."""
        packed = torch.cat([total.flatten(), total.new_tensor([count])])
        self.sums[kind] = self.sums[kind] + packed if kind in self.sums else packed

    def merge(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of all ranks."""
        for kind in sorted(self.sums):
            self.sums[kind] = sum_over_ranks(self.sums[kind])

    @property
    def hessian(self) -> Tensor:
        """Return the mean Gram matrix, (cols, cols) float64."""
        mean = self.sums["gram"][:-1] / self.sums["gram"][-1]
        return mean.view(math.isqrt(len(mean)), -1)

    @property
    def row_weights(self) -> Tensor | None:
        """Return the mean row weights, (rows,) float64; None if there were no backward passes."""
        return self.sums["rows"][:-1] / self.sums["rows"][-1] if "rows" in self.sums else None


def watch(module: nn.Module, kept: Moments) -> RemovableHandle:
    """Hook a Linear or an embedding so that every visit is counted into its moments."""

    def visit(_, args: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            tokens = args[0].flatten()
            kept.add_rows(torch.bincount(tokens, minlength=module.num_embeddings), tokens.numel())
        else:
            kept.add_gram(args[0])
        if output.requires_grad:
            output.register_hook(kept.add_gram if isinstance(module, nn.Embedding) else kept.add_squares)

    return module.register_forward_hook(visit)


def collect_moments(modules: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, Moments]:
    """Watch modules while `run` makes forward and backward passes of losses that are sums over tokens.

    Without backward passes Linears have no row weights: all outputs will weigh the same.
    """
    moments = {name: Moments() for name in modules}
    handles = [watch(module, moments[name]) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return moments


def combine_roles(*roles: Moments) -> tuple[Tensor, Tensor]:
    """Return one hessian (cols, cols) and row weights (rows,) for a matrix with several uses.

    A tied embedding is looked up and multiplied by. sum_k r_k x H_k becomes the product of its two partial
    traces, which keeps each row's and each column pair's total.
    """
    hessian = sum(role.row_weights.sum() * role.hessian for role in roles)
    rows = sum(role.hessian.trace() * role.row_weights for role in roles)
    return hessian / hessian.trace(), rows


class Factor(NamedTuple):
    """A Hessian prepared once for any number of solves."""

    hessian: Tensor  # (cols, cols) float32, undamped
    order: Tensor  # (cols,) int64: columns in the order of rounding
    upper: Tensor  # (cols, cols) float32: upper Cholesky factor of the damped inverse, in that order
    dead: Tensor  # (cols,) bool: inputs that are always zero


def factorize(hessian: Tensor, damping: float = 0.01, name: str = "hessian") -> Factor:
    """Damp a Hessian by a fraction of its mean diagonal and factor its inverse, in float64.

    act_order rounds the columns of the largest inputs first.
    """
    check_matrix(hessian, name, "Calibrate with text on which the model's activations are finite.")
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    order = torch.arange(len(dead), device=hessian.device)
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = hessian.double() + torch.diag(damping * diagonal.mean() + dead.double())
    # With the order flipped, the lower factor of H is the upper one: H = V V^T, so H^-1 = U^T U, U = V^-1.
    flipped = damped[order][:, order].flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if int(failed):
        raise UserError(
            f"{name}: expected a positive definite Hessian, found one that is not, with damping {damping}. "
            "Raise the damping or calibrate with more text."
        )
    identity = torch.eye(len(dead), dtype=torch.float64, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(hessian.float(), order, upper.float(), dead)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Return e H e^T of each row e of a weight's error (rows, cols), times the row's weight, (rows,).

    With row weights, half the sum predicts the rise of the loss, in nats a token.
    """
    squares = ((error @ hessian) * error).sum(dim=1)
    return squares


def solve_codes(weight: Tensor, factor: Factor, steps: Tensor, limits: Tensor) -> Tensor:
    """Round (rows, cols) weights column by column with error feedback; returns float32 codes.

    steps are (rows, cols), limits (cols,) the largest codes. With prices (rows, cols), in squared codes a
    bit, codes are chosen by their lengths too.
    """
    order = factor.order
    left = weight.mT[order].contiguous()  # (cols, rows): a column's values are neighbours in memory
    steps = steps.mT[order].contiguous()
    limits = limits[order].tolist()
    codes = torch.empty_like(left)
    for first in range(0, len(left), BLOCK_COLS):
        last = min(first + BLOCK_COLS, len(left))
        upper = factor.upper[first:last]
        errors = left.new_zeros(last - first, left.shape[1])
        for j in range(first, last):
            column = left[j] - upper[: j - first, j] @ errors[: j - first]
            scaled = column / steps[j]
            code = torch.round(scaled).clamp_(-limits[j], limits[j])
            codes[j] = code
            errors[j - first] = (column - code * steps[j]) / upper[j - first, j]
        left[last:] -= upper[:, last:].mT @ errors
    return torch.empty_like(codes).index_copy_(0, order, codes).mT.contiguous()


def solve_or_round(weight: Tensor, factor: Factor, steps: Tensor, limits: Tensor) -> Tensor:
    """Solve without prices; a row that plain rounding serves better (clipping can do that) is rounded."""
    weight = weight.masked_fill(factor.dead, 0.0)
    solved = solve_codes(weight, factor, steps, limits)
    nearest = torch.minimum(torch.maximum(torch.round(weight / steps), -limits), limits)
    errors = [output_error(weight - codes * steps, factor.hessian) for codes in (solved, nearest)]
    return torch.where((errors[0] <= errors[1])[:, None], solved, nearest)


def as_codes(codes: Tensor) -> Tensor:
    """Return float codes as int8, or as int16 where they need it."""
    return codes.to(torch.int8 if codes.numel() == 0 or codes.abs().max() <= 127 else torch.int16)


class Calibrated(NamedTuple):
    """A matrix and what calibration knows of it."""

    weight: Tensor  # (rows, cols) float32
    factor: Factor | None = None  # of its inputs
    row_weights: Tensor | None = None  # (rows,) what an error of each row weighs, see Moments


def calibrate(
    name: str, weight: Tensor, hessian: Tensor, row_weights: Tensor | None, damping: float = 0.01
) -> Calibrated:
    """Check and prepare a matrix; without row weights all rows weigh the same."""
    weight = weight.detach().float()
    check_weight(weight, name)
    if row_weights is None:
        row_weights = torch.ones_like(weight[:, 0])
    check_matrix(row_weights[None], name, "Lower the learning rates: the loss's gradients are not finite.")
    return Calibrated(weight, factorize(hessian, damping, name=name), row_weights.float())


def damp_rows(row_weights: Tensor) -> Tensor:
    """Add a little to all row weights: rows that calibration did not move are not free."""
    return (row_weights + ROW_DAMPING * row_weights.mean()).clamp_min(1e-30)


class RelativeSteps(NamedTuple):
    """The steps of a matrix up to a factor that all matrices of a model share."""

    log_rows: Tensor  # (rows,) float32, base 2, multiples of row_step_unit: few values, which cost little
    column_steps: Tensor  # (cols,) int8


def row_step_unit(num_cols: int) -> float:
    """Return the octaves, a power of two, between the steps that rows of so many columns may have.

    Steps off by up to u / 2 octaves waste about 0.058 u^2 bits a weight; naming them takes log2(1 / u) bits
    a row more. Both together are least at u = 3.5 / sqrt(num_cols).
    """
    return 2.0 ** -round(math.log2(math.sqrt(max(num_cols, 1)) / 3.5))


def water_fill(matrices: dict[str, Calibrated]) -> dict[str, RelativeSteps]:
    """Lay out the steps of a whole model for entropy-coded weights.

    The loss rises by about sum_ij step_ij^2 g_i d_j / 24, with g_i = row_weights and d_j = 1 / U_jj^2, and
    bits fall by log2 of the steps. At equal bits the least loss has step_ij ~ (g_i d_j)^(-1/2), over all
    rows, columns and matrices at once. matrix=0 keeps a matrix's mean step in proportion to its deviation,
    as the contest's SDClip does. In the median matrix step and deviation have the same geometric mean.
    Measured in dev/LOG.md, "water-filled steps".
    """
    steps, levels = {}, []
    for name, (weight, factor, row_weights) in matrices.items():
        log_columns = torch.empty_like(factor.upper[0])
        log_columns[factor.order] = torch.log2(factor.upper.diagonal())
        level = log_columns[~factor.dead].mean().nan_to_num(0.0)
        log_columns = torch.where(factor.dead, level, log_columns)
        log_rows = -0.5 * torch.log2(damp_rows(row_weights))
        deviation = torch.log2(weight.std().nan_to_num(0.0).clamp_min(SMALLEST_SCALE))
        sensitivity = level + log_rows.mean()
        mean = 0.75 * sensitivity + 0.25 * deviation
        column_steps = torch.round(6.8 * (log_columns - level)).clamp_(-128, 127)
        log_rows = mean + 0.5 * (log_rows - log_rows.mean())
        steps[name] = RelativeSteps(log_rows, column_steps.to(torch.int8))
        levels.append(float(mean - deviation))
    middle = statistics.median(levels)
    for name, (log_rows, column_steps) in steps.items():
        unit = row_step_unit(len(column_steps))
        steps[name] = RelativeSteps(torch.round((log_rows - middle) / unit) * unit, column_steps)
    return steps


def rd_gptq(matrix: Calibrated, relative: RelativeSteps, step: float) -> Quantized:
    """Quantize a matrix with water-filled steps times `step`, the one knob of a model's rate.

    rate_weight times the slope of error against rate, ln(2) / 6 * (step^2 g d), is the price of a bit in
    rounding; 0 rounds to the nearest code, which measured best (dev/LOG.md, "rate-aware rounding").
    """
    weight, factor, row_weights = matrix
    scales = (step * torch.exp2(relative.log_rows)).clamp(SMALLEST_SCALE, 65504.0).half()[:, None]
    steps = element_steps(scales, relative.column_steps, weight.shape[1])
    limits = torch.full((weight.shape[1],), 511.0, device=weight.device)
    codes = solve_or_round(weight, factor, steps, limits)
    return Quantized(as_codes(codes), scales, relative.column_steps)


# quantizers/rate.py


class RateFit(NamedTuple):
    """Where rate control ended."""

    knob: float
    size_bytes: int
    num_evals: int


def fit_rate(size_of: Callable[[float], int]) -> RateFit:
    """Find the knob whose size is the largest within [(1 - slack), 1] of target_bytes.

    size_of falls as the knob grows; sizes are nearly linear in its logarithm, so false position (with
    halved ends, the Illinois rule) needs few evaluations. A low end that fits already is returned: there
    are bytes left over and nothing to spend them on. A high end that does not fit is an error.
    """
    left, right = (math.log(0.1), math.log(8.0))
    over, under = (size_of(0.1) - 997501.0, size_of(8.0) - 997501.0)
    if over + 997501.0 <= 998000:
        return RateFit(0.1, round(over + 997501.0), 2)
    if under + 997501.0 > 998000:
        raise UserError(
            f"expected at most {998000:,} bytes, found {round(under + 997501.0):,} at the coarsest "
            f"setting {8.0:g}: {round(under + 997501.0 - 998000):,} over. Raise "
            "quant.target_bytes, widen the range of the knob or make the model smaller."
        )
    best = RateFit(8.0, round(under + 997501.0), 2)
    last_side = 0
    for num_evals in range(3, 20):
        if best.size_bytes >= 997002.0:
            break
        middle = left + (right - left) * over / (over - under)
        knob = math.exp(middle)
        size = size_of(knob)
        side = 1 if size > 998000 else -1
        if side > 0:
            left, over = (middle, size - 997501.0)
            under /= 2 if last_side == side else 1
        else:
            right, under = (middle, size - 997501.0)
            over /= 2 if last_side == side else 1
            best = max(best, RateFit(knob, size, num_evals), key=lambda fit: fit.size_bytes)
        last_side = side
    return best


# quantizers/methods.py


def quantize_matrices(
    matrices: dict[str, Calibrated], size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Quantize every matrix by quant.method; size_of weighs a result where there is a target of bytes."""
    return fill_matrices(matrices, size_of)


def fill_matrices(matrices: dict[str, Calibrated], size_of: Callable[[dict], int]) -> dict[str, Quantized]:
    """Quantize with water-filled steps, as fine as the byte target allows."""
    steps = water_fill(matrices)

    def filled(step: float) -> dict[str, Quantized]:
        return {name: rd_gptq(matrix, steps[name], step) for name, matrix in matrices.items()}

    return filled(fit_rate(lambda step: size_of(filled(step))).knob)


# quantizers/storage.py: Tensors as an artifact's streams: which streams a tensor's elements lie in, written
# and read by one table.

# Elements that a file of so many bytes may hold: a lane of rANS, 4 bytes, codes 16,384 equal weights.
LARGEST_NUMEL, NUMEL_A_BYTE = (16777216, 4096)

# Raw streams, in file order, and the numpy dtype of their elements.
STREAM_DTYPES = {
    "codes": np.dtype("i1"),
    "scales": np.dtype("<f2"),
    "columns": np.dtype("i1"),
    "halves": np.dtype("<f2"),
    "floats": np.dtype("<f4"),
}

# The parts of a tensor by storage: (stream, shape of its elements in it).
STORAGE_PARTS: dict[str, Callable[[list[int]], list[tuple[str, list[int]]]]] = {
    "rows": lambda shape: [("codes", shape), ("scales", shape[:1])],
    "steps": lambda shape: [("codes", shape), ("scales", shape[:1]), ("columns", shape[1:])],
    "float16": lambda shape: [("halves", shape)],
    "float32": lambda shape: [("floats", shape)],
}


class TensorRow(NamedTuple):
    """A row of the artifact's tensor table."""

    name: str
    shape: list[int]
    storage: str  # rows (codes and scales) | steps (column steps too) | float16 | float32


def pack_tensors(
    table: tuple[TensorRow, ...], quantized: dict[str, Quantized], weights: dict[str, Tensor]
) -> dict[str, bytes]:
    """Lay out a table's tensors as streams; refuses weights that are not finite."""
    raw: dict[str, list[np.ndarray]] = {name: [] for name in STREAM_DTYPES}
    for row in table:
        if row.name in quantized:
            codes, scales, columns, _ = quantized[row.name]
            pieces = {"codes": codes, "scales": scales, "columns": columns}
        else:
            weight = weights[row.name].detach()
            if not torch.isfinite(weight).all():
                raise UserError(f"{row.name} is not finite: the run diverged. Lower the learning rates.")
            pieces = {"halves": weight.half(), "floats": weight.float()}
        for stream, _ in STORAGE_PARTS[row.storage](row.shape):
            raw[stream].append(pieces[stream].cpu().numpy())
    streams = {
        name: b"".join(part.astype(dtype).tobytes() for part in raw[name])
        for name, dtype in STREAM_DTYPES.items()
    }
    streams["codes"] = encode_codes(raw["codes"])
    streams["scales"] = encode_halves([part.ravel() for part in raw["scales"]])
    return streams


# formats/artifact.py


class Stream(NamedTuple):
    """A compressed stream and the length it must have when decompressed."""

    stored: bytes
    raw_bytes: int


# quantizers/storage.py


def take_streams(streams: dict[str, Stream], limits: dict[str, int]) -> dict[str, bytes]:
    """Take out and decompress the streams that have limits; longer ones are refused before that."""
    found = {name: stream.raw_bytes for name, stream in streams.items() if name in limits}
    if len(found) != len(limits) or any(found[name] > limits[name] for name in limits):
        raise ArtifactError(f"artifact: expected streams of at most {limits} bytes, found {found}.")
    return {name: decompress(streams.pop(name), "best") for name in limits}


def read_pieces(streams: dict[str, Stream], shapes: dict[str, list]) -> dict[str, list]:
    """Decompress the streams and cut them into arrays of so many elements; refuses other lengths."""
    sizes = {name: [math.prod(shape) for shape in shapes[name]] for name in STREAM_DTYPES}
    pieces = {}
    limits = {"codes": largest_stream(shapes["codes"]), "scales": largest_halves(sizes["scales"])}
    raw = take_streams(streams, limits)
    pieces["codes"] = decode_codes(raw["codes"], shapes["codes"])
    pieces["scales"] = decode_halves(raw["scales"], sizes["scales"])
    lengths = {
        name: sum(sizes[name]) * dtype.itemsize for name, dtype in STREAM_DTYPES.items() if name not in pieces
    }
    raw = take_streams(streams, lengths)
    if streams or any(len(raw[name]) < lengths[name] for name in raw):
        raise ArtifactError(f"artifact: expected streams of {lengths} bytes, found others.")
    for name, elements in raw.items():
        pieces[name] = np.split(np.frombuffer(elements, STREAM_DTYPES[name]), np.cumsum(sizes[name])[:-1])
    return pieces


def unpack_tensors(streams: dict[str, Stream], table: tuple[TensorRow, ...]) -> dict[str, Tensor]:
    """Cut a table's tensors out of their streams, put them together and dequantize them."""
    parts = [(row.name, STORAGE_PARTS[row.storage](row.shape)) for row in table]
    shapes = {
        name: [shape for _, places in parts for stream, shape in places if stream == name]
        for name in STREAM_DTYPES
    }
    left = {name: iter(pieces) for name, pieces in read_pieces(streams, shapes).items()}
    found = {}
    for name, places in parts:
        pieces = {stream: torch.from_numpy(next(left[stream]).copy()).view(shape) for stream, shape in places}
        found[name] = restore_tensor(**pieces)
    return {
        name: dequantize(part) if isinstance(part, Quantized) else part.float()
        for name, part in found.items()
    }


def restore_tensor(codes=None, scales=None, columns=None, halves=None, floats=None) -> Quantized | Tensor:
    """Put together one tensor from the pieces that its storage keeps."""
    if codes is not None:
        return Quantized(codes, scales[:, None], columns)
    return halves if halves is not None else floats


def check_numel(table: tuple[TensorRow, ...], num_bytes: int, path: Path) -> None:
    """Refuse a table of more elements than a file of so many bytes can hold."""
    numel = sum(math.prod(row.shape) for row in table)
    if numel > LARGEST_NUMEL + NUMEL_A_BYTE * num_bytes:
        raise ArtifactError(
            f"{path}: its {num_bytes:,} bytes cannot hold the {numel:,} weights of its recipe."
        )


# train_gpt.py


@lru_cache(maxsize=2)
def tensor_table(cfg: Config) -> tuple[TensorRow, ...]:
    """List the tensors that a recipe's model has, and factors after repaired ones, without making them."""
    with torch.device("meta"):
        named = list(GPT(cfg.model, 2048).named_parameters())
    rules, quant = match_rules(cfg, [name for name, _ in named]), cfg.quant
    kept = [pattern for pattern in "".split(",") if pattern]
    rows = []
    for name, param in named:
        is_kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in kept)
        quantized = "float16" if is_kept or param.numel() <= 0 else "steps"
        storage = "float32" if rules[name].storage == "float32" else quantized
        rows.append(TensorRow(name, list(param.shape), storage))
    return tuple(rows)


def quantized_names(cfg: Config) -> dict[str, str]:
    """Map every quantized parameter to its storage, matrix or embed, in parameter order."""
    table = tensor_table(cfg)
    rules = match_rules(cfg, [row.name for row in table])
    return {row.name: rules[row.name].storage for row in table if row.storage in ("rows", "steps")}


def calibrated_matrices(model: GPT, cfg: Config, moments: dict[str, Moments]) -> dict[str, Calibrated]:
    """Put weights and their statistics together; a tied embedding has two roles. Rounding needs none."""
    params, matrices = dict(model.named_parameters()), {}
    for name in quantized_names(cfg):
        kept = moments[name]
        roles = kept.hessian, kept.row_weights
        if name == "embed.weight" and "readout" in moments:
            roles = combine_roles(moments["readout"], kept)
        matrices[name] = calibrate(name, params[name], *roles, 0.01)
    return matrices


def quantize_model(
    model: GPT, cfg: Config, moments: dict[str, Moments], size_of: Callable[[dict], int]
) -> dict[str, Quantized]:
    """Quantize every matrix as cfg.quant says; size_of weighs the code and the artifact of a result."""
    matrices = calibrated_matrices(model, cfg, moments)
    return quantize_matrices(matrices, size_of)


# ----------------------------------------------------------------------------------------------------------
# 10 artifact
# ----------------------------------------------------------------------------------------------------------
# formats/artifact.py owns the file, quantizers/storage.py the streams of its tensors; here is what goes into
# it: what the recipe changes, the tokenizer's sha256, the tensors in parameter order, the scorer's aids.


# formats/artifact.py: The artifact file: a frame of checked lengths around a JSON header and compressed
# streams. No pickle.

ARTIFACT_MAGIC = b"PGOLF\n"
ARTIFACT_VERSION = 2
ARTIFACT_PREFIX = struct.Struct("<6sHII")  # magic, version, header bytes stored, header bytes raw
CHECKSUM_BYTES = 16
LARGEST_FILE = 1 << 30  # bytes: far beyond any model of the contest
MAX_HEADER_BYTES = 1048576
MAX_STREAM_BYTES = 1 << 32
PLANES, MOST_PLANES = ((0, 1, 2), 1048576)  # logarithms of widths tried, on streams below so many bytes

# Codes of weights have no context that literals or positions could tell.
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


class ArtifactError(UserError):
    """An artifact that is not whole, not ours, or contradicts itself."""


def require_codec() -> None:
    """Raise before any work is done when the artifact's compressor is not installed."""
    for package in CODEC_PACKAGES.get("best", ()):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"quant.codec=best: the package {package} is missing. Install it or set quant.codec=lzma."
            )


def keep_stream(raw: bytes) -> bytes:
    """Store as it is: a stream that is coded already."""
    return raw


def cut_stream(stored: bytes, limit: int) -> bytes:
    """Return at most `limit` bytes of what was stored as it is."""
    return stored[:limit]


def compress_zlib(raw: bytes) -> bytes:
    """Compress with zlib."""
    return zlib.compress(raw, level=9)


def decompress_zlib(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes."""
    return zlib.decompressobj().decompress(stored, limit)


def compress_lzma(raw: bytes) -> bytes:
    """Compress with raw LZMA2: no container, no check value."""
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def decompress_lzma(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes."""
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(stored, limit)


def compress_zstd(raw: bytes) -> bytes:
    """Compress with zstd at its highest level."""
    import zstandard

    return zstandard.ZstdCompressor(level=22, write_content_size=False).compress(raw)


def decompress_zstd(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes; a stream reader, because a frame may declare any size."""
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(stored).read(limit)


def compress_brotli(raw: bytes) -> bytes:
    """Compress with brotli at its highest quality."""
    import brotli

    return brotli.compress(raw, quality=11, lgwin=24)


def decompress_brotli(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes, a buffer at a time."""
    import brotli

    decoder = brotli.Decompressor()
    raw = piece = decoder.process(stored, output_buffer_limit=limit)
    while piece and len(raw) < limit and not decoder.is_finished():
        piece = decoder.process(b"", output_buffer_limit=limit - len(raw))
        raw += piece
    return raw[:limit]


def to_planes(raw: bytes, width: int) -> bytes:
    """Sort the bytes of elements of so many bytes: all first ones, all second ones, ..."""
    return b"".join(raw[place::width] for place in range(width))


def from_planes(planes: bytes, width: int) -> bytes:
    """Undo to_planes; bytes that are no whole elements come back as they are."""
    if len(planes) % width:
        return planes
    raw, length = bytearray(len(planes)), len(planes) // width
    for place in range(width):
        raw[place::width] = planes[place * length : (place + 1) * length]
    return bytes(raw)


def compress_best(raw: bytes) -> bytes:
    """Compress with the plain codec of the fewest bytes; the first byte holds its place in PLAIN_CODECS.

    Its upper half is the logarithm of the width of byte planes, which floats are sorted into. What zlib
    cannot shrink by a thousandth either way is coded already: the slow codecs are spared.
    """
    widths = [log for log in PLANES if len(raw) % (1 << log) == 0 and (log == 0 or len(raw) < MOST_PLANES)]
    forms = {log: to_planes(raw, 1 << log) for log in widths}
    is_coded = min(len(zlib.compress(form, 1)) for form in forms.values()) > 0.999 * len(raw)
    if is_coded:
        return b"\0" + raw
    packers = [pack for pack, _ in PLAIN_CODECS.values()]
    return min(
        (
            bytes([log << 4 | place]) + pack(form)
            for log, form in forms.items()
            for place, pack in enumerate(packers)
        ),
        key=len,
    )


def decompress_best(stored: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes as the first byte says."""
    log, place = divmod(stored[0], 16)
    return from_planes(list(PLAIN_CODECS.values())[place][1](stored[1:], limit), 1 << log)


# The order is part of the file format.
PLAIN_CODECS = {
    "none": (keep_stream, cut_stream),
    "zlib": (compress_zlib, decompress_zlib),
    "lzma": (compress_lzma, decompress_lzma),
    "zstd": (compress_zstd, decompress_zstd),
    "brotli": (compress_brotli, decompress_brotli),
}
STREAM_CODECS = PLAIN_CODECS | {"best": (compress_best, decompress_best)}
CODEC_PACKAGES = {"zstd": ("zstandard",), "brotli": ("brotli",), "best": ("zstandard", "brotli")}


def compress(raw: bytes) -> bytes:
    """Compress one stream as small as its codec can."""
    return (compress_best, decompress_best)[0](raw)


def decompress(stream: Stream, codec: str) -> bytes:
    """Decompress one stream to exactly its raw length; never holds more than a byte beyond it."""
    try:
        raw = STREAM_CODECS[codec][1](stream.stored, stream.raw_bytes + 1)
    except Exception as error:  # each library has its own exception for damaged input
        raise ArtifactError(f"artifact: a {codec} stream is damaged ({error}).") from error
    if len(raw) != stream.raw_bytes:
        raise ArtifactError(
            f"artifact: expected a {codec} stream of {stream.raw_bytes} bytes, found {len(raw)} or more."
        )
    return raw


def pack_artifact(header: dict, streams: dict[str, bytes]) -> tuple[bytes, list[tuple[str, int]]]:
    """Return the file's bytes and its ledger [(part, bytes)], whose sum is the file's size."""
    stored = {name: compress(raw) for name, raw in streams.items()}
    table = [[name, len(stored[name]), len(raw)] for name, raw in streams.items()]
    raw_header = json.dumps(header | {"streams": table}, separators=(",", ":")).encode()
    packed_header = zlib.compress(raw_header, 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed_header), len(raw_header))
    body = prefix + packed_header + b"".join(stored.values())
    frame = ("container and recipe", len(prefix) + len(packed_header) + CHECKSUM_BYTES)
    parts = [frame, *((f"weights: {name}", len(data)) for name, data in stored.items())]
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES], parts


def read_artifact(path: Path) -> tuple[dict, dict[str, Stream]]:
    """Read an artifact file: its header and its streams, still compressed."""
    if not path.is_file():
        raise UserError(f"{path}: no such artifact. Train one with `make run` or train_gpt.py.")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ArtifactError(f"{path}: expected at most {LARGEST_FILE:,} bytes, found {size:,}.")
    return unpack_artifact(path.read_bytes(), path)


def unpack_artifact(blob: bytes, path: Path) -> tuple[dict, dict[str, Stream]]:
    """Check a file's frame; returns its header and its streams, still compressed."""
    again = "Copy it again or retrain."
    smallest = ARTIFACT_PREFIX.size + CHECKSUM_BYTES
    if len(blob) < smallest:
        raise ArtifactError(f"{path}: an artifact has at least {smallest} bytes, found {len(blob)}. {again}")
    magic, version, stored_bytes, raw_bytes = ARTIFACT_PREFIX.unpack_from(blob)
    if (magic, version) != (ARTIFACT_MAGIC, ARTIFACT_VERSION):
        raise ArtifactError(f"{path}: expected an artifact of version 2, found {magic!r} {version}.")
    body = blob[:-16]
    if hashlib.sha256(body).digest()[:CHECKSUM_BYTES] != blob[-16:]:
        raise ArtifactError(f"{path}: the checksum does not match; the file is truncated or damaged. {again}")
    offset = ARTIFACT_PREFIX.size + stored_bytes
    if offset > len(body) or raw_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path}: the header's length {stored_bytes} does not fit the file. {again}")
    packed_header = Stream(body[ARTIFACT_PREFIX.size : offset], raw_bytes)
    try:
        header = json.loads(decompress(packed_header, "zlib"))
        table = [(str(name), int(stored), int(raw)) for name, stored, raw in header["streams"]]
        recipe_is_table = all(isinstance(section, dict) for section in header["recipe"].values())
        if not (recipe_is_table and isinstance(header["tokenizer_sha256"], str)):
            raise TypeError("recipe or tokenizer_sha256")
        if not isinstance(header["tensors"], list):
            raise TypeError("tensors")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path}: the header cannot be read ({error!r}). {again}") from error
    sane = all(stored >= 0 and 0 <= raw <= MAX_STREAM_BYTES for _, stored, raw in table)
    if not sane or sum(stored for _, stored, _ in table) != len(body) - offset:
        raise ArtifactError(f"{path}: the stream table {table[:8]} does not fit the file. {again}")
    streams = {}
    for name, stored, raw in table:
        streams[name] = Stream(body[offset : offset + stored], raw)
        offset += stored
    return header, streams


# formats/codes.py: Entropy coding of integer weight codes: interleaved rANS over tables that follow from a
# few integers.

TABLE_BITS = 14  # the frequencies of a table add up to 2^14: more would waste states of 32 bits
STATE_FLOOR = 65536  # states live in [2^16, 2^32)
CODES_A_LANE = 16384  # a lane costs two bytes and shortens the loop
CENTER, ESCAPE, NUM_SYMBOLS = 127, 255, 256  # symbols stand for -127 .. 127 from the center, and the escape
NUM_CLASSES = 88  # class k has spread 2^((k - 20) / 8): 0.18 to 330 codes
MAX_TAIL, MAX_LEARN = 7, 16
FIRST_PART, MOST_PART = (1024, 32768)  # codes between two drawings of tables that learn
CLASS_BELL = 2  # tail of the tables of classes and parameters
PARAMETER_CLASS = 28
LOW_BITS = 6  # of a float16: the last bits of the fraction, as good as noise


class Bell(NamedTuple):
    """What the tables of one matrix have in common, and its classes' own spread."""

    center: int = 0
    step: int = 1  # codes are center + step * symbol, modulo 2^16
    low: int = -31  # symbols low .. high have a place in the tables
    high: int = 31
    tail: int = 5  # weight of k: (1 + k^2 / (2 spread^2 2^tail))^-(2^tail); MAX_TAIL is nearly Gauss's
    zero: int = 8  # weight of the center in eighths
    base: int = 30
    column_class: int = 0  # class whose table codes the column classes
    row_class: int = 0  # of the row classes
    lag_class: int = 0  # of the lags
    learn: int = 0  # tables learn from what they coded: the bell weighs 2^learn codes; 0: they stay


CLASS_TABLES = Bell(low=-127, high=127, tail=CLASS_BELL)


def bell_tables(bell: Bell, classes: np.ndarray) -> np.ndarray:
    """Return the frequencies (classes, NUM_SYMBOLS) uint32 of a bell at some spread classes."""
    steps = np.arange(-127, 129)
    # 64 * 2 spread^2 2^tail = 2^(class / 4 + 2 + tail): two integer square roots of a power of two.
    scale = np.array([isqrt(isqrt(1 << (int(k) + 8 + 4 * bell.tail))) for k in classes], np.uint64)[:, None]
    weights = (scale << np.uint64(32)) // (scale + (64 * steps * steps).astype(np.uint64))
    for _ in range(bell.tail):
        weights = np.minimum(weights, np.uint64(0xFFFFFFFF)) ** 2 >> np.uint64(32)
    weights[:, CENTER] = bell.zero << 29
    weights[:, (steps < bell.low) | (steps > bell.high)] = 0
    return as_frequencies(weights)


def as_frequencies(weights: np.ndarray) -> np.ndarray:
    """Return frequencies (classes, NUM_SYMBOLS) uint32 in proportion to uint64 weights; 1 is the escape's."""
    weights[:, ESCAPE] = 0
    room = np.uint64((1 << TABLE_BITS) - 1)
    tables = (weights * room // np.maximum(weights.sum(1, keepdims=True), 1)).astype(np.uint32)
    tables[:, ESCAPE] = 1
    rest = np.uint32(1 << TABLE_BITS) - tables.sum(1, dtype=np.uint32)
    tables[np.arange(len(tables)), tables.argmax(1)] += rest
    return tables


def symbols_of(values: np.ndarray) -> np.ndarray:
    """Map int16 values to symbols; what lies beyond them all is an escape."""
    return np.where(np.abs(values.astype(np.int32)) <= CENTER, values + CENTER, ESCAPE).astype(np.uint8)


class LearningTables:
    """The tables of a matrix: bells that count the codes which they have coded."""

    def __init__(self, bells: np.ndarray, learn: int):
        self.bells, self.learn = bells, learn
        self.counts = np.zeros(bells.shape, np.uint64)

    def parts(self, size: int) -> list[slice]:
        """Cut so many codes where the tables are drawn anew: at powers of two, then at equal distances."""
        if not self.learn:
            return [slice(0, size)]
        powers = (FIRST_PART << k for k in range((32).bit_length() - 1))
        ends = [end for end in (*powers, *range(MOST_PART, size, MOST_PART)) if end < size]
        return [slice(first, last) for first, last in zip([0, *ends], [*ends, size])]

    def draw(self) -> np.ndarray:
        """Return the frequencies (classes, NUM_SYMBOLS) for the next part."""
        if not self.learn:
            return self.bells
        bells = self.bells.astype(np.uint64) << np.uint64(self.learn)
        return as_frequencies(bells + (self.counts << np.uint64(TABLE_BITS)))

    def count(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Count values int16 and the tables that coded them, (classes, NUM_SYMBOLS) uint64."""
        entries = rows.astype(np.intp) * NUM_SYMBOLS + symbols_of(values)
        counts = np.bincount(entries, minlength=self.counts.size)
        return counts.reshape(self.counts.shape).astype(np.uint64)


def num_lanes(shapes: Sequence[tuple[int, int]]) -> int:
    """Return how many states take turns over all codes of these matrices."""
    return 1 + sum(rows * cols for rows, cols in shapes) // CODES_A_LANE


def largest_stream(shapes: Sequence[tuple[int, int]]) -> int:
    """Return the bytes that no stream of these matrices exceeds: to check before it is decompressed."""
    symbols = sum(rows * cols + cols + 2 * rows + len(Bell._fields) for rows, cols in shapes)
    return 4 * (symbols + num_lanes(shapes))  # an escape costs at most 14 bits and a word


class CodeReader:
    """Decode symbols from a stream, step by step over all lanes."""

    def __init__(self, blob: bytes, lanes: int):
        if len(blob) % 2 or len(blob) < 4 * lanes:
            raise ArtifactError(f"artifact: expected codes in {lanes} lanes, found {len(blob)} bytes.")
        self.words = np.frombuffer(blob, "<u2")
        self.states = np.frombuffer(blob, "<u4", lanes).astype(np.uint32)
        self.first, self.last = 2 * lanes, len(self.words)

    def take(self, count: int) -> slice:
        """Claim words from the front, or from the back where `count` is negative."""
        self.first, self.last = self.first + max(count, 0), self.last + min(count, 0)
        if self.first > self.last:
            raise ArtifactError("artifact: the codes end too early.")
        return slice(self.first - count, self.first) if count >= 0 else slice(self.last, self.last - count)

    def read(self, tables: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the values int16, as many as there are `rows`: which table codes each."""
        starts = (np.cumsum(tables, 1, dtype=np.uint32) - tables).ravel()
        symbol_of = np.repeat(np.tile(np.arange(NUM_SYMBOLS, dtype=np.uint8), len(tables)), tables.ravel())
        frequency_of, lanes = tables.ravel(), len(self.states)
        symbols = np.empty(len(rows), np.uint8)
        for begin in range(0, len(rows), lanes):
            row = rows[begin : begin + lanes].astype(np.intp)
            states = self.states[: len(row)]
            slots = states & ((1 << TABLE_BITS) - 1)
            symbol = symbol_of[(row << TABLE_BITS) + slots]
            symbols[begin : begin + lanes] = symbol
            entry = row * NUM_SYMBOLS + symbol
            states = frequency_of[entry] * (states >> TABLE_BITS) + slots - starts[entry]
            hungry = np.flatnonzero(states < STATE_FLOOR)
            states[hungry] = states[hungry] << 16 | self.words[self.take(len(hungry))]
            self.states[: len(row)] = states
        values = symbols.astype(np.int16) - CENTER
        escaped = np.flatnonzero(symbols == ESCAPE)
        if len(escaped):
            values[escaped] = self.words[self.take(-len(escaped))][::-1].astype(np.int16)
        return values

    def read_learning(self, rows: np.ndarray, bells: np.ndarray, learn: int) -> np.ndarray:
        """Return the values int16, as many as there are `rows`, of bells that learn."""
        tables, values = LearningTables(bells, learn), np.empty(len(rows), np.int16)
        for part in tables.parts(len(rows)):
            values[part] = self.read(tables.draw(), rows[part])
            tables.counts += tables.count(rows[part], values[part])
        return values

    def finish(self) -> None:
        """Check that the stream ends where the codes do: the states are as the encoder found them."""
        if self.first != self.last or (self.states != STATE_FLOOR).any():
            raise ArtifactError("artifact: the codes do not end where their stream does; it is damaged.")


def decode_codes(blob: bytes, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return the int16 matrices that encode_codes was given; the caller vouches for the shapes.

    Raises ArtifactError where the stream does not fit them. The stream has no checksum of its own: damage
    that the final states miss gives other codes of the same shapes.
    """
    reader = CodeReader(blob, num_lanes(shapes))
    count = len(shapes) * len(Bell._fields)
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    changes = reader.read(table, np.zeros(count, np.uint8)).reshape(-1, len(Bell._fields))
    matrices = []
    for (rows, cols), fields in zip(shapes, np.cumsum([Bell(), *changes], 0, np.int16)[1:], strict=True):
        bell = check_bell(Bell(*fields.tolist()))
        sides = reader.read(*side_tables(bell, rows, cols))
        column_classes, row_classes, lags = np.split(sides, [cols, cols + rows])
        values = reader.read_learning(*element_tables(bell, row_classes, column_classes), bell.learn)
        values = add_lagged(values.reshape(rows, cols), lags)
        matrices.append(values * np.int16(bell.step) + np.int16(bell.center))
    reader.finish()
    return matrices


def check_bell(bell: Bell) -> Bell:
    """Raise ArtifactError unless the parameters are within what the tables allow."""
    classes = (bell.base, bell.column_class, bell.row_class, bell.lag_class)
    spread = (
        bell.low <= 0 <= bell.high
        and 0 <= bell.tail <= MAX_TAIL
        and 0 <= bell.zero <= 255
        and 0 <= bell.learn <= MAX_LEARN
    )
    if not spread or not all(0 <= k < NUM_CLASSES for k in classes):
        raise ArtifactError(f"artifact: {bell} describes no table of codes.")
    return bell


def add_lagged(values: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Add to each row, in place and from the top, the row that is its lag above; lag 0 is none."""
    if ((lags < 0) | (lags > np.arange(len(lags)))).any():
        raise ArtifactError("artifact: a row of codes builds on a row that does not come before it.")
    for row in np.flatnonzero(lags):
        values[row] += values[row - lags[row]]
    return values


def side_tables(bell: Bell, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of column classes, row classes and lags, and which one codes each of them."""
    tables = bell_tables(CLASS_TABLES, np.array([bell.column_class, bell.row_class, bell.lag_class]))
    return tables, np.repeat(np.arange(3, dtype=np.uint8), [cols, rows, rows])


def element_tables(bell: Bell, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which table codes each element, flat uint8, and the tables of all classes in use."""
    classes = np.clip(bell.base + rows[:, None].astype(np.int32) + cols, 0, 87).astype(np.uint8)
    used = np.flatnonzero(np.bincount(classes.ravel(), minlength=NUM_CLASSES))
    index = np.zeros(NUM_CLASSES, np.uint8)
    index[used] = np.arange(len(used))
    return index[classes.ravel()], bell_tables(bell, used)


def largest_halves(sizes: Sequence[int]) -> int:
    """Return the bytes that no stream of these vectors exceeds."""
    return 2 + largest_stream([(1, size) for size in (*sizes, sum(sizes))])


def decode_halves(blob: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the float16 vectors that encode_halves was given, as many elements as `sizes` says.

    The first two bytes say how many different values there are: then follow, as codes, the rank of each
    element and the differences of the sorted values; or 0: then the high bits by vector and all low bits.
    Raises ArtifactError like decode_codes.
    """
    known = int.from_bytes(blob[:2], "little")
    if known > sum(sizes):
        raise ArtifactError(f"artifact: expected at most {sum(sizes)} different scales, found {known}.")
    *vectors, rest = decode_codes(blob[2:], [(1, size) for size in (*sizes, known or sum(sizes))])
    whole = np.concatenate([np.empty((1, 0), np.int16), *vectors], 1)[0]
    if known and whole.size and not 0 <= whole.min() <= whole.max() < known:
        raise ArtifactError(f"artifact: a scale's rank lies outside its list of {known}.")
    halves = np.cumsum(rest[0], dtype=np.int16)[whole] if known else whole << LOW_BITS | rest[0]
    return np.split(halves.view(np.float16), np.cumsum(sizes)[:-1]) if sizes else []


# formats/codes_encode.py: The encoder of formats/codes.py: chooses classes and bells by total bits, then
# writes the stream.

ALL_CLASSES = np.arange(NUM_CLASSES)
TAILS = range(1, 8)
ZEROS = (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 48, 128)
FIT_ROUNDS = 2
LEARNS = (0, 4, 6, 8, 10, 12)
MAX_LAG = 8
ALIKE = 0.7  # of its size; rows that share no part differ by 1.0 (binary) to 1.4 (bell) of it
OFFSETS = np.arange(-40, 41)
FIRST_SIDE = 12
BIT = 256  # costs are whole numbers of 1/256 bit: sums are exact on every platform
ESCAPE_BITS = 16


def table_costs(tables: np.ndarray) -> np.ndarray:
    """Return what each symbol costs, (tables, NUM_SYMBOLS) float64 holding whole 1/BIT bits."""
    bits = TABLE_BITS - np.log2(np.maximum(tables, 1))
    bits = np.where(tables > 0, bits, bits[:, ESCAPE:] + ESCAPE_BITS)
    bits[:, ESCAPE] += ESCAPE_BITS
    return np.rint(BIT * bits)


class CodeWriter:
    """Collect symbols in reading order; rANS writes them last to first."""

    def __init__(self):
        self.chunks: list[tuple[np.ndarray, np.ndarray]] = []  # frequency and start of each symbol, uint16
        self.escapes: list[np.ndarray] = []

    def write(self, tables: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        """Add int16 values, `rows` naming the table of each."""
        entry = rows.astype(np.intp) * NUM_SYMBOLS
        plain = symbols_of(values)
        symbols = np.where(tables.ravel()[entry + plain] > 0, plain, ESCAPE)
        self.escapes.append(values[symbols == ESCAPE])
        starts = np.cumsum(tables, 1, dtype=np.uint32) - tables
        self.chunks.append(
            tuple(part.ravel().astype(np.uint16)[entry + symbols] for part in (tables, starts))
        )

    def write_learning(self, rows: np.ndarray, bells: np.ndarray, values: np.ndarray, learn: int) -> None:
        """Add values of bells that learn; CodeReader.read_learning reads them."""
        tables = LearningTables(bells, learn)
        for part in tables.parts(len(rows)):
            self.write(tables.draw(), rows[part], values[part])
            tables.counts += tables.count(rows[part], values[part])

    def finish(self, lanes: int) -> bytes:
        """Return the stream."""
        states = np.full(lanes, STATE_FLOOR, np.uint64)
        words = []
        for frequencies, starts in reversed(self.chunks):
            for begin in range((len(starts) - 1) // lanes * lanes, -1, -lanes):
                frequency = frequencies[begin : begin + lanes].astype(np.uint64)
                state = states[: len(frequency)]
                full = np.flatnonzero(state >= frequency << np.uint64(18))
                words.append(state[full].astype("<u2"))
                state[full] >>= np.uint64(16)
                quotient, rest = np.divmod(state, frequency)
                state[:] = (quotient << np.uint64(TABLE_BITS)) + rest + starts[begin : begin + lanes]
        escapes = np.concatenate([np.empty(0, np.int16), *self.escapes])[::-1].astype("<i2")
        return b"".join([states.astype("<u4").tobytes(), *map(bytes, reversed(words)), escapes.tobytes()])


@cache
def class_costs() -> np.ndarray:
    """Return what each symbol costs in the tables that code classes, (NUM_CLASSES, NUM_SYMBOLS)."""
    return table_costs(bell_tables(CLASS_TABLES, ALL_CLASSES))


def side_class(offsets: np.ndarray) -> int:
    """Return the class whose table codes these class offsets in the fewest bits."""
    return int((class_costs() @ np.bincount(symbols_of(offsets), minlength=NUM_SYMBOLS)).argmin())


def choose_offsets(symbols: np.ndarray, crossing: np.ndarray, costs: np.ndarray, side: int) -> np.ndarray:
    """Return the class offset of each row of `symbols` that costs least, its own name included.

    crossing: the class of each column; costs: (NUM_CLASSES, NUM_SYMBOLS); side: the class of offsets.
    """
    classes, index = np.unique(crossing, return_inverse=True)
    total = np.repeat(class_costs()[[side]][:, symbols_of(OFFSETS)], len(symbols), 0)
    low, high = int(symbols.min()), int(symbols.max()) + 1
    lines = np.arange(len(symbols))[:, None] * (high - low)
    for position, crossed in enumerate(classes):
        found = symbols[:, index == position]
        counts = np.bincount((lines + (found - low)).ravel(), minlength=len(symbols) * (high - low))
        here = costs[np.clip(crossed + OFFSETS, 0, 87), low:high]
        total += counts.reshape(len(symbols), -1).astype(np.float64) @ here.T
    return OFFSETS[total.argmin(1)]


def choose_shape(symbols: np.ndarray, classes: np.ndarray, bell: Bell) -> Bell:
    """Return the bell with the tail, then the zero, that costs these symbols least."""
    index = classes.astype(np.intp) * NUM_SYMBOLS + symbols
    counts = np.bincount(index.ravel(), minlength=22528).reshape(NUM_CLASSES, -1)
    used = np.flatnonzero(counts.any(1))

    def cost(trial: Bell) -> float:
        return (table_costs(bell_tables(trial, used)) * counts[used]).sum()

    bell = min((bell._replace(tail=tail) for tail in TAILS), key=cost)
    return min((bell._replace(zero=zero) for zero in ZEROS), key=cost)


def fit_bell(values: np.ndarray, bell: Bell) -> tuple[Bell, np.ndarray, np.ndarray]:
    """Return the bell completed, row offsets and column offsets for a matrix of int16 values around 0."""
    rows, cols = np.zeros(len(values), np.int16), np.zeros(values.shape[1], np.int16)
    if not values.size:
        return bell, rows, cols
    within = np.clip(values, -127, CENTER)
    bell = bell._replace(low=min(int(within.min()), 0), high=max(int(within.max()), 0))
    symbols = symbols_of(values)
    costs = table_costs(bell_tables(bell, ALL_CLASSES))
    counts = np.bincount(symbols.ravel(), minlength=NUM_SYMBOLS)
    bell = bell._replace(base=int((costs @ counts).argmin()), column_class=FIRST_SIDE, row_class=FIRST_SIDE)
    for _ in range(FIT_ROUNDS):
        cols = choose_offsets(symbols.T, bell.base + rows, costs, bell.column_class)
        rows = choose_offsets(symbols, bell.base + cols, costs, bell.row_class)
        middles = int(np.median(cols)), int(np.median(rows))
        rows, cols = (rows - middles[1]).astype(np.int16), (cols - middles[0]).astype(np.int16)
        bell = bell._replace(base=int(np.clip(bell.base + sum(middles), 0, 87)))
        bell = bell._replace(column_class=side_class(cols), row_class=side_class(rows))
        classes = np.clip(bell.base + rows[:, None].astype(int) + cols, 0, 87)
        bell = choose_shape(symbols, classes, bell)
        costs = table_costs(bell_tables(bell, ALL_CLASSES))
    return bell, rows, cols


def choose_learning(rows: np.ndarray, bells: np.ndarray, values: np.ndarray) -> int:
    """Return how much the bells should weigh against what they coded, by the bits of these values."""
    tables = LearningTables(bells, MAX_LEARN)
    found = [tables.count(rows[part], values[part]) for part in tables.parts(len(rows))]
    bits = []
    for learn in LEARNS:
        tables = LearningTables(bells, learn)
        bits.append(0.0)
        for counts in found:
            bits[-1] += (table_costs(tables.draw()) * counts).sum()
            tables.counts += counts
    return LEARNS[int(np.argmin(bits))]


def choose_lags(values: np.ndarray) -> np.ndarray:
    """Return for each row how far above it the row is from which it differs least; 0 if none is like it."""
    size = np.abs(values.astype(np.int32)).sum(1)
    least, lags = ALIKE * size, np.zeros(len(values), np.int16)
    for lag in range(1, min(MAX_LAG, len(values) - 1) + 1):
        away = np.abs(values[lag:].astype(np.int32) - values[:-lag]).sum(1)
        nearer = np.flatnonzero(away < least[lag:]) + lag
        least[nearer], lags[nearer] = away[nearer - lag], lag
    return lags


def encode_codes(matrices: Sequence[np.ndarray]) -> bytes:
    """Code matrices of integers that fit int16 into one stream; decode_codes needs their shapes."""
    fitted = []
    for codes in matrices:
        center = int(np.median(codes)) if codes.size else 0
        values = codes.astype(np.int64) - center
        step = max(1, int(np.gcd.reduce(values, axis=None)))
        values = (values // step).astype(np.int16)  # modulo 2^16, like the reader
        lags = choose_lags(values)
        values[lags > 0] -= values[np.flatnonzero(lags) - lags[lags > 0]]
        bell, rows, cols = fit_bell(values, Bell(center, step, lag_class=side_class(lags)))
        learn = choose_learning(*element_tables(bell, rows, cols), values.ravel())
        fitted.append((values, lags, bell._replace(learn=learn), rows, cols))
    fields = np.array([Bell(), *(bell for _, _, bell, _, _ in fitted)], np.int64)
    writer = CodeWriter()
    changes = np.diff(fields, axis=0).astype(np.int16).ravel()
    table = bell_tables(CLASS_TABLES, np.array([PARAMETER_CLASS]))
    writer.write(table, np.zeros(len(changes), np.uint8), changes)
    for values, lags, bell, rows, cols in fitted:
        writer.write(*side_tables(bell, *values.shape), np.concatenate([cols, rows, lags]))
        writer.write_learning(*element_tables(bell, rows, cols), values.ravel(), bell.learn)
    return writer.finish(num_lanes([codes.shape for codes in matrices]))


def encode_halves(vectors: Sequence[np.ndarray]) -> bytes:
    """Code float16 vectors, such as scales, as decode_halves says, in the way of the fewest bytes."""
    bits = [vector.view(np.int16)[None] for vector in vectors]
    whole = np.concatenate([np.empty((1, 0), np.int16), *bits], 1)
    lows = whole & ((1 << LOW_BITS) - 1)
    blob = b"\0\0" + encode_codes([*(part >> LOW_BITS for part in bits), lows])
    known = np.unique(whole)
    if 0 < 2 * len(known) < whole.size:
        ranks = [np.searchsorted(known, part).astype(np.int16) for part in bits]
        steps = np.diff(known, prepend=np.int16(0))[None]
        listed = len(known).to_bytes(2, "little") + encode_codes([*ranks, steps])
        blob = min(blob, listed, key=len)
    return blob


# train_gpt.py


def pack_model(
    model: GPT, cfg: Config, quantized: dict[str, Quantized], tokenizer_sha256: str
) -> tuple[bytes, list[tuple[str, int]]]:
    """Return an artifact's bytes and its ledger [(part, bytes)], whose sum is the file's size."""
    table = tensor_table(cfg)
    streams = pack_tensors(table, quantized, dict(model.named_parameters()))
    streams |= write_aids(model.aids)
    header = {"recipe": fixed_recipe(), "tokenizer_sha256": tokenizer_sha256, "tensors": table}
    return pack_artifact(header, streams)


def write_artifact(
    model: GPT, cfg: Config, quantized: dict[str, Quantized], tokenizer_sha256: str, path: Path
) -> list[tuple[str, int]]:
    """Write a quantized model; returns the ledger [(part, bytes)] whose sum is the file's size."""
    blob, ledger = pack_model(model, cfg, quantized, tokenizer_sha256)
    with atomic_file(path) as file:
        file.write(blob)
    return ledger


def read_recipe_of(header: dict, live: Config, path: Path) -> Config:
    """Merge the recipe in an artifact's header with the live fields of `live`."""
    if header["recipe"] != PACKED_RECIPE:
        raise ArtifactError(f"{path}: made with another recipe than this program. `python -m eval` reads it.")
    return live


def load_aids(streams: dict[str, Stream]) -> Aids:
    """Take what the scorer needs out of the streams."""
    return read_aids(take_streams(streams, aid_limits()))


def load_artifact(path: str | Path, live: Config, device: torch.device) -> tuple[GPT, Config, dict]:
    """Load a model from an artifact file.

    Model, quantizer and scoring settings come from the artifact; only live fields (paths, device) come
    from `live`. Returns the model, the merged config and the header.
    """
    path = Path(path)
    header, streams = read_artifact(path)
    cfg = read_recipe_of(header, live, path)
    table = tensor_table(cfg)
    if header["tensors"] != [list(row) for row in table]:
        raise ArtifactError(f"{path}: the tensor table is not that of the recipe in it.")
    check_numel(table, path.stat().st_size, path)
    aids = load_aids(streams)
    tensors = unpack_tensors(streams, table)
    wild = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wild:
        raise ArtifactError(f"{path}: {wild[0]} has values that are not finite; it is damaged.")
    model = make_gpt(cfg, device, "meta").to_empty(device=device)  # no weights are drawn for nothing
    model.load_state_dict(tensors)
    model.aids = aids
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


def seconds_for(seconds: float, num_bytes: int) -> float:
    """Scale seconds that are meant for cfg.limit_text_bytes of text to so many bytes."""
    return seconds * num_bytes / 500000


def scoring_limit(num_bytes: int) -> float:
    """Return the seconds that scoring so many bytes of text may take."""
    return seconds_for(180.0, num_bytes)


def score_options(cfg: Config, text: ValidationText, ranks: Ranks) -> ScoreOptions:
    """Return how a scoring is batched and which batches are this rank's."""
    batch_tokens = cfg.run.val_batch_tokens // 1
    return ScoreOptions(text.bos_id, batch_tokens, ranks.device, ranks.rank, ranks.world_size)


def measure(nats: Tensor, text: ValidationText, ranks: Ranks) -> BpbMeter:
    """Put the ranks' nats of the first targets together, in bits per byte."""
    nats = ranks.sum(nats).numpy()
    meter = BpbMeter()
    meter.add(nats, text.target_bytes[: len(nats)])
    return meter


def validate(model: nn.Module, cfg: Config, text: ValidationText, ranks: Ranks) -> BpbMeter:
    """Score whole rows of data.seq_len tokens, as the contest does while it trains."""
    tokens = scored_tokens(text, 256, keep_tail=False)
    windows = plan_windows(len(tokens) - 1, 256)
    return measure(score_windows(model.eval(), tokens, windows, score_options(cfg, text, ranks)), text, ranks)


def score_model(
    model: nn.Module, cfg: Config, text: ValidationText, ranks: Ranks, scoring: Scoring | None = None
) -> Score:
    """Score a validation text as cfg.eval says, with all ranks; every rank returns the same score."""
    settings, scoring = cfg.eval, scoring or Scoring()
    tokens = scored_tokens(text, 192, True)
    options = score_options(cfg, text, ranks)
    num_bytes = int(text.target_bytes[: len(tokens) - 1].sum())
    deadline_s = seconds_for(0.0, num_bytes)
    windows = Settings(192, 64, deadline_s, scoring.switch_at)
    session = Session(tokens, windows, options, ranks, scoring.reports)
    scorer = model.eval()
    if scoring.warms_up:
        rehearse(model, scorer, session)
    ranks.synchronize()
    started = time.perf_counter()
    session.start(scoring_cost(tokens, model.aids))
    if session.options.cost is not plain_cost:
        session.referee.event("precompute", 0, len(tokens) - 1)  # hints: each reads its own prefix
    outcome = score_session(scorer, session)
    meter = measure(outcome.nats, text, ranks)
    seconds = ranks.agree(time.perf_counter() - started)
    totals = (meter.val_loss, meter.val_bpb, meter.num_tokens, meter.num_bytes)
    tail = "included"
    return Score(*totals, "lora-ttt", 192, 64, tail, seconds, *outcome[1:], text.loses)


def new_average(model: nn.Module) -> Ema | None:
    """Make the average that a recipe asks for."""
    return Ema(model, 0.98)


class Training:
    """Everything that a step changes, with one state_dict."""

    def __init__(self, cfg: Config, ranks: Ranks, bos_id: int):
        self.cfg, self.ranks = cfg, ranks
        self.step = 0
        self.train_ms = 0.0
        self.model = build_model(cfg, ranks.device)
        self.optimizers = Optimizers(self.model, cfg, ranks)
        self.average = new_average(self.model)
        self.loader = open_loader(cfg, bos_id)
        plain = ranks.device.type == "cpu" and True
        self.loss = mean_loss_in_blocks if plain else mean_loss

    def parts(self) -> dict:
        """Name the parts whose state survives a step."""
        parts = {"model": self.model, "optimizers": self.optimizers, "loader": self.loader}
        parts |= {"average": self.average}
        return parts

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {"step": self.step, "train_ms": self.train_ms}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.train_ms = state["step"], state["train_ms"]

    def micro_step(self, phase: Phase, index: int) -> Tensor:
        """Add this rank's micro-batch `index` of the step to the gradient; returns its share of the loss."""
        micro_steps = phase.stage.micro_batches // self.ranks.world_size
        batch = next_batch(self.loader, phase.stage, self.ranks)
        loss = self.loss(self.model, batch, 1) / micro_steps
        loss.backward()
        return loss.detach()

    def accumulate(self, phase: Phase, out_of_time: Callable[[], bool]) -> float | None:
        """Add up a step's gradients; returns the mean loss over ranks, or None when time ran out in it."""
        self.model.train()
        return self.run_micro_steps(phase, out_of_time)

    def run_micro_steps(self, phase: Phase, out_of_time: Callable[[], bool]) -> float | None:
        """Run a step's micro-batches of this rank."""
        total = torch.zeros((), device=self.ranks.device)
        for index in range(phase.stage.micro_batches // self.ranks.world_size):
            if index > 0 and out_of_time():
                self.optimizers.zero_grad()
                return None
            total += self.micro_step(phase, index)
        return float(self.ranks.sum(total).item()) / self.ranks.world_size

    def update(self, elapsed_ms: float) -> None:
        """Change the weights with the accumulated gradients and count the step."""
        rates = step_rates(self.cfg, self.step, elapsed_ms)
        self.optimizers.step(rates)
        self.step += 1
        if isinstance(self.average, Ema):
            self.average.update()


def phases_of(cfg: Config) -> list[Phase]:
    """List the phases that a run goes through, in order; each may be a compiled graph of its own."""
    steps = max(cfg.run.iterations, 1)
    starts = [stage.start if stage.start < 1 else stage.start / steps for stage in stages_of(cfg)]
    points = sorted({0.0, *starts, *(), 1.0})
    phases = [phase_at(cfg, round(point * steps), point) for point in points if point <= 1]
    return list(dict.fromkeys(phases))


def collect_statistics(training: Training) -> dict[str, Moments]:
    """Pass training text through the model: what calibration keeps of every quantized matrix, all ranks."""
    model, cfg = training.model, training.cfg
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in quantized_names(cfg)}
    modules["readout"] = model.readout
    model.eval()
    stage = stages_of(cfg)[-1]

    def run_batches() -> None:
        for _ in range(-(-8 // training.ranks.world_size)):
            batch = next_batch(training.loader, stage, training.ranks)
            (mean_loss(model, batch) * batch.targets.numel()).backward()
            training.optimizers.zero_grad()

    moments = collect_moments(modules, run_batches)
    for kept in moments.values():
        kept.merge(training.ranks.sum)
    return moments


def collect_aids(training: Training) -> Aids:
    """Make what the scorer takes from training text; rank 0, which writes the artifact, counts n-grams."""
    table = None
    if training.ranks.is_main:
        table = make_table(training.loader.shards)
    return Aids(table, ())


def warm_up(training: Training, log: Log) -> None:
    """Compile and time real steps before the clock starts, then restore all state; prints a projection."""
    cfg, ranks = training.cfg, training.ranks
    initial = copy.deepcopy(training.state_dict())
    for phase in phases_of(cfg):
        for step in range(max(cfg.run.warmup_steps, 1)):
            training.accumulate(phase, lambda: False)
            training.update(0.0)
            if step < cfg.run.warmup_steps:
                log.line(f"warmup_step:{step + 1}/{cfg.run.warmup_steps}")
    clock = Clock(ranks)
    clock.start()
    training.micro_step(phase, 0)
    micro_ms = clock.read_ms()
    training.update(0.0)
    update_ms = clock.stop() - micro_ms
    training.load_state_dict(initial)
    step_seconds = (micro_ms * (phase.stage.micro_batches // ranks.world_size) + update_ms) / 1000
    seconds = min(cfg.run.max_wallclock_seconds or math.inf, cfg.run.iterations * step_seconds)
    log.line(
        f"projected_step_seconds:{step_seconds:.3f} steps:{seconds / step_seconds:.0f} seconds:{seconds:.0f}"
    )


def validate_now(training: Training, log: Log, validate: Callable[[], BpbMeter]) -> None:
    """Score the validation text with the clock stopped and log the result."""
    score, step, train_ms = validate(), training.step, training.train_ms
    log.line(
        f"step:{step}/{training.cfg.run.iterations} val_loss:{score.val_loss:.4f} "
        f"val_bpb:{score.val_bpb:.4f} train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
    )
    log.event(kind="val", step=step, val_loss=score.val_loss, val_bpb=score.val_bpb, train_ms=train_ms)


def train(training: Training, log: Log, validate: Callable[[], BpbMeter]) -> dict:
    """Run the training loop under the clock, then apply the average; returns steps, time and speed."""
    cfg, run = training.cfg, training.cfg.run
    limit_ms = training_ms(cfg)
    clock = Clock(training.ranks, training.train_ms)
    clock.start()
    elapsed_ms, phase, num_tokens = training.train_ms, None, 0
    stopped = elapsed_ms >= limit_ms
    while training.step < run.iterations and not stopped:
        step = training.step
        if run.val_loss_every > 0 and step % run.val_loss_every == 0:
            training.train_ms = elapsed_ms = clock.stop()
            validate_now(training, log, validate)
            clock.start()
        progress = run_progress(cfg, step, elapsed_ms)
        before, phase = phase, phase_at(cfg, step, progress)
        if before not in (None, phase):
            log.line(
                f"phase: seq_len:{phase.stage.seq_len} batch_tokens:{phase.stage.batch_tokens} "
                f"passes:{phase.passes} qat:{phase.qat} step:{step} train_time:{elapsed_ms:.0f}ms"
            )
        train_loss = training.accumulate(phase, lambda: clock.read_ms() >= limit_ms)
        if train_loss is None:
            stopped = True
            continue
        if not math.isfinite(train_loss):
            raise UserError(
                f"step {step + 1}: expected a finite train_loss, found {train_loss}; the log is kept. "
                "Lower optim.matrix_lr and optim.tied_embed_lr, or set optim.grad_clip_norm=1."
            )
        training.update(elapsed_ms)
        step, num_tokens = training.step, num_tokens + phase.stage.batch_tokens
        training.train_ms = elapsed_ms = clock.read_ms()
        stopped = elapsed_ms >= limit_ms
        if run.train_log_every > 0 and (step <= 10 or step % run.train_log_every == 0 or stopped):
            log.line(
                f"step:{step}/{run.iterations} train_loss:{train_loss:.4f} "
                f"train_time:{elapsed_ms:.0f}ms step_avg:{elapsed_ms / step:.2f}ms"
            )
        log.event(kind="train", step=step, train_loss=train_loss, train_ms=elapsed_ms)
    training.train_ms = clock.stop()
    if training.step < run.iterations:
        log.line(
            f"stopping_early: wallclock_cap train_time:{training.train_ms:.0f}ms "
            f"step:{training.step}/{run.iterations}"
        )
    training.average.apply()
    if run.val_loss_every >= 0:
        validate_now(training, log, validate)
    speed = 1000.0 * num_tokens / max(training.train_ms, 1e-9)
    return {"steps": training.step, "train_ms": training.train_ms, "tokens_per_second": speed}


# ----------------------------------------------------------------------------------------------------------
# 12 main
# ----------------------------------------------------------------------------------------------------------


def weigh_code(folder: Path) -> tuple[int, str]:
    """Write the run's packed source as folder/train_gpt.py; returns its bytes and a note on steps left out.

    From a checkout dev/pack.py packs this file with the run's recipe; a packed program copies itself.
    """
    target = folder / "train_gpt.py"
    here = Path(__file__).resolve()
    program = here.read_bytes()
    with atomic_file(target) as file:
        file.write(program)
    return len(program), ""


def log_setup(cfg: Config, training: Training, text: ValidationText, log: Log) -> None:
    """Log what runs, in the contest's lines where it has them."""
    ranks, run, model = (training.ranks, cfg.run, training.model)
    seen = len(text.target_bytes) // 256 * 256  # as the contest counts them
    name = Path(cfg.data.data_path).resolve().name
    dtype = str(model.compute_dtype).removeprefix("torch.")
    log.line(f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}", console=False)
    log.line(
        f"config_hash:{fixed_hash()}\n"
        f"val_bpb:enabled tokenizer_kind={text.tokenizer_kind} "
        f"tokenizer_path={cfg.data.tokenizer_path}\n"
        f"train_loader:dataset:{name} train_shards:{len(training.loader.files)}\n"
        f"val_loader:shards pattern={text.pattern} tokens:{seen}\n"
        f"val_bytes:{text.target_bytes.sum()} "
        f"raw_bytes:{text.raw_bytes or 'unknown, no manifest'}\n"
        f"tokenizer_report:{read_report(Path(text.pattern).parent, text.tokenizer_sha256)}\n"
        f"model_params:{sum((param.numel() for param in model.parameters()))}\n"
        f"world_size:{ranks.world_size} grad_accum_steps:{1 // ranks.world_size}\n"
        f"device:{ranks.device.type} compute_dtype:{dtype} compile:False\n"
        f"attention_mode:gqa backend:{model.attention} num_heads:2 num_kv_heads:2\n"
        "tie_embeddings:True embed_lr:0.02 head_lr:0.0 matrix_lr:0.02 scalar_lr:0.01\n"
        f"train_batch_tokens:4096 train_seq_len:256 iterations:{run.iterations} "
        f"warmup_steps:{run.warmup_steps} "
        f"max_wallclock_seconds:{run.max_wallclock_seconds:.3f}\n"
        f"seed:{run.seed}"
    )


def log_sizes(model: GPT, ledger: list[tuple[str, int]], log: Log) -> None:
    """Log code, model and total sizes in the contest's lines; the first total is of float32 weights."""
    float_bytes = sum(4 * param.numel() for param in model.parameters())
    (_, code_bytes), *parts = ledger
    model_bytes = sum(size for _, size in parts)
    log.line(
        f"Serialized model: {float_bytes} bytes\n"
        f"Code size: {code_bytes} bytes\n"
        f"Total submission size: {float_bytes + code_bytes} bytes\n"
        f"Serialized model int8+rans: {model_bytes} bytes "
        f"(payload_ratio:{float_bytes / model_bytes:.2f}x)\n"
        f"Total submission size int8+rans: {model_bytes + code_bytes} bytes"
    )


def log_score(score: Score, log: Log) -> None:
    """Log the artifact's score in the contest's final lines; a sliding score also under its own name."""
    exact = f"val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}"
    log.line(
        f"eval_mode:{score.mode} context_len:{score.context_len} stride:{score.stride} tail:{score.tail} "
        f"tokens:{score.num_tokens} bytes:{score.num_bytes} adapted:{score.switch_at}/{score.num_units}"
    )
    if score.invalid:
        log.line(f"invalid:{score.invalid}")
    if score.not_comparable:
        log.line(f"not_comparable:{score.not_comparable}")
    if score.mode == "sliding":
        log.line(f"final_int8_rans_sliding_window_exact {exact} stride:{score.stride}")
    rounded = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}"
    log.line(f"final_int8_rans_roundtrip {rounded} eval_time:{1000 * score.seconds:.0f}ms")
    log.line(f"final_int8_rans_roundtrip_exact {exact}")


def prepare_folder(folder: Path, cfg: Config) -> None:
    """Make the run folder and write its recipe; an older run of the name gives way, a resumed one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    old = ["result.json", ARTIFACT_NAME]
    old += ["train.log", "metrics.jsonl", EVENTS_NAME]
    for name in old:
        (folder / name).unlink(missing_ok=True)
    recipe = whole_recipe(cfg)
    for section, key in (name.split(".") for name in PLACE_FIELDS):
        recipe[section].pop(key)
    with atomic_file(folder / "recipe.toml") as file:
        file.write(format_toml(recipe).encode())


def finish(folder: Path, cfg: Config, result: dict, log: Log) -> None:
    """Print the ledgers and write result.json; raise when the submission is over a limit."""
    score, ledger = result["score"], result["ledger"]
    log.line("bytes of the submission\n" + format_ledger(ledger, 1000000, "bytes"))
    log.line("seconds by phase\n" + format_ledger(list(result["seconds"].items()), None, "s"))
    result |= {
        "artifact_sha256": sha256_file(folder / ARTIFACT_NAME),
        "config_hash": fixed_hash(),
        "seed": cfg.run.seed,
        "places": place_values(cfg),
    }
    write_json(folder / "result.json", result)
    log.line(f"run_folder:{folder}")
    check_bytes(ledger)
    check_seconds(score["seconds"], scoring_limit(score["num_bytes"]))


def place_values(cfg: Config) -> dict[str, str]:
    """Return {"section.key": value} of the fields that a run folder's recipe leaves out."""
    return {name: config_value(cfg, name) for name in PLACE_FIELDS}


def check_world_size(cfg: Config, world_size: int) -> None:
    """Raise unless the ranks can share every step's micro-batches."""
    for stage in stages_of(cfg):
        if stage.micro_batches % world_size:
            raise UserError(
                f"data.micro_batches={stage.micro_batches} must be a multiple of the world size "
                f"{world_size}, so that every number of ranks sees the same batch."
            )


def open_run(cfg: Config, environment: Environment, text: ValidationText) -> tuple[Training, Log, int]:
    """Make ranks, model (from a checkpoint if there is one) and run folder; also weigh the packed source."""
    ranks = Ranks(environment, cfg.run.device)
    started_at = time.localtime(ranks.agree(time.time()))  # rank 0's, so that all ranks name one folder
    run_id = cfg.run.run_id or time.strftime("%Y%m%d_%H%M%S", started_at) + f"_seed{cfg.run.seed}"
    training = Training(cfg, ranks, text.bos_id)
    log = Log(Path(cfg.run.out_dir) / run_id, ranks.is_main)
    code_bytes, packing_note = 0, ""
    if ranks.is_main:
        prepare_folder(log.folder, cfg)
        log.line("packing: the source, folded by the recipe, is the code that counts")
        code_bytes, packing_note = weigh_code(log.folder)
    log_setup(cfg, training, text, log)
    overrides = (f"environment_override:{key}={value}" for key, value in environment.overrides.items())
    for line in (packing_note, *overrides):
        log.line(line, console=False)
    return training, log, code_bytes


def store_model(training: Training, log: Log, sha256: str, code_bytes: int) -> list[tuple[str, int]]:
    """Calibrate on all ranks, quantize and write the artifact on rank 0; returns the ledger.

    sha256 is the tokenizer's.
    """
    model, cfg, started = training.model, training.cfg, time.perf_counter()
    moments = collect_statistics(training)
    model.aids = collect_aids(training)
    calibration = 1000 * (time.perf_counter() - started)
    log.line(f"calibration_time:{calibration:.0f}ms reserve:{14000.0:.0f}ms")
    over = training.train_ms + calibration - 1000 * cfg.run.max_wallclock_seconds
    if cfg.run.max_wallclock_seconds > 0 and over > 0:
        log.line(f"over_the_clock:{over:.0f}ms: raise quant.reserve_seconds or lower quant.calib_batches")
    ledger = [("code (packed train_gpt.py)", code_bytes)]
    if training.ranks.is_main:

        def size_of(quantized: dict[str, Quantized]) -> int:
            return code_bytes + len(pack_model(model, cfg, quantized, sha256)[0])

        quantized = quantize_model(model, cfg, moments, size_of)
        ledger += write_artifact(model, cfg, quantized, sha256, log.folder / ARTIFACT_NAME)
        log_sizes(model, ledger, log)
    training.ranks.barrier()
    return ledger


def run(cfg: Config, environment: Environment, checkpoint_path: Path | None = None) -> None:
    """Do the main job: train or go on training, average, quantize, pack, reload, score, report."""
    marks = [("", time.perf_counter())]

    def phase(name: str) -> None:
        marks.append((name, time.perf_counter()))

    require_codec()
    check_world_size(cfg, environment.world_size)
    text = load_validation(cfg.data)
    training, log, code_bytes = open_run(cfg, environment, text)
    ranks = training.ranks
    warm_up(training, log)
    phase("set-up and warm-up")

    facts = train(training, log, lambda: validate(training.model, cfg, text, ranks))
    log.line(
        f"peak memory allocated: {ranks.peak_memory_mib()} MiB reserved: {ranks.reserved_memory_mib()} MiB"
    )
    phase("training and validation")

    ledger = store_model(training, log, text.tokenizer_sha256, code_bytes)
    phase("quantize and write")
    model, packed_cfg, header = load_artifact(log.folder / ARTIFACT_NAME, cfg, ranks.device)
    text = load_validation(packed_cfg.data, text.pattern, header["tokenizer_sha256"])
    phase("reload")
    score = score_model(model, packed_cfg, text, ranks, Scoring(Reports(progress=ProgressLines(log.line))))
    phase("scoring")
    log_score(score, log)
    ranks.close()
    if ranks.is_main:
        seconds = {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}
        result = {**facts, "score": score._asdict(), "ledger": ledger, "seconds": seconds}
        result["tokenizer_report"] = read_report(Path(text.pattern).parent, text.tokenizer_sha256)
        finish(log.folder, cfg, result, log)


def score_file(path: Path, live: Config, environment: Environment) -> None:
    """Score an artifact and print the result as JSON; reads validation data only, and writes nothing."""
    ranks = Ranks(environment, live.run.device)
    model, cfg, header = load_artifact(path, live, ranks.device)
    text = load_validation(cfg.data, "", header["tokenizer_sha256"])
    score = score_model(model, cfg, text, ranks)
    ranks.close()
    if ranks.is_main:
        print(json.dumps(score._asdict()))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, resolve the config, run. A packed program takes live fields and actions."""
    fields = " ".join(config_fields(Config))
    parser = CommandParser(
        prog="train_gpt.py",
        description="Train, quantize, pack and score a model as one recipe says.",
        epilog=fields,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    parser.add_argument("--score", type=Path, metavar="FILE", help="score an artifact instead of training")
    args = parser.parse_args(argv)
    environment = read_environment()
    try:
        cfg = load_config(environment.overrides, args.overrides)
        if args.score:
            score_file(args.score, cfg, environment)
        else:
            run(cfg, environment, None)
    except UserError:
        if environment.rank == 0:
            raise
        time.sleep(2.0)  # rank 0 has the same error: let it speak, once, before torchrun ends all ranks
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
