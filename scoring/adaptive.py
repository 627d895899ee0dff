"""Score-first test-time training: a target is scored before any update reads it, exactly once.

A model is a module called as in scoring/sliding.py; modules of it that have an attribute `adapter` add
`adapter(x)` to their output while one is attached. Three ways to adapt: SGD on all weights after each scored
chunk, low-rank corrections that start afresh with each document, and those with SGD phases between them.
Documents are scored longest first, not in the order of the text: the contest's practice, which some
reviewers dispute (pull request 1536). Which targets are scored together, and in which order, does not
depend on the number of ranks. Weights, gradient flags and adapters are as before when a scorer returns.
The clock may end adaptation early; the outcome says where, so that the score can be replayed.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from kernels.machine import copy_to_device
from scoring.config import EvalConfig
from scoring.sliding import Cost, Logits, ScoreOptions, plain_cost, plan_batches, plan_windows, score_batch

# What a recipe calls a place for an adapter -> the attributes of the modules that take one.
ADAPTER_SITES = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("out",),
    "mlp": ("up", "down"),
    "head": ("head", "readout"),
}


class WindowSettings(NamedTuple):
    """Windows of the scorer and its time limit."""

    context_len: int
    stride: int
    deadline_s: float = 0.0  # seconds in which scoring should end; 0: no limit
    switch_at: int = -1  # units that adapt before plain scoring takes over; -1: the clock decides


class Callbacks(NamedTuple):
    """Who is told what happens."""

    on_event: Callable[[dict], None] | None = None  # {seq, rank, kind, lo, hi, doc, seconds}
    progress: Callable[[int, int], None] | None = None  # targets done, targets in all


class ScoringResult(NamedTuple):
    """What one rank knows after scoring."""

    nats: torch.Tensor  # (N,) float32 on the CPU; 0 where another rank scored
    num_units: int  # chunks or batches of documents
    switch_at: int  # of them adapted; the rest was scored plainly
    invalid: str  # why the score breaks the rules; empty when it does not


class CausalityChecker:
    """Keep the event log and hold it to the rule: scored once, and before an update reads it.

    An update that reads unscored targets marks the whole result invalid, whichever scorer made it.
    """

    def __init__(self, num_targets: int, rank: int, on_event: Callable[[dict], None] | None):
        self.scored = np.zeros(num_targets, dtype=bool)
        self.rank, self.on_event = rank, on_event
        self.started = time.perf_counter()
        self.seq = 0
        self.invalid = ""

    def event(self, kind: str, lo: int, hi: int, doc: int = -1) -> None:
        """Report that targets [lo, hi) had something done to them."""
        if self.on_event:
            seconds = round(time.perf_counter() - self.started, 6)
            row = (self.seq, self.rank, kind, int(lo), int(hi), int(doc), seconds)
            self.on_event(dict(zip(("seq", "rank", "kind", "lo", "hi", "doc", "seconds"), row)))
            self.seq += 1

    def score(self, lo: int, hi: int, doc: int = -1, here: bool = True) -> None:
        """Note that targets [lo, hi) have their score; not `here`: on another rank, which reports it."""
        if self.scored[lo:hi].any():
            raise ValueError(f"targets [{lo}, {hi}) are scored twice")
        self.scored[lo:hi] = True
        if here:
            self.event("score", lo, hi, doc)

    def update(self, lo: int, hi: int, doc: int = -1) -> None:
        """Note that weights are about to change by what targets [lo, hi) say."""
        if not self.invalid and not self.scored[lo:hi].all():
            self.invalid = f"an update read targets [{lo}, {hi}) before they were scored (contest rule C3)"
        self.event("update", lo, hi, doc)


class ScoringRun:
    """One scoring of N + 1 tokens: costs, causality checker, clock, and this rank's share of the work.

    ranks is asked for broadcast(value) -> rank 0's value and average(tensors) over ranks, in place.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        settings: WindowSettings,
        options: ScoreOptions,
        ranks,
        reports: Callbacks,
    ):
        self.tokens, self.settings, self.options, self.ranks = tokens, settings, options, ranks
        self.num_targets = len(tokens) - 1
        self.nats = torch.zeros(self.num_targets)
        self.checker = CausalityChecker(self.num_targets, options.rank, reports.on_event)
        self.progress = reports.progress
        self.num_done = 0
        self.checked_at = self.checker.started
        self.score_seconds, self.score_tokens = 0.0, 0  # of forward passes on this rank

    def start(self, cost: Cost) -> None:
        """Start the clock and charge targets by `cost` from here on."""
        self.options = self.options._replace(cost=cost)
        self.checker.started = self.checked_at = time.perf_counter()

    def is_mine(self, index: int) -> bool:
        """Whether this rank does unit `index`."""
        return index % self.options.world_size == self.options.rank

    def record(self, positions: torch.Tensor, nats: torch.Tensor, started: float, num_read: int) -> None:
        """Keep the nats of targets, on the CPU, and what forward passes over num_read tokens took."""
        self.nats[positions] = nats
        self.score_seconds += time.perf_counter() - started
        self.score_tokens += num_read

    def score_windows(self, model: Logits, windows: np.ndarray) -> None:
        """Score windows without adaptation, with all ranks."""
        for index, batch in enumerate(plan_batches(windows, self.options.batch_tokens)):
            rows = windows[batch]
            if self.is_mine(index):
                started = time.perf_counter()
                positions, nats = score_batch(model, self.tokens, rows, self.options)
                self.record(positions, nats, started, int((rows[:, 1] - rows[:, 0]).sum()))
            for lo, hi in scored_spans(rows):
                self.checker.score(lo, hi, here=self.is_mine(index))
            self.advance(int((rows[:, 1] - rows[:, 0] - rows[:, 2]).sum()))

    def advance(self, num_targets: int) -> None:
        """Report progress."""
        self.num_done += num_targets
        if self.progress:
            self.progress(self.num_done, self.num_targets)

    def may_adapt(self, unit: int, tokens_left: float, growth: float = 1.0) -> bool:
        """Decide, the same on every rank, whether `unit` adapts; afterwards tokens_left may be read plainly.

        It does not when what the last unit took, `growth` times, and then plain scoring would pass the
        deadline.
        """
        if self.settings.switch_at >= 0:
            return unit < self.settings.switch_at
        if not self.settings.deadline_s:
            return True
        now = time.perf_counter()
        last_unit, self.checked_at = now - self.checked_at, now
        pace = self.score_seconds / max(self.score_tokens, 1)
        finish = (
            now - self.checker.started + growth * last_unit + pace * tokens_left / self.options.world_size
        )
        return self.ranks.broadcast(finish) < self.settings.deadline_s

    def outcome(self, num_units: int, switch_at: int) -> ScoringResult:
        """Close the session; every target must have its score."""
        if not self.checker.scored.all():
            raise ValueError(f"target {int(self.checker.scored.argmin())} was never scored")
        return ScoringResult(self.nats, num_units, switch_at, self.checker.invalid)


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

    def __init__(self, model: nn.Module, cfg: EvalConfig, session: ScoringRun):
        self.model, self.cfg, self.session = model, cfg, session
        named = dict(model.named_parameters())
        frozen = tuple(f"blocks.{layer}." for layer in range(cfg.sgd_freeze_blocks))
        idle = [prefix for prefix in frozen if not any(name.startswith(prefix) for name in named)]
        if idle:
            raise UserError(
                f"eval.sgd_freeze_blocks={cfg.sgd_freeze_blocks}: expected at most the number of blocks, "
                f"found no weights of {idle[0]}*"
            )
        self.params = [param.requires_grad_(not name.startswith(frozen)) for name, param in named.items()]
        self.params = [param for param in self.params if param.requires_grad]
        self.optimizer = torch.optim.SGD(self.params, lr=cfg.sgd_lr, momentum=cfg.sgd_momentum)

    def train(self, inputs: np.ndarray, targets: np.ndarray, lr_mul: float) -> None:
        """Run all epochs over (R, T) rows of inputs and targets."""
        self.optimizer.param_groups[0]["lr"] = self.cfg.sgd_lr * lr_mul
        for _ in range(self.cfg.sgd_epochs):
            for start in range(0, len(inputs), self.cfg.sgd_batch_seqs):
                rows = slice(start, start + self.cfg.sgd_batch_seqs)
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
            x, y = (copy_to_device(part[rows].astype(np.int64), options.device) for part in (inputs, targets))
            logits = self.model(x, x == options.bos_id, 0)
            losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
            (losses * (options.world_size / inputs.size)).backward()
        self.session.ranks.average([param.grad for param in self.params])
        if self.cfg.sgd_clip_norm > 0:
            nn.utils.clip_grad_norm_(self.params, self.cfg.sgd_clip_norm)
        self.optimizer.step()


