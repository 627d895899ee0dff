"""Chunked and sliding-window scoring: every target exactly once, in the window where it is newest.

A stream of N + 1 tokens has N targets: target i is tokens[i + 1], predicted from tokens[: i + 1]. A scorer
is a callable `logits(tokens (B, T), starts_doc (B, T), first) -> (B, T - first, V)`; it knows no files,
no ranks and no model class.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.machine import copy_to_device

Logits = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
# cost(logits (R, V), targets (R,), positions (R,)) -> nats (R,); positions number the targets of the stream
Cost = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plan_windows(num_targets: int, context_len: int, stride: int = 0, keep_tail: bool = True) -> np.ndarray:
    """Plan windows over the targets; returns (W, 3) int64 rows (start, end, first).

    A window reads tokens[start:end] and scores targets [start + first, end); every target is scored in
    exactly one. stride 0 cuts the stream into chunks of context_len. With a stride, each later window
    scores the next `stride` targets with up to context_len tokens before their ends. Without keep_tail
    the targets past the last multiple of context_len are dropped, as the contest's baseline does.
    """
    if not keep_tail:
        num_targets = num_targets // context_len * context_len
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


def plain_cost(logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Charge the negative log softmax of the target, whatever its place."""
    return F.cross_entropy(logits, targets, reduction="none")


def scale_logits(logits: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """Multiply positive logits by one factor and negative ones by another: equal ones are a temperature."""
    return torch.where(logits > 0, positive * logits, negative * logits)


class ScaledCost(NamedTuple):
    """A cost of scaled logits (after contest pull request 1923)."""

    positive: float
    negative: float
    cost: Cost

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.cost(scale_logits(logits, self.positive, self.negative), targets, positions)


def scale_sums(logits: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Add up gradient and Hessian of the cost in the two scales over (R, V) logits; (6,) of their dtype."""
    parts = torch.stack([logits.clamp_min(0), logits.clamp_max(0)])  # (2, R, V): their sum is the logits
    chances = torch.einsum("s,srv->rv", scales.to(logits), parts).softmax(-1)
    means = torch.einsum("srv,rv->sr", parts, chances)
    hits = parts.gather(-1, targets.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    squares = torch.einsum("srv,trv,rv->str", parts, parts, chances)
    hessian = squares - means.unsqueeze(0) * means.unsqueeze(1)
    return torch.cat([(means - hits).to(scales.dtype).sum(-1), hessian.to(scales.dtype).sum(-1).flatten()])


def newton_step(scales: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Move the two scales to where gradient and Hessian of all targets put the least cost."""
    sums = sums.cpu()  # not every device has eigenvalues
    return scales - (torch.linalg.pinv(sums[2:].view(2, 2), hermitian=True) @ sums[:2]).to(scales.device)


class ScoreOptions(NamedTuple):
    """How windows are batched and charged, and which of the batches this process scores."""

    bos_id: int
    batch_tokens: int
    device: torch.device | str = "cpu"
    rank: int = 0
    world_size: int = 1
    cost: Cost = plain_cost
    compiles: bool = False  # where graphs can be made, for eval.lora_graphs


class CompiledWindows:
    """A model compiled for the commonest shape of a plan's batches; all other shapes run as they are.

    So do batches of which `fits` says, reading where their documents start, that the graph cannot take them.
    """

    def __init__(
        self,
        model: Logits,
        windows: np.ndarray,
        batch_tokens: int,
        fits: Callable[[torch.Tensor], bool] = lambda starts_doc: True,
    ):
        shapes = [
            (len(rows), *np.diff(windows[rows[0], :2]).tolist(), int(windows[rows[0], 2]))
            for rows in plan_batches(windows, batch_tokens)
        ]
        self.model, self.graph = model, torch.compile(model, dynamic=False)
        self.shape = max(shapes, key=Counter(shapes).__getitem__)  # (B, T, first)
        self.fits = fits

    def __call__(self, tokens: torch.Tensor, starts_doc: torch.Tensor, first: int) -> torch.Tensor:
        run = self.graph if (*tokens.shape, first) == self.shape and self.fits(starts_doc) else self.model
        return run(tokens, starts_doc, first)


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
    """Write a line after the first percent, each tenth of a job and 5 seconds, with the time left."""

    def __init__(self, write: Callable[[str], None], job: str):
        self.write, self.job, self.pace, self.percent = write, job, Pace(), 0
        self.at = time.perf_counter()  # of the last line

    def __call__(self, done: int, total: int) -> None:
        left, now = self.pace.seconds_left(done, total), time.perf_counter()
        percent = done * 100 // total
        is_due = percent // 10 > self.percent // 10 or percent > self.percent == 0 or now - self.at >= 5
        if left is not None and is_due and percent > self.percent and done < total >= 20:
            self.write(f"{self.job}: {percent}% seconds_left:{left:.0f}")
            self.percent, self.at = percent, now


@torch.no_grad()
def score_batch(
    model: Logits, tokens: np.ndarray, rows: np.ndarray, options: ScoreOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score windows of one shape; returns its targets' positions and nats, (R,), on the CPU."""
    length, first = int(rows[0, 1] - rows[0, 0]), int(rows[0, 2])
    span = rows[:, :1] + np.arange(length + 1)  # (B, T + 1)
    chunk = copy_to_device(tokens[span].astype(np.int64), options.device)
    inputs, targets = chunk[:, :-1], chunk[:, 1 + first :]
    logits = model(inputs, inputs == options.bos_id, first)  # (B, T - first, V)
    positions = torch.from_numpy(span[:, first:-1].ravel())
    nats = options.cost(logits.float().flatten(0, 1), targets.flatten(), positions)
    return positions, nats.float().cpu()


def score_windows(
    model: Logits,
    tokens: np.ndarray,
    windows: np.ndarray,
    options: ScoreOptions,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Score the windows of a token stream; returns the nats of each target, (N,) float32 on the CPU.

    Batches are dealt round-robin to the ranks and their composition does not depend on world_size: a
    target that another rank scores is 0 here, so a sum over ranks is exact and the same for any number.
    progress(done, total) is called with batch counts.
    """
    num_targets = int(windows[-1, 1]) if len(windows) else 0
    nats = torch.zeros(num_targets)
    batches = plan_batches(windows, options.batch_tokens)
    for index in range(options.rank, len(batches), options.world_size):
        positions, costs = score_batch(model, tokens, windows[batches[index]], options)
        nats[positions] = costs
        if progress:
            progress(index + 1, len(batches))
    return nats