def chunk_lr_mul(index: int, count: int) -> float:
    """Fall from 1 at index 0 to 0 at index count - 1 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * index / max(count - 1, 1)))


def cut_rows(inputs: np.ndarray, targets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut (n,) inputs and targets into rows of seq_len; a rest shorter than a row is left out."""
    seq_len = min(seq_len, len(inputs))
    kept = len(inputs) // seq_len * seq_len
    return inputs[:kept].reshape(-1, seq_len), targets[:kept].reshape(-1, seq_len)


def plan_chunks(windows: np.ndarray, chunk_tokens: int) -> list[np.ndarray]:
    """Group consecutive windows whose first scored targets share a chunk of chunk_tokens targets."""
    chunks = (windows[:, 0] + windows[:, 2]) // chunk_tokens
    return np.split(windows, np.flatnonzero(np.diff(chunks)) + 1)


def score_sgd(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """Score chunk after chunk in sliding windows and train all weights on each scored chunk but the last."""
    tokens, settings = session.tokens, session.settings
    windows = plan_windows(session.num_targets, settings.context_len, settings.stride)
    chunks = plan_chunks(windows, cfg.sgd_chunk_tokens)
    left = sum(int((rows[:, 1] - rows[:, 0]).sum()) for rows in chunks)
    switch_at = len(chunks)
    with restored(model):
        trainer = SgdTrainer(model, cfg, session)
        for unit, rows in enumerate(chunks):
            session.score_windows(model, rows)
            left -= int((rows[:, 1] - rows[:, 0]).sum())
            if unit >= switch_at or unit + 1 == len(chunks):
                continue
            if not session.may_adapt(unit, left):
                switch_at = unit
                continue
            lo, hi = int(rows[0, 0] + rows[0, 2]), int(rows[-1, 1])
            inputs, targets = cut_rows(tokens[lo:hi], tokens[lo + 1 : hi + 1], settings.context_len)
            session.checker.update(lo, lo + inputs.size)
            trainer.train(inputs, targets, chunk_lr_mul(unit, len(chunks)))
    return session.outcome(len(chunks), switch_at)


def plan_pre_eval(num_targets: int, seq_len: int, batch_seqs: int = 32, lanes: int = 8) -> list[np.ndarray]:
    """List for each step of an epoch the sequences that it reads, as system C with `lanes` GPUs did.

    A lane walks a contiguous share of the whole sequences, batch_seqs at a time.
    """
    count = num_targets // seq_len
    bounds = [count * lane // lanes for lane in range(lanes + 1)]
    longest = max(hi - lo for lo, hi in pairwise(bounds))
    return [
        np.concatenate(
            [np.arange(min(lo + at, hi), min(lo + at + batch_seqs, hi)) for lo, hi in pairwise(bounds)]
        )
        for at in range(0, longest, batch_seqs)
    ]


def score_pre_eval(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """Train on the whole text, then score it: system C (contest pull request 281), against the rules.

    It exists to reproduce that system; its outcome is always marked invalid.
    """
    tokens, settings = session.tokens, session.settings
    inputs, targets = cut_rows(tokens[:-1], tokens[1:], settings.context_len)
    with restored(model):
        trainer = SgdTrainer(model, cfg, session)
        session.checker.update(0, inputs.size)
        for _ in range(cfg.sgd_epochs):
            for rows in plan_pre_eval(inputs.size, inputs.shape[1], cfg.sgd_batch_seqs):
                trainer.step(inputs[rows], targets[rows])
        session.score_windows(model, plan_windows(session.num_targets, settings.context_len, settings.stride))
    return session.outcome(1, 1)


# Documents


def plan_documents(tokens: np.ndarray, bos_id: int, max_tokens: int = 0) -> np.ndarray:
    """Cut the N targets of N + 1 tokens into documents; (D, 2) int64 rows (lo, hi) in the order of the text.

    A document reads tokens[lo:hi] and scores targets [lo, hi): its last target is the next document's BOS.
    Text before the first BOS is a document too. Longer ones than max_tokens (0: any) are cut.
    """
    num_targets = len(tokens) - 1
    bounds = np.unique(np.concatenate([[0], np.flatnonzero(tokens[:-1] == bos_id), [num_targets]]))
    if max_tokens:
        bounds = np.concatenate(
            [*(np.arange(lo, hi, max_tokens) for lo, hi in pairwise(bounds)), bounds[-1:]]
        )
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def plan_document_windows(documents: np.ndarray, context_len: int, stride: int) -> np.ndarray:
    """Plan sliding windows over each document by itself; (W, 3) rows as plan_windows makes them."""
    plans = [plan_windows(int(hi - lo), context_len, stride) + [lo, lo, 0] for lo, hi in documents]
    return np.concatenate([np.zeros((0, 3), dtype=np.int64), *plans])


def choose_chunk_tokens(length: int, cfg: EvalConfig) -> int:
    """Choose a document's chunk by its length."""
    return next((chunk for limit, chunk in cfg.lora_short_chunks if length <= limit), cfg.lora_chunk_tokens)


def plan_doc_batches(
    lengths: np.ndarray, cfg: EvalConfig, row_tokens: int, batch_tokens: int
) -> list[np.ndarray]:
    """Group documents of like length and equal chunk, longest first; returns their numbers.

    A row of a batch reads up to row_tokens tokens, all rows together up to batch_tokens.
    """
    batches: list[list[int]] = []
    for doc in np.argsort(-lengths, kind="stable"):
        batch = batches[-1] if batches else []
        longest = int(lengths[batch[0]]) if batch else 0
        most = min(cfg.lora_batch_docs, max(1, batch_tokens // max(1, min(longest, row_tokens))))
        chunk = choose_chunk_tokens(int(lengths[doc]), cfg)
        if not batch or len(batch) >= most or chunk != choose_chunk_tokens(longest, cfg):
            batches.append(batch := [])
        batch.append(int(doc))
    return [np.array(batch) for batch in batches]


def phase_ends(batches: list[np.ndarray], num_docs: int, num_phases: int) -> list[int]:
    """Return after how many batches each SGD phase comes, the last where num_docs documents are done.

    None comes where nothing would be left to score.
    """
    done = np.cumsum([len(batch) for batch in batches])
    goals = [num_docs * (i + 1) // num_phases for i in range(num_phases)]
    ends = {int(np.searchsorted(done, goal)) + 1 for goal in goals if goal > 0}
    return sorted(end for end in ends if end < len(batches))


# Adapters


class DocumentLora(nn.Module):
    """A low-rank correction of one module for each document of a batch and each visit of a forward pass.

    Visit k of a forward pass adds scale * (x down_k) up_k to the module's output; row b of x (B, T, in) is
    document b. A forward pass visits its module len(down) times, so `visit` is 0 between passes.
    """

    def __init__(self, start: torch.Tensor, num_docs: int, out_dim: int, scale: float):
        super().__init__()
        visits, _, rank = start.shape
        # No Parameters: of those torch.compile would make a graph for each number of documents.
        self.down = start.unsqueeze(1).repeat(1, num_docs, 1, 1).requires_grad_()  # (visits, B, in, rank)
        self.up = start.new_zeros(visits, num_docs, rank, out_dim).requires_grad_()  # 0: the identity
        self.scale = scale
        self.visit = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = (part[self.visit, : x.size(0)].to(x.dtype) for part in (self.down, self.up))
        self.visit = (self.visit + 1) % len(self.down)
        return (x @ down) * self.scale @ up  # the scale on the narrow side


class VisitCounter(nn.Module):
    """Count how often a forward pass calls a module; adds nothing."""

    def __init__(self):
        super().__init__()
        self.visits = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.visits += 1
        return x.new_zeros(())


def detach_adapters(model: nn.Module) -> None:
    """Take the adapters off all modules."""
    for module in model.modules():
        if hasattr(module, "adapter"):
            module.adapter = None


def find_sites(model: nn.Module, chosen: list[str]) -> dict[str, nn.Module]:
    """Find the modules that take the chosen adapters, by name; raises UserError for a choice without any."""
    sites = {name: module for name, module in model.named_modules() if hasattr(module, "adapter")}
    found = {}
    for site in chosen:
        here = {n: m for n, m in sites.items() if n.rpartition(".")[2] in ADAPTER_SITES.get(site, ())}
        if not here:
            known = [key for key, leaves in ADAPTER_SITES.items() if any(n.endswith(leaves) for n in sites)]
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


class StagedDocuments(NamedTuple):
    """Documents of a batch in (R, width) rows on the device, longest first; rows beyond theirs are empty."""

    docs: np.ndarray  # (B,) their numbers; B is at most R
    lengths: np.ndarray  # (R,) targets
    span: np.ndarray  # (R, width + 1) positions in the text; those that fill a row are the next BOS
    tokens: torch.Tensor  # (R, width + 1)
    ends: torch.Tensor  # (R, 1) the lengths
    nats: torch.Tensor  # (R, width) float32; what fills a row has a cost that nobody reads


def chunk_losses(
    model: nn.Module, inputs: torch.Tensor, starts_doc: torch.Tensor, targets: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, (B, T - first, V) float32 without a gradient, and each target's loss, (B, T - first)."""
    logits = model(inputs, starts_doc, first).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logits.detach(), losses.view_as(targets)


def graph_losses(
    model: nn.Module,
    sites: list[tuple[nn.Module, torch.Tensor, torch.Tensor]],
    inputs: torch.Tensor,
    starts_doc: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for torch.compile, of the last targets.size(1) positions; a graph serves any rows and T.

    Adapters come as arguments (module, down, up): sizes of what it finds on a module, a graph takes as fixed.
    """
    for module, down, up in sites:
        module.adapter.down, module.adapter.up = down, up
    # Counted from the end, the first position is the same number for every T.
    first = -targets.size(1) if inputs.size(1) > targets.size(1) else 0
    return chunk_losses(model, inputs, starts_doc, targets, first)


def learns_in_graphs(cfg: EvalConfig, options: ScoreOptions) -> bool:
    """Whether adapters learn in compiled graphs; where the recipe has none, a packed program has none."""
    return cfg.lora_graphs and options.compiles


def adapter_rate(cfg: EvalConfig, update: int) -> float:
    """Return the learning rate of a document's update, counted from 0."""
    return cfg.lora_lr / math.sqrt(1 + update * cfg.lora_lr_fall)


class LoraScorer:
    """Score batches of documents, each document with adapters of its own that learn as it goes by."""

    def __init__(self, model: nn.Module, session: ScoringRun, cfg: EvalConfig):
        if cfg.lora_warm_lanes % session.options.world_size:
            raise UserError(
                f"eval.lora_warm_lanes={cfg.lora_warm_lanes}: expected a multiple of the world size "
                f"{session.options.world_size}."
            )
        longest = max([cfg.lora_chunk_tokens, *(chunk for _, chunk in cfg.lora_short_chunks)])
        if longest > session.settings.context_len:
            raise UserError(
                f"chunk of {longest} tokens: expected at most the context of {session.settings.context_len}. "
                "Lower the chunk or raise the context."
            )
        self.model, self.session, self.cfg = model, session, cfg
        device = session.options.device
        self.sites = find_sites(model, cfg.lora_sites.split(",")) if cfg.lora_rank else {}
        self.starts = []
        generator = torch.Generator().manual_seed(cfg.lora_seed)
        for module, visits in zip(self.sites.values(), count_visits(model, self.sites, device)):
            noise = torch.rand(visits, module.in_features, cfg.lora_rank, generator=generator)
            self.starts.append(((2 * noise - 1) / math.sqrt(module.in_features)).to(device))
        self.graph = None
        if learns_in_graphs(cfg, session.options):
            self.graph = torch.compile(graph_losses, fullgraph=True)
        self.documents = plan_documents(session.tokens, session.options.bos_id, cfg.lora_max_doc_tokens)
        self.carried: dict[int, list[torch.Tensor]] = {}  # lane -> A of its last batch, mean over documents

    def score(self, batch: np.ndarray, index: int) -> None:
        """Score and learn documents, longest first, chunk by chunk; their nats leave the device once."""
        lane = index % self.cfg.lora_warm_lanes if self.cfg.lora_warm_lanes else 0
        began = time.perf_counter()
        chunk = choose_chunk_tokens(int(np.diff(self.documents[batch[0]])[0]), self.cfg)
        staged = self.stage(batch, chunk)
        params, optimizer = [], None
        for module, start in zip(self.sites.values(), self.carried.get(lane, self.starts)):
            scale = self.cfg.lora_alpha / self.cfg.lora_rank
            module.adapter = DocumentLora(start, len(staged.lengths), module.out_features, scale)
            params += [module.adapter.down, module.adapter.up]
        if params:
            rates = {"lr": self.cfg.lora_lr, "weight_decay": self.cfg.lora_weight_decay}
            betas = 0.0, self.cfg.lora_beta2
            optimizer = torch.optim.AdamW(params, betas=betas, eps=1e-10, fused=True, **rates)
        lengths = staged.lengths[: len(batch)]
        starts = np.arange(0, int(lengths[0]), chunk)
        shares, num_read, retired = self.share_out(lengths, starts, chunk), 0, [0.0] * len(self.sites)
        for i, (start, share) in enumerate(zip(starts.tolist(), shares)):
            if learns_in_graphs(self.cfg, self.session.options) and params:
                sums = self.drop_rows(optimizer, int((lengths > start).sum()), range(i, len(starts) - 1))
                retired = [before + more for before, more in zip(retired, sums)] if sums else retired
            num_read += self.score_chunk(staged, start, chunk, optimizer)
            self.session.advance(share)
        real = np.arange(staged.nats.size(1)) < staged.lengths[:, None]
        nats = staged.nats.cpu()[torch.from_numpy(real)]
        self.session.record(torch.from_numpy(staged.span[:, :-1][real]), nats, began, num_read)
        if self.cfg.lora_warm_lanes:
            downs = [module.adapter.down.detach()[:, : len(batch)] for module in self.sites.values()]
            self.carried[lane] = [(down.sum(1) + more) / len(batch) for down, more in zip(downs, retired)]
        detach_adapters(self.model)

    def stage(self, batch: np.ndarray, chunk: int) -> StagedDocuments:
        """Put a batch's tokens on the device, so that its chunks are slices that wait for nothing.

        All rows are as long as the longest document in whole chunks; what they lack is filled on the right,
        which no earlier position can see. A graph is not made for one row, so a document alone gets company.
        """
        documents = self.documents[batch]
        if learns_in_graphs(self.cfg, self.session.options) and len(batch) == 1:
            documents = np.concatenate([documents, documents[:, [1, 1]]])  # an empty one
        lo, hi = documents.T[:, :, None]
        width = -(-int((hi - lo).max()) // chunk) * chunk
        span = np.minimum(lo + np.arange(width + 1), hi)
        device = self.session.options.device
        tokens = copy_to_device(self.session.tokens[span].astype(np.int64), device)
        nats = torch.zeros(len(span), width, device=device)
        ends = copy_to_device(hi - lo, device)
        return StagedDocuments(batch, (hi - lo).ravel(), span, tokens, ends, nats)

    def share_out(self, lengths: np.ndarray, starts: np.ndarray, chunk: int) -> list[int]:
        """Divide a batch's targets among its passes as their time will be: what a bar of progress shows.

        On a CPU a pass takes as long as what it reads, and 2 tokens a document for its adapters' update; on a
        GPU all take as long, however few documents are left.
        """
        if torch.device(self.session.options.device).type == "cpu":
            read = np.minimum(starts + chunk, self.session.settings.context_len)
            times = (lengths[:, None] > starts).sum(0) * read + 2 * len(lengths)
        else:
            times = np.ones(len(starts))
        done = np.cumsum(times) * int(lengths.sum()) // times.sum()
        return np.diff(done, prepend=0).astype(int).tolist()

    def score_chunk(self, batch: StagedDocuments, start: int, chunk: int, optimizer) -> int:
        """Score targets [start, start + chunk) of each document, then learn those of documents that continue.

        All rows share one window, so a document's score does not depend on its company. Returns the tokens
        that plain scoring would have read in that time: learning costs two more passes.
        """
        options, longest = self.session.options, int(batch.lengths[0])
        learns = optimizer is not None and longest > start + chunk
        in_graph = learns_in_graphs(self.cfg, options) and learns
        rows = int((batch.lengths > start).sum())
        rows = optimizer.param_groups[0]["params"][0].size(1) if in_graph else rows
        begin, end = max(0, start + chunk - self.session.settings.context_len), start + chunk
        end = end if in_graph else min(end, longest)
        inputs, targets = batch.tokens[:rows, begin:end], batch.tokens[:rows, start + 1 : end + 1]
        fills = torch.arange(begin, end, device=options.device) >= batch.ends[:rows]  # a BOS: no document
        starts_doc = (inputs == options.bos_id) & ~fills
        with torch.set_grad_enabled(learns):
            if in_graph:
                logits, losses = self.run_graph(inputs, starts_doc, targets)
            else:
                logits, losses = chunk_losses(self.model, inputs, starts_doc, targets, start - begin)
        batch.nats[:rows, start:end] = self.charge(batch, start, logits, losses.detach(), targets)
        lo, hi = self.documents[batch.docs].T
        for doc, low, high in zip(batch.docs[:rows], lo + start, np.minimum(lo + end, hi)):
            if low < high:
                self.session.checker.score(low, high, doc)
        if learns:
            for doc, low in zip(batch.docs[hi - lo > start + chunk], lo + start):
                self.session.checker.update(low, low + chunk, doc)
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = adapter_rate(self.cfg, start // chunk)
            # Documents share no weight: adding their losses up keeps them independent.
            losses.backward(((batch.ends[:rows] > start + chunk) / chunk).expand_as(losses).contiguous())
            optimizer.step()
        return inputs.numel() * (3 if learns else 1)

    @torch.no_grad()
    def drop_rows(self, optimizer, alive: int, updates_left: range) -> list[torch.Tensor]:
        """Take documents that have ended out of the adapters once they are a quarter of the rows.

        A graph computes all rows, and the longest document of a text is many times its neighbours. Returns
        the sum of what left of each site's A, decayed as the updates that are left would; [] if none did.
        """
        params, rows = optimizer.param_groups[0]["params"], max(alive, 2)
        if 4 * rows > 3 * params[0].size(1):
            return []
        rates = [adapter_rate(self.cfg, update) for update in updates_left]
        decay = math.prod(1 - rate * self.cfg.lora_weight_decay for rate in rates)
        sums = [decay * down[:, rows:].sum(1) for down in params[::2]]  # A and B of a site take turns
        for param in params:  # strides of a slice would need a graph of their own
            param.grad, state = None, optimizer.state[param]
            param.data = param[:, :rows].clone(memory_format=torch.contiguous_format)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name][:, :rows].clone(memory_format=torch.contiguous_format)
        return sums

    def run_graph(
        self, inputs: torch.Tensor, starts_doc: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the graph of this chunk; which sizes vary, it is told before it is made."""
        sites = [(site, site.adapter.down, site.adapter.up) for site in self.sites.values()]
        for factor in (part for _, *parts in sites for part in parts):
            torch._dynamo.mark_dynamic(factor, 1)
        for part in (inputs, starts_doc, targets):
            torch._dynamo.mark_dynamic(part, 0)
        longer, chunk = inputs.size(1) > targets.size(1), targets.size(1)
        for part in (inputs, starts_doc):
            if longer and self.session.settings.context_len > chunk + 1:
                torch._dynamo.maybe_mark_dynamic(part, 1)  # what a bias is padded to is a condition on T
            else:
                torch._dynamo.mark_static(part, 1)
        torch._dynamo.mark_static(targets, 1)
        return self.graph(self.model, sites, inputs, starts_doc, targets)

    def charge(
        self,
        batch: StagedDocuments,
        start: int,
        logits: torch.Tensor,
        losses: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the nats of targets from `start` on, (B, T), by the cost of the session."""
        if self.session.options.cost is plain_cost:
            return losses
        rows, width = targets.shape
        # Chosen on the CPU: the device would have to say how many there are.
        real = start + np.arange(width) < batch.lengths[:rows, None]
        positions = torch.from_numpy(batch.span[:rows, start : start + width][real])
        chosen = copy_to_device(np.flatnonzero(real), losses.device)
        nats = self.session.options.cost(logits.flatten(0, 1)[chosen], targets.flatten()[chosen], positions)
        return torch.zeros_like(losses).flatten().scatter(0, chosen, nats.float()).view_as(losses)

    def learn_phase(self, docs: np.ndarray) -> None:
        """Train all weights on scored documents, with all ranks; adapters start afresh."""
        tokens, spans = self.session.tokens, self.documents[docs]
        for doc, (lo, hi) in zip(docs, spans):
            self.session.checker.update(lo, hi, doc)
        inputs = np.concatenate([tokens[lo:hi] for lo, hi in spans])
        targets = np.concatenate([tokens[lo + 1 : hi + 1] for lo, hi in spans])
        inputs, targets = cut_rows(inputs, targets, self.session.settings.context_len)
        trainer = SgdTrainer(self.model, self.cfg, self.session)
        size = max(1, self.cfg.sgd_chunk_tokens // inputs.shape[1])
        starts = range(0, len(inputs), size)
        for i, start in enumerate(starts):
            rows = slice(start, start + size)
            trainer.train(inputs[rows], targets[rows], chunk_lr_mul(i, len(starts)))
        self.model.requires_grad_(False).zero_grad()
        self.carried.clear()


def score_lora(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """Score documents with adapters of their own, longest first (contest pull requests 1530, 1767)."""
    return score_documents(model, session, cfg)


def score_phased(model: nn.Module, session: ScoringRun, cfg: EvalConfig) -> ScoringResult:
    """The same with SGD on the documents done so far, until cfg.phase_docs are (pull requests 1610, 1626)."""
    return score_documents(model, session, cfg, cfg.phase_docs)


def score_documents(
    model: nn.Module, session: ScoringRun, cfg: EvalConfig, phase_docs: int = 0
) -> ScoringResult:
    """Score documents with adapters of their own; SGD phases come until phase_docs are done."""
    options, settings = session.options, session.settings
    with restored(model):
        model.requires_grad_(False)
        scorer = LoraScorer(model, session, cfg)
        lengths = np.diff(scorer.documents).ravel()
        batches = plan_doc_batches(lengths, cfg, settings.context_len, options.batch_tokens)
        passes = [-(-lengths[batch[0]] // choose_chunk_tokens(lengths[batch[0]], cfg)) for batch in batches]
        over = np.maximum(lengths - settings.context_len, 0)
        costs = lengths - over + -(-over // settings.stride) * settings.context_len  # tokens of plain windows
        left = np.cumsum([int(costs[batch].sum()) for batch in batches][::-1])[::-1]
        ends = phase_ends(batches, phase_docs, cfg.phase_count)
        told = {settings.switch_at} & set(range(1, len(batches)))
        rounds = [  # a batch for each rank; none crosses a phase or the switch that was asked for
            range(start, min(start + options.world_size, hi))
            for lo, hi in pairwise(sorted({0, *ends, *told, len(batches)}))
            for start in range(lo, hi, options.world_size)
        ]
        switch_at = len(batches)
        before = 0
        for turn in rounds:
            tokens_left, growth = float(left[turn.start]), passes[turn.start] / passes[before]
            if turn.stop in ends:  # SGD reads each token forwards and backwards
                learned = int(lengths[np.concatenate(batches[: turn.stop])].sum())
                tokens_left += 3 * cfg.sgd_epochs * learned
            if not session.may_adapt(turn.start, tokens_left, growth):
                switch_at = turn.start
                break
            before = turn.start
            score_round(scorer, batches, turn)
            if turn.stop in ends:
                scorer.learn_phase(np.concatenate(batches[: turn.stop]))
        rest = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *batches[switch_at:]]))
        if len(rest):
            plain = plan_document_windows(scorer.documents[rest], settings.context_len, settings.stride)
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
                scorer.session.checker.score(*scorer.documents[doc], doc, here=False)
            scorer.session.advance(int(np.diff(scorer.documents[batch]).sum()))
